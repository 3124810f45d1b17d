"""Intervals and p-values: against SciPy's, on simulated data whose truth is known, and where a bootstrap sees nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from llmkit.metrics.bootstrap import Bootstrap
from llmkit.metrics.calibration import ECE
from llmkit.metrics.classification import F1, ROC_AUC
from llmkit.metrics.statistic import Predictions, Statistic, Sums, Weighted, mean_of, ratio_of

LABELS = ("a", "b", "c", "d")
Simulated = tuple[Statistic, float]  # a statistic, and what it estimates


def plan(count: int, seed: int = 1, resamples: int = 4000) -> Bootstrap:
    return Bootstrap(np.arange(count), seed, resamples)


def of_mean(count: int, random: np.random.Generator) -> Simulated:
    return mean_of(np.arange(count), random.exponential(1.0, count)), 1.0


def of_ratio(count: int, random: np.random.Generator) -> Simulated:
    """The loss of tokens: long examples count more."""
    tokens = random.integers(1, 60, count).astype(float)
    loss = tokens * random.gamma(4, 0.5, count) + random.normal(0, 0.3, count)
    return ratio_of(np.arange(count), loss, tokens), 2.0


def of_accuracy(count: int, random: np.random.Generator) -> Simulated:
    return mean_of(np.arange(count), (random.random(count) < 0.85).astype(float), share=True), 0.85


def of_macro_f1(count: int, random: np.random.Generator) -> Simulated:
    shares, right = np.array([0.4, 0.3, 0.2, 0.1]), 0.8
    actual = random.choice(4, count, p=shares)
    predicted = np.where(random.random(count) < right, actual, random.integers(0, 4, count))
    table = shares[:, None] * (right * np.eye(4) + (1 - right) / 4)
    truth = float((2 * np.diag(table) / (table.sum(axis=0) + table.sum(axis=1))).mean())
    fields = {"actual": actual, "predicted": predicted}
    return F1(Predictions(fields, np.arange(count), LABELS)), truth


def of_roc_auc(count: int, random: np.random.Generator) -> Simulated:
    """One example in seven is positive."""
    actual = (random.random(count) < 1 / 7).astype(int)
    scores = random.normal(0, 1, count) + 1.2 * actual
    said = np.stack([-np.logaddexp(0, scores), -np.logaddexp(0, -scores)], axis=1)
    predictions = Predictions({"actual": actual, "log_probabilities": said}, np.arange(count), LABELS[:2])
    return ROC_AUC(predictions), float(stats.norm.cdf(1.2 / np.sqrt(2)))


SIMULATIONS = {"mean": of_mean, "ratio": of_ratio, "accuracy": of_accuracy, "f1": of_macro_f1, "roc_auc": of_roc_auc}


def coverage(
    simulate: Callable[[int, np.random.Generator], Simulated], count: int, trials: int, resamples: int = 1000
) -> float:
    inside = 0
    for trial in range(trials):
        statistic, truth = simulate(count, np.random.default_rng([trial, count]))
        found = plan(count, trial, resamples).draw({("m", "x"): statistic}).interval(("m", "x"))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= truth <= found.high
    return inside / trials


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 300])
@pytest.mark.parametrize("name", SIMULATIONS)
def test_an_interval_of_95_percent_covers_the_truth_as_often(name: str, count: int) -> None:
    assert 0.93 <= coverage(SIMULATIONS[name], count, 1000, 500) <= 0.97


@pytest.mark.parametrize("name", SIMULATIONS)
def test_an_interval_covers_the_truth_about_as_often(name: str) -> None:
    assert 0.9 <= coverage(SIMULATIONS[name], 100, 120, 500) <= 1.0


@pytest.mark.parametrize("name", ["mean", "ratio"])
def test_intervals_are_those_of_scipy_but_for_small_samples(name: str) -> None:
    """With 400 examples the widening for small samples is below 1 %, and the rest is chance."""
    statistic, _ = SIMULATIONS[name](400, np.random.default_rng(3))
    assert isinstance(statistic, Sums)
    above, below = statistic.parts.T

    def of_columns(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return one.sum(axis=axis) / other.sum(axis=axis)

    theirs = stats.bootstrap(
        (above, below), of_columns, paired=True, vectorized=True, method="BCa", n_resamples=8000, rng=1
    ).confidence_interval
    ours = plan(400, resamples=8000).draw({("m", "x"): statistic}).interval(("m", "x"))
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_what_is_no_function_of_sums_has_percentiles() -> None:
    values = np.random.default_rng(5).normal(size=50)
    used = np.arange(50)

    def compute(weights: np.ndarray) -> np.ndarray:
        return (weights @ values) / weights.sum(axis=1)

    found = plan(50).draw({("m", "x"): Weighted(used, compute)}).interval(("m", "x"))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_the_p_value_is_that_of_a_permutation_of_pairs() -> None:
    random = np.random.default_rng(7)
    ours = random.normal(0.0, 1.0, 60)
    theirs = ours + random.normal(0.25, 1.0, 60)
    used = np.arange(60)
    drawn = plan(60).draw({("a", "x"): mean_of(used, ours), ("b", "x"): mean_of(used, theirs)})
    found = drawn.difference(("a", "x"), ("b", "x"))
    expected = stats.permutation_test(
        (ours, theirs),
        lambda one, other, axis: one.mean(axis=axis) - other.mean(axis=axis),
        permutation_type="samples",
        n_resamples=8000,
        rng=1,
    )
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)
    assert found.low is not None
    assert found.high is not None
    assert (found.low <= 0 <= found.high) == (expected.pvalue > 0.05)


def test_equals_are_told_apart_as_often_as_chance_does() -> None:
    """The p-value of models that are alike is below 0.05 in about 5 of 100 trials."""
    below = 0
    for trial in range(300):
        random = np.random.default_rng([9, trial])
        right = [(random.random(80) < 0.7).astype(float) for _ in range(2)]
        used = np.arange(80)
        pair = {(who, "x"): mean_of(used, each, share=True) for who, each in zip("ab", right, strict=True)}
        p = plan(80, trial, 300).draw(pair).difference(("a", "x"), ("b", "x")).p
        assert p is not None
        below += p < 0.05
    assert 0.01 <= below / 300 <= 0.08


def test_a_paired_difference_is_surer_than_the_scores() -> None:
    random = np.random.default_rng(11)
    hard = random.normal(0, 5, 100)  # what is hard for one is hard for the other
    used = np.arange(100)
    pair = {("a", "x"): mean_of(used, hard + random.normal(0.5, 0.1, 100)), ("b", "x"): mean_of(used, hard)}
    drawn = plan(100).draw(pair)
    apart, alone = drawn.difference(("a", "x"), ("b", "x")), drawn.interval(("a", "x"))
    assert apart.low is not None
    assert apart.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert apart.low > 0
    assert apart.high - apart.low < 0.1 * (alone.high - alone.low)


def test_models_that_say_the_same_differ_by_nothing() -> None:
    values = np.random.default_rng(1).normal(size=20)
    used = np.arange(20)
    drawn = plan(20).draw({("a", "x"): mean_of(used, values), ("b", "x"): mean_of(used, values)})
    found = drawn.difference(("a", "x"), ("b", "x"))
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_examples_of_one_document_are_drawn_together() -> None:
    """Ten windows of a document that say the same tell no more than one."""
    documents = np.random.default_rng(2).normal(size=40)
    values, groups = np.repeat(documents, 10), np.repeat(np.arange(40), 10)
    windows = {("m", "x"): mean_of(np.arange(400), values)}
    together = Bootstrap(groups, 1, 3000).draw(windows).interval(("m", "x"))
    alone = plan(40, resamples=3000).draw({("m", "x"): mean_of(np.arange(40), documents)}).interval(("m", "x"))
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    apart = plan(400, resamples=3000).draw(windows).interval(("m", "x"))
    assert apart.high is not None
    assert apart.low is not None
    assert together.high is not None
    assert together.low is not None
    assert apart.high - apart.low < 0.4 * (together.high - together.low)


def test_many_examples_are_put_together_and_mean_the_same() -> None:
    values = np.random.default_rng(4).normal(size=50_000)
    found = plan(50_000, resamples=400).draw({("m", "x"): mean_of(np.arange(50_000), values)}).interval(("m", "x"))
    half = 1.96 * values.std() / np.sqrt(50_000)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


@pytest.mark.parametrize(("right", "count"), [(0, 30), (30, 30)])
def test_all_right_or_all_wrong_is_not_sure(right: int, count: int) -> None:
    share = mean_of(np.arange(count), np.full(count, right / count), share=True)
    found = plan(count).draw({("m", "x"): share}).interval(("m", "x"))
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_where_there_is_no_interval_it_is_said_why() -> None:
    one = plan(1).draw({("m", "x"): mean_of(np.arange(1), np.ones(1))}).interval(("m", "x"))
    assert (one.low, one.why) == (None, "one example alone has no spread")
    same = plan(9).draw({("m", "x"): mean_of(np.arange(9), np.full(9, 2.5))}).interval(("m", "x"))
    assert same.low is None
    assert "the same value" in str(same.why)
    rare = Weighted(np.arange(9), lambda weights: np.where(weights[:, 0] > 2, weights[:, 1], np.nan))
    none = plan(9).draw({("m", "x"): rare}).interval(("m", "x"))
    assert (none.low, none.why) == (None, "too many resamples have no value")


def test_the_seed_decides() -> None:
    statistic, _ = of_mean(50, np.random.default_rng(0))
    found = [plan(50, seed, 200).draw({("m", "x"): statistic}).interval(("m", "x")) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_a_gap_is_of_independent_data() -> None:
    random = np.random.default_rng(6)
    one, other = mean_of(np.arange(80), random.normal(0, 1, 80)), mean_of(np.arange(60), random.normal(2, 1, 60))
    drawn = [plan(len(each.used), seed).draw({("m", "x"): each}) for seed, each in enumerate((one, other))]
    gap = drawn[1].gap(("m", "x"), drawn[0])
    assert gap.low is not None
    assert gap.high is not None
    assert gap.low < 2 < gap.high
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * np.sqrt(1 / 80 + 1 / 60), rel=0.2)


def test_what_resamples_overrate_has_a_p_value_and_no_interval() -> None:
    random = np.random.default_rng(4)
    both = {}
    for who, temperature in (("m", 1.0), ("o", 0.3)):
        logits = random.normal(0, 1, (200, 3))
        actual = np.array([random.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in logits])
        scaled = logits / temperature
        said = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        both[who, "ece"] = ECE(Predictions({"actual": actual, "log_probabilities": said}, np.arange(200)))
    drawn = plan(200).draw(both)
    found, difference = drawn.interval(("m", "ece")), drawn.difference(("m", "ece"), ("o", "ece"))
    assert (found.low, difference.low) == (None, None)
    assert found.why == difference.why == "resamples overrate it, so they tell nothing of its spread"
    assert difference.p is not None
    assert difference.p < 0.01


def test_an_interval_holds_the_value_that_it_is_of() -> None:
    """The largest of some numbers: no resample has a larger one, and nearly all a smaller."""
    values = np.random.default_rng(2).normal(size=40)

    def spread(sums: np.ndarray) -> np.ndarray:
        found: np.ndarray = -np.abs(sums[..., 0]) - sums[..., 1] * 0.0
        return found

    statistic = Sums(np.arange(40), np.stack([values - values.mean(), np.ones(40)], axis=1), spread)
    found = plan(40).draw({("m", "x"): statistic}).interval(("m", "x"))
    assert found.low is None
    assert found.why == "the resamples do not lie around the value of the examples themselves"


def test_shares_of_all_have_gaps_that_are_not_sure() -> None:
    one, other = mean_of(np.arange(8), np.ones(8), share=True), mean_of(np.arange(6), np.ones(6), share=True)
    key = ("m", "x")
    found = plan(8).draw({key: one}).gap(key, plan(6, 2).draw({key: other}))
    ends = [stats.binomtest(n, n).proportion_ci(method="wilson").low for n in (8, 6)]
    assert (found.low, found.high) == pytest.approx((ends[0] - 1, 1 - ends[1]))
    means = plan(8).draw({key: mean_of(np.arange(8), np.ones(8))})
    assert means.gap(key, plan(6, 2).draw({key: other})).low is None


def test_a_difference_that_is_the_same_everywhere_is_not_sure() -> None:
    used = np.arange(6)
    right, wrong = mean_of(used, np.ones(6), share=True), mean_of(used, np.zeros(6), share=True)
    found = plan(6).draw({("m", "x"): right, ("o", "x"): wrong}).difference(("m", "x"), ("o", "x"))
    assert (found.difference, found.low, found.high) == (1.0, None, None)
    assert "all resamples give the same value" in str(found.why)


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 300])
def test_a_paired_difference_of_shares_is_covered_as_often_as_it_says(count: int) -> None:
    inside, trials = 0, 1000
    for trial in range(trials):
        random = np.random.default_rng([trial, count])
        shared, alone = random.random(count) < 0.8, random.random(count) < 0.3
        ours, theirs = (np.where(alone, random.random(count) < share, shared) for share in (0.85, 0.7))
        both = {("m", "x"): ours.astype(float), ("o", "x"): theirs.astype(float)}
        drawn = plan(count, trial, 500).draw({k: mean_of(np.arange(count), v, share=True) for k, v in both.items()})
        found = drawn.difference(("m", "x"), ("o", "x"))
        inside += found.low is not None and found.low - 1e-9 <= 0.3 * 0.15 <= (found.high or 0.0) + 1e-9
    assert 0.93 <= inside / trials <= 0.97
