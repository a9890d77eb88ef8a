"""Log-probabilities, the vocabulary taken part by part."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, REPO, build
from torch import nn

from truthsteer import head
from truthsteer.config import DtypeConfig, Residual, Weights
from truthsteer.head import greedy, logprobs
from truthsteer.model import LanguageModel
from truthsteer.precision import apply

PLACES = torch.tensor([0, 3, 3, 6, 6, 6, 1])
TOKENS = torch.tensor([0, 1713, 99, 100, 700, 5, 1200])


@pytest.fixture(params=FAMILIES)
def lm(request, tokenizer) -> LanguageModel:
    return LanguageModel(build(request.param), tokenizer)


def states(lm: LanguageModel) -> torch.Tensor:
    return torch.randn(7, lm.hidden_size, generator=torch.Generator().manual_seed(2)) * 3


@pytest.mark.parametrize(("part", "positions"), [(100, 2), (1714, 3), (1000, 512)])
def test_parts_give_what_the_whole_gives(lm, part, positions, monkeypatch):
    monkeypatch.setattr(head, "PART", part)
    monkeypatch.setattr(head, "LOGITS_IN_CACHE", part * positions)
    hidden = states(lm)
    wanted = lm.logits(hidden).double().log_softmax(-1)[PLACES, TOKENS]
    torch.testing.assert_close(logprobs(lm, hidden, PLACES, TOKENS), wanted, atol=1e-5, rtol=1e-6)


def test_a_head_that_casts_what_it_is_given_is_no_exception(tokenizer, monkeypatch):
    model = build("gemma3").half()
    apply(model, DtypeConfig("fp16", Weights.fp16, Residual.fp32))
    lm = LanguageModel(model, tokenizer)
    hidden = states(lm)
    wanted = lm.logits(hidden).log_softmax(-1)[PLACES, TOKENS].double()
    monkeypatch.setattr(head, "PART", 100)
    torch.testing.assert_close(logprobs(lm, hidden, PLACES, TOKENS), wanted, atol=2e-3, rtol=1e-3)


class Offset(nn.Linear):
    """No plain matrix: a part of its weights is no part of its answer."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + torch.arange(self.out_features)


def test_a_head_of_another_kind_is_taken_whole(tokenizer, monkeypatch):
    lm = LanguageModel(build("qwen2"), tokenizer)
    lm.model.lm_head.__class__ = Offset
    assert not lm.sliceable_head
    monkeypatch.setattr(head, "PART", 100)
    wanted = lm.logits(states(lm)).double().log_softmax(-1)[PLACES, TOKENS]
    torch.testing.assert_close(logprobs(lm, states(lm), PLACES, TOKENS), wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_spoils_every_log_probability_of_its_position(tokenizer, value, monkeypatch):
    monkeypatch.setattr(head, "PART", 100)
    lm = LanguageModel(build("llama"), tokenizer)
    lm.model.lm_head.weight = nn.Parameter(lm.model.lm_head.weight.clone(), requires_grad=False)
    lm.model.lm_head.weight[650] = 0.0
    lm.model.lm_head.weight[650, 0] = value
    hidden = states(lm).abs()
    found = logprobs(lm, hidden, PLACES, TOKENS)
    assert torch.isnan(found).all()


@pytest.mark.parametrize("part", [100, 1714])
def test_the_most_likely_token_is_the_first_of_the_largest(lm, part, monkeypatch):
    monkeypatch.setattr(head, "PART", part)
    tokens, finite = greedy(lm, states(lm))
    assert tokens.tolist() == lm.logits(states(lm)).argmax(-1).tolist()
    assert finite.all()
    monkeypatch.setattr(lm, "logits", lambda hidden, words: torch.zeros(len(hidden), words.stop - words.start))
    assert greedy(lm, states(lm))[0].tolist() == [0] * 7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_choice_from_logits_that_are_not_finite_is_told(tokenizer, value, monkeypatch):
    lm = LanguageModel(build("qwen2"), tokenizer)
    monkeypatch.setattr(head, "PART", 100)
    logits = lm.logits

    def one_bad(hidden, words):
        found = logits(hidden, words)
        if words.start <= 650 < words.stop:
            found[2, 650 - words.start] = value
        return found

    monkeypatch.setattr(lm, "logits", one_bad)
    assert greedy(lm, states(lm))[1].tolist() == [True, True, False, True, True, True, True]


HELD = """
from types import SimpleNamespace
import torch
from truthsteer.head import greedy, logprobs

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

torch.set_num_threads(1)
weight = torch.randn(200_000, 32)
lm = SimpleNamespace(
    text_config=SimpleNamespace(vocab_size=200_000), sliceable_head=True, logits=lambda h, words: h @ weight[words].T
)
hidden = torch.randn(2048, 32)
used = [torch.randn(1 << size) for size in range(8, 24)]  # as a run has, before it
del used
greedy(lm, hidden[:2])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
logprobs(lm, hidden, torch.arange(2048), torch.arange(2048) * 97 % 200_000)
greedy(lm, hidden[:1024])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's own count")
def test_what_is_kept_of_each_part_leaves_no_gaps_in_memory():
    """48 parts of 16 MiB: a few of them at once, and not all of them one after the other."""
    done = subprocess.run([sys.executable, "-c", HELD], cwd=REPO, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 48 * 16 / 4
