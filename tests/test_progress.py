"""How far a run has come, told to those who ask from elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

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
