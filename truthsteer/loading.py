"""A checkpoint into memory: only the parts that are needed, in the policy's format, with no weight left to chance.

Of a multimodal Gemma 3 only the text model is loaded; of any model only the first `depth` layers, if no more are read.
It knows nothing of steering.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM
from transformers.utils import logging as transformers_logging

from truthsteer.checkpoint import Checkpoint
from truthsteer.config import DtypeConfig, ModelConfig, Quantize
from truthsteer.errors import UserError
from truthsteer.precision import DTYPES, apply, check_hardware, check_weights

FAULTS = (OSError, ValueError, RuntimeError, SafetensorError)
"""What transformers raises for files that are missing, broken or no model."""

BYTES = 256
"""A tokenizer that can write any text has no fewer tokens."""

TEXT_PARTS = {
    # Both layouts there are: the hub's, and the one in which transformers 5 names the modules.
    "gemma3": (
        Gemma3ForCausalLM,
        {
            r"^(model\.)?language_model\.(?!lm_head)(model\.)?": "model.",
            r"^language_model\.lm_head": "lm_head",
        },
    )
}
"""Multimodal architecture -> the class of its text model, and where that finds its weights (as regular expressions)."""


def load(
    config: ModelConfig,
    policy: DtypeConfig,
    device: torch.device,
    checkpoint: Checkpoint,
    depth: int | None = None,
) -> tuple[Any, Any, list[str]]:
    """The model, its tokenizer, and what the hardware makes of the policy (`precision.check_hardware`).

    Args:
        config: which checkpoint, and whether its own code may run.
        policy: number formats.
        device: where to; all GPUs share the layers if there are several.
        checkpoint: `config` pinned down.
        depth: load the first `depth` layers only.

    Raises:
        UserError: nothing there, or weights that are missing or not finite, or a format that the device cannot compute in.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    cautions = check_hardware(policy, device)
    many = device.type == "cuda" and torch.cuda.device_count() > 1
    where = {"revision": checkpoint.commit, "trust_remote_code": config.trust_remote_code}
    direct = device.type == "cuda" or policy.quantize is not Quantize.none  # never whole in the computer's memory
    location = checkpoint.location
    tokenizer = _tokenizer(location, where)
    try:
        architecture = AutoConfig.from_pretrained(location, **where)
        kind, architecture, renamed = text_part(architecture)
        loaded: Any = kind.from_pretrained(
            location,
            config=first_layers(architecture, depth),
            dtype=DTYPES[policy.weights],
            attn_implementation=policy.attention.value,
            device_map="auto" if many else {"": device} if direct else None,
            quantization_config=_quantization(policy),
            output_loading_info=True,
            use_safetensors=True,
            **({"key_mapping": renamed} if renamed else {}),
            **where,
        )
    except ImportError as error:
        raise UserError(_not_installed(error, policy)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{location} does not fit into the memory of {device} as {policy.name}. Type dtype=int8 or dtype=int4, use more "
            "GPUs, or a smaller model."
        ) from error
    except FAULTS as error:
        first = _first_line(error)
        if "attn_implementation" in first:
            raise UserError(
                f"{location} cannot be computed with dtype.attention={policy.attention.value}. Type dtype.attention=eager."
            ) from error
        raise UserError(
            f"{location} cannot be loaded: {first} Check model.id or model.path; weights must be safetensors, with the "
            "tokenizer beside them."
        ) from error
    model, report = loaded
    _check_tokenizer(tokenizer, model, location)
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise UserError(
            f"{location} lacks {len(names)} weight{'s' * (len(names) > 1)} of {type(model).__name__}, {names[0]} for one: "
            "random numbers would stand there. "
            "Check that model.path holds the whole checkpoint of this architecture."
        )
    check_weights(model, policy, location)
    if not (many or direct):
        model.to(device)
    apply(model, policy)
    return model, tokenizer, cautions


def _tokenizer(location: str, where: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(location, **where)
    except ImportError as error:
        raise UserError(
            f"The tokenizer of {location} cannot be loaded: {_first_line(error)} Install what is missing, or put a "
            "tokenizer.json beside the weights."
        ) from error
    except FAULTS as error:
        raise UserError(
            f"{location} cannot be loaded: its tokenizer: {_first_line(error)} Check model.id or model.path; the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) must be there."
        ) from error


def _check_tokenizer(tokenizer: Any, model: Any, location: str) -> None:
    """Where its files are missing, transformers makes an empty one, with less than the bytes."""
    tokens, vocabulary = len(tokenizer), model.config.get_text_config().vocab_size
    if tokens < min(BYTES, vocabulary):
        raise UserError(
            f"The tokenizer of {location} knows {tokens} tokens, and the model has {vocabulary}: its files are missing or "
            "another model's. Put tokenizer.json and tokenizer_config.json beside the weights."
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "its config.json and its weights disagree about sizes."
    if isinstance(error, SafetensorError):
        return f"a file of its weights is damaged or not whole ({text})."
    return text.splitlines()[0] if text else type(error).__name__


def text_part(config: Any) -> tuple[Any, Any, dict[str, str]]:
    """The class to load, its config, and how weights are renamed: the text model's alone, where it can stand alone."""
    if config.model_type in TEXT_PARTS:
        kind, renamed = TEXT_PARTS[config.model_type]
        text = config.get_text_config()
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            if getattr(text, name, None) is None:
                setattr(text, name, getattr(config, name, None))
        return kind, text, renamed
    return AutoModelForCausalLM, config, {}


def first_layers(config: Any, depth: int | None) -> Any:
    """The config of the same model, cut after `depth` decoder layers."""
    if depth is None:
        return config
    cut = deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = min(depth, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return cut


def _quantization(policy: DtypeConfig) -> Any:
    if policy.quantize is Quantize.none:
        return None
    from transformers import BitsAndBytesConfig

    if policy.quantize is Quantize.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[policy.weights]
    )


def _not_installed(error: ImportError, policy: DtypeConfig) -> str:
    reason = str(error).strip().splitlines()[0]
    if policy.quantize is not Quantize.none:
        return (
            f"{reason} dtype={policy.name} needs bitsandbytes: type pip install 'truthsteer[quantized]', or dtype=bf16."
        )
    return f"{reason.rstrip('.!')}. Type dtype.attention=sdpa, or install what is missing."
