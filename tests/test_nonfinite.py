"""Numbers that are not finite: an error that names question, condition, layer and cause, wherever logits are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, make_questions
from safetensors.numpy import save_file
from test_length import workspace

from truthsteer import neutral, nonfinite
from truthsteer.conditions import score_choices, vectors_of
from truthsteer.config import DtypeConfig, GenerationConfig, Residual, Weights
from truthsteer.decoding import Request, decode, generate
from truthsteer.errors import UserError
from truthsteer.hooks import Injection, steered
from truthsteer.letters import score_letters
from truthsteer.model import LanguageModel
from truthsteer.prompts import PLAIN, Prompts
from truthsteer.records import Condition, ConditionKind
from truthsteer.scoring import score
from truthsteer.stages import gauge
from truthsteer.stages import generate as generate_stage
from truthsteer.store import Artifact

NAMES = ["baseline", "mean_diff +0.4", "mean_diff -0.4"]
QUESTIONS = [question.text for question in make_questions(3)]
ANSWERS = ["It is yellow.", "It is very red and also rather loud."]
PASSAGES = ["Stir the flour into the milk.", "Turn left."]


@pytest.fixture
def lm(tokenizer) -> LanguageModel:
    """To be broken."""
    return LanguageModel(build("gemma3"), tokenizer)


def injections(lm: LanguageModel, bad: int | None, layer: int = 1) -> list[Injection | None]:
    """The baseline and two coefficients, one of them too large for any model."""
    vector = torch.full((lm.hidden_size,), 0.1)
    sizes = [3e38 if place == bad else 0.4 for place in (1, 2)]
    return [None, *(Injection(layer, vector * 1e3 if size > 1 else vector, size) for size in sizes)]


def scored(lm: LanguageModel, conditions: list[Injection | None], **options: Any) -> list[Any]:
    branches = Prompts(PLAIN, lm.tokenizer, False).branches(QUESTIONS, [ANSWERS] * len(QUESTIONS))
    given = {"questions": QUESTIONS, "names": NAMES} | options
    return [item for _, unit in score(lm, branches, conditions, **given) for item in unit]


def decoded(lm: LanguageModel, conditions: list[Injection | None], **options: Any) -> list[Any]:
    contexts = Prompts(PLAIN, lm.tokenizer, False).contexts(QUESTIONS)
    requests = [
        Request(context, place, 0, question)
        for place in range(len(conditions))
        for question, context in zip(QUESTIONS, contexts, strict=True)
    ]
    given = {"names": NAMES, "config": GenerationConfig(max_new_tokens=3), "stop": ()} | options
    return [answer for _, group in decode(lm, requests, conditions, **given) for answer in group]


def gauged(lm: LanguageModel, conditions: list[Injection | None], **options: Any) -> list[Any]:
    return [
        row for _, rows in neutral.measure(lm, PASSAGES, conditions, **({"names": NAMES} | options)) for row in rows
    ]


Reader = Callable[..., list[Any]]
EVERYWHERE = {
    scored: r"The log-probability of '[^']+' to '{asked}' under '{name}' \({where}\) rests on logits that are",
    decoded: r"The logits of '{asked}' under '{name}' \({where}\) are not finite at token 1 of the answer\.",
    gauged: r"On neutral text, '{asked}' under '{name}' \({where}\) has a loss of ",
}
readers = pytest.mark.parametrize("read", EVERYWHERE, ids=lambda read: read.__name__)


def message(read: Reader, lm: LanguageModel, conditions: list[Injection | None], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(lm, conditions, **options)
    return str(caught.value)


def says(read: Reader, name: str, where: str) -> str:
    """The pattern that a message must match, whichever question came first."""
    return EVERYWHERE[read].format(asked=r"[^']+", name=re.escape(name), where=where)


@readers
@pytest.mark.parametrize("bad", [1, 2])
def test_a_coefficient_that_overflows_is_named_with_question_condition_and_layer(lm, read, bad):
    found = message(read, lm, injections(lm, bad))
    assert re.match(says(read, NAMES[bad], "steered at layer 1"), found), found
    assert any(text in found for text in (*QUESTIONS, *PASSAGES))
    assert "The numbers are first not finite at" in found
    assert "layer 1" in found.split("The numbers are first not finite at")[1]
    assert found.endswith("Steering overflows: type much smaller steering.coefficients."), "float32 has no wider format"
    assert "without steering" not in found


@readers
def test_a_broken_weight_is_not_blamed_on_steering(lm, read):
    lm.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
    plain = message(read, lm, injections(lm, None))
    assert re.match(says(read, "baseline", "not steered"), plain), plain
    conditions = injections(lm, None)[1:]
    found = message(read, lm, conditions, names=NAMES[1:])
    assert re.match(says(read, NAMES[1], "steered at layer 1"), found), found
    for text in (plain, found):
        assert "layer 2" in text.split("first not finite at")[1]
        assert "coefficients" not in text
        assert text.endswith("Type stages=[doctor] to see why.")
    assert "It is so without steering." in found
    assert "without steering" not in plain


@readers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_logit_is_enough_although_another_token_was_meant(lm, read, value, monkeypatch):
    """-inf there would leave every other log-probability finite, and no token would be greedier."""
    logits = lm.logits

    def one_bad(hidden, words=None):
        found = logits(hidden, words)
        found[..., 1700] = value
        return found

    monkeypatch.setattr(lm, "logits", one_bad)
    assert re.match(says(read, "baseline", "not steered"), message(read, lm, injections(lm, None)))


def in_fp16(tokenizer, scale: float = 1.0) -> LanguageModel:
    model = build("gemma3")
    model.model.embed_tokens.weight.data[5:] *= scale
    return LanguageModel(model.to(torch.float16), tokenizer)


@readers
def test_what_to_type_depends_on_the_case(tokenizer, read):
    found = message(read, in_fp16(tokenizer, 1e5), injections(gemma := in_fp16(tokenizer), None))
    assert re.match(says(read, "baseline", "not steered"), found)
    assert "Type dtype=bf16, or dtype=fp16 (float32 residual stream); stages=[doctor]" in found
    found = message(read, gemma, injections(gemma, 1))
    assert re.match(says(read, NAMES[1], "steered at layer 1"), found)
    assert found.endswith("steering.coefficients, or dtype=bf16, or dtype=fp16 (float32 residual stream).")
    gemma.policy = DtypeConfig("fp16", Weights.fp16, Residual.fp32)
    assert "dtype=fp16" not in message(read, gemma, injections(gemma, 1))


def test_the_strongest_coefficient_that_holds_is_told(tokenizer):
    gemma = in_fp16(tokenizer)
    conditions = [None, Injection(1, torch.full((gemma.hidden_size,), 1e4), 20.0)]
    found = message(scored, gemma, conditions, names=NAMES[:2])
    assert "Steering overflows, and at a coefficient of 5 this text does not: type smaller" in found


@readers
def test_the_cause_is_looked_for_without_the_hooks_of_the_run(lm, read, monkeypatch):
    """Else a coefficient would be added twice: once by them, once by who looks for it."""
    seen = []

    def look(model, ids, injection=None, operator=None):
        ids = torch.tensor([list(ids)])
        plain = nn_forward(model, ids)
        seen.append((injection, torch.equal(model.forward(ids), plain)))
        return "It is there." if injection is not None and injection.coefficient > 1e38 else ""

    def nn_forward(model, ids):
        hooks = [dict(layer._forward_hooks) for layer in model.layers]
        for layer in model.layers:
            layer._forward_hooks.clear()
        found = model.forward(ids)
        for layer, own in zip(model.layers, hooks, strict=True):
            layer._forward_hooks.update(own)
        return found

    monkeypatch.setattr("truthsteer.probe.diagnose", look)
    conditions = injections(lm, 1)
    assert "It is there. Steering overflows" in message(read, lm, conditions)
    assert [(injection and injection.coefficient, same) for injection, same in seen] == [
        (None, True),
        (3e38, True),
        (1.5e38, True),
        (7.5e37, True),
    ]


@readers
def test_numbers_that_only_a_batch_makes_are_said_to_be_so(lm, read, monkeypatch):
    monkeypatch.setattr("truthsteer.probe.diagnose", lambda *_: "")
    found = message(read, lm, injections(lm, 1))
    assert "Read alone, the same text gives finite numbers" in found
    assert found.endswith("Type stages=[doctor] to see why.")


def test_without_names_the_prompt_and_the_coefficient_tell(lm):
    conditions = injections(lm, 2)
    for read in (scored, decoded):
        options = {"questions": ()} if read is scored else {}
        assert "under 'coefficient 3e+38' (steered at layer 1)" in message(read, lm, conditions, names=(), **options)
    assert any(f"to 'Q: {asked} A:' under" in message(scored, lm, conditions, questions=()) for asked in QUESTIONS)
    with (
        steered(lm, conditions[2].vector, 3e38, layer=1),
        pytest.raises(UserError, match=r"'Who\?' under 'no steering'"),
    ):
        generate(lm, ["Who?"])


def test_what_is_quoted_is_short_and_on_one_line():
    assert nonfinite.shown("Who?\n(A) He\n(B) She") == "'Who? (A) He (B) She'"
    assert len(nonfinite.shown("very " * 1000)) <= nonfinite.SHOWN + 2


def test_an_answer_that_has_ended_can_no_longer_fail(lm, monkeypatch):
    """Its row may stay in the batch for a while; what is computed there is nobody's answer."""
    logits, steps = lm.logits, []

    def broken_later(hidden, words=None):
        found = logits(hidden, words)
        if steps:
            found[0] = float("nan")
        else:
            found[0, next(iter(lm.eos_ids))] = 1e4
        steps.append(len(found))
        return found

    requests = [Request(context, 0) for context in Prompts(PLAIN, lm.tokenizer, False).contexts(["What is red?"] * 5)]
    monkeypatch.setattr(lm, "logits", broken_later)
    config = GenerationConfig(max_new_tokens=3)
    [(_, answers)] = decode(lm, requests, [None], config=config, stop=())
    assert steps == [5, 5, 5], "the row was there"
    assert [answer.stop_reason for _, answer in answers] == ["eos", *["length"] * 4]


