"""What is loaded of a checkpoint, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from truthsteer import loading
from truthsteer.checkpoint import Checkpoint, resolve
from truthsteer.config import Attention, Device, DtypeConfig, ModelConfig, Quantize, Residual, Weights
from truthsteer.errors import UserError
from truthsteer.hooks import Injection, RowSteering, capture, steered
from truthsteer.loading import first_layers, text_part
from truthsteer.model import LanguageModel
from truthsteer.operators import Add

FP32 = DtypeConfig("fp32")
IDS = torch.randint(3, 1700, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A folder with a model of a family."""

    def save(family: str) -> tuple[Path, torch.nn.Module]:
        model = build(family)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path, model

    return save


def load(folder: Path, policy: DtypeConfig = FP32, depth: int | None = None) -> LanguageModel:
    where = ModelConfig("saved", path=str(folder))
    return LanguageModel.from_config(where, policy, Device.cpu, Checkpoint(str(folder), None, "", 4), depth)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def test_of_a_multimodal_model_only_the_text_part_is_loaded(saved):
    folder, whole = saved("gemma3_multimodal")
    lm = load(folder)
    assert isinstance(lm.model, Gemma3ForCausalLM)
    assert parameters(lm.model) < parameters(whole)
    assert not [name for name, _ in lm.model.named_parameters() if "vision" in name or "projector" in name]
    assert torch.equal(logits(lm.model), logits(whole))
    assert lm.eos_ids == {1}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model."])
def test_every_layout_of_a_multimodal_checkpoint_is_understood(saved, prefix):
    folder, whole = saved("gemma3_multimodal")
    file = folder / "model.safetensors"
    moved = {name.replace("language_model.model.", prefix): tensor for name, tensor in load_file(file).items()}
    assert any(name.startswith(prefix) for name in moved)
    save_file(moved, file, {"format": "pt"})
    assert torch.equal(logits(load(folder).model), logits(whole))


