"""What the doctor's measurements mean: room below each format's largest number, which dtype is safe, and what to type.

Headroom is in bits: log2(largest number of the format / largest number found), so that 1 bit is a factor of 2 and less
than 0 is overflow. A run in bf16 or fp32 tells what fp16 would do, since both hold what fp16 cannot; a run whose numbers
are not finite tells only of formats with no more range than its own. Knows numbers and names, neither torch nor a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FP16_MAX = 65504.0
BF16_MAX = 3.3895313892515355e38
FINITE_MAX = 1e19
"""The largest number that a norm can square in float32. What passes it counts as not finite."""

MARGIN_BITS = 1.0
"""Headroom below which a format is not called safe: other texts reach further than the few that were read."""

MASSIVE = 4
"""Channels left out where massive ones would hide the rest."""

MIN_LENGTH = 8
"""The smallest steering.max_length there is."""

POLICIES = {
    "fp16_pure": "fp16 throughout",
    "fp16": "fp16, with the residual stream in fp32",
    "bf16": "bf16",
    "fp32": "fp32",
}
"""Policies the report judges, with what they are, from the least range to the most."""

PARTS = {"residual": "residual stream", "norm": "norms after sublayers", "matmul": "matrix products"}
"""Group of points (`points.GROUPS`) -> in words."""


def bits(largest: float | None, top: float = FP16_MAX) -> float | None:
    """Headroom of a largest |x| below `top`; None where nothing but zero, or nothing finite, was found."""
    if not largest or not math.isfinite(largest):
        return None
    return math.log2(top / largest)


def number(value: float | None) -> float | None:
    """A number as JSON takes it: None where it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def token_sum(mean_abs: float) -> dict[str, Any]:
    """From how many tokens on a sum over tokens may pass fp16's largest number, at `mean_abs` per token.

    It is the earliest: signs that differ, and largest channels that are not the same, put it off.
    """
    found = math.floor(FP16_MAX / mean_abs) + 1 if mean_abs > 0 and math.isfinite(mean_abs) else None
    return {"mean_abs": number(mean_abs), "from_tokens": found}


def context(offending: Sequence[Sequence[int]], lengths: Sequence[int], words: str, finite: bool) -> str:
    """Whether a shorter `steering.max_length` could help, in a sentence.

    What stays of a text keeps its numbers, however much is cut after it: a causal model cannot see what follows.

    Args:
        offending: of each text, the tokens that overflow.
        lengths: tokens of each text.
        words: the token that overflows first of all.
        finite: whether the numbers were finite as they were computed, so that overflow is a prediction for fp16.
    """
    hit = [min(tokens) for tokens in offending if tokens]
    what = "passes 65504, too much for fp16 throughout" if finite else "is not finite"
    if not hit:
        return "No token passes 65504, fp16's largest number: no need for a shorter steering.max_length."
    first, texts = min(hit), f"{len(hit)} of {len(offending)} texts"
    if first < MIN_LENGTH or len(hit) == len(offending):
        return (
            f"In {texts} a token {what}, the first of them token {first} ({words!r}): a shorter steering.max_length "
            "cannot help, since the tokens that stay keep their numbers."
        )
    cut = sum(length > first for length in lengths)
    return (
        f"In {texts} a token {what}, all from token {first} ({words!r}) on: steering.max_length={first} would cut them, "
        f"and the answers with them, in {cut} of the texts. The tokens that stay keep their numbers."
    )


