"""The report's figures, drawn from the summary alone. They know nothing of models, files read or
configuration.

A figure's file is the same, byte for byte, for the same summary. Colours come from `PALETTE`, each under a
name, so that a page can show the same drawing in a light and in a dark theme (`inline`).
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PALETTE = {
    "ink": "#1c2127",
    "muted": "#6a737d",
    "faint": "#a9b1ba",
    "line": "#e3e6ea",
    "first": "#0b7285",
    "second": "#b7791f",
    "third": "#5f3dc4",
    "fourth": "#c2255c",
}
"""Name -> colour on a white page; on the report's page the name is a CSS variable."""

LABELS = {
    "mc1": "MC1", "mc2": "MC2", "mc3": "MC3", "true": "true", "info": "informative",
    "true_info": "true and informative", "abstain": "abstains", "length": "length",
}  # fmt: skip
"""How a metric is called in words."""

MIN_CATEGORY = 10
"""A category with fewer questions is drawn in grey: nothing is claimed about it."""

_SERIES = (("first", "o"), ("second", "s"), ("third", "D"), ("fourth", "^"))


@dataclass(frozen=True)
class Figure:
    """A finished drawing."""

    name: str
    """Stem of its file."""
    title: str
    caption: str
    alt: str
    """What a reader who cannot see it is told."""
    svg: str


def label(metric: str) -> str:
    """A metric in words."""
    return LABELS.get(metric, metric)


def draw(summary: dict[str, Any]) -> list[Figure]:
    """Every figure that the summary has numbers for: dose response, heat map, categories."""
    drawn = []
    with _style():
        for make in (_dose_response, _heat_map, _categories):
            figure = make(summary)
            if figure is not None:
                drawn.append(figure)
    return drawn


