"""What a summary says in words: numbers as text, the verdict, and the warnings that a reader needs first.

Reads the summary alone and invents nothing: every sentence states the numbers that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from truthsteer.stats import detectable

SIGNIFICANT = 0.05
MANY = 0.05
"""Share of answers without a usable verdict, or cut short, above which the reader is warned."""
FEW = 100
"""Fewer test questions than this are called few."""
FEW_GROUPS = 10
"""Fewer near-duplicate groups than this are too few to resample."""
LONGER = 0.2
"""Relative change of the mean length that is worth a warning."""

NAMES = {"true": "truthful answers", "mc1": "MC1", "length": "length"}
"""A metric in the middle of a sentence."""

_PLACES = {"fraction": (100, 0), "words": (1, 1), "score": (1, 2)}
"""Unit -> (factor, decimals)."""

Json = Mapping[str, Any]


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


def differs(item: Json) -> bool:
    """Whether the interval of the difference leaves out 0 and p is below .05: both, or nothing is claimed."""
    low, high, p = item["difference_low"], item["difference_high"], item["p"]
    return None not in (low, high, p) and (low > 0 or high < 0) and p < SIGNIFICANT


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
    if not differs(item):
        span = f"from {_with_bounds(unit, base)}: {_with_bounds(unit, item)}"
    evidence = f"{f'{_points(unit, item)} {interval}'.rstrip()}, {p_value(item['p'])}, n = {item['n']}"
    return f"{where}, {_verb(item)} {NAMES.get(lead, lead)} {span} ({evidence})."


def _coefficients(row: Json) -> str:
    texts = (f"{c:+.2f}" if round(c, 2) == c else f"{c:+g}" for c in row["coefficients"])
    return " or ".join(texts).replace("-", "−")


def _with_bounds(unit: str, item: Json) -> str:
    return f"{value(unit, item['mean'])} {bounds(unit, item['low'], item['high'])}".rstrip()


def _points(unit: str, item: Json) -> str:
    return change(unit, item["difference"]) + (" points" if unit == "fraction" else "")


def _verb(item: Json) -> str:
    if not differs(item):
        return "did not detectably change"
    return "raised" if item["difference"] > 0 else "lowered"


def _sign_flip(summary: Json, chosen: Json) -> Iterator[str]:
    lead, unit = summary["lead"], summary["units"][summary["lead"]]
    for row in summary["conditions"]:
        item = row["metrics"][lead]
        own = row["kind"] == "sign_flip" and row["method"] == chosen["method"]
        if own and item["difference"] is not None:
            what = f"{_verb(item)} {'them' if lead == 'true' else 'it'}{' to' if differs(item) else ':'}"
            rest = f"{_with_bounds(unit, item)} ({_points(unit, item)}, {p_value(item['p'])})"
            yield f"The same vector with its sign flipped {what} {rest}."


def _against_controls(summary: Json, chosen: Json) -> Iterator[str]:
    rows = controls(summary, chosen["method"])
    apart = sum(differs(row["metrics"][summary["lead"]]) for row in rows)
    if rows:
        who = f"{apart} of {len(rows)}" if apart else f"None of the {len(rows)}"
        lead = NAMES.get(summary["lead"], summary["lead"])
        yield f"{who} control directions {'differ' if apart > 1 else 'differs'} from the baseline in {lead}."


def warnings(summary: Json) -> list[str]:
    """Everything that should make a reader hesitate, the gravest first; empty if there is nothing."""
    baseline = summary["conditions"][0]
    chosen = [row for row in summary["conditions"] if row["kind"] == "chosen"]
    return [
        *_about_proof(summary),
        *(warning for row in chosen for warning in _about_controls(summary, row)),
        *(warning for row in chosen for warning in _about_trade_off(baseline, row)),
        *(warning for row in (baseline, *chosen) for warning in _about_answers(row)),
        *_about_choice(summary),
        *_about_power(summary, chosen),
        *_about_data(summary),
    ]


def _about_proof(summary: Json) -> Iterator[str]:
    if not summary["proof"]:
        yield "No steering proof was recorded: nothing shows that the vectors reached the model as intended."
    for proof in summary["proof"]:
        failed = [check["name"] for check in proof["checks"] if not check["passed"]]
        if failed or not proof["passed"]:
            names = ", ".join(failed) or "see below"
            fold = proof["fold"]
            yield f"The steering proof failed in fold {fold} ({names}): the numbers may not measure steering."


def _about_controls(summary: Json, chosen: Json) -> Iterator[str]:
    lead, method, unit = summary["lead"], chosen["method"], summary["units"][summary["lead"]]
    rows = controls(summary, method)
    if not rows:
        yield f"{method} has no control directions: nothing shows that its direction matters."
    apart = [(row["name"], row["metrics"][lead]) for row in rows if differs(row["metrics"][lead])]
    if apart:
        listed = ", ".join(f"{name} {_points(unit, item)} ({p_value(item['p'])})" for name, item in apart)
        yield (
            f"{len(apart)} of {len(rows)} controls of {method} differ from the baseline: {listed}. "
            f"About {SIGNIFICANT * len(rows):.1f} would by chance."
        )
    effect = chosen["metrics"][lead]["difference"] or 0
    rivals = sum((row["metrics"][lead]["difference"] or 0) >= effect for row in rows)
    if effect > 0 and rivals:
        yield (
            f"{rivals} of {len(rows)} controls raise {NAMES.get(lead, lead)} at least as much as {method} "
            "does: its direction is not what matters."
        )


def _about_trade_off(baseline: Json, chosen: Json) -> Iterator[str]:
    found, base = chosen["metrics"], baseline["metrics"]
    true, info, length = (found.get(name) for name in ("true", "info", "length"))
    abstain = found.get("abstain")
    if true and info and differs(true) and differs(info) and true["difference"] > 0 > info["difference"]:
        fell = f"{value('fraction', base['info']['mean'])} to {value('fraction', info['mean'])}"
        rose = ""
        if abstain and differs(abstain) and abstain["difference"] > 0:
            rose = f", while abstentions rose by {_points('fraction', abstain).lstrip('+')}"
        yield f"{chosen['name']}: informative answers fell from {fell} ({p_value(info['p'])}){rose}. Read true_info."
    if length and differs(length) and abs(length["difference"]) > LONGER * (base["length"]["mean"] or 1):
        moved = f"{value('words', base['length']['mean'])} to {value('words', length['mean'])} words"
        yield f"{chosen['name']}: the length of answers changed from {moved}. Judges are swayed by length."


def _about_answers(row: Json) -> Iterator[str]:
    name = row["name"]
    for judge, statuses in row["statuses"].items():
        total, undecided = sum(statuses.values()), row["undecided"][judge]
        for status, what in (("other", "match no listed answer"), ("empty", "are empty")):
            count = statuses.get(status, 0)
            if total and count / total > MANY:
                share = f"{100 * count / total:.0f}% of answers {what} and score 0"
                yield f"{name}: {share} (judge {judge}, {count} of {total})."
        if undecided:
            of = f"{undecided} of {total} answers"
            yield f"{name}: {judge} reached no verdict on {of}, which its means leave out."
    total, cut = sum(row["stop_reasons"].values()), row["stop_reasons"].get("length", 0)
    if total and cut / total > MANY:
        share = f"{100 * cut / total:.0f}% of answers"
        yield f"{name}: {share} were cut at generation.max_new_tokens ({cut} of {total})."
    if row["ties"]:
        ties = f"{row['ties']} {'question' if row['ties'] == 1 else 'questions'}"
        yield f"{name}: the best answer ties with a false one in {ties}; MC1 counts that as wrong."


def _about_choice(summary: Json) -> Iterator[str]:
    for method, item in summary["selection"].items():
        top = max(item["coefficients"], default=None)
        if len(item["coefficients"]) > 1 and any(cell["coefficient"] == top for cell in item["chosen"]):
            yield (
                f"{method}: the chosen coefficient {top:g} is the largest that was tried; a larger one "
                "may do more. Add one to steering.coefficients."
            )


def _about_power(summary: Json, chosen: list[Json]) -> Iterator[str]:
    lead, n = summary["lead"], summary["n"]
    items = [row["metrics"][lead] for row in chosen if row["metrics"][lead]["fixed"] is not None]
    if n < FEW and summary["units"][lead] == "fraction":
        moved = max([0.05, *((item["fixed"] + item["broken"]) / max(1, item["n"]) for item in items)])
        points = 100 * detectable(moved, summary["clusters"])
        yield f"Only {n} test questions: a true difference of {points:.0f} points is missed one time in five."
    if summary["clusters"] < FEW_GROUPS:
        groups = f"{summary['clusters']} {'group' if summary['clusters'] == 1 else 'groups'}"
        yield f"The test questions form only {groups} of near-duplicates: intervals and p say little."
    if lead != "true":
        what = NAMES.get(lead, lead)
        advice = "Type judge=reference or another that does."
        yield f"No judge scored truth, so the verdict rests on {what}. {advice}"


def _about_data(summary: Json) -> Iterator[str]:
    for pairs in summary["pairs"]:
        if pairs["dropped"]:
            lost, first = len(pairs["dropped"]), pairs["dropped"][0]
            yield (
                f"{lost} of {lost + pairs['used']} answer pairs were dropped in fold {pairs['fold']}, "
                f"such as {first['question']}: {first['reason']}."
            )
    if summary["data"].get("leaks"):
        leaks = summary["data"]["leaks"]
        yield f"{leaks} near-duplicate questions stand on both sides of a split, which flatters the results."
    if summary["data"].get("problems"):
        problems = len(summary["data"]["problems"])
        yield f"The data has {problems} {'problem' if problems == 1 else 'problems'}, listed below."


def record_warnings(record: Json) -> list[str]:
    """Warnings from what a run noted beside its results; they may be missing after a resumed run."""
    merged = record.get("facts", {}).get("merged_answers")
    if not merged:
        return []
    return [
        f"{merged} answers would have merged with the prompt's last token and were encoded apart; their "
        "log-probabilities may differ slightly from other software's."
    ]