def test_no_batch_and_no_sampling_needs_float64_on_the_device(lm, monkeypatch):
    """MPS has none: numbers leave the device first."""
    double = torch.Tensor.double

    def on_cpu(self):
        assert getattr(self, "left", True), "float64 on the device"
        return double(self)

    logits = lm.logits

    class Device(torch.Tensor):
        """A tensor that has not left its device."""

        left = False

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), named=None):
            found = super().__torch_function__(function, types, arguments, named or {})
            return found.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else found

    monkeypatch.setattr(torch.Tensor, "double", on_cpu)
    monkeypatch.setattr(lm, "logits", lambda hidden, words=None: logits(hidden, words).as_subclass(Device))
    scored(lm, injections(lm, None))
    decoded(lm, injections(lm, None), config=GenerationConfig(max_new_tokens=2, temperature=1.0))


def test_every_stage_names_the_question_the_condition_and_the_layer(tmp_path):
    questions = tmp_path / "capability.csv"
    questions.write_text("question,A,B,C,D,answer\nHow many legs has a crab?,Ten.,Two.,Six.,None.,A\n")
    ws = workspace(tmp_path, f"gauge.capability={questions}", "gauge.passages=2", "generation.max_new_tokens=2")
    [split] = ws.splits
    save_file({"v": np.full(ws.model.hidden_size, 3e38, np.float32)}, tmp_path / "vectors.safetensors")
    bank = Artifact("bank/none", tmp_path)
    huge = Condition("mean_diff +9", ConditionKind.STEERED, 0, "mean_diff", 2, 9.0, "v", "sha")
    plain = Condition("baseline", ConditionKind.BASELINE, 0)
    asked = [question.text for question in split.test]

    def choose():
        score_choices(ws, split.test, ws.prompt(), [plain, huge], vectors_of(bank), "choose")

    def letters():
        score_letters(ws, with_letters, ws.prompt(), [plain, huge], vectors_of(bank), "letters")

    with_letters = tuple(dataclasses.replace(question, best_incorrect=question.incorrect[0]) for question in split.test)
    stages = [
        (choose, "The log-probability of", asked),
        (letters, "The log-probability of", asked),
        (lambda: generate_stage.run(ws, split, bank, [plain, huge]), "The logits of", asked),
        (lambda: gauge.run(ws, split, bank, [plain, huge]), "On neutral text", neutral.passages(ws.config.gauge.text)),
    ]
    for run, fault, names in stages:
        with pytest.raises(UserError) as caught:
            run()
        assert str(caught.value).startswith(fault)
        assert "under 'mean_diff +9' (steered at layer 2)" in str(caught.value)
        assert any(nonfinite.shown(name)[1:].split("...")[0].rstrip("'") in str(caught.value) for name in names)
    only_capability = workspace(tmp_path / "more", f"gauge.capability={questions}", "gauge.passages=0")
    only_capability.__dict__["model"] = ws.model
    with pytest.raises(
        UserError, match=r"to 'How many legs has a crab\?' under 'mean_diff \+9' \(steered at layer 2\)"
    ):
        gauge.run(only_capability, split, bank, [plain, huge])


def unreadable(lm: LanguageModel, token: int) -> None:
    """From now on, whatever reads this token is not a number; its logit is."""
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(embedding.weight.clone(), requires_grad=False)
    embedding.weight.data[token] = float("nan")


@readers
def test_the_text_that_breaks_is_the_one_that_is_named(lm, read):
    """A token that one of them has, and none of the others, is not a number."""
    texts = PASSAGES if read is gauged else QUESTIONS
    own, *others = (set(lm.tokenizer(text, add_special_tokens=False).input_ids) for text in reversed(texts))
    unreadable(lm, min(own.difference(*others)))
    assert f"{texts[-1]!r} under 'baseline' (not steered)" in message(read, lm, injections(lm, None))


def test_the_answer_that_breaks_is_the_one_that_is_named(lm):
    [token] = lm.tokenizer(" loud", add_special_tokens=False).input_ids[-1:]
    unreadable(lm, token)
    found = message(scored, lm, injections(lm, None))
    assert re.match(rf"The log-probability of '{ANSWERS[1]}' to '{QUESTIONS[0][:8]}.*' under 'baseline'", found), found
