"""What a report says of a study, as records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.search.findings import findings
from hpo.search.importances import importances
from hpo.search.winner import find_mistakes, find_winner, front_rows

if TYPE_CHECKING:
    from hpo.records import Mistake, TrialRecord, TrialState, Winner
    from hpo.search.findings import Finding
    from hpo.search.importances import Importances
    from hpo.search.settings import StudySettings
    from hpo.search.study import Study


@dataclass(frozen=True, kw_only=True)
class Content:
    """A study as its report shows it."""

    study: str
    settings: StudySettings
    trials: list[TrialRecord]
    """Of the search."""
    repeats: list[TrialRecord]
    """Of the confirmation."""
    counts: dict[TrialState, int]
    num_trials: int
    """Finished trials that were asked for."""
    is_done: bool
    winner: Winner | None
    mistakes: list[Mistake]
    """The test examples that the winner is most sure of and wrong about."""
    front: list[dict[str, Any]]
    """The Pareto front, as plain data; empty with one objective."""
    race: dict[str, Any] | None
    """How the confirmation stands, as plain data."""
    importances: Importances
    findings: list[Finding]
    made_with: list[str]
    """Lines about versions, commit and data."""
    commands: list[str]
    """The command lines of all sessions, in their order, each once."""

    @classmethod
    def of(cls, study: Study, *, made_with: list[str], commands: list[str]) -> Content:
        race, winner = study.race, find_winner(study)
        return cls(
            study=study.name,
            settings=study.settings,
            trials=study.trials(),
            repeats=study.repeats(),
            counts=study.counts(),
            num_trials=study.num_trials,
            is_done=study.is_done,
            winner=winner,
            mistakes=find_mistakes(study, winner) if winner else [],
            front=front_rows(study),
            race=race.to_dict() if race.contenders and study.has_searched else None,
            importances=importances(study),
            findings=findings(study),
            made_with=made_with,
            commands=commands,
        )

    @property
    def num_epochs(self) -> int:
        """Epochs, or folds, that the search has trained."""
        return sum(len(trial.curve) for trial in self.trials)

    @property
    def num_epochs_repeated(self) -> int:
        """Those of the confirmation."""
        return sum(len(repeat.curve) for repeat in self.repeats)

    @property
    def seconds(self) -> float:
        """Of training, over all trials and repeats."""
        return sum(trial.trained_s for trial in (*self.trials, *self.repeats))
