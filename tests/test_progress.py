"""How far a run has come, told to those who ask from elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_questions

from truthsteer import decoding, neutral, progress, scoring, sweeps
from truthsteer.config import GenerationConfig
from truthsteer.files import read_json, write_json
from truthsteer.hooks import Injection
from truthsteer.prompts import PLAIN, Prompts


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


def work(lm, what: str, skip, advance):
    """Units of each kind of work, and how many steps they are in all."""
    questions = make_questions()
    texts, answers = [item.text for item in questions], [[item.best, *item.incorrect] for item in questions]
    prompts = Prompts(PLAIN, lm.tokenizer, chat=False)
    conditions = [None, Injection(1, torch.ones(lm.hidden_size), 0.5), Injection(2, torch.ones(lm.hidden_size), 0.5)]
    if what == "score":
        branches = prompts.branches(texts, answers)
        return scoring.score(lm, branches, conditions, None, 128, skip, advance), 3 * sum(map(len, answers))
    if what == "generate":
        contexts = prompts.contexts(texts)
        asked = [decoding.Request(context, index, 0) for index in range(3) for context in contexts]
        config = GenerationConfig(max_new_tokens=2)
        units = decoding.decode(
            lm, asked, conditions, config=config, stop=(), batch_tokens=64, skip=skip, advance=advance
        )
        return units, len(asked)
    passages = [text + " " + item for text, own in zip(texts, answers, strict=True) for item in own]
    return neutral.measure(lm, passages, conditions, None, 32, 128, skip, advance), 3 * len(passages)


@pytest.mark.parametrize("what", ["score", "generate", "neutral"])
def test_units_that_were_done_before_are_steps_that_are_done(gemma3, what):
    """A run that goes on after nine tenths of its work begins at nine tenths."""
    steps, asked = [], []

    def skip(unit: int) -> bool:
        asked.append(unit)
        return unit % 3 != 0

    units, total = work(gemma3, what, skip, steps.append)
    done = [number for number, _ in units]
    assert len(asked) > 3
    assert done == asked[::3]
    assert sum(steps) == total
    assert len(steps) == len(asked)


def test_a_run_that_begins_again_does_not_show_its_earlier_progress(tmp_path, monkeypatch):
    from truthsteer import runs

    monkeypatch.setattr(runs, "to_plain", lambda config: {})
    monkeypatch.setattr(runs, "_check_same", lambda folder, what: None)
    monkeypatch.setattr(runs, "identity", lambda config: {})
    for shard, kept in ((1, True), (0, False), (None, False)):
        write_json(tmp_path / progress.FILE, {"what": "generate: answers", "done": 900, "of": 964})
        runs.RunRecord(tmp_path, SimpleNamespace(run_id=None, shard=shard))
        assert (tmp_path / progress.FILE).exists() == kept
