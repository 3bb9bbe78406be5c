"""The strategy `priority`: what it models, what it proposes, and that it is a sampler as Optuna's own are."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from optuna.trial import TrialState, create_trial
from scipy.optimize import check_grad
from scipy.stats import norm

from hpo.config import Direction
from hpo.errors import StudyMismatchError, UsageError
from hpo.parameters import Choice, Float, Int, Value
from hpo.search import priority, stored
from hpo.search.acquisition import log_expected_improvement
from hpo.search.encoding import Encoding, distribution
from hpo.search.gaussian_process import GaussianProcess, negative_log_posterior
from hpo.search.priority import PrioritySampler
from hpo.search.pruners import NUM_HALVED_TRIALS, build_pruner
from hpo.search.settings import StudySettings
from hpo.search.study import Study
from hpo.search.surrogate import Surrogate
from hpo.space import Group, Space

SPACE = Space(
    Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), batch_size=Choice(64, 128, 256, default=128)),
    Group(
        "the rest",
        depth=Int(1, 20, log=True, default=8),
        optimizer=Choice("sgd", "adam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        width=Int(3, 3, default=3),
    ),
)
LINE = Space(Group("line", x=Float(0.0, 1.0, default=0.5)))


def distributions(space: Space) -> dict[str, Any]:
    return {name: distribution(parameter) for name, parameter in space.parameters.items()}


def past_trial(x: float, curve: list[float], state: TrialState, number: int) -> optuna.trial.FrozenTrial:
    trial = create_trial(
        state=state,
        params={"x": x},
        distributions=distributions(LINE),
        value=min(curve) if state == TrialState.COMPLETE else None,
        intermediate_values=dict(enumerate(curve, start=1)),
    )
    trial.number = number
    return trial


def proposals(
    trials: list[optuna.trial.FrozenTrial], direction: Direction = Direction.MINIMIZE, **options: Any
) -> list[float]:
    """What the model proposes for x, under ten seeds."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        values = Surrogate(LINE).propose(trials, {}, direction=direction, rng=rng, **options)
        assert values is not None
        found.append(float(values["x"]))
    return found


# --- as Optuna's own samplers -----------------------------------------------------------------------------------------


class TestAsOptunasOwn(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's checks of its samplers. Their parameters are in no space, so the base draws them beside the proposal."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: PrioritySampler(LINE_OF_ANOTHER_NAME, base=TPESampler(n_startup_trials=0))


LINE_OF_ANOTHER_NAME = Space(Group("line", ours=Float(0.0, 1.0, default=0.5)))


def test_three_objectives_are_left_to_tpe_after_the_default_configuration() -> None:
    sampler = PrioritySampler(SPACE, num_trials=40)
    study = optuna.create_study(directions=["minimize", "maximize", "minimize"], sampler=sampler)
    for _ in range(15):
        trial = study.ask(distributions(SPACE))
        study.tell(trial, (abs(math.log10(trial.params["lr"]) + 3), float(trial.params["depth"]), 1.0))

    assert study.trials[0].params == SPACE.defaults()
    assert len({str(trial.params) for trial in study.trials}) == 15


def test_tpe_takes_over_where_the_model_becomes_costly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "NUM_MODELLED_TRIALS", 12)
    modelled = optuna.create_study(sampler=PrioritySampler(LINE, num_trials=5))
    for _ in range(12):
        trial = modelled.ask(distributions(LINE))
        modelled.tell(trial, trial.params["x"])
    tpe = optuna.create_study(sampler=priority.TrialSeededSampler(lambda seed: TPESampler(seed=seed), 0))  # type: ignore[attr-defined]
    tpe.add_trials(modelled.trials)

    assert modelled.ask(distributions(LINE)).params == tpe.ask(distributions(LINE)).params


