"""Every size that conf/model names, built without memory from its checkpoint's config.json: what is steered, read and cast
in the tiny models of the other tests is there in the real ones, under the same names and with the expected sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from omegaconf import OmegaConf
from real_configs import CONFIGS, GEMMA3, GEMMA3_SHAPES, PARAMETERS, TEXT_PARAMETERS
from transformers import AutoConfig, AutoModelForCausalLM

from truthsteer.config import DtypeConfig, Residual, Weights
from truthsteer.hooks import capture, steered
from truthsteer.loading import first_layers, text_part
from truthsteer.model import LanguageModel
from truthsteer.precision import apply

SIZES = tuple(CONFIGS)
MULTIMODAL = ("gemma3_4b", "gemma3_12b", "gemma3_27b")
FP16 = DtypeConfig("fp16", Weights.fp16, Residual.fp32)
BF16 = DtypeConfig("bf16", Weights.bf16)
LAYER = {"gemma3": "Gemma3DecoderLayer", "gemma2": "Gemma2DecoderLayer", "qwen2_5": "Qwen2DecoderLayer"}
NORMS = {
    "gemma": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "qwen2": ("input_layernorm", "post_attention_layernorm"),
}


def family(size: str) -> str:
    return next(name for name in LAYER if size.startswith(name))


def yaml(size: str) -> Any:
    """The model's own keys in its YAML, whether the file speaks of the model only or of the whole config."""
    found = OmegaConf.load(REPO / "conf" / "model" / f"{size}.yaml")
    return found.model if "model" in found else found


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Any]:
    """The config as transformers reads it from a checkpoint's folder."""

    def from_folder(size: str) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[size]))
        return AutoConfig.from_pretrained(tmp_path)

    return from_folder


