"""extract: read the activations of true and false answers, for the steer questions of all folds at once.

Before that, a few of them are passed through the model with its numbers looked at, so that a run that cannot succeed says
why at once.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from truthsteer import preflight
from truthsteer.config import Stage, TooLong
from truthsteer.files import write_json
from truthsteer.journal import Journal, PublishedError
from truthsteer.store import Artifact, Key
from truthsteer.workspace import Workspace, questions_digest

log = logging.getLogger("truthsteer")

VERSION = 2


def run(ws: Workspace) -> Artifact:
    """The activations (an artifact that `activations.Activations.load` reads), made only if they are not there."""
    steering = ws.config.steering
    questions = ws.steer_questions
    depth = max(ws.layers) + 1
    # Where a longer text is an error, the limit decides nothing else: another one reads nothing again.
    limit = (
        {}
        if steering.too_long is TooLong.error
        else {"max_length": steering.max_length, "too_long": steering.too_long.value}
    )
    key = Key.of(
        "activations",
        VERSION,
        model=ws.model_inputs,
        prompt=ws.prompt_inputs(),
        questions=questions_digest(questions),
        depth=depth,
        pairs_per_question=steering.pairs_per_question,
        max_dropped=steering.max_dropped,
        **limit,
    )
    known = ws.store.find(key) if ws.runs(Stage.extract) else ws.store.need(key, "extract")
    if known is not None:
        preflight.check_known(ws, known.json(preflight.REPORT))
        return known

    def write(folder: Path, blocks: Journal) -> None:
        from truthsteer.extraction import extract

        preflight.refuse_known_overflow(ws)
        numerics = preflight.examine(ws, questions, thorough=False)
        preflight.enforce(ws, numerics)
        lm, prompts = ws.model, ws.prompts()
        with ws.progress("extract: questions", len(questions)) as advance:
            found = extract(
                lm,
                questions,
                prompts=prompts,
                depth=depth,
                pairs_per_question=steering.pairs_per_question,
                max_length=steering.max_length,
                too_long=steering.too_long,
                max_dropped=steering.max_dropped,
                batch_tokens=ws.config.batch_tokens,
                advance=advance,
                blocks=blocks,
                share=ws.store.share,
            )
        for phrase in found.losses():
            log.warning(phrase)
        found.save(folder)
        write_json(folder / preflight.REPORT, numerics)

    with ws.store.journal([key], {"batch_tokens": ws.config.batch_tokens}) as blocks, suppress(PublishedError):
        if blocks is not None:
            ws.store.make(key, lambda folder: write(folder, blocks))
    return ws.store.need(key, "extract")
