"""Lightning's and transformers' own trainers, searched: pruned, killed and resumed, and their best models load."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo
from hpo.imports import import_module
from hpo.plugins import load_objective
from hpo.search.storage import open_storage
from hpo.search.study import Study

EXAMPLES = Path(__file__).parent.parent / "examples"

# Both libraries warn of what they, or what they import, will change.
pytestmark = pytest.mark.filterwarnings("default")


class Killer(hpo.Observer):
    """Kills the worker while it waits for the answer to epoch 2 of trial 0."""

    has_killed = False

    def epoch_done(self, suggestion: hpo.Suggestion, result: hpo.EpochResult) -> None:
        if (suggestion.number, result.epoch) == (0, 2) and not self.has_killed:
            self.has_killed = True
            for worker in multiprocessing.active_children():
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["lightning_loop", "transformers_loop"])
def test_an_example_is_pruned_and_resumed_after_kill_9_and_its_best_model_loads(name: str, home: Path) -> None:
    killer, path = Killer(), str(EXAMPLES / f"{name}.py")
    outcome = hpo.run_search(
        path,
        home=home,
        trials=2,
        workers=1,
        observer=killer,
        pruner="sha",
        first_rung=1,
        tries=("lr=1e-5",) if name == "transformers_loop" else ("lr=1e-4",),
    )
    assert killer.has_killed
    trials = Study.load(open_storage(home), name).trials()
    num_epochs = load_objective(path).settings["max_epochs"]
    assert [(trial.state, trial.attempts) for trial in trials] == [("complete", 2), ("pruned", 1)]
    assert [list(trial.curve) for trial in trials] == [list(range(1, num_epochs + 1)), [1]]

    example: Any = import_module(f"hpo_task_{name}")
    assert outcome.winner is not None
    configuration = outcome.winner.configuration
    weights = hpo.load_best(name, home=home)
    if name == "lightning_loop":
        model = example.Digits(**configuration)
        model.load_state_dict(weights)
        data = example.Data()
        data.setup("fit")
        inputs, targets = next(iter(data.val_dataloader()))
        outputs = model.net(inputs)
    else:
        model = example.build_model(configuration["width"])
        model.load_state_dict(weights)
        rows = example.sequences(256, seed=1)
        inputs, targets = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
        outputs = model.eval()(inputs).logits
    assert float((outputs.argmax(1) == targets).float().mean()) == pytest.approx(outcome.winner.validation, abs=1e-6)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_library_is_reported_with_the_extra_that_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"hpo.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch" if name == "lightning" else name, None)
    with pytest.raises(hpo.UsageError, match=rf"pip install 'hpo-torch\[{name}\]'"):
        import_module(f"hpo.integrations.{name}")
