"""What goes wrong in a training, detected in the figures of its epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from hpo.training.probe import EXPLODED

OVERFIT_RISE = 0.1
"""Share by which the validation loss must lie above its lowest, ..."""

OVERFIT_NOISE = 5.0
"""... at least that many standard deviations of its noise (the lowest of many noisy values lies far below the others),
..."""

OVERFIT_EPOCHS = 3
"""... and for this many epochs in a row before a training counts as overfitting."""

STALL_EPOCHS = 5
LEAST_PROGRESS = 0.01
"""Share of itself by which the training loss must fall to count as progress."""

DECAYED = 0.1
"""Share of the peak rate below which a schedule, not the training, brings progress to an end."""

LEARNED = 0.1
"""Share of the first epoch's training loss below which nothing much is left to learn."""

_DEVIATION_OF_SECONDS = 1.4826 / math.sqrt(6)  # the variance of a second difference is six times that of a value

DEAD = 0.5
"""Share of dead units above which they are reported."""


@dataclass
class Symptoms:
    """Watches the losses, and says after each epoch what is wrong by then.

    overfits_from     first epoch after the lowest validation loss, which has risen since while the training loss fell
    stalls_from       first epoch without progress of the training loss, though the rate was high
    vanishing_layers  the highest layer that hardly any gradient reaches
    exploding         the relative gradient of a hidden layer, where it is far too large
    dead_units        share of the hidden units that do not answer to any example, where it is large
    """

    least_loss: float = 0.0
    """What the training loss cannot fall below, such as the entropy of smoothed labels; infinite if nobody knows it."""

    first_loss: float = math.nan
    lowest_train_loss: float = math.inf
    progress_epoch: int = 0
    idle_epochs: int = 0
    lowest_val_loss: float = math.inf
    turning_epoch: int = 0
    train_loss_at_turn: float = math.inf
    epochs_above: int = 0
    val_losses: list[float] = field(default_factory=list)

    def update(self, epoch: int, metrics: Mapping[str, float], *, peak_lr: float) -> dict[str, float]:
        """Take in an epoch's metrics; the symptoms by then. Where losses are not finite there are none of them."""
        train_loss, val_loss = metrics["train/loss"], metrics["val/loss"]
        if epoch == 1:
            self.first_loss = train_loss
        if train_loss < _changed(self.lowest_train_loss, -LEAST_PROGRESS):
            self.lowest_train_loss, self.progress_epoch, self.idle_epochs = train_loss, epoch, 0
        else:
            self.idle_epochs += metrics["lr"] > DECAYED * peak_lr
        if val_loss < self.lowest_val_loss:
            self.lowest_val_loss, self.turning_epoch, self.train_loss_at_turn = val_loss, epoch, train_loss
        self.val_losses.append(val_loss)
        least_rise = max(OVERFIT_RISE * abs(self.lowest_val_loss), OVERFIT_NOISE * _noise(self.val_losses))
        is_above = val_loss > self.lowest_val_loss + least_rise and train_loss < self.train_loss_at_turn
        self.epochs_above = self.epochs_above + 1 if is_above else 0
        return {**self._of_losses(train_loss), **_of_layers(metrics)}

    def _of_losses(self, train_loss: float) -> dict[str, float]:
        if self.epochs_above >= OVERFIT_EPOCHS:
            return {"overfits_from": self.turning_epoch + 1}  # whose remedies are others than those of a plateau
        if math.isinf(self.least_loss):
            return {}
        left, at_first = train_loss - self.least_loss, self.first_loss - self.least_loss
        has_learned = train_loss >= 0 and left <= LEARNED * at_first  # what is left of a loss below 0 is not known
        if self.idle_epochs >= STALL_EPOCHS and not has_learned:
            return {"stalls_from": self.progress_epoch + 1}
        return {}

    def epochs_without_progress(self, epoch: int) -> int:
        """Epochs since the training loss last fell by a hundredth of itself."""
        return epoch - self.progress_epoch

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def _noise(losses: Sequence[float]) -> float:
    """The standard deviation of losses around a line, from their second differences; 0 of fewer than five."""
    seconds = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    known = [each for each in seconds if math.isfinite(each)]
    return _DEVIATION_OF_SECONDS * median(known) if len(known) >= 3 else 0.0


def _changed(loss: float, share: float) -> float:
    """A loss that is greater by a share of its size; losses of a task's own may be below 0."""
    return loss + share * abs(loss) if math.isfinite(loss) else loss


def _of_layers(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {}
    if vanishing := metrics.get("watch/vanishing_layers", 0.0):
        found["vanishing_layers"] = vanishing
    hidden = [metrics.get(f"watch/gradient_{place}", 0.0) for place in ("first", "middle")]
    # In a network of one layer the first is the last, whose weights begin small: its gradient is large beside them.
    if max(hidden) > EXPLODED and metrics["watch/gradient_first"] != metrics["watch/gradient_last"]:
        found["exploding"] = max(hidden)
    if (dead := metrics.get("watch/dead_units", 0.0)) > DEAD:
        found["dead_units"] = dead
    return found