def test_one_sampler_serves_two_studies() -> None:
    sampler = PrioritySampler(LINE)
    studies = [optuna.create_study(sampler=sampler, direction=direction) for direction in ("minimize", "maximize")]
    for _ in range(15):
        for study in studies:
            trial = study.ask(distributions(LINE))
            study.tell(trial, (trial.params["x"] - 0.3) ** 2)

    assert studies[0].best_params["x"] == pytest.approx(0.3, abs=0.02)
    assert studies[1].best_params["x"] == pytest.approx(1.0, abs=0.02)


# --- what the model learns --------------------------------------------------------------------------------------------


def test_pruned_trials_teach_as_complete_ones_do() -> None:
    trials = [past_trial(0.1, [2.4, 2.3, 2.25, 2.2], TrialState.COMPLETE, 0)]
    trials += [
        past_trial(x, [1.0 + 4 * (x - 0.7) ** 2, 0.9 + 4 * (x - 0.7) ** 2], TrialState.PRUNED, number)
        for number, x in enumerate((0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0), start=1)
    ]

    assert np.mean(np.abs(np.array(proposals(trials)) - 0.7)) < 0.05


def test_a_slow_starter_is_not_taken_for_a_bad_one() -> None:
    """Where x is large, a trial begins worse and ends better; those with the largest x were stopped early."""

    def curve(x: float) -> list[float]:
        return [0.5 + 0.5 * x - (0.1 + x) * epoch / 8 for epoch in range(1, 9)]

    trials = [past_trial(x, curve(x), TrialState.COMPLETE, i) for i, x in enumerate((0.0, 0.1, 0.2, 0.3, 0.4))]
    trials += [past_trial(x, curve(x)[:2], TrialState.PRUNED, 5 + i) for i, x in enumerate((0.6, 0.8, 1.0))]
    assert min(trials[-1].intermediate_values.values()) > min(trials[0].intermediate_values.values())

    assert min(proposals(trials)) > 0.6


def test_a_diverged_trial_counts_as_the_worst() -> None:
    rising = [past_trial(x, [1.0 - 0.3 * x], TrialState.COMPLETE, i) for i, x in enumerate((0.0, 0.2, 0.4, 0.6))]
    diverged = [past_trial(x, [0.1, math.nan], TrialState.PRUNED, 4 + i) for i, x in enumerate((0.8, 0.9, 1.0))]
    without_report = [past_trial(x, [], TrialState.PRUNED, 7 + i) for i, x in enumerate((0.85, 0.95))]

    assert min(proposals(rising)) > 0.8
    assert max(proposals(rising + diverged + without_report)) < 0.8


def test_one_undefined_epoch_does_not_make_a_complete_trial_the_worst() -> None:
    trials = [
        past_trial(x, [1.0, math.nan, (x - 0.9) ** 2], TrialState.COMPLETE, i)
        for i, x in enumerate((0.0, 0.3, 0.6, 0.8, 1.0))
    ]
    for trial in trials:
        trial.value = trial.intermediate_values[3]

    assert np.mean(np.abs(np.array(proposals(trials)) - 0.9)) < 0.1


def test_a_higher_metric_is_a_lower_loss() -> None:
    losses = [past_trial(x, [(x - 0.4) ** 2], TrialState.COMPLETE, i) for i, x in enumerate((0.0, 0.3, 0.6, 1.0))]
    gains = [past_trial(x, [-((x - 0.4) ** 2)], TrialState.COMPLETE, i) for i, x in enumerate((0.0, 0.3, 0.6, 1.0))]

    assert proposals(losses) == proposals(gains, Direction.MAXIMIZE)


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
def test_one_absurd_loss_and_the_unit_of_the_metric_do_not_matter(factor: float) -> None:
    trials = [
        past_trial(x, [factor * (x - 0.4) ** 2], TrialState.COMPLETE, i)
        for i, x in enumerate((0.0, 0.2, 0.3, 0.5, 0.6, 0.8))
    ]
    trials.append(past_trial(1.0, [factor * 1e12], TrialState.COMPLETE, 6))

    assert np.mean(np.abs(np.array(proposals(trials)) - 0.4)) < 0.1


