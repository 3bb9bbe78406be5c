"""A trial on several GPUs, here with CPU processes that meet over gloo: equal to one process, and killed for real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.kinds import CASES as KIND_CASES
from helpers.ranks import in_ranks, trained_all, trained_kind
from helpers.searches import wait_until_gone
from helpers.training import trained

import hpo
from hpo.cli import cli
from hpo.data.datasets import save_splits, split_dataset
from hpo.errors import UsageError
from hpo.execution import local
from hpo.execution.local import LocalWorkers
from hpo.execution.messages import Assignment, Decision, EpochDone, Setup, TrialDone, TrialInfeasible, TrialRaised
from hpo.execution.pool import WorkerDied
from hpo.objective import Objective
from hpo.plugins import load_task
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session.request import check_options_of_loop
from hpo.space import Space
from hpo.tracking.store import open_store
from hpo.training.device import check_gpus_per_trial
from hpo.training.distributed import ALONE

# --- equal to one process ---------------------------------------------------------------------------------------------

# SGD: of the bias in front of a batch norm, whose gradient is rounding alone, Adam would make steps of full length.
CASES: dict[str, dict[str, Any]] = {
    "equal parts": {"batch_size": 32},
    "unequal parts": {"batch_size": 31},
    "clipping, an average and norms renewed": {"batch_size": 31, "clip_norm": 0.1, "ema_decay": 0.9},
    "mixing and augmentation": {"batch_size": 33, "mixup": 0.3, "cutmix": 1.0, "augment": "crop+flip"},
    "accumulated": {"batch_size": 15, "accumulate": 3, "mixup": 0.5, "augment": "crop"},
    "hard examples last": {"batch_size": 30, "curriculum": "loss", "class_weights": "balanced"},
    "rare classes": {"batch_size": 30, "sampling": "balanced"},
}


KINDS = [name for name in KIND_CASES if name != "a variational autoencoder"]
"""Not what draws noise in its network: each process draws its own."""


@pytest.fixture(scope="module")
def in_both() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each case, and each kind, as both processes have trained it."""
    return in_ranks(trained_all, CASES, KINDS)


@pytest.mark.xdist_group("two processes")  # they train all cases at once
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(name: str, in_both: list[Any]) -> None:
    """Losses, metrics over all examples, gradients' norms and weights, batch norms included."""
    metrics, weights = trained(ALONE, CASES[name])
    (found, found_weights), other = (cases[name] for cases, _ in in_both)
    assert without_times(found) == without_times(other[0])
    assert found_weights == other[1]
    for expected, actual in zip(metrics, found, strict=True):
        assert actual == pytest.approx(expected | {"time/epoch_s": actual["time/epoch_s"]}, rel=1e-4, abs=1e-5)
    for of_one, of_both in zip(weights.values(), found_weights.values(), strict=True):
        assert torch.allclose(torch.tensor(of_both), torch.tensor(of_one), rtol=1e-4, atol=1e-5)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_on_each_kind_of_data_as_one_does(name: str, in_both: list[Any]) -> None:
    """Sequences of different lengths and losses over all their elements, several inputs, a loss of the task's own."""
    expected = trained_kind(ALONE, name)
    found, other = (kinds[name] for _, kinds in in_both)
    assert repr(without_times(found)) == repr(without_times(other))
    for of_one, of_both in zip(without_times(expected), without_times(found), strict=True):
        assert of_both == pytest.approx(of_one, rel=1e-4, abs=1e-5, nan_ok=True)


