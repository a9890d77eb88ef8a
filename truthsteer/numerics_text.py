"""The doctor's report to read on a terminal, and many of them in one table. Knows the report, not how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truthsteer.numerics import MASSIVE, by_name, own_policy, shown

RATES = (
    "dtype",
    "max_length",
    "texts",
    "longer",
    "NaN texts %",
    "NaN tokens %",
    "largest",
    "headroom bits",
    "steered NaN %",
    "verdict",
)
"""Columns of `rates_table`."""

RATES_CAPTION = (
    "NaN: texts and tokens whose numbers are not finite, read as extraction reads them; under steering, texts at the largest "
    "coefficient. Headroom: bits below the dtype's largest number, in its tightest place. Longer: texts of answer pairs longer "
    "than steering.max_length."
)
"""What stands below `rates_table`."""


def rates_table(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Columns (`RATES`) of a table with one row per report of a sweep over dtypes and `steering.max_length`.

    Texts and tokens are those of the right-padded pass, in which extraction reads; `steered NaN %` is of texts; `longer`
    is of all texts given. The headroom is that of the dtype's tightest place.
    """
    columns: dict[str, list[str]] = {name: [] for name in RATES}
    for report in sorted(reports, key=lambda report: (report["policy"]["name"], report["max_length"])):
        passes = {item["name"]: item for item in report["passes"]}
        steered = passes.get("steered")
        own = by_name(report)[own_policy(report["policy"])]
        cells = (
            report["policy"]["name"],
            str(report["max_length"]),
            str(report["texts"]),
            f"{report['too_long']} of {report['given']}",
            f"{100 * passes['right']['bad_texts']:.1f}",
            f"{100 * passes['right']['bad_real']:.1f}",
            shown(passes["right"]["largest"]),
            "–" if own["bits"] is None else f"{own['bits']:.1f}",
            "–" if steered is None else f"{100 * steered['bad_texts']:.1f}",
            report["outcome"],
        )
        for name, cell in zip(RATES, cells, strict=True):
            columns[name].append(cell)
    return columns


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report to read on a terminal."""
    policy = report["policy"]
    found = [
        f"Numerics of {report['model']} under dtype={policy['name']} on {report['device']}: {report['outcome']}",
        report["verdict"],
        f"{report['texts']} of {report['given']} texts read, {report['tokens']} tokens. {_length_line(report)}",
        "pass             not finite: texts   tokens     pads   largest  first at",
    ]
    found += [_pass_line(item) for item in report["passes"]]
    found.append("dtype       safe     bits  why")
    found += [
        f"{item['name']:<11} {_WORDS[item['safe']]:<7} {_bits(item['bits']):>5}  {item['why']}"
        for item in report["policies"]
    ]
    found.append("layer  device    residual  token           channel  fp16 bits  norms  products")
    found += [_layer_line(item) for item in _tightest(report["layers"])]
    found.append("checks: " + ", ".join(f"{item['name']} {_PASSED[item['passed']]}" for item in report["checks"]))
    found += [f"  {item['name']}: {item['meaning']}" for item in report["checks"] if item["passed"] is not True]
    if report["reference"] is not None:
        found.append(_reference_line(report["reference"]))
    found.append(report["context"])
    start = report["token_sum"]["from_tokens"]
    if start is not None:
        tokens = "the first token" if start == 1 else f"{start} tokens"
        found.append(f"Tools that sum tokens in fp16 may overflow from {tokens} on; truthsteer sums in float32.")
    if report["missing_points"]:
        found.append(f"Not measured, since the model has no such module: {', '.join(report['missing_points'])}.")
    if report["overrides"]:
        found.append("Type " + "  or  ".join(report["overrides"]))
    found += [
        f"Type {'also ' if report['overrides'] else ''}{item['type']}: {item['why']}." for item in report["besides"]
    ]
    return found


def _length_line(report: Mapping[str, Any]) -> str:
    """What the limit does to the texts, by what the run does with longer ones."""
    longer, limit = report["too_long"], f"steering.max_length={report['max_length']}"
    longest = f"the longest has {report['longest']}"
    if not longer:
        return f"None is longer than {limit} ({longest})."
    if report["when_too_long"] == "truncate":
        return f"{limit} cuts {longer} ({longest}) and makes {report['equal_pairs']} pairs equal."
    does = "which ends a run" if report["when_too_long"] == "error" else "whose pairs are left out"
    return f"{longer} are longer than {limit} ({longest}), {does}."


_WORDS = {True: "yes", False: "no", None: "unknown"}
_PASSED = {True: "ok", False: "FAILED", None: "n/a"}


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}"


def _pass_line(item: Mapping[str, Any]) -> str:
    name = item["name"] if item["layer"] is None else f"{item['name']} {item['coefficient']:+g} at {item['layer']}"
    shares = [item["bad_texts"], item["bad_real"], item["bad_pad"]]
    cells = "".join(f"{'–' if share is None else f'{100 * share:.1f} %':>9}" for share in shares)
    first = item["first"]
    where = "–" if first is None else f"{first['where']}, token {first['position']} {first['token']!r}"
    return f"{name:<25}{cells}{shown(item['largest']):>10}  {where}"


def _layer_line(item: Mapping[str, Any]) -> str:
    stream, norm = item["residual"], item["norm"]
    products = f"{_bits(item['matmul']['bits_fp16'])} ({item['matmul']['point'] or '–'})"
    token = "–" if stream["position"] is None else f"{stream['position']} {stream['token']!r}"
    channel = "–" if stream["channel"] is None else stream["channel"]
    return (
        f"{item['layer']:>5}  {item['device']:<8}{shown(stream['largest']):>10}  {token:<14}  {channel:>7}  "
        f"{_bits(stream['bits_fp16']):>9}  {_bits(norm['bits_fp16'] if norm else None):>5}  {products}"
    )


def _tightest(layers: Sequence[Mapping[str, Any]], count: int = 5) -> list[Mapping[str, Any]]:
    """First, last and the layers whose residual stream is largest, in order."""
    ranked = sorted(layers, key=lambda item: -(item["residual"]["largest"] or 0.0))
    numbers = list(dict.fromkeys([0, len(layers) - 1, *(item["layer"] for item in ranked)]))[:count]
    return [item for item in layers if item["layer"] in numbers]


def _reference_line(reference: Mapping[str, Any]) -> str:
    rest = [value for value in reference["layers_without_massive"] if value is not None]
    return (
        f"Against fp32 the residual stream is off by {shown(reference['largest'])} at most (relative, worst layer); "
        f"without the {MASSIVE} most massive channels by {shown(max(rest, default=None))}."
    )
