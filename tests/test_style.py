"""Style directions on made-up activations in which truth, negation and length are known and confounded."""

from __future__ import annotations

import numpy as np
import pytest

from truthsteer.activations import Activations
from truthsteer.bank import SteeringVector, estimate
from truthsteer.errors import UserError
from truthsteer.pairs import Pair
from truthsteer.style import MIN, StyleDirection, as_control, project_out, style_directions
from truthsteer.wording import has_negation, words

LAYERS, HIDDEN, LAYER = 2, 48, 1
TRUTH, NEGATION, LENGTH, HEDGING = np.linalg.qr(np.random.default_rng(7).standard_normal((HIDDEN, 4)))[0].T


def answer(generator: np.random.Generator, negation: float, hedging: float, longest: int) -> str:
    """Words drawn so that negating or hedging adds none."""
    verb = "not" if generator.random() < negation else "so"
    hedge = "perhaps" if generator.random() < hedging else "indeed"
    return " ".join(["It", "is", verb, hedge, *["red"] * generator.integers(1, longest)]) + "."


def activations_of(pairs: list[tuple[str, str]], noise: float = 0.3) -> Activations:
    """Truth 3 along TRUTH, negation 4 along NEGATION, length .5 a word along LENGTH, hedging 4 along HEDGING."""
    generator = np.random.default_rng(1)
    shape = (len(pairs), 2, LAYERS, HIDDEN)
    values = noise * generator.standard_normal(shape) + 5 * generator.standard_normal(HIDDEN)
    for place, texts in enumerate(pairs):
        for truth, text in enumerate(texts):
            values[place, truth, LAYER] += (
                (1.5 if truth == 0 else -1.5) * TRUTH
                + 4 * has_negation(text) * NEGATION
                + 0.5 * len(words(text)) * LENGTH
                + 4 * ("perhaps" in text) * HEDGING
            )
    identity = tuple(Pair(f"q{i}.0", f"q{i}", *texts) for i, texts in enumerate(pairs))
    norms = np.linalg.norm(values, axis=-1).astype(np.float32)
    mean = values.astype(np.float32)
    last = np.ones_like(mean)
    return Activations(identity, mean, last, mean[:, 0], norms, np.ones((len(pairs), 2), np.int64))


def confounded(count: int = 400) -> list[tuple[str, str]]:
    """True answers negate in 60 % and run long; false ones negate in 8 % and are short."""
    generator = np.random.default_rng(0)
    return [(answer(generator, 0.6, 0.2, 14), answer(generator, 0.08, 0.1, 7)) for _ in range(count)]


@pytest.fixture(scope="module")
def activations() -> Activations:
    return activations_of(confounded())


@pytest.fixture(scope="module")
def styles(activations) -> dict[str, StyleDirection]:
    return style_directions(activations, LAYER, "answer_mean")


def cosine(a, b) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_every_style_is_recovered_and_none_of_them_is_truth(styles):
    assert list(styles) == ["negation", "length", "hedging"]
    for name, planted in (("negation", NEGATION), ("length", LENGTH), ("hedging", HEDGING)):
        found = styles[name].values
        assert found.dtype == np.float64
        assert cosine(found, planted) > 0.95, name
        assert abs(cosine(found, TRUTH)) < 0.1, name
    assert np.linalg.norm(styles["negation"].values) == pytest.approx(4, rel=0.1)


def test_comparing_all_answers_at_once_would_have_mixed_truth_in(activations):
    """What averaging over truth labels is for: the made-up data are confounded enough to tell."""
    values = activations.answer_mean[:, :, LAYER].reshape(-1, HIDDEN).astype(np.float64)
    flags = np.array([has_negation(text) for pair in activations.pairs for text in (pair.true, pair.false)])
    naive = values[flags].mean(0) - values[~flags].mean(0)
    assert cosine(naive, TRUTH) > 0.3


def test_projecting_the_styles_out_leaves_truth(activations, styles):
    vector = estimate(activations, layer=LAYER)
    assert cosine(vector.values, TRUTH) < 0.8
    left = project_out(vector, styles.values())
    assert cosine(left.values, TRUTH) > 0.97
    for style in styles.values():
        assert abs(cosine(left.values, style.values)) < 1e-5
    assert np.linalg.norm(left.values) == pytest.approx(np.linalg.norm(vector.values), rel=1e-5)
    assert left.values.dtype == np.float32
    assert left.layer == LAYER
    assert left.norm == pytest.approx(vector.norm * cosine(left.values, vector.values), rel=1e-4)


def test_oblique_repeated_and_opposite_directions_span_what_they_span():
    vector = SteeringVector((2 * TRUTH + NEGATION + LENGTH + HEDGING).astype(np.float32), 0, 1.0)
    oblique = [NEGATION, 1e-3 * (NEGATION + 0.2 * LENGTH), -50 * NEGATION, NEGATION + 1e-9 * HEDGING]
    left = project_out(vector, [StyleDirection(item, 9, 9) for item in oblique])
    np.testing.assert_allclose(left.values, (2 * TRUTH + HEDGING) * np.sqrt(7 / 5), atol=1e-5)


