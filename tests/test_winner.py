"""The winner: how it is chosen, tested once, and loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm
from helpers.moody import runs, study, values

import hpo
from hpo import DataSpec, InputSpec
from hpo.errors import CheckpointError, StudyMismatchError, UsageError
from hpo.plugins import load_objective
from hpo.records import SearchOutcome
from hpo.session.search import run_search
from hpo.tracking.store import open_store


def test_the_winner_is_the_best_on_validation_and_its_model_scores_what_was_said(
    search: Callable[..., SearchOutcome], home: Path
) -> None:
    from hpo.objectives.digits import load

    outcome = search(trials=4)
    assert outcome.winner is not None
    assert outcome.winner.validation == max(trial.value or 0 for trial in study(home).trials())
    test = load(Path()).test.open()
    model = hpo.load_best("moody", home=home)
    assert not model.training
    assert model.classes == tuple("0123456789")
    with torch.inference_mode():
        accuracy = (model(test.inputs).argmax(1) == test.targets).double().mean().item()
    assert outcome.winner.test is not None
    assert accuracy == pytest.approx(outcome.winner.test["accuracy"])


RARE_TASK = """
import torch
from hpo.models.mlp import MLP
from hpo.objective import Objective
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.parameters import Choice
from hpo.space import Group, Space


def load(data_dir):
    points = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(1000) % 25 == 0).long()
    examples = Split(points + 1.5 * targets[:, None], targets)
    return Dataset(examples, SealedSplit(lambda: examples, 1000), ("usual", "rare"))


def model(spec):
    return MLP(spec, depth=1, width=8, activation="relu", norm="none", dropout=0.0)


