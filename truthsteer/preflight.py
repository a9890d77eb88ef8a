"""What the doctor finds of a run's model, and what follows from it: a refusal, a warning, a note for later runs.

Numbers that are wrong end a run; numbers that overflow end it unless `dtype.on_overflow` says otherwise, whether they are
read now or were read before. A model that was once seen to pass fp16's largest number is remembered by its weights, so that
a later run need not load it to be told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthsteer import fitting, lengths, numerics
from truthsteer.config import Attention, DtypeConfig, OnOverflow, Quantize, Residual, TooLong, Weights
from truthsteer.errors import UserError
from truthsteer.files import remembered, write_json
from truthsteer.records import Question
from truthsteer.workspace import Workspace

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel

log = logging.getLogger("truthsteer")

REPORT = "doctor.json"
"""The doctor's report, in a run's folder and beside the activations."""

FATAL = ("handover", "gpu_copies", "bos_agreement")
"""Checks without which activations mean nothing, whatever `dtype.on_overflow` says."""


def examine(ws: Workspace, questions: tuple[Question, ...], thorough: bool) -> dict[str, Any]:
    """The doctor's report on this run's model and the answers it would read; an overflow is remembered.

    Args:
        ws: the run.
        questions: whose answers activations are read of.
        thorough: whether all is looked at, or what a check before extraction costs next to nothing to look at.

    Raises:
        UserError: no answer pairs can be made of the questions, or the model cannot be loaded. Unless thorough: a text is
            longer than it may be, or none is left.
    """
    from truthsteer import doctor
    from truthsteer.extraction import paired
    from truthsteer.precision import set_precision

    steering, lm = ws.config.steering, ws.model
    pairs, names, branches = paired(questions, ws.prompts(), steering.pairs_per_question)
    if not thorough:  # what ends extraction is said first
        lengths.fit(pairs, branches, names, steering.max_length, steering.too_long)
    texts = doctor.texts_of(branches, names, lm.tokenizer.decode)
    longest = min(steering.max_length, max(len(text.ids) for text in texts))
    count = min(ws.config.doctor.texts, max(2, ws.config.batch_tokens // longest))  # they are read side by side
    if thorough and count < ws.config.doctor.texts:
        log.warning("reading %d texts: more of %d tokens need a larger batch_tokens", count, longest)
    strongest = max(steering.coefficients, key=abs)
    report = doctor.examine(
        lm,
        texts,
        policy=ws.config.dtype,
        max_length=steering.max_length,
        too_long=steering.too_long,
        injection_at=(max(ws.layers), strongest, steering.coefficient_unit),
        operator=ws.operator,
        thorough=thorough,
        reference=_reference(ws) if thorough else None,
        count=count,
        name=ws.config.model.name,
    )
    set_precision(ws.config.dtype)  # the reference was loaded under its own
    if report["predicted"] is not None:
        _remember(ws, report["predicted"])
    return report


def enforce(ws: Workspace, report: dict[str, Any]) -> None:
    """Stop a run whose numbers are wrong or not finite; say what leaves little room.

    Raises:
        UserError: they are wrong, or they are not finite and `dtype.on_overflow` is error.
    """
    failed = [check for check in report["checks"] if check["passed"] is False and check["name"] in FATAL]
    if failed:
        typed = " or ".join(item["type"] for item in numerics.remedies(report, FATAL)) or "stages=[doctor] to see more"
        raise UserError(
            f"dtype={report['policy']['name']}: the numbers cannot be trusted ({failed[0]['name']}). {failed[0]['meaning']} "
            f"Type {typed}."
        )
    if report["outcome"] == "not finite":
        _refuse(ws, report["verdict"], report["overrides"])
    elif report["outcome"] != "safe":
        log.warning(report["verdict"])
    else:
        log.info(report["verdict"])


def check_known(ws: Workspace, report: dict[str, Any]) -> None:
    """Hold activations that were read before, under this report, to what this run asks.

    Raises:
        UserError: their numbers are not finite, or a text is longer than it may be now.
    """
    steering = ws.config.steering
    if steering.too_long is TooLong.error and report["longest"] > steering.max_length:
        raise UserError(
            f"steering.max_length={steering.max_length}: the longest text of an answer pair has {report['longest']} tokens. "
            f"Type steering.max_length={report['longest']}, or {lengths.OR_DROP}."
        )
    enforce(ws, report)


def refuse_known_overflow(ws: Workspace) -> None:
    """Stop before weights are loaded, if they are known to overflow under this run's dtype.

    Raises:
        UserError: they are, and `dtype.on_overflow` is error.
    """
    policy, path = ws.config.dtype, _memory(ws)
    if policy.weights is not Weights.fp16 or policy.residual is not Residual.same or not _remembers(policy):
        return
    known = remembered(path)
    if known is None or (ws.depth is not None and known["layer"] >= ws.depth):
        return
    sentence = (
        f"dtype={policy.name} cannot hold {ws.config.model.name}: its numbers were seen to pass 65504, fp16's largest, at "
        f"{known['where']} (remembered in {path}; delete that file to have it seen anew)."
    )
    _refuse(ws, sentence, ["dtype=bf16", "dtype=fp16"])


def _refuse(ws: Workspace, sentence: str, overrides: list[str]) -> None:
    if ws.config.dtype.on_overflow is OnOverflow.error:
        typed = ", ".join([*overrides, "dtype.on_overflow=warn to go on all the same"])
        raise UserError(f"{sentence} Type one of: {typed}.")
    log.warning("%s dtype.on_overflow=warn: going on.", sentence)


def _reference(ws: Workspace) -> Callable[[], LanguageModel] | None:
    """Loads the same model in fp32, if it is another and there is memory for both."""
    config = ws.config
    if not config.doctor.reference or config.dtype.weights is Weights.fp32:
        return None
    from truthsteer.model import LanguageModel

    eager = config.dtype.attention is Attention.eager
    policy = DtypeConfig("fp32", attention=Attention.eager if eager else Attention.sdpa)
    lacking = fitting.lacking(config, policy, ws.checkpoint.location, ws.checkpoint.commit)
    if lacking:
        log.info("no comparison with fp32: %s", lacking)
        return None
    return lambda: LanguageModel.from_config(config.model, policy, config.device, ws.checkpoint)


def _memory(ws: Workspace) -> Path:
    """What is known of the run's weights; one file for each, so that runs side by side lose nothing."""
    return ws.store.root / "overflow" / f"{ws.checkpoint.fingerprint}.json"


def _remembers(policy: DtypeConfig) -> bool:
    """Whether what is seen under a policy is true of the weights: quantised ones are others."""
    return policy.quantize is Quantize.none


def _remember(ws: Workspace, seen: dict[str, Any]) -> None:
    whole = ws.depth is None or seen["layer"] < ws.depth  # above the last layer of a part stands another norm
    if whole and _remembers(ws.config.dtype):
        _memory(ws).parent.mkdir(parents=True, exist_ok=True)
        write_json(_memory(ws), {key: seen[key] for key in ("where", "layer", "largest")})
