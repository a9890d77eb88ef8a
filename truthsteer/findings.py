"""What a summary says in words: numbers as text, and the verdict. What a reader should beware of is in `cautions`.

Reads the summary alone and invents nothing: every sentence states the numbers that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SIGNIFICANT = 0.05
"""p below this, with an interval that leaves out 0, is called a difference."""

NAMES = {"true": "truthful answers", "mc1": "MC1", "length": "length"}
"""A metric in the middle of a sentence."""

_PLACES = {"fraction": (100, 0), "words": (1, 1), "score": (1, 2)}
"""Unit -> (factor, decimals)."""

Json = Mapping[str, Any]


def named(metric: str, summary: Json | None = None) -> str:
    """A metric in the middle of a sentence; with a summary, followed by what its number depends on."""
    setting = summary["settings"].get(metric) if summary else None
    return f"{NAMES.get(metric, metric)} ({setting})" if setting else NAMES.get(metric, metric)


def value(unit: str, number: float | None, digits: int = 0) -> str:
    """A mean as text: `76%` for a fraction (with `digits` decimals), `6.8` for words, `0.12` for a score."""
    if number is None:
        return "–"
    return _number(unit, number, digits) + ("%" if unit == "fraction" else "")


def bounds(unit: str, low: float | None, high: float | None, digits: int = 0, sign: str = "") -> str:
    """An interval as text: `[70, 81]`, in the unit of `value`; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{_number(unit, low, digits, sign)}, {_number(unit, high, digits, sign)}]"


def change(unit: str, number: float | None, digits: int = 0) -> str:
    """A difference as text, with its sign: points for a fraction, else the unit itself."""
    return "" if number is None else _number(unit, number, digits, "+")


def _number(unit: str, number: float, digits: int, sign: str = "") -> str:
    factor, places = _PLACES[unit]
    text = f"{factor * number:{sign}.{max(places, digits if unit == 'fraction' else 0)}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def p_value(p: float | None) -> str:
    """`p < .001`, `p = .034`, `p = .20`: never 0, and never more digits than resampling gives."""
    if p is None:
        return ""
    if p < 0.001:
        return "p < .001"
    text = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return "p = 1" if float(text) >= 1 else f"p = {text[1:]}"


def differs(item: Json, corrected: bool = False) -> bool:
    """Whether the interval of the difference leaves out 0 and p is below .05: both, or nothing is claimed.

    With `corrected`, p is that corrected for the other rows of the column, where the row was not named beforehand.
    """
    low, high, p = item["difference_low"], item["difference_high"], item["p"]
    if corrected and item["p_adjusted"] is not None:
        p = item["p_adjusted"]
    return None not in (low, high, p) and (low > 0 or high < 0) and p < SIGNIFICANT


def detectable(unit: str, item: Json) -> str:
    """`detectable: 9 points`: the smallest true difference that would be found four times in five."""
    if item["mde"] is None:
        return "detectable: nothing"
    return f"detectable: {_number(unit, item['mde'], 0)}{' points' if unit == 'fraction' else ''}"


def controls(summary: Json, method: str) -> list[Json]:
    """The conditions that a method's vector is held against: random directions and shuffled labels."""
    kinds = ("random", "shuffled")
    return [row for row in summary["conditions"] if row["kind"] in kinds and row["method"] in ("", method)]


def verdict(summary: Json) -> list[dict[str, Any]]:
    """Per method one sentence on what its chosen condition did, and as context its sign flip and its controls."""
    return [
        {
            "method": row["method"],
            "effect": _effect(summary, row),
            "context": [*_sign_flip(summary, row), *_against_controls(summary, row)],
        }
        for row in summary["conditions"]
        if row["kind"] == "chosen"
    ]


def _effect(summary: Json, row: Json) -> str:
    lead, unit = summary["lead"], summary["units"][summary["lead"]]
    item, base = row["metrics"][lead], summary["conditions"][0]["metrics"][lead]
    layers = ("layers " if len(row["layers"]) > 1 else "layer ") + " or ".join(map(str, row["layers"]))
    where = f"{row['method']} at {_coefficients(row)} {summary['unit']}, {layers}"
    if item["difference"] is None:
        return f"{where}, could not be compared with the baseline."
    interval = bounds(unit, item["difference_low"], item["difference_high"], sign="+")
    span = f"from {_with_bounds(unit, base)} to {_with_bounds(unit, item)}"
    if not differs(item, corrected=True):
        span = f"from {_with_bounds(unit, base)}: {_with_bounds(unit, item)}"
    p = item["p"] if item["p_adjusted"] is None else item["p_adjusted"]  # of several methods, each has one
    evidence = f"{f'{points(unit, item)} {interval}'.rstrip()}, {p_value(p)}, n = {item['compared']}"
    return (
        f"{where}, {_verb(item, corrected=True)} {named(lead, summary)} {span} ({evidence}; {detectable(unit, item)})."
    )


def _coefficients(row: Json) -> str:
    texts = (f"{c:+.2f}" if round(c, 2) == c else f"{c:+g}" for c in row["coefficients"])
    return " or ".join(texts).replace("-", "−")


def _with_bounds(unit: str, item: Json) -> str:
    return f"{value(unit, item['mean'])} {bounds(unit, item['low'], item['high'])}".rstrip()


def points(unit: str, item: Json) -> str:
    return change(unit, item["difference"]) + (" points" if unit == "fraction" else "")


def _verb(item: Json, corrected: bool = False) -> str:
    if not differs(item, corrected):
        return "did not detectably change"
    return "raised" if item["difference"] > 0 else "lowered"


def _sign_flip(summary: Json, chosen: Json) -> Iterator[str]:
    lead, unit = summary["lead"], summary["units"][summary["lead"]]
    for row in summary["conditions"]:
        item = row["metrics"][lead]
        own = row["kind"] == "sign_flip" and row["method"] == chosen["method"]
        if own and item["difference"] is not None:
            what = f"{_verb(item)} {'them' if lead == 'true' else 'it'}{' to' if differs(item) else ':'}"
            rest = f"{_with_bounds(unit, item)} ({points(unit, item)}, {p_value(item['p'])}; {detectable(unit, item)})"
            yield f"The same vector with its sign flipped {what} {rest}."


def _against_controls(summary: Json, chosen: Json) -> Iterator[str]:
    rows = controls(summary, chosen["method"])
    apart = sum(differs(row["metrics"][summary["lead"]]) for row in rows)
    if rows:
        who = f"{apart} of {len(rows)}" if apart else f"None of the {len(rows)}"
        lead = named(summary["lead"], summary)
        yield f"{who} random and shuffled directions {'differ' if apart > 1 else 'differs'} from the baseline in {lead}."
