"""Runs an export where hpo and its task cannot be imported. A program of its own, which imports nothing of hpo.

    python -I standalone.py JOB.json

The job names the folder, the source of `load(folder)`, the modules that are forbidden, a file with batches and the file
for the outputs. Opening a connection fails, and so does a pickle that calls anything.
"""

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Forbidden(importlib.abc.MetaPathFinder):
    """Makes the import of some packages fail."""

    def __init__(self, names: list[str]) -> None:
        self.names = set(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ImportError(f"an export must not need {name}")


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError("an export must not use the network")
    if event == "pickle.find_class":
        raise RuntimeError(f"an export must not hold a pickle, but one calls {'.'.join(map(str, arguments))}")


def main(job: dict[str, Any]) -> None:
    sys.meta_path.insert(0, Forbidden(job["forbidden"]))
    names: dict[str, Any] = {}
    exec(job["load"], names)
    for module in job["preload"]:
        __import__(module)
    sys.addaudithook(forbid)
    loaded = names["load"](job["folder"])
    if not callable(loaded):
        np.savez(job["outputs"], **loaded)
        return
    batches: dict[int, dict[str, Any]] = {}
    with np.load(job["batches"]) as stored:
        for key in stored:
            number, _, name = key.partition("/")
            batches.setdefault(int(number), {})[name] = stored[key]
    outputs = {}
    for number, inputs in sorted(batches.items()):
        for index, output in enumerate(loaded(inputs)):
            outputs[f"{number}/{index}"] = np.asarray(output)
    np.savez(job["outputs"], **outputs)  # type: ignore[arg-type]
    known = [name for name in sys.modules if name.partition(".")[0] in job["forbidden"]]
    if known:
        raise RuntimeError(f"the export has imported {known[0]}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