def on_meta(config: Any, dtype: torch.dtype = torch.bfloat16, depth: int | None = None) -> Any:
    """The model that `loading.load` would fill, without its weights."""
    kind, architecture, _ = text_part(config)
    architecture = first_layers(architecture, depth)
    with torch.device("meta"):
        return (kind.from_config if kind is AutoModelForCausalLM else kind)(architecture).to(dtype)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_of_the_configuration_has_its_config_here():
    named = {path.stem.removesuffix("_pt") for path in (REPO / "conf" / "model").glob("*.yaml")}
    assert named - {"hub", "local", "organism"} == set(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_the_shape_in_the_yaml_is_the_checkpoint_s(size, read):
    """The plan and its estimate of memory rest on it, before the checkpoint is there."""
    config = read(size)
    text = config.get_text_config()
    assert dict(yaml(size).shape) == {
        "parameters": parameters(on_meta(config)),
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "vocab_size": text.vocab_size,
        "tied_head": text.tie_word_embeddings,
    }


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_has_as_many_parameters_as_the_hub_counts(size, read):
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(read(size))
    assert parameters(whole) == PARAMETERS[size]


@pytest.mark.parametrize("size", GEMMA3)
def test_gemma_3_is_understood_as_it_was_trained(size, read):
    """Its larger config.json leave most to defaults, and state rotary embeddings in an older form."""
    config = read(size)
    text = text_part(config)[1]
    assert (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
        text.intermediate_size,
        text.vocab_size,
        text.sliding_window,
        text.query_pre_attn_scalar,
        text.max_position_embeddings,
    ) == GEMMA3_SHAPES[size]
    full = [layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention"]
    assert full == list(range(5, text.num_hidden_layers, 6))
    assert set(text.layer_types) == {"full_attention", "sliding_attention"}
    assert text.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10_000}
    stretched = {"rope_type": "linear", "factor": 8.0} if size in MULTIMODAL else {"rope_type": "default"}
    assert text.rope_parameters["full_attention"] == {**stretched, "rope_theta": 1_000_000}
    assert text.attn_logit_softcapping is None
    assert text.final_logit_softcapping is None
    assert text.tie_word_embeddings


@pytest.mark.parametrize("size", GEMMA3)
def test_of_gemma_3_the_text_part_is_loaded_whole_and_nothing_else(size, read):
    config = read(size)
    model = on_meta(config)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert parameters(model) == TEXT_PARAMETERS[size]
    assert not [name for name, _ in model.named_modules() if "vision" in name or "projector" in name]
    scale = model.get_input_embeddings().scalar_embed_scale
    assert scale == pytest.approx(config.get_text_config().hidden_size ** 0.5)
    rounded = {"gemma3_270m": 25.25, "gemma3_1b": 34, "gemma3_4b": 50.5, "gemma3_12b": 62, "gemma3_27b": 73.5}
    assert float(torch.tensor(scale, dtype=torch.bfloat16)) == rounded[size]


@pytest.mark.parametrize("size", MULTIMODAL)
def test_the_layers_of_a_whole_multimodal_model_are_the_language_model_s(size, read):
    """A vision tower has layers too, and they come first."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(read(size))
    layers = whole.get_decoder().layers
    assert layers is whole.model.language_model.layers
    assert {type(layer).__name__ for layer in layers} == {LAYER["gemma3"]}
    assert len(layers) == GEMMA3_SHAPES[size][0]
    assert len(whole.model.vision_tower.encoder.layers) == 27


@pytest.mark.parametrize("size", SIZES)
def test_every_module_that_is_hooked_is_there(size, read):
    model = on_meta(read(size))
    decoder = model.get_decoder()
    assert isinstance(decoder.layers, torch.nn.ModuleList)
    assert len(decoder.layers) == yaml(size).shape.num_layers
    width, linear = yaml(size).shape.hidden_size, torch.nn.Linear
    assert decoder.embed_tokens is model.get_input_embeddings()
    assert decoder.embed_tokens.weight.shape[1] == width
    assert isinstance(decoder.rotary_emb, torch.nn.Module)
    assert isinstance(decoder.norm, torch.nn.Module)
    assert isinstance(model.get_output_embeddings(), linear)
    for layer in decoder.layers:
        assert type(layer).__name__ == LAYER[family(size)]
        assert isinstance(layer.self_attn.o_proj, linear)
        assert isinstance(layer.mlp.down_proj, linear)
        assert layer.self_attn.o_proj.out_features == layer.mlp.down_proj.out_features == width
        for name in NORMS["qwen2" if size.startswith("qwen2") else "gemma"]:
            assert getattr(layer, name).weight.shape == (width,)


@pytest.mark.parametrize(("size", "policy"), [*((size, FP16) for size in SIZES), *((size, BF16) for size in GEMMA3)])
def test_a_steered_pass_has_the_sizes_and_number_formats_of_the_policy(size, policy, read, tokenizer, monkeypatch):
    """Without weights there are no numbers, but shapes and formats are exact: this is where a cast would be missing."""
    monkeypatch.setattr(LanguageModel, "_check_head", lambda self: None)  # it compares numbers
    fp16 = policy is FP16
    model = on_meta(read(size), torch.float16 if fp16 else torch.bfloat16)
    apply(model, policy)
    lm = LanguageModel(model, tokenizer)
    shape = yaml(size).shape
    assert (lm.num_layers, lm.hidden_size) == (shape.num_layers, shape.hidden_size)
    stream = torch.float32 if fp16 else torch.bfloat16
    layer, last = yaml(size).layer, lm.num_layers - 1
    products, sums = watched(model)
    ids, cache = torch.zeros(2, 5, dtype=torch.long, device="meta"), lm.new_cache()
    with steered(lm, torch.ones(lm.hidden_size), 1.0, layer), capture(lm, [0, layer, last]) as taken:
        hidden = lm.forward(ids, cache=cache)
    assert hidden is not None
    for tensor in (*taken.values(), hidden):
        assert tuple(tensor.shape) == (2, 5, shape.hidden_size)
        assert tensor.dtype == stream
    for keys in (cache.layers[0].keys, cache.layers[last].values):
        assert tuple(keys.shape) == (2, shape.num_kv_heads, 5, shape.head_dim)
        assert keys.dtype == (torch.float16 if fp16 else torch.bfloat16)
    logits = lm.logits(hidden[:, -1])
    assert tuple(logits.shape) == (2, read(size).get_text_config().vocab_size)
    assert logits.dtype == torch.float32
    assert len(products) == 7 * lm.num_layers + 1
    assert set(products.values()) == {torch.float16 if fp16 else torch.bfloat16}
    assert {name for name, dtype in sums.items() if dtype != stream} == set()


def watched(model: Any) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
    """The formats of what goes into every linear layer, and of what embedding and norms give: filled by the next pass."""
    products: dict[str, torch.dtype] = {}
    sums: dict[str, torch.dtype] = {}

    def entering(name: str) -> Callable[..., None]:
        return lambda module, inputs: products.update({name: inputs[0].dtype})

    def leaving(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: sums.update({name: output.dtype})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(entering(name))
        elif name.endswith(("norm", "embed_tokens")) and "self_attn" not in name:
            module.register_forward_hook(leaving(name))
    return products, sums


@pytest.mark.parametrize("size", SIZES)
def test_layers_that_are_not_read_cost_nothing(size, read):
    """Loading for extraction up to the default layer: so many parameters fewer, as a layer has."""
    config, depth = read(size), yaml(size).layer + 1
    whole, cut = on_meta(config), on_meta(config, depth=depth)
    layer = parameters(whole.get_decoder().layers[0])
    assert len(cut.get_decoder().layers) == depth
    assert parameters(whole) - parameters(cut) == (yaml(size).shape.num_layers - depth) * layer


@pytest.mark.parametrize("size", [size for size in SIZES if size.startswith("gemma2")])
def test_gemma_2_caps_its_logits_and_so_computes_attention_eagerly(size, read):
    config = read(size)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert OmegaConf.load(REPO / "conf" / "model" / f"{size}.yaml").dtype.attention == "eager"
    assert config.layer_types[:4] == ["sliding_attention", "full_attention"] * 2
