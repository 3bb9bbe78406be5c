"""The checklist: the checks in their order, of which a search runs the quick part first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpo.checks.compatibility import check_task, check_test_split
from hpo.checks.data import (
    check_duplicates,
    check_inputs,
    check_leak,
    check_normalised,
    check_preprocessing,
    check_targets,
)
from hpo.checks.learning import check_baseline, check_learning_rate, check_one_batch
from hpo.checks.network import check_first_loss, check_forward, check_gradients
from hpo.checks.originals import check_originals, has_originals
from hpo.checks.own_loop import check_loop
from hpo.checks.rehearsal import REHEARSAL, check_rehearsal
from hpo.checks.speed import check_speed
from hpo.checks.verdicts import Subject, Verdict, as_markdown
from hpo.data.datasets import split_dataset
from hpo.data_options import FLAG, Given, as_written, declared_options
from hpo.errors import UsageError
from hpo.home import Home, check_study_name, find_data_dir
from hpo.plots.checks import plot_checklist
from hpo.plugins import load_task
from hpo.task import load_dataset
from hpo.tracking.runs import begin_run
from hpo.tracking.store import open_store
from hpo.training.device import choose_device

if TYPE_CHECKING:
    from hpo.data.examples import Dataset, SealedSplit
    from hpo.parameters import Value
    from hpo.task import Task
    from hpo.tracking.runs import SummaryRun


def _quick_checks(subject: Subject) -> dict[str, Callable[[Subject], Verdict]]:
    """Those of QUICK_CHECKS, after what preprocessing has found in the raw examples."""
    return {"columns": check_preprocessing, **QUICK_CHECKS} if subject.spec.preprocessing else QUICK_CHECKS


QUICK_CHECKS: dict[str, Callable[[Subject], Verdict]] = {
    "inputs": check_inputs,
    "targets": check_targets,
    "normalisation": check_normalised,
    "forward pass": check_forward,
    "first loss": check_first_loss,
    "gradients": check_gradients,
}
"""They take at most a second for a small network, and train nothing."""


@dataclass(frozen=True, kw_only=True)
class Checklist:
    """What `hpo check` has found."""

    task: str
    configuration: dict[str, Value]
    """The default configuration, which was checked."""
    device: str
    data_options: list[str]
    """The options of the task's data, as `--data-option` takes them; with the defaults of those that were not given."""
    verdicts: list[Verdict]
    picture: Path | None
    """None for a task with a training loop of its own: nothing of it is drawn."""

    @property
    def is_wrong(self) -> bool:
        return any(verdict.state == "wrong" for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """The checklist as plain data."""
        return asdict(self) | {"picture": self.picture and str(self.picture)}


def run_check(
    task: str,
    *,
    overrides: Sequence[str] = (),
    fixed: Sequence[str] = (),
    space: str | None = None,
    limit: int | None = None,
    data_options: Given = (),
    device: str = "auto",
    data_dir: Path | None = None,
    home: Path | None = None,
    tracking_uri: str | None = None,
    tell: Callable[[Verdict], None] = lambda verdict: None,
) -> Checklist:
    """Check a task; the parameters are the options of `hpo check`, and `tell` hears each verdict at once.

    It is logged as a run `check` in the experiment that a search of the task would have. Raises UsageError where
    something given is wrong, or the data or the model cannot be used at all.
    """
    found = load_task(task, space).narrow(tuple(overrides))
    name, chosen_device = check_study_name(found.objective.name), choose_device(device)
    if found.objective.train:
        of_the_trainer = {
            "--set": " ".join(fixed) or None,
            "--limit": limit,
            "--data-dir": data_dir,
            FLAG: " ".join(data_options) or None,
        }
        for option, given in of_the_trainer.items():
            if given is not None:
                raise UsageError(
                    f"{option} {given} is for the shared trainer, and task '{name}' has a training loop of its own "
                    "(train=); omit it."
                )
        checks = check_loop(found, chosen_device)
    else:
        found = found.with_data_options(data_options).suited_to_data(find_data_dir(data_dir)).fix(fixed)
        dataset = load_dataset(found, find_data_dir(data_dir))
        splits = split_dataset(dataset, seed=0, limit=limit)
        check_task(found, splits)
        test = dataset.test_for(splits.spec)
        check_test_split(test, splits.spec)
        subject = Subject.of(found, splits, chosen_device)
        checks = chain(whole_list(subject, test), checks_of_files(subject, dataset))
    store = open_store(Home.find(home).path, tracking_uri)
    run = begin_run(store, name, "check", found.objective.description)
    state: Literal["complete", "failed", "interrupted"] = "interrupted"
    try:
        verdicts = []
        for verdict in checks:
            tell(verdict)
            verdicts.append(verdict)
        _log(run, name, verdicts, is_drawn=not found.objective.train)
        state = "failed" if any(verdict.state == "wrong" for verdict in verdicts) else "complete"
    finally:
        run.finish(state)
    return Checklist(
        task=name,
        configuration=found.space.active(found.space.defaults()),
        device=chosen_device,
        data_options=_options_in_use(found),
        verdicts=verdicts,
        picture=None if found.objective.train else store.download(run.run_id, "checklist.png"),
    )


def _options_in_use(task: Task) -> list[str]:
    declared = declared_options(task.objective.load)
    return list(as_written({name: task.data_options.get(name, each.default) for name, each in declared.items()}))


def quick_part(subject: Subject) -> list[Verdict]:
    """What a search checks before its first trial."""
    return list(_judged(subject, _quick_checks(subject)))


def whole_list(subject: Subject, test: SealedSplit) -> Iterator[Verdict]:
    """The verdicts of every check, each as soon as it is made; it trains for seconds."""
    yield from _judged(
        subject,
        {
            **_quick_checks(subject),
            REHEARSAL: check_rehearsal,
            "duplicates": check_duplicates,
            "test leak": partial(check_leak, test=test),
            "one batch": check_one_batch,
            "baseline": check_baseline,
            "learning rate": check_learning_rate,
            "speed by batch": check_speed,
        },
    )


def checks_of_files(subject: Subject, dataset: Dataset) -> Iterator[Verdict]:
    """What the files of photos give away; nothing for other data."""
    if has_originals(dataset):
        yield from _judged(subject, {"files": lambda subject: check_originals(dataset)})


def _judged(subject: Subject, checks: Mapping[str, Callable[[Subject], Verdict]]) -> Iterator[Verdict]:
    for name, check in checks.items():
        try:
            verdict = check(subject)
        except Exception as error:  # data and models are user code and may raise anything
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            verdict = Verdict(state="wrong", text=text, advice="the check failed to run; fix this first")
        yield replace(verdict, check=name)


def log_verdicts(run: SummaryRun, verdicts: Sequence[Verdict]) -> None:
    """Put the verdicts into the artifacts of a run, for people and as data."""
    run.log_text(as_markdown(verdicts), "checklist.md")
    run.log_dict({"verdicts": [asdict(verdict) for verdict in verdicts]}, "checklist.json")


def _log(run: SummaryRun, task: str, verdicts: Sequence[Verdict], *, is_drawn: bool) -> None:
    log_verdicts(run, verdicts)
    if is_drawn:
        run.log_figure("checklist.png", plot_checklist(task, {verdict.check: verdict.data for verdict in verdicts}))
    figures = {name: value for v in verdicts for name, value in v.data.items() if isinstance(value, int | float)}
    run.log_metrics({f"check/{name}": float(value) for name, value in figures.items()})
    run.set_tags({"hpo.task": task})
    run.set_note(as_markdown(verdicts))
