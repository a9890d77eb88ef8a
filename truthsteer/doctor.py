"""Why a run breaks: the texts it reads, passed through its model as it would, with every layer's numbers looked at.

Right padding (extraction), left padding (generation) and the strongest steering are looked at in turn, and what silent
faults would show: activations that differ on their way between layers or GPUs, a beginning-of-sequence token that does not
agree between texts, padding that matters, and, if there is a reference, distance from the same model in fp32. The report
is plain JSON; `numerics` says what it means. It changes nothing and stores nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from truthsteer import soundness
from truthsteer.config import CoefficientUnit, DtypeConfig, TooLong, to_plain
from truthsteer.errors import UserError
from truthsteer.model import LanguageModel
from truthsteer.numerics import BF16_MAX, FP16_MAX, bits, complete, context, number, token_sum
from truthsteer.operators import Operator
from truthsteer.passes import Passes, Text, compare, strongest
from truthsteer.precision import bf16_native
from truthsteer.prompts import Branch
from truthsteer.reading import Reading

log = logging.getLogger("truthsteer")

PREFLIGHT_TEXTS = 4
"""Texts of a check that is not thorough."""


def texts_of(branches: Sequence[Branch], names: Sequence[str], decode: Callable[[list[int]], str]) -> list[Text]:
    """The texts of branches whose continuations are true and false answers in turn, as `extraction` makes them.

    Args:
        branches: one per question.
        names: the questions.
        decode: token ids to text, for the answers' names.
    """
    return [
        Text(
            f"{name} {decode(list(continuation)).strip()}",
            branch.context + continuation,
            len(branch.context),
            f"{number}.{index // 2}",
            index % 2 == 0,
        )
        for number, (branch, name) in enumerate(zip(branches, names, strict=True))
        for index, continuation in enumerate(branch.continuations)
    ]


def choose(texts: Sequence[Text], count: int) -> list[Text]:
    """`count` texts or one fewer, as whole pairs: the shortest pair, the longest, and the rest evenly by length between."""
    pairs: dict[str, list[Text]] = {}
    for text in texts:
        pairs.setdefault(text.pair, []).append(text)
    ranked = sorted(pairs.values(), key=lambda pair: (max(len(text.ids) for text in pair), pair[0].pair))
    wanted = max(1, min(len(ranked), count // 2))
    places = [round(index * (len(ranked) - 1) / max(1, wanted - 1)) for index in range(wanted)]
    return [text for index in places for text in ranked[index]]


def examine(
    lm: LanguageModel,
    texts: Sequence[Text],
    *,
    policy: DtypeConfig,
    max_length: int,
    too_long: TooLong = TooLong.truncate,
    injection_at: tuple[int, float, CoefficientUnit] | None = None,
    operator: Operator | None = None,
    thorough: bool = True,
    reference: Callable[[], LanguageModel] | None = None,
    count: int = 8,
    name: str = "",
) -> dict[str, Any]:
    """Examine a model on some of the texts of a run.

    Args:
        lm: the model, under `policy`.
        texts: all texts that would be read; some of them are.
        policy: the numeric policy, for the report.
        max_length: texts are cut after so many tokens, and the longer ones counted.
        too_long: what a run does with longer ones. drop: pairs that have one are not read.
        injection_at: layer, coefficient and unit of the strongest steering. None: no steered pass.
        operator: how it is applied; addition by default.
        thorough: False: one right-padded pass of 4 texts and no more, as a check before extraction.
        reference: gives the same model in fp32; called once, and let go of at once.
        count: how many texts are read.
        name: of the model, for the report.

    Returns:
        The report, ready for JSON (`numerics_text.lines` prints it).

    Raises:
        UserError: no texts, none that a run would read, or a layer that does not exist.
    """
    if not texts:
        raise UserError("There are no answer pairs to look at. Use another file, or a larger data.split.steer.")
    chosen = choose(_readable(texts, max_length, too_long), count if thorough else min(count, PREFLIGHT_TEXTS))
    rows = [text.ids[:max_length] for text in chosen]
    layer = None if injection_at is None or not thorough else injection_at[0]
    run = Passes(lm, chosen, rows, operator)
    right, hidden, taken = run.read(layer=layer, logits=thorough)
    passes = [run.summary("right", right)]
    readings = [right]
    checks = [soundness.handover(right), *([soundness.gpu_copies(right)] if thorough else [])]
    checks += [soundness.bos_agreement(rows, right, policy), soundness.bos_once(rows, lm.tokenizer)]
    if thorough:
        left, other, _ = run.read(left=True)
        readings.append(left)
        passes.append(run.summary("left", left))
        checks.append(soundness.padding_sides(right, left, hidden, other, policy))
    checks.append(soundness.padding_finite(readings))
    injection = None if injection_at is None or taken is None else strongest(run, taken, *injection_at)
    if injection is not None:
        steered, _, _ = run.read(injection=injection)
        readings.append(steered)
        only = bool((steered.bad & steered.real).any()) and not bool((right.bad & right.real).any())
        passes.append(run.summary("steered", steered, injection, run.finite(injection) if only else None))
    compared = None
    if reference is not None and thorough and not bool((right.bad & right.real).any()):
        try:
            compared = compare(lm, rows, reference)
            checks.append(soundness.reference(compared, policy))
        except (UserError, RuntimeError) as error:  # what was found without it is worth more than it
            log.warning("no comparison with fp32: %s", str(error).splitlines()[0])
    devices = list(dict.fromkeys(point.device for point in right.points))
    return complete(
        {
            "model": name or type(lm.model).__name__,
            "policy": {
                key: value
                for key, value in to_plain(policy).items()
                if key in ("name", "weights", "residual", "attention", "matmul", "quantize")
            },
            "device": ", ".join(devices),
            "bf16_native": all(bf16_native(torch.device(name).index or 0) for name in devices if "cuda" in name),
            "thorough": thorough,
            "given": len(texts),
            "texts": len(rows),
            "tokens": sum(map(len, rows)),
            "longest": max(len(text.ids) for text in texts),
            "max_length": max_length,
            "too_long": sum(len(text.ids) > max_length for text in texts),
            "when_too_long": too_long.value,
            "equal_pairs": _equal_pairs(texts, max_length),
            "passes": passes,
            "layers": _layers(run, right),
            **_extent(lm, readings),
            "predicted": _predicted(run, right),
            "missing_points": list(right.missing),
            "checks": checks,
            "reference": compared,
            "token_sum": token_sum(_per_token(right)),
            "context": _context(run, right),
        }
    )


def _readable(texts: Sequence[Text], max_length: int, too_long: TooLong) -> Sequence[Text]:
    """Without the pairs that a run leaves out.

    Raises:
        UserError: none is left.
    """
    if too_long is not TooLong.drop:
        return texts
    lost = {text.pair for text in texts if len(text.ids) > max_length}
    left = [text for text in texts if text.pair not in lost]
    if not left:
        raise UserError(
            f"steering.max_length={max_length} with steering.too_long=drop leaves none of {len(lost)} answer pairs. Type "
            f"steering.max_length={max(len(text.ids) for text in texts)}."
        )
    return left


def _layers(run: Passes, reading: Reading) -> list[dict[str, Any]]:
    """Each layer's largest numbers, finite ones only."""
    found = []
    for layer in range(run.lm.num_layers):
        own = reading.layer(layer)
        peak = reading.peaks.get(layer)
        (norm, _), (product, point) = own.of("norm"), own.of("matmul")
        position = None if peak is None else peak.column - int(reading.real[peak.row].int().argmax())
        found.append(
            {
                "layer": layer,
                "device": own.points[-1].device if own.points else "",
                "residual": {
                    "largest": None if peak is None else peak.value,
                    "token": None if peak is None or position is None else run.token(peak.row, position),
                    "position": position,
                    "channel": None if peak is None else peak.channel,
                    "bits_fp16": bits(peak.value if peak else None),
                    "bits_bf16": bits(peak.value if peak else None, BF16_MAX),
                },
                "norm": {"largest": norm, "bits_fp16": bits(norm)} if own.has("norm") else None,
                "matmul": {"largest": product, "point": point.name if point else None, "bits_fp16": bits(product)},
            }
        )
    return found


