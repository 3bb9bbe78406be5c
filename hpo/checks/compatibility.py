"""Checks before the first trial: what would make trial after trial fail is found here, in a second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hpo.config import OWN, SEVERAL
from hpo.data.batches import build_batches
from hpo.data.datasets import Splits, class_counts
from hpo.data.kinds import labels_of
from hpo.data.pacing import build_growth
from hpo.data.parts import Padded, map_tensors, tensors_of
from hpo.errors import DataError, HpoError, SpaceError, UsageError, in_one_line
from hpo.models.preprocessed import MAIN_OUTPUTS, PreprocessedModel, build_model
from hpo.parameters import Choice, Value
from hpo.task import Task
from hpo.training.losses import training_loss
from hpo.training.metrics import EpochMetrics, check_metric
from hpo.training.optimizers import build_optimizer
from hpo.training.trainer import check_fine_tuning
from hpo.values import format_value, is_same

if TYPE_CHECKING:
    from hpo.data.examples import DataSpec, SealedSplit
    from hpo.objective import Own


_SCALES_OF_LOSSES = ("margin", "temperature", "kl_weight")


def check_task(task: Task, splits: Splits) -> None:
    """Raise UsageError if a metric, a batch size or the model of the task does not fit its data."""
    own = task.objective.own(task.space.defaults())
    _check_losses(task, splits, own, "loss")
    check_metric(task.objective.metric, splits.spec, own)
    _check_judged(task.objective.metric, splits)
    _check_batch_sizes(task, splits)
    _check_model(task, splits)
    _check_choices(task, splits)
    _check_losses(task, splits, own, "class_weights")
    _check_batches(task, splits)


def check_test_split(test: SealedSplit, spec: DataSpec) -> None:
    """Raise DataError if the winner could not be tested, before there is one. The test split stays sealed."""
    try:
        test.require_like(spec)
    except HpoError:
        raise
    except Exception as error:  # reading is user code and may raise anything
        raise DataError(f"the test split cannot be read: {in_one_line(error)}.") from error


def check_comparable(task: Task, spec: DataSpec) -> None:
    """Raise SpaceError for a search by the loss that searches what it is measured in: the smallest scale would win."""
    losses = {*_possible_values(task, "loss")}
    if task.objective.metric != "loss" or OWN in losses:  # what an own loss measures, its author knows
        return
    depends_on_batch = spec.kind in ("embedding", "instances")
    names = (*_SCALES_OF_LOSSES, *(("batch_size",) if depends_on_batch else ()))
    searched = [name for name in names if len(set(_possible_values(task, name))) > 1]
    if len(losses) > 1 and losses - {"cross_entropy", "focal"}:
        searched.append("loss")
    if searched:
        name = searched[0]
        default = format_value(task.space.parameters[name].default)
        raise SpaceError(
            f"{name} is searched and changes the scale of the loss, which is the metric: the trials could not be "
            f"compared. Fix it, as with -p {name}={default}, or choose another --metric."
        )


def _possible_values(task: Task, name: str) -> tuple[Value, ...]:
    """What a trial may have for a setting: the values or ends of its parameter, or the task's own value."""
    parameter = task.space.parameters.get(name)
    return parameter.extremes() if parameter else (getattr(task.train_config({}), name),)


def _check_judged(metric: str, splits: Splits) -> None:
    """A validation split of one class has no AUROC, and no trial a value."""
    counts = class_counts(splits.validation, splits.spec)
    if metric == "auroc" and splits.spec.kind == "classification" and max(counts.values()) == len(splits.validation):
        only = max(counts, key=counts.__getitem__)
        raise UsageError(
            f"all {len(splits.validation)} validation examples are of the class '{only}', so there is no auroc; take "
            "more examples (is there a --limit?), or --metric accuracy."
        )


def _check_batch_sizes(task: Task, splits: Splits) -> None:
    """Every batch size that may be drawn must fit, or trials would fail one by one."""
    times = max(int(value) for value in _possible_values(task, "accumulate"))
    sizes, num_examples = _possible_values(task, "batch_size"), len(splits.train) // times
    fitting = [str(size) for size in sizes if int(size) <= num_examples]
    for size in sizes:
        if int(size) > num_examples:
            if times > 1:
                raise SpaceError(
                    f"batch_size {size} times accumulate {times} is larger than the {len(splits.train)} training "
                    "examples; allow smaller ones only, or add examples."
                )
            narrowed = f"allow smaller ones only, as -p batch_size={','.join(fitting)}"
            advice = narrowed if fitting else f"take at most {num_examples}, as --set batch_size={num_examples}"
            raise SpaceError(
                f"batch_size {size} is larger than the {num_examples} training examples; {advice}, or have "
                "more examples (is there a --limit?)."
            )


def _check_losses(task: Task, splits: Splits, own: Own, name: str) -> None:
    """Every loss, or weight of classes, that may be drawn must fit the data."""
    for value in _possible_values(task, name):
        config = task.train_config({name: value, "batch_size": 1, "accumulate": 1})
        training_loss(config, splits.train, splits.spec, own)


