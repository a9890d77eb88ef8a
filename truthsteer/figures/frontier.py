"""Truth against information over the coefficients: what is gained in one and lost in the other."""

from __future__ import annotations

from typing import Any

from truthsteer.figures.style import PALETTE, Figure, canvas, doses, ends, full_name, note, signed, svg

CROWDED = 0.05
"""A point nearer than this to a named one goes unnamed."""

_BESIDE = {"prompt": "s", "few_shot": "D", "abstain": "X"}
"""Rows without steering that are drawn beside the curve."""


def frontier(summary: dict[str, Any]) -> Figure | None:
    chosen = [row for row in summary["conditions"] if row["kind"] == "chosen"]
    if not chosen or not {"true", "info"} <= set(summary["metrics"]) - set(summary["withheld"]):
        return None
    drawing, panels = canvas(len(chosen), height=4.4)
    told = []
    for axes, row in zip(panels, chosen, strict=True):
        found = [(c, m["true"], m["info"]) for c, m in doses(summary, row["method"])]
        points = [(c, true, info) for c, true, info in found if true["mean"] is not None and info["mean"] is not None]
        axes.plot([t["mean"] for _, t, _ in points], [i["mean"] for _, _, i in points], color=PALETTE["first"], lw=1.2)
        marked: list[tuple[float, float]] = []
        for coefficient, true, info in sorted(points, key=lambda point: point[0] not in (0, *row["coefficients"])):
            _cross(axes, true, info, "first", "o")
            at, name = (true["mean"], info["mean"]), "baseline" if coefficient == 0 else signed(coefficient, "g")
            if all(max(abs(at[0] - x), abs(at[1] - y)) > CROWDED for x, y in marked):
                note(axes, name, at, ("data", "data"), (5, 7))
                marked.append(at)
        for other in summary["conditions"]:
            true, info = other["metrics"]["true"], other["metrics"]["info"]
            if other["kind"] in _BESIDE and true["mean"] is not None and info["mean"] is not None:
                _cross(axes, true, info, "second", _BESIDE[other["kind"]])
                note(axes, other["name"], (true["mean"], info["mean"]), ("data", "data"), (5, -8))
        for grow in (axes.set_xlim, axes.set_ylim):
            grow(-0.04, 1.08)
        for ticks in (axes.set_xticks, axes.set_yticks):
            ticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_xlabel(full_name(summary, "true"))
        axes.set_ylabel(full_name(summary, "info"))
        axes.set_title(row["method"], loc="left")
        spelled = (f"{c:g}: {100 * t['mean']:.0f}% and {100 * i['mean']:.0f}%" for c, t, i in points)
        told.append(f"{row['method']}, true and informative at each coefficient: {'; '.join(spelled)}.")
    return Figure(
        "frontier",
        "Truth against information",
        "Every strength on the test questions, joined in order, with 95% intervals in both directions; beside it the rows "
        "without steering. A gain to the right that falls is bought with answers that say nothing.",
        "Line chart of informative answers against truthful ones. " + " ".join(told),
        svg(drawing, "frontier"),
    )


def _cross(axes: Any, true: dict[str, Any], info: dict[str, Any], colour: str, marker: str) -> None:
    """A point with its two intervals."""
    axes.plot(ends(true), [info["mean"]] * 2, color=PALETTE[colour], lw=0.9, alpha=0.6)
    axes.plot([true["mean"]] * 2, ends(info), color=PALETTE[colour], lw=0.9, alpha=0.6)
    axes.plot([true["mean"]], [info["mean"]], marker, color=PALETTE[colour], ms=5)
