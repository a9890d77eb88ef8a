"""The doctor's report on models that are broken on purpose, in every way that users have met."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, build, make_questions
from made_results import make_numerics
from test_numerics import measured
from test_probe import GEMMA, overflowing

from truthsteer import numerics, numerics_text, soundness
from truthsteer.config import CoefficientUnit, DtypeConfig, Quantize, Residual, TooLong, Weights
from truthsteer.doctor import choose, examine, texts_of
from truthsteer.errors import UserError
from truthsteer.model import LanguageModel
from truthsteer.pairs import make_pairs
from truthsteer.passes import Passes, Text, strongest
from truthsteer.precision import DTYPES, apply
from truthsteer.prompts import PLAIN, Prompts

FP32 = DtypeConfig("fp32")
BF16 = DtypeConfig("bf16", Weights.bf16)
FP16 = DtypeConfig("fp16", Weights.fp16, Residual.fp32)
FP16_PURE = DtypeConfig("fp16_pure", Weights.fp16)
STRONGEST = (2, 0.8, CoefficientUnit.residual_norm)


@pytest.fixture(scope="module")
def texts(tokenizer) -> list[Text]:
    questions = make_questions(6)
    pairs = make_pairs(questions, 2)
    answers = [[t for p in pairs if p.question == q.id for t in (p.true, p.false)] for q in questions]
    branches = Prompts(PLAIN, tokenizer, False).branches([q.text for q in questions], answers)
    return texts_of(branches, [q.text for q in questions], tokenizer.decode)


def under(policy: DtypeConfig, model: torch.nn.Module, tokenizer) -> LanguageModel:
    model.to(DTYPES[policy.weights])
    apply(model, policy)
    return LanguageModel(model, tokenizer)


def look(lm: LanguageModel, texts: list[Text], policy: DtypeConfig = FP32, **options) -> dict:
    report = examine(lm, texts, policy=policy, **{"max_length": 512, "injection_at": STRONGEST} | options)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert all(isinstance(line, str) for line in numerics_text.lines(report))
    return report


def check(report: dict, name: str) -> dict:
    return next(item for item in report["checks"] if item["name"] == name)


def safe(report: dict) -> dict:
    return {item["name"]: item["safe"] for item in report["policies"]}


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *((family, FP32) for family in FAMILIES),
        ("gemma3", FP16),
        ("qwen2", FP16),
        ("gemma2", BF16),
        ("llama", FP16_PURE),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_healthy_model_is_found_healthy(family, policy, texts, tokenizer):
    model = build(family)
    exact = LanguageModel(build(family), tokenizer)
    report = look(under(policy, model, tokenizer), texts, policy, reference=lambda: exact)
    assert report["outcome"] == "safe", report["verdict"]
    assert report["overrides"] == []
    assert [item["passed"] for item in report["checks"]] == [True, None, True, True, True, True, True]
    assert [item["name"] for item in report["passes"]] == ["right", "left", "steered"]
    assert all(item["bad_real"] == item["bad_pad"] == 0 and item["first"] is None for item in report["passes"])
    assert safe(report) == {"fp16_pure": True, "fp16": True, "bf16": True, "fp32": True}
    assert (report["layers"][0]["norm"] is not None) == (family in GEMMA)
    assert report["missing_points"] == []
    assert report["context"].startswith("No token passes 65504")
    assert 10 <= len(numerics_text.lines(report)) <= 26


@pytest.mark.parametrize("family", GEMMA)
def test_overflow_is_found_in_pure_fp16_and_foretold_in_bf16(family, texts, tokenizer):
    broken = look(under(FP16_PURE, overflowing(family), tokenizer), texts, FP16_PURE)
    right = broken["passes"][0]
    assert (right["bad_texts"], right["first"]["layer"], right["first"]["point"]) == (1.0, 1, "resid_out")
    assert (right["first"]["position"], right["first"]["token"]) == (0, "<bos>")
    assert right["first"]["where"] == "the residual add after the MLP of layer 1"
    assert broken["outcome"] == "not finite"
    assert (broken["predicted"]["layer"], broken["predicted"]["point"]) == (1, "resid_out")
    assert safe(broken) == {"fp16_pure": False, "fp16": None, "bf16": None, "fp32": None}
    assert "shorter steering.max_length cannot help" in broken["context"]
    assert "residual add after the MLP of layer 1 (token 0 '<bos>'" in broken["verdict"]
    assert broken["overrides"] == ["dtype=bf16", "dtype=fp16", "dtype=fp32"]

    report = look(under(BF16, overflowing(family), tokenizer), texts, BF16)
    assert report["outcome"] == "safe"
    assert safe(report) == {"fp16_pure": False, "fp16": True, "bf16": True, "fp32": True}
    assert (report["predicted"]["layer"], report["predicted"]["point"]) == (1, "resid_out")
    assert report["headroom"]["residual"] < -3
    assert report["headroom"]["matmul"] > 1
    assert "layer 1" in report["policies"][0]["why"]
    assert "shorter steering.max_length cannot help" in report["context"]
    top = max(report["layers"], key=lambda item: item["residual"]["largest"])["residual"]
    assert (top["position"], top["token"], top["channel"]) == (0, "<bos>", 3)
    assert top["bits_fp16"] == pytest.approx(numerics.bits(top["largest"]))

    good = look(under(FP16, overflowing(family), tokenizer), texts, FP16)
    assert good["outcome"] == "safe"
    assert safe(good)["fp16_pure"] is False


def test_headroom_is_the_same_in_bf16_and_fp32(texts, tokenizer):
    reports = [look(under(policy, overflowing("gemma3"), tokenizer), texts, policy) for policy in (BF16, FP32)]
    for group in ("residual", "norm", "matmul", "weights"):
        assert reports[0]["headroom"][group] == pytest.approx(reports[1]["headroom"][group], abs=0.1)


def test_steering_alone_can_overflow(texts, tokenizer):
    lm = under(FP16_PURE, build("gemma3"), tokenizer)
    report = look(lm, texts, FP16_PURE, injection_at=(1, 1e6, CoefficientUnit.residual_norm))
    steered = report["passes"][2]
    assert (steered["coefficient"], steered["layer"]) == (1e6, 1)
    assert steered["first"]["where"] == "the steering at layer 1"
    assert report["passes"][0]["first"] is None
    assert "under steering only" in report["verdict"]
    finite = steered["finite_coefficient"]
    assert f"steering.coefficients=[{finite:g}]" in report["overrides"]
    passes = [
        look(lm, texts, FP16_PURE, injection_at=(1, value, CoefficientUnit.residual_norm))["passes"][2]
        for value in (finite, 2 * finite)
    ]
    assert [item["bad_texts"] > 0 for item in passes] == [False, True]
    told = look(LanguageModel(build("gemma3"), tokenizer), texts, injection_at=(1, 1e6, CoefficientUnit.residual_norm))
    assert safe(told)["fp16_pure"] is False


def test_steering_is_scaled_as_the_run_scales_it(gemma3, texts):
    from truthsteer.hooks import capture

    rows = [text.ids for text in texts[:4]]
    run = Passes(gemma3, texts[:4], rows, None)
    _, _, outputs = run.read(layer=2)
    made = strongest(run, outputs, 2, 0.8, CoefficientUnit.residual_norm)
    raw = strongest(run, outputs, 2, 0.8, CoefficientUnit.raw)
    alone, norms = [], []
    for text in texts[:4]:
        with capture(gemma3, [2]) as taken:
            gemma3.forward(torch.tensor([text.ids]))
        alone.append(taken[2][0, -1])
        norms.append(taken[2][0, text.answer :].norm(dim=-1))
    wanted = (alone[0] + alone[2] - alone[1] - alone[3]) / 2
    assert torch.allclose(raw.vector, wanted, rtol=1e-3, atol=1e-4)
    assert float(made.vector.norm()) == pytest.approx(float(torch.cat(norms).mean()), rel=1e-4)
    same = [Text("a", rows[0], 3, "0", True), Text("b", rows[0], 3, "0", False)]
    equal = Passes(gemma3, same, [rows[0]] * 2, None)
    _, _, outputs = equal.read(layer=2)
    drawn = strongest(equal, outputs, 2, 0.8, CoefficientUnit.raw)
    assert float(drawn.vector.norm()) > 0, "a random direction where the texts do not differ"


def late(texts: list[Text], position: int) -> list[Text]:
    """One of the longest texts with a rare token far from its beginning."""
    longest = max(texts, key=lambda text: len(text.ids))
    assert len(longest.ids) > position + 1
    ids = (*longest.ids[:position], 900, *longest.ids[position + 1 :])
    return [Text(t.name, ids, t.answer, t.pair, t.truthful) if t is longest else t for t in texts]


@pytest.mark.parametrize("policy", [FP32, FP16_PURE], ids=lambda policy: policy.name)
def test_a_late_token_that_overflows_is_the_only_case_where_cutting_helps(policy, texts, tokenizer):
    model = build("gemma3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # or its logits would overflow everywhere
    model.get_decoder().embed_tokens.weight.data[900] = 6e4 if policy is FP16_PURE else 2e4
    given = late(texts, 15)
    report = look(under(policy, model, tokenizer), given, policy)
    assert "1 of 8 texts" in report["context"]
    assert "steering.max_length=15 would cut them, and the answers with them, in " in report["context"]
    assert report["passes"][0]["bad_texts"] == (0.125 if policy is FP16_PURE else 0)
    shorter = look(under(policy, model, tokenizer), given, policy, max_length=15)
    assert shorter["passes"][0]["bad_texts"] == 0
    assert shorter["context"].startswith("No token passes")
    assert check(report, "bos_agreement")["passed"] is not False, "NaN that spreads back is no broken first token"


def test_cut_texts_and_equal_pairs_are_counted(gemma3, texts):
    report = look(gemma3, texts, max_length=12)
    assert report["given"] == len(texts)
    assert report["too_long"] == sum(len(text.ids) > 12 for text in texts)
    pairs = {text.pair for text in texts}
    cut = {pair: {text.ids[:12] for text in texts if text.pair == pair} for pair in pairs}
    assert report["equal_pairs"] == sum(len(group) == 1 for group in cut.values()) > 0
    assert max(len(row.ids) for row in texts) == report["longest"]


def test_whole_pairs_are_chosen_from_the_shortest_to_the_longest(texts):
    chosen = choose(texts, 8)
    assert len(chosen) == 8
    pairs = {text.pair for text in chosen}
    assert len(pairs) == 4
    assert max(len(text.ids) for text in texts) == max(len(text.ids) for text in chosen)
    by_pair = {pair: max(len(t.ids) for t in texts if t.pair == pair) for pair in {t.pair for t in texts}}
    assert min(by_pair.values()) in [by_pair[pair] for pair in pairs]
    assert len(choose(texts, 10**6)) == len(texts)
    assert len(choose(texts, 2)) == 2


def test_a_quick_look_is_one_pass(gemma3, texts, monkeypatch):
    calls = []
    own = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda self, *a, **k: calls.append(1) or own(self, *a, **k))
    report = look(gemma3, texts, thorough=False, reference=lambda: pytest.fail("loaded"))
    assert len(calls) == 1
    assert report["texts"] == 4
    assert [item["name"] for item in report["passes"]] == ["right"]


def test_no_texts_are_an_error(gemma3):
    with pytest.raises(UserError, match="no answer pairs"):
        look(gemma3, [])


def test_a_broken_hand_over_is_called_wrong_although_finite(texts, tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)
    own = lm.layers[2].forward
    lm.layers[2].forward = lambda hidden, *a, **k: own(torch.zeros_like(hidden), *a, **k)
    report = look(lm, texts)
    assert report["outcome"] == "wrong"
    assert not check(report, "handover")["passed"]
    assert "[2]" in check(report, "handover")["meaning"]
    assert "CUDA_VISIBLE_DEVICES=0" in report["overrides"]
    assert "handover FAILED" in "\n".join(numerics_text.lines(report))


def test_a_broken_copy_between_devices_is_found():
    devices = ["cpu", "cpu:0"]
    assert soundness.copies_that_differ(devices) == []
    assert soundness.copies_that_differ(devices, lambda value, device: torch.zeros_like(value)) == [
        ("cpu", "cpu:0"),
        ("cpu:0", "cpu"),
    ]
    tries = iter(range(100))

    def flaky(value, device):
        return value if next(tries) % 4 != 3 else value.roll(1)

    assert soundness.copies_that_differ(["cpu", "cpu:0"], flaky) == [("cpu", "cpu:0"), ("cpu:0", "cpu")]


def test_a_first_token_that_differs_between_texts_is_found(texts, tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)

    def spoil(_module, _inputs, output):
        output = output.clone()
        output[1, 0] *= 1.2
        return output

    lm.layers[1].register_forward_hook(spoil)
    report = look(lm, texts, thorough=False)
    found = check(report, "bos_agreement")
    assert (found["passed"], report["outcome"]) == (False, "wrong")
    assert found["value"] > 0.1


def test_a_first_token_that_is_lost_in_one_text_is_found(texts, tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)

    def lose(_module, _inputs, output):
        return output.masked_fill((torch.arange(len(output)) == 1)[:, None, None], float("nan"))

    lm.layers[1].register_forward_hook(lose)
    assert check(look(lm, texts, thorough=False), "bos_agreement")["passed"] is False


def test_not_finite_padding_is_told_from_not_finite_text(texts, tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)
    own = lm.forward
    masks = []

    def forward(ids, cache=None, mask=None, start=0):
        masks[:] = [mask]
        return own(ids, cache, mask, start)

    def poison(_module, _inputs, output):  # as fused kernels do at rows that may look at nothing
        return output if masks[0] is None else output.masked_fill(masks[0][..., None] == 0, float("nan"))

    lm.forward = forward
    lm.layers[3].register_forward_hook(poison)
    report = look(lm, texts)
    left = report["passes"][1]
    assert left["bad_real"] == left["bad_texts"] == 0
    assert left["bad_pad"] == 1.0
    assert (left["first"]["position"], left["first"]["token"]) == (-1, "<padding>")
    assert check(report, "padding_finite")["passed"] is False
    assert check(report, "padding_sides")["passed"] is True
    assert "dtype.attention=eager" in report["overrides"]


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
@pytest.mark.parametrize("policy", [FP32, BF16, FP16], ids=lambda policy: policy.name)
@pytest.mark.parametrize("wrong", ["open mask", "stretched", "reversed"])
def test_wrong_masks_or_positions_under_left_padding_are_found(family, policy, wrong, texts, tokenizer):
    lm = under(policy, build(family), tokenizer)
    own = lm.decoder.forward

    def spoiled(input_ids, attention_mask, position_ids, **rest):
        if attention_mask is not None:
            if wrong == "open mask":
                attention_mask = torch.ones_like(attention_mask)
            else:
                position_ids = position_ids * 3 if wrong == "stretched" else position_ids.flip(1)
        return own(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)

    lm.decoder.forward = spoiled
    report = look(lm, texts, policy)
    found = check(report, "padding_sides")
    assert found["passed"] is False, found
    assert report["outcome"] == "wrong"


@pytest.mark.parametrize("policy", [BF16, FP16, FP32], ids=lambda policy: policy.name)
def test_rounding_stays_well_inside_its_bound(policy, texts, tokenizer):
    """Of a model with massive activations, too; wrong positions pass the bound many times over."""
    for model in (overflowing("gemma3"), build("qwen2"), build("gemma2")):
        found = check(look(under(policy, model, tokenizer), texts, policy), "padding_sides")
        assert found["value"] < found["bound"] / 2


def test_no_depth_and_no_format_excuse_a_wrong_result():
    for policy in (FP32, BF16, FP16):
        bounds = [soundness.rounding(policy, depth) for depth in (4, 18, 62, 400)]
        assert bounds == sorted(bounds)
        assert bounds[0] >= 1e-4
        assert bounds[-1] <= 0.25
    assert soundness.rounding(FP32, 18) < soundness.rounding(FP16, 18) < soundness.rounding(BF16, 18)


def test_a_tokenizer_without_bos_or_padding_is_said_not_failed(texts, tokenizer, monkeypatch):
    bare = SimpleNamespace(
        pad_token_id=None, eos_token_id=None, bos_token_id=None, decode=tokenizer.decode, all_special_tokens=[]
    )
    report = look(LanguageModel(build("qwen2"), bare), texts)
    assert check(report, "bos_once")["passed"] is None
    assert "no beginning-of-sequence token" in check(report, "bos_once")["meaning"]
    assert report["outcome"] == "safe"


BEGINNINGS = {
    "once": (lambda ids: ids, True),
    "twice": (lambda ids: (2, *ids), False),
    "again": (lambda ids: (*ids[:4], 2, *ids[4:]), False),
    "never": (lambda ids: ids[1:], False),
}


@pytest.mark.parametrize("how", BEGINNINGS)
def test_bos_stands_once(how, gemma3, texts):
    change, passed = BEGINNINGS[how]
    given = [Text(t.name, change(t.ids), t.answer, t.pair, t.truthful) for t in texts]
    assert check(look(gemma3, given, thorough=False), "bos_once")["passed"] is passed


def test_a_damaged_weight_is_no_overflow(texts, tokenizer):
    model = build("gemma3")
    model.get_decoder().layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    report = look(under(FP32, model, tokenizer), texts, reference=lambda: pytest.fail("nothing to compare"))
    assert report["predicted"] is None
    assert safe(report) == dict.fromkeys(("fp16_pure", "fp16", "bf16", "fp32"), False)
    assert report["passes"][0]["first"]["where"] == "the output of the MLP of layer 2"
    assert report["passes"][0]["first"]["cause"] == "NaN, in float32"
    assert report["headroom"]["residual"] is None


def test_distance_from_fp32_is_seen_where_everything_is_finite(texts, tokenizer):
    exact, wrong = LanguageModel(build("gemma3"), tokenizer), build("gemma3")
    wrong.get_decoder().layers[2].mlp.down_proj.weight.data.mul_(-1)
    loaded = []

    def reference() -> LanguageModel:
        loaded.append(1)
        return exact

    report = look(under(BF16, wrong, tokenizer), texts, BF16, reference=reference)
    assert loaded == [1]
    layers = report["reference"]["layers"]
    assert max(layers[:2]) < 0.05 < 0.25 < layers[2]
    assert report["outcome"] == "wrong"
    assert report["overrides"] == ["dtype=fp32"]
    quantised = DtypeConfig("int8", Weights.fp16, Residual.fp32, quantize=Quantize.int8)
    assert check(look(exact, texts, quantised, reference=reference), "reference")["passed"] is None


def test_massive_channels_do_not_hide_the_rest(texts, tokenizer):
    exact, wrong = LanguageModel(overflowing("gemma3"), tokenizer), overflowing("gemma3")

    def spoil(_module, _inputs, output):
        return torch.cat([output[..., :4], output[..., 4:].roll(1, -1)], -1)

    wrong.get_decoder().layers[3].register_forward_hook(spoil)
    report = look(under(BF16, wrong, tokenizer), texts, BF16, reference=lambda: exact)
    assert report["reference"]["layers"][3] < 0.2
    assert report["reference"]["layers_without_massive"][3] > 0.5
    assert check(report, "reference")["passed"] is False


def test_sums_over_tokens_are_foretold(texts, tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)

    def grow(_module, _inputs, output):
        output = output.index_fill(-1, torch.tensor([4]), 30_000.0)
        output[:, 0] *= 2  # the first token stands apart, and in no sum over an answer
        return output

    lm.layers[1].register_forward_hook(grow)
    report = look(lm, texts, thorough=False)  # padded on the right, so that the first token is in column 0
    assert report["token_sum"]["mean_abs"] == pytest.approx(30_000, rel=0.01)
    assert report["token_sum"]["from_tokens"] == 3
    assert "may overflow from 3 tokens on; truthsteer sums in float32" in "\n".join(numerics_text.lines(report))


def test_a_point_that_was_not_read_is_never_called_fine(texts, tokenizer):
    lm = LanguageModel(build("llama"), tokenizer)
    for layer in lm.layers:
        layer.mlp.forward = lambda x: x * 0.5
    report = look(lm, texts)
    assert report["missing_points"] == ["mlp_act", "mlp_gate", "mlp_up"]
    assert safe(report) == {"fp16_pure": None, "fp16": None, "bf16": True, "fp32": True}
    assert "mlp_act" in "\n".join(numerics_text.lines(report))


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_a_factor_that_overflows_is_foretold_although_the_product_is_small(family, texts, tokenizer):
    """Of a gated MLP: 0 times 4e5 is 0, and 0 times infinity is not."""
    model = build(family)
    with torch.no_grad():
        mlp = model.get_decoder().layers[1].mlp
        mlp.gate_proj.weight[5] = 0.0
        mlp.up_proj.weight[5] *= 4e5
    report = look(LanguageModel(model, tokenizer), texts)
    assert report["largest"]["matmul"] > 65504
    assert safe(report) == {"fp16_pure": False, "fp16": False, "bf16": True, "fp32": True}
    broken = look(under(FP16, model, tokenizer), texts, FP16)
    assert broken["passes"][0]["first"]["point"] == "mlp_up"


def test_pairs_that_a_run_leaves_out_are_not_looked_at(texts, tokenizer):
    model = build("gemma3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.get_decoder().embed_tokens.weight.data[900] = 6e4
    given, lm = late(texts, 15), under(FP16_PURE, model, tokenizer)
    limit = max(len(text.ids) for text in texts) - 1
    assert look(lm, given, FP16_PURE, max_length=limit)["outcome"] == "not finite"
    report = look(lm, given, FP16_PURE, max_length=limit, too_long=TooLong.drop)
    assert report["outcome"] == "safe"
    assert report["longest"] == limit + 1
    assert "whose pairs are left out" in "\n".join(numerics_text.lines(report))
    with pytest.raises(UserError, match=rf"too_long=drop leaves none of .* Type steering\.max_length={limit + 1}"):
        look(lm, given, FP16_PURE, max_length=8, too_long=TooLong.drop)


def differences(made: object, real: object, where: str = "report") -> list[str]:
    """Keys that one record has and the other has not; of a list its first record. What is None may be a record elsewhere."""
    if isinstance(made, list) and isinstance(real, list) and made and real:
        return differences(made[0], real[0], f"{where}[0]")
    if not isinstance(made, dict) or not isinstance(real, dict):
        return []
    odd = [f"{where}.{key}" for key in sorted(set(made) ^ set(real))]
    return odd + [
        name for key in made.keys() & real.keys() for name in differences(made[key], real[key], f"{where}.{key}")
    ]


@pytest.mark.parametrize("bad", [False, True], ids=["safe", "not finite"])
def test_the_reports_that_tests_make_up_have_the_keys_of_real_ones(texts, tokenizer, bad):
    model = overflowing("gemma3") if bad else build("gemma3")
    policy = FP16_PURE if bad else FP32
    lm = under(policy, model, tokenizer)
    real = look(lm, texts, policy, reference=lambda: lm)
    assert differences(numerics.complete(measured(bad=float(bad))), real) == []
    assert differences(make_numerics(nan_from=1 if bad else None), real) == []


def test_logits_that_overflow_are_foretold(texts, tokenizer):
    model = build("qwen2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 4e5)
    report = look(LanguageModel(model, tokenizer), texts)
    assert safe(report) == {"fp16_pure": False, "fp16": False, "bf16": True, "fp32": True}
    broken = look(under(FP16, model, tokenizer), texts, FP16)
    assert broken["verdict"].startswith("dtype=fp16 fails: the numbers are first not finite at the logits ")


def test_scores_of_eager_attention_are_bounded_and_never_blamed(texts, tokenizer):
    """They are products in fp16 there; other implementations sum them in float32."""
    safe_by = {}
    for attention in ("sdpa", "eager"):
        model = build("qwen2")
        model.set_attn_implementation(attention)
        with torch.no_grad():
            for name in ("q_proj", "k_proj"):
                model.model.layers[2].self_attn.get_submodule(name).weight.mul_(60)
        report = look(LanguageModel(model, tokenizer), texts)
        safe_by[attention] = safe(report)["fp16"]
        assert report["predicted"] is None, "a bound is no measurement"
    assert safe_by == {"sdpa": True, "eager": None}
