"""A step as a CUDA graph: what an eager step launches one by one is recorded once, and launched at once from then on.

A GPU computes a step of a small network faster than Python launches its operations. Recording takes about as long as a
step, needs no compiler, and belongs to one trial: the weights, the optimizer's state and the memory between them keep
their addresses. So a recorded step must change nothing but tensors, and must take every number that varies from a
tensor: a rate that is a Python float would stay what it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpo.data.batches import side_stream
from hpo.errors import first_line
from hpo.training.compiled import FormulaStep, can_capture
from hpo.training.device import free_memory
from hpo.training.step import StepResult, TrainingStep

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.training.averaging import AveragedWeights
    from hpo.training.schedules import Point

_logger = logging.getLogger(__name__)

CAPTURED_BY_AUTO = False
"""Whether `--compile auto` captures steps: not before tests/test_gpu.py has passed on a real GPU."""

WARM_UP_STEPS = 2
"""Steps on a stream of their own before one is captured: libraries make their handles, and cuDNN tries its algorithms,
neither of which is allowed in a capture. With the first step of a training that makes three."""

RACE_STEPS = 20
"""Captured steps that are timed, and then as many eager ones, in an epoch that is long enough for them."""

TOLERANCE = 0.02
"""Difference between a captured and an eager step on the same batch, relative to what the step changes."""

_KNOWN_PACKAGES = ("torch", "torchvision", "hpo")

Make = Callable[..., tuple["Tensor", "Tensor"]]
"""From what was drawn for a batch to its inputs and targets, by operations on tensors alone."""

StepFunction = Callable[..., tuple["Tensor", ...]]
"""From settings and what was drawn for a batch to outputs, loss, the gradients' norm and targets; it changes its state
in place."""


def wants_graph(compile_mode: str, model: nn.Module) -> bool:
    """Whether a training's steps are to be captured if they can be.

    `auto` leaves models alone whose modules are not all of torch, torchvision or hpo: a forward pass of others may
    depend on what Python does, which a graph would not repeat.
    """
    if compile_mode == "auto" and CAPTURED_BY_AUTO and can_capture():
        return all(type(module).__module__.partition(".")[0] in _KNOWN_PACKAGES for module in model.modules())
    return compile_mode == "graph"


class CapturedStep(FormulaStep):
    """A step as a CUDA graph.

    It makes its batches itself, because gathering and augmenting them belongs to the graph, as does the average of the
    weights. Metrics do not: they are counted for several batches at once, and the graph would count each by itself. If
    the capture fails, or is not faster, the steps are made as before, which is logged.
    """

    def __init__(
        self, step: TrainingStep, make: Make, average: AveragedWeights | None = None, *, is_faster: bool | None = None
    ) -> None:
        """`average` takes in each step. `is_faster` is known of a training that is resumed, and is measured if None."""
        super().__init__(step, "graph")
        self._make = make
        self._average = average
        formulas = self._formulas

        # Not a method: it would hold this object, and the object it, so that the graph's memory outlived the trial.
        def whole_step(settings: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
            inputs, targets = make(*drawn)
            results = formulas.eager(settings, inputs, targets)
            if average:
                average.end_step()
            return *results, targets

        averaged: list[Tensor] = list(average.model.parameters()) if average else []
        self._function = CapturedFunction(whole_step, [*formulas.state, averaged], formulas.device)
        self._race = Race(is_faster)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training continues with: whether it captures, too, and need not be measured again."""
        return {**super().state_dict(), "is_captured_faster": self.mode != "off" and self._race.is_captured_faster}

    def prepare(self, points: Sequence[Point]) -> None:
        """Bring the settings of an epoch's next steps to the device, all at once."""
        super().prepare(points)
        self._race.restart(len(points))

    def retire(self) -> TrainingStep:
        """Give the graph's memory back; returns the step that this one has taken over from, ready to continue."""
        self._formulas.complete_optimizer()
        self._function.release()
        return self._eager

    def __call__(self, *drawn: Tensor, measures_norm: bool = True) -> tuple[StepResult, Tensor]:
        """Take in the batch that was drawn; the result, and the batch's targets.

        A captured step computes the gradients' norm in any case.
        """
        if self.mode == "off":
            return self._ordinary_step(drawn, measures_norm)
        settings = self._formulas.next_settings()
        try:
            if not self._function.is_captured or self._race.takes_captured():
                *results, targets = self._function(settings, *drawn)
                self._formulas.count_step()
                return StepResult(*results), targets
            reason = None if self._race.is_captured_faster is None else "it is not faster"
        except RuntimeError as error:  # torch.OutOfMemoryError is one, too: a graph has its memory for itself
            reason = first_line(error)
        # Out here the failed attempt's tensors are gone.
        self._formulas.complete_optimizer()
        if reason:
            self._give_up(reason)
        self._formulas.count_step(by_optimizer=True)
        return self._ordinary_step(drawn, measures_norm)

    def _ordinary_step(self, drawn: Sequence[Tensor], measures_norm: bool) -> tuple[StepResult, Tensor]:
        inputs, targets = self._make(*drawn)
        result = self._eager(inputs, targets, measures_norm=measures_norm)
        if self._average:
            self._average.end_step()
        return result, targets

    def _give_up(self, reason: str) -> None:
        _logger.warning("steps are not captured as a CUDA graph: %s", reason)
        self.mode = "off"
        self._function.release()
        free_memory(self._formulas.device)


