"""The evaluation as a user runs it: every judge at once, judges that fail, folds, the binary task and what it costs."""

from __future__ import annotations

import csv
import gc
import json
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import MINILM, REPO, needs_minilm, run_cli
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from tiny_chat import leaning_chat, random_chat

from truthsteer import workspace
from truthsteer.config import Config
from truthsteer.data import load_questions
from truthsteer.errors import UserError
from truthsteer.organism import QUESTIONS
from truthsteer.pipeline import run
from truthsteer.records import Question, Verdict

pytestmark = pytest.mark.slow

SMALL = (
    "steering.layers=[2]",
    "steering.coefficients=[-0.4,0.4]",
    "steering.controls.random=2",
    "steering.controls.envelope=3",
    "data.limit=48",
    "gauge.passages=5",
    "threads=1",
)


def composed(*overrides: str) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        built = OmegaConf.to_object(compose("config", overrides=[*SMALL, *overrides]))
    assert isinstance(built, Config)
    return built


def judged(root: Path, *overrides: str, judge: str | None = None) -> dict[str, Any]:
    """A small run in this process; `judge` names one of this file's own judges."""
    config = composed(f"paths.root={root}", *overrides)
    if judge is not None:
        config.judge = {judge.lower(): {"_target_": f"{__name__}.{judge}"}}
    summary = run(config, list(overrides))
    assert summary is not None
    return summary


@needs_minilm
def test_every_judge_at_once_on_the_command_line_without_a_network(tmp_path):
    chat = leaning_chat(tmp_path / "chat", {"0": 30.0, "1": 31.0})
    arguments = [
        "judge=[reference,semantic,lexical,llm]",
        f"judge.llm.model={chat}",
        f"judge.semantic.model={MINILM}",
    ]
    done = run_cli(*SMALL, *arguments, root=tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "runs").glob("*/summary.json")
    summary = json.loads(path.read_text(encoding="utf-8"))
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    for title in ("Judge audit", "Agreement between judges", "Side effects", "Truth against information", "wording"):
        assert title in page
    kinds = {row["kind"] for row in summary["conditions"]}
    assert {"prompt", "few_shot", "abstain", "shortest", "surface", "random", "shuffled", "sign_flip"} <= kinds
    assert {row["judge"] for row in summary["known_answers"]} == {"reference", "semantic", "lexical", "llm"}
    passed = {(row["metric"], row["sentinel"]): row["passed"] for row in summary["known_answers"]}
    assert passed["true", "best"] == passed["true", "best_incorrect"] == passed["info", "elsewhere"] == 1
    # A judge that says "1" whatever it is asked decides nothing, and is shown so.
    assert passed["llm_true", "best"] == passed["llm_true", "best_incorrect"] == 0
    assert summary["conditions"][0]["statuses"]["llm"] == {"no_preference": summary["n"]}
    assert summary["withheld"] == ["llm_info", "llm_true"]
    assert any(text.startswith("llm_true is withheld: llm reached no verdict on") for text in summary["warnings"])
    pairs = {(row["first"], row["second"]) for row in summary["agreement"]}
    assert {("true", "semantic_acc"), ("true", "bleu_acc")} <= pairs
    chosen = next(row for row in summary["conditions"] if row["kind"] == "chosen")
    for name in ("true", "mc1", "semantic_acc", "rougel_acc"):
        cell = chosen["metrics"][name]
        assert None not in (cell["low"], cell["high"], cell["p"], cell["category_low"], cell["fixed"])
    assert summary["settings"]["mc1"] == "plain, text, sum, organism"
    assert "plain, text" in page
    assert "chosen against the others" in page


