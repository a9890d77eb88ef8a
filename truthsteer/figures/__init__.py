"""The report's figures, one file each, drawn from the summary alone. They know nothing of models or configuration.

A figure's file is the same, byte for byte, for the same summary. Colours come from `PALETTE`, each under a
name, so that a page can show the same drawing in a light and in a dark theme (`inline`).
"""

from __future__ import annotations

import html
import re
from typing import Any

from truthsteer.figures.style import LABELS, PALETTE, Figure, full_name, label, style

__all__ = ["LABELS", "PALETTE", "Figure", "draw", "full_name", "inline", "label"]


def draw(summary: dict[str, Any]) -> list[Figure]:
    """Every figure that the summary has numbers for: dose response, frontier, heat map, categories, headroom."""
    from truthsteer.figures.categories import categories
    from truthsteer.figures.dose_response import dose_response
    from truthsteer.figures.frontier import frontier
    from truthsteer.figures.headroom import headroom
    from truthsteer.figures.heat_map import heat_map

    with style():
        drawn = [make(summary) for make in (dose_response, frontier, heat_map, categories, headroom)]
    return [figure for figure in drawn if figure is not None]


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