def test_what_is_running_counts_as_known() -> None:
    ended = [past_trial(x, [(x - 0.4) ** 2], TrialState.COMPLETE, i) for i, x in enumerate((0.0, 0.3, 0.6, 1.0))]
    first = proposals(ended)[0]
    running = past_trial(first, [], TrialState.RUNNING, 4)

    assert abs(proposals([*ended, running])[0] - first) > 0.005


def test_nothing_is_proposed_while_the_trials_cannot_be_distinguished() -> None:
    alike = [past_trial(x, [0.5], TrialState.COMPLETE, i) for i, x in enumerate((0.0, 0.3, 0.6, 1.0))]

    assert Surrogate(LINE).propose(alike, {}, direction=Direction.MINIMIZE, rng=np.random.default_rng(0)) is None
    assert Surrogate(LINE).propose([], {}, direction=Direction.MINIMIZE, rng=np.random.default_rng(0)) is None


def test_more_observations_than_the_model_takes_are_thinned_out() -> None:
    xs = np.random.default_rng(0).uniform(size=240)
    trials = [
        past_trial(float(x), [(x - 0.4) ** 2 + 1 / epoch for epoch in range(1, 9)], TrialState.COMPLETE, i)
        for i, x in enumerate(xs)
    ]

    values = Surrogate(LINE).propose(trials, {}, direction=Direction.MINIMIZE, rng=np.random.default_rng(0))

    assert values is not None
    assert float(values["x"]) == pytest.approx(0.4, abs=0.05)


# --- the Gaussian process ---------------------------------------------------------------------------------------------


def test_the_process_follows_what_it_has_seen_and_is_unsure_elsewhere() -> None:
    inputs = np.random.default_rng(0).uniform(size=(40, 3)) * [0.5, 1.0, 1.0]
    targets = np.sin(6 * inputs[:, 0]) + inputs[:, 1]
    targets = (targets - targets.mean()) / targets.std()

    process = GaussianProcess.fit(inputs, targets, np.arange(3))

    mean, deviation = process.predict(inputs)
    assert mean == pytest.approx(targets, abs=0.1)
    assert process.predict(np.array([[1.0, 0.5, 0.5]]))[1][0] > 5 * deviation.max()
    assert process.lengths[2] > 5 * process.lengths[0]


def test_parameters_that_were_never_varied_may_yet_matter() -> None:
    inputs = np.full((8, 6), 0.5)
    inputs[:, 0] = np.linspace(0.0, 1.0, 8)
    targets = np.sin(6 * inputs[:, 0])
    targets = (targets - targets.mean()) / targets.std()

    process = GaussianProcess.fit(inputs, targets, np.arange(6))

    assert process.predict(np.array([[0.5, 1.0, 1.0, 1.0, 1.0, 1.0]]))[1][0] > 0.3


def test_the_slope_of_the_posterior_is_that_of_its_values() -> None:
    rng = np.random.default_rng(0)
    inputs, targets = rng.uniform(size=(12, 4)), rng.normal(size=12)
    posterior = negative_log_posterior(inputs, targets, np.array([0, 1, 1, 2]))

    for _ in range(5):
        logs = rng.normal(size=4) * 0.5
        assert check_grad(lambda x: posterior(x)[0], lambda x: posterior(x)[1], logs) < 1e-4


def test_believing_leaves_the_mean_and_takes_the_doubt() -> None:
    process = GaussianProcess.fit(np.array([[0.0], [0.3], [1.0]]), np.array([1.0, -1.0, 0.0]), np.array([0]))
    at = np.array([[0.6]])

    believing = process.believing(at)

    assert believing.predict(at)[0] == pytest.approx(process.predict(at)[0], abs=1e-3)
    assert believing.predict(at)[1] < 0.5 * process.predict(at)[1]


