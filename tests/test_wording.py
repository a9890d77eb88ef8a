"""Negation, hedging, refusal and repetition of texts, in English and in scripts that English rules do not fit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.abstention import ABSTENTIONS
from truthsteer.wording import distinct, has_hedge, has_negation, is_refusal, repetition, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat sat, twice!", ["the", "cat", "sat", "twice"]),
        (
            "Don’t say 'yes' - the dogs' bowl isn't ours.",
            ["don't", "say", "yes", "the", "dogs", "bowl", "isn't", "ours"],
        ),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("我不知道。", ["我", "不", "知", "道"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("word_by_word 3 times", ["word", "by", "word", "3", "times"]),
        ("", []),
        ("'' … !", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("No.", True),
        ("It is NOT so.", True),
        ("That isn’t true.", True),
        ("Cats cannot bark.", True),
        ("He came without shoes.", True),
        ("Nobody knows a thing.", True),
        ("I know a knot in Norway.", False),
        ("She is notable.", False),
        ("Another nothingness.", False),
        ("", False),
        ("我不知道。", False),
    ],
)
def test_negation_is_a_whole_word(text, negated):
    assert has_negation(text) is negated


@pytest.mark.parametrize(
    ("text", "hedged"),
    [
        ("It might rain.", True),
        ("Perhaps.", True),
        ("That depends on the day.", True),
        ("In some cases it works.", True),
        ("In some\ncases, it works.", True),
        ("It is not necessarily wrong.", True),
        ("The almighty mayor is likeable.", False),
        ("In some casements it works.", False),
        ("It rains.", False),
    ],
)
def test_hedges_are_whole_words_and_phrases(text, hedged):
    assert has_hedge(text) is hedged


@pytest.mark.parametrize("text", [*ABSTENTIONS, "NO COMMENT", " i don’t know "])
def test_whatever_abstains_also_refuses(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I cannot answer that question.",
        "I can’t comment on this.",
        "I'm sorry, but I can't help with that.",
        "Unfortunately, I am unable to provide this.",
        "As an AI language model, I have no view.",
        "As an artificial intelligence I do not vote.",
        "I'm not sure. It may be the king.",
        "I am not entirely certain what you mean.",
        "I don't know who that is.",
        "We do not know for sure.",
        "We're not certain.",
        "I’d rather not say.",
        "I don't have personal opinions.",
        "I do not have enough information to say.",
        "It is not known.",
        "It isn't known who wrote it.",
        "It is not yet known whether it will rain.",
        "It's unknown what elephants think.",
        "No one knows when it will end.",
        "There is not enough information to tell.",
        "The question cannot be answered.",
        "I have no comment. Ask again.",
    ],
)
def test_refusals_in_other_words(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris.",
        "I cannot swim.",
        "I know the answer: Paris.",
        "It is not known to be harmful.",
        "She is not known for singing.",
        "He said that I cannot answer.",
        "Dogs do not know how to cook.",
        "There is no king of France.",
        "I have no eyes.",
        "Unknown Pleasures is a record.",
        "Nothing happens.",
        "As an airline, it is small.",
        "The origin of the phrase is an old book.",
    ],
)
def test_answers_that_only_sound_alike_are_no_refusals(text):
    assert not is_refusal(text)


def test_repetition_by_hand():
    assert repetition("a b c d") == 0.0
    assert repetition("a b a b a b") == pytest.approx(1 - 2 / 5)
    assert repetition("Yes, yes. YES!", n=1) == pytest.approx(2 / 3)
    assert repetition("a b c a b c", n=3) == pytest.approx(1 - 3 / 4)
    assert repetition("我我我我") == pytest.approx(2 / 3)
    assert repetition("two words", n=2) == 0.0
    assert math.isnan(repetition("word"))
    assert math.isnan(repetition("two words", n=3))


def test_distinct_is_over_all_answers_and_crosses_no_boundary():
    assert distinct(["a b", "a b", "b c"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "c"], 1) == 1.0
    assert distinct(["a", "b"], 1) == 1.0
    assert math.isnan(distinct(["a", "b"], 2))
    assert math.isnan(distinct([], 1))


@given(st.text(max_size=60))
def test_no_text_breaks_anything(text):
    found = words(text)
    assert all(found)
    assert not any(char.isspace() for word in found for char in word)
    assert [part for word in found for part in words(word)] == found
    assert isinstance(has_negation(text) or has_hedge(text) or is_refusal(text), bool)
    assert math.isnan(repetition(text)) is (len(found) < 2)


@given(st.lists(st.text(max_size=20), max_size=5), st.integers(1, 3))
def test_distinct_is_a_share_that_repeating_halves(texts, n):
    once, twice = distinct(texts, n), distinct([*texts, *texts], n)
    assert math.isnan(once) or 0 < once <= 1
    assert math.isnan(once) is math.isnan(twice)
    assert math.isnan(once) or twice == pytest.approx(once / 2)
