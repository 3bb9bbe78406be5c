"""Several trained models as one: their answers are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hpo.errors import UsageError
from hpo.models.preprocessed import PreprocessedModel, has_no_examples

if TYPE_CHECKING:
    from hpo.data.examples import DataSpec


class Ensemble(nn.Module):
    """A weighted mean of models of one task: of their probabilities if they tell classes, else of their numbers.

    Takes what each of them takes. Returns logits (B, num_classes), the logarithms of the mean probabilities, or the
    mean numbers in the target's units.
    """

    def __init__(self, members: Mapping[int, tuple[PreprocessedModel, int]], *, gain: float) -> None:
        """`members` are a model and how often it counts, by the number of its trial."""
        super().__init__()
        self.models = nn.ModuleList(model for model, _ in members.values())
        self.trials = {number: times for number, (_, times) in members.items()}
        """How often each trial's model counts, by number."""
        self.gain = gain
        """How much better than the winner alone on the validation split; the members are chosen on one half of it and
        judged on the other, in turn."""

    @property
    def spec(self) -> DataSpec:
        """What the data look like."""
        return cast(PreprocessedModel, self.models[0]).spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, in the order of the logits; empty for a regression."""
        return self.spec.classes

    def forward(self, inputs: Any) -> Tensor:
        return averaged([model(inputs) for model in self.models], list(self.trials.values()), self.spec.kind)

    @torch.no_grad()
    def predict(self, inputs: Any) -> list[Any]:
        """The class name, or the number or numbers, of each of a batch of raw examples, in evaluation mode."""
        if has_no_examples(inputs):
            return []
        outputs = self(self._as_batch(inputs))
        if self.spec.kind == "classification":
            return [self.classes[index] for index in outputs.argmax(1).tolist()]
        return cast(list[Any], outputs.tolist())

    @torch.no_grad()
    def probabilities(self, inputs: Any) -> Tensor:
        """The mean probability of each class, (B, num_classes), for a batch of raw examples.

        Raises UsageError if the models predict numbers.
        """
        if self.spec.kind != "classification":
            raise UsageError(f"probabilities are for classes, and the models are for the kind {self.spec.kind}.")
        return cast(Tensor, self(self._as_batch(inputs)).exp())

    def _as_batch(self, inputs: Any) -> Any:
        self.eval()
        return cast(PreprocessedModel, self.models[0]).as_batch(inputs)


def averaged(outputs: list[Tensor], weights: list[int], kind: str) -> Tensor:
    """The weighted mean of models' outputs (N, ...): of probabilities for logits, as their logarithms."""
    shares = torch.tensor(weights, dtype=outputs[0].dtype, device=outputs[0].device) / sum(weights)
    stacked = torch.stack(outputs)
    if kind != "classification":
        mean: Tensor = torch.tensordot(shares, stacked, 1)
        return mean
    probabilities: Tensor = torch.tensordot(shares, stacked.softmax(-1), 1)
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
