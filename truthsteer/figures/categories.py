"""What the chosen condition changed, by type and category: a forest plot."""

from __future__ import annotations

from typing import Any

from truthsteer.figures.style import PALETTE, Figure, canvas, full_name, note, short, signed, signed_tick, svg

MIN_CATEGORY = 10
"""A category with fewer questions is drawn in grey: nothing is claimed about it."""


def categories(summary: dict[str, Any]) -> Figure | None:
    methods = {method: rows for method, rows in summary["categories"].items() if rows}
    if not methods:
        return None
    drawing, panels = canvas(len(methods), height=0.9 + 0.24 * max(map(len, methods.values())))
    scale, told = (100 if summary["units"][summary["lead"]] == "fraction" else 1), []
    for axes, (method, rows) in zip(panels, methods.items(), strict=True):
        rows = rows[::-1]
        for y, row in enumerate(rows):
            single, weak = row["level"] == "category", _weak(row)
            ink = "faint" if weak else "first" if single else "ink"
            span = (row["difference"],) * 2 if row["low"] is None else (row["low"], row["high"])
            axes.plot([scale * end for end in span], [y, y], color=PALETTE[ink], lw=1.6, solid_capstyle="round")
            axes.plot([scale * row["difference"]], [y], "o" if single else "D", color=PALETTE[ink], ms=5)
            note(axes, f"{row['n']}", (1.0, y), ("axes fraction", "data"), (6, 0))
        axes.set_yticks(range(len(rows)), [short(row["name"]) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(PALETTE["faint" if _weak(row) else "ink"])
        axes.axvline(0, color=PALETTE["muted"], lw=0.9)
        note(axes, "n", (1.0, 1.0), ("axes fraction", "axes fraction"), (6, 6))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(
            f"{full_name(summary, summary['lead'])}: difference to the baseline" + (", in points" if scale > 1 else "")
        )
        axes.xaxis.set_major_formatter(signed_tick)
        axes.set_title(method, loc="left")
        values = [f"{row['name']} {signed(scale * row['difference'], '.0f')} (n = {row['n']})" for row in rows[::-1]]
        told.append(f"{method}: {', '.join(values)}.")
    return Figure(
        "categories",
        "By category",
        "Chosen condition minus baseline, question by question, with 95% intervals. "
        f"Grey: fewer than {MIN_CATEGORY} questions, or a single near-duplicate group, from which nothing follows.",
        "Forest plot of differences to the baseline. " + " ".join(told),
        svg(drawing, "categories"),
    )


def _weak(row: dict[str, Any]) -> bool:
    """Too few questions, or all of one near-duplicate group: nothing is claimed."""
    return row["n"] < MIN_CATEGORY or row["low"] is None
