"""The probe names the exact place at which numbers stop being finite, and reads what the model computes."""

from __future__ import annotations

import pytest
import torch
from conftest import build

from truthsteer.hooks import Injection, RowSteering, capture
from truthsteer.model import LanguageModel
from truthsteer.numerics import FP16_MAX
from truthsteer.operators import Add
from truthsteer.points import GROUPS
from truthsteer.precision import keep_residual_fp32
from truthsteer.probe import Probe, diagnose, probing

ROWS = [[2, *range(30, 30 + length)] for length in (5, 9, 14)]
GEMMA = ("gemma3", "gemma3_multimodal", "gemma2")


@torch.no_grad()
def overflowing(family: str) -> torch.nn.Module:
    """A random model whose residual stream passes 65504 at the first token, by the second residual add of layer 1.

    What is added there is below 65504, and so are all weights; in the end the sum passes 1e6.
    """
    model = build(family)
    decoder = model.get_decoder()
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    after_mlp, both = ("post_feedforward_layernorm",), ("post_attention_layernorm", "post_feedforward_layernorm")
    for layer, added, norms in zip(
        decoder.layers, (4e4, 4e4, 3e5, 3e5), (after_mlp, after_mlp, both, both), strict=True
    ):
        layer.self_attn.o_proj.weight[3] *= 64  # the largest part of what each norm is given
        layer.mlp.down_proj.weight[3] *= 64
        for name in norms:
            norm, seen = layer.get_submodule(name), []
            handle = norm.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(float(out[0, 0, 3])))
            norm.weight[3] = 0.0
            decoder(input_ids=torch.tensor([[2]]))
            handle.remove()
            norm.weight[3] = torch.tensor(added / seen[0] - 1).bfloat16()
    return model


def read(lm: LanguageModel, rows=ROWS, left: bool = False, injection: Injection | None = None):
    ids, mask = lm.pad(rows, left)
    with probing(lm, mask, injection) as probe:
        lm.forward(ids, mask=mask if left else None)
        return probe.reading()


def test_every_point_of_every_family_is_read_and_is_what_the_model_computes(tiny):
    ids, mask = tiny.pad(ROWS)
    with Probe(tiny, mask) as probe, capture(tiny, range(tiny.num_layers)) as taken:
        tiny.forward(ids)
        reading = probe.reading()
    assert reading.missing == ()
    assert reading.altered == ()
    real = mask.bool()
    for layer in range(tiny.num_layers):
        names = {point.name for point in reading.points if point.layer == layer}
        assert {"attn_in", "q", "k", "v", "attn_ctx", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out"} < names
        assert {"mlp_gate", "mlp_up"} < names
        assert ({"q_normed", "k_normed"} < names) == hasattr(tiny.layers[0].self_attn, "q_norm")
        assert ("mlp_normed" in names) == hasattr(tiny.layers[0], "post_feedforward_layernorm")
        index = next(i for i, p in enumerate(reading.points) if (p.layer, p.name) == (layer, "resid_out"))
        assert torch.equal(reading.largest[index], taken[layer].abs().amax(-1))
        assert torch.equal(reading.starts[layer], taken[layer][:, 0])
        peak = reading.peaks[layer]
        out = float(taken[layer].abs().amax(-1)[real].max())
        middle = next(i for i, p in enumerate(reading.points) if (p.layer, p.name) == (layer, "resid_mid"))
        assert peak.value == max(out, float(reading.largest[middle][real].max()))
        if peak.value == out:
            assert float(taken[layer][peak.row, peak.column, peak.channel].abs()) == out
    assert [point.name for point in reading.points[:2]] == ["embed", "attn_in"]
    assert reading.points[-1].name == "final_norm"


def test_hooks_are_removed(gemma3):
    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gemma3.model.modules())

    before = count()
    read(gemma3)
    assert count() == before


@pytest.mark.parametrize("family", GEMMA)
def test_pure_fp16_first_fails_at_the_residual_add_that_bf16_predicts(family, tokenizer):
    model = overflowing(family)
    exact = read(LanguageModel(model, tokenizer))
    over = exact.first(FP16_MAX, pads=False)
    assert over is not None
    assert (over.point.name, over.column) == ("resid_out", 0)
    assert exact.of("residual")[0] > 1e6
    predicted = read(LanguageModel(model.bfloat16(), tokenizer)).first(FP16_MAX, pads=False)
    found = read(LanguageModel(model.half(), tokenizer)).first()
    assert predicted is not None
    assert found is not None
    assert (found.point.name, found.column) == ("resid_out", 0)
    assert found.point.layer == over.point.layer
    assert abs(predicted.point.layer - found.point.layer) <= 1
    assert predicted.point.name == "resid_out"


