"""The program's table of contents: the stages in order, and what each hands to the next.

    splits -> extract -> steer -> choose -> generate -> judge -> report

Everything but the report is in the store under the hash of what determines it, so that this walk, done again, only looks
things up.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from truthsteer import data
from truthsteer.checkpoint import Checkpoint
from truthsteer.checkpoint import prefetch as prefetch_checkpoint
from truthsteer.config import Config, Stage, identity
from truthsteer.records import Choice, Completion, Condition, Question, Verdict, from_json
from truthsteer.runs import RunRecord, folder_for
from truthsteer.stages import choose, extract, generate, judge, report, steer
from truthsteer.store import Artifact, digest, file_sha256, read_json
from truthsteer.workspace import Workspace

log = logging.getLogger("truthsteer")

REPORT_VERSION = 1


def run(
    config: Config, overrides: list[str] | None = None, checkpoint: Checkpoint | None = None
) -> dict[str, Any] | None:
    """Walk the stages of a config.

    Args:
        config: the composed, checked config.
        overrides: what was typed, for the record.
        checkpoint: the weights, where a record names them and they need not be here (judging again).

    Returns:
        The summary (summary.json), or None if `stages` ends before the report.

    Raises:
        UserError: anything the user can mend.
    """
    folder = folder_for(config)
    ws = Workspace(config, folder, checkpoint)
    record = RunRecord(folder, config, overrides or [])
    handler = _log_to(folder)
    try:
        summary = _walk(ws, record)
    except KeyboardInterrupt:
        record.finish("interrupted")
        raise
    except Exception as error:
        record.finish("failed", f"{type(error).__name__}: {error}")
        log.debug("failed", exc_info=True)
        raise
    finally:
        logging.getLogger("truthsteer").removeHandler(handler)
        handler.close()
    record.finish("finished")
    return summary


def _walk(ws: Workspace, record: RunRecord) -> dict[str, Any] | None:
    wanted = ws.config.stages
    if Stage.prefetch in wanted:
        with record.stage("prefetch"):
            prefetch(ws)
    after = [stage for stage in wanted if stage is not Stage.prefetch]
    if not after:
        return None
    last = max(after, key=list(Stage).index)

    def reached(stage: Stage) -> bool:
        return list(Stage).index(stage) <= list(Stage).index(last)

    record.data["checkpoint"] = asdict(ws.checkpoint)
    if Stage.judge in wanted:
        for component in ws.judges.values():
            component.identity()  # a judge that is not there is missed now, not after hours
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
    conditions = [_conditions(bank) for bank in banks]
    folds = list(zip(ws.splits, banks, conditions, strict=True))
    with record.stage("choose") as entry:
        choices = [choose.run(ws, *fold) for fold in folds]
        entry["artifacts"] = _keys(choices)
    if not reached(Stage.generate):
        return None
    with record.stage("generate") as entry:
        completions = [generate.run(ws, *fold) for fold in folds]
        entry["artifacts"] = _keys(completions)
    if not reached(Stage.judge):
        return None
    record.data["facts"] = _facts([*choices, *completions])
    with record.stage("judge") as entry:
        verdicts = [judge.run(ws, split, own) for split, own in zip(ws.splits, completions, strict=True)]
        entry["artifacts"] = {name: _keys([fold[name] for fold in verdicts]) for name in ws.judges}
    if not reached(Stage.report):
        return None
    with record.stage("report") as entry:
        # The report is rewritten only if something it shows has changed.
        made = [record.data["stages"][name]["artifacts"] for name in ("steer", "choose", "generate", "judge")]
        inputs = [REPORT_VERSION, ws.splits_artifact.key, made, identity(ws.config)]
        entry["inputs"] = digest(inputs)
        summary = _finished_report(ws.folder, entry["inputs"])
        if summary is None:
            results = _results(ws, record, banks, conditions, choices, completions, verdicts)
            summary = report.run(results, ws.folder, ws.config.seed)
            entry["files"] = {name: file_sha256(ws.folder / name) for name in report.FILES}
            _stamp(ws.folder).write_text(digest([entry["inputs"], entry["files"]]), encoding="utf-8")
    return summary


def prefetch(ws: Workspace) -> None:
    """Download what the other stages need: the model, the judges' models, the data."""
    prefetch_checkpoint(ws.config.model)
    data.prefetch(ws.config.data)
    for component in ws.judges.values():
        component.prefetch()


def _conditions(bank: Artifact) -> list[Condition]:
    return [from_json(Condition, item) for item in bank.json("bank.json")["conditions"]]


def _facts(folds: list[list[Artifact]]) -> dict[str, Any]:
    """What was recorded when the artifacts were made: every device, and the answers encoded alone."""
    found = [artifact.facts for fold in folds for artifact in fold]
    return {
        "device": " and ".join(sorted({item["device"] for item in found if "device" in item})),
        "merged_answers": max((item.get("merged_answers", 0) for item in found), default=0),
    }


def _keys(folds: list[list[Artifact]]) -> list[str]:
    return [artifact.key for fold in folds for artifact in fold]


def _results(
    ws: Workspace,
    record: RunRecord,
    banks: list[Artifact],
    conditions: list[list[Condition]],
    choices: list[list[Artifact]],
    completions: list[list[Artifact]],
    verdicts: list[dict[str, list[Artifact]]],
) -> report.Results:
    """Pool the folds: row i of the table is condition i of every fold, over all test questions."""
    rows = []
    for index, first in enumerate(conditions[0]):
        own = [fold[index] for fold in conditions]
        rows.append(
            report.Row(
                name=first.name,
                kind=first.kind,
                method=first.method,
                layers=tuple(sorted({c.layer for c in own if c.layer is not None})),
                coefficients=tuple(sorted({c.coefficient for c in own if c.layer is not None})),
                choices=[row for fold in choices for row in fold[index].rows(Choice)],
                completions=[row for fold in completions for row in fold[index].rows(Completion)],
                verdicts={
                    name: [row for fold in verdicts for row in fold[name][index].rows(Verdict)] for name in ws.judges
                },
            )
        )
    tested: tuple[Question, ...] = tuple(question for split in ws.splits for question in split.test)
    return report.Results(
        name=ws.folder.name,
        config=record.data["config"],
        questions=tested,
        rows=tuple(rows),
        banks=tuple(bank.json("bank.json") for bank in banks),
        data=ws.data_facts,
        record={key: record.data[key] for key in ("overrides", "code", "facts", "checkpoint")},
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


def _log_to(folder: Path) -> logging.Handler:
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger("truthsteer").addHandler(handler)
    return handler
