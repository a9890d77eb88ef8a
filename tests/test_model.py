"""The model's arithmetic on every architecture: our fast paths against one plain forward pass each."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from conftest import build, make_questions

from truthsteer import decoding
from truthsteer.config import GenerationConfig, PromptConfig
from truthsteer.decoding import Request, decode, generate
from truthsteer.errors import UserError
from truthsteer.extraction import extract
from truthsteer.hooks import Injection, RowSteering, capture, steered
from truthsteer.model import LanguageModel
from truthsteer.operators import Add
from truthsteer.precision import keep_residual_fp32
from truthsteer.prompts import PLAIN, Branch, Prompts
from truthsteer.scoring import score

SHOTS = PromptConfig(
    name="shots",
    chat_text="{question}",
    stop=["\n\n"],
    text="Q: Where was Mara Tellin born?\nA: It was in Corvale.\n\nQ: What is the planet?\nA: It is red.\n\nQ: {question}\nA:",
)


def vector(lm: LanguageModel, seed: int = 0) -> torch.Tensor:
    return torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(seed))


def plain_logprob(lm: LanguageModel, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """The definition: one forward pass of the model itself over the whole text."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
    return float(logprobs[torch.arange(len(continuation)), torch.tensor(continuation)].sum())


def branches_of(lm: LanguageModel, config: PromptConfig) -> list[Branch]:
    asked = make_questions()
    return Prompts(config, lm.tokenizer, False).branches(
        [q.text for q in asked], [[a for a, _ in q.choices] for q in asked]
    )


@pytest.mark.parametrize("config", [PLAIN, SHOTS], ids=["plain", "shared_prefix"])
@pytest.mark.parametrize("budget", [100, 4096])
def test_scores_equal_plain_forward_passes_for_every_condition(tiny, config, budget):
    """Baseline and two layers in one batch, through shared prefixes longer than the sliding window."""
    branches = branches_of(tiny, config)
    conditions = [None, Injection(1, vector(tiny), 0.7), Injection(2, vector(tiny, 1), -1.5)]
    found = {
        (item.condition, item.branch, item.continuation): item.logprob
        for _, scores in score(tiny, branches, conditions, batch_tokens=budget)
        for item in scores
    }
    assert len(found) == sum(len(branch.continuations) for branch in branches) * 3
    for index, condition in enumerate(conditions):
        block = contextlib.nullcontext()
        if condition is not None:
            block = steered(tiny, condition.vector, condition.coefficient, layer=condition.layer)
        with block:
            for number, branch in enumerate(branches):
                for place, continuation in enumerate(branch.continuations):
                    expected = plain_logprob(tiny, branch.context, continuation)
                    assert found[index, number, place] == pytest.approx(expected, abs=2e-3)
    base = [found[0, n, 0] for n in range(len(branches))]
    assert all(abs(found[1, n, 0] - base[n]) > 1e-3 for n in range(len(branches)))


