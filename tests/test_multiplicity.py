"""Corrections for many looks, against published values, hand computation and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from truthsteer.multiplicity import holm, max_t
from truthsteer.stats import compare

RESAMPLES = 1999


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        # Wright, Biometrics 48 (1992), and R's p.adjust(c(.01, .02, .03, .04, .05), "holm")
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.04, 0.001, 0.03], [0.06, 0.003, 0.06]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(ps, adjusted):
    assert holm(ps) == pytest.approx(adjusted)


def test_holm_leaves_out_what_has_no_p():
    adjusted = holm([None, 0.01, math.nan, 0.02])
    assert adjusted[0] is None
    assert math.isnan(adjusted[2])
    assert [adjusted[1], adjusted[3]] == pytest.approx(holm([0.01, 0.02]))
    assert holm([None]) == [None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_lies_between_the_plain_p_and_bonferroni_and_keeps_the_order(ps):
    adjusted = holm(ps)
    assert all(p <= found <= min(1.0, p * len(ps)) + 1e-12 for p, found in zip(ps, adjusted, strict=True))
    pairs = sorted(zip(ps, adjusted, strict=True))
    assert [found for _, found in pairs] == sorted(adjusted)
    # A stricter error rate than the false discovery rate's.
    assert all(np.array(adjusted) >= false_discovery_control(ps, method="bh") - 1e-12)


def test_one_cell_has_the_p_of_the_plain_test():
    random = np.random.default_rng(0)
    clusters = np.arange(90) // 2
    differences = random.normal(0.2, 1, 90)
    plain = compare(differences, np.zeros(90), clusters, seed=5, resamples=RESAMPLES).p
    assert max_t(differences[None], clusters, 5, RESAMPLES) == pytest.approx([plain], abs=1e-12)


def test_copies_of_a_cell_cost_nothing_and_other_cells_do():
    random = np.random.default_rng(1)
    clusters = np.arange(80)
    differences = random.normal(0.25, 1, 80)
    alone = max_t(differences[None], clusters, 0, RESAMPLES)[0]
    assert max_t(np.tile(differences, (40, 1)), clusters, 0, RESAMPLES) == pytest.approx([alone] * 40)
    among = max_t(np.vstack([differences, random.normal(0, 1, (40, 80))]), clusters, 0, RESAMPLES)
    assert among[0] > 5 * alone


def test_scale_and_sign_of_a_cell_do_not_matter():
    random = np.random.default_rng(2)
    cells = random.normal(0.15, 1, (5, 60))
    factors = np.array([1, -1000, 0.001, 1, 7])[:, None]
    found = max_t(cells, np.arange(60), 0, RESAMPLES)
    assert max_t(cells * factors, np.arange(60), 0, RESAMPLES) == pytest.approx(found)


def test_a_quiet_cell_is_not_drowned_by_a_noisy_one():
    """Ten of ten questions won is strong evidence, though a cell with 60 coin flips moves its mean more by chance."""
    random = np.random.default_rng(3)
    quiet, noisy = np.zeros(100), random.choice([-1.0, 1.0], 100)
    quiet[:12] = 1
    found = max_t(np.stack([quiet, noisy]), np.arange(100), 0, RESAMPLES)
    assert found[0] < 0.01 < found[1]


def test_step_down_by_full_enumeration():
    cells = np.round(np.random.default_rng(11).normal(0.45, 1, (4, 10)), 2)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    scaled = cells / np.sqrt((cells**2).sum(axis=1))[:, None]
    order = np.argsort(-np.abs(scaled.sum(axis=1)))
    observed, flipped = np.abs(scaled[order].sum(axis=1)), np.abs(scaled[order] @ signs)
    steps = np.array([(flipped[place:].max(axis=0) >= observed[place] - 1e-12).mean() for place in range(4)])
    exact = np.maximum.accumulate(steps)
    assert (exact - steps).max() > 0.05, "a case in which a less extreme cell would have the smaller p"
    single_step = (flipped.max(axis=0) >= observed[:, None] - 1e-12).mean(axis=1)
    assert (single_step - exact).max() > 0.05
    assert max_t(cells, np.arange(10), 0, 20_000)[order] == pytest.approx(exact, abs=0.012)


def test_missing_questions_empty_cells_and_cells_without_a_difference():
    random = np.random.default_rng(4)
    cell = random.normal(0.4, 1, 40)
    gaps = np.concatenate([cell, np.full(40, math.nan)])
    clusters = np.arange(80) % 40
    rows = np.stack([gaps, np.full(80, math.nan), np.zeros(80)])
    found = max_t(rows, clusters, 0, RESAMPLES)
    assert found[0] == pytest.approx(max_t(cell[None], np.arange(40), 0, RESAMPLES)[0])
    assert math.isnan(found[1])
    assert found[2] == 1.0
    assert np.isnan(max_t(np.full((2, 3), math.nan), np.arange(3), 0, RESAMPLES)).all()
    assert max_t(np.empty((0, 3)), np.arange(3), 0, RESAMPLES).size == 0


def test_the_family_wise_error_is_five_percent_where_plain_p_is_wrong_almost_always():
    """A grid of 40 cells that share questions and their near-duplicates, none of which has an effect."""
    random = np.random.default_rng(5)
    clusters = np.arange(100) // 2
    least, plain = [], []
    for seed in range(200):
        shared = random.normal(0, 1, 50)[clusters]
        cells = 0.6 * shared + random.normal(0, 1, (40, 50))[:, clusters] + random.normal(0, 0.5, (40, 100))
        least.append(max_t(cells, clusters, seed, 499).min())
        plain.append(min(max_t(cell[None], clusters, seed, 499)[0] for cell in cells[:20]))
    assert 0.02 <= np.mean(np.array(least) < 0.05) <= 0.08
    assert np.mean(np.array(plain) < 0.05) > 0.3


def test_step_down_finds_more_than_the_largest_statistic_alone():
    random = np.random.default_rng(6)
    cells = random.normal(0, 1, (30, 100))
    cells[:15] += 0.45
    found = max_t(cells, np.arange(100), 0, RESAMPLES)
    assert (found[:15] < 0.05).sum() >= 10
    assert (found[15:] >= 0.05).all()
