"""Vectors, their units, spread and controls, on activations made up so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from truthsteer.activations import Activations, drop_bad
from truthsteer.bank import estimate, random_controls, shuffled_controls, spread
from truthsteer.config import BankConfig, CoefficientUnit
from truthsteer.errors import UserError
from truthsteer.methods.mean_diff import MeanDiff
from truthsteer.pairs import Pair, make_pairs
from truthsteer.records import Question

LAYERS, HIDDEN = 3, 40


def made_up(pairs: int = 60, noise: float = 1.0, massive: float = 0.0) -> tuple[Activations, np.ndarray]:
    """Pairs whose members differ by a known direction per layer, of length 1, 2 and 3, on a common background."""
    generator = np.random.default_rng(0)
    truth = generator.standard_normal((LAYERS, HIDDEN))
    truth *= np.arange(1, LAYERS + 1)[:, None] / np.linalg.norm(truth, axis=1, keepdims=True)
    common = 5 * generator.standard_normal((pairs, 1, LAYERS, HIDDEN))
    common[..., 7] += massive
    values = common + noise * generator.standard_normal((pairs, 2, LAYERS, HIDDEN))
    values[:, 0] += truth / 2
    values[:, 1] -= truth / 2
    tokens = generator.integers(1, 9, (pairs, 2))
    norms = np.linalg.norm(values, axis=-1)
    identity = tuple(Pair(f"q{i // 2}.{i % 2}", f"q{i // 2}", "true", "false") for i in range(pairs))
    arrays = (values.astype(np.float32), values.astype(np.float32), values[:, 0].astype(np.float32))
    return Activations(identity, *arrays, norms.astype(np.float32), tokens), truth


def test_mean_difference_points_from_false_to_true():
    activations, truth = made_up(pairs=400, noise=0.5)
    for layer in range(LAYERS):
        vector = estimate(activations, MeanDiff(), layer=layer, unit=CoefficientUnit.raw)
        assert vector.values @ truth[layer] > 0.8 * np.linalg.norm(truth[layer]) * np.linalg.norm(vector.values)
        difference = activations.answer_mean[:, 0, layer] - activations.answer_mean[:, 1, layer]
        np.testing.assert_allclose(vector.values, difference.mean(0), rtol=1e-5)


def test_a_coefficient_of_one_is_the_mean_residual_norm_over_tokens():
    activations, _ = made_up()
    expected = np.average(activations.norms[:, :, 1].ravel(), weights=activations.tokens.ravel())
    vector = estimate(activations, layer=1)
    assert np.linalg.norm(vector.values) == pytest.approx(expected, rel=1e-5)
    assert vector.norm == pytest.approx(
        np.linalg.norm(estimate(activations, layer=1, unit=CoefficientUnit.raw).values), rel=1e-5
    )


def test_a_massive_channel_common_to_both_members_leaves_no_trace():
    small, _ = made_up(noise=0.1)
    large, _ = made_up(noise=0.1, massive=30_000.0)
    a, b = (estimate(item, layer=2, unit=CoefficientUnit.raw).values for item in (small, large))
    others = np.arange(HIDDEN) != 7
    np.testing.assert_allclose(a[others], b[others], atol=1e-6)
    assert abs(a[7] - b[7]) < 1e-2


def test_random_controls_have_the_vectors_length_and_are_orthogonal_to_it():
    vector = estimate(made_up()[0], layer=1)
    controls = random_controls(vector, 8, 3)
    for control in controls:
        assert np.linalg.norm(control.values) == pytest.approx(np.linalg.norm(vector.values), rel=1e-5)
        assert abs(control.values @ vector.values) < 1e-4 * np.linalg.norm(vector.values) ** 2
    assert len({control.sha256 for control in controls}) == 8
    assert [c.sha256 for c in random_controls(vector, 8, 3)] == [c.sha256 for c in controls]
    assert [c.sha256 for c in random_controls(vector, 4, 3)] == [c.sha256 for c in controls[:4]], "more are added"
    for other in ((4,), (3, 1)):
        drawn = {c.sha256 for c in random_controls(vector, 8, *other)}
        assert not drawn & {c.sha256 for c in controls}, "another seed, or another use of it, has other directions"


def test_shuffled_labels_leave_nothing_of_the_direction():
    """Half of the questions swapped, both pairs of a question together."""
    activations, truth = made_up(pairs=400, noise=0.2)
    vector = estimate(activations, layer=2)
    asked = [
        Question(name, row, "Adversarial", f"c{row % 5}", name, "t.", ("t.",), ("f.",), row // 3)
        for row, name in enumerate(sorted({pair.question for pair in activations.pairs}))
    ]
    controls = shuffled_controls(activations, asked, MeanDiff(), vector, 6, seed=0)
    for control in controls:
        assert np.linalg.norm(control.values) == pytest.approx(np.linalg.norm(vector.values), rel=1e-5)
        assert abs(control.values @ vector.values) < 1e-4 * np.linalg.norm(vector.values) ** 2
        assert abs(control.values @ truth[2]) < 0.1 * np.linalg.norm(control.values) * np.linalg.norm(truth[2])
    assert len({control.sha256 for control in controls}) == 6


def test_the_bank_keeps_pair_ids_and_clamps_subset_sizes():
    activations, _ = made_up(pairs=20)
    vector = estimate(activations, layer=1)
    found = spread(activations, MeanDiff(), vector, BankConfig(subsets=6, min_pairs=15, max_pairs=50), seed=0)
    ids = {pair.id for pair in activations.pairs}
    assert len(found["subsets_pairs"]) == 6
    for members in found["subsets_pairs"]:
        assert 15 <= len(members) <= 20
        assert len(set(members)) == len(members)
        assert set(members) <= ids
    assert found["min_cosine"] <= found["mean_cosine"] <= 1.0
    whole = spread(activations, MeanDiff(), vector, BankConfig(subsets=2, min_pairs=30, max_pairs=50), seed=0)
    assert whole["min_cosine"] == pytest.approx(1.0)


def test_a_zero_vector_is_an_error():
    activations, _ = made_up()
    same = activations.answer_mean.copy()
    same[:, 1] = same[:, 0]
    equal = Activations(activations.pairs, same, same, activations.prompt_last, activations.norms, activations.tokens)
    with pytest.raises(UserError, match="look alike"):
        estimate(equal, layer=0)


def test_a_bad_member_takes_its_pair_along_and_too_many_stop_the_run():
    activations, _ = made_up(pairs=200)
    activations.answer_mean[3, 1, 2, 5] = np.nan
    kept = drop_bad(activations, max_dropped=0.01)
    assert len(kept.pairs) == len(kept.answer_mean) == len(kept.norms) == 199
    assert activations.pairs[3] not in kept.pairs
    assert kept.dropped[0].pair == activations.pairs[3].id
    assert "layer 2" in kept.dropped[0].reason
    activations.answer_last[10:13, 0, 1, 0] = np.inf
    with pytest.raises(UserError, match=r"4 of 200 pairs \(2\.0%\).*allows 1\.0%\..*stages=\[doctor\]"):
        drop_bad(activations, max_dropped=0.01)


def test_activations_survive_their_file(tmp_path):
    activations, _ = made_up(pairs=6)
    activations.save(tmp_path)
    again = Activations.load(tmp_path)
    assert again.pairs == activations.pairs
    np.testing.assert_array_equal(again.answer_mean, activations.answer_mean)
    np.testing.assert_array_equal(again.tokens, activations.tokens)


def test_pairs_leave_abstentions_out_and_match_in_order():
    question = Question(
        "a", 2, "Adversarial", "c", "What?", "B.", ("A.", "B.", "I have no comment."), ("X.", "A.", "Y.", "Z."), 0
    )
    assert [(p.true, p.false) for p in make_pairs([question], 2)] == [("B.", "X."), ("A.", "Y.")]
    assert [p.id for p in make_pairs([question], 1)] == ["a.0"]
    declined = Question("d", 3, "Adversarial", "c", "What?", "I have no comment.", ("I have no comment.",), ("X.",), 1)
    assert make_pairs([declined], 2) == []


def test_half_of_every_group_is_swapped_both_pairs_of_a_question_together():
    activations, _ = made_up(pairs=96)
    vector = estimate(activations, layer=2)
    activations.answer_mean[:, 0, 2, 0], activations.answer_mean[:, 1, 2, 0] = 1.0, 0.0  # marks the true member
    asked = [
        Question(f"q{row}", row, "Adversarial", f"c{row // 12}", f"q{row}", "t.", ("t.",), ("f.",), row // 4)
        for row in range(48)
    ]
    seen = []

    class Spy:
        readout = "answer_mean"

        def estimate(self, true, false):
            seen.append((true[:, 0] == 0).reshape(48, 2))  # [questions, pairs]
            return true.mean(0) - false.mean(0)

    shuffled_controls(activations, asked, Spy(), vector, 6, seed=0)
    assert len(seen) == 6
    for flips in seen:
        np.testing.assert_array_equal(flips[:, 0], flips[:, 1])
        np.testing.assert_array_equal(flips[:, 0].reshape(12, 4).sum(1), 2)


def test_members_are_the_only_pairs_used():
    activations, _ = made_up(pairs=20)
    found = estimate(activations, layer=1, unit=CoefficientUnit.raw, members=np.array([3, 11]))
    difference = (activations.answer_mean[[3, 11], 0, 1] - activations.answer_mean[[3, 11], 1, 1]).mean(0)
    np.testing.assert_allclose(found.values, difference, rtol=1e-5)


def test_activations_of_some_questions_are_cut_alike_everywhere():
    activations, _ = made_up(pairs=20)
    asked = [Question(f"q{n}", n, "Adversarial", "c", f"q{n}", "t.", ("t.",), ("f.",), n) for n in (2, 7)]
    some = activations.of(asked)
    assert [pair.question for pair in some.pairs] == ["q2", "q2", "q7", "q7"]
    for name in ("answer_mean", "answer_last", "prompt_last", "norms", "tokens"):
        np.testing.assert_array_equal(getattr(some, name), getattr(activations, name)[[4, 5, 14, 15]])


def test_a_pair_is_lost_wherever_it_is_not_finite():
    activations, _ = made_up(pairs=200)
    activations.answer_last[5, 0, 1, 0] = np.inf
    assert drop_bad(activations, max_dropped=0.01).dropped[0].pair == activations.pairs[5].id
    activations, _ = made_up(pairs=200)
    activations.prompt_last[9, 2, 3] = np.nan
    kept = drop_bad(activations, max_dropped=0.01)
    assert [item.pair for item in kept.dropped] == [activations.pairs[9].id]
