"""What shows in a text's wording alone: negation, hedging, refusal, repetition. Knows no question and no model.

The word lists are English: in another language nothing has negation or hedges, and only what repeats is measured.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from truthsteer.abstention import is_abstention, normalise

NEGATIONS = frozenset(
    ("no", "not", "never", "none", "nothing", "nobody", "nowhere", "neither", "nor", "cannot", "without")
)
"""Words that negate, besides every word that ends in "n't"."""

HEDGES = (
    *("may", "might", "could", "perhaps", "possibly", "maybe", "probably", "presumably", "supposedly"),
    *("likely", "unlikely", "uncertain", "unclear", "not sure", "not certain", "not necessarily"),
    *("seem", "seems", "appear", "appears", "tend", "tends", "suggest", "suggests", "depends"),
    *("sometimes", "often", "usually", "generally", "typically", "commonly", "mostly", "mainly", "largely"),
    *("in some cases", "in many cases", "in most cases", "in general", "some people", "some say"),
    *("roughly", "approximately", "somewhat", "more or less"),
)
"""Words and phrases that weaken a claim: of modality, of appearance, of frequency and of degree."""

_WILL_NOT = "can not|could not|will not|(am|are) (not able|unable) to|would rather not|prefer not to|(must )?decline to"
_SPEAK = "answer|comment|respond|reply|say|help|assist|provide|give|offer|share|discuss|speculate|confirm|predict"

REFUSALS = (
    rf"(i|we) ({_WILL_NOT}) ({_SPEAK})",
    r"(i|we) (do not have|have no) (a |an |the |any |enough |personal )*"
    r"(comments?|opinions?|answers?|information|access|idea)",
    r"(i|we) (really |just |simply )?do not (really |actually )?know",
    r"(i am|we are) (not (entirely |quite |really )?(sure|certain)|unsure|uncertain)",
    r"as an? (large )?(ai|language model|artificial intelligence)",
    r"no comment",
    r"(it|that|the answer|this) is (not (yet |currently )?(known|clear)|unknown|unclear|uncertain)(?! (to|for|as|by))",
    r"(no one|nobody) (really )?knows(?! (about|of))",
    rf"it is (not possible|impossible) to (know|{_SPEAK})",
    r"there is (not enough|insufficient) information",
    r"(the|this|that) question (can not be answered|has no answer|is unanswerable)",
)
"""How an answer that refuses begins, after `OPENERS`: patterns of lower-case words, contractions written out."""

OPENERS = (
    *("i am sorry", "i am very sorry", "i am afraid", "sorry", "i apologize", "i apologise", "my apologies"),
    *("unfortunately", "honestly", "frankly", "well", "but", "however", "that"),
)
"""Words of courtesy that may precede a refusal, one or several of them."""

_REFUSAL = re.compile(rf"(?:(?:{'|'.join(OPENERS)}) )*(?:{'|'.join(REFUSALS)})\b")

_LONG = {"cannot": "can not", "can't": "can not", "won't": "will not", "i'm": "i am", "we're": "we are"} | {
    f"{word}'s": f"{word} is" for word in ("it", "that", "there", "answer")
}
_LONG |= {f"{word}'{end}": f"{word} {long}" for word in ("i", "we") for end, long in (("ve", "have"), ("d", "would"))}

_UNSPACED = re.compile(r"CJK|HIRAGANA|KATAKANA|THAI|LAO|KHMER|MYANMAR")
"""Scripts written without spaces, by the names of their letters."""


def words(text: str) -> list[str]:
    """The words in order, case folded: letters, marks, digits and inner apostrophes (straight) of any script.

    A letter of a script that is written without spaces (Chinese, Japanese, Thai ...) is a word of its own.
    """
    kept = "".join(map(_kept, normalise(text)))
    return [word for word in (part.strip("'") for part in kept.split()) if word]


@lru_cache(maxsize=65536)
def _kept(char: str) -> str:
    """A character as `words` sees it: itself, a space, or with a space before it."""
    category = unicodedata.category(char)
    if category[0] not in "LMN":
        return char if char == "'" else " "
    unspaced = category[0] == "L" and _UNSPACED.match(unicodedata.name(char, ""))
    return f" {char}" if unspaced else char


def has_negation(text: str) -> bool:
    """Whether a word of it is in `NEGATIONS` or ends in "n't"."""
    return any(word in NEGATIONS or word.endswith("n't") for word in words(text))


def has_hedge(text: str) -> bool:
    """Whether a word or phrase of it is in `HEDGES`."""
    return _HEDGE.search(" ".join(words(text))) is not None


_HEDGE = re.compile(rf"\b(?:{'|'.join(HEDGES)})\b")


def is_refusal(text: str) -> bool:
    """Whether an answer declines (`abstention.is_abstention`) or begins as in `REFUSALS`, whatever follows.

    Broader than abstaining, for models that decline in their own words; it says nothing about truth.
    """
    return is_abstention(text) or _REFUSAL.match(_without_contractions(text)) is not None


def _without_contractions(text: str) -> str:
    return " ".join(_LONG.get(word) or re.sub(r"n't$", " not", word) for word in words(text))


def repetition(text: str, n: int = 2) -> float:
    """Share of the text's word n-grams that stood in it before, 1 - distinct / all; NaN of fewer than `n` words.

    seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319), of words instead of tokens.
    """
    return 1 - distinct([text], n)


def distinct(texts: Iterable[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of all texts (distinct-n, Li et al. 2016, arXiv:1510.03055).

    NaN if there are none. It falls with the amount of text: compare conditions with the same questions only.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]