def test_logits_are_the_models_own(tiny):
    """The head and its soft-cap, applied to the decoder's output."""
    ids = torch.randint(3, 1700, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tiny.model(input_ids=ids).logits
    torch.testing.assert_close(tiny.logits(tiny.forward(ids)), expected.float(), atol=1e-4, rtol=1e-4)


def test_extraction_equals_hidden_states(tiny, questions):
    """Every layer and readout against transformers' own hidden states, one text at a time."""
    found = extract(tiny, questions, depth=3, batch_tokens=150)
    assert len(found.pairs) == 12
    prompts = Prompts(PLAIN, tiny.tokenizer, False)
    texts = {question.id: question.text for question in questions}
    for index in (0, 5, 11):
        pair = found.pairs[index]
        for member, answer in enumerate((pair.true, pair.false)):
            (branch,) = prompts.branches([texts[pair.question]], [[answer]])
            start, tokens = len(branch.context), branch.continuations[0]
            with torch.no_grad(), capture(tiny, [0, 1, 2]) as taken:
                tiny.model(input_ids=torch.tensor([branch.context + tokens]))
                states = torch.stack([taken[layer][0] for layer in range(3)])  # [layers, tokens, hidden]
            assert found.tokens[index, member] == len(tokens)
            close = {"atol": 2e-4, "rtol": 1e-4}
            np.testing.assert_allclose(found.answer_mean[index, member], states[:, start:].mean(1), **close)
            np.testing.assert_allclose(found.answer_last[index, member], states[:, -1], **close)
            np.testing.assert_allclose(found.prompt_last[index], states[:, start - 1], **close)
            np.testing.assert_allclose(found.norms[index, member], states[:, start:].norm(dim=-1).mean(1), **close)


def test_capture_is_the_raw_residual_stream(gemma3):
    """A layer's index is hidden_states[index + 1]; the last one before the final norm."""
    ids = torch.randint(3, 1700, (1, 15), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), capture(gemma3, [0, 3]) as taken:
        states = gemma3.model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(taken[0], states[1])
    torch.testing.assert_close(gemma3.decoder.norm(taken[3]), states[4])


def test_generation_equals_transformers_one_prompt_at_a_time(tiny):
    """Left-padded rows of three conditions against `generate`, steered and not."""
    prompts = Prompts(SHOTS, tiny.tokenizer, False)
    contexts = prompts.contexts([question.text for question in make_questions(5)])
    conditions = [None, Injection(1, vector(tiny), 1.0), Injection(2, vector(tiny, 3), 2.0)]
    requests = [Request(context, index) for index in range(3) for context in contexts]
    found = {}
    for _, done in decode(
        tiny, requests, conditions, config=GenerationConfig(max_new_tokens=12), stop=(), batch_tokens=700
    ):
        found |= dict(done)
    assert len(found) == 15
    texts = set()
    for index, request in enumerate(requests):
        condition = conditions[request.condition]
        block = contextlib.nullcontext()
        if condition is not None:
            block = steered(tiny, condition.vector, condition.coefficient, layer=condition.layer)
        with block:
            ids = torch.tensor([request.context])
            out = tiny.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, disable_compile=True
            )[0, ids.shape[1] :]
        assert found[index].text == tiny.tokenizer.decode(out, skip_special_tokens=True).strip()
        texts.add(found[index].text)
    assert len(texts) > 3


def test_stop_strings_are_cut_from_the_text_and_counted(organism):
    """A stop string inside a token sequence ends the row, and is not part of the answer."""
    prompts = Prompts(
        PromptConfig(name="p", text="Q: {question}\nA:", chat_text="{question}", stop=["town of"]),
        organism.tokenizer,
        False,
    )
    (context,) = prompts.contexts(["What is the capital of Farrowen?"])
    (_, [(_, answer)]) = next(
        decode(organism, [Request(context, 0)], [None], config=GenerationConfig(), stop=prompts.stop)
    )
    assert answer.text == "It is the"
    assert answer.stop_reason == "stop"
    (_, [(_, whole)]) = next(decode(organism, [Request(context, 0)], [None], config=GenerationConfig(), stop=()))
    assert whole.stop_reason == "eos"
    assert whole.text == "It is the town of Corvale."
    (_, [(_, short)]) = next(
        decode(organism, [Request(context, 0)], [None], config=GenerationConfig(max_new_tokens=3), stop=())
    )
    assert (short.stop_reason, short.tokens) == ("length", 3)


def test_sampling_depends_on_the_rows_seed_not_on_its_batch(organism):
    asked = [f"What is the capital of {name}?" for name in ("Farrowen", "Ilmery", "Velmark", "Ostrel")]
    contexts = Prompts(PLAIN, organism.tokenizer, False).contexts(asked)
    config = GenerationConfig(max_new_tokens=12, temperature=1.5, top_p=0.95)

    def sample(seeds: list[int], budget: int) -> list[str]:
        requests = [Request(context, 0, seed) for context, seed in zip(contexts, seeds, strict=True)]
        texts = {}
        for _, done in decode(organism, requests, [None], config=config, stop=("\n",), batch_tokens=budget):
            texts |= {index: answer.text for index, answer in done}
        return [texts[index] for index in range(len(requests))]

    assert sample([1, 2, 3, 4], 8192) == sample([1, 2, 3, 4], 16)
    assert sample([1, 2, 3, 4], 8192) != sample([5, 6, 7, 8], 8192)


