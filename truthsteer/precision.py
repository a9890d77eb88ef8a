"""A numeric policy applied to a model: number formats of weights, products and residual stream, and what the hardware lacks.

Gemma 3's residual stream passes 65504, float16's largest number, while its matrix products stay far below it
(huggingface/transformers#37226); a float32 residual stream under 16-bit weights is therefore all that fp16 needs. It
knows models by their decoder's module names, and no questions, conditions or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from truthsteer.config import DtypeConfig, Matmul, Residual, Weights
from truthsteer.errors import UserError

DTYPES = {Weights.fp32: torch.float32, Weights.bf16: torch.bfloat16, Weights.fp16: torch.float16}

FP16_CAPABILITY = (5, 3)
"""The oldest CUDA compute capability with fp16 arithmetic."""
BF16_CAPABILITY = (8, 0)
"""The oldest with bf16 arithmetic."""


def set_precision(policy: DtypeConfig) -> None:
    """How this process multiplies: float32 as the policy says, and no 16-bit sums inside a 16-bit product."""
    torch.set_float32_matmul_precision("highest" if policy.matmul is Matmul.highest else "high")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def check_hardware(policy: DtypeConfig, device: torch.device) -> list[str]:
    """What the policy costs on this device more than one would think, a sentence each.

    Raises:
        UserError: the device cannot compute in the policy's format.
    """
    if device.type == "cuda":
        found = [caution for index in range(torch.cuda.device_count()) for caution in _check_gpu(policy, index)]
        return list(dict.fromkeys(found))
    if device.type == "mps" and policy.weights is Weights.bf16:
        try:
            torch.zeros(1, dtype=torch.bfloat16, device=device)
        except (TypeError, RuntimeError) as error:
            raise UserError("MPS computes no bf16 on this version of macOS. Type dtype=fp16, or dtype=fp32.") from error
    if device.type == "cpu" and policy.weights is not Weights.fp32 and not _cpu_computes(policy.weights):
        return [
            f"This CPU has no {policy.weights.value} arithmetic of its own, so that dtype={policy.name} is slow here: "
            "dtype=fp32 is faster if it fits."
        ]
    return []


def _check_gpu(policy: DtypeConfig, index: int) -> list[str]:
    name = torch.cuda.get_device_name(index)
    if policy.weights is Weights.fp16 and torch.cuda.get_device_capability(index) < FP16_CAPABILITY:
        raise UserError(f"The GPU {name} computes no fp16. Type dtype=fp32, or device=cpu.")
    if policy.weights is Weights.bf16 and not bf16_native(index):
        if not torch.cuda.is_bf16_supported(including_emulation=True):
            raise UserError(
                f"The GPU {name} computes no bf16. Type dtype=fp16, which keeps the residual stream in fp32."
            )
        return [
            f"The GPU {name} only emulates bf16, several times slower than fp16: dtype=fp16, which keeps the residual "
            "stream in fp32, is as safe and faster here."
        ]
    return []


def bf16_native(index: int) -> bool:
    """Whether a GPU has bf16 arithmetic of its own."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(index) >= BF16_CAPABILITY


def _cpu_computes(weights: Weights) -> bool:
    """Whether the CPU has instructions for it, rather than conversions to float32 and back."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    probe = {Weights.bf16: "_is_mkldnn_bf16_supported", Weights.fp16: "_is_mkldnn_fp16_supported"}[weights]
    found: Callable[[], bool] | None = getattr(torch.ops.mkldnn, probe, None)
    return True if found is None else bool(found())


def apply(model: Any, policy: DtypeConfig) -> None:
    """Make a loaded model compute as the policy says, for good."""
    set_precision(policy)
    if policy.residual is Residual.fp32:
        keep_residual_fp32(model, DTYPES[policy.weights])


def check_weights(model: nn.Module, policy: DtypeConfig, location: str) -> None:
    """Raise unless every weight is finite in the policy's format.

    Raises:
        UserError: a weight was damaged in the file, or passes the largest number of the format.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel() or parameter.is_meta:
            continue
        low, high = (float(value) for value in parameter.detach().aminmax())
        if low != low or high != high:
            raise UserError(
                f"Weight {name} of {location} holds numbers that are not finite (NaN): the checkpoint is damaged, and no "
                "dtype mends it. Download or save it again."
            )
        if max(-low, high) == float("inf"):
            cause = (
                "it passes 65504, the largest fp16 number, or the checkpoint is damaged. Type dtype=bf16, which tells the "
                "two apart"
                if policy.weights is Weights.fp16
                else "the checkpoint is damaged, and no dtype mends it. Download or save it again"
            )
            raise UserError(f"Weight {name} of {location} is infinite as {policy.weights.value}: {cause}.")


def keep_residual_fp32(model: Any, weights: torch.dtype = torch.float16) -> None:
    """16-bit weights and matrix products on a float32 residual stream, for good, by hooks alone.

    The embedding's output and each sublayer's output become float32, so that the embedding's scale (Gemma 2 and 3), norms
    and residual adds run in float32; every linear layer casts its input to `weights`. A value too large for it becomes
    infinite and is counted as any other non-finite value, never clamped. Keys and values stay in `weights`. Gradients pass
    through.

    Raises:
        UserError: the model is not built as Gemma, Qwen or Llama are.
    """
    decoder = model.get_decoder()
    outputs = [name for name, _ in decoder.named_modules() if name.endswith((".o_proj", ".down_proj"))]
    if len(outputs) != 2 * len(decoder.layers) or not hasattr(decoder, "rotary_emb"):
        raise UserError(
            f"{type(model).__name__} is not built as Gemma, Qwen or Llama are, so dtype=fp16 cannot keep its residual "
            "stream in float32. Type dtype=bf16."
        )

    def lower(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].to(weights), *inputs[1:])

    def raise_(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return _cast(output, torch.float32)

    decoder.embed_tokens.register_forward_hook(raise_)
    _scale_afterwards(decoder.embed_tokens)
    # Queries and keys are rotated in the format of the values, or attention would see two formats.
    decoder.rotary_emb.register_forward_hook(lambda _module, _inputs, output: _cast(output, weights))
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lower)
            if name.rsplit(".", 1)[-1] in ("o_proj", "down_proj"):
                module.register_forward_hook(raise_)
    model.get_output_embeddings().register_forward_pre_hook(lower)


def _scale_afterwards(embedding: Any) -> None:
    """Multiply the embedding by its scale, where it has one, in the format that its output has by then."""
    if hasattr(embedding, "scalar_embed_scale"):
        scale = float(embedding.scalar_embed_scale)
        embedding.embed_scale.fill_(1.0)
        embedding.register_forward_hook(lambda _module, _inputs, output: output * scale)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
