"""The summary as a self-contained page and as a table for the terminal. Knows numbers and texts, not where
from.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthsteer import cautions, figures, findings
from truthsteer.figures import headroom
from truthsteer.metrics import HEADLINE

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.table import Table
    from rich.text import Text

KINDS = {
    "baseline": "no steering",
    "steered": "other strength",
    "chosen": "chosen on tune split",
    "sign_flip": "control: sign flipped",
    "random": "control: random",
    "shuffled": "control: shuffled",
    "style": "control: direction of style",
    "projected": "chosen, without style",
    "prompt": "other prompt, no steering",
    "few_shot": "examples, no steering",
    "abstain": "no model",
    "shortest": "no model",
    "surface": "no model, no question",
}
"""What a kind of condition is called."""

_HEADS = {name: name.upper() if name.startswith("mc") else name for name in HEADLINE}
_LEAST_FIRST = ("mc3", "mc2", "length", "abstain", "info", "mc1", "true_info")
"""The order in which metrics leave a table that is too wide for its terminal; `true` stays."""

FULL_WIDTH = 140
"""Columns that hold the whole table, and what is assumed where there is no terminal."""

_REST = ("n", "difference", "difference_low", "difference_high", "p_adjusted", "mde", "undecided", "withheld")
"""What else metrics.csv has of every metric, in its last columns."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

_FORMULA = re.compile(r"'*[=+\-@\t\r]")

_NOT_SHOWN = ("seconds", "host", "started", "updated", "merged_answers")


def visible(text: str) -> str:
    """`text` without what files and pages cannot hold: control characters and lone surrogates become
    U+FFFD.
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def cell(text: str) -> str:
    """`text` for a spreadsheet: a first character that starts a formula is preceded by a quote mark.

    So is one behind quote marks of its own, so that whoever reads the file can take one off again.
    """
    text = visible(text)
    return f"'{text}" if _FORMULA.match(text) else text


def write_metrics(path: Path, summary: Mapping[str, Any]) -> None:
    """One row per condition; fractions, and words for `length`. Metrics that nobody scored stay empty."""
    extra = [name for name in summary["metrics"] if name not in HEADLINE]
    evidence = [f"{name}_{part}" for name in HEADLINE for part in ("low", "high", "p")]
    more = [f"{name}{part}" for name in extra for part in ("", "_low", "_high", "_p")]
    rest = [f"{name}_{part}" for name in summary["metrics"] for part in _REST]
    header = [
        "condition",
        "n",
        *HEADLINE,
        *evidence,
        "kind",
        "method",
        "layers",
        "coefficients",
        "mc_setting",
        *more,
        *rest,
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        for row in summary["conditions"]:
            cells: dict[str, Any] = {"condition": cell(row["name"]), "n": summary["n"], "kind": row["kind"]}
            cells |= {"method": cell(row["method"]), "layers": ";".join(map(str, row["layers"]))}
            cells["mc_setting"] = cell(row["setting"])
            cells["coefficients"] = ";".join(f"{value:g}" for value in row["coefficients"])
            for name, item in row["metrics"].items():
                cells[name] = item["mean"]
                cells |= {f"{name}_{part}": item[part] for part in ("low", "high", "p", *_REST)}
                cells[f"{name}_withheld"] = int(item["withheld"])
            writer.writerow(cells)


def page(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    drawn: Sequence[figures.Figure],
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """One self-contained HTML page: no script, nothing to fetch, every text escaped.

    Args:
        summary: what the report stage computed.
        config: resolved configuration, shown as YAML.
        record: shown as it is, but for what would differ between two identical runs (`seconds`, `host`,
        `started`).
        drawn: figures, placed inline.
        examples: per chosen condition and sort, the questions with both answers.
    """
    import yaml
    from markupsafe import Markup

    return _template().render(
        summary=summary,
        record=_flattened(record),
        warnings=[*summary["warnings"], *cautions.record_warnings(record)],
        config=visible(
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
        ),
        figures=[(figure, Markup(figures.inline(figure))) for figure in drawn],
        examples=examples,
        labels=figures.LABELS,
        groups=_groups(summary),
        kinds=KINDS,
        tallies=_tallies(summary),
        differs=findings.differs,
        digits=1 if summary["n"] >= 400 else 0,
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"p": findings.p_value, "flat": _flat, "whole": _whole}
    environment.filters |= {"amount": headroom.amount, "measure": _measure}
    environment.globals |= {
        "value": findings.value,
        "bounds": findings.bounds,
        "change": findings.change,
        "detectable": findings.detectable,
        "full_name": figures.full_name,
        "bits": headroom.bits,
        "headroom": headroom.groups,
        "first_bad": headroom.first_bad,
    }
    return environment.get_template("report.html.j2")


def listed(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The conditions of the tables: not those coefficients again that have a row of their own as chosen or sign-flipped."""
    shown = {_where(row) for row in summary["conditions"] if row["kind"] in ("chosen", "sign_flip")}
    return [row for row in summary["conditions"] if row["kind"] != "steered" or _where(row) not in shown]


