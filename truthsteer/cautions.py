"""What should make a reader hesitate, in sentences, the gravest first.

Reads the summary alone and invents nothing: every sentence states the numbers that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from truthsteer.evidence import WARNED_ABOVE
from truthsteer.findings import SIGNIFICANT, bounds, change, controls, differs, named, p_value, points, value
from truthsteer.multiplicity import holm
from truthsteer.records import ALL_STYLE

MANY = 0.05
"""Share of answers without a usable verdict, or cut short, above which the reader is warned."""
FEW = 100
"""Fewer test questions than this are called few."""
FEW_GROUPS = 10
"""Fewer near-duplicate groups than this are too few to resample."""
LONGER = 0.2
"""Relative change of the mean length that is worth a warning."""
FAILS = 0.8
"""A judge that is right on fewer of the known answers than this is not to be trusted on others."""
BIASED = 0.7
"""A verdict that the length of an answer predicts with this AUC may be about length."""
WORSE_TEXT = 1.5
"""A perplexity on neutral text this many times the baseline's is worth a warning."""

Json = Mapping[str, Any]


def warnings(summary: Json) -> list[str]:
    """Everything that should make a reader hesitate, the gravest first; empty if there is nothing."""
    baseline = summary["conditions"][0]
    chosen = [row for row in summary["conditions"] if row["kind"] == "chosen"]
    return [
        *_about_proof(summary),
        *_about_numerics(summary),
        *_about_style(summary),
        *_about_verdicts(summary),
        *_about_judges(summary),
        *(warning for row in chosen for warning in _about_controls(summary, row)),
        *(warning for row in chosen for warning in _about_rivals(summary, row)),
        *(warning for row in chosen for warning in _about_trade_off(baseline, row)),
        *(warning for row in (baseline, *chosen) for warning in _about_answers(row)),
        *(warning for row in chosen for warning in _about_neutral_text(summary, row)),
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


def _about_numerics(summary: Json) -> Iterator[str]:
    numerics = summary["numerics"]
    if numerics is not None and numerics["outcome"] in ("not finite", "wrong", "no headroom"):
        yield f"{numerics['verdict']} See Numerics below, or type stages=[doctor]."


def _about_style(summary: Json) -> Iterator[str]:
    for method, item in summary["selection"].items():
        if any(row["reason"] == ALL_STYLE for row in item["style"]):
            yield f"{method}: {ALL_STYLE}, so that the row without them is missing: it may be a vector of style."


def _about_verdicts(summary: Json) -> Iterator[str]:
    """What judges left undecided: counted always, warned of above one percent, withheld above five."""
    for row in summary["undecided"]:
        asked, missing, metric = row["asked"], row["undecided"], row["metric"]
        statuses = ", ".join(f"{count} {status}" for status, count in row["statuses"].items())
        of = f"{missing} of {asked} answers ({100 * missing / max(1, asked):.1f}%: {statuses})"
        if metric in summary["withheld"]:
            yield f"{metric} is withheld: {row['judge']} reached no verdict on {of}. Try another judge, or another model for it."
        elif missing > WARNED_ABOVE * asked:
            treated = "leaves them out" if row["left_out"] else "counts them as 0"
            yield f"{row['judge']} reached no verdict on {of}; the mean of {metric} {treated}."
    for row in summary["conditions"]:
        lost = [name for name, cell in row["metrics"].items() if cell["withheld"] and name not in summary["withheld"]]
        if lost:
            yield f"{row['name']}: {', '.join(lost)} withheld, since more than 5% of its answers got no verdict."


def _about_judges(summary: Json) -> Iterator[str]:
    failed: dict[tuple[str, str], list[str]] = {}
    for row in summary["known_answers"]:
        if row["passed"] < FAILS and row["metric"] not in summary["withheld"]:
            share = f"{row['sentinel'].replace('_', ' ')} right in {value('fraction', row['passed'])} of {row['n']}"
            failed.setdefault((row["metric"], row["judge"]), []).append(share)
    for (metric, judge), shares in failed.items():
        yield f"{judge} is often wrong where the right verdict is known ({metric}): {', '.join(shares)}."
    for row in summary["same_family"]:
        yield f"{row['judge']} judges with {row['model']}, a model of the steered one's family, and may share its mistakes."
    for row in summary["length_bias"]:
        if row["auc"] is not None and abs(row["auc"] - 0.5) > BIASED - 0.5:
            who = f"{row['metric']} ({row['judge']})"
            yield f"{who}: the length of an answer alone predicts the verdict with an AUC of {row['auc']:.2f}."


def _about_rivals(summary: Json, chosen: Json) -> Iterator[str]:
    """Rows that do as well as the chosen one, or better, as far as these questions tell; and what style takes with it."""
    method = chosen["method"]
    for row in summary["contrasts"].get(method, []):
        if row["kind"] in ("random", "shuffled"):
            continue  # `_about_controls` counts them
        bought = {"true"} if row["kind"] == "abstain" and "true_info" in row["metrics"] else set()
        for metric in dict.fromkeys(name for name in (summary["lead"], "true_info", "mc1") if name in row["metrics"]):
            if metric in bought:
                continue  # silence is true, and says nothing: true_info tells
            cell, own = row["metrics"][metric], chosen["metrics"][metric]
            gained = (own["difference"] or 0) > 0 and differs(own, corrected=True)
            if row["kind"] == "projected":
                if gained and (cell["low"] or 0) > 0 and cell["p_adjusted"] < SIGNIFICANT:
                    yield f"{row['name']} has less effect on {named(metric, summary)} than {method}, by {_apart(cell)}."
            elif cell["difference"] <= 0 and (gained or row["kind"] in _QUESTIONLESS):
                yield (
                    f"{row['name']} does at least as well as {chosen['name']} in {named(metric, summary)} "
                    f"({method} minus it: {_apart(cell)})."
                )


def _apart(cell: Json) -> str:
    interval = bounds("fraction", cell["low"], cell["high"], sign="+")
    return f"{change('fraction', cell['difference'])} points {interval}, {p_value(cell['p_adjusted'])}"


_QUESTIONLESS = ("shortest", "surface")
"""Rows that need no model: worth a word even where steering gained nothing."""


def _about_neutral_text(summary: Json, chosen: Json) -> Iterator[str]:
    for row in summary["side_effects"]:
        if row["condition"] == chosen["name"] and (row["perplexity_ratio"] or 0) > WORSE_TEXT:
            span = f"[{row['perplexity_low']:.2f}, {row['perplexity_high']:.2f}]"
            yield (
                f"{chosen['name']}: the perplexity of neutral text is {row['perplexity_ratio']:.2f} times the baseline's "
                f"{span}: steering does not touch truthfulness alone."
            )


def _about_controls(summary: Json, chosen: Json) -> Iterator[str]:
    lead, method, unit = summary["lead"], chosen["method"], summary["units"][summary["lead"]]
    rows = controls(summary, method)
    if not rows:
        yield f"{method} has no control directions: nothing shows that its direction matters."
    apart = [(row["name"], row["metrics"][lead]) for row in rows if differs(row["metrics"][lead])]
    if apart:
        listed = ", ".join(f"{name} {points(unit, item)} ({p_value(item['p'])})" for name, item in apart)
        yield (
            f"{len(apart)} of {len(rows)} controls of {method} differ from the baseline: {listed}. "
            f"About {SIGNIFICANT * len(rows):.1f} would by chance."
        )
    family = [(row["name"], name) for row in rows for name in summary["metrics"]]
    ps = [row["metrics"][name]["p"] for row in rows for name in summary["metrics"]]
    corrected = [where for where, p in zip(family, holm(ps), strict=True) if p is not None and p < SIGNIFICANT]
    if corrected:
        metrics = sorted({name for _, name in corrected})
        yield (
            f"Over all metrics, {len(corrected)} of {sum(p is not None for p in ps)} cells of {method}'s controls differ "
            f"from the baseline after Holm's correction ({', '.join(metrics)}): there, to add any direction does something."
        )
    effect = chosen["metrics"][lead]["difference"] or 0
    rivals = sum((row["metrics"][lead]["difference"] or 0) >= effect for row in rows)
    if effect > 0 and rivals:
        yield (
            f"{rivals} of {len(rows)} controls raise {named(lead, summary)} at least as much as {method} "
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
            rose = f", while abstentions rose by {points('fraction', abstain).lstrip('+')}"
        yield f"{chosen['name']}: informative answers fell from {fell} ({p_value(info['p'])}){rose}. Read true_info."
    if length and differs(length) and abs(length["difference"]) > LONGER * (base["length"]["mean"] or 1):
        moved = f"{value('words', base['length']['mean'])} to {value('words', length['mean'])} words"
        yield f"{chosen['name']}: the length of answers changed from {moved}. Judges are swayed by length."


def _about_answers(row: Json) -> Iterator[str]:
    name = row["name"]
    for judge, statuses in row["statuses"].items():
        total = sum(statuses.values())
        for status, what in (("other", "match no listed answer"), ("empty", "are empty")):
            count = statuses.get(status, 0)
            if total and count / total > MANY:
                share = f"{100 * count / total:.0f}% of answers {what} and score 0"
                yield f"{name}: {share} (judge {judge}, {count} of {total})."
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
    found = [row["metrics"][lead]["mde"] for row in chosen if row["metrics"][lead]["mde"] is not None]
    if n < FEW and summary["units"][lead] == "fraction" and found:
        yield f"Only {n} test questions: a true difference of {100 * max(found):.0f} points is missed one time in five."
    if summary["clusters"] < FEW_GROUPS:
        groups = f"{summary['clusters']} {'group' if summary['clusters'] == 1 else 'groups'}"
        yield f"The test questions form only {groups} of near-duplicates: intervals and p say little."
    if lead != "true":
        withheld = "true" in summary["withheld"]
        why = "The judge of truth left too many answers undecided" if withheld else "No judge scored truth"
        advice = "Type another judge." if withheld else "Type judge=reference or another that does."
        yield f"{why}, so the verdict rests on {named(lead, summary)}. {advice}"


def _about_data(summary: Json) -> Iterator[str]:
    for pairs in summary["pairs"]:
        yield from _about_pairs(pairs)
    if summary["data"].get("leaks"):
        leaks = summary["data"]["leaks"]
        yield f"{leaks} near-duplicate questions stand on both sides of a split, which flatters the results."
    there = min(_counts(summary["data"].get("sizes", {}).get("train", 0)))
    if 0 < there < summary["few_shot"]:
        yield f"few-shot has {there} examples, not baselines.few_shot={summary['few_shot']}: the train split has no more."
    if summary["capability_problems"]:
        first, *others = summary["capability_problems"]
        yield f"Rows of the capability file were left out: {first}{f' And {len(others)} more.' if others else ''}"
    if summary["data"].get("problems"):
        problems = len(summary["data"]["problems"])
        yield f"The data has {problems} {'problem' if problems == 1 else 'problems'}, listed below."


def _about_pairs(pairs: Json) -> Iterator[str]:
    """Answer pairs that were lost, a sentence per cause, and those that were read in part."""
    made = pairs["used"] + len(pairs["dropped"])
    by_kind: dict[str, list[Json]] = {}
    for item in pairs["dropped"]:
        by_kind.setdefault(item["kind"], []).append(item)
    for kind, lost in by_kind.items():
        rest = ": the vectors rest on shorter texts" if kind == "too_long" else ""
        yield (
            f"{len(lost)} of {made} answer pairs were dropped in fold {pairs['fold']}, such as {lost[0]['question']}: "
            f"{lost[0]['reason']}{rest}."
        )
    if pairs["truncated"]:
        yield (
            f"{pairs['truncated']} of {2 * pairs['used']} answers to pairs of fold {pairs['fold']} were read without their "
            "end: the vectors do not know what was cut. Type a larger steering.max_length."
        )


def _counts(size: int | list[int]) -> list[int]:
    """One per fold."""
    return size if isinstance(size, list) else [size]


def record_warnings(record: Json) -> list[str]:
    """Warnings from what a run noted beside its results; they may be missing after a resumed run."""
    facts = record.get("facts", {})
    hardware, merged = facts.get("hardware", ()), facts.get("merged_answers")
    return [*hardware, *(_merged(merged) if merged else ())]


def _merged(merged: int) -> list[str]:
    return [
        f"{merged} answers would have merged with the prompt's last token and were encoded apart; their "
        "log-probabilities may differ slightly from other software's."
    ]
