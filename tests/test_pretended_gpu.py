"""The trainer, the checks and the worker on a pretended GPU, which changes torch: so in a process of its own.

The tests are those of pretended_gpu_cases.py. Where a real GPU is found they are left out, and tests/test_gpu.py runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pretended_gpu


def test_every_case_passes_on_a_pretended_gpu() -> None:
    cases = Path(__file__).with_name("pretended_gpu_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(
        command, cwd=cases.parents[1], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert finished.returncode == 0, finished.stdout[-20_000:]
    assert " passed" in finished.stdout
