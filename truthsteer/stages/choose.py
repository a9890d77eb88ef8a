"""choose: the log-probability of every answer of the test questions, under every condition of a fold."""

from __future__ import annotations

from safetensors.numpy import load_file

from truthsteer.conditions import choices_key, score_conditions
from truthsteer.config import Stage
from truthsteer.records import Condition, Splits
from truthsteer.store import Artifact
from truthsteer.workspace import Workspace


def run(ws: Workspace, split: Splits, bank: Artifact, conditions: list[Condition]) -> list[Artifact]:
    """One artifact of `Choice` rows per condition, in their order."""
    if not ws.runs(Stage.choose):
        return [ws.store.need(choices_key(ws, split.test, condition), "choose") for condition in conditions]
    return score_conditions(
        ws,
        split.test,
        conditions,
        lambda: load_file(bank.path / "vectors.safetensors"),
        ws.label("choose: answers", split),
    )
