"""What must hold if a model's numbers are to be trusted beyond being finite, each as a check with its value and bound.

Broken copies between GPUs, positions that padding shifts and fast kernels that are wrong give finite numbers. A check that
cannot be made says why, and has passed neither way. It knows readings and hidden states, not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from truthsteer.config import DtypeConfig, Matmul, Quantize
from truthsteer.reading import Reading

ROUNDING = 8.0
"""Two ways to compute the same may differ by this many machine epsilons times the square root of the depth."""

LOOSEST, TIGHTEST = 0.25, 1e-4
"""Bounds for such differences, whatever the depth and the format: what is computed wrongly is off by more."""

REFERENCE_BOUND = 0.25
"""Relative error against fp32 above which a 16-bit format is called wrong."""

COPY_ELEMENTS, COPY_TRIES = 1 << 20, 4

Rows = Sequence[Sequence[int]]


def _check(name: str, meaning: str, passed: bool | None, value: float | None, bound: float | None) -> dict[str, Any]:
    return {"name": name, "passed": passed, "value": value, "bound": bound, "meaning": meaning}


def handover(reading: Reading) -> dict[str, Any]:
    """Nothing happens to the residual stream between two layers, on whatever devices they are."""
    layers = list(reading.altered)
    where = f" Not so at layers {layers}: moving numbers between devices breaks them." if layers else ""
    meaning = f"Each layer is given, bit for bit, what the layer before put out.{where}"
    return _check("handover", meaning, not layers, float(len(layers)), 0.0)


def gpu_copies(reading: Reading) -> dict[str, Any]:
    """Between all GPUs that the model stands on."""
    devices = sorted({point.device for point in reading.points if point.device.startswith("cuda")})
    meaning = "A copy from each GPU to each other arrives, bit for bit."
    if len(devices) < 2:
        return _check("gpu_copies", f"{meaning} One device only: nothing to copy.", None, None, 0.0)
    wrong = copies_that_differ(devices)
    pairs = f" Not so: {', '.join(f'{a} to {b}' for a, b in wrong)}. This machine is broken." if wrong else ""
    return _check("gpu_copies", meaning + pairs, not wrong, float(len(wrong)), 0.0)


def copies_that_differ(
    devices: Sequence[str], copy: Callable[[Tensor, str], Tensor] = lambda value, device: value.to(device)
) -> list[tuple[str, str]]:
    """Ordered pairs of devices between which a direct copy arrives changed, compared through the host.

    Some machines report peer access and copy zeros (huggingface/accelerate#4036, turboderp-org/exllamav3#333).
    """
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for source in devices:
        host = torch.randint(-(2**15), 2**15, (COPY_ELEMENTS,), dtype=torch.int16, generator=generator)
        value = host.to(source)
        for target in devices:
            if source != target and any(not _arrives(host, copy(value, target), source) for _ in range(COPY_TRIES)):
                wrong.append((source, target))
    return wrong


def _arrives(host: Tensor, arrived: Tensor, source: str) -> bool:
    for device in (torch.device(source), arrived.device):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return torch.equal(arrived.cpu(), host)


def bos_agreement(rows: Rows, reading: Reading, policy: DtypeConfig) -> dict[str, Any]:
    """The first token sees nothing but itself: its activations are the same in every text."""
    name, bound = "bos_agreement", rounding(policy, len(reading.starts))
    meaning = "The first token's residual stream is the same in every text, in every layer."
    if len({row[0] for row in rows}) > 1:
        return _check(name, f"{meaning} These texts begin with different tokens.", None, None, bound)
    starts = reading.starts.double()  # [layers, batch, hidden]
    finite = torch.isfinite(starts).all(-1)  # [layers, batch]
    own = [0 in tokens for tokens in reading.offending()]  # elsewhere NaN began at a later token, and spread
    lost = [bool(own[row] and not finite[:, row].all()) for row in range(len(rows))]
    if any(lost) and not all(lost):
        return _check(name, f"{meaning} In some texts it is not finite, in others it is.", False, None, bound)
    usable = starts[finite.all(1)]
    if not len(usable):
        return _check(name, f"{meaning} It is not finite.", None, None, bound)
    gaps = (usable - usable[:, :1]).norm(dim=-1) / usable[:, :1].norm(dim=-1).clamp(min=1e-30)
    value = float(gaps.max())
    return _check(name, meaning, value <= bound, value, bound)


def bos_once(rows: Rows, tokenizer: Any) -> dict[str, Any]:
    """A tokenizer without such a token, or one that does not put it there itself, is said and not failed."""
    name = "bos_once"
    bos = tokenizer.bos_token_id
    meaning = "Each text begins with the beginning-of-sequence token, once."
    if bos is None:
        return _check(name, "The tokenizer has no beginning-of-sequence token.", None, None, 0.0)
    adds = bos in tokenizer("a").input_ids[:1]
    ends = bos == tokenizer.eos_token_id
    wrong = sum(
        (adds and row[0] != bos) or tuple(row[:2]) == (bos, bos) or (not ends and bos in row[1:]) for row in rows
    )
    if not adds and not wrong:
        return _check(name, "The tokenizer puts no beginning-of-sequence token before a text.", None, 0.0, 0.0)
    return _check(name, meaning, not wrong, float(wrong), 0.0)


def rounding(policy: DtypeConfig, depth: int) -> float:
    """How far two ways to compute the same hidden states may be apart, relative, in a format and at a depth."""
    epsilon = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}[policy.weights.value]
    if policy.matmul is Matmul.high:  # TF32 has 10 bits of mantissa
        epsilon = max(epsilon, 2.0**-10)
    return min(LOOSEST, max(TIGHTEST, ROUNDING * epsilon * math.sqrt(depth)))


def padding_sides(right: Reading, left: Reading, hidden: Tensor, other: Tensor, policy: DtypeConfig) -> dict[str, Any]:
    """Extraction pads on the right and generation on the left: positions and masks must make up for it.

    Args:
        right: the right-padded pass.
        left: the left-padded pass of the same texts.
        hidden: final hidden states of the first, [batch, tokens, hidden].
        other: those of the second.
        policy: whose rounding is allowed for.
    """
    name, bound = "padding_sides", rounding(policy, len(right.starts))
    meaning = "Hidden states are the same with padding on the right and on the left, but for rounding."
    a = hidden[right.real.to(hidden.device)].cpu().double()  # [real tokens, hidden]
    b = other[left.real.to(other.device)].cpu().double()
    finite = bool(torch.isfinite(a).all()), bool(torch.isfinite(b).all())
    if finite[0] != finite[1]:
        return _check(name, f"{meaning} They are finite on one side only.", False, None, bound)
    if not all(finite):
        return _check(name, f"{meaning} They are not finite on either side.", None, None, bound)
    value = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return _check(name, meaning, value <= bound, value, bound)


def padding_finite(readings: Sequence[Reading]) -> dict[str, Any]:
    """Some attention kernels give NaN where a padding row may look at nothing (unslothai/unsloth#9848)."""
    pads = sum(int((~reading.real).sum()) for reading in readings)
    bad = sum(int((reading.bad.any(0) & ~reading.real).sum()) for reading in readings)
    real = any(bool((reading.bad & reading.real).any()) for reading in readings)
    meaning = "Numbers at padding are finite, too: attention multiplies them by 0, and 0 times NaN is NaN."
    if not pads:
        return _check("padding_finite", "No text is padded.", None, None, 0.0)
    passed = None if bad and real else not bad
    return _check("padding_finite", meaning, passed, bad / pads, 0.0)


def reference(compared: dict[str, Any], policy: DtypeConfig) -> dict[str, Any]:
    """Fast kernels can be finite and wrong (sgl-project/sglang#27540)."""
    values = [*compared["layers"], *compared["layers_without_massive"]]
    meaning = "The residual stream follows that of the same model in fp32."
    if policy.quantize is not Quantize.none:
        return _check("reference", f"{meaning} A quantised model is another model.", None, compared["largest"], None)
    if None in values:
        return _check("reference", f"{meaning} It is not finite.", None, None, REFERENCE_BOUND)
    value = max(values)
    return _check("reference", meaning, value <= REFERENCE_BOUND, value, REFERENCE_BOUND)
