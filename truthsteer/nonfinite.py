"""Logits that are not finite: the error that ends a run, instead of a score or a token made from them.

The error says whose numbers they are (what was asked, under which condition, steered at which layer), where in the model
they first were not finite, and what to type. It is the same wherever logits are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from truthsteer.config import Residual
from truthsteer.errors import UserError
from truthsteer.hooks import Injection, RowSteering, halved
from truthsteer.model import LanguageModel
from truthsteer.operators import Operator

SHOWN = 80
"""Characters of a question or an answer in a message."""
_ALONE = (
    "Read alone, the same text gives finite numbers: what stood beside it in the batch, or the hardware, made them."
)


@dataclass(frozen=True)
class Blame:
    """What it takes to say whose numbers were not finite, and why.

    Attributes:
        lm: the model.
        conditions: what each condition injects.
        names: of the conditions; empty if they have none.
        operator: how vectors are applied.
        steering: the hooks that are on the model while it is read.
    """

    lm: LanguageModel
    conditions: Sequence[Injection | None]
    names: Sequence[str]
    operator: Operator
    steering: RowSteering

    def whose(self, asked: str, condition: int) -> str:
        """What was asked, under which condition."""
        injection = self.conditions[condition]
        unnamed = "no steering" if injection is None else f"coefficient {injection.coefficient:g}"
        name = self.names[condition] if self.names else unnamed
        where = "not steered" if injection is None else f"steered at layer {injection.layer}"
        return f"{shown(asked)} under '{name}' ({where})"

    def text(self, ids: Sequence[int]) -> str:
        """The end of a text, where nobody said what was asked."""
        return str(self.lm.tokenizer.decode(ids, skip_special_tokens=True))[-SHOWN:]

    def error(self, fault: str, ids: Sequence[int], condition: int) -> UserError:
        """The error to raise.

        Args:
            fault: the sentence that says which number is not finite, without its full stop.
            ids: of the text that was read, up to there.
            condition: under which.
        """
        from truthsteer.probe import diagnose

        # The hooks are still there: from here on they steer nothing.
        self.steering.assign(torch.zeros(0, dtype=torch.long))
        injection = self.conditions[condition]
        where, steering = diagnose(self.lm, ids), ""
        if injection is not None and where:
            where += " It is so without steering."
        elif injection is not None and (where := diagnose(self.lm, ids, injection, self.operator)):
            finite = (each for each in halved(injection) if not diagnose(self.lm, ids, each, self.operator))
            steering = _weaker(next(finite, None))
        return UserError(f"{fault}. {where or _ALONE} {_remedy(self.lm, steering)}")


def shown(text: str) -> str:
    """Quoted, and not longer than a message can bear."""
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def _weaker(finite: Injection | None) -> str:
    """What to say of steering that overflows, and of the strongest that was found not to."""
    if finite is None:
        return "Steering overflows: type much smaller steering.coefficients"
    return (
        f"Steering overflows, and at a coefficient of {finite.coefficient:g} this text does not: type smaller "
        "steering.coefficients"
    )


def _remedy(lm: LanguageModel, steering: str) -> str:
    """What to type; nothing that the model already is."""
    if lm.model.get_input_embeddings().weight.dtype is not torch.float16:
        return f"{steering}." if steering else "Type stages=[doctor] to see why."
    kept = lm.policy is not None and lm.policy.residual is Residual.fp32
    wider = "dtype=bf16 or dtype=fp32" if kept else "dtype=bf16, or dtype=fp16 (float32 residual stream)"
    return f"{steering}, or {wider}." if steering else f"Type {wider}; stages=[doctor] shows which is safe."
