"""Intervals and paired tests, against published values, hand computation and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.stats import (
    bootstrap_draws,
    compare,
    compare_all,
    detectable,
    interval,
    mcnemar,
    sign_flips,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert wilson(successes / n, n) == pytest.approx((low, high), abs=5e-5)
    values = [1.0] * successes + [0.0] * (n - successes)
    found = interval(values, np.arange(n), binary=True)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.n == n


@pytest.mark.parametrize(
    ("df", "quantile"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (5, 2.5706),
        (10, 2.2281),
        (30, 2.0423),
        (120, 1.9799),
    ],
)
def test_t_quantiles_are_those_of_the_tables(df, quantile):
    assert t_quantile(df) == pytest.approx(quantile, abs=5e-5)


def test_many_degrees_of_freedom_approach_the_normal():
    assert 1.959964 < t_quantile(100_000) < 1.96


def test_a_t_interval_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3], binary=False)
    half = 3.182446 * math.sqrt(5 / 3 / 4)
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_copies_of_a_question_add_nothing(binary):
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    single = interval(values, np.arange(60), binary)
    tripled = interval(np.repeat(values, 3), np.repeat(np.arange(60), 3), binary)
    assert tripled.n == 180
    assert tripled.high - tripled.low == pytest.approx(single.high - single.low, rel=0.02)
    naive = interval(np.repeat(values, 3), np.arange(180), binary)
    assert naive.high - naive.low < 0.65 * (tripled.high - tripled.low)


def test_clusters_that_cancel_do_not_make_an_interval_narrower_than_independence():
    values = np.tile([0.0, 1.0], 40)
    paired = interval(values, np.repeat(np.arange(40), 2), binary=True)
    alone = interval(values, np.arange(80), binary=True)
    assert paired == alone


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_agreement_of_all_keeps_a_width(share):
    found = interval([share] * 30, np.arange(30), binary=True)
    clustered = interval([share] * 30, np.repeat(np.arange(10), 3), binary=True)
    assert found.high - found.low == pytest.approx(1.96**2 / (30 + 1.96**2), abs=1e-4)
    assert clustered.high - clustered.low == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-4)


def test_missing_values_are_left_out_and_counted():
    found = interval([1.0, math.nan, 0.0, 1.0], [0, 1, 2, 3], binary=True)
    assert (found.n, found.mean) == (3, pytest.approx(2 / 3))
    assert interval([math.nan], [0], binary=True).n == 0
    assert math.isnan(interval([0.3], [0], binary=False).low)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 5)), min_size=1, max_size=40),
)
def test_a_wilson_interval_always_holds_its_mean(rows):
    values, clusters = zip(*rows, strict=True)
    found = interval(values, clusters, binary=True)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    assert found.low < found.high


def clustered(random: np.random.Generator, n: int, effect: float, size: int = 2) -> tuple[np.ndarray, ...]:
    """Yes/no outcomes of two conditions: both the question and its cluster decide who wins."""
    clusters = np.arange(n) // size
    lean = random.normal(0, 0.8, n // size)[clusters]
    hard = random.normal(0, 1, n)
    baseline = (hard + random.normal(0, 0.5, n) > 0).astype(float)
    values = (hard + lean + effect + random.normal(0, 0.5, n) > 0).astype(float)
    return values, baseline, clusters


def test_under_the_null_p_is_below_five_percent_five_percent_of_the_time():
    random = np.random.default_rng(1)
    clusters = np.arange(120) // 2
    ps = []
    for seed in range(500):
        differences = random.normal(0, 1, 60)[clusters] + random.normal(0, 1, 120)
        ps.append(compare(differences, np.zeros(120), clusters, seed, resamples=999).p)
    assert 0.03 <= np.mean(np.array(ps) < 0.05) <= 0.07
    assert 0.44 < np.mean(np.array(ps) < 0.5) < 0.56


def test_yes_no_outcomes_never_claim_more_than_five_percent():
    random = np.random.default_rng(1)
    ps = [compare(*clustered(random, 120, 0.0), seed, resamples=999).p for seed in range(500)]
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.065


def test_ignoring_clusters_would_claim_too_much():
    random = np.random.default_rng(2)
    sets = [clustered(random, 120, 0.0, size=6) for _ in range(300)]
    blind = [compare(a, b, np.arange(120), seed=0, resamples=999).p for a, b, _ in sets]
    aware = [compare(a, b, c, seed=0, resamples=999).p for a, b, c in sets]
    assert np.mean(np.array(blind) < 0.05) > 0.08
    assert np.mean(np.array(aware) < 0.05) < 0.08


def test_the_interval_covers_the_true_difference():
    random = np.random.default_rng(3)
    truth = np.mean([np.subtract(*clustered(random, 4000, 0.5)[:2]).mean() for _ in range(20)])
    found = [compare(*clustered(random, 160, 0.5), seed=0, resamples=999) for _ in range(300)]
    assert 0.91 <= np.mean([item.low <= truth <= item.high for item in found]) <= 0.98


def test_a_real_difference_is_found():
    random = np.random.default_rng(4)
    found = [compare(*clustered(random, 160, 0.8), seed=0, resamples=999) for _ in range(50)]
    assert np.mean([item.p < 0.05 and item.low > 0 for item in found]) > 0.8


def test_counts_and_direction_of_a_difference():
    baseline = np.array([0, 0, 0, 1, 1, 0, 1, 0], float)
    values = np.array([1, 1, 1, 0, 1, 0, 1, 1], float)
    found = compare(values, baseline, np.arange(8), seed=0)
    assert (found.difference, found.fixed, found.broken, found.n) == (0.375, 4, 1, 8)
    assert found.low < 0.375 < found.high
    swapped = compare(baseline, values, np.arange(8), seed=0)
    assert (swapped.difference, swapped.fixed, swapped.broken, swapped.p) == (-0.375, 1, 4, found.p)


def test_the_permutation_p_matches_full_enumeration():
    differences = np.array([0.9, 0.4, -0.2, 0.7, 0.1, 0.6, -0.1, 0.3])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = np.mean(np.abs(differences @ signs) >= abs(differences.sum()) - 1e-12)
    assert compare(differences, np.zeros(8), np.arange(8), seed=0).p == pytest.approx(exact, abs=0.008)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (8, 2, 2 * 56 / 1024),
        (2, 8, 2 * 56 / 1024),
        (3, 3, 1.0),
        (10, 1, 24 / 2048),
    ],
)
def test_mcnemar_is_the_binomial_by_hand(fixed, broken, p):
    assert mcnemar(fixed, broken) == pytest.approx(p)
    values = [1.0] * fixed + [0.0] * broken + [1.0] * 4
    baseline = [0.0] * fixed + [1.0] * broken + [1.0] * 4
    assert compare(values, baseline, np.arange(len(values)), seed=0).mcnemar_p == pytest.approx(p)


def test_no_difference_at_all_is_p_one_with_an_honest_width():
    values = np.tile([0.0, 1.0], 50)
    found = compare(values, values, np.arange(100), seed=0)
    assert (found.difference, found.p, found.fixed, found.broken) == (0, 1.0, 0, 0)
    assert found.low == -found.high
    assert found.high == pytest.approx(1.96**2 / (100 + 1.96**2), abs=1e-4)
    everything = compare(np.ones(20), np.zeros(20), np.arange(20), seed=0)
    assert 0.7 < everything.low < everything.high == 1.0


def test_p_is_never_zero():
    assert compare(np.ones(60), np.zeros(60), np.arange(60), seed=0, resamples=999).p == 1 / 1000


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    values, baseline, clusters = clustered(np.random.default_rng(5), 100, 0.3)
    assert compare(values, baseline, clusters, seed=7) == compare(values, baseline, clusters, seed=7)
    assert compare(values, baseline, clusters, seed=7).p != compare(values, baseline, clusters, seed=8).p


def test_metrics_compared_together_are_as_if_compared_alone():
    random = np.random.default_rng(6)
    values, baseline, clusters = clustered(random, 100, 0.4)
    gaps = np.where(np.arange(100) % 7 == 0, math.nan, values)
    found = compare_all({"a": values, "b": gaps}, {"a": baseline, "b": baseline}, clusters, seed=3)
    assert list(found) == ["a", "b"]
    assert found["b"].n == 85
    assert found["a"] == compare(values, baseline, clusters, seed=3)
    assert found["b"] == compare(gaps, baseline, clusters, seed=3)


def test_one_cluster_says_nothing():
    found = compare([1.0, 1.0], [0.0, 1.0], [4, 4], seed=0)
    assert math.isnan(found.low)
    assert found.p == 1.0
    empty = compare([math.nan], [1.0], [0], seed=0)
    assert empty.n == 0
    assert math.isnan(empty.difference)


def test_power_is_the_published_rule():
    assert detectable(0.2, 817) == pytest.approx(0.044, abs=5e-4)


def rows(random: np.random.Generator, n: int, conditions: int, effect: float = 0.0) -> tuple[np.ndarray, ...]:
    """A model's margins, [n] without and [conditions, n] with shuffled-label vectors, and near-duplicate clusters.

    A question and its twins are alike in how hard they are and in what a vector happens to do to them. `effect` is a
    shift of the margin that is there in truth.
    """
    clusters = np.sort(random.integers(0, int(0.7 * n), n))
    hard, own = random.normal(0, 1, n)[clusters] + random.normal(0, 0.7, n), random.normal(0, 0.3, n)
    moved = random.normal(0, 0.5, (conditions, n))[:, clusters] + random.normal(0, 0.5, (conditions, n))
    return hard + own, hard + own + moved + effect, clusters


OUTCOMES = {
    "binary": lambda margins: (margins > 0).astype(float),
    "continuous": lambda margins: 1 / (1 + np.exp(-margins)),
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_condition_without_effect_is_significant_five_percent_of_the_time(kind):
    """Margins are symmetric about 0, so that a move without effect fixes as many as it breaks. Eight conditions share
    each of 200 baselines, as in a report.
    """
    random = np.random.default_rng(11)
    ps = []
    for seed in range(200):
        baseline, conditions, clusters = rows(random, 400, 8)
        columns = {str(place): OUTCOMES[kind](row) for place, row in enumerate(conditions)}
        found = compare_all(columns, dict.fromkeys(columns, OUTCOMES[kind](baseline)), clusters, seed, resamples=499)
        ps += [item.p for item in found.values()]
    assert 0.03 <= np.mean(np.array(ps) < 0.05) <= 0.07


@pytest.mark.parametrize("kind", OUTCOMES)
def test_an_effect_of_the_size_of_mde_is_found_four_times_in_five(kind):
    """A shift of the margin is sought that moves the mean by `mde`; then how often p is below .05."""
    random = np.random.default_rng(12)
    outcome = OUTCOMES[kind]

    def difference(effect: float) -> float:
        baseline, conditions, _ = rows(np.random.default_rng(13), 20_000, 5, effect)
        return float((outcome(conditions) - outcome(baseline)).mean())

    nulls = []
    for _ in range(40):
        baseline, [row], clusters = rows(random, 160, 1)
        nulls.append(compare(outcome(row), outcome(baseline), clusters, seed=0, resamples=99).mde)
    low, high = 0.0, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if difference(middle) < np.mean(nulls) else (low, middle)
    found = []
    for seed in range(200):
        baseline, [row], clusters = rows(random, 160, 1, low)
        found.append(compare(outcome(row), outcome(baseline), clusters, seed, resamples=499).p < 0.05)
    assert 0.7 <= np.mean(found) <= 0.9


@pytest.mark.parametrize("kind", OUTCOMES)
def test_intervals_cover_the_truth(kind):
    random = np.random.default_rng(14)
    outcome = OUTCOMES[kind]
    baseline, conditions, _ = rows(np.random.default_rng(15), 50_000, 10, 0.4)
    mean, difference = outcome(conditions).mean(), (outcome(conditions) - outcome(baseline)).mean()
    means, differences = [], []
    for seed in range(400):
        baseline, [row], clusters = rows(random, 300, 1, 0.4)
        single = interval(outcome(row), clusters, binary=kind == "binary")
        paired = compare(outcome(row), outcome(baseline), clusters, seed, resamples=999)
        means.append(single.low <= mean <= single.high)
        differences.append(paired.low <= difference <= paired.high)
    assert 0.92 <= np.mean(means) <= 0.98
    assert 0.92 <= np.mean(differences) <= 0.98


def test_mde_of_independent_questions_is_the_published_rule():
    baseline = np.zeros(200)
    values = np.repeat([1.0, 0.0], [20, 180])
    baseline[20:40] = 1
    found = compare(values, baseline, np.arange(200), seed=0, resamples=99)
    assert found.mde == pytest.approx(detectable(0.2, 200))
    assert found.mde == pytest.approx(0.0885, abs=5e-5)


def test_twins_that_move_together_raise_mde_and_twins_that_cancel_do_not_lower_it():
    values, baseline = np.tile([1.0, 1.0, 0.0, 0.0], 25), np.full(100, 0.5)
    together, apart = np.arange(100) // 2, (np.arange(100) // 4) * 2 + np.arange(100) % 2
    alone = compare(values, baseline, np.arange(100), seed=0, resamples=99).mde
    assert compare(values, baseline, together, seed=0, resamples=99).mde == pytest.approx(alone * math.sqrt(2))
    assert compare(values, baseline, apart, seed=0, resamples=99).mde == pytest.approx(alone)
    all_but_one = np.where(np.arange(100) < 99, apart, 99)
    found = compare(values, baseline, all_but_one, seed=0, resamples=99)
    assert found.mde == pytest.approx(alone)


def test_mde_is_that_of_the_noise_whatever_the_effect_and_none_passes_one():
    baseline, clusters = np.zeros(200), np.arange(200) // 2
    all_move = compare(np.ones(200), baseline, clusters, seed=0, resamples=99)
    assert all_move.mde == pytest.approx(detectable(1.0, 200)), "an effect common to all is no design effect"
    assert math.isnan(compare([1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1, 2, 3], seed=0).mde), (
        "no three questions give p < .05"
    )


def test_mde_where_no_question_differs():
    values = np.tile([0.0, 1.0], 50)
    unseen = 1.96**2 / (100 + 1.96**2)
    found = compare(values, values, np.arange(100), seed=0, resamples=99)
    assert found.mde == 0.06 > detectable(unseen, 100)
    graded = compare(values * 0.9, values * 0.9, np.arange(100), seed=0, resamples=99)
    assert graded.mde == pytest.approx(detectable(unseen, 100), abs=1e-4)
    twins = compare(values, values, np.arange(100) // 2, seed=0, resamples=99)
    assert twins.mde == pytest.approx(detectable(1.96**2 / (50 + 1.96**2), 50), abs=1e-4)
    lengths = compare(values + 5, values + 5, np.arange(100), seed=0, resamples=99)
    assert math.isnan(lengths.mde), "nothing bounds how much longer an answer can become"
    assert math.isnan(compare([1.0, 0.0], [0.0, 0.0], [3, 3], seed=0).mde)
    assert math.isnan(compare([math.nan], [0.0], [3], seed=0).mde)


def test_mde_of_yes_or_no_is_never_below_the_six_questions_that_p_needs():
    """One to five that differ, all the same way, have p above .05 whatever n is; shares of probability have no such end."""
    baseline, clusters = np.zeros(1000), np.arange(1000)
    for count in (1, 4, 5, 6):
        values = (clusters < count).astype(float)
        found = compare(values, baseline, clusters, seed=0)
        assert found.mde == pytest.approx(max(6.0, 2.8 * math.sqrt(count)) / 1000)
        assert (found.mcnemar_p < 0.05) is (count >= 6)
        half = compare(values / 2, baseline, clusters, seed=0, resamples=99)
        assert half.mde == pytest.approx(1.4 * math.sqrt(count) / 1000)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_broke_down_are_left_out_and_counted(bad):
    values, baseline = np.tile([0.0, 1.0, 1.0], 10), np.tile([0.0, 0.0, 1.0], 10)
    broken, reference = values.copy(), baseline.copy()
    broken[:4], reference[2:6] = bad, bad
    found = compare_all({"a": broken, "b": values}, {"a": reference, "b": baseline}, np.arange(30), seed=0)
    assert (found["a"].n, found["b"].n) == (24, 30)
    assert found["a"].difference == pytest.approx((values - baseline)[6:].mean())
    assert interval(broken, np.arange(30), binary=True).n == 26


def test_draws_are_shared_between_near_duplicates_and_categories_and_stay_small():
    bootstrap_draws.cache_clear()
    sign_flips.cache_clear()
    random = np.random.default_rng(16)
    near, categories = np.arange(817) % 701, np.arange(817) % 38
    baseline = random.integers(0, 2, 817).astype(float)
    for _ in range(3):
        values = random.integers(0, 2, 817).astype(float)
        for clusters in (near, categories):
            compare(values, baseline, clusters, seed=1)
    for draws, size in ((bootstrap_draws, 15), (sign_flips, 8)):
        assert (draws.cache_info().misses, draws.cache_info().hits) == (2, 4)
        kept = draws(701, 1, 10_000)
        assert kept.nbytes < size * 2**20
        with pytest.raises(ValueError, match="read-only"):
            kept[0, 0] = 0
    assert (bootstrap_draws(701, 1, 10_000).sum(axis=1) == 701).all()
    assert set(np.unique(sign_flips(701, 1, 10_000))) == {-1, 1}
