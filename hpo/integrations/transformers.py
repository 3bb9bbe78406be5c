"""The Trainer of Hugging Face's transformers as a training loop of your own: `Objective(train=TrainerLoop(build))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError
from hpo.integrations import checkpoint_of as checkpoint_of

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise UsageError(
        "hpo.integrations.transformers needs transformers: pip install 'hpo-torch[transformers]'."
    ) from error

if TYPE_CHECKING:
    from hpo.trial import Trial


class TrialCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each evaluation of a Trainer to a trial, keeps the best model, and remembers the newest checkpoint.

    The Trainer must evaluate and save once an epoch, as `trial_arguments` say. `eval_accuracy` is reported as
    `val/accuracy`, `eval_loss` as `val/loss`; Trainer's own figures of speed are left out.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = {
            f"val/{name.removeprefix('eval_')}": value
            for name, value in kwargs["metrics"].items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
        }
        losses = [row["loss"] for row in state.log_history if "loss" in row]
        if losses:
            metrics["train/loss"] = losses[-1]
        self._trial.save_model(kwargs["model"])
        if not self._trial.report(round(state.epoch), metrics):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trial.save({"checkpoint": f"checkpoint-{state.global_step}"})


def trial_arguments(trial: Trial, **options: Any) -> TrainingArguments:
    """`TrainingArguments` for a trial; `options` are further ones, such as learning_rate or weight_decay.

    They set the number of epochs, the seed, the device and the folder, and let Trainer evaluate, log and save once an
    epoch.
    """
    return TrainingArguments(
        **{"disable_tqdm": True, "report_to": [], **options},
        output_dir=str(trial.folder),
        num_train_epochs=trial.max_epochs,
        seed=trial.seed,
        use_cpu=not trial.device.startswith("cuda"),
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
    )


class TrainerLoop:
    """A training loop for `Objective(train=...)`: it trains the Trainer that `build(trial)` returns.

    Make its arguments with `trial_arguments(trial, ...)`. A model made from a configuration needs no download.
    """

    def __init__(self, build: Callable[[Trial], Trainer]) -> None:
        self.functions = (build,)

    def __call__(self, trial: Trial) -> None:
        trainer = self.functions[0](trial)
        trainer.add_callback(TrialCallback(trial))
        checkpoint = checkpoint_of(trial)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