objective = Objective(
    name="rare", description="one example in 25 is of the second class", load=load, model=model,
    settings={"max_epochs": 10, "batch_size": 50, "lr": 0.01},
    space=Space(Group("imbalance", class_weights=Choice("none", "balanced", default="none"))),
)
"""


def test_the_metric_that_is_given_decides_about_the_winner(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "rare.py"
    path.write_text(RARE_TASK)
    both: dict[str, Any] = {
        "home": home,
        "trials": 2,
        "tries": ["class_weights=balanced"],
        "pruner": "none",
        "workers": 1,
    }
    outcome = run_search(str(path), metric="recall", **both)
    assert outcome.winner is not None
    assert outcome.winner.configuration == {"class_weights": "balanced"}
    assert outcome.winner.metric == "recall"
    by_accuracy = [max(values(home, run, "val/accuracy")) for run in runs(home, name="rare")]
    assert by_accuracy[0] > by_accuracy[1] + 0.05, "accuracy would have chosen the other one"
    assert [run.data.metrics["best/recall"] for run in runs(home, name="rare")] == [
        pytest.approx(max(values(home, run, "val/recall"))) for run in runs(home, name="rare")
    ]
    assert outcome.winner.confusion is not None
    assert [sum(row) for row in outcome.winner.confusion["counts"]] == [960, 40]
    # Both models judge the test split, which has chosen neither.
    test = load_objective(str(path)).load(tmp_path).test.open()

    def recall(trial: int) -> float:
        predicted = hpo.load_best("rare", home=home, trial=trial)(test.inputs).argmax(1)
        return sum((predicted == test.targets)[test.targets == label].double().mean().item() for label in (0, 1)) / 2

    gain = outcome.winner.test_gain
    assert gain is not None
    assert gain["gain"] == pytest.approx(recall(1) - recall(0))
    assert 0 < gain["low"] < gain["gain"] < gain["high"]
    assert gain["num_examples"] == 1000
    # The study remembers it.
    assert run_search(str(path), **both).winner == outcome.winner
    with pytest.raises(StudyMismatchError, match="--metric recall, not f1"):
        run_search(str(path), metric="f1", **both)


def test_the_loss_on_the_test_split_has_the_units_of_that_on_the_validation_split(home: Path) -> None:
    outcome = run_search("diabetes", metric="loss", trials=1, epochs=3, workers=1, home=home)
    assert outcome.winner is not None
    assert outcome.winner.test is not None
    assert outcome.winner.test_interval is not None
    low, high = outcome.winner.test_interval
    assert low < outcome.winner.test["loss"] < high
    assert outcome.winner.test["loss"] == pytest.approx(outcome.winner.validation, rel=0.5)


def test_a_winner_that_was_trained_on_mirror_images_is_also_tested_with_them_and_that_is_distinguished(
    tmp_path: Path, home: Path
) -> None:
    path = tmp_path / "mirrored.py"
    given = "examples = Split(points + 1.5 * targets[:, None], targets)"
    changed = "examples = Split((points + 1.5 * targets[:, None])[:, None, None, :].repeat(1, 1, 2, 1), targets)"
    text = RARE_TASK.replace(given, changed).replace('"lr": 0.01', '"lr": 0.01, "augment": "flip"')
    path.write_text(text.replace('"max_epochs": 10', '"max_epochs": 2'))
    outcome = run_search(str(path), home=home, trials=1, workers=1)
    assert outcome.winner is not None
    assert outcome.winner.test is not None
    model, examples = hpo.load_best("rare", home=home), load_objective(str(path)).load(tmp_path).test.open()
    with torch.inference_mode():
        outputs = model(examples.inputs), model(examples.inputs.flip(-1))
    for name, logits in (("accuracy", outputs[0]), ("accuracy_mirror_averaged", sum(outputs))):
        expected = (logits.argmax(1) == examples.targets).double().mean().item()
        assert outcome.winner.test[name] == pytest.approx(expected)


def test_the_test_split_is_opened_once_for_each_winner(
    search: Callable[..., SearchOutcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.data.examples import SealedSplit

    opened = []
    original = SealedSplit.open
    monkeypatch.setattr(SealedSplit, "open", lambda split: (opened.append(study(home).counts()), original(split))[1])
    first = search(trials=2)
    assert [counts["complete"] for counts in opened] == [2]
    again = search(trials=2)
    assert len(opened) == 1
    assert again.winner == first.winner
    later = search(trials=6)
    assert later.winner is not None
    assert first.winner is not None
    changed = later.winner.trial != first.winner.trial
    assert later.winner.num_test_readings == len(opened) == 1 + changed


def test_a_damaged_checkpoint_of_the_winner_is_refused(search: Callable[..., SearchOutcome], home: Path) -> None:
    outcome = search(trials=1)
    assert outcome.winner is not None
    (weights,) = home.glob("artifacts/moody/*/artifacts/checkpoint/best.pt")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.pt is damaged"):
        hpo.load_best("moody", home=home)


def test_the_description_beside_the_weights_holds_all_that_was_set(
    search: Callable[..., SearchOutcome], home: Path
) -> None:
    search(trials=1, seed=3)
    (described,) = home.glob("artifacts/moody/*/artifacts/checkpoint/trial.json")
    description = json.loads(described.read_text())
    spec = DataSpec.from_dict(description["spec"])
    assert spec == DataSpec(InputSpec((1, 8, 8), "uint8"), tuple("0123456789"), "classification")
    assert description["model_parameters"] == {"width": 32, "mood": "calm"}
    assert description["config"]["lr"] == 0.1
    assert description["config"]["max_epochs"] == 3
    assert description["config"]["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("where", ["config", None])
def test_a_description_of_another_version_is_named_and_not_called_damaged(
    search: Callable[..., SearchOutcome], home: Path, where: str | None
) -> None:
    search(trials=1)
    (file,) = home.glob("artifacts/moody/*/artifacts/checkpoint/trial.json")
    plain = json.loads(file.read_text())
    plain["config"]["direction"] = "maximize"  # as version 0.1 wrote it
    file.write_text(json.dumps(plain))
    assert hpo.load_best("moody", home=home).classes
    (plain[where] if where else plain)["sharpness"] = 0.5
    file.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"by a newer version of hpo, with 'sharpness'; upgrade hpo to load it"):
        hpo.load_best("moody", home=home)


def test_a_home_that_was_moved_loads_and_continues_in_its_new_place(
    search: Callable[..., SearchOutcome], task: str, home: Path
) -> None:
    """In a new process: MLflow remembers where the runs are that a process has opened."""
    search(trials=1)
    moved = home.rename(home.with_name("moved"))
    assert hpo.load_best("moody", home=moved).classes
    command = [sys.executable, "-m", "hpo", "search", task, "--home", str(moved), "--trials", "2", "--workers", "1"]
    warm.run(command).check_returncode()
    assert not home.exists(), f"nothing is written to the old place: {sorted(home.rglob('*'))}"
    store = open_store(moved)
    for number in (0, 1):
        run = store.client.get_run(store.find_trial_run("moody", number))
        assert run.info.artifact_uri.startswith((moved / "artifacts" / "moody").as_uri())
        assert store.file_sizes(run.info.run_id, "checkpoint")


def test_a_study_of_another_task_and_a_task_that_moved_are_reported_with_what_to_do(
    search: Callable[..., SearchOutcome], task: str, home: Path
) -> None:
    study = search(trials=1).study
    with pytest.raises(StudyMismatchError, match=f"study '{study}' is of task .*, not 'diabetes'; choose another name"):
        run_search("diabetes", study=study, home=home)
    moved = Path(task).rename(Path(task).with_name("elsewhere.py"))
    with pytest.raises(UsageError, match=r"there is no file .* pass its new location as task="):
        hpo.load_best(study, home=home)
    assert hpo.load_best(study, home=home, task=str(moved)).classes