def _extent(lm: LanguageModel, readings: Sequence[Reading]) -> dict[str, Any]:
    """The largest number of each kind over all passes that stayed finite, and its headroom in fp16."""
    whole = [reading for reading in readings if not bool((reading.bad & reading.real).any())]
    largest: dict[str, float | None] = {
        group: max((reading.of(group)[0] for reading in whole), default=0.0) or None
        for group in ("residual", "norm", "matmul", "scores")
    }
    largest["weights"] = _largest_weight(lm)
    return {"largest": largest, "headroom": {group: bits(value) for group, value in largest.items()}}


def _largest_weight(lm: LanguageModel) -> float | None:
    """Of the weights that are in memory as numbers: not those offloaded, nor those in 8 or 4 bits."""
    head = lm.model.get_output_embeddings()
    weights = {id(weight): weight for module in (lm.decoder, head) for weight in module.parameters()}
    found = [
        torch.stack(weight.detach().aminmax()).abs().max().float().cpu()  # without a copy of the weight
        for weight in weights.values()
        if weight.is_floating_point() and weight.element_size() > 1 and weight.device.type != "meta" and weight.numel()
    ]
    return number(float(torch.stack(found).max())) if found else None


def _per_token(reading: Reading) -> float:
    """Mean over tokens after each text's first of the residual stream's largest number, in the worst finite layer."""
    later = reading.real & (reading.real.cumsum(1) > 1)
    bad = (reading.bad & reading.real).flatten(1).any(1)
    outs = torch.tensor([point.name == "resid_out" for point in reading.points]) & ~bad
    if not bool(later.any()) or not bool(outs.any()):
        return 0.0
    return float(reading.largest[outs][:, later].mean(1).max())  # of [layers, tokens]


def _predicted(run: Passes, reading: Reading) -> dict[str, Any] | None:
    """Where fp16 throughout is passed first, or was: not what a damaged weight or a broken copy made."""
    spot = reading.first(FP16_MAX, pads=False)
    if spot is None or reading.altered or spot.value != spot.value:
        return None
    damaged = spot.value == float("inf") and spot.point.dtype != "float16"
    return None if damaged else run.describe(reading, spot)


def _context(run: Passes, reading: Reading) -> str:
    offending = reading.offending()
    firsts = [(min(tokens), row) for row, tokens in enumerate(offending) if tokens]
    words = run.token(min(firsts)[1], min(firsts)[0]) if firsts else ""
    finite = not bool((reading.bad & reading.real).any())
    return context(offending, [len(row) for row in run.rows], words, finite)


def _equal_pairs(texts: Sequence[Text], max_length: int) -> int:
    """Pairs whose texts are the same after the cut, so that nothing tells true from false."""
    cut: dict[str, list[tuple[int, ...]]] = {}
    for text in texts:
        cut.setdefault(text.pair, []).append(text.ids[:max_length])
    return sum(len(pair) > 1 and len(set(pair)) == 1 for pair in cut.values())
