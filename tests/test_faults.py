"""What can go wrong beside the program: kills, signals, full and read-only disks, crashes, two processes on one run.

Each time either the same command goes on to the same bytes, or one sentence says what to do.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import chaos
import pytest
from conftest import REPO
from omegaconf import OmegaConf

from truthsteer.errors import UserError
from truthsteer.organism import QUESTIONS

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TRUTHSTEER_KILLS", "3"))
"""How often the storm kills; docs/reliability.md says how often it was done."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The small run, never disturbed; made in a process that is forked, as all others are here."""
    chaos.preload()
    root = tmp_path_factory.mktemp("calm") / "root"
    assert finish(root) == 0, said(root)
    return root


@pytest.fixture(scope="module")
def expected(calm):
    return chaos.outcome(calm)


def finish(root: Path, *more: str, **named) -> int | None:
    return chaos.ended(chaos.start(root, *more, **named), 120)


def said(root: Path) -> str:
    return root.with_suffix(".log").read_text(encoding="utf-8")


def told(root: Path, words: str) -> None:
    """The command said one sentence, and no traceback."""
    assert words in said(root)
    assert "Traceback" not in said(root)
    assert "Logging error" not in said(root)


def wait_for(root: Path, pattern: str, process: int) -> None:
    for _ in range(6000):
        if any(root.glob(pattern)):
            return
        assert os.waitpid(process, os.WNOHANG) == (0, 0), said(root)
        time.sleep(0.01)
    pytest.fail(f"no {pattern}")


def state(root: Path) -> str:
    (record,) = root.glob("*/run.json")
    return json.loads(record.read_text())["state"]