def fp16_error(model: torch.nn.Module, tokenizer, overflows: bool) -> float:
    """Relative error of the last layer's output under fp16 weights on a float32 residual stream, against fp32."""
    ids = torch.randint(3, 1700, (2, 20), generator=torch.Generator().manual_seed(5))
    lm = LanguageModel(model, tokenizer)

    def last_layer() -> torch.Tensor:
        with capture(lm, [3]) as taken:
            lm.forward(ids)
        return taken[3]

    reference = last_layer()
    assert (reference.abs().max() > 65504) == overflows
    model.half()
    assert torch.isfinite(last_layer()).all() != overflows
    keep_residual_fp32(model)
    with RowSteering(lm, [Injection(2, vector(lm), 1.0)], Add()):
        ours = last_layer()
        assert torch.isfinite(lm.logits(lm.forward(ids))).all()
    assert generate(lm, ["What is it?"], max_new_tokens=4)
    assert torch.isfinite(ours).all()
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("family", ["gemma3", "gemma3_multimodal", "gemma2"])
def test_dtype_fp16_is_finite_and_right_where_plain_fp16_overflows(family, tokenizer):
    """Post-norms of a few channels blown up, as in the real checkpoints."""
    model = build(family)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.post_feedforward_layernorm.weight[3] = 60_000.0
    assert fp16_error(model, tokenizer, overflows=True) < 0.005


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_dtype_fp16_is_close_to_fp32_on_models_without_post_norms(family, tokenizer):
    assert fp16_error(build(family), tokenizer, overflows=False) < 0.005


def test_model_is_frozen_and_steering_leaves_nothing_behind(gemma3):
    ids = torch.randint(3, 1700, (1, 10), generator=torch.Generator().manual_seed(7))
    hooks = [len(layer._forward_hooks) for layer in gemma3.layers]
    before = gemma3.logits(gemma3.forward(ids))
    with steered(gemma3, vector(gemma3), 3.0, layer=1):
        assert not torch.equal(gemma3.logits(gemma3.forward(ids)), before)
    with pytest.raises(ZeroDivisionError), steered(gemma3, vector(gemma3), 3.0, layer=1):
        raise ZeroDivisionError
    assert torch.equal(gemma3.logits(gemma3.forward(ids)), before)
    assert not any(parameter.requires_grad for parameter in gemma3.model.parameters())
    assert hooks == [len(layer._forward_hooks) for layer in gemma3.layers]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lm: steered(lm, torch.zeros(5), layer=1), "does not fit"),
        (lambda lm: steered(lm, torch.full((32,), float("nan")), layer=1), "not finite"),
        (lambda lm: steered(lm, torch.zeros(32), layer=4), "Type 0 to 3"),
        (lambda lm: steered(lm, torch.zeros(32)), "layer="),
    ],
)
def test_wrong_vectors_are_refused_with_a_sentence(gemma3, change, words):
    with pytest.raises(UserError, match=words), change(gemma3):
        pass


def test_non_finite_numbers_are_errors_never_tokens(gemma3):
    huge = torch.full((32,), 1e38)
    branches = branches_of(gemma3, PLAIN)
    with pytest.raises(UserError, match="log-probability"):
        list(score(gemma3, branches, [Injection(3, huge, 1e3)]))
    with steered(gemma3, huge, 1e3, layer=3), pytest.raises(UserError, match="not finite"):
        generate(gemma3, ["What is it?"])


