"""An ensemble of what a search has trained anyway."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hpo.config import derive_seed
from hpo.deploy.load import find_runs, load_trial
from hpo.errors import CheckpointError, StoreError, UsageError
from hpo.execution.retention import BestTrials
from hpo.models.ensemble import Ensemble
from hpo.models.preprocessed import own_of
from hpo.search.winner import find_winner, no_winner_yet
from hpo.session.options import checked
from hpo.session.preparation import read_data, split
from hpo.session.request import request_of_study, this_machine
from hpo.tracking.store import open_store
from hpo.training.comparison import metric_of
from hpo.training.ensembles import estimate_gain, select_members
from hpo.training.evaluation import outputs_and_targets
from hpo.training.losses import target_scale

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.deploy.load import LoadedTrial
    from hpo.objective import Objective
    from hpo.search.study import Study
    from hpo.tracking.store import TrackingStore

MAX_MEMBERS = 30
"""Of the best trials, those are looked for."""

_KINDS = ("classification", "regression")


def load_ensemble(
    study: str,
    *,
    home: Path | None = None,
    tracking_uri: str | None = None,
    storage: str | None = None,
    task: str | Objective | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
) -> Ensemble:
    """Return the best mean of the models of a study whose weights were kept, in eval mode on `device`.

    They are the best trials (`--keep`) and, after a confirmation, the best repeat of each configuration. Which of them
    count, and how often, is chosen on the validation split, for which the task's data are read (Caruana et al., 2004).
    `.gain` estimates what that gains over the winner alone, and `len(.models)` says what it costs: that many times
    the time and memory of one model. The test split is not used.

    Raises UsageError for a study without a result, a cross-validation, and tasks whose targets are neither one class
    nor numbers; StoreError if fewer than two models were kept.
    """
    options = checked({"study": study, "home": home, "storage": storage, "device": device, "data_dir": data_dir})
    machine = this_machine(options)
    request, opened = request_of_study(machine, study, task)
    winner = find_winner(opened)
    if winner is None:
        raise no_winner_yet(study)
    if opened.settings.folds or request.task.objective.train:
        why = "--folds" if opened.settings.folds else "a training loop of its own"
        raise UsageError(f"study '{study}' was searched with {why}: there is no validation split to choose members on.")
    dataset = read_data(request)
    assert dataset is not None, "only training loops of their own read no data"
    splits = split(dataset, request)
    if splits.spec.kind not in _KINDS:
        raise UsageError(f"an ensemble is for one class or for numbers, not for the kind {splits.spec.kind}.")
    runs = find_runs(opened, machine.home.path, tracking_uri, is_shared=machine.is_shared)
    store = open_store(machine.home.path, runs)
    members = _kept(store, opened, machine.device, request.task.objective)
    if len(members) < 2 or winner.trial not in members:
        raise StoreError(f"study '{study}' has kept the weights of {len(members)} trials, and an ensemble needs two.")
    own, config = own_of(members[winner.trial].model), members[winner.trial].config
    outputs: dict[int, Tensor] = {}
    for number, member in members.items():
        outputs[number], targets = outputs_and_targets(member.model, splits.validation, member.config, splits.spec.kind)
    scale, direction = target_scale(splits.train, splits.spec), opened.settings.direction

    def loss(answers: Tensor, rows: Tensor) -> float:
        return direction.loss(metric_of(answers, targets[rows], config, splits.spec, scale, own))

    chosen = select_members(outputs, torch.arange(len(targets)), loss, splits.spec.kind)
    seed = derive_seed(opened.settings.seed, "ensemble")
    gain = estimate_gain(outputs, winner.trial, loss, splits.spec.kind, seed=seed)
    found = {number: (members[number].model, times) for number, times in sorted(chosen.items())}
    return Ensemble(found, gain=gain).eval().to(machine.device)


def _kept(store: TrackingStore, study: Study, device: str, task: Objective) -> dict[int, LoadedTrial]:
    """The best trials and repeats whose weights MLflow still has."""
    found = {}
    for number in BestTrials(study, keep=MAX_MEMBERS).kept:
        with suppress(StoreError, CheckpointError):  # its weights were not among those that were kept
            found[number] = load_trial(store, study, number, device, task)
    return found
