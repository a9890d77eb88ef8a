"""What the tune splits of all folds showed, as one map, and what each fold chose."""

from __future__ import annotations

import numpy as np
import pytest
from made_results import COEFFICIENTS, make_bank

from truthsteer.tuning import selection


def test_a_cell_is_the_mean_over_folds_and_its_p_the_largest():
    banks = [make_bank(0, ("a",)), make_bank(1, ("a",))]
    method = banks[1]["methods"]["a"]
    method["grid"] = [cell | {"mc1": cell["mc1"] + 0.1, "p_adjusted": 0.01} for cell in method["grid"]]
    method["baseline"] = {"mc1": 0.35, "margin": -0.2}
    [found] = selection(banks).values()
    assert (found["layers"], found["coefficients"]) == ([0, 1, 2, 3, 4], sorted(COEFFICIENTS))
    first = {(cell["layer"], cell["coefficient"]): cell["mc1"] for cell in banks[0]["methods"]["a"]["grid"]}
    expected = [[first[layer, value] + 0.05 for value in found["coefficients"]] for layer in found["layers"]]
    np.testing.assert_allclose(found["mc1"], expected)
    assert found["p_adjusted"][3][found["coefficients"].index(0.7)] == 0.01
    assert found["p_adjusted"][0][0] == 0.4
    assert found["baseline"] == pytest.approx(0.34)


def test_cells_that_a_fold_lacks_or_could_not_measure():
    banks = [make_bank(0, ("a",)), make_bank(1, ("a",))]
    for bank in banks:
        bank["methods"]["a"]["grid"] = [dict(cell) for cell in bank["methods"]["a"]["grid"]]
    one, two = (bank["methods"]["a"]["grid"] for bank in banks)
    one[0]["mc1"] = None
    only = two[0]["mc1"]
    del one[1], two[1]
    [found] = selection(banks).values()
    assert found["mc1"][0][0] == only, "the fold that has it"
    assert (found["mc1"][0][1], found["p_adjusted"][0][1]) == (None, None)


def test_random_directions_span_from_the_lowest_to_the_highest():
    bank = make_bank(0, ("a",))
    draws = [0.31, 0.9, 0.05, *[0.3] * 97]
    bank["methods"]["a"]["envelope"] = [{"coefficient": 0.5, "mc1": draws}]
    assert selection([bank])["a"]["envelope"] == [{"coefficient": 0.5, "low": 0.05, "high": 0.9, "draws": 100}]
    bare = make_bank(1, ("a",))
    bare["methods"]["a"]["envelope"] = []
    assert selection([bank, bare])["a"]["envelope"][0]["high"] == 0.9, "later folds have none of their own"
    assert selection([bare])["a"]["envelope"] == []


def test_each_fold_says_what_it_chose_and_how_that_scored():
    banks = [make_bank(0, ("a", "b")), make_bank(1, ("b",))]
    found = selection(banks)
    assert [item["fold"] for item in found["a"]["chosen"]] == [0]
    assert [item["fold"] for item in found["b"]["chosen"]] == [0, 1]
    for item, layer in zip(found["b"]["chosen"], (3, 4), strict=True):
        [cell] = [c for c in banks[0]["methods"]["b"]["grid"] if (c["layer"], c["coefficient"]) == (layer, 0.7)]
        assert item == {
            "fold": layer - 3,
            "layer": layer,
            "coefficient": 0.7,
            "n": 40,
            "baseline_mc1": 0.33,
            "mc1": cell["mc1"],
            "baseline_margin": -0.4,
            "margin": cell["margin"],
        }
    assert {(item["fold"], item["style"]) for item in found["b"]["style"]} == {
        (fold, name) for fold in (0, 1) for name in ("negation", "hedging")
    }
    assert selection([]) == {}
