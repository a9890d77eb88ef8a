"""Whether a run fits into the memory there is, before its weights are loaded; if not, what would.

Everything that a refusal suggests fits by the same estimate (`memory.estimate`). It loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from truthsteer.config import Config, Device, DtypeConfig, Quantize, Residual, Stage, Weights
from truthsteer.errors import UserError
from truthsteer.memory import GIB, Available, Estimate, Load, Work, available, estimate, weight_bytes
from truthsteer.sizes import Sizes, of_checkpoint, of_shape

RESERVE = GIB // 4
"""On every device beyond the estimate: workspaces of matrix products, and what is imported later."""

SPLIT_MARGIN = 1.1
"""Layers are whole, so several GPUs are never filled evenly."""

MOST_GPUS = 8
"""More are not suggested: they stand in several machines."""

NARROWER = (
    DtypeConfig("bf16", Weights.bf16),
    DtypeConfig("int8", Weights.fp16, Residual.fp32, quantize=Quantize.int8),
    DtypeConfig("int4", Weights.bf16, quantize=Quantize.int4),
)
"""Policies that take less and less memory for weights."""

FEWEST_TOKENS = 16
"""The smallest `batch_tokens` there is."""

JUDGED = 1024
"""Tokens of a text that a judge must be able to read."""

ANSWERS_STAGES = (Stage.steer, Stage.choose, Stage.gauge)
"""Stages that score answers."""


@dataclass(frozen=True)
class Keys:
    """How the user names what can be made smaller."""

    model: str = "model"
    """Key and value of the model, such as `model=gemma3_4b`."""
    prefix: str = ""
    """Of the other keys: nothing, or `judge.llm.`."""
    quantized: bool = True
    """Whether 8 and 4 bits can be asked for there."""
    escape: str = " This is an estimate: check_memory=false tries all the same."
    """How to go on in spite of the estimate."""


def loads(config: Config, layers: Sequence[int], questions: int | None = None) -> list[Load]:
    """The kinds of work that a run's stages do with its model.

    Args:
        config: the run's.
        layers: those that are tried.
        questions: how many activations are read of, if that is known.
    """
    steering, generation = config.steering, config.generation
    tokens, length, found = config.batch_tokens, config.steering.max_length, []
    if {Stage.extract, Stage.doctor} & set(config.stages):
        pairs, depth = steering.pairs_per_question * (questions or 0), max(layers) + 1 if layers else None
        found.append(Load(Work.extract, tokens, length, pairs=pairs, depth=depth))
    if set(ANSWERS_STAGES) & set(config.stages):
        found.append(Load(Work.score, tokens, length, lowest=min(layers, default=0)))
    if Stage.generate in config.stages:
        new, sampled = generation.max_new_tokens, generation.temperature > 0
        found.append(Load(Work.generate, tokens, length + new, max_new_tokens=new, sampled=sampled))
    return found


def sizes_of(config: Config, location: str | None = None, commit: str | None = None) -> Sizes | None:
    """Of the run's model: as its config states them, or as its checkpoint's config.json does; None if neither is there."""
    found = of_shape(config.model.shape)
    where = location or config.model.path
    if found is None and where is not None:
        found = of_checkpoint(where, commit, config.model.trust_remote_code)
    return found


def fits(sizes: Sizes, policy: DtypeConfig, load: Load, there: Available) -> bool:
    """Whether the work fits into free memory; several devices share the layers."""
    need = estimate(sizes, policy, load, there.parted)
    if not there.gpu:
        return need.total + need.host + RESERVE <= there.bytes
    count = len(there.parts)
    if count == 1:
        return need.total + RESERVE <= there.bytes
    # One layer, the embedding (or the head) and what passes through are not split; each device that computes holds the last.
    whole = (need.weights // sizes.num_layers) + sizes.embedding * 4 + need.passing + need.logits
    spread = need.total + (count - 1) * need.passing
    return spread * SPLIT_MARGIN + count * RESERVE <= there.bytes and whole + RESERVE <= max(there.parts)


def check(sizes: Sizes, policy: DtypeConfig, works: Sequence[Load], there: Available, keys: Keys | None = None) -> None:
    """Raise if any of the works cannot fit.

    Raises:
        UserError: says what is needed, what is there, and what would fit.
    """
    keys = keys or Keys()
    over = [load for load in works if not fits(sizes, policy, load, there)]
    if not over:
        return
    worst = max((estimate(sizes, policy, load, there.parted) for load in over), key=lambda need: takes(need, there))
    margin = f" (layers are whole: {SPLIT_MARGIN - 1:.0%} of several GPUs stays empty)" if len(there.parts) > 1 else ""
    typed = would_fit(remedies(sizes, policy, works, there, keys))
    raise UserError(
        f"{keys.model} as {policy.name} does not fit: to {worst.work.value} takes {gib(takes(worst, there))} GiB "
        f"({parts(worst, there)}), and {there.what} {'have' if len(there.parts) > 1 else 'has'} {gib(there.bytes)} GiB free"
        f"{margin}. {typed}{keys.escape}"
    )


def remedies(sizes: Sizes, policy: DtypeConfig, works: Sequence[Load], there: Available, keys: Keys) -> Iterator[str]:
    """What to type so that all the works fit: smaller batches, fewer bits, more GPUs; each alone, if that is enough.

    Works that fit already count too: fewer bits may come with a wider residual stream, and such GPUs are the smallest there.
    """
    smaller = _smaller(sizes, policy, works, there)
    if smaller is not None:
        yield f"{keys.prefix}batch_tokens={smaller}"
    for other in NARROWER:
        if other.quantize is not Quantize.none and not keys.quantized:
            continue
        other = replace(other, attention=policy.attention)
        if weight_bytes(sizes, other) >= weight_bytes(sizes, policy):
            continue
        if all(fits(sizes, other, load, there) for load in works):
            yield f"{keys.prefix}dtype={other.name}"
        elif (batch := _smaller(sizes, other, works, there)) is not None:
            yield f"{keys.prefix}dtype={other.name} with {keys.prefix}batch_tokens={batch}"
    if there.gpu:
        for count in range(len(there.parts) + 1, MOST_GPUS + 1):
            more = Available((min(there.parts),) * count, gpu=True)
            if all(fits(sizes, policy, load, more) for load in works):
                yield f"{count} such GPUs"
                return


def would_fit(typed: Iterable[str]) -> str:
    """The sentence that a refusal ends with."""
    would = list(dict.fromkeys(typed))
    return f"What would fit: {'; '.join(would)}." if would else "Nothing smaller of it fits: type a smaller model."


def _smaller(sizes: Sizes, policy: DtypeConfig, works: Sequence[Load], there: Available) -> int | None:
    """The largest power of two of tokens at once, below what is asked for, with which all the works fit."""
    batch = 1 << (works[0].batch_tokens - 1).bit_length()
    while (batch := batch // 2) >= FEWEST_TOKENS:
        if all(fits(sizes, policy, replace(load, batch_tokens=batch), there) for load in works):
            return batch
    return None


def check_run(
    config: Config, layers: Sequence[int], location: str, commit: str | None, depth: int | None, questions: int | None
) -> None:
    """Raise before the model of a run is loaded, if its work cannot fit into the memory there is now.

    Args:
        config: the run's.
        layers: those that are tried.
        location: of its checkpoint.
        commit: of the hub.
        depth: how many layers are loaded; None: all.
        questions: how many activations are read of.

    Raises:
        UserError: see `check`.
    """
    sizes = sizes_of(config, location, commit) if config.check_memory else None
    if sizes is not None:
        model = config.model
        name = f"model.path={model.path}" if model.path is not None else f"model={model.name}"
        works = loads(config, layers, questions)
        check(sizes.first_layers(depth), config.dtype, works, available(config.device), Keys(name))


def lacking(config: Config, policy: DtypeConfig, location: str, commit: str | None) -> str:
    """Why the run's model does not fit a second time, under another policy, beside what is there; empty if it does."""
    sizes, there = sizes_of(config, location, commit), available(config.device)
    if sizes is None:
        return "its size is not known"
    load = Load(Work.extract, FEWEST_TOKENS, config.steering.max_length)
    if fits(sizes, policy, load, there):
        return ""
    need = estimate(sizes, policy, load, there.parted)
    return f"it takes {gib(need.total)} GiB, and {there.what} has {gib(there.bytes)} GiB left"