@pytest.fixture(scope="module")
def binary_run(tmp_path_factory) -> dict[str, Any]:
    """Folds, a file that names best incorrect answers, and a capability file."""
    folder = tmp_path_factory.mktemp("binary")
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["Best Incorrect Answer"] = row["Incorrect Answers"].split(";")[-1].strip()
        row.pop("Split")
    with (folder / "v2.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = ["question,A,B,C,D,answer"]
    lines += [f"{q.text},{q.best},{','.join((*q.incorrect, 'No.', 'None.')[:3])},A" for q in load_questions()[:6]]
    (folder / "capability.csv").write_text("\n".join([*lines, "half a row,x"]) + "\n", encoding="utf-8")
    return judged(
        folder / "runs",
        "data=truthfulqa_csv",
        f"data.path={folder / 'v2.csv'}",
        "data.folds=2",
        f"gauge.capability={folder / 'capability.csv'}",
    )


def test_the_binary_task_is_asked_in_both_orders_and_by_log_probability(binary_run):
    cells = {row["kind"]: row["metrics"] for row in binary_run["conditions"]}
    base = cells["baseline"]
    assert base["mc0"]["n"] == base["mc0_ab"]["n"] == binary_run["n"] == 48
    assert base["mc0"]["mean"] >= base["mc1"]["mean"]  # one false answer is easier than all
    assert 0 <= base["says_a"]["mean"] <= 1
    assert cells["chosen"]["mc0_ab"]["p"] is not None
    assert cells["surface"]["mc0_ab"]["n"] == 0
    assert cells["surface"]["mc0"]["n"] == 48
    settings = binary_run["settings"]
    assert (settings["mc0"], settings["mc0_ab"]) == ("plain, text, sum, custom", "plain, text, letters, custom")
    assert settings["mc1_token"] == "plain, text, per token, custom"


def test_costs_are_pooled_over_folds_and_bad_rows_are_told(binary_run):
    costs = {row["condition"]: row for row in binary_run["side_effects"]}
    base, chosen = costs["baseline"], costs["mean_diff chosen"]
    assert (base["perplexity_ratio"], base["kl"], base["passages"]) == (1, 0, 5)
    assert chosen["kl"] > 0.01
    assert base["capability"]["n"] == chosen["capability"]["n"] == 6
    assert "difference" in chosen["capability"]
    assert costs["prompt truthful"]["perplexity"] is None
    assert costs["prompt truthful"]["capability"]["n"] == 6
    assert any("capability file were left out: line 8" in text for text in binary_run["warnings"])


def test_rows_without_steering_come_from_their_own_folds(binary_run):
    rows = {row["kind"]: row for row in binary_run["conditions"]}
    for kind in ("prompt", "few_shot", "abstain", "shortest", "surface"):
        assert rows[kind]["layers"] == rows[kind]["coefficients"] == []
    assert rows["abstain"]["metrics"]["true"]["mean"] == rows["abstain"]["metrics"]["abstain"]["mean"] == 1
    assert rows["abstain"]["metrics"]["info"]["mean"] == 0
    assert rows["few_shot"]["metrics"]["mc1"]["mean"] != rows["baseline"]["metrics"]["mc1"]["mean"]
    assert binary_run["surface_matched"]["n"] == round(48 * (1 - rows["surface"]["metrics"]["mc1"]["mean"]))


@dataclass(frozen=True)
class Alone:
    """Fails unless the steered model's memory is free by now."""

    models: ClassVar[list[weakref.ref[Any]]] = []
    metrics: ClassVar[tuple[str, ...]] = ("alone",)

    def identity(self) -> dict[str, Any]:
        return {}

    def prefetch(self) -> None: ...

    def judge(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Verdict]:
        gc.collect()
        assert self.models
        assert all(model() is None for model in self.models), "the steered model still exists"
        return [Verdict(question.id, "ok", {"alone": 1.0}) for question in questions]


def test_the_steered_model_is_gone_before_a_judge_is_asked(tmp_path, monkeypatch):
    loaded = workspace.Workspace.model.func
    models = Alone.models
    models.clear()

    def watched(ws: workspace.Workspace) -> Any:
        lm = loaded(ws)
        models.extend(weakref.ref(item) for item in (lm, lm.model, lm.model.get_input_embeddings().weight))
        return lm

    descriptor = workspace.cached_property(watched)
    descriptor.__set_name__(workspace.Workspace, "model")
    monkeypatch.setattr(workspace.Workspace, "model", descriptor)
    summary = judged(tmp_path, judge="Alone")
    assert summary["conditions"][0]["metrics"]["alone"]["mean"] == 1
    assert len(models) >= 3


@dataclass(frozen=True)
class Tiring:
    """Gives out after a number of answers."""

    left: ClassVar[list[int]] = [0]
    asked: ClassVar[list[tuple[str, str]]] = []
    metrics: ClassVar[tuple[str, ...]] = ("long",)
    rows_at_once: ClassVar[int] = 8

    def identity(self) -> dict[str, Any]:
        return {}

    def prefetch(self) -> None: ...

    def judge(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Verdict]:
        if self.left[0] < len(texts):
            raise UserError("This judge is tired.")
        self.left[0] -= len(texts)
        self.asked.extend((question.id, text) for question, text in zip(questions, texts, strict=True))
        return [
            Verdict(question.id, "ok", {"long": float(len(text) > 30)})
            for question, text in zip(questions, texts, strict=True)
        ]


def test_a_judge_that_fails_half_way_loses_no_verdict_and_asks_nothing_twice(tmp_path):
    Tiring.left[0] = 50
    Tiring.asked.clear()
    with pytest.raises(UserError, match="tired"):
        judged(tmp_path, judge="Tiring")
    done = list(Tiring.asked)
    assert 40 < len(done) <= 50
    Tiring.left[0] = 10**6
    summary = judged(tmp_path, judge="Tiring")
    [path] = tmp_path.glob("*/answers.csv")
    with path.open(encoding="utf-8", newline="") as file:
        given = {(row["question_id"], row["answer"]) for row in csv.DictReader(file) if row["stop_reason"]}
    assert set(Tiring.asked[: len(given)]) == given  # each once, although conditions share answers; then the known ones
    Tiring.asked.clear()
    assert judged(tmp_path, judge="Tiring") == summary
    assert Tiring.asked == []


def test_judging_again_writes_a_new_artifact_and_leaves_the_old_one(tmp_path):
    first = judged(tmp_path, "judge=[reference]")
    before = {path: path.read_bytes() for path in (tmp_path / ".store" / "verdicts").rglob("rows.jsonl")}
    [folder] = tmp_path.glob("*/summary.json")
    done = run_cli("experiment=eval_only", f"run={folder.parent.name}", "judge=[lexical,reference]", root=tmp_path)
    assert done.returncode == 0, done.stderr
    after = {path: path.read_bytes() for path in (tmp_path / ".store" / "verdicts").rglob("rows.jsonl")}
    assert before.items() < after.items()
    assert json.loads(folder.read_text(encoding="utf-8")) == first
    [other] = [path for path in tmp_path.glob("*/summary.json") if path != folder]
    again = json.loads(other.read_text(encoding="utf-8"))
    assert again["conditions"][0]["metrics"]["true"] == first["conditions"][0]["metrics"]["true"]
    assert "bleu_acc" in again["metrics"]


def test_judges_of_one_model_load_it_once_and_garbage_is_withheld_in_sight(tmp_path, caplog):
    chat = random_chat(tmp_path / "chat")
    with caplog.at_level(logging.INFO, logger="truthsteer"):
        summary = judged(
            tmp_path / "runs", "judge=[llm,lexical,llm_json]", f"judge.llm.model={chat}", f"judge.llm_json.model={chat}",
            "judge.llm.dtype=fp32", "judge.llm_json.dtype=fp32", "judge.llm_json.max_new_tokens=4",
        )  # fmt: skip
    assert caplog.text.count("loading the judge's model") == 1
    assert {"true", "info", "true_info"} <= set(summary["withheld"])
    cell = summary["conditions"][0]["metrics"]["true"]
    assert (cell["mean"], cell["n"], cell["floor"], cell["ceiling"]) == (None, 0, 0, 1)
    assert summary["lead"] == "mc1"
    assert any("true is withheld: llm reached no verdict on" in text for text in summary["warnings"])
    assert {"match", "match_decided", "match_lenient"} <= set(summary["withheld"])  # never a silent 0
    match = summary["conditions"][0]["metrics"]["match"]
    assert (match["mean"], match["floor"], match["ceiling"]) == (None, 0, 1)


def test_what_does_not_fit_into_a_baselines_prompt_is_told_before_anything_is_measured(tmp_path):
    words = r"type steering\.max_length=\d+, or '~prompt@baselines\.prompts\.truthful' to leave out the row 'prompt truthful'"
    with pytest.raises(UserError, match=words):
        judged(tmp_path, "steering.max_length=60")
    assert not (tmp_path / ".store" / "choices").exists()
    with pytest.raises(UserError, match=r"or baselines\.few_shot=0 to leave out the row 'few-shot'"):
        judged(tmp_path, "steering.max_length=60", "~prompt@baselines.prompts.truthful", "data.limit=100")