@pytest.mark.parametrize("z", [-1e3, -40.0, -5.0, -1.001, -0.999, 0.0, 3.0, 50.0])
def test_log_expected_improvement_is_exact_however_small(z: float) -> None:
    found = log_expected_improvement(np.array([z]))[0]

    if z > -6:
        assert found == pytest.approx(math.log(norm.pdf(z) + z * norm.cdf(z)), rel=1e-6)
    else:
        # The first terms of the asymptotic series: pdf(z) / z^2 * (1 - 3 / z^2)
        assert found == pytest.approx(norm.logpdf(z) - 2 * math.log(-z) + math.log1p(-3 / z**2), rel=1e-3)


# --- the encoding -----------------------------------------------------------------------------------------------------


@given(units=st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_a_snapped_point_stands_for_the_values_that_it_decodes_to(units: list[float]) -> None:
    encoding = Encoding(SPACE)

    snapped = encoding.snap(np.array([units]))[0]

    values = encoding.values(snapped)
    assert encoding.contains(values)
    assert encoding.units(values) == pytest.approx(snapped, abs=1e-9)


def test_what_is_inactive_makes_no_distance_and_choices_are_as_far_apart_as_the_ends_of_a_range() -> None:
    encoding = Encoding(SPACE)

    def columns(**changed: Value) -> np.ndarray:
        return encoding.columns(encoding.units(SPACE.defaults() | changed)[None])[0]

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b))

    assert distance(columns(optimizer="adam", momentum=0.5), columns(optimizer="adam", momentum=0.99)) == 0
    assert distance(columns(momentum=0.5), columns(momentum=0.99)) == pytest.approx(1)
    assert distance(columns(batch_size=64), columns(batch_size=128)) == pytest.approx(1)
    assert distance(columns(batch_size=64), columns(batch_size=256)) == pytest.approx(1)


@settings(max_examples=20)
@given(held=st.fixed_dictionaries({}, optional={"lr": st.sampled_from([1e-4, 0.3]), "optimizer": st.just("adam")}))
def test_what_is_held_keeps_its_exact_value_in_a_proposal(held: dict[str, Value]) -> None:
    study = optuna.create_study(sampler=PrioritySampler(SPACE))
    for number in range(6):
        study.tell(study.ask(distributions(SPACE)), float(number))

    values = Surrogate(SPACE).propose(study.trials, held, direction=Direction.MINIMIZE, rng=np.random.default_rng(0))

    assert values is not None
    assert values.items() >= held.items()
    assert Encoding(SPACE).contains(values)


# --- the pruner `model` -----------------------------------------------------------------------------------------------


def late_bloomer(x: float, num_epochs: int) -> list[float]:
    """A falling curve that is lowest for x = 0 in the first two epochs, and for x = 1 in the last of eight."""
    return [1.5 + 0.3 * x - (epoch / 8) * (0.5 + x) for epoch in range(1, num_epochs + 1)]


def continues(
    x: float,
    trials: list[optuna.trial.FrozenTrial],
    direction: Direction = Direction.MINIMIZE,
    held: dict[str, Value] | None = None,
) -> bool:
    """Whether a trial at x that has shown two epochs of eight goes on; `held` is what the next one would not search."""
    curve = [direction.loss(loss) for loss in late_bloomer(x, 2)]
    return Surrogate(LINE).is_worth_continuing(
        past_trial(x, curve, TrialState.RUNNING, len(trials)),
        trials,
        held or {},
        last_epoch=8,
        direction=direction,
        rng=np.random.default_rng(0),
    )


def bloomed(direction: Direction = Direction.MINIMIZE) -> list[optuna.trial.FrozenTrial]:
    """Five complete trials."""
    trials = []
    for number, x in enumerate((0.0, 0.2, 0.4, 0.6, 0.8)):
        trial = past_trial(x, [direction.loss(loss) for loss in late_bloomer(x, 8)], TrialState.COMPLETE, number)
        trial.value = direction.loss(min(late_bloomer(x, 8)))
        trials.append(trial)
    return trials


