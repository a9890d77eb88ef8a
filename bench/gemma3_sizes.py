"""The exact Gemma 3 sizes with random weights: what benches measure where no checkpoint is to be had."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

FAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131072, "vocab_size": 262208}
NEAR = {"max_position_embeddings": 32768, "vocab_size": 262144}
SIZES: dict[str, dict[str, Any]] = {
    # hidden, layers, heads, key-value heads, head dimension, intermediate, window, query scale
    "270m": {**NEAR, "sizes": (640, 18, 4, 1, 256, 2048, 512, 256)},
    "1b": {**NEAR, "sizes": (1152, 26, 4, 1, 256, 6912, 512, 256)},
    "4b": {**FAR, "sizes": (2560, 34, 8, 4, 256, 10240, 1024, 256)},
    "12b": {**FAR, "sizes": (3840, 48, 16, 8, 256, 15360, 1024, 256)},
    "27b": {**FAR, "sizes": (5376, 62, 32, 16, 128, 21504, 1024, 168)},
}
MASSIVE = (3,)
"""Channels of the residual stream that are made massive."""
NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "sliding_window",
    "query_pre_attn_scalar",
)


def config(size: str, layers: int | None = None) -> Gemma3TextConfig:
    """The text model's config, cut after `layers` if given."""
    fields = dict(SIZES[size])
    fields |= zip(NAMES, fields.pop("sizes"), strict=True)
    if layers is not None:
        fields["num_hidden_layers"] = layers
    return Gemma3TextConfig(**fields)


@torch.no_grad()
def random_model(
    size: str, dtype: torch.dtype, device: str, layers: int | None = None, massive: float = 0.0, seed: int = 0
) -> Gemma3ForCausalLM:
    """A model with the same weights (those of a bf16 checkpoint) under every dtype.

    Args:
        size: a key of `SIZES`.
        dtype: of the weights.
        device: where they are made.
        layers: number of decoder layers; the real one by default.
        massive: weight of one channel in the norm after each MLP, growing with depth, whose row of the MLP's last matrix
            is larger than the others, as in checkpoints with massive activations. 0: none.
        seed: of the weights.
    """
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config(size, layers)).to(dtype)
    model.to_empty(device=device)
    for buffers in (model.model.rotary_emb, model.model.embed_tokens):
        fresh = type(buffers)(model.config) if buffers is model.model.rotary_emb else None
        for name, buffer in buffers.named_buffers():
            value = getattr(fresh, name) if fresh is not None else torch.tensor(model.config.hidden_size**0.5)
            buffer.copy_(value.to(buffer.dtype))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(device).manual_seed(seed * 10_007 + index)
        values = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim == 1:
            values = values * 0.3 + (2.0 if "post" in name else 0.0)
        elif "embed" in name:
            values *= 0.05
        else:
            values *= parameter.shape[-1] ** -0.5
        parameter.copy_(values.bfloat16().to(dtype))
    for index, layer in enumerate(model.model.layers):
        for channel in MASSIVE:
            share = (index + 1) / len(model.model.layers)
            if massive:
                layer.mlp.down_proj.weight[channel] *= 8
            layer.post_feedforward_layernorm.weight[channel] = torch.tensor(massive * share).bfloat16().to(dtype)
    return model.eval().requires_grad_(False)
