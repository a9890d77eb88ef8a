"""Gradients through the upper layers of a frozen model, with the lower ones computed once."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, build
from test_branching import branches

from truthsteer.errors import UserError
from truthsteer.hooks import Injection, steered
from truthsteer.model import LanguageModel
from truthsteer.scoring import score
from truthsteer.upper import Upper

LAYER = 1


@pytest.fixture(params=FAMILIES)
def lm(request, tokenizer) -> LanguageModel:
    return LanguageModel(build(request.param), tokenizer)


def vector(lm: LanguageModel) -> torch.Tensor:
    return torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1))


def test_log_probabilities_are_those_of_scoring(lm):
    asked, added = branches(), vector(lm)
    upper = Upper(lm, LAYER, asked)
    scored = {
        (item.branch, item.continuation): item.logprob
        for _, unit in score(lm, asked, [Injection(LAYER, added, 1.0)])
        for item in unit
    }
    wanted = torch.tensor([scored[row] for row in upper.rows])
    torch.testing.assert_close(upper.logprobs(added), wanted, atol=2e-4, rtol=1e-5)
    each = added.expand(len(upper.rows), -1)
    torch.testing.assert_close(upper.logprobs(each), wanted, atol=2e-4, rtol=1e-5)


def test_the_gradient_is_that_through_the_whole_model(lm):
    asked, added = branches()[:2], vector(lm).requires_grad_()
    upper = Upper(lm, LAYER, asked)
    (found,) = torch.autograd.grad(upper.logprobs(added).sum(), added)
    total = torch.zeros(())
    for place, index in upper.rows:
        branch = asked[place]
        answer = branch.continuations[index]
        handle = lm.layers[LAYER].register_forward_hook(lambda _m, _i, out: out + added)
        logits = lm.model(input_ids=torch.tensor([[*branch.context, *answer]])).logits[0]
        handle.remove()
        logprobs = logits[len(branch.context) - 1 : -1].log_softmax(-1)
        total = total + logprobs[torch.arange(len(answer)), torch.tensor(answer)].sum()
    (wanted,) = torch.autograd.grad(total, added)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_what_is_below_runs_once_and_everything_is_as_before(lm):
    calls: list[int] = []
    for number, layer in enumerate(lm.layers):
        layer.mlp.register_forward_hook(lambda _m, _i, _o, number=number: calls.append(number))
    lm.layers[0].forward = lm.layers[0].forward  # as accelerate does it
    own = lm.layers[0].forward
    upper = Upper(lm, LAYER, branches())
    for _ in range(3):
        upper.logprobs(vector(lm))
    assert [calls.count(number) for number in range(lm.num_layers)] == [1, 1, 3, 3]
    assert lm.layers[0].forward is own
    assert "forward" not in lm.layers[1].__dict__
    with steered(lm, vector(lm), 1.0, layer=0):
        lm.forward(torch.tensor([[2, 5, 6]]))
    assert calls[-4:] == [0, 1, 2, 3]


def test_layers_that_give_tuples_are_given_tuples(tokenizer):
    lm = LanguageModel(build("llama"), tokenizer)
    wanted = Upper(lm, LAYER, branches()).logprobs(vector(lm))
    norm = lm.decoder.norm
    for layer in lm.layers:
        layer.register_forward_hook(lambda _m, _i, out: out if isinstance(out, tuple) else (out,))
        layer.register_forward_pre_hook(lambda _m, inputs: tuple(x[0] if isinstance(x, tuple) else x for x in inputs))
    norm.register_forward_pre_hook(lambda _m, inputs: tuple(x[0] if isinstance(x, tuple) else x for x in inputs))
    torch.testing.assert_close(Upper(lm, LAYER, branches()).logprobs(vector(lm)), wanted)


def test_a_layer_that_is_not_there_is_named(lm):
    with pytest.raises(UserError, match="layer=9 is not a layer"):
        Upper(lm, 9, branches())
