"""What the commands that export, register and predict report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpo.records import to_plain


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `hpo export` has written."""

    study: str
    trial: int
    format: str
    compression: str | None
    folder: Path
    num_bytes: int
    difference: float | None
    """Largest difference from the checkpoint's outputs, as a share of the largest where that is above 1; None where the
    weights alone are exported, which are equal in every bit."""
    num_checked: int
    """Validation examples that it was compared on."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        plain: dict[str, Any] = to_plain(asdict(self) | {"folder": str(self.folder)})
        return plain


@dataclass(frozen=True, kw_only=True)
class FormatRow:
    """One format of a model."""

    name: str
    score: float | None
    """On the validation split."""
    num_bytes: int
    latency_ms: dict[int, float]
    """Median time of a call by batch size."""
    problem: str | None = None
    """Why there is no such format."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What `hpo export --compare` has measured."""

    study: str
    trial: int
    metric: str
    num_examples: int
    num_threads: int
    rows: tuple[FormatRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What `hpo register` has registered."""

    name: str
    version: int
    model_id: str
    """Of the model that MLflow has logged: `models:/MODEL_ID` is it."""
    tracking_uri: str
    """MLflow's store, without a password."""
    is_champion: bool
    reason: str
    """Why it is the champion, or is not."""

    @property
    def uri(self) -> str:
        """The address that MLflow loads this version from."""
        return f"models:/{self.name}/{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"uri": self.uri}
