"""The cells of the table: families of p, clusters of two kinds, and what a judge left undecided."""

from __future__ import annotations

import math

import numpy as np
import pytest

from truthsteer.evidence import WARNED_ABOVE, WITHHELD_ABOVE, Design, binary, cells, decided_of, unit
from truthsteer.stats import compare, interval

N = 120
ALONE = Design(np.arange(N), np.arange(N) // 10, seed=3)
"""Every question its own group; categories of ten."""


def table(scores, names=("true",), design=ALONE, judged=None, families=None):
    """The baseline and the chosen row were named beforehand; the others are one family."""
    families = [range(2, len(scores))] if families is None else families
    return cells(scores, names, design, judged or [{}] * len(scores), families)


def coin(share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(N) < share).astype(float)


def flipped(base: np.ndarray, fixed: int, broken: int, seed: int) -> np.ndarray:
    """`base` with so many questions set right and wrong."""
    random, values = np.random.default_rng(seed), base.copy()
    values[random.permutation(np.flatnonzero(base == 0))[:fixed]] = 1.0
    values[random.permutation(np.flatnonzero(base == 1))[:broken]] = 0.0
    return values


@pytest.fixture(scope="module")
def family() -> list[dict[str, np.ndarray]]:
    """The baseline, the chosen row, then twelve others: one strong, one of p about .02, ten of nothing."""
    base = coin(0.4, 0)
    others = [flipped(base, 30, 2, 1), flipped(base, 18, 6, 2)]
    others += [flipped(base, 8, 8, seed) for seed in range(3, 13)]
    return [{"true": values} for values in (base, flipped(base, 18, 6, 99), *others)]


def test_named_rows_keep_their_own_p_and_the_others_are_corrected_for_their_number(family):
    found = [row["true"] for row in table(family)]
    assert (found[0]["p"], found[0]["p_adjusted"]) == (None, None), "the baseline"
    assert found[1]["p"] < 0.05, "the chosen row, named beforehand, pays for nothing"
    assert found[1]["p_adjusted"] is None
    for cell in found[2:]:
        assert cell["p_adjusted"] >= cell["p"] - 0.005, "never smaller, but for the noise of resampling"
    strong, weak, *nothing = found[2:]
    assert strong["p_adjusted"] < 0.01
    assert weak["p"] < 0.05 < weak["p_adjusted"], "one of twelve"
    assert min(cell["p_adjusted"] for cell in nothing) > 0.5
    own = compare(family[3]["true"], family[0]["true"], ALONE.clusters, ALONE.seed)
    assert (weak["p"], weak["difference"], weak["mde"]) == (own.p, own.difference, own.mde)


def test_a_family_of_one_pays_nothing(family):
    [_, _, alone] = [row["true"] for row in table([family[0], family[1], family[3]])]
    assert alone["p_adjusted"] == pytest.approx(alone["p"], abs=0.003)


def test_a_family_has_those_rows_that_have_the_metric(family):
    """Rows without it (that ask no model, say) are no tests."""
    few = [family[0], family[1], family[3]]
    bare = [{"length": np.full(N, 5.0)}, {"true": np.full(N, math.nan)}]
    found = [row["true"] for row in table([*few, *bare])]
    [*_, alone] = table(few)
    assert found[2]["p_adjusted"] == alone["true"]["p_adjusted"]
    for cell in found[3:]:
        assert cell["p_adjusted"] is None
        assert cell["n"] == cell["compared"] == 0
        assert math.isnan(cell["mean"])


def test_each_metric_is_a_family_of_its_own(family):
    both = [row | {"info": row["true"][::-1].copy()} for row in family]
    found = table(both, names=("true", "info"))
    alone = table(family)
    assert [row["true"] for row in found] == [row["true"] for row in alone]


def test_families_are_corrected_each_for_itself(family):
    """Whoever is in none keeps p alone; a row's p depends on nobody outside its family."""
    together = [row["true"]["p_adjusted"] for row in table(family, families=[[2, 3], [4, 5, 6], []])]
    assert [place for place, p in enumerate(together) if p is not None] == [2, 3, 4, 5, 6]
    for own in ([2, 3], [4, 5, 6]):
        alone = [row["true"]["p_adjusted"] for row in table(family, families=[own])]
        assert [alone[place] for place in own] == [together[place] for place in own]
        assert sum(p is not None for p in alone) == len(own)
    large = table(family)
    assert together[3] < large[3]["true"]["p_adjusted"], "two cost less than twelve"
    assert [row["true"]["p_adjusted"] for row in table(family, families=[])] == [None] * len(family)


def test_categories_widen_intervals_where_they_are_the_real_clusters():
    """Questions of a category rise and fall together, whatever near-duplicates do."""
    random = np.random.default_rng(5)
    level, effect = np.repeat(random.normal(0, 1, N // 10), 10), np.repeat(random.normal(0.3, 0.8, N // 10), 10)
    base = level + random.normal(0, 0.3, N)
    steered = base + effect + random.normal(0, 0.3, N)
    cell = table([{"score": base}, {"score": steered}], names=("score",))[1]["score"]
    assert cell["category_high"] - cell["category_low"] > 1.8 * (cell["high"] - cell["low"])
    wide = cell["difference_category_high"] - cell["difference_category_low"]
    assert wide > 1.8 * (cell["difference_high"] - cell["difference_low"])
    by_category = interval(steered, ALONE.categories, binary=False)
    assert (cell["category_low"], cell["category_high"]) == (by_category.low, by_category.high)
    paired = compare(steered, base, ALONE.categories, ALONE.seed)
    assert (cell["difference_category_low"], cell["difference_category_high"]) == (paired.low, paired.high)
    assert (cell["p"], cell["difference"]) == (compare(steered, base, ALONE.clusters, 3).p, paired.difference)


def test_categories_that_are_the_groups_change_nothing():
    same = Design(ALONE.categories, ALONE.categories, seed=1)
    cell = table([{"true": coin(0.3, 1)}, {"true": coin(0.6, 2)}], design=same)[1]["true"]
    for part in ("low", "high"):
        assert cell[part] == cell[f"category_{part}"]
        assert cell[f"difference_{part}"] == cell[f"difference_category_{part}"]


@pytest.mark.parametrize(("undecided", "withheld"), [(0, False), (1, False), (6, False), (7, True), (N, True)])
def test_undecided_answers_bound_the_mean_and_too_many_withhold_it(undecided, withheld):
    """6 of 120 are five percent, 7 are more. The truth lies between all of them false and all of them true."""
    assert (WARNED_ABOVE, WITHHELD_ABOVE) == (0.01, 0.05)
    values = coin(0.5, 4)
    values[:undecided] = math.nan
    rows = [{"true": coin(0.5, 1)}, {"true": values}]
    cell = table(rows, judged=[{"true": N}, {"true": N}])[1]["true"]
    total = float(np.nansum(values))
    assert (cell["n"], cell["compared"], cell["undecided"]) == (N - undecided, N - undecided, undecided)
    assert cell["asked"] == N
    assert cell["floor"] == pytest.approx(total / N)
    assert cell["ceiling"] == pytest.approx((total + undecided) / N)
    assert cell["withheld"] is withheld
    if 0 < undecided < N:
        assert cell["floor"] < cell["mean"] < cell["ceiling"]


def test_only_judged_answers_can_be_undecided_and_only_shares_have_bounds():
    values = coin(0.5, 4)
    values[:40] = math.nan
    rows = [{"mc1": values, "true": values, "sem_diff": np.where(np.isnan(values), math.nan, values - 0.3)}] * 2
    judged = [{"true": 80, "sem_diff": N}] * 2
    mc1, true, score = (table(rows, names=tuple(rows[0]), judged=judged)[1][name] for name in rows[0])
    for cell in (mc1, true):
        assert (cell["undecided"], cell["withheld"]) == (0, False), (
            "40 have no answer, or were never given to the judge"
        )
    assert (mc1["asked"], true["asked"], score["asked"]) == (0, 80, N)
    assert (mc1["floor"], true["floor"]) == (None, true["mean"])
    assert (score["undecided"], score["withheld"], score["floor"], score["ceiling"]) == (40, True, None, None)


@pytest.mark.parametrize(("undecided", "withheld"), [(0, False), (6, False), (7, True), (N, True)])
@pytest.mark.parametrize("prefix", ["", "other_"])
def test_a_mean_that_counts_the_undecided_as_wrong_is_withheld_with_the_one_that_leaves_them_out(
    prefix, undecided, withheld
):
    """A JSON judge nobody can read scores `match` 0 everywhere; only `match_decided` knows of it."""
    names = [f"{prefix}{name}" for name in ("match", "match_lenient", "match_decided")]
    decided = coin(0.5, 4)
    decided[:undecided] = math.nan
    scores = dict(zip(names, (np.nan_to_num(decided, nan=0.0), np.nan_to_num(decided, nan=1.0), decided), strict=True))
    found = table([scores] * 2, names=names, judged=[dict.fromkeys(names, N)] * 2)[1]
    for name in names:
        assert (found[name]["asked"], found[name]["undecided"], found[name]["withheld"]) == (N, undecided, withheld)
    assert [found[name]["n"] for name in names] == [N, N, N - undecided]
    strict, lenient, _ = (found[name]["mean"] for name in names)
    assert lenient - strict == pytest.approx(undecided / N)


@pytest.mark.parametrize(
    ("metric", "decided"),
    [
        ("match", "match_decided"),
        ("match_lenient", "match_decided"),
        ("match_decided", "match_decided"),
        ("j_match", "j_match_decided"),
        ("true", "true_decided"),
    ],
)
def test_who_says_whether_a_value_was_decided(metric, decided):
    assert decided_of(metric) == decided


def test_the_ends_of_a_share_are_where_shares_end():
    """A t interval knows no bounds; a score on a judge's own scale has none."""
    near_one = np.array([0.2, 1, 1, 1, 1, 1, 1, 1])
    rows = [{"mc2": near_one, "score": near_one * 3}] * 2
    design = Design(np.arange(8), np.arange(8), 0)
    [_, found] = table(rows, names=("mc2", "score"), design=design)
    assert found["mc2"]["high"] == found["mc2"]["category_high"] == 1.0
    assert found["score"]["high"] == pytest.approx(interval(near_one * 3, design.clusters, False).high)
    assert found["score"]["high"] > 3


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("true", [0, 1, math.nan], "fraction"),
        ("sem_acc", [1, 1], "fraction"),
        ("sem_diff", [0.5, -0.1], "score"),
        ("bleu_max", [17.0, 30.0], "score"),
        ("length", [0, 1], "words"),
        *((name, [0.5, 0.2], "fraction") for name in ("mc2", "mc3", "mc2_token", "mc2_char", "mc0_ab", "says_a")),
        ("repetition", [0.5, 0.2], "fraction"),
    ],
)
def test_a_metric_has_a_unit_by_its_name_or_by_its_values(name, values, expected):
    scores = [{name: np.array(values, float)}, {}]
    assert unit(name, scores) == expected
    assert binary(name, scores) == (name in ("true", "sem_acc"))


def test_one_row_that_is_no_yes_or_no_makes_the_metric_none():
    scores = [{"acc": np.array([0.0, 1.0])}, {"acc": np.array([0.0, 0.5])}]
    assert not binary("acc", scores)
    assert unit("acc", scores) == "score"
