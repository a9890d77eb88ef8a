"""Every dtype against fp32 on models whose residual stream passes fp16, in every way a model is used."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, blow_up, build
from torch import nn

from truthsteer import precision
from truthsteer.config import DtypeConfig, GenerationConfig, Matmul, Residual, Weights
from truthsteer.decoding import Request, decode
from truthsteer.errors import UserError
from truthsteer.hooks import Injection, RowSteering, capture
from truthsteer.model import LanguageModel
from truthsteer.operators import Add
from truthsteer.precision import DTYPES, apply, check_hardware, check_weights

FP32 = DtypeConfig("fp32")
BF16 = DtypeConfig("bf16", Weights.bf16)
FP16 = DtypeConfig("fp16", Weights.fp16, Residual.fp32)
FP16_PURE = DtypeConfig("fp16_pure", Weights.fp16)
IDS = torch.randint(3, 1700, (2, 24), generator=torch.Generator().manual_seed(5))
BLOWN_UP = ("gemma3", "gemma3_multimodal", "gemma2")
"""Families with norms after each sublayer, whose weights are huge on a few channels of the real checkpoints."""


def model_of(family: str, tokenizer, policy: DtypeConfig) -> LanguageModel:
    """A random model under a policy; with post-norms, its residual stream passes 1e6 by the last layer."""
    model = blow_up(build(family)) if family in BLOWN_UP else build(family)
    model.to(DTYPES[policy.weights])
    apply(model, policy)
    return LanguageModel(model, tokenizer)


def residual(lm: LanguageModel, injection: Injection | None = None) -> torch.Tensor:
    """[layers, batch, tokens, hidden] float32"""
    with RowSteering(lm, [injection], Add()) as steering, capture(lm, range(lm.num_layers)) as taken:
        steering.assign(torch.zeros(len(IDS), dtype=torch.long))
        lm.forward(IDS)
    return torch.stack([taken[layer].float() for layer in range(lm.num_layers)])


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def injection(lm: LanguageModel) -> Injection:
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(3))
    return Injection(1, direction / direction.norm() * residual(lm)[1].norm(dim=-1).mean(), 0.8)


@pytest.mark.parametrize("family", BLOWN_UP)
def test_fp16_holds_a_residual_stream_that_fp16_cannot(family, tokenizer):
    reference = model_of(family, tokenizer, FP32)
    whole, added = residual(reference), injection(reference)
    steered = residual(reference, added)
    assert whole.abs().max() > 1e6
    assert steered.abs().max() > 1e6
    ours, others = model_of(family, tokenizer, FP16), model_of(family, tokenizer, BF16)
    for found, wanted in ((residual(ours), whole), (residual(ours, added), steered)):
        assert torch.isfinite(found).all()
        assert max(relative(f, w) for f, w in zip(found, wanted, strict=True)) < 0.005
    assert torch.isfinite(residual(others, added)).all()
    assert relative(residual(ours), whole) < relative(residual(others), whole)
    assert not torch.isfinite(residual(model_of(family, tokenizer, FP16_PURE))).all()


@pytest.mark.parametrize("family", BLOWN_UP)
def test_the_embedding_is_scaled_in_float32(family, tokenizer):
    """A row that fp16 holds, and whose scaled one it does not."""
    models = [blow_up(build(family), weight=1.0) for _ in range(2)]
    for model, policy in zip(models, (FP32, FP16), strict=True):
        with torch.no_grad():
            model.get_input_embeddings().weight[IDS[0, 5]] = 30_000.0
        model.to(DTYPES[policy.weights])
        apply(model, policy)
    wanted, found = (residual(LanguageModel(model, tokenizer)) for model in models)
    assert wanted[0].abs().max() > 65504
    assert torch.isfinite(found).all()
    assert relative(found[0], wanted[0]) < 0.001


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [FP16, BF16], ids=lambda policy: policy.name)
def test_generation_is_finite_and_follows_fp32_as_far_as_it_rounds(family, policy, tokenizer):
    """Log-probabilities along one path of tokens, prefill and decoding, left-padded, steered."""
    reference, found = model_of(family, tokenizer, FP32), model_of(family, tokenizer, policy)
    added = injection(reference)
    steps = {lm: decoded_logits(lm, added) for lm in (reference, found)}
    assert torch.isfinite(steps[found]).all()
    assert relative(steps[found], steps[reference]) < (0.02 if policy is FP16 else 0.15)
    requests = [Request(tuple(IDS[0].tolist()), 1), Request(tuple(IDS[1, :9].tolist()), 1)]
    config = GenerationConfig(max_new_tokens=4)
    batches = decode(found, requests, [None, added], config=config, stop=())
    answers = [answer for _, batch in batches for _, answer in batch]
    assert [answer.tokens > 0 for answer in answers] == [True, True]


def decoded_logits(lm: LanguageModel, added: Injection) -> torch.Tensor:
    """[tokens, rows, vocabulary]"""
    ids, mask = lm.pad([IDS[0].tolist(), IDS[1, :9].tolist()], left=True)
    cache, step, found = lm.new_cache(), ids, []
    with RowSteering(lm, [added], Add()) as steering:
        steering.assign(torch.zeros(2, dtype=torch.long))
        for place in range(4):
            found.append(lm.logits(lm.forward(step, cache=cache, mask=mask))[:, -1])
            step = IDS[:, place : place + 1]
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    return torch.stack(found)


@pytest.mark.parametrize("family", ["gemma3", "gemma3_multimodal", "qwen2"])
def test_a_static_cache_and_transformers_own_generate_stay_finite(family, tokenizer):
    tokens = {}
    for policy in (FP32, FP16):
        lm = model_of(family, tokenizer, policy)
        tokens[policy.name] = [
            lm.model.generate(
                IDS,
                attention_mask=torch.ones_like(IDS),
                max_new_tokens=5,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                disable_compile=True,
                **({"cache_implementation": "static"} if static else {}),
            )
            for static in (False, True)
        ]
        for output in tokens[policy.name]:
            assert all(torch.isfinite(logits).all() for logits in output.logits)
        dynamic, static = (output.logits[0].float() for output in tokens[policy.name])
        assert relative(static, dynamic) < (1e-4 if policy is FP32 else 0.01)
    first = {name: outputs[1].logits[0].float() for name, outputs in tokens.items()}
    assert relative(first["fp16"], first["fp32"]) < 0.02


@pytest.mark.parametrize("family", ["gemma3", "gemma3_multimodal"])
def test_a_small_network_trains_through_the_frozen_model(family, tokenizer):
    """A network's output is added to the residual stream; its gradients are finite, near fp32's, and nobody else has one."""
    gradients, losses, strength = {}, {}, 0.0
    for policy in (FP32, FP16, BF16):
        lm = model_of(family, tokenizer, policy)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(lm.hidden_size, 16), nn.Tanh(), nn.Linear(16, lm.hidden_size))
        steps = torch.optim.SGD(network.parameters(), lr=1.0)
        unit = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(3))
        unit = unit / unit.norm()
        strength = strength or 0.3 * float(residual(lm)[1].norm(dim=-1).mean())

        def add(_module, _inputs, output, network=network, unit=unit, strength=strength):
            return (output.float() + strength * network(unit)).to(output.dtype)

        handle = lm.layers[1].register_forward_hook(add)
        history = []
        for _ in range(3):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(
                lm.model(input_ids=IDS).logits[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten()
            )
            loss.backward()
            history.append(float(loss.detach()))
            if policy.name not in gradients:
                gradients[policy.name] = torch.cat([p.grad.flatten() for p in network.parameters()])
            steps.step()
        handle.remove()
        losses[policy.name] = history
        assert all(parameter.grad is None for parameter in lm.model.parameters())
        assert torch.isfinite(gradients[policy.name]).all()
        assert gradients[policy.name].abs().max() > 0
    assert relative(gradients["fp16"], gradients["fp32"]) < min(0.02, relative(gradients["bf16"], gradients["fp32"]))
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["fp32"][-1] != losses["fp32"][0]


def test_products_are_summed_in_float32_and_as_the_policy_says():
    apply(build("qwen2").half(), FP16)
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "highest"
    precision.set_precision(DtypeConfig("tf32", matmul=Matmul.high))
    assert torch.get_float32_matmul_precision() == "high"
    precision.set_precision(FP32)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("policy", "value", "words"),
    [
        (FP32, float("nan"), "not finite .* damaged"),
        (FP16, float("nan"), "not finite .* damaged"),
        (FP32, float("inf"), "infinite as fp32: the checkpoint is damaged"),
        (FP16, 1.2e5, "passes 65504.* Type dtype=bf16"),
        (FP16, -1.2e5, "passes 65504.*damaged.* Type dtype=bf16"),
    ],
)
def test_weights_are_finite_after_the_cast_or_the_sentence_says_what_helps(policy, value, words):
    model = build("gemma3")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    model.to(DTYPES[policy.weights])
    with pytest.raises(UserError, match=rf"model\.norm\.weight of here .*{words}"):
        check_weights(model, policy, "here")


class Gpu:
    """A GPU that is not here."""

    def __init__(self, monkeypatch, capability: tuple[int, int], native: bool, emulated: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(precision, "bf16_native", lambda index: native)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old One")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or emulated)


def test_hardware_that_lacks_a_format_says_what_to_type(monkeypatch):
    gpu = torch.device("cuda")
    Gpu(monkeypatch, (5, 2), native=False)
    with pytest.raises(UserError, match=r"Old One computes no fp16\. Type dtype=fp32"):
        check_hardware(FP16, gpu)
    assert check_hardware(FP32, gpu) == []
    Gpu(monkeypatch, (7, 5), native=False)
    (said,) = check_hardware(BF16, gpu)
    assert "only emulates bf16" in said
    assert "dtype=fp16" in said
    assert check_hardware(FP16, gpu) == []
    Gpu(monkeypatch, (7, 5), native=False, emulated=False)
    with pytest.raises(UserError, match=r"computes no bf16\. Type dtype=fp16"):
        check_hardware(BF16, gpu)
    Gpu(monkeypatch, (8, 0), native=True)
    assert check_hardware(BF16, gpu) == []
    monkeypatch.setattr(precision, "_cpu_computes", lambda weights: False)
    (said,) = check_hardware(BF16, torch.device("cpu"))
    assert "no bf16 arithmetic of its own" in said
    assert "dtype=fp32" in said


def test_a_model_built_otherwise_cannot_keep_its_residual_stream(tokenizer):
    model = build("qwen2")
    model.model.layers[0].mlp.out = model.model.layers[0].mlp.down_proj
    del model.model.layers[0].mlp.down_proj
    with pytest.raises(UserError, match="Type dtype=bf16"):
        apply(model.half(), FP16)