def check_judge(location: str, policy: DtypeConfig, device: Device, key: str) -> None:
    """Raise before a judge's model is loaded, if it could not read even one text; the steered model is gone by then.

    Args:
        location: folder of its checkpoint.
        policy: number formats.
        device: where it goes.
        key: of its model, such as `judge.llm.model=FOLDER`.

    Raises:
        UserError: see `check`.
    """
    sizes = of_checkpoint(location)
    if sizes is not None:
        prefix = key.partition("=")[0].removesuffix("model")
        keys = Keys(key, prefix, quantized=False, escape="")
        check(sizes, policy, [Load(Work.judge, FEWEST_TOKENS, JUDGED)], available(device), keys)


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def takes(need: Estimate, there: Available) -> int:
    """Bytes where the model is."""
    return need.total if there.gpu else need.total + need.host


def parts(need: Estimate, there: Available) -> str:
    """What the largest shares are, where the model is."""
    named = {
        "weights": need.weights,
        "keys and values": need.cache,
        "layers": need.passing,
        "logits": need.logits,
        "kept activations": need.kept,
        "in the computer's memory": 0 if there.gpu else need.host,
    }
    return ", ".join(f"{name} {gib(size)}" for name, size in named.items() if size >= 0.05 * GIB or name == "weights")