@pytest.mark.parametrize("family", GEMMA)
def test_the_sentence_names_layer_add_and_token(family, tokenizer):
    lm = LanguageModel(overflowing(family).half(), tokenizer)
    layer = read(lm).first().point.layer
    said = diagnose(lm, ROWS[0])
    assert f"the residual add after the MLP of layer {layer} (token 0 '<bos>'): infinite, in float16" in said


def test_nothing_is_said_of_finite_numbers(tiny):
    assert diagnose(tiny, ROWS[2]) == ""


@pytest.mark.parametrize(
    ("module", "where"),
    [
        ("embed_tokens", "the embedding (token 3"),
        ("layers.2.input_layernorm", "the norm before attention of layer 2"),
        ("layers.2.self_attn.q_proj", "the queries of layer 2"),
        ("layers.2.self_attn.v_proj", "the values of layer 2"),
        ("layers.2.self_attn.o_proj", "the output projection of attention of layer 2"),
        ("layers.2.mlp.gate_proj", "the gate of the MLP of layer 2"),
        ("layers.2.mlp.down_proj", "the output of the MLP of layer 2"),
        ("norm", "the final norm"),
    ],
)
@pytest.mark.parametrize("family", ["gemma3", "gemma3_multimodal", "qwen2"])
def test_a_bad_weight_is_found_where_it_is(family, module, where, tokenizer):
    lm = LanguageModel(build(family), tokenizer)
    weight = lm.decoder.get_submodule(module).weight.data
    weight[ROWS[0][3] if module == "embed_tokens" else 0] = float("nan")
    assert f"first not finite at {where}" in diagnose(lm, ROWS[0])


def test_the_first_residual_add_is_blamed_if_what_it_adds_is_finite(tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)
    lm.layers[1].post_feedforward_layernorm.weight.data[3] = 5e35  # each finite; float32 norms cannot square it
    lm.layers[2].post_attention_layernorm.weight.data[3] = 5e35
    assert "the norm after the MLP of layer 1" in diagnose(lm, ROWS[0])
    half = LanguageModel(build("gemma3").half(), tokenizer)
    half.layers[0].register_forward_hook(lambda _m, _i, out: out.index_fill(-1, torch.tensor([3]), 65_000.0))
    half.layers[1].post_attention_layernorm.register_forward_hook(
        lambda _m, _i, out: out.index_fill(-1, torch.tensor([3]), 65_000.0)
    )
    assert "the residual add after attention of layer 1" in diagnose(half, ROWS[0])


def test_a_head_that_overflows_is_told_from_the_layers(tokenizer):
    lm = LanguageModel(build("qwen2"), tokenizer)
    lm.model.get_output_embeddings().weight = torch.nn.Parameter(lm.model.get_output_embeddings().weight.clone())
    lm.model.get_output_embeddings().weight.data[7] = float("inf")
    assert "at the logits (token 0 '<bos>')" in diagnose(lm, ROWS[0])


def test_a_number_that_a_norm_cannot_square_is_not_finite(tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)
    lm.decoder.embed_tokens.weight.data[ROWS[0][2], 5] = 1e20
    assert "the embedding (token 2" in (said := diagnose(lm, ROWS[0]))
    assert "cannot square" in said


def test_steering_is_read_and_blamed_at_its_layer(gemma3, tokenizer):
    vector = torch.full((gemma3.hidden_size,), 100.0)
    steered, plain = read(gemma3, injection=Injection(1, vector, 2.0)), read(gemma3)

    def largest(reading, layer, name):
        return next(reading.largest[i] for i, p in enumerate(reading.points) if (p.layer, p.name) == (layer, name))

    assert torch.equal(largest(steered, 1, "resid_add"), largest(plain, 1, "resid_out"))
    assert (largest(steered, 1, "resid_out") > 150).all()
    half = LanguageModel(build("gemma3").half(), tokenizer)
    said = diagnose(half, ROWS[1], Injection(1, vector, 1000.0))
    assert "the steering at layer 1 (token 0 '<bos>'): infinite" in said
    assert diagnose(half, ROWS[1], Injection(1, vector, 1.0)) == ""


