"""Trials of each kind of target, and of inputs of every shape, on a pretended GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.kinds import CASES, Case
from helpers.pretended_cuda import Seen, pretended_cuda
from helpers.pretended_trials import BETWEEN_STEPS

from hpo import Objective, TrainConfig, split_dataset
from hpo.data import batches
from hpo.execution.messages import Assignment, Decision
from hpo.execution.worker import TrialData, run_with_data
from hpo.training import costs

pytestmark = pytest.mark.pretended_gpu


def trained(case: Case, folder: Path, *, batch_size: int, is_streamed: bool) -> Seen:
    objective = Objective(
        name="pretended", description="", load=lambda _: case.data, model=case.model, loss=case.loss,
        metric=case.metric, metrics=dict(case.metrics),
    )  # fmt: skip
    judged_by: dict[str, Any] = objective.judged_by | case.settings
    config = TrainConfig(max_epochs=2, batch_size=batch_size, lr=1e-3, device="cuda", compile="off", **judged_by)
    assignment = Assignment(
        number=0, model_parameters=case.parameters, config=config, folder=folder, costs=("params", "latency")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_SMALL_EXAMPLE", 0)
        patch.setattr(costs, "TIMING_S", 0.001)
        if is_streamed:
            patch.setattr(batches, "DEVICE_SHARE", 0.0)
        with pretended_cuda() as seen:
            data = TrialData(split_dataset(case.data, seed=0))
            run_with_data(assignment, objective, data, lambda result: Decision.CONTINUE)
    return seen


@pytest.mark.parametrize("is_streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", CASES)
def test_a_trial_of_each_kind_waits_between_epochs_alone_and_leaves_nothing(
    name: str, is_streamed: bool, tmp_path: Path
) -> None:
    case = CASES[name]
    few = trained(case, tmp_path / "few", batch_size=24, is_streamed=is_streamed)
    many = trained(case, tmp_path / "many", batch_size=8, is_streamed=is_streamed)
    more = {wait for wait, count in many.waits.items() if count > few.waits[wait] and "costs.py" not in wait[1]}
    assert more == case.waits_in_each_step
    assert many.waits.keys() <= BETWEEN_STEPS.keys() | more
