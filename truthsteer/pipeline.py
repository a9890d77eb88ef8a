"""The program's table of contents: the stages in order, and what each hands to the next.

    splits -> (doctor) -> extract -> steer -> choose -> generate -> gauge -> judge -> report

Everything but the report is in the store under the hash of what determines it, so that this walk, done again, only looks
things up.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from truthsteer import baselines, data, preflight
from truthsteer.checkpoint import Checkpoint
from truthsteer.checkpoint import prefetch as prefetch_checkpoint
from truthsteer.config import Config, Stage, identity
from truthsteer.errors import UserError
from truthsteer.files import digest, disk_error, file_sha256, read_json
from truthsteer.records import (
    Capability,
    Choice,
    Completion,
    Condition,
    Letters,
    Neutral,
    Question,
    Splits,
    Verdict,
    from_json,
)
from truthsteer.results import Results, Row
from truthsteer.runs import RunRecord, folder_for
from truthsteer.sentinels import sentinels
from truthsteer.stages import choose, doctor, extract, gauge, generate, judge, report, steer
from truthsteer.store import Artifact
from truthsteer.workspace import Workspace

log = logging.getLogger("truthsteer")

REPORT_VERSION = 3
MEASURED = ("steer", "choose", "generate", "gauge", "judge")
"""Stages whose artifacts the report shows."""

T = TypeVar("T")


def run(
    config: Config, overrides: list[str] | None = None, checkpoint: Checkpoint | None = None
) -> dict[str, Any] | None:
    """Walk the stages of a config. A shard but the first computes what the report needs, and writes none.

    Args:
        config: the composed, checked config.
        overrides: what was typed, for the record.
        checkpoint: the weights, where a record names them and they need not be here (judging again).

    Returns:
        The summary (summary.json), or None if `stages` ends before the report, or for a shard but the first.

    Raises:
        UserError: anything the user can mend.
    """
    try:
        return _recorded(config, overrides or [], checkpoint)
    except Exception as error:
        disk = disk_error(error, Path(config.paths.root))
        if disk is None:
            raise
        raise disk from error


def _recorded(config: Config, overrides: list[str], checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    folder = folder_for(config)
    ws = Workspace(config, folder, checkpoint)
    record = RunRecord(folder, config, overrides, ws.store.used)
    handler = _log_to(folder / (f"shard-{config.shard}.log" if config.shard else "log.txt"))
    try:
        summary = _walk(ws, record)
    except (KeyboardInterrupt, SystemExit):  # SystemExit: queued again, at a time limit or a preemption
        with suppress(OSError):
            record.finish("interrupted")
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            record.data["traceback"] = traceback.format_exc()
        with suppress(OSError):  # where the disk is full, that is what `error` says
            record.finish("failed", f"{type(error).__name__}: {error}")
        log.debug("failed", exc_info=True)
        raise
    finally:
        logging.getLogger("truthsteer").removeHandler(handler)
        with suppress(OSError):
            handler.close()
    record.finish("finished")
    return summary


def _walk(ws: Workspace, record: RunRecord) -> dict[str, Any] | None:
    wanted, first = ws.config.stages, not ws.config.shard
    if Stage.prefetch in wanted:
        with record.stage("prefetch"):
            prefetch(ws)
    order = list(Stage)
    last = max((order.index(stage) for stage in wanted if stage is not Stage.prefetch), default=0)

    def reached(stage: Stage) -> bool:
        return order.index(stage) <= last

    if not reached(Stage.doctor):
        return None
    record.data["checkpoint"] = asdict(ws.checkpoint)
    if Stage.judge in wanted:
        _ = ws.judge_identities  # a judge that is not there is missed now, not after hours
    if Stage.gauge in wanted:
        gauge.check(ws)
    if Stage.doctor in wanted and first:
        with record.stage("doctor"):
            doctor.run(ws)
    if not reached(Stage.extract):
        return None
    with record.stage("extract") as entry:
        activations = extract.run(ws)
        entry["artifacts"] = [activations.key]
        record.data["data"] = ws.data_facts
    if not reached(Stage.steer):
        return None
    with record.stage("steer") as entry:
        banks = [steer.run(ws, split, activations) for split in ws.splits]
        entry["artifacts"] = [bank.key for bank in banks]
    if not reached(Stage.choose):
        return None
    conditions = [_conditions(ws, split, bank) for split, bank in zip(ws.splits, banks, strict=True)]
    folds = list(zip(ws.splits, banks, conditions, strict=True))
    with record.stage("choose") as entry:
        choices = [choose.run(ws, *fold) for fold in folds]
        letters = [choose.letters(ws, *fold) for fold in folds]
        entry["artifacts"] = _keys([*choices, *(found.values() for found in letters)])
    if not reached(Stage.generate):
        return None
    with record.stage("generate") as entry:
        completions = [generate.run(ws, *fold) for fold in folds]
        entry["artifacts"] = _keys(completions)
    if not reached(Stage.gauge):
        return None
    with record.stage("gauge") as entry:
        gauged = [gauge.run(ws, *fold) for fold in folds]
        entry["artifacts"] = _keys([found.values() for fold in gauged for found in fold.values()])
    if not reached(Stage.judge):
        return None
    record.data["facts"] = _facts([*choices, *completions])
    with record.stage("judge") as entry:
        judged = judge.run(ws, completions)
        entry["artifacts"] = {name: [*_keys(found.verdicts), found.sentinels.key] for name, found in judged.items()}
    if not reached(Stage.report) or not first:
        return None
    return _report(ws, record, Made(activations, banks, conditions, choices, letters, completions, gauged, judged))


def _report(ws: Workspace, record: RunRecord, made: Made) -> dict[str, Any]:
    """The summary; the report is rewritten only if something it shows has changed."""
    with record.stage("report") as entry:
        shown = [record.data["stages"][name]["artifacts"] for name in MEASURED]
        left_out = list(ws.capability[1])
        what = [ws.splits_artifact.key, shown, left_out, identity(ws.config), _numerics(ws, made.activations)]
        entry["inputs"] = digest([REPORT_VERSION, *what])
        summary = _finished_report(ws.folder, entry["inputs"])
        if summary is None:
            summary = report.run(_results(ws, record, made), ws.folder, ws.config.seed)
            entry["files"] = {name: file_sha256(ws.folder / name) for name in report.FILES}
            _stamp(ws.folder).write_text(digest([entry["inputs"], entry["files"]]), encoding="utf-8")
    return summary


def _numerics(ws: Workspace, activations: Artifact) -> dict[str, Any]:
    """What the doctor has just found, or else what was looked at before activations were read."""
    if ws.runs(Stage.doctor):
        found: dict[str, Any] = read_json(ws.folder / preflight.REPORT)
        return found
    return activations.json(preflight.REPORT)


def prefetch(ws: Workspace) -> None:
    """Download what the other stages need: the model, the judges' models, the data."""
    prefetch_checkpoint(ws.config.model)
    data.prefetch(ws.config.data)
    for component in ws.judges.values():
        component.prefetch()