class CapturedFunction:
    """A step's function that captures itself in its third call, and is replayed from then on.

    A call raises RuntimeError if the capture fails, if it runs out of memory, or if the captured step differs from an
    eager one on the same batch. The state is then the one from before the call; but if one of the calls before the
    capture runs out of memory, its changes stay as far as they came, as in an eager step.
    """

    def __init__(self, function: StepFunction, state: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        """`state` is what the function changes in place, by kind: weights, buffers, what the optimizer keeps."""
        self._function = function
        self._state = state
        self._stream = side_stream(device)
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._taken: list[Tensor] = []  # what the graph reads
        self._given: tuple[Tensor, ...] = ()  # what it writes

    @property
    def is_captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._graph is not None

    def release(self) -> None:
        """Give back the graph's memory."""
        self._graph, self._taken, self._given = None, [], ()

    def __call__(self, *taken: Tensor) -> tuple[Tensor, ...]:
        """What the function returns. The arguments must have the same shapes in each call."""
        self._num_calls += 1
        if self._num_calls <= WARM_UP_STEPS:
            return self._warm_up(*taken)
        if self._graph is None:
            self._capture(*taken)
            self._check(*taken)
        return self._replay(*taken)

    def _warm_up(self, *taken: Tensor) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                results = self._function(*taken)
        finally:  # what an attempt that failed has launched still changes the weights
            current.wait_stream(self._stream)
        for result in results:
            result.record_stream(current)
        return results

    def _capture(self, *taken: Tensor) -> None:
        self._taken = [tensor.clone() for tensor in taken]
        graph = torch.cuda.CUDAGraph()
        # By thread, so that a worker's other threads, one of which writes checkpoints, do not disturb it.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._given = self._function(*self._taken)
        self._graph = graph

    def _replay(self, *taken: Tensor) -> tuple[Tensor, ...]:
        assert self._graph is not None, "it was captured"
        for own, given in zip(self._taken, taken, strict=True):
            own.copy_(given)
        self._graph.replay()
        # The next replay writes to the same memory.
        return tuple(result.clone() for result in self._given)

    def _check(self, *taken: Tensor) -> None:
        """Raise RuntimeError if a replay does other things than the function itself. What both change is undone."""
        replayed, eager = self._tried(self._replay, taken), self._tried(self._function, taken)
        for one, other in zip(replayed, eager, strict=True):
            difference, size = float((one - other).norm()), float(other.norm())
            if not difference <= TOLERANCE * size:  # NaN is a difference, too
                share = difference / size if size else math.inf
                raise RuntimeError(f"the captured step differs from an eager one on the same batch by {share:.1%}")

    def _tried(self, step: StepFunction, taken: Sequence[Tensor]) -> list[Tensor]:
        """What a step returns and what it changes, by kind, each as one vector; the state is left as it was."""
        random_state = torch.cuda.get_rng_state(self._stream.device)
        before = [[tensor.detach().clone() for tensor in kind] for kind in self._state]
        try:
            found = [torch.cat([result.double().flatten() for result in step(*taken)])]
            for kind, kept in zip(self._state, before, strict=True):
                changes = [(now.detach() - then).double().flatten() for now, then in zip(kind, kept, strict=True)]
                found.append(torch.cat(changes) if changes else found[0][:0])
            return found
        finally:
            with torch.no_grad():
                for kind, kept in zip(self._state, before, strict=True):
                    for now, then in zip(kind, kept, strict=True):
                        now.copy_(then)
            torch.cuda.set_rng_state(random_state, self._stream.device)


class Race:
    """Times captured steps, then eager ones, on the device, and says which are faster."""

    def __init__(self, is_captured_faster: bool | None = None) -> None:
        self._marks: list[torch.cuda.Event] = []
        self._num_steps = 0
        self._has_room = True
        self.is_captured_faster = is_captured_faster
        """None until it is over."""

    def restart(self, num_steps: int) -> None:
        """Begin again if it is not over: something else than steps came between.

        It takes place only if the `num_steps` that are left of the epoch suffice, with a capture before it.
        """
        self._marks, self._num_steps = [], 0
        self._has_room = num_steps > WARM_UP_STEPS + 1 + 2 * RACE_STEPS

    def takes_captured(self) -> bool:
        """Whether the step that begins now is to be a captured one."""
        if self.is_captured_faster is not None:
            return self.is_captured_faster
        if not self._has_room:
            return True
        if self._num_steps % RACE_STEPS == 0:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append(mark)
        self._num_steps += 1
        if len(self._marks) == 3:
            captured, eager, end = self._marks
            end.synchronize()
            self.is_captured_faster = captured.elapsed_time(eager) <= eager.elapsed_time(end)
            return self.is_captured_faster
        return len(self._marks) == 1
