"""Texts passed through a model as a run would, in several ways: padded on either side, steered, and against fp32.

What is read of a pass is `probe`'s; what it means is `numerics`'. It changes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truthsteer.config import CoefficientUnit
from truthsteer.hooks import Injection, capture, halved
from truthsteer.model import LanguageModel
from truthsteer.numerics import MASSIVE, number
from truthsteer.operators import Operator
from truthsteer.points import place
from truthsteer.probe import probing
from truthsteer.reading import Reading, Spot, cause


@dataclass(frozen=True)
class Text:
    """A text as extraction reads it.

    Attributes:
        name: what it says, for people.
        ids: token ids, question and answer.
        answer: index of the answer's first token.
        pair: which (true, false) pair it belongs to.
        truthful: which of the two it is.
    """

    name: str
    ids: tuple[int, ...]
    answer: int
    pair: str
    truthful: bool


class Passes:
    """The chosen texts, ready to be passed through the model in several ways."""

    def __init__(
        self, lm: LanguageModel, texts: Sequence[Text], rows: Sequence[tuple[int, ...]], operator: Operator | None
    ) -> None:
        self.lm, self.texts, self.rows, self.operator = lm, texts, rows, operator

    def read(
        self, left: bool = False, injection: Injection | None = None, layer: int | None = None, logits: bool = True
    ) -> tuple[Reading, Tensor, Tensor | None]:
        """A pass, up to the logits: what was read, the final hidden states, and the output of `layer` if one is given."""
        ids, mask = self.lm.pad(self.rows, left)
        with ExitStack() as stack:
            probe = stack.enter_context(probing(self.lm, mask, injection, self.operator))
            taken = {} if layer is None else stack.enter_context(capture(self.lm, [layer]))
            hidden = self.lm.forward(ids, mask=mask if left else None)
            assert hidden is not None
            if logits:
                probe.read_logits(hidden)
            return probe.reading(), hidden, None if layer is None else taken[layer]

    def token(self, row: int, position: int) -> str:
        return str(self.lm.tokenizer.decode([self.rows[row][position]]))

    def describe(self, reading: Reading, spot: Spot | None, layer: int | None = None) -> dict[str, Any] | None:
        """A spot for people; position -1 is padding."""
        if spot is None:
            return None
        real = bool(reading.real[spot.row, spot.column])
        position = spot.column - int(reading.real[spot.row].int().argmax()) if real else -1
        return {
            "layer": spot.point.layer,
            "point": spot.point.name,
            "where": place(spot.point.name, spot.point.layer, steered=spot.point.layer == layer),
            "text": self.texts[spot.row].name,
            "position": position,
            "token": self.token(spot.row, position) if real else "<padding>",
            "largest": number(spot.value),
            "cause": cause(spot),
        }

    def finite(self, injection: Injection) -> float | None:
        """The largest coefficient, of a half of this one, a quarter ..., under which no text overflows."""
        for weaker in halved(injection):
            reading, _, _ = self.read(injection=weaker)
            if not bool((reading.bad & reading.real).any()):
                return weaker.coefficient
        return None

    def summary(
        self, name: str, reading: Reading, injection: Injection | None = None, finite: float | None = None
    ) -> dict[str, Any]:
        """One pass of the report; `finite` is what `finite` gives."""
        bad, real = reading.bad.any(0), reading.real
        layer = None if injection is None else injection.layer
        return {
            "name": name,
            "coefficient": None if injection is None else injection.coefficient,
            "finite_coefficient": finite,
            "layer": layer,
            "bad_texts": float((bad & real).any(1).float().mean()),
            "bad_real": float((bad & real).sum() / real.sum()),
            "bad_pad": None if bool(real.all()) else float((bad & ~real).sum() / (~real).sum()),
            "largest": reading.of("residual")[0] or None,
            "first": self.describe(reading, reading.first(), layer),
        }


def strongest(run: Passes, outputs: Tensor, layer: int, coefficient: float, unit: CoefficientUnit) -> Injection | None:
    """The difference of true and false texts at their last token, scaled as the run would scale its own vector.

    A random direction where they do not differ; None where no text is finite at the layer, or all is zero.
    """
    run.lm.check_layer(layer)
    rows = range(len(run.rows))
    values = [outputs[row, : len(run.rows[row])].cpu().double() for row in rows]  # [tokens, hidden]
    usable = [row for row in rows if bool(torch.isfinite(values[row]).all())]
    if not usable:
        return None
    answers = [values[row][min(run.texts[row].answer, len(values[row]) - 1) :] for row in usable]
    norm = float(torch.cat(answers).norm(dim=-1).mean())
    if norm == 0:
        return None
    last = {row: values[row][-1] for row in usable}
    true = [last[row] for row in usable if run.texts[row].truthful]
    false = [last[row] for row in usable if not run.texts[row].truthful]
    raw = (
        torch.stack(true).mean(0) - torch.stack(false).mean(0) if true and false else torch.zeros_like(last[usable[0]])
    )
    if float(raw.norm()) <= 1e-9 * norm:
        raw = torch.randn(len(raw), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        raw *= norm / raw.norm()
    scale = norm / float(raw.norm()) if unit is CoefficientUnit.residual_norm else 1.0
    return Injection(layer, (raw * scale).float(), coefficient)


def compare(
    lm: LanguageModel, rows: Sequence[tuple[int, ...]], reference: Callable[[], LanguageModel]
) -> dict[str, Any]:
    """Relative error of every layer's output at real tokens of the two shortest texts, against another model's.

    The other model is asked for once, and let go of before this returns.
    """
    shortest = sorted(rows, key=len)[:2]
    own = _outputs(lm, shortest)
    exact = reference()
    wanted = _outputs(exact, shortest)
    del exact
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    whole, rest = [], []
    for found, right in zip(own, wanted, strict=True):
        massive = right.abs().amax(0).topk(min(MASSIVE, right.shape[1] - 1)).indices
        keep = torch.ones(right.shape[1], dtype=torch.bool)
        keep[massive] = False
        whole.append(number(_relative(found, right)))
        rest.append(number(_relative(found[:, keep], right[:, keep])))
    largest = None if None in whole else max(value for value in whole if value is not None)
    return {"layers": whole, "layers_without_massive": rest, "largest": largest}


def _outputs(lm: LanguageModel, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Each layer's output at real tokens, [tokens, hidden] float64."""
    ids, mask = lm.pad(rows)
    with capture(lm, range(lm.num_layers)) as taken:
        lm.forward(ids)
        real = mask.bool()
        return [taken[layer][real.to(taken[layer].device)].cpu().double() for layer in range(lm.num_layers)]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
