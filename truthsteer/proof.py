"""The steering proof: before anything is measured, steering is shown to do what it says and nothing else.

Six public evaluations of steering methods were wrong in ways that these checks catch: vectors added twice, added at
positions that are never scored, or to the first row of a batch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from truthsteer.errors import UserError
from truthsteer.hooks import Injection, RowSteering, capture
from truthsteer.model import LanguageModel
from truthsteer.operators import Operator
from truthsteer.prompts import Branch
from truthsteer.scoring import score

EPSILONS = 2000
"""Bound on differences that rounding alone may cause, in units of the dtype's epsilon times the numbers' size."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    meaning: str
    value: float
    bound: float
    passed: bool


def prove(
    lm: LanguageModel, branches: Sequence[Branch], injection: Injection, operator: Operator, batch_tokens: int
) -> dict[str, Any]:
    """Check steering on a few branches.

    Args:
        lm: the model.
        branches: contexts with answers, of different lengths; two or more.
        injection: the vector, layer and coefficient that are about to be measured.
        operator: how it is applied.
        batch_tokens: as in the run itself.

    Returns:
        `{"passed": bool, "checks": [...]}`, ready for JSON.

    Raises:
        UserError: a check fails; the message names it.
    """
    off = Injection(injection.layer, injection.vector, 0.0)
    together = _logprobs(lm, branches, [None, injection, off], operator, batch_tokens)
    plain, steered, zero = together[0], together[1], together[2]
    size = float(plain.abs().max().clamp(min=1.0))
    epsilon = float(torch.finfo(lm.decoder.layers[0].mlp.down_proj.weight.dtype).eps)
    rounding = EPSILONS * epsilon * size

    alone = torch.cat([_logprobs(lm, [branch], [injection], operator, batch_tokens)[0] for branch in branches])
    full = torch.cat([_one_pass(lm, branch, injection, operator) for branch in branches])
    change = (steered - plain).abs().min()
    applied, untouched = _applied(lm, branches[0], injection, operator)
    prompt_gap = _left_padding(lm, branches, injection, operator)
    checks = [
        _at_most("coefficient_0", "Coefficient 0 gives the unsteered model's log-probabilities.", zero - plain, 0.0),
        _at_most(
            "row_alone", "A row in a batch of questions and conditions equals the row alone.", alone - steered, rounding
        ),
        _at_most("one_pass", "Shared prefix plus answer equals one full forward pass.", full - steered, rounding),
        _at_most("left_padding", "A left-padded row of generation equals the row alone.", prompt_gap, rounding),
        _at_most(
            "applied_once",
            "The layer's output is the operator of the unsteered output, once, everywhere.",
            applied,
            8 * epsilon,
        ),
        _at_most("below_untouched", "No layer below the steered one changes.", untouched, 0.0),
        Check(
            "scores_change", "Every scored answer's log-probability does change.", float(change), 0.0, bool(change > 0)
        ),
    ]
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UserError(
            f"The steering proof fails: {failed[0].meaning} Difference {failed[0].value:.3g}, allowed "
            f"{failed[0].bound:.3g} ({failed[0].name}). Nothing was measured. Try dtype=fp32; if it fails there too, this "
            "model's layers or this operator do not behave as truthsteer needs."
        )
    return {"passed": True, "checks": [asdict(check) for check in checks]}


def _at_most(name: str, meaning: str, gap: Tensor, bound: float) -> Check:
    value = float(gap.abs().max())
    return Check(name, meaning, value, bound, value <= bound)


def _logprobs(
    lm: LanguageModel,
    branches: Sequence[Branch],
    conditions: Sequence[Injection | None],
    operator: Operator,
    budget: int,
) -> Tensor:
    """[conditions, answers of all branches] float64."""
    found = {
        (item.condition, item.branch, item.continuation): item.logprob
        for _, scores in score(lm, branches, conditions, operator, budget)
        for item in scores
    }
    ordered = [found[key] for key in sorted(found)]
    return torch.tensor(ordered, dtype=torch.float64).reshape(len(conditions), -1)


def _one_pass(lm: LanguageModel, branch: Branch, injection: Injection, operator: Operator) -> Tensor:
    """[answers] log-probabilities, each from one forward pass over context plus answer, without any cache."""
    totals = []
    with RowSteering(lm, [injection], operator) as steering:
        steering.assign(torch.zeros(1, dtype=torch.long))
        for continuation in branch.continuations:
            ids = torch.tensor([branch.context + continuation], device=lm.device)
            hidden = lm.forward(ids[:, :-1])
            assert hidden is not None
            logprobs = lm.logits(hidden[0, len(branch.context) - 1 :]).log_softmax(-1)
            targets = torch.tensor(continuation, device=logprobs.device)
            totals.append(logprobs.gather(-1, targets[:, None]).double().sum().cpu())
    return torch.stack(totals)


@torch.no_grad()
def _applied(lm: LanguageModel, branch: Branch, injection: Injection, operator: Operator) -> tuple[Tensor, Tensor]:
    """Relative error of the steered layer's output against operator(unsteered), and the change of all layers below."""
    ids = torch.tensor([branch.context + branch.continuations[0]], device=lm.device)
    layers = list(range(injection.layer + 1))
    row = torch.zeros(1, dtype=torch.long)
    with RowSteering(lm, [injection], operator) as steering, capture(lm, layers) as taken:
        lm.forward(ids)
        plain = dict(taken)
        steering.assign(row)
        lm.forward(ids)
        steered = dict(taken)
    device = plain[injection.layer].device
    vector = injection.vector.to(device)[None, None]
    strength = torch.full((1, 1, 1), injection.coefficient, device=device)
    wanted = operator.apply(plain[injection.layer], vector, strength).double()
    error = (steered[injection.layer].double() - wanted).abs().max() / wanted.abs().max()
    below = [(steered[layer] - plain[layer]).abs().max().cpu() for layer in layers[:-1]]
    return error.cpu(), torch.stack(below).max() if below else torch.zeros(())


def _left_padding(lm: LanguageModel, branches: Sequence[Branch], injection: Injection, operator: Operator) -> Tensor:
    """Difference of next-token log-probabilities between a left-padded batch and each context alone."""
    ids, mask = lm.pad([branch.context for branch in branches], left=True)
    gaps = []
    with RowSteering(lm, [injection], operator) as steering:
        steering.assign(torch.zeros(len(branches), dtype=torch.long))
        hidden = lm.forward(ids, mask=mask)
        assert hidden is not None
        together = lm.logits(hidden[:, -1])
        steering.assign(torch.zeros(1, dtype=torch.long))
        for row, branch in enumerate(branches):
            hidden = lm.forward(torch.tensor([branch.context], device=lm.device))
            assert hidden is not None
            gaps.append((lm.logits(hidden[:, -1])[0] - together[row]).abs().max().cpu())
    return torch.stack(gaps)
