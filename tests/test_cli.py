"""What a user types, and the one sentence that comes back when it is wrong."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from conftest import REPO, run_cli

SMALL = ("steering.layers=[3]", "steering.coefficients=[0.4]", "steering.controls.random=1", "data.limit=60")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("steering.max_lenght=3", "Did you mean 'steering.max_length'?"),
        ("+foo=1", "'foo' is not a key"),
        ("+steering.foo=1", "'steering.foo' is not a key"),
        ("model=gema3_4b", "Did you mean 'gemma3_4b'?"),
        ("judge=[referense]", "Did you mean 'reference'?"),
        ("dtype=fp17", "Its options are: bf16, fp16, fp16_pure, fp32"),
        ("steering.max_length=abc", "'abc' of type 'str' could not be converted to Integer"),
        ("steering.max_length=-5", "Type steering.max_length=8 or more"),
        ("steering.layers=[9]", "The model has 5 layers: type 0 to 4"),
        ("model.layer=9", "model.layer=9 is not a layer. The model has 5 layers: type 0 to 4"),
        ("dtype.attention=flash_attention_2", "Type dtype=bf16 with it"),
        ("steering.coefficients=[0]", "0 is the baseline"),
        ("steering.coefficients=[-1]", "no positive value"),
        ("model=local", "Type model.path=FOLDER"),
        ("model.path=/nowhere/at/all", "is not a folder"),
        ("data=truthfulqa_csv", "Type data.path=FILE.csv"),
        ("+method.mean_diff.redout=x", "Did you mean 'readout'?"),
        ("model.revision=1e5", "read as a number"),
        ("run_id=../x", "no path separators"),
        ("run_id=a/b", "no path separators"),
        ("model.name=../evil", "no path separators"),
        ("stages=[extrat]", "expected one of [prefetch, doctor, extract, steer"),
        ("nonsense", "Type KEY=VALUE"),
        ("experiment=eval_only", "Type run=RUN"),
    ],
)
def test_mistakes_fail_at_once_with_one_sentence(argument, words, tmp_path):
    done = run_cli(argument, "dry_run=true", root=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("truthsteer: ")
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_plan_of_a_large_run_and_writes_no_run(tmp_path):
    done = run_cli("model=gemma3_27b", "dtype=fp16", "steering.max_length=384", "dry_run=true", root=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "google/gemma-3-27b-it@newest",
        "float32 residual stream",
        "at most 384 tokens",
        "weights 50.3",
        "3 GPUs",
        "extract -> steer -> choose -> generate -> gauge -> judge -> report",
        "baseline",
        "mean_diff chosen",
        "mean_diff sign_flip",
        "mean_diff random_5",
        "mean_diff shuffled_1",
        "mean_diff +0.4",
    ):
        assert words in done.stdout
    assert not list(tmp_path.glob("*/run.json"))


def test_dry_run_has_exactly_the_conditions_of_the_run(tmp_path):
    done = run_cli(*SMALL, "stages=[extract,steer]", root=tmp_path)
    assert done.returncode == 0, done.stderr
    (bank,) = tmp_path.glob(".store/bank/*/bank.json")
    names = [condition["name"] for condition in json.loads(bank.read_text())["conditions"]]
    planned = run_cli(*SMALL, "dry_run=true", root=tmp_path).stdout
    listed = [line.split("│")[1].strip() for line in planned.splitlines() if line.startswith("│")]
    unsteered = ["prompt truthful", "few-shot", "always abstain", "shortest answer", "wording alone"]
    certain = [name for name in listed if "(if" not in name]
    depends = [name for name in names if "style_" in name or "without_" in name]
    assert certain == ["baseline", *unsteered, *(name for name in names[1:] if name not in depends)]
    possible = [name.partition(" (if")[0].removesuffix("...") for name in listed if "(if" in name]
    assert depends
    assert all(name.startswith(tuple(possible)) for name in depends)


def test_without_hub_or_cache_extraction_says_so_in_one_sentence(tmp_path):
    done = run_cli(
        "model=gemma3_27b",
        "dtype=fp16",
        "data=organism",
        "stages=[extract]",
        root=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("truthsteer: google/gemma-3-27b-it (model.id) is not in the local hub cache")
    assert "stages=[prefetch]" in last


def test_stages_that_lack_their_input_say_what_to_add(tmp_path):
    done = run_cli(*SMALL, "stages=[judge]", root=tmp_path)
    assert done.returncode == 2
    assert "Add extract to stages" in done.stderr


def test_cfg_job_answers_quickly():
    """At most 0.7 s on an idle machine; the best of five, with room for a busy one."""
    best = 99.0
    for _ in range(5):
        start = time.perf_counter()
        done = run_cli("--cfg", "job", root=REPO / "multirun")
        best = min(best, time.perf_counter() - start)
        assert "max_length: 512" in done.stdout
    assert best < 1.5


def test_help_shows_commands_and_knobs():
    text = run_cli("--help", root=REPO / "multirun").stdout
    for words in ("python -m truthsteer", "steering.max_length", "judge", "gemma3_27b"):
        assert words in text


@pytest.mark.slow
def test_the_same_config_is_the_same_run_and_run_ids_are_never_overwritten(tmp_path):
    done = run_cli(*SMALL, "stages=[extract]", root=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in tmp_path.glob("*/run.json"))
    assert run_cli("-m", *SMALL, "stages=[extract]", root=tmp_path).returncode == 0
    assert run_cli(*SMALL, "stages=[extract]", "verbose=true", root=tmp_path).returncode == 0
    assert [path.parent for path in tmp_path.glob("*/run.json")] == [folder]
    record = json.loads((folder / "run.json").read_text())
    assert record["attempts"] == 3
    assert record["state"] == "finished"
    assert record["stages"]["extract"]["state"] == "done"
    assert record["code"]["versions"]["torch"]

    assert run_cli(*SMALL, "stages=[extract]", "run_id=mine", root=tmp_path).returncode == 0
    assert run_cli(*SMALL, "stages=[extract]", "run_id=mine", root=tmp_path).returncode == 0
    before = (tmp_path / "mine" / "run.json").read_bytes()
    done = run_cli(*SMALL, "stages=[extract]", "run_id=mine", "seed=7", root=tmp_path)
    assert done.returncode == 2
    assert "seed differ" in done.stderr
    assert (tmp_path / "mine" / "run.json").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    done = run_cli(*SMALL, "stages=[extract]", "run_id=notes", root=tmp_path)
    assert "is not a run" in done.stderr


@pytest.mark.slow
def test_a_failing_run_records_why(tmp_path):
    done = run_cli(*SMALL, "steering.max_length=8", "stages=[extract]", "run_id=short", root=tmp_path)
    assert done.returncode == 2
    assert "steering.max_length=" in done.stderr
    record = json.loads((tmp_path / "short" / "run.json").read_text())
    assert record["state"] == "failed"
    assert "longer than steering.max_length=8" in record["error"]
    assert record["stages"]["extract"]["state"] == "failed"
    assert not list(tmp_path.glob(".hydra/*"))
    shutil.rmtree(tmp_path / "short")
