"""What each strength does, with intervals, beside the controls at the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from truthsteer.figures.style import PALETTE, SERIES, Figure, canvas, doses, ends, full_name, label, note, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def dose_response(summary: dict[str, Any]) -> Figure | None:
    chosen = [row for row in summary["conditions"] if row["kind"] == "chosen"]
    wanted = ("true", "info", "true_info", "mc1") if summary["lead"] == "true" else ("mc1", "mc2", "mc3")
    names = [name for name in wanted if name in summary["metrics"]]
    if not chosen or not names:
        return None
    drawing, panels = canvas(len(chosen), height=3.9)
    told = []
    for axes, row in zip(panels, chosen, strict=True):
        method = row["method"]
        points = doses(summary, method)
        for name, (colour, marker) in zip(names, SERIES, strict=False):
            _line(
                axes, [(x, metrics[name]) for x, metrics in points], full_name(summary, name), PALETTE[colour], marker
            )
        _controls(axes, summary, method)
        for coefficient in row["coefficients"]:
            axes.axvline(coefficient, color=PALETTE["muted"], lw=0.9, ls=(0, (4, 3)), zorder=0)
        if row["coefficients"]:
            note(
                axes,
                "chosen on the tune split",
                (row["coefficients"][0], 1.0),
                ("data", "axes fraction"),
                (4, -8),
            )
        axes.set_ylim(-0.03, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_ylabel("share of questions")
        axes.set_xlabel(f"coefficient ({summary['unit']}); 0 is the baseline")
        axes.set_title(method, loc="left")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        told.append(f"{method}: " + "; ".join(_spelled(points, name) for name in names) + ".")
    return Figure(
        "dose_response",
        "Dose response",
        f"What each strength does on the {summary['n']} test questions, with 95% intervals. "
        f"Grey: control directions at the chosen coefficient ({label(summary['lead'])}).",
        "Line chart of shares against the coefficient. " + " ".join(told),
        svg(drawing, "dose_response"),
    )


def _line(axes: Axes, points: Sequence[tuple[float, dict[str, Any]]], name: str, colour: str, marker: str) -> None:
    known = [(x, item) for x, item in points if item["mean"] is not None]
    xs, means = [x for x, _ in known], [item["mean"] for _, item in known]
    axes.plot(xs, means, color=colour, marker=marker, ms=4, lw=1.6, label=name, zorder=3)
    low, high = zip(*(ends(item) for _, item in known), strict=True) if known else ((), ())
    axes.fill_between(xs, low, high, color=colour, alpha=0.13, lw=0, zorder=2)


def _controls(axes: Axes, summary: dict[str, Any], method: str) -> None:
    """Control directions as grey points with intervals, side by side around their coefficient."""
    lead = summary["lead"]
    looks = {"random": ("random directions", "o", "faint"), "shuffled": ("shuffled labels", "X", "muted")}
    rows = [
        row
        for row in summary["conditions"]
        if row["kind"] in looks and row["method"] in ("", method) and row["metrics"][lead]["mean"] is not None
    ]
    low, high = axes.get_xlim()
    step, labelled = (high - low) * 0.009, set()
    for place, row in enumerate(rows):
        words, marker, colour = looks[row["kind"]]
        middle = sum(row["coefficients"]) / max(1, len(row["coefficients"]))
        x, mean, span = (
            middle + (place - (len(rows) - 1) / 2) * step,
            row["metrics"][lead]["mean"],
            ends(row["metrics"][lead]),
        )
        axes.plot([x, x], span, color=PALETTE[colour], lw=0.9, zorder=4)
        shown = None if words in labelled else words
        axes.plot([x], [mean], marker, color=PALETTE[colour], ms=4, zorder=4, label=shown)
        labelled.add(words)


def _spelled(points: Sequence[tuple[float, dict[str, Any]]], name: str) -> str:
    values = [f"{100 * m[name]['mean']:.0f}% at {x:g}" for x, m in points if m[name]["mean"] is not None]
    return f"{label(name)} {', '.join(values)}"