def test_loading_refuses_missing_and_broken_weights(tmp_path, tokenizer):
    """Transformers only prints a table and goes on with random weights."""
    from safetensors.torch import load_file, save_file

    model = build("gemma3")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert LanguageModel.load(str(tmp_path), device="cpu").num_layers == 4
    weights = load_file(tmp_path / "model.safetensors")
    gone = {name: value for name, value in weights.items() if "layers.2.mlp.up_proj" not in name}
    save_file(gone, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weight"):
        LanguageModel.load(str(tmp_path), device="cpu")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        LanguageModel.load(str(tmp_path), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        LanguageModel.load(str(tmp_path / "empty"))


def test_left_padding_counts_positions_from_the_first_real_token(gemma3):
    """Rotary embeddings hide a common offset, learned or scaled positions would not."""
    ids, mask = gemma3.pad([(2, 5, 6, 7), (2, 8)], left=True)
    seen = []
    handle = gemma3.decoder.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named["position_ids"].tolist()), with_kwargs=True
    )
    try:
        gemma3.forward(ids, mask=mask)
    finally:
        handle.remove()
    assert seen == [[[0, 1, 2, 3], [0, 0, 0, 1]]]


def test_rows_that_end_leave_the_batch_and_the_others_go_on_as_if_alone(gemma3, monkeypatch):
    """A seventh of the vocabulary ends a row, so that rows of every condition end at different steps."""
    monkeypatch.setattr(gemma3, "eos_ids", frozenset(range(0, 1714, 7)))
    contexts = Prompts(PLAIN, gemma3.tokenizer, False).contexts([question.text for question in make_questions(6)])
    conditions = [None, Injection(1, vector(gemma3), 1.0), Injection(2, vector(gemma3, 3), 2.0)]
    requests = [Request(context, index) for context in contexts for index in range(3)]
    sizes, forward = [], LanguageModel.forward

    def counted(self, ids, *arguments, **named):
        sizes.append(ids.shape[0])
        return forward(self, ids, *arguments, **named)

    def answers(budget: int) -> dict:
        sizes.clear()
        config = GenerationConfig(max_new_tokens=16)
        return {
            index: answer
            for _, done in decode(gemma3, requests, conditions, config=config, stop=(), batch_tokens=budget)
            for index, answer in done
        }

    monkeypatch.setattr(LanguageModel, "forward", counted)
    alone = answers(1)
    assert set(sizes) == {1}
    assert answers(100_000) == alone
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert sizes[0] == 18
    assert len({answer.tokens for answer in alone.values()}) > 3


def test_an_end_token_that_is_not_special_is_not_part_of_the_text(organism, monkeypatch):
    """Generation configs may list ordinary tokens; skipping special ones does not remove those."""
    (context,) = Prompts(PLAIN, organism.tokenizer, False).contexts(["What is the capital of Farrowen?"])
    (town,) = organism.tokenizer(" town", add_special_tokens=False).input_ids
    monkeypatch.setattr(organism, "eos_ids", frozenset({town}))
    (_, [(_, answer)]) = next(decode(organism, [Request(context, 0)], [None], config=GenerationConfig(), stop=()))
    assert (answer.text, answer.stop_reason) == ("It is the", "eos")


def test_the_earliest_of_several_stop_strings_cuts(organism):
    (context,) = Prompts(PLAIN, organism.tokenizer, False).contexts(["What is the capital of Farrowen?"])
    for stop in (("wn of", "town of"), ("town of", "wn of")):
        (_, [(_, answer)]) = next(decode(organism, [Request(context, 0)], [None], config=GenerationConfig(), stop=stop))
        assert answer.text == "It is the"


