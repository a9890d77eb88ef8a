"""extract: read the activations of true and false answers, for the steer questions of all folds at once."""

from __future__ import annotations

from pathlib import Path

from truthsteer.config import Stage
from truthsteer.store import Artifact, Key
from truthsteer.workspace import Workspace, questions_digest

VERSION = 1


def run(ws: Workspace) -> Artifact:
    """The activations (an artifact that `activations.Activations.load` reads), made only if they are not there."""
    steering = ws.config.steering
    questions = tuple({q.id: q for fold in ws.splits for q in fold.steer}.values())
    depth = max(ws.layers) + 1
    key = Key.of(
        "activations",
        VERSION,
        model=ws.model_inputs,
        prompt=ws.prompt_inputs(),
        questions=questions_digest(questions),
        depth=depth,
        pairs_per_question=steering.pairs_per_question,
        max_dropped=steering.max_dropped,
    )
    if not ws.runs(Stage.extract):
        return ws.store.need(key, "extract")

    def write(folder: Path) -> None:
        from truthsteer.extraction import extract

        lm = ws.model
        prompts = ws.prompts()
        with ws.progress("extract: questions", len(questions)) as advance:
            found = extract(
                lm,
                questions,
                prompts=prompts,
                depth=depth,
                pairs_per_question=steering.pairs_per_question,
                max_length=steering.max_length,
                max_dropped=steering.max_dropped,
                batch_tokens=ws.config.batch_tokens,
                advance=advance,
            )
        found.save(folder)

    return ws.store.make(key, write)