@pytest.mark.parametrize("direction", [*Direction])
def test_a_trial_continues_if_the_model_expects_the_best_end_of_it_however_it_begins(direction: Direction) -> None:
    assert continues(1.0, bloomed(direction), direction)
    assert not continues(0.1, bloomed(direction), direction)


def test_a_trial_need_only_promise_more_than_what_may_be_tried_next() -> None:
    assert not continues(0.9, bloomed())
    assert continues(0.9, bloomed(), held={"x": 0.2})


def test_a_trial_continues_while_there_is_nothing_to_compare_it_with() -> None:
    assert continues(0.5, [])


def run_losses(study: Study, curves: list[list[float]]) -> list[int]:
    """Run trials with these losses one after the other; the epochs in which they ended."""
    ends = []
    for curve in curves:
        suggestion = study.ask()
        is_weak = False
        for epoch, loss in enumerate(curve, start=1):
            is_weak = study.report(suggestion.number, epoch, loss)
            if is_weak:
                break
        study.tell(suggestion.number, "pruned" if is_weak else "complete", value=min(curve[:epoch]))
        ends.append(epoch)
    return ends


def test_the_model_knows_what_the_next_trial_would_hold_also_if_the_space_has_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    monkeypatch.setattr(
        Surrogate, "is_worth_continuing", lambda self, trial, others, fixed, **_: held.append(fixed) or True
    )
    line = Float(0.0, 1.0, default=0.5)
    groups = Group("first", x=line), Group("second", y=line), Group("third", z=line)
    settings = StudySettings(
        task="digits", space=Space(*groups, forbid=[{"x": ">=0.999"}]), seed=0, strategy="priority", pruner="model",
        max_epochs=2, metric="loss", direction=Direction.MINIMIZE, limit=None, planned_trials=60,
    )  # fmt: skip

    run_losses(Study.open(InMemoryStorage(), "study", settings), [[1.0, 1.0]] * (NUM_HALVED_TRIALS + 3))

    assert [set(fixed) for fixed in held] == [set(), {"z"}, set()]


@pytest.mark.parametrize(("first_rung", "stopped_after"), [(None, 4), (2, 2)])
def test_a_hopeless_trial_is_stopped_at_the_first_rung_also_before_the_model_judges(
    first_rung: int | None, stopped_after: int
) -> None:
    settings = StudySettings(
        task="digits", space=LINE, seed=0, strategy="random", pruner="model", max_epochs=24, metric="loss",
        direction=Direction.MINIMIZE, limit=None, planned_trials=20, first_rung=first_rung,
    )  # fmt: skip
    good = [1 / epoch for epoch in range(1, 25)]
    hopeless = [[5.0 + number] * 24 for number in range(NUM_HALVED_TRIALS + 2)]

    ends = run_losses(Study.open(InMemoryStorage(), "study", settings), [good, *hopeless])

    assert ends == [24] + [stopped_after] * len(hopeless)


# --- training time ----------------------------------------------------------------------------------------------------


def timed_valleys() -> list[optuna.trial.FrozenTrial]:
    """Two valleys, equally deep; in the right one an epoch takes a hundred times as long."""
    trials = []
    for number, x in enumerate(np.linspace(0.0, 1.0, 9).tolist()):
        loss = min((x - 0.2) ** 2, (x - 0.8) ** 2)
        trial = past_trial(x, [loss + 0.1, loss], TrialState.COMPLETE, number)
        trial.set_user_attr(stored.TRAINED, 2.0 if x < 0.5 else 200.0)
        trials.append(trial)
    return trials


