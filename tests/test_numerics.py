"""What follows from measured numbers: headroom, verdicts, what to type. No model is involved."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from truthsteer import numerics, numerics_text
from truthsteer.numerics import FP16_MAX, bits, complete, context, token_sum
from truthsteer.numerics_text import lines, rates_table


def measured(
    policy: str = "bf16",
    residual: float | None = 100.0,
    norm: float | None = 50.0,
    matmul: float | None = 20.0,
    weights: float | None = 2.0,
    scores: float | None = None,
    bad: float = 0.0,
    **changes: Any,
) -> dict[str, Any]:
    """What `doctor.examine` measures, of a model of two layers."""
    kinds = {
        "fp16_pure": ("fp16", "same"),
        "fp16": ("fp16", "fp32"),
        "bf16": ("bf16", "same"),
        "fp32": ("fp32", "same"),
    }
    largest = {"residual": residual, "norm": norm, "matmul": matmul, "scores": scores, "weights": weights}
    spot = {
        "layer": 1, "point": "resid_out", "where": "the residual add after the MLP of layer 1", "text": "What? It.",
        "position": 0, "token": "<bos>", "largest": None if bad else residual, "cause": "",
    }  # fmt: skip
    over = residual is not None and residual > FP16_MAX
    stream = {"largest": residual, "token": "<bos>", "position": 0, "channel": 3}
    stream |= {"bits_fp16": bits(residual), "bits_bf16": bits(residual, numerics.BF16_MAX)}
    return {
        "model": "m", "device": "cpu", "bf16_native": True, "thorough": True,
        "policy": {
            "name": policy, "weights": kinds[policy][0], "residual": kinds[policy][1], "attention": "sdpa",
            "matmul": "highest", "quantize": "none",
        },
        "given": 20, "texts": 8, "tokens": 100, "longest": 40, "max_length": 64, "too_long": 0,
        "when_too_long": "error", "equal_pairs": 0,
        "passes": [
            {
                "name": name, "coefficient": 0.8 if name == "steered" else None,
                "finite_coefficient": None, "layer": 1 if name == "steered" else None,
                "bad_texts": bad, "bad_real": bad / 2, "bad_pad": 0.0, "largest": residual, "first": spot if bad else None,
            }
            for name in ("right", "left", "steered")
        ],
        "layers": [
            {
                "layer": layer, "device": "cpu", "residual": stream,
                "norm": {"largest": norm, "bits_fp16": bits(norm)},
                "matmul": {"largest": matmul, "point": "mlp_act", "bits_fp16": bits(matmul)},
            }
            for layer in (0, 1)
        ],
        "largest": largest, "headroom": {part: bits(value) for part, value in largest.items()},
        "predicted": spot if over else None,
        "missing_points": [], "checks": [], "reference": None, "token_sum": token_sum(10.0), "context": "",
    } | changes  # fmt: skip


def safe(report: dict[str, Any]) -> dict[str, bool | None]:
    return {item["name"]: item["safe"] for item in report["policies"]}


def check(name: str, passed: bool | None) -> dict[str, Any]:
    return {"name": name, "passed": passed, "value": 1.0, "bound": 0.0, "meaning": "It holds."}


def test_headroom_is_in_bits():
    assert bits(FP16_MAX) == 0
    assert bits(FP16_MAX / 4) == 2
    assert bits(FP16_MAX * 8) == -3
    assert bits(0.0) is bits(None) is bits(math.inf) is bits(math.nan) is None


def test_what_breaks_fp16_decides_which_fp16_works():
    """The residual stream and the norms after sublayers are in fp32 under dtype=fp16; products and weights are not."""
    works = {"fp16_pure": True, "fp16": True, "bf16": True, "fp32": True}
    assert safe(complete(measured())) == works
    assert safe(complete(measured(residual=1e6))) == works | {"fp16_pure": False}
    assert safe(complete(measured(norm=1e6))) == works | {"fp16_pure": False}
    neither = works | {"fp16_pure": False, "fp16": False}
    assert safe(complete(measured(matmul=1e5))) == neither
    assert safe(complete(measured(weights=1e5))) == neither
    assert safe(complete(measured(residual=40_000.0))) == works | {"fp16_pure": False}, "less than a bit is too little"
    assert safe(complete(measured(weights=60_000.0))) == works, "weights do not depend on the text"


def test_why_names_the_place():
    report = complete(measured(residual=1e6))
    assert report["policies"][0]["why"] == "passes 65504 first at the residual add after the MLP of layer 1"
    assert "matrix products: 1e+05 at most" in complete(measured(matmul=1e5))["policies"][1]["why"]
    assert "a weight passes 65504: 1e+05" in complete(measured(weights=1e5))["policies"][1]["why"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fp16_pure", [False, None, None, None]),
        ("fp16", [False, False, None, None]),
        ("bf16", [False, False, False, None]),
        ("fp32", [False, False, False, False]),
    ],
)
def test_a_run_that_is_not_finite_tells_only_of_formats_with_no_more_range(policy, expected):
    report = complete(measured(policy, bad=0.5))
    assert list(safe(report).values()) == expected
    assert report["outcome"] == "not finite"
    assert "residual add after the MLP of layer 1 (token 0 '<bos>' of 'What? It.')" in report["verdict"]


@given(
    st.floats(1e-3, 1e18),
    st.floats(1e-3, 1e18),
    st.floats(1e-3, 1e18),
    st.floats(1e-3, 1e6),
    st.sampled_from(["bf16", "fp32"]),
)
def test_a_format_with_more_range_is_never_less_safe(residual, norm, matmul, weights, policy):
    report = complete(measured(policy, residual, norm, matmul, weights))
    values = list(safe(report).values())
    assert values == sorted(values)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for item in report["policies"]:
        if item["safe"] and item["name"] == "fp16_pure":
            assert max(residual, norm, matmul) <= FP16_MAX / 2


def test_what_was_not_measured_is_not_called_safe():
    report = complete(measured(missing_points=["mlp_act"]))
    assert safe(report) == {"fp16_pure": None, "fp16": None, "bf16": True, "fp32": True}
    assert safe(complete(measured(residual=1e6, missing_points=["mlp_act"])))["fp16_pure"] is False
    nothing = complete(measured(residual=None, norm=None, matmul=None))
    assert set(safe(nothing).values()) == {None}
    assert nothing["outcome"] == "unknown"
    assert safe(complete(measured(scores=5e4))) == {"fp16_pure": None, "fp16": None, "bf16": True, "fp32": True}


def test_a_short_check_promises_no_more_than_it_saw():
    assert complete(measured())["verdict"].startswith("dtype=bf16 is safe: ")
    assert complete(measured(thorough=False))["verdict"].startswith(
        "dtype=bf16 holds, as far as the short check goes: "
    )


def test_what_to_type():
    assert complete(measured())["overrides"] == []
    tight = complete(measured("fp16_pure", residual=40_000.0))
    assert tight["outcome"] == "no headroom"
    assert tight["overrides"] == ["dtype=bf16", "dtype=fp16", "dtype=fp32"]
    assert complete(measured("fp16_pure", residual=40_000.0, bf16_native=False))["overrides"][0] == "dtype=fp16"
    assert complete(measured("fp16", matmul=1e5))["overrides"] == ["dtype=bf16", "dtype=fp32"]
    assert complete(measured("fp32", bad=1.0))["overrides"] == []
    assert complete(measured("fp16_pure", bad=1.0))["overrides"] == ["dtype=bf16", "dtype=fp16", "dtype=fp32"]
    for name, typed in (("handover", "CUDA_VISIBLE_DEVICES=0"), ("padding_finite", "dtype.attention=eager")):
        report = complete(measured(checks=[check(name, False)]))
        assert report["outcome"] == "wrong"
        assert report["overrides"] == [typed]
        assert name in report["verdict"]
    assert complete(measured(checks=[check("gpu_copies", None)]))["outcome"] == "safe"


def test_what_mends_another_fault_is_no_alternative_to_the_dtype():
    cut = {"equal_pairs": 2, "longest": 90}
    longer = {"type": "steering.max_length=90", "why": "pairs equal once cut after 64 tokens: 2; it reads them whole"}
    alone = complete(measured(**cut))
    assert (alone["overrides"], alone["besides"]) == ([], [longer])
    assert lines(alone)[-1] == f"Type {longer['type']}: {longer['why']}."
    assert complete(measured(equal_pairs=2))["besides"] == [], "nothing was cut: no length makes them differ"

    eager = {"type": "dtype.attention=eager", "why": "padding_finite and padding_sides failed"}
    padding = [check("padding_finite", False), check("padding_sides", False)]
    both = complete(measured("fp16_pure", bad=1.0, checks=padding, **cut))
    assert both["overrides"] == ["dtype=bf16", "dtype=fp16", "dtype=fp32"]
    assert both["besides"] == [eager, longer]
    first, second, third = lines(both)[-3:]
    assert first == "Type dtype=bf16  or  dtype=fp16  or  dtype=fp32"
    assert second == f"Type also {eager['type']}: {eager['why']}."
    assert third.startswith("Type also steering.max_length=90: ")


def test_the_first_check_that_failed_is_mended_first_and_a_broken_copy_before_any_dtype():
    wrong = complete(measured(checks=[check("handover", False), check("gpu_copies", False), check("reference", False)]))
    assert wrong["overrides"] == ["CUDA_VISIBLE_DEVICES=0"]
    assert wrong["besides"] == [{"type": "dtype=fp32", "why": "reference failed"}]
    broken = complete(measured("fp16_pure", bad=1.0, checks=[check("gpu_copies", False)]))
    assert broken["overrides"] == ["CUDA_VISIBLE_DEVICES=0", "dtype=bf16", "dtype=fp16", "dtype=fp32"]
    assert broken["besides"] == []


def test_smaller_coefficients_are_advised_if_they_were_seen_to_hold():
    facts = measured("fp16_pure")
    facts["passes"][2] |= {"bad_texts": 1.0, "bad_real": 1.0, "first": measured(bad=1.0)["passes"][2]["first"]}
    assert not any("coefficients" in item for item in complete(facts)["overrides"])
    facts["passes"][2]["finite_coefficient"] = 0.2
    report = complete(facts)
    assert report["overrides"][-1] == "steering.coefficients=[0.2]"
    assert "under steering only" in report["verdict"]
    assert not any("coefficients" in item for item in complete(measured("fp16_pure", bad=1.0))["overrides"])


CONTEXTS = [
    ([[], []], [20, 30], "No token passes 65504, fp16's largest number: no need for a shorter steering.max_length."),
    ([[0, 4], [0]], [20, 30], "cannot help"),
    ([[0], []], [20, 30], "cannot help"),
    ([[12], [15]], [20, 30], "cannot help"),
    ([[], [15, 22]], [20, 30], "steering.max_length=15 would cut them, and the answers with them, in 2 of the texts"),
    (
        [[], [18], []],
        [18, 30, 9],
        "steering.max_length=18 would cut them, and the answers with them, in 1 of the texts",
    ),
    ([[], [7]], [20, 30], "cannot help"),
]


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(("offending", "lengths", "said"), CONTEXTS)
def test_when_a_shorter_context_helps(offending, lengths, said, finite):
    sentence = context(offending, lengths, "<x>", finite)
    assert said in sentence
    if any(offending):
        assert "The tokens that stay keep their numbers" in sentence or "the tokens that stay keep" in sentence
        assert ("passes 65504" in sentence) == finite
        assert f"{sum(map(bool, offending))} of {len(offending)} texts" in sentence


@given(st.lists(st.lists(st.integers(0, 60), max_size=4), min_size=2, max_size=6))
def test_the_length_advised_leaves_no_offending_token(offending):
    sentence = context(offending, [61] * len(offending), "<x>", True)
    if "would cut them" in sentence:
        length = int(sentence.split("steering.max_length=")[1].split()[0])
        assert length >= numerics.MIN_LENGTH
        assert all(token >= length for tokens in offending for token in tokens)
        assert any(not tokens for tokens in offending)


def test_sums_over_tokens():
    found = token_sum(170.6)
    assert found["from_tokens"] == 384
    assert 170.6 * 383 <= FP16_MAX < 170.6 * 384
    assert token_sum(0.0)["from_tokens"] is None
    one = complete(measured(token_sum=token_sum(1e6)))
    assert "Tools that sum tokens in fp16 may overflow from the first token on; truthsteer sums in float32." in lines(
        one
    )
    assert token_sum(math.inf) == {"mean_abs": None, "from_tokens": None}


def test_a_sweep_stands_side_by_side():
    reports = [
        complete(measured("fp16_pure", bad=0.25, max_length=512)),
        complete(measured("bf16", residual=1e5, max_length=384, too_long=3)),
        complete(measured("bf16", residual=1e5, max_length=64) | {"passes": measured()["passes"][:1]}),
    ]
    columns = rates_table(reports)
    assert tuple(columns) == numerics_text.RATES
    assert columns["dtype"] == ["bf16", "bf16", "fp16_pure"]
    assert columns["max_length"] == ["64", "384", "512"]
    assert columns["longer"] == ["0 of 20", "3 of 20", "0 of 20"]
    assert columns["NaN texts %"] == ["0.0", "0.0", "25.0"]
    assert columns["NaN tokens %"] == ["0.0", "0.0", "12.5"]
    assert columns["steered NaN %"] == ["–", "0.0", "25.0"]
    assert columns["verdict"] == ["safe", "safe", "not finite"]
    assert columns["headroom bits"][2] == "–"


@pytest.mark.parametrize("policy", ["fp16_pure", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_lines_can_be_read_whatever_was_found(policy, bad):
    empty = {"largest": None, "token": None, "position": None, "channel": None, "bits_fp16": None, "bits_bf16": None}
    layers = [
        {
            "layer": i, "device": "cuda:0", "residual": empty, "norm": None,
            "matmul": {"largest": 0.0, "point": None, "bits_fp16": None},
        }
        for i in range(62)
    ]  # fmt: skip
    reference = {"layers": [0.1], "layers_without_massive": [0.2], "largest": 0.1}
    facts = measured(policy, bad=bad, layers=layers, reference=reference, missing_points=["q"], context="Cut it.")
    said = lines(complete(facts))
    assert 15 <= len(said) <= 26
    for part in ("Cut it.", "off by 0.1 at most", "by 0.2", "Not measured", "right", "steered +0.8 at 1"):
        assert part in "\n".join(said)


def test_it_needs_no_torch():
    code = "import sys, truthsteer.numerics\nassert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