@pytest.mark.parametrize(("shards", "kills"), [(1, KILLS), (4, max(1, KILLS // 4))])
def test_killed_at_random_moments_the_result_is_the_same(tmp_path, calm, shards, kills):
    killed, finished, differing = chaos.storm(kills, 7 + shards, shards, 60, tmp_path)
    assert killed.total() > 0
    assert (finished > 0, differing) == (True, 0)


def test_shards_on_this_machine_make_what_one_process_makes(tmp_path, expected):
    """One of them is killed; the first says so, and the result is the same."""
    root = tmp_path / "root"

    def before():
        from truthsteer.shards import _Shard

        begin = _Shard.__init__

        def noted(shard, *arguments):
            begin(shard, *arguments)
            (tmp_path / f"process-{shard.number}").write_text(str(shard._process.pid))

        _Shard.__init__ = noted

    process = chaos.start(root, "shards=4", before=before)
    wait_for(root, "*/shard-2.log", process)
    os.kill(int((tmp_path / "process-2").read_text()), signal.SIGKILL)
    assert chaos.ended(process, 120) == 0, said(root)
    assert chaos.outcome(root) == expected
    assert "shard 2 ended with -9" in said(root)
    states = [json.loads(path.read_text())["state"] for path in sorted(root.glob("*/shard-*.json"))]
    assert len(states) == 3


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGTERM, 143, "Terminated. The same command goes on"), (signal.SIGINT, 130, "Interrupted. The same")],
)
def test_a_signal_ends_a_run_with_a_sentence_and_its_own_code(tmp_path, expected, number, code, words):
    """But not the one by which Slurm announces a time limit."""
    root = tmp_path / "root"
    process = chaos.start(root)
    wait_for(root, "*/run.json", process)
    os.kill(process, signal.SIGUSR2)
    wait_for(root, ".store/.journal/choices-*/units-*", process)
    os.kill(process, number)
    assert chaos.ended(process, 60) == code
    told(root, words)
    assert state(root) == "interrupted"
    assert finish(root) == 0
    assert chaos.outcome(root) == expected


def test_a_handler_that_somebody_set_for_that_signal_stays(tmp_path):
    seen = tmp_path / "seen"

    def before():
        signal.signal(signal.SIGUSR2, lambda *_: seen.touch())

    root = tmp_path / "root"
    process = chaos.start(root, before=before)
    wait_for(root, "*/run.json", process)
    os.kill(process, signal.SIGUSR2)
    wait_for(tmp_path, "seen", process)
    os.kill(process, signal.SIGTERM)
    assert chaos.ended(process, 60) == 143


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_a_write_that_the_quota_refuses_is_one_sentence(tmp_path, expected, limit):
    """In run.json, or in the arrays; then the same command goes on."""
    root = tmp_path / "root"
    (tmp_path / "root.log").touch()

    def before():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    assert finish(root, before=before) == 2, said(root)
    told(root, f"{root} is on a disk that is full, or over its quota (File too large)")
    assert finish(root) == 0
    assert chaos.outcome(root) == expected


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system of its own, where this is allowed."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


def test_a_full_disk_is_one_sentence_and_then_the_run_goes_on(mounted, tmp_path, expected):
    place = mounted("size=600k")
    root = place / "root"
    process = chaos.start(tmp_path / "linked", f"paths.root={root}")  # the log stands elsewhere
    assert chaos.ended(process, 120) == 2, said(tmp_path / "linked")
    told(tmp_path / "linked", f"{root} is on a disk that is full, or over its quota (No space left on device)")
    assert "truthsteer store gc" in said(tmp_path / "linked")
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    assert chaos.ended(chaos.start(tmp_path / "linked", f"paths.root={root}"), 120) == 0
    assert chaos.outcome(root) == expected


def test_a_folder_that_cannot_be_written_is_one_sentence(mounted, tmp_path, calm):
    """Nothing yet, and with a run that is there already."""
    place = mounted("size=64m")
    shutil.copytree(calm, place / "root")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for root in (place / "root", place / "none"):
        log = tmp_path / f"log-{root.name}"
        assert chaos.ended(chaos.start(log, f"paths.root={root}"), 60) == 2, said(log)
        told(log, f"{root} cannot be written to (Read-only file system")


def test_a_judge_that_crashes_half_way_loses_only_its_unit(tmp_path, expected):
    root, count = tmp_path / "root", []

    def before():
        from truthsteer.judges import reference

        judge = reference.Reference.judge
        reference.Reference.rows_at_once = 16  # nobody continues such a journal

        def crashing(*arguments):
            count.append(1)
            if len(count) == 3:
                raise RuntimeError("the judge has crashed")
            return judge(*arguments)

        reference.Reference.judge = crashing

    assert finish(root, before=before) == 1
    assert "the judge has crashed" in said(root)
    assert state(root) == "failed"
    assert list(root.glob(".store/.journal/verdicts-*/units-*"))
    assert finish(root) == 0
    assert chaos.outcome(root) == expected, "and the journal, of units of another size, is gone"


def test_damaged_artifacts_of_every_kind_are_made_again(tmp_path):
    """A byte in the middle of each file of one of each; the report is asked for anew."""
    root, everything = tmp_path / "root", files_for_every_kind(tmp_path)
    chaos.preload()
    assert finish(root, *everything) == 0, said(root)
    expected = chaos.outcome(root)
    kinds = sorted(path.name for path in root.glob(".store/[a-z]*"))
    assert kinds == sorted(kinds_in_the_package())
    for kind in kinds:
        largest = max(root.glob(f".store/{kind}/*/*"), key=lambda path: path.stat().st_size)  # a few have no rows
        for path in largest.parent.iterdir():
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    for path in root.glob("*/.report"):
        path.unlink()
    assert finish(root, *everything) == 0, said(root)
    for kind in kinds:
        assert f"{kind}/" in said(root)
    assert said(root).count("was damaged") == len(kinds)
    files, artifacts = chaos.outcome(root)
    assert artifacts == expected[1]
    # A condition that is computed alone stands in other batches than before: float32 may differ in its last digits.
    for ours, theirs in zip(cells(files["answers.csv"]), cells(expected[0]["answers.csv"]), strict=True):
        assert ours == (pytest.approx(theirs, abs=2e-5) if isinstance(theirs, float) else theirs)


def files_for_every_kind(folder: Path) -> list[str]:
    """Questions that name best incorrect answers, so that there is a choice between letters; and capability questions."""
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "Best Incorrect Answer"])
        writer.writeheader()
        writer.writerows(
            row | {"Best Incorrect Answer": row["Incorrect Answers"].split(";")[0].strip()} for row in rows
        )
    lines = ["question,A,B,C,D,answer", "What is a tool?,hammer,pear,rain,song,A", "What falls?,hope,rain,wool,salt,B"]
    (folder / "capability.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"data.path={folder / 'questions.csv'}", f"gauge.capability={folder / 'capability.csv'}"]


def kinds_in_the_package() -> set[str]:
    """What the modules call their artifacts."""
    found = set()
    for path in (REPO / "truthsteer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Key.of":
                found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found


def cells(content: bytes) -> list[str | float]:
    found: list[str | float] = []
    for cell in (cell for row in csv.reader(content.decode().splitlines()) for cell in row):
        try:
            found.append(float(cell))
        except ValueError:
            found.append(cell)
    return found


def test_a_damaged_record_of_a_run_is_named(calm, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(calm, root)
    (record,) = root.glob("*/run.json")
    record.write_bytes(record.read_bytes()[:100])
    assert finish(root) == 2
    told(root, f"{record} is damaged")
    shutil.rmtree(record.parent)
    assert finish(root) == 0
    assert "loading" not in said(root), "all of it was in the store"


def test_two_processes_that_begin_two_runs_under_one_id_are_told_apart(tmp_path):
    """Both have looked, and seen nothing; then both begin."""
    from hydra import compose, initialize_config_dir

    from truthsteer.cli import to_config
    from truthsteer.config import Config
    from truthsteer.runs import RunRecord, folder_for

    configs = []
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(name="schema", node=Config)
        for seed in (1, 2):
            cfg = compose("config", [f"seed={seed}", "run_id=one", f"paths.root={tmp_path}"])
            configs.append(to_config(OmegaConf.merge(OmegaConf.structured(Config), cfg)))
    folders = [folder_for(config) for config in configs]
    first = RunRecord(folders[0], configs[0])
    with pytest.raises(UserError, match="run_id=one is a run with another config: seed differ"):
        RunRecord(folders[1], configs[1])
    assert json.loads((tmp_path / "one" / "run.json").read_text())["config"]["seed"] == 1

    later = RunRecord(folders[0], configs[0])  # the same run a second time: it writes from now on
    first.data["error"] = "of the first"
    first.write()
    later.data["error"] = "of the later"
    later.write()
    assert read(tmp_path)["error"] == "of the later"
    first.finish("failed", "of the first")
    assert read(tmp_path)["state"] == "running"
    first.finish("finished")
    later.write()
    assert (read(tmp_path)["state"], read(tmp_path)["attempts"]) == ("finished", 1)


def read(root: Path) -> dict:
    return json.loads((root / "one" / "run.json").read_text())


def test_weights_that_are_missing_are_one_sentence(tmp_path):
    from truthsteer.organism import WEIGHTS

    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    root = tmp_path / "root"
    model = ("model=local", f"model.path={folder}", "dtype=fp32", "data=organism", "judge=reference", "gauge=organism")
    assert finish(root, *model) == 2, said(root)
    told(root, f"{folder} cannot be loaded")