def complete(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The report: what `doctor.examine` measured, with headroom's verdicts and what to type added."""
    report = dict(measured)
    report["policies"] = [_policy(report, name) for name in POLICIES]
    report["outcome"] = _outcome(report)
    report["verdict"] = _verdict(report)
    report["overrides"] = _overrides(report)
    report["besides"] = _besides(report)
    return report


def own_policy(policy: Mapping[str, Any]) -> str:
    """Which of `POLICIES` a dtype is, by its range."""
    if policy["weights"] != "fp16":
        return str(policy["weights"])
    return "fp16" if policy["residual"] == "fp32" else "fp16_pure"


def broken(report: Mapping[str, Any]) -> bool:
    """Whether a number at a real token was not finite, in any pass."""
    return any(item["bad_real"] for item in report["passes"])


def _policy(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Whether a policy would hold the numbers, with the headroom in its tightest place."""
    own = own_policy(report["policy"])
    if broken(report):
        order = list(POLICIES)
        same = name == own or order.index(name) < order.index(own)
        why = f"not finite under dtype={report['policy']['name']}" + (
            "" if name == own else ", which has more range" if same else ": run stages=[doctor] under this dtype"
        )
        return {"name": name, "safe": False if same else None, "bits": None, "why": why}
    room: dict[str, float | None] = dict(report["headroom"])
    if name in ("bf16", "fp32"):
        tops = (("residual", report["largest"]["residual"]), ("matmul", report["largest"]["matmul"]))
        room = {part: bits(value, FINITE_MAX) for part, value in tops}
    elif name == "fp16":  # residual stream and norms are fp32
        room = {part: room[part] for part in ("matmul", "scores", "weights")}
    weights, scores = room.pop("weights", None), room.pop("scores", None)
    if weights is not None and weights < 0:
        why = f"a weight passes 65504: {shown(report['largest']['weights'])}"
        return {"name": name, "safe": False, "bits": weights, "why": why}
    known = {part: value for part, value in room.items() if value is not None}
    if not known:
        return {"name": name, "safe": None, "bits": None, "why": "nothing was measured"}
    part = min(known, key=lambda key: known[key])
    least = known[part]
    if least < MARGIN_BITS:
        return {"name": name, "safe": False, "bits": least, "why": _too_little(report, name, part, least)}
    unknown = []
    if report["missing_points"]:
        unknown.append(f"not measured: {', '.join(report['missing_points'])}")
    if scores is not None and scores < MARGIN_BITS:
        unknown.append(
            f"attention scores may reach {report['largest']['scores']:.3g}: run stages=[doctor] under this dtype"
        )
    if unknown and name in ("fp16_pure", "fp16"):
        return {"name": name, "safe": None, "bits": least, "why": "; ".join(unknown)}
    return {"name": name, "safe": True, "bits": least, "why": f"least headroom in the {PARTS[part]}"}


def _too_little(report: Mapping[str, Any], name: str, part: str, least: float) -> str:
    predicted = report["predicted"]
    if name == "fp16_pure" and predicted is not None and least < 0:
        return f"passes 65504 first at {predicted['where']}"
    what = "more than it holds" if least < 0 else f"less than {MARGIN_BITS:g} bit of headroom"
    return f"{PARTS[part]}: {report['largest'][part]:.3g} at most, {what}"


def _outcome(report: Mapping[str, Any]) -> str:
    """What is said of the dtype that the report was made under."""
    if broken(report):
        return "not finite"
    if any(check["passed"] is False for check in report["checks"]):
        return "wrong"
    safe = by_name(report)[own_policy(report["policy"])]["safe"]
    return {True: "safe", False: "no headroom", None: "unknown"}[safe]


def by_name(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in report["policies"]}


def _verdict(report: Mapping[str, Any]) -> str:
    name, outcome = report["policy"]["name"], report["outcome"]
    own = by_name(report)[own_policy(report["policy"])]
    if outcome == "not finite":
        first = next(item for item in report["passes"] if item["bad_real"])
        only = " under steering only" if first["name"] == "steered" else ""
        spot = first["first"]
        return (
            f"dtype={name} fails{only}: the numbers are first not finite at {spot['where']} (token {spot['position']} "
            f"{spot['token']!r} of {spot['text']!r})."
        )
    if outcome == "wrong":
        failed = next(check for check in report["checks"] if check["passed"] is False)
        return f"dtype={name}: the numbers are finite and cannot be trusted ({failed['name']}). {failed['meaning']}"
    if outcome == "no headroom":
        return f"dtype={name} held these texts and may not hold others: {own['why']}."
    if outcome == "unknown":
        return f"dtype={name} held these texts; whether it holds others is not known: {own['why']}."
    safe = "is safe" if report["thorough"] else "holds, as far as the short check goes"
    return f"dtype={name} {safe}: all numbers are finite, with {own['bits']:.1f} bits of headroom or more."


def _overrides(report: Mapping[str, Any]) -> list[str]:
    """What to type instead, one or another: whatever mends what the verdict names. Nothing for a safe run."""
    mending = remedies(report)
    if report["outcome"] == "wrong":
        return [item["type"] for item in mending[:1]]
    if report["outcome"] not in ("not finite", "no headroom"):
        return []
    # What a broken copy delivers is in nobody's format: that remedy comes before any dtype.
    typed = [item["type"] for item in mending if item["type"] == _ONE_GPU]
    own, found = own_policy(report["policy"]), by_name(report)
    order = ("bf16", "fp16", "fp32") if report["bf16_native"] else ("fp16", "fp32")
    better = [name for name in order if name != own and found[name]["safe"]]
    unknown = [name for name in order if name != own and found[name]["safe"] is None]
    typed += [f"dtype={name}" for name in better or unknown]
    finite = [item["finite_coefficient"] for item in report["passes"]]
    return typed + [f"steering.coefficients=[{value:g}]" for value in finite if value is not None]


def _besides(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What to type as well, each with the fault that it mends: those that no alternative of `overrides` does."""
    found = [item for item in remedies(report) if item["type"] not in report["overrides"]]
    if report["equal_pairs"] and report["longest"] > report["max_length"]:
        why = f"pairs equal once cut after {report['max_length']} tokens: {report['equal_pairs']}; it reads them whole"
        found.append({"type": f"steering.max_length={report['longest']}", "why": why})
    return found


_ONE_GPU = "CUDA_VISIBLE_DEVICES=0"


def remedies(report: Mapping[str, Any], checks: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The remedy of each check that failed, if it has one, and the check; of these checks alone, if they are named."""
    typed = {"handover": _ONE_GPU, "gpu_copies": _ONE_GPU, "reference": "dtype=fp32"}
    if report["policy"]["attention"] != "eager":
        typed |= dict.fromkeys(("bos_agreement", "padding_finite", "padding_sides"), "dtype.attention=eager")
    if "," in report["device"]:
        typed["bos_agreement"] = _ONE_GPU
    failed = [
        check["name"]
        for check in report["checks"]
        if check["passed"] is False and check["name"] in typed and (checks is None or check["name"] in checks)
    ]
    return [
        {"type": remedy, "why": f"{' and '.join(name for name in failed if typed[name] == remedy)} failed"}
        for remedy in dict.fromkeys(typed[name] for name in failed)
    ]


def shown(value: float | None) -> str:
    """A magnitude in three digits; a dash where there is none."""
    return "–" if value is None else f"{value:.3g}"