def test_weights_of_the_text_part_that_are_missing_are_refused_and_others_are_not_missed(saved):
    folder, _ = saved("gemma3_multimodal")
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "vision" not in name}
    save_file(kept, file, {"format": "pt"})
    assert load(folder).num_layers == 4
    kept.pop(next(name for name in kept if name.endswith("layers.3.mlp.up_proj.weight")))
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weight of Gemma3ForCausalLM, model\.layers\.3\.mlp\.up_proj"):
        load(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_first_layers_alone_compute_what_they_do_in_the_whole_model(saved, family, depth):
    folder, _ = saved(family)
    policy = DtypeConfig("fp32", attention=Attention.eager if family == "gemma2" else Attention.sdpa)
    lm, full = load(folder, policy, depth), load(folder, policy)
    assert lm.num_layers == depth
    taken = []
    for model in (lm, full):
        with capture(model, range(depth)) as hidden:
            model.forward(IDS)
        taken.append([hidden[layer] for layer in range(depth)])
    for ours, theirs in zip(*taken, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_depth_beyond_the_model_is_the_whole_model(saved):
    folder, _ = saved("qwen2")
    assert load(folder, depth=99).num_layers == 4
    config = text_part(build("gemma3_multimodal").config)[1]
    assert first_layers(config, 2).layer_types == config.layer_types[:2]
    assert config.num_hidden_layers == 4, "the given config stays as it is"


@pytest.mark.parametrize(("policy", "error"), [("int8", 0.06), ("int4", 0.5)])
def test_quantised_weights_are_steered_as_others_are(tmp_path, tokenizer, policy, error):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=1714,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    whole = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    int8 = policy == "int8"
    lm = load(
        tmp_path,
        DtypeConfig(
            policy,
            Weights.fp16 if int8 else Weights.bf16,
            Residual.fp32 if int8 else Residual.same,
            quantize=Quantize(policy),
        ),
    )
    assert type(lm.layers[0].mlp.down_proj).__name__ == ("Linear8bitLt" if int8 else "Linear4bit")
    found, wanted = logits(lm.model), logits(whole)
    assert float((found - wanted).norm() / wanted.norm()) < error
    with steered(lm, torch.ones(128), 5.0, layer=1):
        changed = logits(lm.model)
    assert torch.isfinite(changed).all()
    assert not torch.allclose(changed, found)


def test_an_attention_that_a_model_lacks_says_which_to_type(saved):
    folder, _ = saved("gemma2")
    with pytest.raises(UserError, match=r"dtype\.attention=sdpa\. Type dtype\.attention=eager\.$"):
        load(folder)


def test_bitsandbytes_that_is_not_there_is_asked_for(saved, monkeypatch):
    folder, _ = saved("gemma3")

    def absent(*_arguments, **_named):
        raise ImportError("Using `bitsandbytes` 8-bit quantization requires bitsandbytes")

    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer.validate_environment", absent)
    with pytest.raises(UserError, match=r"dtype=int8 needs bitsandbytes: type pip install 'truthsteer\[quantized\]'"):
        load(folder, DtypeConfig("int8", Weights.fp16, Residual.fp32, quantize=Quantize.int8))


def test_a_layer_that_rests_elsewhere_is_steered_where_it_computes(saved, tmp_path):
    """Weights on the disk, brought in layer by layer: the vector follows the layer's device, not its weights'."""
    from accelerate import disk_offload

    folder, whole = saved("gemma3")
    plain = LanguageModel(whole, load(folder).tokenizer)
    added = Injection(2, torch.randn(32, generator=torch.Generator().manual_seed(1)), 3.0)

    def last(lm: LanguageModel) -> torch.Tensor:
        with RowSteering(lm, [added], Add()) as steering, capture(lm, [3]) as taken:
            steering.assign(torch.zeros(2, dtype=torch.long))
            lm.forward(IDS)
        return taken[3]

    wanted = last(plain)
    model = build("gemma3")
    tokens = plain.tokenizer
    disk_offload(model.model.layers, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    lm = LanguageModel(model, tokens)
    assert next(lm.layers[2].parameters()).device.type == "meta"
    assert lm.layer_device(2) == torch.device("cpu")
    torch.testing.assert_close(last(lm), wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8"}, "dtype='fp8' is not one of fp32, bf16, fp16"),
        ({"dtype": "fp16", "residual": "fp64"}, "residual='fp64' is not one of same, fp32"),
        ({"attention": "flash"}, "attention='flash' is not one of sdpa"),
        ({"quantize": "int2"}, "quantize='int2' is not one of none, int8, int4"),
        ({"device": "cuda:1"}, "device='cuda:1' is not one of auto"),
    ],
)
def test_an_option_that_does_not_exist_is_named_with_those_that_do(options, words):
    with pytest.raises(UserError, match=words):
        LanguageModel.load("organism", **options)


def test_a_tokenizer_without_pad_or_beginning_works(saved):
    folder, _ = saved("qwen2")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("pad_token", "bos_token"):
        config[name] = None
    path.write_text(json.dumps(config))
    lm = load(folder)
    assert lm.tokenizer.pad_token_id is None
    assert lm.tokenizer.bos_token_id is None
    ids, mask = lm.pad([[5, 6, 7], [8]], left=True)
    together = lm.logits(lm.forward(ids, mask=mask))[1, -1]
    alone = lm.logits(lm.forward(torch.tensor([[8]])))[0, -1]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "llama"])
def test_a_tokenizer_that_is_not_there_is_named(tmp_path, family):
    """transformers makes an empty one, of one token or five."""
    build(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.*tokenizer\.json") as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_needs_a_package_asks_for_it(saved, monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError("needs sentencepiece\n and more")

    folder, _ = saved("qwen2")
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lacking)
    with pytest.raises(UserError, match=r"The tokenizer of .*: needs sentencepiece Install what is missing") as refused:
        load(folder, DtypeConfig("int8", Weights.fp16, Residual.fp32, quantize=Quantize.int8))
    assert "bitsandbytes" not in str(refused.value)


def test_a_layer_too_narrow_for_4_bits_is_one_sentence(saved):
    pytest.importorskip("bitsandbytes")
    folder, _ = saved("gemma3")
    with pytest.raises(UserError, match=r"saved cannot compute with dtype=int4 on cpu: .*\. Type dtype=bf16\."):
        load(folder, DtypeConfig("int4", Weights.bf16, quantize=Quantize.int4))


def test_a_download_that_broke_off_is_named(saved):
    folder, _ = saved("qwen2")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for kept in (len(whole) // 2, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="cannot be loaded: a file of its weights is damaged or not whole"):
            load(folder)


def test_a_config_that_disagrees_with_the_weights_is_named(saved):
    folder, _ = saved("qwen2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 80}))
    with pytest.raises(UserError, match=r"its config\.json and its weights disagree about sizes"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_config_that_is_none_is_named(saved, text):
    folder, _ = saved("qwen2")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not the config\.json of a language model"):
        resolve(ModelConfig("saved", path=str(folder)))