def _where(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["method"], *row["layers"], *row["coefficients"]


def _groups(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of conditions: headline metrics, the other judges', other readings of multiple choice, texts."""
    rest = [name for name in summary["metrics"] if name not in HEADLINE]
    judged = [name for name in rest if name in summary["judges"]]
    parts = {
        "All conditions": [name for name in HEADLINE if name in summary["metrics"]],
        "Other judges": [name for name in judged if not name.endswith("_diff")],
        "Other judges, by how much": [name for name in judged if name.endswith("_diff")],
        "Other readings of multiple choice": [name for name in rest if name in summary["settings"]],
        "Texts": [name for name in rest if name not in summary["judges"] and name not in summary["settings"]],
    }
    rows = listed(summary)
    return [
        {
            "title": title,
            "metrics": names,
            "rows": [row for row in rows if any(row["metrics"][name]["n"] for name in names)],
        }
        for title, names in parts.items()
        if names
    ]


def _tallies(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of columns for the table of counts: every judge's statuses, then what ended the answers."""
    rows = summary["conditions"]
    judges = list(dict.fromkeys(judge for row in rows for judge in row["statuses"]))
    groups = [(judge, [row["statuses"].get(judge, {}) for row in rows]) for judge in judges]
    groups.append(("ended by", [row["stop_reasons"] for row in rows]))
    tallies = []
    for title, found in groups:
        names = sorted({name for counts in found for name in counts})
        counts = [[counts.get(name, 0) for name in names] for counts in found]
        tallies.append({"title": title, "names": names, "counts": counts})
    return [tally for tally in tallies if tally["names"]]


def _whole(sentence: str) -> str:
    """A sentence whose statistics (`p < .001`, `[37, 52]`) do not break over lines."""
    return re.sub(
        r"(?<=[=<≤]) | (?=[=<≤])|(?<=\d), (?=[+−]?[\d.]+\])",
        lambda gap: gap[0].replace(" ", "\u00a0"),
        sentence,
    )


def _flattened(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with one level of nesting opened, without what would differ between two identical runs."""
    flat: dict[str, Any] = {}
    for key, item in ((key, item) for key, item in record.items() if key not in _NOT_SHOWN):
        opened = isinstance(item, Mapping) and key != "versions"
        flat |= (
            {f"{key} {name}" if name in flat else name: part for name, part in item.items()} if opened else {key: item}
        )
    return {key: item for key, item in flat.items() if key not in _NOT_SHOWN}


def _measure(value: Any) -> str:
    """What a check found, or its bound: a number, yes or no, or a word."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2g}" if isinstance(value, (int, float)) else _flat(value)


def _flat(value: Any) -> str:
    """A value of the record on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(item) for item in value) or "none"
    return visible("–" if value is None else str(value))


def table(summary: Mapping[str, Any], width: int | None = None) -> Table:
    """The final table for a terminal: mean and interval, and below them the difference to the baseline with
    its p.

    Args:
        summary: what `run` returned, or summary.json.
        width: columns of the terminal (default: the one there is). Metrics that do not fit are left out,
        and the caption says so.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    width = width or shutil.get_terminal_size((FULL_WIDTH, 24)).columns
    rows = listed(summary)
    shown = [name for name in HEADLINE if name in summary["metrics"]]
    cells = {
        name: [_terminal(summary["units"][name], row["metrics"][name], summary["n"]) for row in rows] for name in shown
    }
    names = [f"{'▸ ' if row['kind'] == 'chosen' else ''}{row['name']}" for row in rows]
    room = width - max(map(len, [*names, *(KINDS[row["kind"]] for row in rows)])) - 2
    for name in _LEAST_FIRST:
        if (
            name in shown
            and sum(3 + _widest(_head(summary, name), cells[name]) for name in shown) > room
            and len(shown) > 1
        ):
            shown.remove(name)
    left_out = [name for name in summary["metrics"] if name not in shown]
    caption = (
        "mean [95% interval]; below, the difference to the baseline (points; length: words), paired p, and in brackets the "
        "smallest difference detectable"
    )
    result = Table(
        title=f"{summary['model']} on {summary['dataset']}: n = {summary['n']} test questions",
        caption=caption + (f". In metrics.csv: {', '.join(left_out)}" if left_out else ""),
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    result.add_column("condition", overflow="fold")
    for name in shown:
        result.add_column(_head(summary, name), no_wrap=True)
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        style = "bold" if row["kind"] in ("chosen", "baseline") else ""
        label = Text(name).append(f"\n{KINDS[row['kind']]}", style="dim")
        marked = [_marked(cells[metric][place], row["metrics"][metric]) for metric in shown]
        result.add_row(label, *marked, style=style, end_section=row["kind"] == "baseline")
    return result


def _head(summary: Mapping[str, Any], metric: str) -> str:
    """A metric's name, and below it what its number depends on."""
    setting = summary["settings"].get(metric)
    parts = setting.split(", ") if setting else []
    return "\n".join([_HEADS[metric], *(", ".join(parts[i : i + 2]) for i in range(0, len(parts), 2))])


def _terminal(unit: str, item: Mapping[str, Any], n: int) -> tuple[str, str]:
    """The two lines of a cell."""
    interval = findings.bounds(unit, item["low"], item["high"]).replace(" ", "")
    first = f"{findings.value(unit, item['mean'])} {interval}".rstrip()
    if item["withheld"]:
        return "withheld", f"{item['undecided']} undecided"
    second = f"{findings.change(unit, item['difference'])} {findings.p_value(item['p']).replace(' ', '')}".strip()
    if item["mde"] is not None:
        second += f" ({findings.change(unit, item['mde']).lstrip('+')})"
    return first, f"{second} n={item['n']}".strip() if item["n"] != n else second


def _widest(head: str, cells: Iterable[tuple[str, str]]) -> int:
    return max(len(line) for lines in (head.splitlines(), *cells) for line in lines)


def _marked(cell: tuple[str, str], item: Mapping[str, Any]) -> Text:
    from rich.text import Text

    colour = "" if not findings.differs(item, corrected=True) else "green" if item["difference"] > 0 else "red"
    return Text(cell[0]).append(f"\n{cell[1]}", style=colour)