@pytest.mark.parametrize("time_counts", [False, True])
def test_of_two_equal_valleys_the_fast_one_is_searched_only_if_time_counts(time_counts: bool) -> None:
    found = proposals(timed_valleys(), time_counts=time_counts)

    assert min(found) < 0.5
    assert (max(found) < 0.5) == time_counts


@pytest.mark.parametrize("time_counts", [False, True])
def test_a_trial_in_the_slow_valley_continues_only_if_time_does_not_count(time_counts: bool) -> None:
    continues = Surrogate(LINE).is_worth_continuing(
        past_trial(0.8, [0.1], TrialState.RUNNING, 9),
        timed_valleys(),
        {},
        last_epoch=2,
        direction=Direction.MINIMIZE,
        rng=np.random.default_rng(0),
        time_counts=time_counts,
    )
    assert continues != time_counts


@pytest.mark.parametrize("has_budget", [False, True])
def test_how_long_trials_took_changes_a_search_only_if_it_has_a_budget(has_budget: bool) -> None:
    chosen = StudySettings(
        task="digits", space=LINE, seed=0, strategy="priority", pruner="none", max_epochs=2, metric="loss",
        direction=Direction.MINIMIZE, limit=None, planned_trials=12,
    )  # fmt: skip

    def asked(seconds: Callable[[float], float]) -> list[Value]:
        study = Study.open(InMemoryStorage(), "study", chosen)
        if has_budget:
            study.record(stored.BUDGET, 1e6)
        values = []
        for _ in range(12):
            suggestion = study.ask()
            x = float(suggestion.values["x"])
            study.report(suggestion.number, 1, (x - 0.3) ** 2)
            study.tell(suggestion.number, "complete", value=(x - 0.3) ** 2, trained_s=seconds(x))
            values.append(x)
        return values

    assert (asked(lambda x: 1.0 + 100 * x) != asked(lambda x: 1.0)) == has_budget


# --- the first rung ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first_rung", "stopped_after"), [(None, 4), (1, 1), (7, 7)])
def test_the_weakest_trial_is_stopped_at_the_first_rung(first_rung: int | None, stopped_after: int) -> None:
    study = optuna.create_study(pruner=build_pruner("sha", max_epochs=20, space=LINE, first_rung=first_rung))
    for loss in (1.0, 2.0):
        trial = study.ask()
        for epoch in range(1, 21):
            trial.report(loss, epoch)
            if trial.should_prune():
                break

    assert epoch == stopped_after


def test_the_first_rung_is_a_setting_of_the_study() -> None:
    chosen = StudySettings(
        task="digits", space=LINE, seed=0, strategy="random", pruner="sha", max_epochs=20, metric="loss",
        direction=Direction.MINIMIZE, limit=None, planned_trials=5, first_rung=2,
    )  # fmt: skip
    storage = InMemoryStorage()
    study = Study.open(storage, "study", chosen)
    first, second = study.ask(), study.ask()

    assert not any(study.report(first.number, epoch, 1.0) for epoch in range(1, 20))
    assert [study.report(second.number, epoch, 2.0) for epoch in (1, 2)] == [False, True]
    assert Study.load(storage, "study").settings.first_rung == 2
    with pytest.raises(StudyMismatchError, match="--first-rung 2, not none"):
        Study.open(storage, "study", replace(chosen, first_rung=None))


@pytest.mark.parametrize(
    ("pruner", "first_rung", "message"),
    [
        ("sha", 0, r"--first-rung 0 is not allowed: it must be from 1 to the 20 epochs"),
        ("model", 21, r"--first-rung 21 is not allowed: it must be from 1 to the 20 epochs"),
        ("sha", 21, r"--first-rung 21 is not allowed: it must be from 1 to the 20 epochs"),
        ("median", 3, r"--first-rung 3 is for --pruner model or sha, not median"),
    ],
)
def test_a_first_rung_that_cannot_be_is_refused(pruner: str, first_rung: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pruner(pruner, max_epochs=20, space=LINE, first_rung=first_rung)
