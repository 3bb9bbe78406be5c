"""The code that goes along with an export, for those who do not have hpo."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpo.data import values
from hpo.deploy import exported
from hpo.deploy.exported import LOADER, VALUES


def copy_code(folder: Path) -> list[Path]:
    """Put the code beside a model that runs it without hpo, and encodes rows and texts for it."""
    copies = [folder / f"{name}.py" for name in (LOADER, VALUES)]
    for source, copy in zip((exported.__file__, values.__file__), copies, strict=True):
        shutil.copyfile(source, copy)
    return copies