def _check_batches(task: Task, splits: Splits) -> None:
    """Every sampling, augmentation and curriculum that may be drawn must fit the data."""
    generator = torch.Generator()
    for name in ("sampling", "augment", "mixup", "cutmix", "curriculum", "progressive_start"):
        for value in _possible_values(task, name):
            config = task.train_config({name: value, "batch_size": 1, "accumulate": 1})
            build_batches(
                splits.train,
                config,
                splits.spec,
                order=generator,
                augmentation=generator,
                difficulty=task.objective.difficulty,
            )


def _check_model(task: Task, splits: Splits) -> None:
    """Build the default configuration and let it see two examples, so that a mistake in a task is found at once."""
    values = task.space.active(task.space.defaults())
    config = task.train_config(values, batch_size=1)
    inputs, targets = splits.train.batch(slice(0, 2))
    with _blamed_on(task, "the model", "the default configuration"):
        model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0).eval()
        other = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0, pretrained=False)
        model.fit_statistics(splits.train)
    _check_is_new(task, model, other)
    _check_is_trained(task, model)
    _check_sizes_of_batches(task, splits, model)
    with _blamed_on(task, "the model", "the default configuration"):
        outputs = model(inputs)
    if config.loss != OWN:
        _check_outputs(task, splits.spec, outputs, targets, config.loss)
    check_fine_tuning(model, config)
    with _blamed_on(task, "the loss", "the default configuration"):
        loss = training_loss(config, splits.train, splits.spec, model.own)(outputs, targets)
    _check_loss(task, loss)
    with _blamed_on(task, "a metric", "the outputs of the model"):
        metrics = EpochMetrics(splits.spec, "cpu", own=model.own, is_complete=True)
        metrics.update(map_tensors(torch.Tensor.detach, outputs), targets, loss.detach())
        metrics.compute()
    _check_smaller_examples(task, splits, model)
    with _blamed_on(task, "the optimizer", "the default configuration"):
        build_optimizer(model, config, model.own)
    if 1 in _possible_values(task, "batch_size"):
        _check_norms_of_one(task, splits, model)


def _check_is_new(task: Task, model: PreprocessedModel, other: PreprocessedModel) -> None:
    """Raise UsageError if two calls return models that share weights: a trial would begin with those of another."""
    tensors = {id(tensor): name for name, tensor in _tensors(model)}
    memory = {tensor.data_ptr() for _, tensor in _tensors(model)} - {0}  # an empty tensor has no address
    for name, tensor in _tensors(other):
        if id(tensor) in tensors or tensor.data_ptr() in memory:
            raise UsageError(
                f"two calls of the model of task '{task.objective.name}' return models that share "
                f"{name.removeprefix('network.')}, so that a trial would begin with the weights of another: make every "
                "layer and buffer inside the function, or copy it there with copy.deepcopy or clone."
            )


def _tensors(model: PreprocessedModel) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _check_is_trained(task: Task, model: PreprocessedModel) -> None:
    parameters = list(model.parameters())
    if any(parameter.requires_grad for parameter in parameters):
        return
    have = f"the {len(parameters)} parameters of the model are all frozen" if parameters else "it has no parameters"
    raise UsageError(
        f"the model of task '{task.objective.name}' cannot be trained: {have}; let some have requires_grad."
    )


def _check_sizes_of_batches(task: Task, splits: Splits, model: PreprocessedModel) -> None:
    """Raise UsageError for a model that takes batches of one size alone, such as that of its hidden state."""
    own_size = task.train_config(task.space.active(task.space.defaults())).batch_size
    errors = {size: _error_with(model, splits, size) for size in (2, 3)}
    if all(errors.values()):
        errors[own_size] = _error_with(model, splits, own_size)
    taken = next((size for size, error in errors.items() if error is None), None)
    failed, error = next(((size, error) for size, error in errors.items() if error), (None, None))
    if taken is not None and error is not None:
        raise UsageError(
            f"the model of task '{task.objective.name}' takes a batch of {taken} examples, but not of {failed} "
            f"({in_one_line(error)}): batches differ in size, so let it take the size from its inputs, as in "
            "inputs.shape[0]."
        )


