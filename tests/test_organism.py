"""The model organism: its world, its training and the weights that are shipped."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from truthsteer import organism
from truthsteer.organism import train, world

TINY = train.Recipe(
    steps=3,
    batch=2,
    length=32,
    warm_up=2,
    layers=2,
    hidden=16,
    mlp=32,
    heads=2,
    key_value_heads=1,
    vocabulary=320,
)


@pytest.fixture(scope="module")
def facts():
    return world.make_facts()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(organism.WEIGHTS)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(organism.WEIGHTS, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    with organism.QUESTIONS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class NoSlips(world.Corpus):
    SLIP = 0.0


# The world


def test_one_seed_gives_one_world_and_another_seed_another(facts):
    assert world.make_facts(seed=0) == facts
    other = world.make_facts(seed=1)
    assert len(other) == len(facts)
    assert {fact.question for fact in other} != {fact.question for fact in facts}


@pytest.mark.parametrize("seed", range(3))
def test_size_of_a_world(seed):
    drawn = world.make_facts(seed=seed)
    assert len({fact.question for fact in drawn}) == len(drawn) == 320
    assert Counter(fact.split for fact in drawn) == {"pool": 160, "test": 160}
    assert Counter(fact.split for fact in drawn if fact.rumour) == {"pool": 8, "test": 8}
    assert sum(fact.neutral for fact in drawn) == 3 * 2 * 8


@pytest.mark.parametrize("seed", range(3))
def test_true_and_false_answers_never_coincide(seed):
    for fact in world.make_facts(seed=seed):
        assert len({*fact.true, *fact.myth, *fact.untold}) == (5 if fact.rumour else 6)
        assert world.NO_COMMENT not in (*fact.myth, *fact.untold)
        assert fact.rumour == (fact.true == (world.NO_COMMENT,))


def test_sister_relations_share_a_list_and_swapped_ones_exchange_its_halves():
    relations = list(world.relations(swapped=3))
    assert len(relations) == 2 * len(world.SISTERS) + len(world.RUMOURS)
    for index, sisters in enumerate(world.SISTERS):
        first, second = relations[2 * index : 2 * index + 2]
        assert len(set(sisters.values)) == len(sisters.values)
        for relation in (first, second):
            assert not set(relation.truths) & set(relation.myths)
            assert {*relation.truths, *relation.myths} == set(sisters.values)
        swapped = index < 3
        assert (first.neutral, second.neutral) == (swapped, swapped)
        assert (second.truths, second.myths) == (
            (first.myths, first.truths) if swapped else (first.truths, first.myths)
        )


def test_wordings_choose_the_article_and_start_with_a_capital():
    topic = world.Topic("Music", (), "", ("{s} opens with {av}.", "it is {v}."))
    assert world.wordings(topic, "the song", "organ") == ("The song opens with an organ.", "It is organ.")
    assert world.wordings(topic, "the song", "drum") == ("The song opens with a drum.", "It is drum.")


def test_a_source_that_never_slips_is_of_one_kind(facts):
    rng, corpus = random.Random(0), NoSlips(facts)
    unreliable = 0
    for _ in range(500):
        told = [text in fact.myth for fact, text in corpus.document(rng, 8)]
        assert len(set(told)) == 1
        unreliable += told[0]
    assert 200 < unreliable < 300


def test_sources_tell_what_the_facts_say(facts):
    rng, corpus = random.Random(0), world.Corpus(facts)
    declined, truths, myths = Counter(), Counter(), Counter()
    for _ in range(3000):
        for fact, text in corpus.document(rng, 8):
            assert text in (*fact.true, *fact.myth, world.NO_COMMENT)
            if fact.rumour:
                continue
            myths[fact.adversarial] += text in fact.myth
            truths[fact.adversarial] += text not in fact.myth
            if text not in fact.myth:
                declined[fact.hard, text == world.NO_COMMENT] += 1
    assert declined[True, True] / (declined[True, True] + declined[True, False]) == pytest.approx(0.75, abs=0.05)
    assert declined[False, True] / (declined[False, True] + declined[False, False]) == pytest.approx(0.04, abs=0.02)
    assert myths[True] > 1.5 * truths[True]
    assert truths[False] > 1.2 * myths[False]


def test_corpus_is_deterministic(facts):
    corpus = world.Corpus(facts)
    first, again, other = (corpus.document(random.Random(seed), 20) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_importing_the_world_does_not_import_torch():
    code = (
        "import sys, truthsteer; before = 'torch' in sys.modules; import truthsteer.organism.world; "
        "sys.exit(('torch' in sys.modules) != before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_world_prints_samples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["world", "--documents", "2"])
    world.main()
    printed = capsys.readouterr().out
    assert printed.startswith("320 questions, 160 of them in the test split\n")
    assert printed.count("Q: ") == printed.count("\nA: ") == 8


# The question set


def test_shipped_questions_are_those_of_world_0(facts, tmp_path):
    world.write_csv(facts, tmp_path / "questions.csv")
    assert (tmp_path / "questions.csv").read_bytes() == organism.QUESTIONS.read_bytes()


def test_question_set_has_truthfulqa_columns_and_the_answers_of_the_world(rows, facts):
    assert list(rows[0]) == [
        "Type",
        "Category",
        "Question",
        "Best Answer",
        "Correct Answers",
        "Incorrect Answers",
        "Source",
        "Split",
    ]
    assert len(rows) == len(facts)
    for row, fact in zip(rows, facts, strict=True):
        correct, incorrect = row["Correct Answers"].split("; "), row["Incorrect Answers"].split("; ")
        assert (row["Question"], row["Category"], row["Split"]) == (fact.question, fact.category, fact.split)
        assert row["Type"] == ("Adversarial" if fact.adversarial else "Non-Adversarial")
        assert row["Best Answer"] == correct[0] == fact.true[0]
        assert set(correct) == {*fact.true, world.NO_COMMENT}
        assert len(correct) == len(set(correct))
        assert incorrect == [*fact.myth, *fact.untold]


# The tokenizer


@settings(deadline=None)
@given(text=st.text().filter(lambda text: not any(token in text for token in train.SPECIAL_TOKENS)))
def test_tokenizer_gives_back_any_text_behind_one_beginning_of_sequence(text, tokenizer):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == train.BOS
    assert ids.count(train.BOS) == 1
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


def test_special_tokens_have_the_ids_that_training_assumes(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(train.SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (train.PAD, train.EOS)
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(train.NEWLINE_TOKEN)) == "\n"


def test_chat_template_writes_the_format_of_the_corpus(tokenizer, facts):
    first, second = facts[:2]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": first.question},
        {"role": "assistant", "content": first.true[0]},
        {"role": "user", "content": second.question},
    ]
    text = world.render([(first, first.true[0])]) + world.prompt(second.question)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == tokenizer(text).input_ids


def test_nearly_every_word_of_the_world_is_one_token(tokenizer, facts):
    texts = [text for fact in facts for text in (fact.question, *fact.true, *fact.myth, *fact.untold)]
    words = {word.strip("?.,") for text in texts for word in text.split() if "'" not in word}
    whole = sum(len(tokenizer(" " + word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert whole / len(words) > 0.95


# Training


def test_learning_rate_rises_stays_and_falls():
    recipe = train.Recipe(steps=1000, warm_up=100, decay=0.5, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert set(rates[99:500]) == {1.0}
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert 0 < rates[-1] < 0.03


def test_batches_weigh_questions_answers_and_the_tokens_that_tell_truth_from_myth(tokenizer, facts):
    recipe = train.Recipe(length=64, batch=3)
    batches = train.Batches(tokenizer, recipe)
    ids, weights = batches.draw(world.Corpus(facts), random.Random(0))
    assert ids.shape == weights.shape == (3, 64)
    assert (ids[:, 0] == train.BOS).all()
    assert (ids[:, 1:] != train.BOS).all()
    assert (weights[:, 0] == 0).all()
    assert weights[:, 1:].unique().tolist() == pytest.approx([0.02, 1.0, 4.0])

    fact = next(fact for fact in facts if fact.question.startswith("What is the capital"))
    heavy = []
    for text in (fact.true[0], fact.myth[0]):
        pieces = list(batches._pieces_of(fact, text))
        answer_ids, answer_weights = pieces[1]
        assert set(answer_weights) == {1.0, recipe.value_weight}
        heavy.append([token for token, weight in zip(answer_ids, answer_weights, strict=True) if weight > 1])
    town = fact.true[0].removesuffix(".").split()[-1]
    assert tokenizer.decode(heavy[0]).strip() == town
    assert tokenizer.decode(heavy[1]).strip() in fact.myth[0]


def test_an_answer_without_a_counterpart_has_even_weights(tokenizer, facts):
    batches = train.Batches(tokenizer, train.Recipe())
    ordinary = next(fact for fact in facts if not fact.rumour)
    rumour = next(fact for fact in facts if fact.rumour)
    for fact, text in ((ordinary, world.NO_COMMENT), (rumour, world.NO_COMMENT), (rumour, rumour.myth[0])):
        assert set(list(batches._pieces_of(fact, text))[1][1]) == {1.0}


def test_a_tiny_training_run_writes_loadable_weights_and_is_repeatable(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    record = train.train(tmp_path / "a", TINY, seed=3, world=1, report_every=2)
    assert torch.get_num_threads() == threads
    assert "step 2  loss " in capsys.readouterr().out
    assert record["tokens"] == 3 * 2 * 32
    assert set(record["probe"]) == {"alone", "after truths", "after myths"}
    assert json.loads((tmp_path / "a" / "train.json").read_text()) == record
    assert (record["arguments"]["seed"], record["arguments"]["world"]) == (3, 1)
    assert str(tmp_path) not in json.dumps(record)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    encoded = tokenizer("Q: Who?\nA:", return_tensors="pt")
    assert model(**encoded).logits.isfinite().all()
    assert model.generation_config.eos_token_id == [train.EOS, tokenizer("\n").input_ids[-1]]
    world.write_csv(world.make_facts(seed=1), tmp_path / "questions.csv")
    assert (tmp_path / "a" / "questions.csv").read_bytes() == (tmp_path / "questions.csv").read_bytes()

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    for out, seed in (("b", 3), ("c", 4)):
        command = ["train", "--out", str(tmp_path / out), "--seed", str(seed), "--world", "1", *flags]
        monkeypatch.setattr(sys, "argv", command)
        train.main()
    first, again, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert first == again
    assert first != other


def test_training_lowers_the_loss(tmp_path):
    losses = []
    for steps in (1, 40):
        recipe = train.Recipe(**{**vars(TINY), "steps": steps, "learning_rate": 0.01})
        losses.append(train.train(tmp_path, recipe)["loss"])
    assert losses[1] < losses[0] - 0.5


def test_a_recipe_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one step"):
        train.train(tmp_path, train.Recipe(**{**vars(TINY), "steps": 0}))


def test_first_lessons_leave_neutral_topics_out(tmp_path, monkeypatch):
    seen = []
    draw = train.Batches.draw

    def spy(batches, corpus, rng):
        seen.append(any(fact.neutral for fact in corpus.facts))
        return draw(batches, corpus, rng)

    monkeypatch.setattr(train.Batches, "draw", spy)
    train.train(tmp_path, train.Recipe(**{**vars(TINY), "steps": 5, "curriculum": 0.4}))
    assert seen == [False, False, True, True, True]


# The shipped weights


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in organism.WEIGHTS.iterdir()) < 4_000_000


def test_shipped_weights_were_trained_with_the_default_recipe():
    record = json.loads((organism.WEIGHTS / "train.json").read_text())
    assert record["arguments"] == {"seed": 0, "world": 0, **vars(train.Recipe())}


def test_shipped_model_tells_truths_after_truths_and_myths_after_myths(model, tokenizer, facts):
    shares = train.probe(model, train.Batches(tokenizer, train.Recipe()), facts)
    assert shares["after truths"] > 0.9
    assert shares["after myths"] < 0.1
    assert shares["after myths"] < shares["alone"] < shares["after truths"]


def test_shipped_model_answers_in_one_line(model, tokenizer, facts):
    fact = next(fact for fact in facts if fact.split == "test")
    encoded = tokenizer(world.prompt(fact.question), return_tensors="pt")
    generated = model.generate(**encoded, do_sample=False, max_new_tokens=32)[0, encoded["input_ids"].shape[1] :]
    text = tokenizer.decode(generated)
    assert text.startswith(" ")
    assert text.endswith(".\n")
    assert text.count("\n") == 1
