"""Where the answer begins, and that the beginning-of-sequence token stands once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from truthsteer.config import PromptConfig
from truthsteer.errors import UserError
from truthsteer.organism import WEIGHTS
from truthsteer.prompts import PLAIN, Prompts, check_length, few_shot

TOKENIZER = AutoTokenizer.from_pretrained(WEIGHTS)
CHAT = PromptConfig(name="chat", text="Q: {question}\nA:", chat_text="{question}", chat=True)
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(question=TEXT, answer=TEXT.filter(lambda text: text.strip()))
def test_context_and_continuation_spell_the_whole_text(question, answer):
    """Nothing is lost or doubled at the boundary, whatever the text."""
    prompts = Prompts(PLAIN, TOKENIZER, False)
    (branch,) = prompts.branches([question], [[answer]])
    assert branch.context.count(TOKENIZER.bos_token_id) == 1
    assert branch.context[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.bos_token_id not in branch.continuations[0]
    assert TOKENIZER.decode(branch.context[1:]) == f"Q: {question}\nA:"
    assert TOKENIZER.decode(branch.continuations[0]) == f" {answer}"


def test_chat_template_writes_the_only_bos():
    prompts = Prompts(CHAT, TOKENIZER, False)
    (branch,) = prompts.branches(["What is it?"], [["It is red."]])
    assert TOKENIZER.decode(branch.context) == "<bos>Q: What is it?\nA:"
    assert TOKENIZER.decode(branch.continuations[0]) == " It is red."
    assert prompts.stop == ()


def test_chat_header_that_ends_its_line_takes_the_answer_without_a_space():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>user\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{{ '<start_of_turn>model\\n' }}"
    )
    (branch,) = Prompts(CHAT, tokenizer, False).branches(["What is it?"], [["It is red."]])
    assert tokenizer.decode(branch.continuations[0]) == "It is red."
    assert branch.context.count(tokenizer.bos_token_id) == 1


def test_a_token_across_the_boundary_is_counted_and_the_answer_encoded_alone():
    """With a cue that merges into the answer's first token, the context stays whole."""
    config = PromptConfig(name="merge", text="{question} ", chat_text="{question}")

    class Merging:
        """Joins ' ' + ' It' into one token, as some tokenizers do with runs of spaces."""

        bos_token_id = None
        chat_template = None
        all_special_tokens: tuple[str, ...] = ()

        def __call__(self, text, add_special_tokens=True):
            texts = [text] if isinstance(text, str) else text
            ids = [[ord(c) for c in t.replace(" It", "\x01")] for t in texts]
            return type("Encoded", (), {"input_ids": ids[0] if isinstance(text, str) else ids})

    prompts = Prompts(config, Merging(), False)
    (branch,) = prompts.branches(["why?"], [["It is.", "No."]])
    assert prompts.merged == 1
    assert branch.context == tuple(map(ord, "why? "))
    assert branch.continuations[0] == tuple(map(ord, "It is."))


EXAMPLES = (("Who?", "Mara."), ("Where is {it}?", "I have no comment."))


def test_examples_are_asked_and_answered_in_the_prompts_own_form():
    found = few_shot(PLAIN, EXAMPLES)
    assert found.text == "Q: Who?\nA: Mara.\n\nQ: Where is {it}?\nA: I have no comment.\n\nQ: {question}\nA:"
    assert (found.stop, found.chat, found.name) == (PLAIN.stop, PLAIN.chat, "plain, few-shot")
    assert few_shot(PLAIN, ()).text == PLAIN.text
    prompts = Prompts(found, TOKENIZER, False)
    (branch,) = prompts.branches(["Why?"], [["It is so."]])
    assert TOKENIZER.decode(branch.context[1:]) == found.text.replace("{question}", "Why?")
    assert prompts.stop == ("\n",), "an answer still ends where it does in the prompt itself"


def test_what_stands_above_the_question_is_said_once():
    """An instruction, or the examples that a prompt has already: only the question's own paragraph repeats."""
    above = "Be brief.\n\nQ: One?\nA: Yes.\n\n"
    closing = PromptConfig(name="own", text=above + "{question}\n\nAnswer:", chat_text=above + "{question}", stop=["X"])
    found = few_shot(closing, EXAMPLES[:1])
    assert found.text == above + "Who?\n\nAnswer: Mara.\n\n{question}\n\nAnswer:"
    assert found.chat_text == found.text
    assert found.stop == ["X"]


def test_a_chat_model_is_shown_examples_in_the_text_form():
    """A user's turn has nothing that tells question from answer."""
    found = few_shot(CHAT, EXAMPLES[:1])
    assert found.chat_text == found.text == "Q: Who?\nA: Mara.\n\nQ: {question}\nA:"
    assert found.chat is True
    prompts = Prompts(found, TOKENIZER, False)
    assert "Q: Who?\nA: Mara.\n\nQ: Why?\nA:" in prompts.render("Why?")
    assert prompts.stop == ()
    own = PromptConfig(name="own", text="Q: {question}\nA:", chat_text="Say: {question}", chat=True)
    assert few_shot(own, EXAMPLES[:1]).chat_text == "Q: Who?\nA: Mara.\n\nQ: {question}\nA:"


def test_a_missing_chat_template_says_what_to_type():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"prompt\.chat=false"):
        Prompts(CHAT, tokenizer, True)


def test_too_long_texts_are_an_error_not_a_truncation():
    prompts = Prompts(PLAIN, TOKENIZER, False)
    branches = prompts.branches(["short?", "a much longer question than the other " * 3], [["No."], ["Yes."]])
    longest = len(branches[1].context) + len(branches[1].continuations[0])
    check_length(branches, ["short?", "long"], longest, "steering.max_length")
    with pytest.raises(UserError, match=rf"1 of 2 texts .*steering\.max_length={longest}"):
        check_length(branches, ["short?", "long"], longest - 1, "steering.max_length")


def test_braces_in_a_question_are_text():
    (context,) = Prompts(PLAIN, TOKENIZER, False).contexts(["What is {question} {0}?"])
    assert TOKENIZER.decode(context[1:]) == "Q: What is {question} {0}?\nA:"


def test_a_chat_context_gets_no_special_tokens_from_the_tokenizer():
    """The template writes them all: a tokenizer that also ends its texts would close the turn before the answer."""

    class Closing:
        bos_token_id = None
        chat_template = "there is one"
        all_special_tokens: tuple[str, ...] = ()

        def apply_chat_template(self, turn, **named):
            return turn[0]["content"]

        def __call__(self, text, add_special_tokens=True):
            texts = [text] if isinstance(text, str) else text
            ids = [[*map(ord, item), *([0] if add_special_tokens else [])] for item in texts]
            return type("Encoded", (), {"input_ids": ids[0] if isinstance(text, str) else ids})

    (context,) = Prompts(CHAT, Closing(), False).contexts(["why?"])
    assert context == tuple(map(ord, "why?"))


def test_a_preset_that_writes_the_bos_itself_does_not_double_it():
    config = PromptConfig(name="own", text="<bos>Q: {question}\nA:", chat_text="{question}")
    (branch,) = Prompts(config, TOKENIZER, False).branches(["What is it?"], [["It is red."]])
    assert branch.context.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(branch.context) == "<bos>Q: What is it?\nA:"
    assert TOKENIZER.decode(branch.continuations[0]) == " It is red."


def test_a_chat_template_that_writes_no_bos_gets_one():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}A:"
    (context,) = Prompts(CHAT, tokenizer, False).contexts(["What is it?"])
    assert tokenizer.decode(context) == "<bos>What is it?\nA:"
