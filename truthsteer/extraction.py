"""Reading residual-stream activations of true and false answers: every layer and three readouts in one pass.

A pair is a true and a false answer to the same question, which the two share: the question is computed once. Sums run in
float32 over real tokens only. Nothing above the deepest layer asked for is computed, and no logits. A text that is too long
is refused, or its pair dropped, or its end not read, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from truthsteer.activations import Activations, drop_bad, drop_equal
from truthsteer.branching import Brancher, Unit
from truthsteer.config import TooLong
from truthsteer.errors import UserError
from truthsteer.files import digest
from truthsteer.halving import in_halves
from truthsteer.hooks import RowSteering, capture
from truthsteer.journal import Journal
from truthsteer.lengths import fit
from truthsteer.model import LanguageModel
from truthsteer.operators import Add
from truthsteer.pairs import Pair, make_pairs
from truthsteer.prompts import PLAIN, Branch, Prompts
from truthsteer.records import Question


def extract(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    prompts: Prompts | None = None,
    depth: int | None = None,
    pairs_per_question: int = 2,
    max_length: int = 512,
    too_long: TooLong = TooLong.error,
    max_dropped: float = 0.01,
    batch_tokens: int = 8192,
    advance: Callable[[int], None] = lambda done: None,
    blocks: Journal | None = None,
    share: tuple[int, int] = (0, 1),
) -> Activations:
    """Read the activations of (true, false) answer pairs.

    Args:
        lm: the model.
        questions: whose answers are paired.
        prompts: the preset; `Q: ... A:` by default.
        depth: read layers 0 to depth - 1 and compute none above; all by default.
        pairs_per_question: at most this many pairs of one question.
        max_length: longest context plus answer, in tokens.
        too_long: what becomes of longer ones.
        max_dropped: largest share of pairs that may be lost to numbers that are not finite.
        batch_tokens: key-value slots filled at once.
        advance: called with the number of questions just done.
        blocks: keeps what is read, a batch at a time: what is in it is not read again, and other processes share the work.
        share: this process's of the batches, and how many shares there are.

    Raises:
        UserError: no pairs, a text too long, too many pairs lost, or none left.
        PublishedError: another process has read everything, and published it.
    """
    prompts = prompts or Prompts(PLAIN, lm.tokenizer, lm.chat)
    depth = lm.num_layers if depth is None else depth
    lm.check_layer(depth - 1)
    pairs, names, whole = paired(questions, prompts, pairs_per_question)
    fitted = fit(pairs, whole, names, max_length, too_long)
    branches = fitted.branches
    advance(len(questions) - len(branches))
    first = np.cumsum([0, *(len(branch.continuations) // 2 for branch in branches)])  # [branches + 1], by pair

    layers = list(range(depth))
    shape = (len(fitted.pairs), 2, depth, lm.hidden_size)
    answer_mean, answer_last = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    prompt_last = np.zeros((len(fitted.pairs), depth, lm.hidden_size), np.float32)
    norms, tokens = np.zeros(shape[:3], np.float32), np.zeros(shape[:2], np.int64)
    arrays = {"answer_mean": answer_mean, "answer_last": answer_last, "prompt_last": prompt_last}
    arrays |= {"norms": norms, "tokens": tokens}
    with (
        RowSteering(lm, [None], Add()) as none,
        capture(lm, layers, stop=depth < lm.num_layers) as taken,
    ):
        brancher = Brancher(lm, branches, none, 1, batch_tokens)

        def read_unit(unit: Unit) -> list[None]:
            for step in brancher.walk(unit, whole=True, state=lambda: taken[depth - 1]):
                counts = torch.tensor([len(path.places) - 1 for path in step.paths])
                answers = torch.tensor([place for path in step.paths for place in path.places[1:]])
                of = torch.arange(len(counts)).repeat_interleave(counts)
                lasts = torch.tensor([(path.places[0], path.places[-1]) for path in step.paths])
                where = [(first[path.branch] + path.continuation // 2, path.continuation % 2) for path in step.paths]
                index, member = np.array(where).T
                tokens[index, member] = counts
                for layer in layers:
                    values = taken[layer].reshape(-1, lm.hidden_size)
                    prompt, last = values[lasts.T.to(values.device)].float().cpu().numpy()
                    prompt_last[index, layer], answer_last[index, member, layer] = prompt, last
                    own, place = values[answers.to(values.device)].float(), of.to(values.device)
                    total = own.new_zeros(len(counts), lm.hidden_size).index_add_(0, place, own)
                    norm = own.new_zeros(len(counts)).index_add_(0, place, own.norm(dim=-1))
                    answer_mean[index, member, layer] = total.cpu().numpy()
                    norms[index, member, layer] = norm.cpu().numpy()
            return []

        def read_batch(number: int) -> None:
            in_halves(read_unit, brancher.units[number], Unit.halves)

        def told(number: int) -> None:
            advance(len(brancher.units[number].branches))

        rows = [np.concatenate([np.arange(*first[b : b + 2]) for b in unit.branches]) for unit in brancher.units]
        if blocks is None:
            for number in range(len(rows)):
                read_batch(number)
                told(number)
        else:
            names_of = [digest([fitted.pairs[row].id for row in own]) for own in rows]
            _read_blocks(blocks, share, read_batch, arrays, rows, names_of, told)
    answer_mean /= tokens[..., None, None]
    norms /= tokens[..., None]
    read = Activations(
        fitted.pairs,
        answer_mean,
        answer_last,
        prompt_last,
        norms,
        tokens,
        dropped=fitted.dropped,
        truncated=fitted.truncated,
    )
    finite = drop_bad(read, max_dropped)
    return drop_equal(finite) if too_long is TooLong.truncate else finite


def _read_blocks(
    blocks: Journal,
    share: tuple[int, int],
    read: Callable[[int], None],
    arrays: Mapping[str, np.ndarray],
    rows: Sequence[np.ndarray],
    names: Sequence[str],
    advance: Callable[[int], None],
) -> None:
    """Fill `arrays` batch by batch: from `blocks` what was read before or elsewhere, by `read` what was not.

    Batch n fills `rows[n]` and is called `names[n]`; a block that is damaged, or of another batch, is read again.
    """
    here: set[int] = set()
    while len(here) < len(rows):
        for done in blocks.passes(*share):
            for number, own in enumerate(rows):
                if not done(number):
                    read(number)
                    blocks.put(number, names[number], {name: array[own] for name, array in arrays.items()})
                    here.add(number)
                    advance(number)
        for number in set(range(len(rows))) - here:
            found = blocks.get(number, names[number])
            if found is not None:
                for name, array in arrays.items():
                    array[rows[number]] = found[name]
                here.add(number)
                advance(number)


def paired(
    questions: Sequence[Question], prompts: Prompts, pairs_per_question: int
) -> tuple[list[Pair], list[str], list[Branch]]:
    """The answer pairs; then, of each question that has any, its text, and its context with true and false answers in turn.

    Raises:
        UserError: there are no pairs.
    """
    pairs = make_pairs(questions, pairs_per_question)
    if not pairs:
        raise UserError(
            f"No (true, false) pairs can be made from these {len(questions)} questions: each needs a true answer that "
            "is not an abstention and a false one. Use another file, or a larger data.split.steer."
        )
    answers: dict[str, list[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.question, []).extend((pair.true, pair.false))
    texts = {question.id: question.text for question in questions}
    names = [texts[question] for question in answers]
    return pairs, names, prompts.branches(names, list(answers.values()))
