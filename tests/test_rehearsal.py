"""The rehearsal: what only training, evaluating, saving and resuming shows is found before the first trial."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
from helpers.data import LR_SPACE
from helpers.moody import study
from torch import Tensor, nn

from hpo import Choice, Group, Int, Objective, Space, UsageError, hold_out, split_dataset
from hpo.checks import rehearsal
from hpo.checks.rehearsal import check_rehearsal
from hpo.checks.verdicts import Subject, Verdict
from hpo.execution.observer import Observer
from hpo.plugins import OBJECT
from hpo.report.content import Content
from hpo.session.request import read_request
from hpo.session.search import run_search
from hpo.task import Task, load_dataset

# Or each worker would import this file, and with it all that tests need.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class MadeInEvaluation(nn.Linear):
    """A buffer that a new model does not have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("seen", None)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self.seen = torch.ones(3)
        return super().forward(inputs)


class KeptGraph(nn.Linear):
    """Computes something once, and differentiates it in each step."""

    once: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.once is None:
            self.once = self.weight.exp()
        return inputs @ self.once.T


class WithObject(nn.Linear):
    def get_extra_state(self) -> Any:
        return SimpleNamespace(calls=1)

    def set_extra_state(self, state: Any) -> None:
        pass


class Aux(nn.Linear):
    """Two outputs in training, as Inception has them, and one in an evaluation."""

    def forward(self, inputs: Tensor) -> Any:
        outputs = super().forward(inputs)
        return (outputs, outputs) if self.training else outputs


def odd(model: Callable[..., nn.Module], *parts: Group) -> Objective:
    features, classes = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    return Objective(
        name="odd", description="odd", load=lambda folder: hold_out(features, classes, ["a", "b", "c"]), model=model,
        space=Space(*LR_SPACE.groups, *parts), settings={"batch_size": 8, "max_epochs": 2, "compile": "off"},
    )  # fmt: skip


def rehearsed(model: Callable[..., nn.Module], *parts: Group) -> Verdict:
    objective = odd(model, *parts)
    task = Task(reference=OBJECT, objective=objective, space=objective.space)
    return check_rehearsal(Subject.of(task, split_dataset(load_dataset(task, Path()), seed=0), "cpu"))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (MadeInEvaluation, r'fails: RuntimeError: .*Unexpected key\(s\) in state_dict: "network.seen"'),
        (KeptGraph, "fails: RuntimeError: Trying to backward through the graph a second time"),
        (WithObject, "cannot be resumed: it may hold tensors and plain values alone; look at what get_extra_state"),
        (Aux, "fails: TypeError: cross_entropy_loss.* must be Tensor, not tuple"),
    ],
)
def test_a_rehearsal_finds_what_only_training_or_resuming_shows(model: type[nn.Linear], text: str) -> None:
    verdict = rehearsed(lambda spec: model(4, 3))
    assert verdict.state == "wrong"
    assert re.search(f"^the default configuration {text}", verdict.text), verdict.text


class Wide(nn.Linear):
    """Has room for 1500 activations, and breaks in a way of its own with `mode`."""

    def __init__(self, width: int = 8, mode: str = "fine") -> None:
        super().__init__(4, 3)
        self.width, self.mode = width, mode

    def forward(self, inputs: Tensor) -> Tensor:
        if self.width * len(inputs) > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.mode == "hangs":
            time.sleep(60)
        if self.mode == "dies":
            signal.raise_signal(signal.SIGKILL)
        return super().forward(inputs)


def wide(spec: Any, width: int = 8, mode: str = "fine") -> Wide:
    return Wide(width, mode)


BATCHES = Choice(4, 8, 16, default=8)


def test_a_rehearsal_tries_the_extremes_and_names_what_breaks() -> None:
    optimizers = Choice("sgd", "adam", "muon", default="adam")
    verdict = rehearsed(wide, Group("sizes", width=Int(2, 300, default=8), batch_size=BATCHES, optimizer=optimizers))
    assert (verdict.state, verdict.text) == ("warning", "width=300 with batch_size=16 does not fit in memory")
    assert verdict.advice == "trials with these values fail: leave them out with -p, or change the model"

    verdict = rehearsed(wide, Group("sizes", width=Int(2, 9, default=8), batch_size=BATCHES, optimizer=optimizers))
    text = "the default configuration and 4 extremes of the space train, are evaluated and resume"
    assert (verdict.state, verdict.text) == ("ok", text)


