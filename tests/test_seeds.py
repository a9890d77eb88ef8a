"""Runs that differ in their seed alone: both noises by hand, and what must not be compared."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO

from truthsteer.errors import UserError
from truthsteer.seeds import Run, between, main, read_run, tables

CONFIG = {
    "seed": 1,
    "run_id": None,
    "device": "cpu",
    "paths": {"root": "x"},
    "model": {"name": "m", "layer": 3, "resources": {"gpus": 0}},
    "data": {"folds": 5, "limit": None},
    "steering": {"layers": [3]},
}


def cell(difference: float | None, half: float = 0.1, n: int = 80) -> dict[str, Any]:
    ends = (None, None) if difference is None else (difference - half, difference + half)
    return {"difference": difference, "difference_low": ends[0], "difference_high": ends[1], "p": 0.02, "n": n}


def make(root: Path, seed: int, true: float | None, half: float = 0.1, questions: int = 80, **config: Any) -> str:
    """A finished run's folder as far as this command reads it."""
    folder = root / f"run{seed}-{len(list(root.glob('run*')))}"
    folder.mkdir(parents=True)
    whole = copy.deepcopy(CONFIG) | {"seed": seed, "run_id": folder.name} | config
    record = {"config": whole, "checkpoint": {"fingerprint": "w"}, "code": {"commit": "c"}}
    chosen = {
        "name": "mean_diff chosen",
        "kind": "chosen",
        "method": "mean_diff",
        "metrics": {"true": cell(true, half), "length": cell(2.0 * seed, 1.0), "mc1": cell(None)},
    }
    summary = {
        "model": "m",
        "dataset": "d",
        "n": questions,
        "metrics": ["true", "length", "mc1"],
        "units": {"true": "fraction", "length": "words", "mc1": "fraction"},
        "conditions": [{"name": "baseline", "kind": "baseline", "method": "", "metrics": {}}, chosen],
        "data": {"sha256": "d"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "answers.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("condition", "question_id"), *(("baseline", f"q{place}") for place in range(questions))]
        )
    return folder.name


def runs(root: Path, *names: str) -> list[Run]:
    return [read_run(name, root) for name in names]


def test_both_noises_by_hand(tmp_path):
    names = [make(tmp_path, seed, true, half) for seed, true, half in ((3, 0.1, 0.2), (1, 0.2, 0.1), (2, 0.3, 0.3))]
    result = between(runs(tmp_path, *names))
    assert [run["seed"] for run in result["runs"]] == [1, 2, 3]
    assert result["same_questions"]
    true, length = result["rows"]
    assert (true["method"], true["metric"], true["unit"]) == ("mean_diff", "true", "fraction")
    assert true["mean"] == pytest.approx(0.2)
    assert true["sd"] == pytest.approx(np.std([0.1, 0.2, 0.3], ddof=1))
    assert true["se"] == pytest.approx((0.1 + 0.2 + 0.3) / 3 / 1.96, abs=1e-4)
    assert (true["low"], true["high"]) == pytest.approx((0.1, 0.3))
    assert [each["difference"] for each in true["seeds"]] == pytest.approx([0.2, 0.3, 0.1])
    assert (true["seeds"][0]["low"], true["seeds"][0]["high"]) == pytest.approx((0.1, 0.3))
    assert length["mean"] == pytest.approx(4)
    assert len(result["notes"]) == 1
    assert "two different noises" in result["notes"][0]
    json.dumps(result, allow_nan=False)


def test_two_seeds_other_questions_and_other_code_are_said(tmp_path):
    names = [make(tmp_path, 1, 0.1), make(tmp_path, 2, 0.2, questions=60)]
    record = json.loads((tmp_path / names[1] / "run.json").read_text())
    (tmp_path / names[1] / "run.json").write_text(json.dumps(record | {"code": {"commit": "other"}}))
    result = between(runs(tmp_path, *names))
    assert not result["same_questions"]
    notes = " ".join(result["notes"])
    assert "(60 of 60 or 80 in common)" in notes
    assert "2 seeds hardly tell" in notes
    assert "different versions" in notes


def test_a_run_without_that_number_is_left_out_of_its_row(tmp_path):
    names = [make(tmp_path, 1, 0.1), make(tmp_path, 2, None), make(tmp_path, 3, 0.3)]
    true = between(runs(tmp_path, *names))["rows"][0]
    assert [each["seed"] for each in true["seeds"]] == [1, 3]
    assert true["mean"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steering": {"layers": [4]}}, "differ in steering.layers, not in seed alone: steering.layers is [3] and [4]"),
        ({"data": {"folds": 1, "limit": None}}, "data.folds is 5 and 1"),
        ({"data": {"folds": 5}}, None),
        ({"extra": 1}, "extra is None and 1"),
        ({"device": "cuda"}, None),
        ({"paths": {"root": "elsewhere"}}, None),
        ({"model": {"name": "m", "layer": 3, "resources": {"gpus": 3}}}, None),
    ],
)
def test_runs_may_differ_in_nothing_but_what_changes_nothing(tmp_path, change, words):
    names = [make(tmp_path, 1, 0.1), make(tmp_path, 2, 0.2, **change)]
    if words is None:
        assert between(runs(tmp_path, *names))["rows"]
        return
    with pytest.raises(UserError) as caught:
        between(runs(tmp_path, *names))
    assert words in str(caught.value)


