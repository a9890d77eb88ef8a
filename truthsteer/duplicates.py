"""Near-duplicate questions: which ones ask nearly the same thing, or share their answers.

A direction fitted on one of two near-duplicates has seen the other's answers, so they must stand on the same
side of every split, and they count as one cluster in intervals. This module knows texts, not files or splits.

Two questions are linked when one of three rules holds:

- the Jaccard index of their sets of words is at least 0.6;
- the cosine of their character n-grams (3 to 5 within words, sublinear tf-idf) is at least 0.6;
- they share at least two answers, and these are at least half of the shorter list of answers (true and false
  together; answers that fit any question, such as "I have no comment.", do not count).

Groups are the connected components. On the 817 questions of TruthfulQA (v0) the rules link 72, 90 and 46
pairs of 104, 116 and 43 questions, together 154 pairs of 184 questions: 701 groups, the largest of 9.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from truthsteer.records import NO_COMMENT, Question

WORD_JACCARD = 0.6
NGRAM_COSINE = 0.6
SHARED_ANSWERS = 0.5
MIN_SHARED_ANSWERS = 2
NGRAM_SIZES = (3, 4, 5)
CONTENT_FREE = frozenset({NO_COMMENT.casefold(), "yes.", "no."})
"""Closed answers that say nothing about which question they answer."""

Pair = tuple[int, int]


def group_near_duplicates(questions: Sequence[Question]) -> list[int]:
    """The group of each question, 0-based, numbered by first appearance."""
    pairs = word_pairs(questions) | ngram_pairs(questions) | answer_pairs(questions)
    return connected_components(len(questions), pairs)


def word_pairs(questions: Sequence[Question]) -> set[Pair]:
    """Pairs (i < j) of questions whose word sets have a Jaccard index of at least `WORD_JACCARD`."""
    words = [set(re.findall(r"\w+", question.text.lower())) for question in questions]
    sizes = np.array([len(bag) for bag in words])
    return {
        (i, int(j))
        for i, shared in _inner_products([dict.fromkeys(bag, 1.0) for bag in words])
        for j in np.flatnonzero((shared > 0) & (shared >= WORD_JACCARD * (sizes[i] + sizes - shared)))
        if i < j
    }


def ngram_pairs(questions: Sequence[Question]) -> set[Pair]:
    """Pairs (i < j) of questions whose character n-grams have a tf-idf cosine of at least `NGRAM_COSINE`."""
    counts = [Counter(_ngrams(question.text)) for question in questions]
    documents = Counter(ngram for bag in counts for ngram in bag)
    inverse = {ngram: math.log((1 + len(counts)) / (1 + n)) + 1 for ngram, n in documents.items()}
    vectors = [_unit({ngram: (1 + math.log(n)) * inverse[ngram] for ngram, n in bag.items()}) for bag in counts]
    return {
        (i, int(j)) for i, cosine in _inner_products(vectors) for j in np.flatnonzero(cosine >= NGRAM_COSINE) if i < j
    }


def answer_pairs(questions: Sequence[Question]) -> set[Pair]:
    """Pairs (i < j) of questions that share at least `SHARED_ANSWERS` of the shorter list of answers."""
    answers = [
        {answer.casefold() for answer in (*question.correct, *question.incorrect)} - CONTENT_FREE
        for question in questions
    ]
    sizes = np.array([len(bag) for bag in answers])
    return {
        (i, int(j))
        for i, shared in _inner_products([dict.fromkeys(bag, 1.0) for bag in answers])
        for j in np.flatnonzero(
            (shared >= MIN_SHARED_ANSWERS) & (shared >= SHARED_ANSWERS * np.minimum(sizes[i], sizes))
        )
        if i < j
    }


def connected_components(size: int, pairs: set[Pair]) -> list[int]:
    """The component of each of `size` nodes joined by `pairs`, numbered by first appearance."""
    parent = list(range(size))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for i, j in pairs:
        parent[root(i)] = root(j)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(node), len(numbers)) for node in range(size)]


def _inner_products(vectors: Sequence[Mapping[str, float]]) -> Iterator[tuple[int, np.ndarray]]:
    """Each vector's inner product with all of them, one at a time, in the memory of the sparse vectors."""
    owners: dict[str, list[int]] = defaultdict(list)
    values: dict[str, list[float]] = defaultdict(list)
    for i, vector in enumerate(vectors):
        for key, value in vector.items():
            owners[key].append(i)
            values[key].append(value)
    columns = {key: (np.array(owners[key]), np.array(values[key])) for key in owners}
    for i, vector in enumerate(vectors):
        if vector:
            rows = np.concatenate([columns[key][0] for key in vector])
            products = np.concatenate([columns[key][1] * value for key, value in vector.items()])
            yield i, np.bincount(rows, weights=products, minlength=len(vectors))


def _ngrams(text: str) -> Iterator[str]:
    """Character n-grams within words, each word between two spaces; shorter words count whole."""
    for word in text.lower().split():
        padded = f" {word} "
        for size in NGRAM_SIZES:
            if len(padded) <= size:
                yield padded
                break
            yield from (padded[start : start + size] for start in range(len(padded) - size + 1))


def _unit(vector: Mapping[str, float]) -> dict[str, float]:
    norm = math.sqrt(sum(value * value for value in vector.values()))
    return {key: value / norm for key, value in vector.items()}