def without_times(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [each | {"time/epoch_s": 0.0} for each in metrics]


# --- which GPUs a worker gets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "num_workers", "expected"),
    [
        (None, None, (4, ["0", "1", "2", "3"], 1, 1.0)),
        (2.0, None, (2, ["0,1", "2,3"], 2, 1.0)),
        (2.0, 1, (1, ["0,1", "2,3"], 2, 1.0)),
        (3.0, None, (1, ["0,1,2"], 3, 1.0)),
        (0.5, None, (8, ["0", "1", "2", "3"], 1, 0.5)),
        (0.5, 4, (4, ["0", "1", "2", "3"], 1, 0.5)),
    ],
)
def test_gpus_are_shared_out(
    given: float | None, num_workers: int | None, expected: tuple[Any, ...], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers, their GPUs, processes of each, and each process's share of a GPU's memory."""
    monkeypatch.setattr(local, "visible_gpus", lambda _: ["0", "1", "2", "3"])
    setup = replace(pair.setup, num_ranks=1)
    workers = local.local_workers(setup, num_workers=num_workers, device="cuda", gpus_per_trial=given)
    got = workers._setup
    assert (workers.num_workers, workers._gpus, got.num_ranks, got.gpu_share) == expected
    shared = replace(got, visible_gpu=workers._gpus[0])
    assert [local.of_rank(shared, rank).visible_gpu for rank in range(got.num_ranks)] == workers._gpus[0].split(",")


@pytest.mark.parametrize(
    ("gpus", "given", "num_workers", "said"),
    [
        (["0", "1"], 4, None, "--gpus-per-trial 4 is more than there are: 2; give at most 2"),
        (["0", "1", "2"], 2, 2, "--workers 2 do not fit on 3 GPUs with --gpus-per-trial 2; give at most --workers 1"),
        (["0"], 0.5, 3, "--workers 3 do not fit on 1 GPUs with --gpus-per-trial 0.5; give at most --workers 2"),
        (["MIG-a", "MIG-b"], 2, None, "MIG slices cannot train a trial together"),
        (["0"], 0, None, "--gpus-per-trial 0 is for GPUs, and trials run on the CPU here"),
    ],
)
def test_gpus_that_cannot_be_had(gpus: list[str], given: float, num_workers: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_gpus_per_trial(given, gpus=gpus, num_workers=num_workers)


def test_a_loop_of_its_own_shares_out_no_gpus() -> None:
    objective = Objective(
        name="loop", description="", train=lambda trial: None, space=Space(), metric="loss", direction="minimize"
    )
    with pytest.raises(UsageError, match=r"--gpus-per-trial 2 .* 'loop' has a training loop of its own"):
        check_options_of_loop(objective, {"gpus_per_trial": 2.0})


@pytest.mark.parametrize(("variable", "launcher"), [("WORLD_SIZE", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")])
def test_a_launcher_of_several_processes_is_not_needed(
    variable: str, launcher: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "2")
    for command in (["search", "digits"], ["train", "digits"]):
        answer = CliRunner().invoke(cli, [*command, "--home", str(home)])
        assert f"{launcher} has started hpo 2 times" in str(answer.exception)
        assert isinstance(answer.exception, UsageError)


# --- real workers that are killed -------------------------------------------------------------------------------------

TASK = """
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

import hpo
from hpo.models.mlp import MLP
from hpo.objectives.digits import load

FOLDER = Path(__file__).parent


class Fragile(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("epoch", torch.tensor(0))
        self.num_steps = 0

    def train(self, mode=True):
        if mode and not self.training:
            self.epoch += 1
            self.num_steps = 0
        return super().train(mode)

    def forward(self, inputs):
        self.num_steps += 1
        if self.training and self.num_steps == 3 and dist.is_initialized():
            self.meet_fate(f"{dist.get_rank()}-{int(self.epoch)}")
        return self.net(inputs)

    def meet_fate(self, moment):
        (FOLDER / f"pid-{moment}").write_text(str(os.getpid()))
        for number in (signal.SIGKILL, signal.SIGSTOP):
            if (FOLDER / f"{number.name}-{moment}").exists():
                (FOLDER / f"{number.name}-{moment}").unlink()
                os.kill(os.getpid(), number)
        if (FOLDER / f"raise-{moment}").exists():
            raise RuntimeError("the cat is on the keyboard")


def model(spec):
    torch.manual_seed(0)
    return Fragile(MLP(spec, depth=2, width=16, activation="relu", norm="batch", dropout=0.1))


objective = hpo.Objective(
    name="fragile", description="digits, and processes that end", load=load, model=model,
    settings={"max_epochs": 4, "batch_size": 256},
    space=hpo.Space(hpo.Group("step size", lr=hpo.Float(1e-3, 1.0, log=True, default=0.01))),
)


def two_processes(setup, resources):
    from dataclasses import replace
    from hpo.execution.local import LocalWorkers

    return LocalWorkers(replace(setup, num_ranks=2), num_workers=1, gpus=[])
"""


class Pair:
    """A worker of two processes, and a trial that it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task = folder / "fragile.py"
        self.task.write_text(TASK)
        dataset = load_task(str(self.task)).objective.load(folder)
        save_splits(split_dataset(dataset, validation_fraction=0.2, seed=0), folder / "splits.pt")
        self.setup = Setup(
            task_reference=str(self.task), splits=folder / "splits.pt", num_threads=1, silence_s=60.0, num_ranks=2
        )

    def let(self, fate: str, *, rank: int, epoch: int) -> None:
        """Let it happen to a rank in the third step of an epoch, while the other one waits for its gradients."""
        (self.folder / f"{fate}-{rank}-{epoch}").touch()

    def run(
        self, workers: LocalWorkers, name: str, limits: dict[str, float] | None = None
    ) -> tuple[list[EpochDone], object]:
        """What the trial in the folder of that name reports, and how it ends."""
        config = load_task(str(self.task)).train_config({}, seed=0, device="cpu")
        folder, limits = self.folder / name, limits or {}
        workers.run(Assignment(number=0, model_parameters={}, config=config, folder=folder, limits=limits))
        results: list[EpochDone] = []
        while True:
            for _, event in workers.events(0.1):
                if not isinstance(event, EpochDone):
                    return results, event
                results.append(event)
                workers.answer(0, Decision.CONTINUE)

    def pid(self, *, rank: int, epoch: int) -> int:
        return int((self.folder / f"pid-{rank}-{epoch}").read_text())


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def workers(pair: Pair) -> Iterator[LocalWorkers]:
    with LocalWorkers(pair.setup, num_workers=1, gpus=[]) as workers:
        yield workers


def numbers(results: list[EpochDone]) -> list[Any]:
    """All that two equal trainings have in common, by epoch."""
    plain = {each.result.epoch: asdict(each.result) for each in results}
    for each in plain.values():
        del each["metrics"]["time/epoch_s"]
    return [repr(plain[epoch]) for epoch in sorted(plain)]


def weights(folder: Path) -> dict[str, list[float]]:
    state = torch.load(folder / "best.pt", weights_only=True)
    return {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_attempt_and_the_next_is_bit_equal(
    pair: Pair, workers: LocalWorkers, rank: int
) -> None:
    undisturbed, end = pair.run(workers, "undisturbed")
    assert end == TrialDone()
    pair.let("SIGKILL", rank=rank, epoch=3)
    before, end = pair.run(workers, "killed")
    assert isinstance(end, WorkerDied)
    fate = "was killed by SIGKILL (out of memory?)"
    assert end.reason == f"its worker {f'has lost its process 2 of 2, which {fate}' if rank else fate}"
    assert [each.result.epoch for each in before] == [1, 2]
    wait_until_gone(pair.pid(rank=each, epoch=3) for each in (0, 1))

    after, end = pair.run(workers, "killed")
    assert end == TrialDone()
    assert after[0].result.epoch in (1, 2), "it continues from its checkpoint"
    assert numbers([*before, *after]) == numbers(undisturbed)
    assert weights(pair.folder / "killed") == weights(pair.folder / "undisturbed")


def test_a_search_trains_each_trial_in_two_processes_and_survives_a_kill(
    pair: Pair, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(pair.folder)
    pair.let("SIGKILL", rank=1, epoch=2)
    outcome = hpo.run_search(
        str(pair.task), home=home, trials=2, executor="fragile:two_processes", strategy="random", pruner="none"
    )
    assert [trial.state for trial in outcome.trials] == ["complete"] * 2
    assert [trial.attempts for trial in outcome.trials] == [2, 1]
    store = open_store(home)
    tags = [store.tags(store.find_trial_run("fragile", number, study_id(home))) for number in (0, 1)]
    assert [each["hpo.processes"] for each in tags] == ["2", "2"]
    assert hpo.load_best("fragile", home=home).classes


def test_a_model_that_costs_too_much_is_not_trained_in_two_processes_and_the_next_trial_is(
    pair: Pair, workers: LocalWorkers
) -> None:
    results, end = pair.run(workers, "large", limits={"params": 100.0})
    assert results == []
    assert end == TrialInfeasible("params is 1514, above 100")
    _, end = pair.run(workers, "small", limits={"params": 2000.0})
    assert end == TrialDone()


def study_id(home: Path) -> str:
    return Study.load(open_storage(home), "fragile").id


def test_a_process_that_hangs_ends_the_attempt_once_it_was_silent_for_too_long(pair: Pair) -> None:
    pair.let("SIGSTOP", rank=1, epoch=1)
    with LocalWorkers(replace(pair.setup, silence_s=3.0), num_workers=1, gpus=[]) as workers:
        _, end = pair.run(workers, "stopped")
    assert isinstance(end, WorkerDied)
    assert end.reason.startswith("its worker has lost its process 2 of 2")
    wait_until_gone(pair.pid(rank=each, epoch=1) for each in (0, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_alone_is_reported_as_the_trials(pair: Pair, workers: LocalWorkers, rank: int) -> None:
    pair.let("raise", rank=rank, epoch=2)
    _, end = pair.run(workers, "raises")
    assert isinstance(end, TrialRaised)
    assert end.reason == "RuntimeError: the cat is on the keyboard (fragile.py:42)"
    assert "meet_fate" in end.traceback
    wait_until_gone(pair.pid(rank=each, epoch=2) for each in (0, 1))
