"""Judges against people: how often they agree, beside the rows that every judge must beat.

Always yes, always no, and the length of an answer alone: what does no better than these knows nothing of truth, however
high its agreement. Knows neither files nor configuration. Intervals are those of `agreement`, by near-duplicates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truthsteer.agreement import (
    Agreement,
    Resampled,
    agreement,
    auc,
    auc_estimate,
    calibration_estimate,
    confusion,
    rogan_gladen,
)
from truthsteer.audit.labels import Labelled
from truthsteer.duplicates import group_near_duplicates
from truthsteer.findings import SIGNIFICANT
from truthsteer.records import Verdict
from truthsteer.sentinels import about_truth
from truthsteer.stats import compare

RESAMPLES = 2_000
FOLDS = 10
"""The length rule for an answer is made from answers to other questions, in so many parts."""
WARN, WITHHOLD = 0.01, 0.05
"""Shares of undecided answers above which a row is warned of, and not shown."""
FEW_CLUSTERS = 20
"""Fewer groups of near-duplicate questions than this carry no interval worth reading."""

TRUTH, INFORMATION = "truth", "information"
ALWAYS = ALWAYS_YES, ALWAYS_NO = "always yes", "always no"
LENGTH = "length"

Array = NDArray[np.float64]
Json = dict[str, Any]


@dataclass(frozen=True)
class Rater:
    """Anything that says yes or no to every answer; each array [answers], NaN where there is nothing."""

    judge: str
    metric: str
    about: str
    """`truth` or `information`: which label it is held against."""
    values: Array
    """1 yes, 0 no."""
    ranking: Array
    """A score that is higher the likelier a yes."""
    stated: Array
    """Probability of a yes."""
    statuses: tuple[str, ...] = ()
    """Of each verdict; empty for what is no judge."""


def measure(rows: Sequence[Labelled], verdicts: Mapping[str, Sequence[Verdict]], seed: int) -> Json:
    """All numbers of an audit, as plain JSON.

    A judge's metrics about truth (`true`, `match`, any `*_acc`) are held against the label, `info` against the other
    one. A score that is not 0 or 1 is yes from 0.5. The area under the curve needs a probability, a `*_diff` beside an
    `*_acc`, or such a score; the calibration error a probability.

    Args:
        rows: the labelled answers.
        verdicts: judge -> one verdict per row, in order.
        seed: of resampling, and of the parts that the length rule is made from.
    """
    questions = {row.question.id: row.question for row in rows}
    groups = dict(zip(questions, group_near_duplicates(list(questions.values())), strict=True))
    clusters = np.array([groups[row.question.id] for row in rows])
    labels = {
        TRUTH: np.array([float(row.label) for row in rows]),
        INFORMATION: np.array([math.nan if row.info is None else float(row.info) for row in rows]),
    }
    labels = {about: label for about, label in labels.items() if np.isfinite(label).any()}
    table = []
    for about, label in labels.items():
        trivial = trivial_raters(rows, about, label, clusters, seed)
        judges = [rater for name, own in verdicts.items() for rater in _raters(name, own, about)]
        table += [_row(rater, trivial[-1], rows, label, clusters, seed) for rater in (*judges, *trivial)]
    summary: Json = {
        "answers": len(rows),
        "questions": len(questions),
        "clusters": int(np.unique(clusters).size),
        "empty": sum(not row.text.strip() for row in rows),
        "seed": seed,
        "labels": {about: _labels(label) for about, label in labels.items()},
        "rows": table,
    }
    return summary | {"warnings": list(_warnings(summary))}


def _labels(label: Array) -> Json:
    known = label[np.isfinite(label)]
    return {"n": int(known.size), "yes": int(known.sum())}


def _raters(judge: str, verdicts: Sequence[Verdict], about: str) -> Iterator[Rater]:
    """What a judge says about truth, or about information, one rater for each of its metrics."""
    for metric in dict.fromkeys(name for verdict in verdicts for name in verdict.scores):
        if about_truth(metric) if about == TRUTH else metric == "info":
            scores = _column(verdict.scores.get(metric) for verdict in verdicts)
            stated = _column(verdict.probabilities.get(metric) for verdict in verdicts)
            paired = metric.removesuffix("acc") + "diff" if metric.endswith("_acc") else metric
            ranking = _column(verdict.scores.get(paired) for verdict in verdicts)
            graded = bool((np.isfinite(ranking) & ~np.isin(ranking, (0, 1))).any())
            known = np.isfinite(stated).any()
            yield Rater(
                judge,
                metric,
                about,
                values=np.where(np.isfinite(scores), (scores >= 0.5).astype(float), math.nan),
                ranking=stated if known else ranking if graded else np.full(scores.size, math.nan),
                stated=stated,
                statuses=tuple(verdict.status for verdict in verdicts),
            )


def _column(values: Iterator[float | None]) -> Array:
    return np.array([math.nan if value is None else float(value) for value in values])


def trivial_raters(
    rows: Sequence[Labelled], about: str, label: Array, clusters: NDArray[np.int64], seed: int
) -> list[Rater]:
    """What a judge must beat: always yes, always no, and, last, the length of the answer, which ranks in the direction
    that these labels prefer.
    """
    lengths = np.array([float(len(row.text.split())) for row in rows])
    none, same = np.full(lengths.size, math.nan), np.zeros(lengths.size)
    sign = -1 if auc(lengths, label) < 0.5 else 1
    return [
        Rater(ALWAYS_YES, "", about, same + 1, same, none),
        Rater(ALWAYS_NO, "", about, same, same, none),
        Rater(
            LENGTH,
            "longer" if sign > 0 else "shorter",
            about,
            by_length(lengths, label, clusters, seed),
            sign * lengths,
            none,
        ),
    ]


def by_length(lengths: Array, label: Array, clusters: NDArray[np.int64], seed: int) -> Array:
    """Yes or no from the number of words alone: [n].

    The answers to one tenth of the near-duplicate groups are rated by the rule that is most often right about the
    others: at least, or fewer than, so many words. NaN if there is one group only.
    """
    names, index = np.unique(clusters, return_inverse=True)
    fold = np.random.default_rng([seed, 3]).permutation(names.size)[index] % FOLDS
    found = np.full(lengths.size, math.nan)
    for part in np.unique(fold):
        train = (fold != part) & np.isfinite(label)
        if train.any():
            at_least, limit = _best_rule(lengths[train], label[train])
            found[fold == part] = (lengths[fold == part] >= limit) == at_least
    return found


def _best_rule(lengths: Array, label: Array) -> tuple[bool, float]:
    """Whether yes is at least, or fewer than, the limit; and the limit."""
    limits, place = np.unique(lengths, return_inverse=True)
    yes, every = np.bincount(place, label), np.bincount(place)
    no = every - yes
    right = np.concatenate([[0], np.cumsum(no)]) + yes.sum() - np.concatenate([[0], np.cumsum(yes)])
    limits = np.append(limits, math.inf)
    longer, shorter = int(right.argmax()), int(right.argmin())
    if right[longer] >= label.size - right[shorter]:
        return True, float(limits[longer])
    return False, float(limits[shorter])


def _row(
    rater: Rater, length: Rater, rows: Sequence[Labelled], label: Array, clusters: NDArray[np.int64], seed: int
) -> Json:
    labelled = np.isfinite(label)
    missing = labelled & np.isnan(rater.values)
    undecided = int(missing.sum())
    row: Json = {
        "judge": rater.judge,
        "metric": rater.metric,
        "about": rater.about,
        "trivial": not rater.statuses,
        "n": int(labelled.sum()) - undecided,
        "undecided": undecided,
        "statuses": _count(rater.statuses, labelled),
        "undecided_statuses": _count(rater.statuses, missing),
        "withheld": undecided > WITHHOLD * int(labelled.sum()),
    }
    if row["withheld"]:
        return row
    row |= _agreement(agreement(label, rater.values, clusters, seed, RESAMPLES))
    row["auc"] = asdict(auc_estimate(rater.ranking, label, clusters, seed, RESAMPLES))
    row["ece"] = asdict(calibration_estimate(rater.stated, label, clusters, seed, RESAMPLES))
    own, rule = (1 - np.abs(each.values - label) for each in (rater, length))  # 1 right, 0 wrong, NaN open
    over = compare(own, rule, clusters, seed, RESAMPLES)
    row["over_length"] = {key: getattr(over, key) for key in ("difference", "low", "high", "p", "n")}
    row["groups"] = _groups(rater, rows, label, clusters, seed)
    return row


def _count(statuses: Sequence[str], used: NDArray[np.bool_]) -> dict[str, int]:
    return dict(sorted(Counter(status for status, use in zip(statuses, used, strict=False) if use).items()))


def _agreement(found: Agreement) -> Json:
    """The estimates, the share that is equal as the accuracy: the labels are the truth."""
    return {
        "accuracy": asdict(found.agreement),
        "kappa": asdict(found.kappa),
        "ac1": asdict(found.ac1),
        "recall_yes": asdict(found.recall_yes),
        "recall_no": asdict(found.recall_no),
    }


def _groups(rater: Rater, rows: Sequence[Labelled], label: Array, clusters: NDArray[np.int64], seed: int) -> list[Json]:
    """The breakdown by group; empty where there are no groups."""
    names = np.array([row.group for row in rows])
    found = []
    for name in dict.fromkeys(row.group for row in rows) if any(names) else ():
        inside = names == name
        own = np.where(inside, label, math.nan)
        measured = agreement(own, rater.values, clusters, seed, RESAMPLES)
        item = {"group": name, "n": measured.n, "undecided": int((inside & np.isfinite(label)).sum()) - measured.n}
        found.append(
            item | _agreement(measured) | _shares(rater, own, np.where(inside, math.nan, label), clusters, seed)
        )
    return found


def _shares(rater: Rater, own: Array, others: Array, clusters: NDArray[np.int64], seed: int) -> Json:
    """The share of yes by the labels, by the rater, and by the rater corrected with the errors it makes in the other
    groups. Its errors in the group itself would return the labels' share, whatever they are.
    """
    names, index = np.unique(clusters, return_inverse=True)
    table = np.zeros((names.size, 8))  # (label, rater) yes yes, yes no, no yes, no no: of the group, of the others
    for first, labels in ((0, own), (4, others)):
        used = np.isfinite(labels) & np.isfinite(rater.values)
        counts, _ = confusion(labels[used], rater.values[used], index[used])
        table[np.unique(index[used]), first : first + 4] = counts

    def corrected(counts: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            called = (counts[..., 0] + counts[..., 2]) / counts[..., :4].sum(axis=-1)
            yes = counts[..., 4] / counts[..., 4:6].sum(axis=-1)
            no = counts[..., 7] / counts[..., 6:].sum(axis=-1)
        return rogan_gladen(called, yes, no)

    drawn = Resampled.of(table, seed, RESAMPLES)
    judged = np.stack([table[:, 0] + table[:, 2], table[:, 1] + table[:, 3]], axis=1)
    people = np.stack([table[:, 0] + table[:, 1], table[:, 2] + table[:, 3]], axis=1)
    return {
        "labelled_yes": asdict(Resampled.of(people, seed, RESAMPLES).share(0, (0, 1))),
        "judged_yes": asdict(Resampled.of(judged, seed, RESAMPLES).share(0, (0, 1))),
        "corrected_yes": asdict(drawn.estimate(corrected)),
    }


def _warnings(summary: Json) -> Iterator[str]:
    """What a reader must know before the numbers."""
    if summary["clusters"] < FEW_CLUSTERS:
        yield f"The answers are to only {summary['clusters']} groups of near-duplicate questions: intervals say little."
    for about, label in summary["labels"].items():
        if label["yes"] in (0, label["n"]):
            yield f"All labels about {about} are {'yes' if label['yes'] else 'no'}: nothing can be told apart."
    for row in (row for row in summary["rows"] if not row["trivial"]):
        name, asked = f"{row['judge']} {row['metric']}", row["n"] + row["undecided"]
        said = ", ".join(f"{status} {count}" for status, count in row["undecided_statuses"].items())
        if row["withheld"]:
            yield f"{name} is withheld: {row['undecided']} of {asked} answers are undecided ({said})."
            continue
        if row["undecided"] > WARN * asked:
            yield f"{name} left {row['undecided']} of {asked} answers undecided ({said}); its numbers leave them out."
        over = row["over_length"]
        if not (over["low"] > 0 and over["p"] < SIGNIFICANT):
            points = f"{100 * over['difference']:+.0f} points".replace("-", "−")
            yield f"{name} is not shown to beat the length of an answer alone ({points})."
        constant = max(
            (other for other in summary["rows"] if other["about"] == row["about"] and other["judge"] in ALWAYS),
            key=lambda other: other["accuracy"]["value"],
        )
        if row["accuracy"]["value"] <= constant["accuracy"]["value"]:
            shares = [f"{100 * each['accuracy']['value']:.0f}%" for each in (row, constant)]
            yield f"{name} is right in {shares[0]}, {constant['judge']} in {shares[1]}."
