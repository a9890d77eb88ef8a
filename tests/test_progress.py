"""How far a run has come, told to those who ask from elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from truthsteer import progress, sweeps
from truthsteer.files import read_json, write_json


def test_the_file_says_how_far_the_work_is(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    seen = []
    step = progress.on_file(seen.append, tmp_path, "generate: answers", 10)
    step(3)
    step(4)
    assert seen == [3, 4]
    assert read_json(tmp_path / progress.FILE) == {"what": "generate: answers", "done": 7, "of": 10}


def test_the_file_is_written_now_and_then(tmp_path):
    step = progress.on_file(lambda done: None, tmp_path, "judge: llm", 1000)
    for _ in range(1000):
        step(1)
    assert not (tmp_path / progress.FILE).exists()


def test_a_full_disk_does_not_stop_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    progress.on_file(lambda done: None, tmp_path / "not there", "judge: llm", 1)(1)


@pytest.mark.parametrize(("shard", "letter"), [(0, "a"), (2, "c")])
def test_status_tells_of_each_shard_what_it_does_itself(shard, letter, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    for number, (name, log, state, part) in {
        0: ("run.json", "log.txt", "done", "a"),
        2: ("shard-2.json", "shard-2.log", "running", "c"),
    }.items():
        write_json(tmp_path / name, {"stages": {"extract": {"state": state}}})
        (tmp_path / log).write_text(f"{part}\n")
        progress.on_file(lambda done: None, tmp_path, "extract: pairs", 9, number)(number + 1)
    config = {"stages": ["extract", "steer"], "shards": 3, "shard": shard}
    job = SimpleNamespace(run=str(tmp_path), config=config, errors="none")
    assert sweeps.stage(job) == {0: "1 of 2 done", 2: "extract, 0 of 2 done; extract: pairs 3/9"}[shard]
    assert sweeps.last_line(job) == letter


@pytest.mark.parametrize("text", ["", "{torn", "[]", "{}"])
def test_a_damaged_record_does_not_stop_status(text, tmp_path):
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    job = SimpleNamespace(run=str(tmp_path), config={"stages": ["extract"]})
    assert sweeps.stage(job) == ("0 of 1 done" if text == "{}" else "")


def test_status_tells_steps_of_the_stage_that_runs(tmp_path):
    job = SimpleNamespace(run=str(tmp_path), config={"stages": ["extract", "choose", "generate"]})
    assert sweeps.stage(job) == ""
    stages = {"extract": {"state": "done"}, "choose": {"state": "running"}}
    write_json(tmp_path / "run.json", {"stages": stages})
    write_json(tmp_path / progress.FILE, {"what": "extract: questions", "done": 9, "of": 9})
    assert sweeps.stage(job) == "choose, 1 of 3 done", "not those of the stage before"
    write_json(tmp_path / progress.FILE, {"what": "choose: answers", "done": 40, "of": 120})
    assert sweeps.stage(job) == "choose, 1 of 3 done; choose: answers 40/120"
    (tmp_path / progress.FILE).write_text("{torn", encoding="utf-8")
    assert sweeps.stage(job) == "choose, 1 of 3 done"
