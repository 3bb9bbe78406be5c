"""Tasks and search spaces beside a user's own modules, whatever those are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TASK = """
import random

from objectives.names import NAME
from search_spaces.mine import space

from hpo.models.networks import mlp
from hpo.objective import Objective
from hpo.objectives.digits import load

objective = Objective(name=NAME, description="", load=load, model=mlp, space=space, settings={"max_epochs": 1})
assert random.random() < 1
"""
SPACE = """
from hpo.parameters import Float
from hpo.space import Group, Space

space = Space(Group("step size", lr=Float(1e-3, 0.1, default=0.01)))
"""


def test_a_project_with_modules_named_like_ours_or_like_a_library_is_searched(home: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name, text in {
        "task.py": TASK,
        "objectives/__init__.py": "",
        "objectives/names.py": "NAME = 'mine'",
        "search_spaces/__init__.py": "",
        "search_spaces/mine.py": SPACE,
        "random.py": "raise RuntimeError('not the library')",
        "torch.py": "raise RuntimeError('not the library')",
    }.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    hpo = str(Path(sys.executable).with_name("hpo"))
    command = [hpo, "search", "task.py", "--trials", "1", "--home", str(home), "--device", "cpu"]
    search = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert search.returncode == 0, search.stderr
    assert "Done: 1 complete" in search.stdout
    for name in ("random", "torch"):
        warning = f"{project / name}.py has the name of a library: `import {name}` finds the library. Rename the file."
        assert search.stderr.count(warning) == 1
