"""Finished runs that differ in their seed alone, side by side: `python -m truthsteer.seeds RUN RUN RUN`.

Two noises are told apart. *Seed noise* is what another draw of splits, subsets and controls changes: the standard
deviation between runs. *Question noise* is what other questions of the same kind would change: the standard error
inside each run, which its interval shows, and which no number of seeds makes smaller. Reads run.json, summary.json and
answers.csv, and knows no model.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from truthsteer.cli import EXIT_USER_ERROR
from truthsteer.config import TRANSIENT
from truthsteer.errors import UserError
from truthsteer.files import read_json, write_json
from truthsteer.findings import bounds, change, value
from truthsteer.rendering import visible
from truthsteer.runs import find_run
from truthsteer.stats import Z
from truthsteer.summary import plain
from truthsteer.terminal import console, needed, table

if TYPE_CHECKING:
    from rich.table import Table

ENOUGH = 3
"""Fewer seeds than this hardly tell how far seeds lie apart."""

TWO_NOISES = (
    "These are two different noises. 'SD of seeds': what other splits, subsets and controls change, on the questions "
    "there are. 'SE of questions': what other questions of their kind would change; more seeds do not make it smaller."
)


@dataclass(frozen=True)
class Run:
    """What is read of one run."""

    name: str
    seed: int
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    questions: frozenset[str]
    """Ids of its test questions; empty where the run has no answers.csv."""


def read_run(name: str, root: Path) -> Run:
    """The finished run of that name below `root`, or in that folder.

    Raises:
        UserError: there is none, or it has no report.
    """
    folder, record = find_run(root, name, key="", elsewhere="--root DIR")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{name} has no summary.json: it never came to its report. Type its own command again first.")
    seed = int(record["config"]["seed"])
    return Run(folder.name, seed, record, read_json(folder / "summary.json"), _questions(folder / "answers.csv"))


def _questions(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    with path.open(encoding="utf-8", newline="") as file:
        return frozenset(row["question_id"] for row in csv.DictReader(file))


def check(runs: Sequence[Run]) -> None:
    """Raise unless the runs are one config under different seeds.

    Raises:
        UserError: fewer than two runs, a seed twice, or another key, the data or the weights differ.
    """
    if len(runs) < 2:
        raise UserError(
            f"{len(runs)} run cannot show how far seeds lie apart. Type at least two runs, better {ENOUGH}."
        )
    seeds = [run.seed for run in runs]
    for run in runs:
        if seeds.count(run.seed) > 1:
            twice = " and ".join(other.name for other in runs if other.seed == run.seed)
            raise UserError(f"{twice} both have seed={run.seed}. Type runs of different seeds.")
    first = _identity(runs[0])
    for run in runs[1:]:
        own = _identity(run)
        differing = [key for key in sorted(first.keys() | own.keys()) if first.get(key) != own.get(key)]
        if differing:
            key = differing[0]
            raise UserError(
                f"{runs[0].name} and {run.name} differ in {', '.join(differing[:5])}, not in seed alone: "
                f"{key} is {first.get(key)!r} and {own.get(key)!r}. Type runs of one command with seed=1,2,3."
            )


def _identity(run: Run) -> dict[str, Any]:
    """Dotted key -> value of everything that a run is, but its seed."""
    config = {key: item for key, item in run.record["config"].items() if key not in (*TRANSIENT, "seed")}
    flat = dict(_flat(config, ""))
    flat["the data's sha256"] = run.summary.get("data", {}).get("sha256")
    flat["the weights"] = run.record.get("checkpoint", {}).get("fingerprint")
    return {key: item for key, item in flat.items() if not key.startswith("model.resources.")}


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, item in node.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def between(runs: Sequence[Run]) -> dict[str, Any]:
    """Per method and metric, how its chosen condition differs from the baseline under each seed, and both noises.

    Returns:
        Plain JSON. `rows`: per method and metric `seeds` (difference, its interval, p and n under each), `mean`, `sd`
        between seeds, `low` and `high` of the differences, and `se`, the mean standard error of the questions: the
        95% interval's width over 3.92. `same_questions`: whether every seed tested the same ones.

    Raises:
        UserError: see `check`.
    """
    check(runs)
    runs = sorted(runs, key=lambda run: run.seed)
    first = runs[0].summary
    same = bool(runs[0].questions) and all(run.questions == runs[0].questions for run in runs)
    rows = [
        _row(method, metric, runs)
        for method in _methods(first)
        for metric in first["metrics"]
        if metric in first["units"]
    ]
    result = {
        "model": first["model"],
        "dataset": first["dataset"],
        "runs": [{"name": run.name, "seed": run.seed, "n": run.summary["n"]} for run in runs],
        "same_questions": same,
        "shared_questions": len(frozenset.intersection(*(run.questions for run in runs))),
        "rows": [row for row in rows if len(row["seeds"]) > 1],
    }
    found: dict[str, Any] = plain(result | {"notes": list(_notes(runs, result))})
    return found


def _methods(summary: Mapping[str, Any]) -> list[str]:
    return [row["method"] for row in summary["conditions"] if row["kind"] == "chosen"]


def _row(method: str, metric: str, runs: Sequence[Run]) -> dict[str, Any]:
    seeds = []
    for run in runs:
        chosen = [row for row in run.summary["conditions"] if row["kind"] == "chosen" and row["method"] == method]
        cell: Mapping[str, Any] = chosen[0]["metrics"].get(metric, {}) if chosen else {}
        if cell.get("difference") is not None:
            ends = {end: cell.get(f"difference_{end}") for end in ("low", "high")}
            seeds.append(
                {"seed": run.seed, "difference": cell["difference"], **ends, "p": cell.get("p"), "n": cell["n"]}
            )
    differences = np.array([each["difference"] for each in seeds])
    widths = [each["high"] - each["low"] for each in seeds if None not in (each["high"], each["low"])]
    return {
        "method": method,
        "metric": metric,
        "unit": runs[0].summary["units"][metric],
        "seeds": seeds,
        "mean": float(differences.mean()) if seeds else math.nan,
        "sd": float(differences.std(ddof=1)) if len(seeds) > 1 else math.nan,
        "low": float(differences.min(initial=math.inf)),
        "high": float(differences.max(initial=-math.inf)),
        "se": sum(widths) / len(widths) / (2 * Z) if widths else math.nan,
    }


def _notes(runs: Sequence[Run], result: Mapping[str, Any]) -> Iterator[str]:
    yield TWO_NOISES
    if not result["same_questions"]:
        shared, sizes = result["shared_questions"], sorted({run.summary["n"] for run in runs})
        yield (
            f"Each seed tested other questions ({shared} of {' or '.join(map(str, sizes))} in common), so that the SD "
            "of seeds holds question noise too. With data.folds=5 and no data.limit, every seed tests all of them."
        )
    if len(runs) < ENOUGH:
        yield f"{len(runs)} seeds hardly tell how far seeds lie apart. Run {ENOUGH} or more."
    commits = {run.record.get("code", {}).get("commit") for run in runs}
    if len(commits) > 1:
        yield "The runs were made by different versions of the program, which may be part of what differs."


def tables(result: Mapping[str, Any], width: int) -> Iterator[Table]:
    """One table per method; the single seeds are left out where they do not fit into `width` columns."""
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == method]
        yield _table(
            f"{visible(method)} chosen, minus the baseline: {result['model']} on {result['dataset']}", rows, width
        )


def _table(title: str, rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    seeds = list(dict.fromkeys(each["seed"] for row in rows for each in row["seeds"]))
    columns = {"metric": [row["metric"] for row in rows]}
    columns |= {f"seed {seed}": [_seed(row, seed) for row in rows] for seed in seeds}
    columns["mean"] = [change(row["unit"], row["mean"], 1) for row in rows]
    columns["SD of seeds"] = [_size(row["unit"], row["sd"]) for row in rows]
    columns["SE of questions"] = [_size(row["unit"], row["se"]) for row in rows]
    columns["range"] = [bounds(row["unit"], row["low"], row["high"], 1, "+") for row in rows]
    caption = "points, or the metric's own unit; below each seed's difference its 95% interval"
    if needed(columns) > width:
        columns = {name: cells for name, cells in columns.items() if not name.startswith("seed ")}
        caption = "points, or the metric's own unit; for the single seeds widen the terminal or type --json FILE"
    return table(title, caption, columns)


def _seed(row: Mapping[str, Any], seed: int) -> str:
    unit = row["unit"]
    for each in row["seeds"]:
        if each["seed"] == seed:
            interval = bounds(unit, each["low"], each["high"], 1, "+").replace(" ", "")
            return f"{change(unit, each['difference'], 1)}\n{interval}".rstrip()
    return "–"


def _size(unit: str, number: float | None) -> str:
    return value(unit, number, 1).rstrip("%")


def main() -> None:
    """Entry point; exits with 2 and one sentence where the user can mend what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m truthsteer.seeds",
        description="Finished runs that differ in their seed alone: what they found, and how far apart it lies.",
        epilog="Example: python -m truthsteer -m seed=1,2,3, then python -m truthsteer.seeds with the three folders.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name of a run below --root, or its folder")
    parser.add_argument("--root", type=Path, default=Path("multirun"), metavar="DIR", help="paths.root of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    words = parser.parse_args()
    try:
        result = between([read_run(name, words.root) for name in words.runs])
        if words.json is not None:
            _write(words.json, result)
    except UserError as error:
        sys.stderr.write(f"truthsteer: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    _show(result)


def _write(path: Path, result: Mapping[str, Any]) -> None:
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(
            f"--json {path} cannot be written: {error.strerror}. Type a file in a folder that exists."
        ) from error


def _show(result: Mapping[str, Any]) -> None:
    out = console()
    for each in tables(result, out.width):
        out.print(each)
    for note in result["notes"]:
        out.print(note, markup=False, highlight=False)


if __name__ == "__main__":
    main()
