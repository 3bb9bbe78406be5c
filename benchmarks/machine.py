"""What a benchmark ran on, in the line that belongs beside its figures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(*packages: str) -> str:
    """Such as "torch 2.15.0, Python 3.11.7; AMD EPYC 7B13, 2 cores"."""
    versions = ", ".join([*(f"{name} {version(name)}" for name in packages), f"Python {platform.python_version()}"])
    return f"{versions}; {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    """Its name on Linux, elsewhere its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