@pytest.mark.parametrize(("file", "key"), [("summary.json", "data"), ("run.json", "checkpoint")])
def test_other_data_or_weights_under_the_same_names_are_refused(tmp_path, file, key):
    names = [make(tmp_path, 1, 0.1), make(tmp_path, 2, 0.2)]
    path = tmp_path / names[1] / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"sha256": "other", "fingerprint": "other"}}))
    with pytest.raises(UserError, match=r"the data's sha256 is 'd'|the weights is 'w'"):
        between(runs(tmp_path, *names))


def test_one_run_the_same_seed_twice_and_runs_that_are_not_there(tmp_path):
    first, again = make(tmp_path, 1, 0.1), make(tmp_path, 1, 0.2)
    with pytest.raises(UserError, match="at least two runs"):
        between(runs(tmp_path, first))
    with pytest.raises(UserError, match=f"{first} and {again} both have seed=1"):
        between(runs(tmp_path, first, again))
    with pytest.raises(UserError, match=f"Did you mean '{first}'"):
        read_run(first.replace("run", "runn"), tmp_path)
    with pytest.raises(UserError, match="There are none there"):
        read_run("x", tmp_path / "nowhere")
    (tmp_path / first / "summary.json").unlink()
    with pytest.raises(UserError, match="never came to its report"):
        read_run(first, tmp_path)


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["seeds", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_the_table_shows_every_seed_and_both_noises(monkeypatch, capsys, tmp_path):
    names = [make(tmp_path, seed, seed / 10) for seed in (1, 2, 3)]
    written = tmp_path / "seeds.json"
    folders = [names[0], str(tmp_path / names[1]), names[2]]
    code, shown, _ = run_main(monkeypatch, capsys, *folders, "--root", str(tmp_path), "--json", str(written))
    assert code == 0
    [line] = [line.split() for line in shown.splitlines() if line.startswith(" true")]
    assert line == ["true", "+10.0", "+20.0", "+30.0", "+20.0", "10.0", "5.1", "[+10.0,", "+30.0]"]
    for words in ("seed 2", "SD of seeds", "SE of questions", "[+10.0,+30.0]", "These are two different noises."):
        assert words in shown
    assert "mc1" not in shown, "it has no number under any seed"
    assert json.loads(written.read_text()) == between(runs(tmp_path, *names))


def test_single_seeds_are_left_out_where_they_do_not_fit(tmp_path):
    result = between(runs(tmp_path, *(make(tmp_path, seed, seed / 10) for seed in (1, 2, 3))))
    own = ["mean", "SD of seeds", "SE of questions", "range"]
    for width, seeds in ((200, ["seed 1", "seed 2", "seed 3"]), (90, [])):
        [table] = tables(result, width)
        assert [column.header for column in table.columns] == ["metric", *seeds, *own]
        assert ("widen the terminal" in str(table.caption)) == (not seeds)


def test_mistakes_end_in_one_sentence(monkeypatch, capsys, tmp_path):
    names = [make(tmp_path, seed, 0.1) for seed in (1, 2)]
    for arguments, words in (
        ([names[0]], "at least two runs"),
        ([names[0], "other"], "other is not a run under"),
        ([*names, "--json", str(tmp_path / "no" / "f.json")], "cannot be written"),
    ):
        code, shown, error = run_main(monkeypatch, capsys, *arguments, "--root", str(tmp_path))
        assert (code, shown) == (2, "")
        assert error.startswith("truthsteer: ")
        assert words in error


def test_help_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "truthsteer.seeds", "--help"], capture_output=True, text=True, cwd=REPO, timeout=60
    )
    assert done.returncode == 0
    assert "differ in their seed alone" in done.stdout
