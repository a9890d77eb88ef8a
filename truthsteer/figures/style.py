"""What all figures share: colours, words for metrics, canvases, and SVG that is the same byte for byte."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
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
    "mc1": "MC1",
    "mc2": "MC2",
    "mc3": "MC3",
    "true": "true",
    "info": "informative",
    "true_info": "true and informative",
    "abstain": "abstains",
    "length": "length",
    "mc0": "MC0",
    "mc0_ab": "MC0 as A or B",
    "says_a": "says A",
    "mc1_token": "MC1 per token",
    "mc2_token": "MC2 per token",
    "mc1_char": "MC1 per character",
    "mc2_char": "MC2 per character",
    "repetition": "repetition",
    "refusal": "refuses",
}
"""How a metric is called in words."""

SERIES = (("first", "o"), ("second", "s"), ("third", "D"), ("fourth", "^"))


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


def full_name(summary: Mapping[str, Any], metric: str) -> str:
    """A metric in words with everything that its number depends on: `MC1 (qa, text, sum, v0)`."""
    setting = summary["settings"].get(metric)
    return f"{label(metric)} ({setting})" if setting else label(metric)


def ends(item: dict[str, Any]) -> tuple[float, float]:
    """The interval, or the mean twice where there is none."""
    return (item["mean"], item["mean"]) if item["low"] is None else (item["low"], item["high"])


def signed_tick(value: float, _: float) -> str:
    return signed(value, "g")


def signed(value: float, form: str) -> str:
    text = f"{round(value, 6):+{form}}".replace("-", "−")
    return "0" if text in ("+0", "−0") else text


def short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"


def note(
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


def doses(summary: Mapping[str, Any], method: str) -> list[tuple[float, dict[str, Any]]]:
    """(coefficient, metrics) of the baseline and of the method's conditions that have one coefficient."""
    found = {0.0: summary["conditions"][0]["metrics"]}
    for row in summary["conditions"]:
        own = row["method"] == method and row["kind"] in ("steered", "chosen", "sign_flip")
        if own and len(row["coefficients"]) == 1:
            found.setdefault(row["coefficients"][0], row["metrics"])
    return sorted(found.items())


def canvas(panels: int, height: float) -> tuple[Canvas, list[Axes]]:
    """Panels one under the other: a phone shows one at a time."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawing = Canvas(figsize=(6.6, height * panels), layout=ConstrainedLayoutEngine(h_pad=0.14))
    return drawing, list(drawing.subplots(panels, 1, squeeze=False)[:, 0])


def svg(drawing: Canvas, name: str) -> str:
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the reader's fonts draw the text, not matplotlib's
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


@contextmanager
def style() -> Iterator[None]:
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