def _check_norms_of_one(task: Task, splits: Splits, model: PreprocessedModel) -> None:
    """Raise UsageError if batch norms, as in training, cannot take a batch of one example."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
    if norms and (error := _error_with(model, splits, 1)):
        raise UsageError(
            f"the model of task '{task.objective.name}' cannot train with batch_size=1, for its batch norms need more "
            f"than one example ({in_one_line(error)}); allow larger ones only, with -p batch_size=..., or use another "
            "norm."
        )


@torch.no_grad()
def _error_with(model: PreprocessedModel, splits: Splits, size: int) -> BaseException | None:
    """What the model raises for a batch of this size."""
    try:
        model(splits.train.batch(slice(0, size))[0])
    except (Exception, SystemExit) as error:  # user code may raise anything
        return error
    return None


def _check_smaller_examples(task: Task, splits: Splits, model: PreprocessedModel) -> None:
    """Let the model see two examples as small as those of the first epoch."""
    for start in _possible_values(task, "progressive_start"):
        growth = build_growth(task.train_config({"progressive_start": start}), splits.train, splits.spec)
        if growth is None:
            continue
        smaller, _ = growth.apply(*splits.train.batch(slice(0, 2)), epoch=1)
        size = growth.describe(1, splits.train)
        with _blamed_on(task, "the model", f"{size}, as progressive_start={start} begins"), torch.no_grad():
            model(smaller)


def _check_outputs(task: Task, spec: DataSpec, outputs: Any, targets: Any, loss: str) -> None:
    """Raise UsageError if a model's outputs for two examples do not fit the kind of target."""
    name, kind = task.objective.name, spec.kind
    if kind == SEVERAL:
        _check_outputs_of_several(task, spec, outputs, targets)
        return
    if kind == "reconstruction":
        outputs = _reconstruction_in(name, outputs, has_latent=loss == "vae")
    tensor = outputs.values if isinstance(outputs, Padded) and kind in ("tagging", "transcription") else outputs
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(
            f"the model of task '{name}' returns a {type(outputs).__name__}; it must return one tensor, or have it as "
            f"{' or '.join(MAIN_OUTPUTS)} among its outputs, or the task needs a loss of its own."
        )
    wanted = _wanted_shape(spec, tensor, targets)
    if tuple(tensor.shape) != wanted:
        raise UsageError(
            f"the model of task '{name}' returns outputs of shape {tuple(tensor.shape)} for 2 examples, not {wanted}."
        )


def _check_outputs_of_several(task: Task, spec: DataSpec, outputs: Any, targets: Any) -> None:
    if not isinstance(outputs, Mapping) or outputs.keys() != spec.targets.keys():
        given = f"a mapping of {', '.join(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise UsageError(
            f"the model of task '{task.objective.name}' returns {given}; it must return a mapping of "
            f"{', '.join(spec.targets)}."
        )
    for name in spec.targets:
        try:
            _check_outputs(task, spec.of(name), outputs[name], targets[name], "")
        except UsageError as error:
            raise UsageError(f"the target {name}: {error}") from error


def _reconstruction_in(name: str, outputs: Any, *, has_latent: bool) -> Any:
    """The reconstruction among the outputs. Raises UsageError if the loss `vae` would not find what it takes."""
    tensors = tensors_of(outputs)
    if not has_latent:
        return outputs
    if len(tensors) != 3 or tensors[1].shape != tensors[2].shape or tensors[1].ndim != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise UsageError(
            f"loss 'vae' takes three outputs: the reconstruction, and mean and log-variance (B, size) of the latent "
            f"distribution; the model of task '{name}' returns {shapes}."
        )
    return tensors[0]


def _wanted_shape(spec: DataSpec, outputs: torch.Tensor, targets: Any) -> tuple[int, ...]:
    match spec.kind:
        case "regression" | "box":
            return 2, *spec.target_shape
        case "segmentation":
            return 2, spec.num_outputs, *targets.shape[1:]
        case "tagging":
            return *labels_of(targets).shape, spec.num_outputs
        case "embedding" | "instances":  # their size is the network's choice
            return 2, outputs.shape[-1]
        case "reconstruction":
            return (2, spec.num_outputs) if outputs.ndim == 2 else (2, *spec.input_shape)
        case "transcription":  # how many steps is the network's choice
            return 2, outputs.shape[1] if outputs.ndim == 3 else 1, spec.num_outputs
        case _:
            return 2, spec.num_outputs


def _check_loss(task: Task, loss: Any) -> None:
    name = task.objective.name
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UsageError(f"the loss of task '{name}' returns {given}; it must be the mean over the batch, one number.")
    if not loss.requires_grad:
        raise UsageError(
            f"the loss of task '{name}' has no gradient: compute it from the model's outputs, without detach or item."
        )
    if not loss.isfinite():
        raise UsageError(f"the loss of task '{name}' is {loss.item()} for the first two examples.")


def _check_choices(task: Task, splits: Splits) -> None:
    """Every choice must build the model: an architecture, above all, for which there are no pretrained weights."""
    for name, parameter in task.space.parameters.items():
        if not isinstance(parameter, Choice) or task.is_setting(name):
            continue
        for value in (choice for choice in parameter.choices if not is_same(choice, parameter.default)):
            values = task.space.defaults() | {name: value}
            if not task.space.allows(values):
                continue
            parameters = task.model_parameters(task.space.active(values))
            with _blamed_on(task, "the model", f"{name}={format_value(value)}"):
                build_model(task.objective, splits.spec, parameters, seed=0)


@contextmanager
def _blamed_on(task: Task, what: str, condition: str) -> Iterator[None]:
    """Whatever a part of the task raises, as a UsageError."""
    try:
        yield
    except (DataError, SpaceError):  # no pretrained weights; it says what to do
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UsageError(
            f"{what} of task '{task.objective.name}' fails with {condition}: {in_one_line(error)}"
        ) from error
