"""The tune split's grid of layers and coefficients, with what random directions reach there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from truthsteer.figures.style import PALETTE, Figure, canvas, full_name, signed, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat_map(summary: dict[str, Any]) -> Figure | None:
    selections = {method: item for method, item in summary["selection"].items() if item["mc1"]}
    if not selections:
        return None
    tallest = max(len(item["layers"]) for item in selections.values())
    drawing, panels = canvas(len(selections), height=1.1 + 0.3 * tallest)
    told = []
    for axes, (method, item) in zip(panels, selections.items(), strict=True):
        _cells(axes, item)
        _outline(axes, item)
        told += [f"{method}: chosen layer {c['layer']}, coefficient {c['coefficient']:g}." for c in item["chosen"]]
        axes.set_xlim(-0.5, len(item["coefficients"]) - 0.5)
        shown = _envelope(axes, item)
        axes.set_ylim(-1.5 if shown else -0.5, len(item["layers"]) - 0.5)
        axes.set_xticks(range(len(item["coefficients"])), [signed(value, "g") for value in item["coefficients"]])
        names = [*(["random"] if shown else []), *map(str, item["layers"])]
        axes.set_yticks(range(-1 if shown else 0, len(item["layers"])), names)
        axes.set_xlabel(f"coefficient ({summary['unit']})")
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        base = f"baseline {100 * item['baseline']:.0f}"
        axes.set_title(f"{method}: {full_name(summary, 'mc1')}, %, exploratory; {base}", loc="left")
    folds = f", mean over {summary['folds']} folds" if summary["folds"] > 1 else ""
    return Figure(
        "heat_map",
        "Layer and coefficient",
        f"MC1 on the tune split{folds}. Colour: above (blue) or below (red) the baseline. Outlined: what was "
        f"chosen{' in a fold' if folds else ''}. Underlined: differs from the baseline after correction for all cells "
        f"(p < .05, max-T permutation{', in every fold' if folds else ''}). {_random(selections, bool(folds))}"
        "The best of many cells is too good by chance: only the test split counts.",
        "Heat map of tune-split MC1 by layer and coefficient, exploratory. " + " ".join(dict.fromkeys(told)),
        svg(drawing, "heat_map"),
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
        p = item["p_adjusted"][y][x]
        if p is not None and p < 0.05:
            axes.plot([x - 0.22, x + 0.22], [y - 0.3, y - 0.3], color=ink, lw=0.9)


def _envelope(axes: Axes, item: dict[str, Any]) -> bool:
    """A row below the map: the range of random directions at the chosen layer, per size of coefficient."""
    ranges = {found["coefficient"]: (found["low"], found["high"]) for found in item["envelope"]}
    for x, coefficient in enumerate(item["coefficients"]):
        if abs(coefficient) in ranges:
            low, high = ranges[abs(coefficient)]
            span = f"{100 * low:.0f}–{100 * high:.0f}"
            axes.text(x, -1, span, color=PALETTE["muted"], fontsize=7, ha="center", va="center")
    return bool(ranges)


def _random(selections: dict[str, Any], folds: bool) -> str:
    fold = " of the first fold" if folds else ""
    draws = max((found["draws"] for item in selections.values() for found in item["envelope"]), default=0)
    return (
        f"Last row: the lowest and highest of {draws} random directions of the same norm at the chosen layer{fold}. "
        if draws
        else ""
    )


def _outline(axes: Axes, item: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    for cell in item["chosen"]:
        if cell["coefficient"] in item["coefficients"] and cell["layer"] in item["layers"]:
            x, y = item["coefficients"].index(cell["coefficient"]), item["layers"].index(cell["layer"])
            frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#14181d", lw=2, zorder=5)
            axes.add_patch(frame)
