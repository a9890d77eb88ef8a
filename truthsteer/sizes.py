"""How large a model is: from the config alone, from a checkpoint's config.json, or after a cut to its first layers.

Counts parameters, not bytes: number formats are `memory`'s. It reads no weights, and imports transformers only where a
config.json has to be understood.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from truthsteer.config import Shape


@dataclass(frozen=True)
class Sizes:
    """What is loaded of a model: of a multimodal Gemma 3 the text model alone."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    embedding: int
    """Parameters of the embedding."""
    head: int
    """Parameters of the head; 0 if it is the embedding's own matrix."""
    layer: int
    """Parameters of one decoder layer, on average."""
    linear: int
    """Those of `layer` that are matrices of linear layers: what 8 or 4 bits shrink."""
    rest: int
    """All other parameters, such as the final norm."""

    @property
    def parameters(self) -> int:
        """All of them; a tied head counts once."""
        return self.embedding + self.head + self.num_layers * self.layer + self.rest

    def first_layers(self, depth: int | None) -> Sizes:
        """The same model, cut after `depth` decoder layers."""
        return self if depth is None else replace(self, num_layers=min(depth, self.num_layers))


def of_shape(shape: Shape) -> Sizes | None:
    """The sizes that a config states; None where it leaves some to the checkpoint."""
    if any(getattr(shape, item.name) is None for item in fields(shape)):
        return None
    known: dict[str, Any] = {item.name: getattr(shape, item.name) for item in fields(shape)}
    parameters, tied = known.pop("parameters"), known.pop("tied_head")
    embedding = shape.vocab_size * shape.hidden_size  # type: ignore[operator]  # None was ruled out
    head, rest = (0 if tied else embedding), known["hidden_size"]  # the final norm
    layer = (parameters - embedding - head - rest) // known["num_layers"]
    attention = 2 * (known["num_heads"] + known["num_kv_heads"]) * known["head_dim"]
    linear = known["hidden_size"] * (attention + 3 * known["intermediate_size"])
    return Sizes(**known, embedding=embedding, head=head, layer=layer, linear=min(linear, layer), rest=rest)


def of_checkpoint(location: str, commit: str | None = None, trust_remote_code: bool = False) -> Sizes | None:
    """The sizes of a checkpoint, from its config.json alone: the model is built without memory.

    Args:
        location: folder, or hub id whose config.json is in the local cache (or can be had).
        commit: of the hub.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        None where transformers cannot make a model of it (loading says why), or where its weights are quantised: their
        formats are not counted here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from truthsteer.loading import text_part

    try:
        config = AutoConfig.from_pretrained(location, revision=commit, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return None
        kind, architecture, _ = text_part(config)
        with torch.device("meta"):
            if kind is AutoModelForCausalLM:
                model = kind.from_config(architecture, trust_remote_code=trust_remote_code)
            else:
                model = kind(architecture)
        return of_model(model)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError, RuntimeError):
        return None


def of_model(model: Any) -> Sizes:
    """The sizes of a model of transformers, with or without memory behind its weights."""
    from torch import nn

    text, layers = model.config.get_text_config(), model.get_decoder().layers
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    inside = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    of_layers = sum(parameter.numel() for parameter in layers.parameters())
    own_head = 0 if head is embedding else head.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(
        num_layers=len(layers),
        hidden_size=text.hidden_size,
        intermediate_size=max(max(linear.in_features, linear.out_features) for linear in inside),
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        embedding=embedding.numel(),
        head=own_head,
        layer=of_layers // len(layers),
        linear=sum(linear.weight.numel() for linear in inside) // len(layers),
        rest=total - embedding.numel() - own_head - of_layers // len(layers) * len(layers),
    )