def test_steering_of_a_layer_that_returns_a_tuple(tokenizer):
    lm = LanguageModel(build("llama"), tokenizer)
    ids, mask = lm.pad(ROWS)
    plain = read(lm, injection=Injection(1, torch.ones(32), 3.0))
    for layer in lm.layers:
        own = layer.forward
        layer.forward = lambda hidden, *a, own=own, **k: (
            own(hidden[0] if isinstance(hidden, tuple) else hidden, *a, **k),
        )
    lm.decoder.norm.register_forward_pre_hook(lambda _m, i: i[0] if isinstance(i[0], tuple) else i)
    with RowSteering(lm, [Injection(1, torch.ones(32), 3.0)], Add()) as steering, Probe(lm, mask, 1) as probe:
        steering.assign(torch.zeros(len(ROWS), dtype=torch.long))
        lm.forward(ids)
        found = probe.reading()
    outs = [i for i, p in enumerate(plain.points) if p.name == "resid_out"]
    same = [i for i, p in enumerate(found.points) if p.name == "resid_out"]
    assert torch.equal(plain.largest[outs], found.largest[same])


def test_the_residual_stream_in_fp32_is_read_as_such(tokenizer):
    model = overflowing("gemma3").half()
    keep_residual_fp32(model)
    reading = read(LanguageModel(model, tokenizer))
    assert reading.first() is None
    assert reading.of("residual")[0] > 1e6
    assert {GROUPS[point.name] for point in reading.points if point.dtype == "float16"} == {"matmul"}
    formats = {point.name: point.dtype for point in reading.points}
    assert formats["resid_out"] == formats["mlp_normed"] == "float32"
    assert formats["mlp_act"] == formats["q"] == "float16"


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_told_from_text(left, gemma3):
    lm = gemma3
    pad_row = ROWS[:2]
    _ids, mask = lm.pad(pad_row, left)

    def poison(_module, _inputs, output):
        return output.masked_fill(~mask.bool()[..., None], float("nan"))

    handle = lm.layers[3].register_forward_hook(poison)
    try:
        reading = read(lm, pad_row, left)
    finally:
        handle.remove()
    spot = reading.first()
    assert spot.point.name == "resid_out"
    assert spot.row == 0
    assert not reading.real[spot.row, spot.column]
    assert reading.first(pads=False) is None
    assert not (reading.bad & reading.real).any()
    assert reading.offending() == [[], []]
    assert reading.peaks[3].value < float("inf")


def test_text_is_blamed_before_padding_at_the_same_point(gemma3):
    def poison(_module, _inputs, output):
        return output.masked_fill((torch.arange(len(output)) == 0)[:, None, None], float("nan"))

    handle = gemma3.layers[3].register_forward_hook(poison)
    try:
        spot = read(gemma3, left=True).first()
    finally:
        handle.remove()
    assert (spot.row, spot.column) == (0, len(ROWS[2]) - len(ROWS[0]))


def test_offending_tokens_are_those_before_not_finite_numbers_spread(tokenizer):
    lm = LanguageModel(build("gemma3"), tokenizer)
    rows = [[2, 30, 31, 32], [2, 30, 900, 31, 32, 900], [2, 40, 41]]
    lm.decoder.embed_tokens.weight.data[900] = float("inf")
    reading = read(lm, rows, left=True)
    assert reading.offending() == [[], [2, 5], []]
    assert (reading.bad.any(0) & reading.real)[1].all(), "not finite keys spread to earlier tokens of the row"
    lm.decoder.embed_tokens.weight.data[900] = 7e4 / lm.hidden_size**0.5 * torch.ones(32)
    assert read(lm, rows).offending() == [[], [2, 5], []]


def test_a_hand_over_that_changes_numbers_is_found(tiny):
    layer = tiny.layers[2]
    own = layer.forward
    try:
        for broken in (torch.zeros_like, lambda h: h.index_fill(-1, torch.tensor([0]), 0.125)):
            layer.forward = lambda hidden, *a, broken=broken, **k: own(broken(hidden), *a, **k)
            assert read(tiny).altered == (2,)
        layer.forward = lambda hidden, *a, **k: own(hidden.clone(), *a, **k)
        assert read(tiny).altered == ()
    finally:
        del layer.forward


def test_points_that_are_not_passed_through_are_missing(tokenizer):
    lm = LanguageModel(build("llama"), tokenizer)
    mlp = lm.layers[1].mlp
    mlp.forward = lambda x: x * 0.5  # a fused kernel goes past the modules below it
    assert read(lm).missing == ("mlp_act of layers [1]", "mlp_gate of layers [1]", "mlp_up of layers [1]")
    for layer in lm.layers:
        layer.mlp.forward = lambda x: x * 0.5
    assert read(lm).missing == ("mlp_act", "mlp_gate", "mlp_up")
