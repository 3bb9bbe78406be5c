"""The trainer, the checks and the worker on a pretended GPU, which changes torch: so in a process of its own.

The tests are those of pretended_*_cases.py. Where a real GPU is found they are left out, and tests/test_gpu.py runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pretended_gpu


@pytest.mark.parametrize(
    "cases", sorted(Path(__file__).parent.glob("pretended_*_cases.py")), ids=lambda file: file.stem
)
def test_every_case_passes_on_a_pretended_gpu(cases: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(
        command, cwd=cases.parents[1], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert finished.returncode == 0, finished.stdout[-20_000:]
    assert " passed" in finished.stdout
