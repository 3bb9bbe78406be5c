"""The search spaces that ship with hpo, each a module with a `space`: `hpo.search_spaces.digits` and so on.

A wheel has them in this folder, a checkout in its top-level folder `search_spaces`. They are found by their place, so
that a project can have a package `search_spaces` of its own.
"""

from pathlib import Path

_here = Path(__file__).parent
if not (_here / "digits.py").exists():
    __path__ = [str(_here.parents[1] / "search_spaces")]
