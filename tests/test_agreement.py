"""Agreement of ratings, against scikit-learn, published tables, hand computation and simulation."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, recall_score, roc_auc_score

from truthsteer.agreement import (
    Agreement,
    Estimate,
    agreement,
    auc,
    auc_estimate,
    calibration,
    calibration_estimate,
    rogan_gladen,
)

NAMES = ("agreement", "kappa", "ac1", "recall_yes", "recall_no")
FEW = 499


def of_table(yes_yes: int, yes_no: int, no_yes: int, no_no: int) -> Agreement:
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [yes_yes, yes_no, no_yes, no_no])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [yes_yes, yes_no, no_yes, no_no])
    return agreement(first, second, np.arange(first.size), seed=0, resamples=FEW)


def test_gwets_example_of_high_agreement_and_no_kappa():
    """Gwet 2008, 125 subjects of whom two raters agree on 118: kappa -.0234, AC1 .9408."""
    found = of_table(118, 5, 2, 0)
    assert (found.n, found.undecided) == (125, 0)
    assert found.agreement.value == pytest.approx(0.944)
    assert found.kappa.value == pytest.approx(-0.0234, abs=5e-5)
    assert found.ac1.value == pytest.approx(0.9408, abs=5e-5)


def test_kappas_textbook_table():
    """20 and 15 of 50 agree, 5 and 10 do not: kappa is .4."""
    found = of_table(20, 5, 10, 15)
    assert found.agreement.value == pytest.approx(0.7)
    assert found.kappa.value == pytest.approx(0.4)
    assert found.recall_yes.value == pytest.approx(20 / 25)
    assert found.recall_no.value == pytest.approx(15 / 25)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=30))
def test_values_are_those_of_scikit_learn_and_every_interval_holds_its_value(rows):
    first, second, clusters = (np.array(column, float) for column in zip(*rows, strict=True))
    found = agreement(first, second, clusters, seed=0, resamples=99)
    both = len({*first, *second}) > 1
    assert found.kappa.value == pytest.approx(cohen_kappa_score(first, second), nan_ok=True) if both else True
    assert found.kappa.value == pytest.approx(1.0) if both and (first == second).all() else True
    for label, recall in ((1, found.recall_yes), (0, found.recall_no)):
        expected = recall_score(first, second, pos_label=label) if label in first else math.nan
        assert recall.value == pytest.approx(expected, nan_ok=True)
    for name in NAMES:
        estimate = getattr(found, name)
        # A resample's kappa or AC1 may lie wholly on one side of the value in so few clusters; shares may not.
        if name in ("agreement", "recall_yes", "recall_no") and not math.isnan(estimate.low):
            assert 0 <= estimate.low <= estimate.high <= 1 + 1e-12


def test_missing_verdicts_are_left_out_and_counted():
    first = np.array([1, 0, 1, math.nan, 0, 1])
    second = np.array([1, 0, math.nan, 1, 1, 1])
    found = agreement(first, second, np.arange(6), seed=0, resamples=FEW)
    assert (found.n, found.undecided) == (4, 2)
    assert found.agreement.value == 0.75


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([], [], (math.nan, math.nan, math.nan, math.nan, math.nan)),
        ([math.nan], [1.0], (math.nan, math.nan, math.nan, math.nan, math.nan)),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], (1.0, math.nan, 1.0, 1.0, math.nan)),
        ([0.0, 0.0], [0.0, 0.0], (1.0, math.nan, 1.0, math.nan, 1.0)),
        ([1.0, 1.0], [0.0, 0.0], (0.0, 0.0, -1.0, 0.0, math.nan)),
        ([1.0, 1.0], [1.0, 0.0], (0.5, 0.0, 0.2, 0.5, math.nan)),
        ([1.0, 0.0], [1.0, 0.0], (1.0, 1.0, 1.0, 1.0, 1.0)),
        ([1.0, 0.0], [0.0, 1.0], (0.0, -1.0, -1.0, 0.0, 0.0)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_degenerate_tables_never_fail(first, second, expected):
    found = agreement(first, second, np.arange(len(first)), seed=0, resamples=99)
    assert [getattr(found, name).value for name in NAMES] == pytest.approx(expected, nan_ok=True)
    for name in NAMES:
        estimate = getattr(found, name)
        assert math.isnan(estimate.value) <= math.isnan(estimate.low)
        assert math.isnan(estimate.low) == math.isnan(estimate.high)


def test_full_agreement_keeps_a_width_that_shrinks_with_clusters_not_with_copies():
    few, many, copied = (
        agreement(np.arange(n) % 2, np.arange(n) % 2, np.arange(n) // size, seed=0, resamples=99)
        for n, size in ((20, 1), (200, 1), (200, 10))
    )
    for name in NAMES:
        assert getattr(few, name).high == pytest.approx(1.0)
        assert getattr(few, name).low < getattr(many, name).low < 1
        if name.startswith("recall"):  # every cluster of copies holds both classes
            assert getattr(copied, name).low == pytest.approx(20 / (20 + 1.96**2), abs=1e-3)
        else:
            assert getattr(copied, name).low == pytest.approx(getattr(few, name).low)


def test_one_cluster_says_nothing_about_width():
    found = agreement([1, 0, 1], [1, 1, 1], [7, 7, 7], seed=0)
    assert found.agreement.value == pytest.approx(2 / 3)
    assert math.isnan(found.agreement.low)
    assert math.isnan(found.kappa.high)


def test_scores_that_are_not_yes_or_no_are_refused():
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        agreement([0.3, 1], [1, 0], [0, 1], seed=0)


def ratings(random: np.random.Generator, n: int, size: int = 2) -> tuple[np.ndarray, ...]:
    """A truth that is yes in 60 %, and a judge who errs more on some questions than on others."""
    clusters = np.arange(n) // size
    truth = (random.normal(0, 1, n // size)[clusters] + random.normal(0, 0.7, n) > -0.31).astype(float)
    hard = (random.random(n // size) < 0.25)[clusters]
    wrong = random.random(n) < np.where(hard, 0.6, 0.1)
    return truth, np.where(wrong, 1 - truth, truth), clusters


def test_intervals_cover_the_truth_and_ignoring_clusters_would_not():
    random = np.random.default_rng(1)
    truth, judge, _ = ratings(random, 400_000)
    [population] = [agreement(truth, judge, np.zeros(truth.size), seed=0)]
    hits: dict[str, list[bool]] = {name: [] for name in NAMES}
    blind = []
    for seed in range(250):
        truth, judge, clusters = ratings(random, 240, size=4)
        found = agreement(truth, judge, clusters, seed, resamples=FEW)
        for name in NAMES:
            estimate = getattr(found, name)
            hits[name].append(estimate.low <= getattr(population, name).value <= estimate.high)
        alone = agreement(truth, judge, np.arange(240), seed, resamples=FEW).agreement
        blind.append(alone.low <= population.agreement.value <= alone.high)
    for name, found in hits.items():
        assert 0.9 <= np.mean(found) <= 0.98, name
    assert np.mean(blind) < 0.9


def test_the_same_seed_gives_the_same_intervals_and_the_order_of_answers_does_not_matter():
    truth, judge, clusters = ratings(np.random.default_rng(2), 200)
    first = agreement(truth, judge, clusters, seed=3, resamples=FEW)
    order = np.random.default_rng(0).permutation(200)
    assert agreement(truth[order], judge[order], clusters[order], seed=3, resamples=FEW) == first
    assert agreement(truth, judge, clusters, seed=4, resamples=FEW) != first
    assert set(asdict(first)["kappa"]) == {"value", "low", "high"}


def test_auc_is_that_of_scikit_learn_ties_included():
    random = np.random.default_rng(3)
    for levels in (2, 6, 10_000):
        scores, labels = random.integers(0, levels, 300), random.integers(0, 2, 300)
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels))


def test_auc_by_hand_and_where_there_is_none():
    assert auc([1, 2, 2, 3], [0, 1, 0, 1]) == pytest.approx(3.5 / 4)
    assert auc([1, math.nan, 3], [0, 0, 1]) == 1.0
    assert auc([5, 5, 5], [0, 1, 1]) == 0.5
    for scores, labels in (([], []), ([1, 2], [1, 1]), ([math.nan], [0])):
        assert math.isnan(auc(scores, labels))
        assert math.isnan(auc_estimate(scores, labels, np.arange(len(scores)), seed=0).low)


def test_the_interval_of_auc_is_that_of_resampling_by_hand():
    random = np.random.default_rng(4)
    clusters = np.arange(60) // 3
    labels = random.integers(0, 2, 60)
    scores = np.round(labels + random.normal(0, 1, 60), 1)
    found = auc_estimate(scores, labels, clusters, seed=0, resamples=4000)
    drawn = []
    for _ in range(400):
        picked = np.concatenate([np.flatnonzero(clusters == c) for c in random.integers(0, 20, 20)])
        drawn.append(roc_auc_score(labels[picked], scores[picked]))
    assert found.value == pytest.approx(roc_auc_score(labels, scores))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.03)


def test_a_score_that_separates_keeps_a_width():
    found = auc_estimate(np.arange(20), np.arange(20) >= 15, np.arange(20), seed=0)
    assert found.value == 1.0
    assert found.low == pytest.approx(5 / (5 + 1.96**2), abs=1e-3)


def test_calibration_by_hand():
    """Two bins: ten answers at .05 of which 2 are yes, ten at .95 (and 1, the last bin's end) of which 8 are."""
    probabilities = np.repeat([0.05, 0.95, 1.0], [10, 8, 2])
    labels = np.concatenate([np.arange(10) < 2, np.arange(10) < 8])
    assert calibration(probabilities, labels) == pytest.approx((0.15 * 10 + abs(0.96 - 0.8) * 10) / 20)
    assert calibration([1.0, 0.0, math.nan], [1, 0, 1]) == 0
    assert math.isnan(calibration([], []))


def test_the_upper_end_of_the_calibration_error_can_be_trusted():
    random = np.random.default_rng(5)
    stated = random.random(400_000)
    population = calibration(stated, random.random(400_000) < 0.6 * stated)
    held, chance = [], []
    for seed in range(200):
        stated = random.random(200)
        found = calibration_estimate(stated, random.random(200) < 0.6 * stated, np.arange(200) // 2, seed, FEW)
        held.append(population <= found.high)
        perfect = calibration_estimate(stated, random.random(200) < stated, np.arange(200) // 2, seed, FEW)
        chance.append(perfect.low < 0.03)
    assert np.mean(held) >= 0.92
    assert np.mean(chance) >= 0.9
    assert calibration_estimate([0.5], [1], [0], seed=0).value == 0.5
    assert math.isnan(calibration_estimate([0.5], [1], [0], seed=0).low)


def test_rogan_gladen_turns_a_raters_errors_around():
    sensitivity, specificity = 0.9, 0.7
    for share in (0.1, 0.5, 0.8):
        called = share * sensitivity + (1 - share) * (1 - specificity)
        assert float(rogan_gladen(called, sensitivity, specificity)) == pytest.approx(share)
    assert rogan_gladen([0.1, 0.95], 0.9, 0.7).tolist() == [0.0, 1.0]
    assert math.isnan(float(rogan_gladen(0.5, 0.6, 0.4)))
    assert math.isnan(float(rogan_gladen(0.5, math.nan, 0.4)))


def test_an_estimate_is_plain_data():
    assert asdict(Estimate(0.5, 0.4, 0.6)) == {"value": 0.5, "low": 0.4, "high": 0.6}
