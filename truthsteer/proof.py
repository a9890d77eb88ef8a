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

PER_TOKEN = {torch.float32: 2e-4, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest rounding error allowed in one log-probability, in nats per token: batches of another shape round differently."""

SHARE = 0.25
"""The mean error may be at most this share of what steering itself changes, so that no dtype's rounding can hide a
vector that is missing, doubled or misplaced."""

SAME_BATCH = 1 << 30
"""A batch budget under which rows share one pass, so that equal rows round equally."""


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
) -> list[Check]:
    """Check steering on a few branches.

    Args:
        lm: the model.
        branches: contexts with answers, of different lengths; two or more.
        injection: a vector, layer and coefficient strong enough to show.
        operator: how it is applied.
        batch_tokens: as in the run itself.

    Returns:
        The checks, all passed.

    Raises:
        UserError: a check fails; the message names it.
    """
    off = Injection(injection.layer, injection.vector, 0.0)
    together = _logprobs(lm, branches, [None, injection], operator, batch_tokens)
    plain, steered = together[0], together[1]
    tokens = torch.tensor([len(answer) for branch in branches for answer in branch.continuations])
    change = (steered - plain).abs()
    dtype = next(lm.layers[injection.layer].parameters()).dtype
    cap, effect = PER_TOKEN[dtype], SHARE * float((change / tokens).mean())

    def close(name: str, meaning: str, gaps: Tensor) -> Check:
        """The mean error against the effect, unless the largest one passes its cap."""
        largest, mean = float(gaps.abs().max()), float(gaps.abs().mean())
        value, bound = (largest, cap) if largest > cap else (mean, effect)
        return Check(name, meaning, value, bound, value <= bound)

    trio: list[Injection | None] = [None, off, injection]
    zero = [
        (_logprobs(lm, [b], trio, operator, SAME_BATCH, False) - _logprobs(lm, [b], [None] * 3, operator, SAME_BATCH))[
            :2
        ]
        for b in branches
    ]
    alone = torch.cat([_logprobs(lm, [branch], [injection], operator, batch_tokens)[0] for branch in branches])
    full = torch.cat([_one_pass(lm, branch, injection, operator) for branch in branches])
    applied, untouched = _applied(lm, branches[0], injection, operator)
    checks = [
        _at_most(
            "coefficient_0", "Beside steered rows, the baseline and coefficient 0 equal the model without hooks.",
            torch.cat(zero, dim=1), 0.0,
        ),
        close("row_alone", "A row among other questions and conditions equals the row alone.", (alone - steered) / tokens),
        close("one_pass", "Shared prefix plus answer equals one full forward pass.", (full - steered) / tokens),
        close(
            "decoding", "A left-padded batch, decoded token by token, equals one full forward pass each.",
            _decoding(lm, branches, injection, operator),
        ),
        _at_most("applied_once", "The layer changes by the operator's change, once, at every position.", applied, 0.05),
        _at_most("below_untouched", "No layer below the steered one changes.", untouched, 0.0),
        Check(
            "scores_change", "Every scored answer's log-probability does change.",
            float(change.min()), 0.0, bool(change.min() > 0),
        ),
    ]  # fmt: skip
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UserError(
            f"The steering proof fails at layer {injection.layer}: {failed[0].meaning} Difference {failed[0].value:.3g}, "
            f"bound {failed[0].bound:.3g} ({failed[0].name}). Nothing was measured. Try dtype=fp32; if it fails there too, "
            "this model's layers or this operator do not behave as truthsteer needs."
        )
    return checks


def worst(proofs: Sequence[Sequence[Check]]) -> dict[str, Any]:
    """Of several proofs, each check where it came closest to failing; `{"passed", "checks"}`, ready for JSON."""
    closest = [
        max(same, key=lambda check: check.value / check.bound if check.bound else -check.value)
        for same in zip(*proofs, strict=True)
    ]
    return {"passed": all(check.passed for check in closest), "checks": [asdict(check) for check in closest]}


def _at_most(name: str, meaning: str, gap: Tensor, bound: float) -> Check:
    value = float(gap.abs().max())
    return Check(name, meaning, value, bound, value <= bound)


def _logprobs(
    lm: LanguageModel,
    branches: Sequence[Branch],
    conditions: Sequence[Injection | None],
    operator: Operator,
    budget: int,
    share: bool = True,
) -> Tensor:
    """[conditions, answers of all branches] float64."""
    found = {
        (item.condition, item.branch, item.continuation): item.logprob
        for _, scores in score(lm, branches, conditions, operator, budget, share=share)
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
    """How far the steered layer's change is from the operator's, relative to that change; and any change below it.

    Both changes are taken where the layer's rounding leaves them, so the bound does not grow with massive activations.
    """
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
    before = plain[injection.layer]
    wanted = operator.apply(before, vector, strength).double() - before.double()
    found = steered[injection.layer].double() - before.double()
    error = (found - wanted).norm(dim=-1).max() / wanted.norm(dim=-1).max()
    below = [(steered[layer] - plain[layer]).abs().max().cpu() for layer in layers[:-1]]
    return error.cpu(), torch.stack(below).max() if below else torch.zeros(())


def _decoding(lm: LanguageModel, branches: Sequence[Branch], injection: Injection, operator: Operator) -> Tensor:
    """Differences of the answers' token log-probabilities between generation's way (a left-padded batch, then one token
    at a time) and one full forward pass over each text alone. [branches, tokens]
    """
    fed = min(len(branch.continuations[0]) for branch in branches)
    ids, mask = lm.pad([branch.context for branch in branches], left=True)
    answers, _ = lm.pad([branch.continuations[0][:fed] for branch in branches])
    with RowSteering(lm, [injection], operator) as steering:
        steering.assign(torch.zeros(len(branches), dtype=torch.long))
        cache, step, together = lm.new_cache(), ids, []
        for place in range(fed):
            logprobs = lm.logits(lm.forward(step, cache=cache, mask=mask))[:, -1].log_softmax(-1)
            step = answers[:, place : place + 1]
            together.append(logprobs.gather(-1, step.to(logprobs.device))[:, 0].cpu())
            mask = torch.cat([mask, mask.new_ones(len(branches), 1)], dim=1)
        steering.assign(torch.zeros(1, dtype=torch.long))
        alone = []
        for branch, answer in zip(branches, answers, strict=True):
            whole = torch.tensor([branch.context + branch.continuations[0][: fed - 1]], device=lm.device)
            logprobs = lm.logits(lm.forward(whole))[0, len(branch.context) - 1 :].log_softmax(-1)
            alone.append(logprobs.gather(-1, answer[:, None].to(logprobs.device))[:, 0].cpu())
    return torch.stack(together, dim=1) - torch.stack(alone)