def _conditions(ws: Workspace, split: Splits, bank: Artifact) -> list[Condition]:
    """The baseline, the rows without steering, then what the bank lists."""
    baseline, *steered = [from_json(Condition, item) for item in bank.json("bank.json")["conditions"]]
    return [baseline, *baselines.conditions(ws.config.baselines, split), *steered]


def _facts(folds: list[list[Artifact]]) -> dict[str, Any]:
    """What was recorded when the artifacts were made: every device, and the answers encoded alone."""
    found = [artifact.facts for fold in folds for artifact in fold]
    return {
        "device": " and ".join(sorted({item["device"] for item in found if "device" in item})),
        "merged_answers": max((item.get("merged_answers", 0) for item in found), default=0),
        "hardware": sorted({sentence for item in found for sentence in item.get("hardware", ())}),
    }


def _keys(folds: Iterable[Iterable[Artifact]]) -> list[str]:
    return [artifact.key for fold in folds for artifact in fold]


@dataclass(frozen=True)
class Made:
    """What the stages made: [fold], then [condition], or by its name where not every condition has one."""

    activations: Artifact
    banks: list[Artifact]
    conditions: list[list[Condition]]
    choices: list[list[Artifact]]
    letters: list[dict[str, Artifact]]
    completions: list[list[Artifact]]
    gauged: list[dict[str, dict[str, Artifact]]]
    judged: dict[str, judge.Judged]


def _results(ws: Workspace, record: RunRecord, made: Made) -> Results:
    """Pool the folds: a row of the table is the condition of that name in every fold that has it."""
    tested: tuple[Question, ...] = tuple(question for split in ws.splits for question in split.test)
    return Results(
        name=ws.folder.name,
        config=record.data["config"],
        questions=tested,
        rows=tuple(_row(made, name) for name in dict.fromkeys(item.name for fold in made.conditions for item in fold)),
        banks=tuple(bank.json("bank.json") for bank in made.banks),
        data=ws.data_facts,
        numerics=_numerics(ws, made.activations),
        capability_problems=ws.capability[1],
        sentinels=tuple(sentinels(tested, ws.config.seed)),
        sentinel_verdicts={name: found.sentinels.rows(Verdict) for name, found in made.judged.items()},
        record={key: record.data[key] for key in ("overrides", "code", "facts", "checkpoint")},
    )


def _row(made: Made, name: str) -> Row:
    """One condition of every fold that has it: a style, say, may not show in the answers that one fold steers by."""
    names = [[item.name for item in fold] for fold in made.conditions]
    own = [item for fold in made.conditions for item in fold if item.name == name]
    first = own[0]

    def pooled(folds: Sequence[Sequence[Artifact]], cls: type[T]) -> list[T]:
        found = [dict(zip(known, fold, strict=True)) for known, fold in zip(names, folds, strict=True)]
        return [row for rows in each(found, cls) for row in rows]

    def each(folds: Sequence[Mapping[str, Artifact]], cls: type[T]) -> list[list[T]]:
        return [fold[name].rows(cls) for fold in folds if name in fold]

    return Row(
        name=name,
        kind=first.kind,
        method=first.method,
        prompt=first.prompt,
        layers=tuple(sorted({c.layer for c in own if c.layer is not None})),
        coefficients=tuple(sorted({c.coefficient for c in own if c.layer is not None})),
        choices=pooled(made.choices, Choice),
        completions=pooled(made.completions, Completion),
        verdicts={judge: pooled(found.verdicts, Verdict) for judge, found in made.judged.items()},
        letters=[row for rows in each(made.letters, Letters) for row in rows],
        neutral=each([fold["neutral"] for fold in made.gauged], Neutral),
        capability=each([fold["capability"] for fold in made.gauged], Capability),
    )


def _stamp(folder: Path) -> Path:
    return folder / ".report"


def _finished_report(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The summary, if the report in the folder was made from these inputs and is whole."""
    stamp = _stamp(folder)
    if not stamp.exists() or any(not (folder / name).exists() for name in report.FILES):
        return None
    files = {name: file_sha256(folder / name) for name in report.FILES}
    if stamp.read_text(encoding="utf-8") != digest([inputs, files]):
        return None
    summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


class _Log(logging.FileHandler):
    """A log that a full disk cuts short: what stops the run is said elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _log_to(path: Path) -> logging.Handler:
    handler = _Log(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger("truthsteer").addHandler(handler)
    return handler
