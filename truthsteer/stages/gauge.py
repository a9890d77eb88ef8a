"""gauge: what each condition costs elsewhere: perplexity and KL on neutral text, and capability questions.

Neutral text is read as it stands, without a prompt, so that only conditions that add a vector are measured on it, beside
the baseline. Capability questions are asked in the run's prompt, or in the condition's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from truthsteer import capability, neutral
from truthsteer.conditions import Vectors, condition_inputs, injections, per_prompt, score_answers, vectors_of
from truthsteer.config import PromptConfig, Stage
from truthsteer.files import digest
from truthsteer.records import MODEL_FREE, Capability, Condition, Splits
from truthsteer.store import Artifact, JournalRow, Key
from truthsteer.workspace import Workspace

NEUTRAL_VERSION = 1
CAPABILITY_VERSION = 1


def run(ws: Workspace, split: Splits, bank: Artifact, conditions: list[Condition]) -> dict[str, dict[str, Artifact]]:
    """`neutral` and `capability`: condition -> artifact each, of the conditions that are measured.

    A run whose `stages` leave gauge out shows what the store has.

    Raises:
        UserError: a file cannot be used, or the model's numbers are not finite.
    """
    asked = [condition for condition in conditions if condition.kind not in MODEL_FREE]
    plain = [condition for condition in asked if not condition.prompt]
    vectors = vectors_of(bank)

    def ask(prompt: PromptConfig, own: list[Condition]) -> list[Artifact | None]:
        return _capability(ws, split, prompt, own, vectors)

    return {
        "neutral": _named(plain, _neutral(ws, split, plain, vectors)),
        "capability": _named(asked, per_prompt(ws, split, asked, ask)),
    }


def check(ws: Workspace) -> None:
    """Raise now what the files to be read would raise after hours."""
    if ws.config.gauge.passages:
        neutral.passages(ws.config.gauge.text)
    _ = ws.capability


def _named(conditions: Sequence[Condition], artifacts: Sequence[Artifact | None]) -> dict[str, Artifact]:
    found = zip(conditions, artifacts, strict=True)
    return {condition.name: artifact for condition, artifact in found if artifact is not None}


def _neutral(ws: Workspace, split: Splits, conditions: Sequence[Condition], vectors: Vectors) -> list[Artifact | None]:
    gauge = ws.config.gauge
    if not gauge.passages:
        return [None] * len(conditions)
    passages = neutral.passages(gauge.text)[: gauge.passages]
    what = {"model": ws.model_inputs, "text": digest(passages), "max_tokens": gauge.max_tokens}
    keys = [
        Key.of("neutral", NEUTRAL_VERSION, **what, condition=condition_inputs(ws, condition))
        for condition in conditions
    ]
    if not ws.runs(Stage.gauge):
        return [ws.store.find(key) for key in keys]
    by_digest = {key.digest: condition for key, condition in zip(keys, conditions, strict=True)}

    def compute(plan: Sequence[str], done: Callable[[int], bool]) -> Iterator[tuple[int, list[JournalRow]]]:
        measured = [by_digest[name] for name in plan]
        names, injected = [condition.name for condition in measured], injections(measured, vectors())
        budget = ws.config.batch_tokens
        with ws.progress(ws.label("gauge: neutral text", split), len(plan) * len(passages)) as advance:
            units = neutral.measure(
                ws.model, passages, injected, ws.operator, gauge.max_tokens, budget, done, advance, names
            )
            for unit, found in units:
                yield unit, [JournalRow(plan[place], row.passage, row) for place, row in found]

    return list(ws.store.make_rows(keys, {"batch_tokens": ws.config.batch_tokens}, compute))


def _capability(
    ws: Workspace, split: Splits, prompt: PromptConfig, conditions: Sequence[Condition], vectors: Vectors
) -> list[Artifact | None]:
    items, _ = ws.capability
    if not items:
        return [None] * len(conditions)
    what = {
        "model": ws.model_inputs,
        "prompt": ws.prompt_inputs(prompt),
        "items": digest([[item.text, list(item.choices), item.answer] for item in items]),
    }
    keys = [
        Key.of("capability", CAPABILITY_VERSION, **what, condition=condition_inputs(ws, condition))
        for condition in conditions
    ]
    if not ws.runs(Stage.gauge):
        return [ws.store.find(key) for key in keys]

    def record(place: int, logprobs: list[float], _tokens: list[int]) -> list[Capability]:
        return [Capability(items[place].id, *capability.correct(items[place], logprobs))]

    texts, choices = [item.text for item in items], [list(item.choices) for item in items]
    label = ws.label("gauge: capability", split)
    return list(score_answers(ws, keys, prompt, conditions, texts, choices, record, vectors, label))
