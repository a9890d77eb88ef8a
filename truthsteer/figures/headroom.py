"""How near a model's numbers come to fp16's largest, layer by layer; and the same in words, for the page.

It reads the doctor's report in the summary and knows no model: what the report lacks is not drawn, and never taken as fine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truthsteer import numerics
from truthsteer.figures.style import PALETTE, SERIES, Figure, canvas, short, signed, svg
from truthsteer.numerics import FP16_MAX, PARTS
from truthsteer.points import WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP = math.log2(FP16_MAX)

DEEPEST = 30.0
"""Bits below the largest number, under which nothing is drawn."""

MARKS = 8
"""At most so many numbers on a scale."""

TENFOLD = math.log2(10)


@dataclass(frozen=True)
class Group:
    """The largest number of one kind over all layers."""

    key: str
    name: str
    exists: bool
    """False: the model has none, or none was recorded."""
    finite: bool
    """In every layer, at every token that is not padding."""
    largest: float | None
    """Of those that are finite, without steering."""
    layer: int | None
    """Where that is."""
    where: str
    """More about where: the token, or what of the layer."""
    bits: float | None
    """Of headroom: log2(65504 / largest)."""
    least: float | None
    """The same over all passes, that with steering included."""


def headroom(summary: dict[str, Any]) -> Figure | None:
    """Largest number per layer and kind on a logarithmic scale, against fp16's largest."""
    report = summary.get("numerics")
    if not report or not report["layers"]:
        return None
    drawing, [axes] = canvas(1, height=4.2)
    found = [group for group in groups(report) if group.exists and group.key in PARTS]
    for group in found:
        _curve(axes, report, group)
    steered, bad = _steered(axes, report), first_bad(report)
    drawn = [value for group in found for _, value in _values(report, group.key) if value]
    _scales(axes, [layer["layer"] for layer in report["layers"]], [*drawn, *([steered] if steered else [])])
    _limit(axes, bad)
    _peak(axes, found)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return Figure(
        "headroom",
        "Numeric headroom",
        f"The largest number in each layer, over {report['texts']} texts read with dtype={report['policy']['name']}. What is "
        "above the line becomes infinite in fp16, and NaN soon after: dtype=fp16_pure needs every curve below it; dtype=fp16, "
        "which keeps the residual stream and the norms in fp32, only that of the matrix products; bf16 and fp32 hold all of "
        f"them. A bit of headroom is a factor of 2.{' Numbers that are not finite are not drawn.' if bad else ''}",
        f"Line chart, logarithmic, of the largest number in each layer against {FP16_MAX:,.0f}, the largest of fp16. "
        + " ".join(_spelled(report, group) for group in found)
        + (f" Largest under steering: {amount(steered)}." if steered else "")
        + (f" {bad['sentence']}" if bad else ""),
        svg(drawing, "headroom"),
    )


def groups(report: dict[str, Any]) -> list[Group]:
    """What the report says of each kind of numbers, over all layers; the weights last."""
    found = [_group(report, key, name) for key, name in PARTS.items()]
    bits = report["headroom"]["weights"]
    if bits is not None:
        found.append(Group("weights", "weights", True, True, FP16_MAX / 2**bits, None, "", bits, bits))
    return found


def _group(report: dict[str, Any], key: str, name: str) -> Group:
    cells = {layer["layer"]: layer[key] for layer in report["layers"] if layer[key] is not None}
    known = {layer: cell for layer, cell in cells.items() if cell["largest"]}  # 0: nothing was finite
    layer = max(known, key=lambda number: known[number]["largest"], default=None)
    worst = known[layer] if layer is not None else {"largest": None}
    return Group(
        key=key,
        name=name,
        exists=bool(cells),
        finite=len(known) == len(cells) and not any(passed["bad_real"] for passed in _unsteered(report)),
        largest=worst["largest"],
        layer=layer,
        where=f"token {worst['position']} {worst['token']!r}" if worst.get("token") else _product(worst.get("point")),
        bits=numerics.bits(worst["largest"]),
        least=report["headroom"][key],
    )


