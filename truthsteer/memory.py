"""How much memory work on a model takes, from the config alone, and how much there is.

An upper bound: weights exactly; keys and values, and what one pass through the layers holds at once, from what the code
keeps alive and the longest text there may be. It knows no checkpoint beyond its `Sizes`. It does not know how a GPU's
allocator cuts its blocks, nor what other programs will take meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from truthsteer.config import Attention, Device, DtypeConfig, Quantize, Residual, Weights
from truthsteer.sizes import Sizes

GIB = 1 << 30
BYTES = {Weights.fp32: 4, Weights.bf16: 2, Weights.fp16: 2}
QUANTIZED_BYTES = {Quantize.int8: 1.0, Quantize.int4: 0.5625}
"""Per weight of a linear layer: 4 bits go with a float32 scale per block of 64 (NF4, arXiv:2305.14314)."""
LOGITS_AT_ONCE = 1 << 26
"""What `head` holds at once (256 MiB in float32)."""
PART, LOGITS_IN_CACHE = 4096, 1 << 22
"""On a CPU: words of the vocabulary that it multiplies at once, and logits that it holds then."""
LARGEST = 1024
"""`branching` cuts what shares a context and has more tokens, and repeats the context: all tokens of a row are compared."""
BEGINNINGS = 0.25
"""Of the slots of a batch, so many hold what prompts begin with, for the conditions that `decoding` takes together."""
SHORTEST_CONTEXT = 8
"""Tokens of the shortest question in its prompt, for how many answers are generated at once."""


class Work(Enum):
    """What is done with a model."""

    extract = "extract"
    score = "score"
    generate = "generate"
    train = "train"
    """Something small through the frozen model, with gradients from the lowest steered layer up."""
    judge = "judge"


@dataclass(frozen=True)
class Load:
    """One kind of work and what decides its size."""

    work: Work
    batch_tokens: int
    """Key-value slots filled at once; a text alone may fill more."""
    max_length: int
    """Longest text in tokens."""
    max_new_tokens: int = 0
    sampled: bool = False
    """Answers are drawn, not greedy: in float64 on the CPU."""
    pairs: int = 0
    """Answer pairs whose activations are kept, in the computer's memory."""
    lowest: int = 0
    """Lowest steered layer: what is below is computed once for all conditions."""
    depth: int | None = None
    """Layers that are computed, where the rest is not; None: all."""


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they hold, while the work is at its largest."""

    work: Work
    weights: int
    cache: int
    """Keys and values."""
    stream: int
    """The residual stream and its norms."""
    attention: int
    """Queries, repeated keys and values, and with eager attention its weights."""
    mlp: int
    logits: int
    kept: int
    """Activations kept: of every layer read, or for the gradient, with what is trained."""
    host: int
    """In the computer's memory wherever the model is."""

    @property
    def passing(self) -> int:
        """What each device that computes layers holds anew."""
        return self.stream + self.attention + self.mlp

    @property
    def total(self) -> int:
        """On one device, without `host`."""
        return self.weights + self.cache + self.passing + self.logits + self.kept


@dataclass(frozen=True)
class Available:
    """Free memory."""

    parts: tuple[int, ...]
    """Bytes on each GPU, or one number for the computer's memory."""
    gpu: bool
    mps: bool = False
    """An Apple GPU in that memory."""

    @property
    def parted(self) -> bool:
        """Whether the vocabulary is taken part by part there."""
        return not self.gpu and not self.mps

    @property
    def bytes(self) -> int:
        return sum(self.parts)

    @property
    def what(self) -> str:
        """Such as `2 GPUs`."""
        return f"{len(self.parts)} GPU{'s' * (len(self.parts) > 1)}" if self.gpu else "this machine's memory"


def estimate(sizes: Sizes, policy: DtypeConfig, load: Load, parted: bool = False) -> Estimate:
    """Memory at the peak of one kind of work.

    Args:
        sizes: of what is loaded, already cut to the layers that are.
        policy: number formats.
        load: the work.
        parted: whether the vocabulary is taken part by part, as on a CPU.
    """
    wide = BYTES[policy.weights]
    stream = 4 if policy.residual is Residual.fp32 else wide
    slots = max(load.batch_tokens, load.max_length)  # one text alone may exceed the budget
    heads, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    rows = LARGEST if load.work in (Work.extract, Work.score, Work.judge) else 0  # texts share them
    seen = slots * min(slots, load.max_length + rows)  # pairs of a query and a key
    eager = policy.attention is Attention.eager
    quantized = policy.quantize is not Quantize.none
    return Estimate(
        work=load.work,
        weights=weight_bytes(sizes, policy),
        cache=int(_caches(load) * _layers(sizes, load) + 2) * 2 * kv * slots * wide,
        stream=slots * sizes.hidden_size * (3 * stream + 3 * 4),
        attention=slots * (heads + kv) * (8 + 2 * wide)
        + slots * heads * 3 * wide
        + seen * (2 + wide)
        + (seen * sizes.num_heads * (2 * wide + 8) if eager else 0),
        mlp=slots * sizes.intermediate_size * 3 * wide + (sizes.hidden_size * sizes.intermediate_size * 2 * quantized),
        logits=_logits(sizes, load, slots, parted),
        kept=_kept(sizes, load, slots, wide, stream),
        host=_host(sizes, load),
    )