def test_a_default_that_breaks_is_reported_with_the_value_that_works() -> None:
    verdict = rehearsed(wide, Group("sizes", width=Int(2, 400, default=400), batch_size=BATCHES))
    text = "the default configuration does not fit in memory with width=400; width=2 works"
    assert (verdict.state, verdict.text) == ("wrong", text)


def test_what_hangs_or_takes_its_worker_with_it_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "EXTREME_S", 2.0)
    verdict = rehearsed(wide, Group("modes", mode=Choice("fine", "hangs", "dies", default="fine")))
    assert verdict.state == "warning"
    assert verdict.text == (
        "mode=dies fails: its worker was killed by SIGKILL (out of memory?); not finished in time (2 s each, 30 s in "
        "all): mode=hangs"
    )


def test_a_rehearsal_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LIMIT_S", 0.0)
    verdict = rehearsed(wide, Group("sizes", batch_size=BATCHES))
    assert (verdict.state, verdict.advice) == ("warning", "each trial will be slow, if it does not hang")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_rehearsal_names_the_optimizer_that_refuses_a_model() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(3, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.output(inputs + self.embedding((inputs[:, 0] > 0).long()))

    averages = Group("averages", optimizer=Choice("adagrad", "rmsprop", default="adagrad"))
    verdict = rehearsed(lambda spec: Sparse(), averages)
    assert verdict.text == "optimizer=rmsprop fails: RuntimeError: RMSprop does not support sparse gradients"


# --- before a search --------------------------------------------------------------------------------------------------


class Lines(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def found(self, line: str) -> None:
        self.lines.append(line)


def test_a_new_study_of_many_trials_is_rehearsed_and_refused_before_anything_is_written(tmp_path: Path) -> None:
    sizes = Group("sizes", width=Int(2, 400, default=400), batch_size=BATCHES)
    with pytest.raises(UsageError) as raised:
        run_search(odd(wide, sizes), home=tmp_path / "home", trials=30, device="cpu")
    assert str(raised.value) == (
        "the default configuration does not fit in memory with width=400; width=2 works: no trial of the default "
        "configuration can succeed; fix this first, or search anyway with --no-rehearse."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_search_names_the_extremes_that_break_and_continues(home: Path) -> None:
    lines, sizes = Lines(), Group("sizes", width=Int(2, 300, default=8), batch_size=BATCHES)
    run_search(odd(wide, sizes), home=home, trials=1, workers=1, device="cpu", rehearse=True, observer=lines)
    found = "width=300 with batch_size=16 does not fit in memory: trials with these values fail: leave them out with -p"
    assert any(line.startswith(f"warning: rehearsal: {found}") for line in lines.lines), lines.lines
    reported = Content.of(study(home, "odd"), made_with=[], commands=[]).findings
    assert [found in finding.text for finding in reported] == [True]


@pytest.mark.parametrize(
    ("options", "is_new", "is_rehearsed"),
    [
        ({}, True, True),
        ({"trials": 30}, True, True),
        ({"trials": 29}, True, False),
        ({"trials": 30}, False, False),
        ({"trials": 1, "rehearse": True}, False, True),
        ({"trials": 30, "rehearse": False}, True, False),
    ],
)
def test_long_searches_are_rehearsed_unless_asked_otherwise(
    options: dict[str, Any], is_new: bool, is_rehearsed: bool, home: Path
) -> None:
    assert read_request("digits", {"home": home, **options}).is_rehearsed(is_new=is_new) is is_rehearsed


def test_a_rehearsal_elsewhere_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match="--rehearse is for workers of this machine, not for --executor ray; omit it"):
        read_request("digits", {"home": home, "executor": "ray", "rehearse": True})
