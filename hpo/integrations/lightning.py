"""Lightning's trainer as a training loop of your own: `Objective(train=lightning_loop(module, datamodule))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError
from hpo.integrations import checkpoint_of as checkpoint_of

try:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
except ImportError as error:
    raise UsageError("hpo.integrations.lightning needs Lightning: pip install 'hpo-torch[lightning]'.") from error

if TYPE_CHECKING:
    from hpo.trial import Trial


class TrialCallback(Callback):  # type: ignore[misc]
    """Reports each epoch of a Lightning trainer to a trial, keeps the best model, and saves what a resume needs.

    The metrics are all that the module has logged (`self.log("val/accuracy", ...)`); the objective's must be there
    after each epoch. A trial that is to stop stops the trainer. Pass `checkpoint_of(trial)` to `trainer.fit` as
    `ckpt_path`.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self._save(trainer, epoch)
        self._trial.save_model(pl_module)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        if not self._trial.report(epoch, metrics):
            trainer.should_stop = True

    def _save(self, trainer: Trainer, epoch: int) -> None:
        """Write a checkpoint under its own name first: the state that names it is only ever of a whole file."""
        written = self._trial.folder / f"epoch-{epoch}.ckpt"
        trainer.save_checkpoint(written, weights_only=False)
        self._trial.save({"checkpoint": written.name})
        for path in self._trial.folder.glob("epoch-*.ckpt"):
            if path.name not in (written.name, f"epoch-{epoch - 1}.ckpt"):  # the last two states may be read
                path.unlink()


def lightning_loop(
    module: Callable[[Trial], LightningModule], datamodule: Callable[[Trial], LightningDataModule], **options: Any
) -> LightningLoop:
    """A training loop for `Objective(train=...)`: it fits `module(trial)` to `datamodule(trial)`.

    `options` are those of `lightning.pytorch.Trainer`. The loop itself sets max_epochs, accelerator, devices, logger,
    enable_checkpointing and default_root_dir; there is no progress bar and no sanity check unless options say so.
    """
    return LightningLoop(module, datamodule, options)


class LightningLoop:
    """What `lightning_loop` returns."""

    def __init__(
        self,
        module: Callable[[Trial], LightningModule],
        datamodule: Callable[[Trial], LightningDataModule],
        options: dict[str, Any],
    ) -> None:
        self.functions = module, datamodule
        self._options = options

    def __call__(self, trial: Trial) -> None:
        module, datamodule = self.functions
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        options = {**quiet, **self._options}
        trainer = Trainer(
            **{**options, "callbacks": [*(options.get("callbacks") or []), TrialCallback(trial)]},
            max_epochs=trial.max_epochs,
            accelerator="gpu" if trial.device.startswith("cuda") else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            default_root_dir=trial.folder,
        )
        checkpoint = checkpoint_of(trial)  # of tensors and plain values, which cannot run code
        trainer.fit(module(trial), datamodule(trial), ckpt_path=checkpoint, weights_only=True)