def weight_bytes(sizes: Sizes, policy: DtypeConfig) -> int:
    """Of all weights: embeddings, norms and head stay in the policy's format where linear layers are quantised."""
    wide = BYTES[policy.weights]
    if policy.quantize is Quantize.none:
        return sizes.parameters * wide
    linear = sizes.num_layers * sizes.linear
    return (sizes.parameters - linear) * wide + math.ceil(linear * QUANTIZED_BYTES[policy.quantize])


def _layers(sizes: Sizes, load: Load) -> int:
    return sizes.num_layers if load.depth is None else min(load.depth, sizes.num_layers)


def _caches(load: Load) -> float:
    """How many times the slots of a batch are held: the common beginning and its copies, and rows on their way out of a batch."""
    return {Work.train: 0, Work.generate: 2 + BEGINNINGS}.get(load.work, 2)


def _logits(sizes: Sizes, load: Load, slots: int, parted: bool) -> int:
    """The head's output, the float32 copy, and what is computed from it: three copies in float32 where logits are capped.

    For scoring also the hidden states that wait for the head.
    """
    if load.work is Work.extract:
        return 0
    if load.work is Work.train:
        return slots * sizes.vocab_size * 16
    most, words = (LOGITS_IN_CACHE, min(PART, sizes.vocab_size)) if parted else (LOGITS_AT_ONCE, sizes.vocab_size)
    scored = min(max(most, words), slots * words) * 12
    generated = _rows(load) * (sizes.vocab_size if load.sampled else words) * 12
    if load.work is Work.judge and not load.max_new_tokens:
        return min(scored, generated)  # one position of each text
    return scored + slots * sizes.hidden_size * 4 if load.work is Work.score else generated


def _rows(load: Load) -> int:
    """How many answers grow at once, at most."""
    return max(1, load.batch_tokens // (load.max_new_tokens + SHORTEST_CONTEXT))


def _kept(sizes: Sizes, load: Load, slots: int, wide: int, stream: int) -> int:
    if load.work is Work.extract:
        return slots * sizes.hidden_size * (_layers(sizes, load) * stream + 2 * 4)
    if load.work is Work.train:
        layers = sizes.num_layers - min(load.lowest, sizes.num_layers)
        of_layer = (
            sizes.hidden_size * (4 * 8 + 4 * wide)
            + (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim * (8 + 5 * wide)
            + sizes.intermediate_size * 4 * wide
        )
        return slots * layers * of_layer + 8 * sizes.hidden_size**2 * 16  # fp32 weights, gradients, Adam's two moments
    return 0


def _host(sizes: Sizes, load: Load) -> int:
    if load.sampled:
        return _rows(load) * sizes.vocab_size * 48
    return load.pairs * _layers(sizes, load) * sizes.hidden_size * 5 * 4


def available(device: Device) -> Available:
    """Free memory where the model would go: every GPU's, or the computer's."""
    if device is not Device.cpu:
        import torch

        if torch.cuda.is_available():
            count = range(torch.cuda.device_count())
            return Available(tuple(_free_on(index) for index in count), gpu=True)
        return Available((free_memory(),), gpu=False, mps=torch.backends.mps.is_available())
    return Available((free_memory(),), gpu=False)


def _free_on(gpu: int) -> int:
    """What the driver has, and what this process holds for reuse."""
    import torch

    free, _ = torch.cuda.mem_get_info(gpu)
    return int(free + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may still take: what is free, or less where a cgroup (a Slurm job's) limits it.

    Args:
        root: where `proc` and `sys` are.
    """
    import psutil

    return min([int(psutil.virtual_memory().available), *_cgroup_rooms(root)])


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What every memory cgroup above this process still allows; page cache that can be dropped counts as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()  # paths may hold spaces
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        if "memory" in controllers.split(","):
            base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif controllers:
            continue
        own = base / path.lstrip("/")
        for folder in [own, *own.parents]:
            room = _room(folder, *names)
            if room is not None:
                yield room
            if folder == base:
                break


def _room(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        allowed, used = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit, usage))
    except OSError:
        return None
    if allowed == "max":
        return None
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    cache = {f"{prefix}inactive_file", f"{prefix}active_file"}
    cached = sum(int(size) for name, size in (line.split() for line in lines) if name in cache)
    return max(0, int(allowed) - max(0, int(used) - cached))