def _product(point: str | None) -> str:
    return "" if point is None else WORDS.get(point, point)


def _unsteered(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [passed for passed in report["passes"] if passed["name"] != "steered"]


def first_bad(report: dict[str, Any]) -> dict[str, Any] | None:
    """Where numbers are first not finite: `layer`, `words` for the figure, and all of it in a `sentence`."""
    passed = next((passed for passed in report["passes"] if passed["first"] is not None), None)
    if passed is None:
        return None
    first = passed["first"]
    how = {"left": " under left padding", "steered": " under steering"}.get(passed["name"], "")
    how += "" if passed["bad_real"] else ", in padding alone"
    token = f" (token {first['position']} {first['token']!r})" if passed["bad_real"] and first["token"] else ""
    return {
        "layer": first["layer"],
        "where": first["where"],
        "words": f"first not finite{how}:\n{short(first['where'])}",
        "sentence": f"Numbers are first not finite{how} at {first['where']}{token}.",
    }


def bits(value: float | None) -> str:
    """Headroom as text: `3.2 bits`, `−4.0 bits`."""
    return "unknown" if value is None else f"{_minus(round(value, 1) + 0.0, '.1f')} bits"


def amount(value: float | None) -> str:
    """A number to three digits that a layman reads: `1,040,000`, `0.012`, `4.2e+12`."""
    if value is None:
        return "not finite"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e9 else f"{rounded:g}"


def _minus(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−")


def _flipped(height: Any) -> Any:
    """log2 of a number as bits of headroom, and back."""
    return TOP - height


def _values(report: dict[str, Any], key: str) -> list[tuple[int, float | None]]:
    """(layer, largest number of this kind); None where there is none, or it is not finite."""
    return [(layer["layer"], (layer[key] or {}).get("largest")) for layer in report["layers"]]


def _curve(axes: Axes, report: dict[str, Any], group: Group) -> None:
    colour, marker = SERIES[list(PARTS).index(group.key)]
    values = _values(report, group.key)
    heights = [math.log2(value) if value else math.nan for _, value in values]
    room = bits(group.bits) if group.finite else "not finite"
    axes.plot(
        [layer for layer, _ in values],
        heights,
        color=PALETTE[colour],
        marker=marker,
        ms=4,
        lw=1.6,
        label=f"{group.name} ({room})",
        zorder=3,
    )


def _steered(axes: Axes, report: dict[str, Any]) -> float | None:
    """The largest number of the residual stream under steering, as a line from the steered layer on."""
    passed = next((passed for passed in report["passes"] if passed["name"] == "steered"), None)
    if passed is None or not passed["largest"] or passed["layer"] is None:
        return None
    height, end = math.log2(passed["largest"]), report["layers"][-1]["layer"] + 0.4
    room = bits(TOP - height) if passed["first"] is None else "not finite"
    axes.plot(
        [passed["layer"] - 0.4, end],
        [height, height],
        color=PALETTE["ink"],
        lw=1.2,
        ls=(0, (1, 2)),
        label=f"largest when steered by {signed(passed['coefficient'], 'g')} in layer {passed['layer']} ({room})",
    )
    return float(passed["largest"])


def _scales(axes: Axes, layers: Sequence[int], values: Sequence[float]) -> None:
    """Numbers on the left, bits of headroom on the right, layers below; room for words at the top."""
    heights = [TOP, *map(math.log2, values)]
    low = max(min(heights), max(heights) - DEEPEST) - 1.5 if values else TOP - 16
    high = max(heights) + 0.25 * (max(heights) - low)
    axes.set_ylim(low, high)
    decades = range(math.ceil(low / TENFOLD), math.floor(high / TENFOLD) + 1)
    shown = decades[:: math.ceil(len(decades) / MARKS)]
    axes.set_yticks([power * TENFOLD for power in shown], [amount(10.0**power) for power in shown])
    axes.set_ylabel("largest number (absolute value)")
    right = axes.secondary_yaxis("right", functions=(_flipped, _flipped))
    step = 2 ** math.ceil(math.log2(max(2.0, (high - low) / MARKS)))
    ticks = [bit for bit in range(-1024, 1025, step) if low <= TOP - bit <= high]
    right.set_yticks(ticks, [_minus(bit, "g") for bit in ticks])
    right.spines["right"].set_visible(False)
    right.tick_params(length=0, labelcolor=PALETTE["muted"])
    right.set_ylabel("headroom in fp16 (bits)")
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.set_xticks(layers[:: math.ceil(len(layers) / 14)])
    axes.set_xlabel("layer")


def _limit(axes: Axes, bad: dict[str, Any] | None) -> None:
    """fp16's largest number and, if there are any, where numbers are first not finite."""
    (first, last), top, red = axes.get_xlim(), axes.get_ylim()[1], PALETTE["fourth"]
    axes.axhspan(TOP, top, color=red, alpha=0.08, lw=0, zorder=0)
    axes.axhline(TOP, color=red, lw=1.2, zorder=2)
    words = f"above {FP16_MAX:,.0f}: too large for fp16"
    if bad is None:
        _write(axes, words, (first, top), rightwards=True)
        return
    x = min(max(bad["layer"], first + 0.1), last - 0.1)  # the embedding and the final norm stand outside
    left = bool(x < (first + last) / 2)
    axes.axvline(x, color=red, lw=1.2, ls=(0, (4, 3)), zorder=2)
    _write(axes, bad["words"], (x, top), rightwards=left)
    _write(axes, words, (last if left else first, TOP), rightwards=not left, hangs=False)


def _peak(axes: Axes, found: Sequence[Group]) -> None:
    """A ring around the largest number, and above the figure what and where it is."""
    peak = max(found, key=lambda group: group.largest or 0, default=None)
    if peak is None or not peak.largest or peak.layer is None:
        axes.set_title("no number is finite", loc="left")
        return
    axes.plot([peak.layer], [math.log2(peak.largest)], "o", ms=10, mfc="none", mec=PALETTE["ink"], zorder=4)
    what = "largest" if all(group.finite for group in found) else "largest finite number"
    place = f", {short(peak.where)}" if peak.where else ""
    axes.set_title(f"{what}: {amount(peak.largest)} in the {peak.name}, layer {peak.layer}{place}", loc="left")


def _write(axes: Axes, text: str, at: tuple[float, float], rightwards: bool, hangs: bool = True) -> None:
    """Small red text that hangs from a point, or stands on it."""
    axes.annotate(
        text,
        at,
        xytext=(5 if rightwards else -5, -4 if hangs else 3),
        textcoords="offset points",
        ha="left" if rightwards else "right",
        va="top" if hangs else "bottom",
        fontsize=8,
        color=PALETTE["fourth"],
    )


def _spelled(report: dict[str, Any], group: Group) -> str:
    """A curve for those who do not see it: its ends, its peak, and where it is too high or gone."""
    values = _values(report, group.key)
    ends = [f"{amount(value)} in layer {layer}" for layer, value in (values[0], values[-1]) if value]
    told = ends if group.layer is None else [f"largest {amount(group.largest)} in layer {group.layer}", *ends]
    for words, layers in (
        ("too large for fp16", [layer for layer, value in values if value and value > FP16_MAX]),
        ("not finite", [layer for layer, value in values if not value]),
    ):
        if layers:
            told.append(f"{words} in {len(layers)} of {len(values)} layers, {layers[0]} to {layers[-1]}")
    room = bits(group.bits) if group.finite else "not finite"
    return f"{group.name[0].upper()}{group.name[1:]}, headroom {room}: {'; '.join(told)}."