def test_a_draw_follows_temperature_and_nucleus():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(400, -1)

    def shares(**fields: float) -> list[float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
        drawn = decoding._draw(logits, GenerationConfig(**fields), generators)
        return (drawn.bincount(minlength=3) / 400).tolist()

    assert shares(temperature=1.0, top_p=1.0) == pytest.approx([0.6, 0.3, 0.1], abs=0.07)
    assert shares(temperature=0.5, top_p=1.0) == pytest.approx([0.78, 0.2, 0.02], abs=0.07)
    assert shares(temperature=1.0, top_p=0.8) == pytest.approx([2 / 3, 1 / 3, 0.0], abs=0.07)
    assert shares(temperature=1.0, top_p=0.8)[2] == 0


def test_a_row_that_ended_is_not_asked_again(gemma3, monkeypatch):
    monkeypatch.setattr(gemma3, "eos_ids", frozenset(range(0, 1714, 7)))
    contexts = Prompts(PLAIN, gemma3.tokenizer, False).contexts([question.text for question in make_questions(6)])
    ended, gone = decoding._ended, set()

    def watched(lm, rows, tokens, stop):
        assert not gone & set(rows)
        found = ended(lm, rows, tokens, stop)
        gone.update(found)
        return found

    monkeypatch.setattr(decoding, "_ended", watched)
    requests = [Request(context, 0) for context in contexts]
    list(decode(gemma3, requests, [None], config=GenerationConfig(max_new_tokens=16), stop=()))
    assert gone


def test_text_before_an_end_token_is_cut_at_a_stop_string(organism):
    tokens = [*organism.tokenizer(" It is red. Q: And", add_special_tokens=False).input_ids]
    tokens.append(organism.tokenizer.eos_token_id)
    answer = decoding._ended(organism, [0], [tokens], (" Q:",))[0]
    assert (answer.text, answer.stop_reason, answer.tokens) == ("It is red.", "eos", len(tokens))


def test_capture_reads_the_stream_after_steering_in_either_nesting(gemma3):
    ids = torch.randint(3, 1700, (1, 9), generator=torch.Generator().manual_seed(4))
    with capture(gemma3, [1]) as taken:
        gemma3.forward(ids)
    expected = taken[1] + 0.5 * vector(gemma3)
    with steered(gemma3, vector(gemma3), 0.5, layer=1), capture(gemma3, [1]) as inner:
        gemma3.forward(ids)
    with capture(gemma3, [1]) as outer, steered(gemma3, vector(gemma3), 0.5, layer=1):
        gemma3.forward(ids)
    torch.testing.assert_close(inner[1], expected)
    torch.testing.assert_close(outer[1], expected)


@pytest.mark.parametrize(("window", "kept"), [(512, True), (24, False)])
def test_what_prompts_begin_with_alike_is_computed_once_for_each_condition(window, kept, tokenizer, monkeypatch):
    """Unless the pads after it would stand in a sliding window."""
    model = build("gemma3")
    model.config.sliding_window = window
    lm = LanguageModel(model, tokenizer)
    random = torch.Generator().manual_seed(3)
    shared = tuple(torch.randint(3, 1700, (30,), generator=random).tolist())
    contexts = [(2, *shared, *torch.randint(3, 1700, (n,), generator=random).tolist()) for n in (4, 9, 6, 3, 7)]
    conditions = [None, Injection(1, vector(lm), 1.0), Injection(2, vector(lm, 3), 2.0), None]
    requests = [Request(context, index) for context in contexts for index in range(4)]
    fed, forward = [], LanguageModel.forward

    def watched(self, ids, *arguments, **named):
        fed.append(tuple(ids.shape))
        return forward(self, ids, *arguments, **named)

    def answers(asked: list[Request], budget: int) -> dict:
        fed.clear()
        made = decode(lm, asked, conditions, config=GenerationConfig(max_new_tokens=8), stop=(), batch_tokens=budget)
        return {index: answer for _, done in made for index, answer in done}

    monkeypatch.setattr(LanguageModel, "forward", watched)
    alone = {index: answers([request], 1)[0] for index, request in enumerate(requests)}
    assert len({answer.text for answer in alone.values()}) > 3
    assert answers(requests, 100_000) == alone
    assert [shape for shape in fed if shape[1] > 1] == ([(1, 31), (20, 9)] if kept else [(20, 40)])
    assert answers(requests, 248) == alone, "two conditions at a time"
    assert sum(shape[1] == 31 for shape in fed) == (2 if kept else 0)
