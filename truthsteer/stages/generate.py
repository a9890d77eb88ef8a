"""generate: an answer to every test question, under every condition of a fold, many conditions in one batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

from truthsteer import baselines
from truthsteer.conditions import Vectors, condition_inputs, injections, per_prompt, vectors_of
from truthsteer.config import PromptConfig, Stage, to_plain
from truthsteer.files import digest
from truthsteer.records import Completion, Condition, Splits
from truthsteer.store import Artifact, JournalRow, Key
from truthsteer.workspace import Workspace

VERSION = 1

PLAN = 2
"""Of how `decoding` divides work into batches: raise it with that, since a run that was cut short goes on by batches."""


def run(ws: Workspace, split: Splits, bank: Artifact, conditions: list[Condition]) -> list[Artifact]:
    """One artifact of `Completion` rows per condition, in their order.

    Raises:
        UserError: logits are not finite; the message names question and condition.
    """

    def make(prompt: PromptConfig, own: list[Condition]) -> list[Artifact]:
        return _generate(ws, split, prompt, own, vectors_of(bank))

    return baselines.beside(
        conditions,
        lambda asked: per_prompt(ws, split, asked, make),
        lambda item: baselines.completions(ws, split, item),
    )


def _generate(
    ws: Workspace, split: Splits, prompt: PromptConfig, conditions: list[Condition], vectors: Vectors
) -> list[Artifact]:
    """All conditions of one prompt."""
    config, inputs = ws.config, ws.prompt_inputs(prompt)
    sampled = config.generation.temperature > 0
    asked = digest([[question.id, question.text] for question in split.test])
    stop = [] if inputs["chat"] else prompt.stop
    keys = [
        Key.of(
            "completions",
            VERSION,
            model=ws.model_inputs,
            prompt=inputs,
            stop=stop,
            questions=asked,
            condition=condition_inputs(ws, condition),
            generation=to_plain(config.generation),
            seed=config.seed if sampled else None,
        )
        for condition in conditions
    ]
    if not ws.runs(Stage.generate):
        return [ws.store.need(key, "generate") for key in keys]
    by_digest = {key.digest: condition for key, condition in zip(keys, conditions, strict=True)}

    def compute(plan: Sequence[str], done: Callable[[int], bool]) -> Iterator[tuple[int, list[JournalRow]]]:
        from truthsteer.decoding import Request, decode
        from truthsteer.lengths import check_generated

        lm, prompts = ws.model, ws.prompts(prompt)
        texts = [question.text for question in split.test]
        contexts = prompts.contexts(texts)
        check_generated(lm, contexts, texts, config.steering, config.generation.max_new_tokens)
        chosen = [by_digest[name] for name in plan]
        requests = [
            Request(
                context,
                index,
                zlib.crc32(f"{config.seed} {question.id}".encode()),
                question.text,
            )
            for index in range(len(chosen))
            for question, context in zip(split.test, contexts, strict=True)
        ]
        injected = injections(chosen, vectors())
        with ws.progress(ws.label("generate: answers", split), len(requests)) as advance:
            batches = decode(
                lm,
                requests,
                injected,
                config=config.generation,
                stop=prompts.stop,
                operator=ws.operator,
                batch_tokens=config.batch_tokens,
                skip=done,
                advance=advance,
                names=[condition.name for condition in chosen],
            )
            for number, answers in batches:
                rows = []
                for index, answer in answers:
                    condition, order = divmod(index, len(split.test))
                    record = Completion(split.test[order].id, answer.text, answer.tokens, answer.stop_reason)
                    rows.append(JournalRow(plan[condition], order, record))
                yield number, rows

    return ws.store.make_rows(keys, {"batch_tokens": config.batch_tokens, "plan": PLAN}, compute)