def test_directions_that_could_not_be_estimated_remove_nothing():
    vector = SteeringVector(TRUTH.astype(np.float32), 0, 1.0)
    missing = StyleDirection(None, 0, 9, "none")
    for directions in ([], [missing], [missing, StyleDirection(NEGATION, 9, 9)]):
        np.testing.assert_allclose(project_out(vector, directions).values, vector.values, atol=1e-6)


def test_of_a_vector_that_is_all_style_nothing_is_left():
    vector = SteeringVector((NEGATION - 2 * LENGTH).astype(np.float32), 3, 1.0)
    styles = [StyleDirection(NEGATION, 9, 9), StyleDirection(NEGATION + LENGTH, 9, 9)]
    assert project_out(vector, styles) is None


def test_a_control_has_the_vectors_length_and_the_styles_direction(activations, styles):
    vector = estimate(activations, layer=LAYER)
    control = as_control(styles["length"], vector)
    assert np.linalg.norm(control.values) == pytest.approx(np.linalg.norm(vector.values), rel=1e-5)
    assert cosine(control.values, styles["length"].values) > 1 - 1e-6
    assert (control.layer, control.values.dtype) == (LAYER, np.float32)
    assert control.norm == pytest.approx(np.linalg.norm(styles["length"].values))
    with pytest.raises(UserError, match="no direction: none has it"):
        as_control(StyleDirection(None, 0, 9, "none has it"), vector)


def pairs_with(true_negated: int, false_negated: int, count: int = 30) -> list[tuple[str, str]]:
    return [
        ("It is not red." if i < true_negated else "It is so red.", "He is not." if i < false_negated else "He is so.")
        for i in range(count)
    ]


def test_a_style_too_rare_is_reported_with_its_counts():
    styles = style_directions(activations_of(pairs_with(MIN - 1, 1)), LAYER, "answer_mean")
    negation = styles["negation"]
    assert negation.values is None
    assert (negation.with_, negation.without) == (MIN, 60 - MIN)
    assert negation.reason.startswith("4 true and 1 false answers have it, 26 and 29 have not")
    assert styles["length"].reason.startswith("0 true and 0 false answers have it, 0 and 0 have not")
    assert styles["hedging"].values is None


@pytest.mark.parametrize(("true", "false"), [(MIN, 0), (0, MIN), (MIN, 30 - MIN), (30, MIN)])
def test_one_truth_label_with_enough_of_either_sort_is_enough(true, false):
    negation = style_directions(activations_of(pairs_with(true, false)), LAYER, "answer_mean")["negation"]
    assert negation.reason == ""
    assert (negation.with_, negation.without) == (true + false, 60 - true - false)
    assert cosine(negation.values, NEGATION) > 0.95
    assert abs(cosine(negation.values, TRUTH)) < 0.15


def test_a_style_that_nearly_all_answers_have_is_too_rare_in_its_absence():
    negation = style_directions(activations_of(pairs_with(26, 30)), LAYER, "answer_mean")["negation"]
    assert negation.values is None


def test_a_label_with_too_few_is_left_out_of_the_mean():
    """Four false answers that negate, with wild activations, must not enter."""
    made = activations_of(pairs_with(15, MIN - 1))
    made.answer_mean[: MIN - 1, 1, LAYER] += 1000
    negation = style_directions(made, LAYER, "answer_mean")["negation"]
    assert cosine(negation.values, NEGATION) > 0.95


def test_both_truth_labels_count_alike_however_many_answers_they_have():
    """Negation looks different among true answers, of which 60 of 120 negate, and among false ones, of which 6 do."""
    made = activations_of(pairs_with(60, 6, count=120), noise=0.1)
    made.answer_mean[:60, 0, LAYER] += 4 * HEDGING
    made.answer_mean[:6, 1, LAYER] += 4 * LENGTH
    negation = style_directions(made, LAYER, "answer_mean")["negation"].values
    assert negation @ HEDGING == pytest.approx(2, abs=0.2)
    assert negation @ LENGTH == pytest.approx(2, abs=0.2)
    assert negation @ NEGATION == pytest.approx(4, abs=0.2)


def test_answers_as_long_as_the_median_are_neither_long_nor_short():
    texts = ["Red."] * 60 + ["Red red."] * 150 + ["Red red red."] * 70
    styles = style_directions(activations_of([(text, text) for text in texts]), LAYER, "answer_mean")
    assert (styles["length"].with_, styles["length"].without) == (140, 120)
    assert cosine(styles["length"].values, LENGTH) > 0.9


def test_layer_and_readout_are_those_asked_for(activations):
    flat = style_directions(activations, 0, "answer_mean")["negation"]
    assert abs(cosine(flat.values, NEGATION)) < 0.6
    still = style_directions(activations, LAYER, "answer_last")["negation"]
    assert still.values is None
    assert "same activations" in still.reason
    with pytest.raises(UserError, match=r"layer=2 was not read\. Type 0 to 1"):
        style_directions(activations, 2, "answer_mean")
    with pytest.raises(UserError, match="readout=first"):
        style_directions(activations, 0, "first")


def test_no_pairs_give_no_directions(activations):
    styles = style_directions(activations.of([]), LAYER, "answer_mean")
    assert all(style.values is None and (style.with_, style.without) == (0, 0) for style in styles.values())
