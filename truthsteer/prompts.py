"""From a question to token ids, and where its answer begins. Knows tokenizers, not models.

The answer's tokens are those that follow the context's: its ids are an exact prefix of context plus answer, or the
answer is encoded alone and counted (`merged`). The beginning-of-sequence token stands once, at the start, for every
tokenizer that uses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from truthsteer.config import PromptConfig
from truthsteer.errors import UserError

PLAIN = PromptConfig(name="plain", text="Q: {question}\nA:", chat_text="{question}", stop=["\n"])
AS_WRITTEN = PromptConfig(name="as written", text="{question}", chat_text="{question}")
"""The text itself is the whole prompt, or the whole of the user's turn; some templates refuse a system's turn."""


DATE = "01 Jan 2026"
"""What templates that tell the model a date are given: a run of Tuesday must not ask otherwise than Monday's."""


@dataclass(frozen=True)
class Branch:
    """One context and the continuations that share it, as token ids."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Prompts:
    """Renders and encodes under one preset for one tokenizer.

    Args:
        config: the preset.
        tokenizer: a transformers tokenizer.
        chat: whether the model is asked through its chat template (`prompt.chat` overrides it).

    Raises:
        UserError: a chat template is asked for and the tokenizer has none.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, chat: bool) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.chat = uses_chat(config, chat)
        self.merged = 0
        """Answers whose first token would have merged with the context's last one, and which were encoded alone."""
        if self.chat and not tokenizer.chat_template:
            raise UserError("The tokenizer has no chat template. Type prompt.chat=false, or model.chat_template=false.")
        self._bos = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and self._bos in tokenizer("a").input_ids[:1]

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a generated answer; a chat model ends its own turn."""
        return () if self.chat else tuple(self.config.stop)

    def render(self, question: str) -> str:
        """The text before the answer. A chat template writes its own special tokens into it."""
        if not self.chat:
            return self.config.text.replace("{question}", question)
        turn = [{"role": "user", "content": self.config.chat_text.replace("{question}", question)}]
        return str(
            self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, date_string=DATE)
        )

    def contexts(self, questions: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each question's context."""
        return self._encode([self.render(question) for question in questions])

    def branches(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Branch]:
        """Each question's context with the token ids of each of its answers."""
        texts = [self.render(question) for question in questions]
        contexts = self._encode(texts)
        joined = self._encode(
            [text + self._glue(text) + answer for text, own in zip(texts, answers, strict=True) for answer in own]
        )
        branches, place = [], 0
        for text, context, own in zip(texts, contexts, answers, strict=True):
            continuations = []
            for answer in own:
                whole = joined[place]
                place += 1
                if whole[: len(context)] == context:
                    continuation = whole[len(context) :]
                else:
                    self.merged += 1
                    alone = self.tokenizer(self._glue(text) + answer, add_special_tokens=False).input_ids
                    continuation = tuple(alone)
                if not continuation:
                    raise UserError(f"The answer {answer!r} has no tokens of its own after {text[-40:]!r}.")
                continuations.append(continuation)
            branches.append(Branch(context, tuple(continuations)))
        return branches

    def _glue(self, context: str) -> str:
        """A space between context and answer, unless the context (a chat turn's header) ends its line itself."""
        specials = tuple(self.tokenizer.all_special_tokens)
        return "" if context[-1:].isspace() or (self.chat and context.endswith(specials)) else " "

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = [tuple(ids) for ids in self.tokenizer(texts, add_special_tokens=not self.chat).input_ids]
        if self._bos is not None:
            for index, ids in enumerate(encoded):
                if self._adds_bos and ids[:1] != (self._bos,):
                    encoded[index] = (self._bos, *ids)
                elif ids[:2] == (self._bos, self._bos):
                    encoded[index] = ids[1:]
        return encoded


def uses_chat(config: PromptConfig, model_has_chat: bool) -> bool:
    """Whether questions go through the chat template."""
    return model_has_chat if config.chat is None else config.chat


def few_shot(prompt: PromptConfig, examples: Sequence[tuple[str, str]]) -> PromptConfig:
    """The prompt with answered questions before the one that is asked, in its own form.

    What stands above the question's own paragraph (an instruction, examples) is not repeated with each. A chat model gets
    it all as one user's turn, with the cues that tell questions from answers.
    """

    def shown(text: str) -> str:
        above, gap, _ = text[: text.index("{question}")].rpartition("\n\n")
        form = text[len(above + gap) :]
        answered = [form.replace("{question}", question) + f" {answer}\n\n" for question, answer in examples]
        return above + gap + "".join(answered) + form

    text = shown(prompt.text)
    return replace(prompt, name=f"{prompt.name}, few-shot", text=text, chat_text=text)


def check_length(
    branches: Sequence[Branch],
    names: Sequence[str],
    max_length: int,
    key: str,
    or_else: str = "a shorter prompt preset",
) -> None:
    """Raise if a context with its longest continuation passes `max_length`: truncation would cut the answer.

    Raises:
        UserError: names the longest question, its length and what to type.
    """
    if found := longer_than(whole_lengths(branches), names, max_length, f"{key}={max_length} tokens"):
        sentence, longest = found
        raise UserError(
            f"{sentence}. Nothing is truncated, since that would cut answers: type {key}={longest}, or {or_else}."
        )


def whole_lengths(branches: Sequence[Branch]) -> list[int]:
    """Tokens of each context with its longest continuation."""
    return [len(b.context) + max((len(c) for c in b.continuations), default=0) for b in branches]


def longer_than(lengths: Sequence[int], names: Sequence[str], limit: int, what: str) -> tuple[str, int] | None:
    """How many texts pass a limit and which is the longest, without a full stop, and its length; None if none does."""
    over = sum(length > limit for length in lengths)
    if not over:
        return None
    worst = max(range(len(lengths)), key=lengths.__getitem__)
    return (
        f"{over} of {len(lengths)} texts are longer than {what}; the longest, with the question {names[worst][:80]!r}, "
        f"has {lengths[worst]} tokens",
        lengths[worst],
    )
