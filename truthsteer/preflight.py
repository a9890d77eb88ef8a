"""What the doctor finds of a run's model, and what follows from it: a refusal, a warning, a note for later runs.

A model that was once seen to pass fp16's largest number is remembered by its weights, so that a later run need not load it
to be told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthsteer import fitting
from truthsteer.config import DtypeConfig, OnOverflow, Residual, Weights
from truthsteer.errors import UserError
from truthsteer.records import Question
from truthsteer.store import read_json, write_json
from truthsteer.workspace import Workspace

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel

log = logging.getLogger("truthsteer")

REPORT = "doctor.json"
"""The doctor's report, in a run's folder and beside the activations."""

FATAL = ("handover", "gpu_copies", "bos_agreement")
"""Checks without which activations mean nothing."""


def examine(ws: Workspace, questions: tuple[Question, ...], thorough: bool) -> dict[str, Any]:
    """The doctor's report on this run's model and the answers it would read; an overflow is remembered.

    Args:
        ws: the run.
        questions: whose answers activations are read of.
        thorough: whether all is looked at, or what a check before extraction costs next to nothing to look at.

    Raises:
        UserError: no answer pairs can be made of the questions, or the model cannot be loaded.
    """
    from truthsteer import doctor
    from truthsteer.extraction import paired
    from truthsteer.precision import set_precision

    steering, lm = ws.config.steering, ws.model
    _, names, branches = paired(questions, ws.prompts(), steering.pairs_per_question)
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
        injection_at=(max(ws.layers), strongest, steering.coefficient_unit),
        operator=ws.operator,
        thorough=thorough,
        reference=_reference(ws) if thorough else None,
        count=count,
        name=ws.config.model.name,
    )
    set_precision(ws.config.dtype)  # the reference was loaded under its own
    if report["predicted"] is not None:
        _remember(ws, report["predicted"]["where"])
    return report


def enforce(ws: Workspace, report: dict[str, Any]) -> None:
    """Stop a run whose numbers are not finite or cannot be trusted; say what leaves little room.

    Raises:
        UserError: they are not, and `dtype.on_overflow` is error.
    """
    failed = any(check["passed"] is False for check in report["checks"] if check["name"] in FATAL)
    if failed or report["outcome"] == "not finite":
        _refuse(ws, report["verdict"], report["overrides"])
    elif report["outcome"] != "safe":
        log.warning(report["verdict"])


def refuse_known_overflow(ws: Workspace) -> None:
    """Stop before weights are loaded, if they are known to overflow under this run's dtype.

    Raises:
        UserError: they are, and `dtype.on_overflow` is error.
    """
    policy = ws.config.dtype
    if policy.weights is Weights.fp16 and policy.residual is Residual.same:
        where = _remembered(ws).get(ws.checkpoint.fingerprint)
        if where is not None:
            name = ws.config.model.name
            sentence = f"dtype={policy.name} cannot hold {name}: its numbers were seen to pass 65504, fp16's largest, at {where}."
            _refuse(ws, sentence, ["dtype=bf16", "dtype=fp16 (residual stream in fp32)"])


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

    policy = DtypeConfig("fp32", attention=config.dtype.attention)
    lacking = fitting.lacking(config, policy, ws.checkpoint.location, ws.checkpoint.commit)
    if lacking:
        log.info("no comparison with fp32: %s", lacking)
        return None
    return lambda: LanguageModel.from_config(config.model, policy, config.device, ws.checkpoint)


def _memory(ws: Workspace) -> Path:
    return ws.store.root / "overflow.json"


def _remembered(ws: Workspace) -> dict[str, str]:
    found: dict[str, str] = read_json(_memory(ws)) if _memory(ws).exists() else {}
    return found


def _remember(ws: Workspace, where: str) -> None:
    known = _remembered(ws)
    if ws.checkpoint.fingerprint not in known:
        _memory(ws).parent.mkdir(parents=True, exist_ok=True)
        write_json(_memory(ws), known | {ws.checkpoint.fingerprint: where})