def inline(figure: Figure) -> str:
    """The drawing as an element of an HTML page: themed by CSS variables, ids of its own, nothing to
    fetch.
    """
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--font)", svg)
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    alt = html.escape(figure.alt, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def _dose_response(summary: dict[str, Any]) -> Figure | None:
    chosen = [row for row in summary["conditions"] if row["kind"] == "chosen"]
    wanted = ("true", "info", "true_info", "mc1") if summary["lead"] == "true" else ("mc1", "mc2", "mc3")
    names = [name for name in wanted if name in summary["metrics"]]
    if not chosen or not names:
        return None
    canvas, panels = _canvas(len(chosen), height=3.9)
    told = []
    for axes, row in zip(panels, chosen, strict=True):
        method = row["method"]
        points = _doses(summary, method)
        for name, (colour, marker) in zip(names, _SERIES, strict=False):
            _line(axes, points, name, PALETTE[colour], marker)
        _controls(axes, summary, method)
        for coefficient in row["coefficients"]:
            axes.axvline(coefficient, color=PALETTE["muted"], lw=0.9, ls=(0, (4, 3)), zorder=0)
        if row["coefficients"]:
            _note(
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
        told.append(f"{method}: " + "; ".join(_told(points, name) for name in names) + ".")
    return Figure(
        "dose_response",
        "Dose response",
        f"What each strength does on the {summary['n']} test questions, with 95% intervals. "
        f"Grey: control directions at the chosen coefficient ({label(summary['lead'])}).",
        "Line chart of shares against the coefficient. " + " ".join(told),
        _svg(canvas, "dose_response"),
    )


def _doses(summary: dict[str, Any], method: str) -> list[tuple[float, dict[str, Any]]]:
    """(coefficient, metrics) of the baseline and of the method's conditions that have one coefficient."""
    found = {0.0: summary["conditions"][0]["metrics"]}
    for row in summary["conditions"]:
        own = row["method"] == method and row["kind"] in ("steered", "chosen", "sign_flip")
        if own and len(row["coefficients"]) == 1:
            found.setdefault(row["coefficients"][0], row["metrics"])
    return sorted(found.items())


def _line(axes: Axes, points: Sequence[tuple[float, dict[str, Any]]], name: str, colour: str, marker: str) -> None:
    known = [(x, metrics[name]) for x, metrics in points if metrics[name]["mean"] is not None]
    xs, means = [x for x, _ in known], [item["mean"] for _, item in known]
    axes.plot(xs, means, color=colour, marker=marker, ms=4, lw=1.6, label=label(name), zorder=3)
    low, high = zip(*(_ends(item) for _, item in known), strict=True) if known else ((), ())
    axes.fill_between(xs, low, high, color=colour, alpha=0.13, lw=0, zorder=2)


def _ends(item: dict[str, Any]) -> tuple[float, float]:
    """The interval, or the mean twice where there is none."""
    return (item["mean"], item["mean"]) if item["low"] is None else (item["low"], item["high"])


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
        x, mean, ends = (
            middle + (place - (len(rows) - 1) / 2) * step,
            row["metrics"][lead]["mean"],
            _ends(row["metrics"][lead]),
        )
        axes.plot([x, x], ends, color=PALETTE[colour], lw=0.9, zorder=4)
        shown = None if words in labelled else words
        axes.plot([x], [mean], marker, color=PALETTE[colour], ms=4, zorder=4, label=shown)
        labelled.add(words)


def _told(points: Sequence[tuple[float, dict[str, Any]]], name: str) -> str:
    values = [f"{100 * m[name]['mean']:.0f}% at {x:g}" for x, m in points if m[name]["mean"] is not None]
    return f"{label(name)} {', '.join(values)}"


def _heat_map(summary: dict[str, Any]) -> Figure | None:
    selections = {method: item for method, item in summary["selection"].items() if item["mc1"]}
    if not selections:
        return None
    tallest = max(len(item["layers"]) for item in selections.values())
    canvas, panels = _canvas(len(selections), height=1.1 + 0.3 * tallest)
    told = []
    for axes, (method, item) in zip(panels, selections.items(), strict=True):
        _cells(axes, item)
        _outline(axes, item)
        told += [f"{method}: chosen layer {c['layer']}, coefficient {c['coefficient']:g}." for c in item["chosen"]]
        axes.set_xlim(-0.5, len(item["coefficients"]) - 0.5)
        axes.set_ylim(-0.5, len(item["layers"]) - 0.5)
        axes.set_xticks(range(len(item["coefficients"])), [_signed(value, "g") for value in item["coefficients"]])
        axes.set_yticks(range(len(item["layers"])), [str(layer) for layer in item["layers"]])
        axes.set_xlabel(f"coefficient ({summary['unit']})")
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(
            f"{method}: MC1 in %, tune split, exploratory (baseline {100 * item['baseline']:.0f})", loc="left"
        )
    folds = f", mean over {summary['folds']} folds" if summary["folds"] > 1 else ""
    return Figure(
        "heat_map",
        "Layer and coefficient",
        f"MC1 on the tune split{folds}. Colour: above (blue) or below (red) the baseline. Outlined: what was "
        f"chosen{' in a fold' if folds else ''}. The best of many cells is too good by chance: only the test "
        "split counts.",
        "Heat map of tune-split MC1 by layer and coefficient, exploratory. " + " ".join(dict.fromkeys(told)),
        _svg(canvas, "heat_map"),
    )


def _cells(axes: Axes, item: dict[str, Any]) -> None:
    """One coloured rectangle and number per cell; the colours are the same in a light and a dark theme."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("below_above", ["#9c3d54", "#e6bcc3", "#f7f7f5", "#a9d3d6", "#0a6f82"])
    base = item["baseline"]
    cells = [(x, y, v) for y, row in enumerate(item["mc1"]) for x, v in enumerate(row) if v is not None]
    reach = max([0.05, *(abs(value - base) for _, _, value in cells)])
    for x, y, value in cells:
        shade = colours((value - base) / reach / 2 + 0.5)
        dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.55
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor=shade, lw=0.4))
        ink = "#fdfdfd" if dark else "#22262b"
        axes.text(x, y, f"{100 * value:.0f}", color=ink, fontsize=8, ha="center", va="center")


def _outline(axes: Axes, item: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    for cell in item["chosen"]:
        if cell["coefficient"] in item["coefficients"] and cell["layer"] in item["layers"]:
            x, y = item["coefficients"].index(cell["coefficient"]), item["layers"].index(cell["layer"])
            frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#14181d", lw=2, zorder=5)
            axes.add_patch(frame)


def _categories(summary: dict[str, Any]) -> Figure | None:
    methods = {method: rows for method, rows in summary["categories"].items() if rows}
    if not methods:
        return None
    canvas, panels = _canvas(len(methods), height=0.9 + 0.24 * max(map(len, methods.values())))
    scale, told = (100 if summary["units"][summary["lead"]] == "fraction" else 1), []
    for axes, (method, rows) in zip(panels, methods.items(), strict=True):
        rows = rows[::-1]
        for y, row in enumerate(rows):
            single, weak = row["level"] == "category", _weak(row)
            ink = "faint" if weak else "first" if single else "ink"
            ends = (row["difference"],) * 2 if row["low"] is None else (row["low"], row["high"])
            axes.plot([scale * end for end in ends], [y, y], color=PALETTE[ink], lw=1.6, solid_capstyle="round")
            axes.plot([scale * row["difference"]], [y], "o" if single else "D", color=PALETTE[ink], ms=5)
            _note(axes, f"{row['n']}", (1.0, y), ("axes fraction", "data"), (6, 0))
        axes.set_yticks(range(len(rows)), [_short(row["name"]) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(PALETTE["faint" if _weak(row) else "ink"])
        axes.axvline(0, color=PALETTE["muted"], lw=0.9)
        _note(axes, "n", (1.0, 1.0), ("axes fraction", "axes fraction"), (6, 6))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{label(summary['lead'])}: difference to the baseline" + (", in points" if scale > 1 else ""))
        axes.xaxis.set_major_formatter(_tick)
        axes.set_title(method, loc="left")
        values = [f"{row['name']} {_signed(scale * row['difference'], '.0f')} (n = {row['n']})" for row in rows[::-1]]
        told.append(f"{method}: {', '.join(values)}.")
    return Figure(
        "categories",
        "By category",
        "Chosen condition minus baseline, question by question, with 95% intervals. "
        f"Grey: fewer than {MIN_CATEGORY} questions, or a single near-duplicate group, from which nothing follows.",
        "Forest plot of differences to the baseline. " + " ".join(told),
        _svg(canvas, "categories"),
    )


def _weak(row: dict[str, Any]) -> bool:
    """Too few questions, or all of one near-duplicate group: nothing is claimed."""
    return row["n"] < MIN_CATEGORY or row["low"] is None


def _tick(value: float, _: float) -> str:
    return _signed(value, "g")


def _signed(value: float, form: str) -> str:
    text = f"{round(value, 6):+{form}}".replace("-", "−")
    return "0" if text in ("+0", "−0") else text


def _short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"


def _note(
    axes: Axes, text: str, at: tuple[float, float], coordinates: tuple[str, str], shift: tuple[float, float]
) -> None:
    """Small grey text beside a point."""
    axes.annotate(
        text,
        at,
        xycoords=coordinates,
        xytext=shift,
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=PALETTE["muted"],
    )


def _canvas(panels: int, height: float) -> tuple[Canvas, list[Axes]]:
    """Panels one under the other: a phone shows one at a time."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    canvas = Canvas(figsize=(6.6, height * panels), layout=ConstrainedLayoutEngine(h_pad=0.14))
    return canvas, list(canvas.subplots(panels, 1, squeeze=False)[:, 0])


def _svg(canvas: Canvas, name: str) -> str:
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the reader's fonts draw the text, not matplotlib's
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    ink, muted = PALETTE["ink"], PALETTE["muted"]
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "text.parse_math": False,
                "font.family": "DejaVu Sans",
                "font.size": 9,
                "axes.titlesize": 9.5,
                "axes.titleweight": "bold",
                "axes.titlecolor": ink,
                "axes.labelcolor": muted,
                "axes.edgecolor": PALETTE["faint"],
                "axes.linewidth": 0.7,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": PALETTE["line"],
                "grid.linewidth": 0.7,
                "text.color": ink,
                "xtick.color": PALETTE["faint"],
                "ytick.color": PALETTE["faint"],
                "xtick.labelcolor": ink,
                "ytick.labelcolor": ink,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
            }
        )
        yield
