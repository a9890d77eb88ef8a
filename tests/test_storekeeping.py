"""`truthsteer store`: what is needed stays, what is damaged is found, what is abandoned goes."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from truthsteer import storekeeping
from truthsteer.errors import UserError
from truthsteer.files import write_json
from truthsteer.records import Verdict
from truthsteer.store import Key, Store, damage, write_rows

DAY = 24 * 3600
NEEDED, UNUSED = Key.of("verdicts", 1, x=1), Key.of("verdicts", 1, x=2)
CONFIG = {"model": {"name": "m"}, "dtype": {}, "judge": {}}


def rows(folder: Path) -> None:
    write_rows(folder, [Verdict("q1", "ok", {"true": 1.0}), Verdict("q2", "ok", {"true": 0.0})])


def vectors(folder: Path) -> None:
    save_file({"v": np.arange(6, dtype=np.float32)}, folder / "vectors.safetensors")
    write_json(folder / "bank.json", {"v": [1, 2.5]})


@pytest.fixture
def root(tmp_path):
    """A store with one artifact that a run uses and one that none does, both old."""
    store = Store(tmp_path)
    for key in (NEEDED, UNUSED):
        store.make(key, rows)
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "run.json", {"config": CONFIG, "artifacts": [str(NEEDED)], "state": "finished"})
    age(tmp_path, 2 * DAY)
    return tmp_path


def age(root: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in [*root.rglob("*"), root]:
        os.utime(path, (then, then))


def there(root: Path, key: Key) -> bool:
    return (root / ".store" / key.kind / key.digest).exists()


def test_gc_removes_what_no_run_uses_and_nothing_else(root, capsys):
    storekeeping.main(["gc", f"paths.root={root}", "--dry-run"])
    assert there(root, UNUSED)
    assert f"would remove {root / '.store' / 'verdicts' / UNUSED.digest}" in capsys.readouterr().out
    storekeeping.main(["gc", f"paths.root={root}"])
    assert there(root, NEEDED)
    assert not there(root, UNUSED)
    assert "1 things were removed" in capsys.readouterr().out


def test_gc_leaves_what_is_young_since_a_process_may_be_at_it(root):
    store = Store(root)
    young = Key.of("verdicts", 1, x=3)
    store.make(young, rows)
    assert store.find(UNUSED), "and what was wanted again a short while ago"
    (root / ".store" / ".part" / "verdicts-abc-123").mkdir()
    (root / ".store" / ".journal" / "verdicts-abc").mkdir(parents=True)
    (root / ".store" / ".journal" / "verdicts-abc" / "units-1.jsonl").touch()
    storekeeping.main(["gc", f"paths.root={root}"])
    assert there(root, young)
    assert there(root, UNUSED)
    assert list((root / ".store" / ".part").iterdir())
    assert list((root / ".store" / ".journal").iterdir())
    storekeeping.main(["gc", f"paths.root={root}", "hours=0"])
    assert not there(root, young)
    assert there(root, NEEDED)


def test_gc_removes_what_killed_processes_left(root, capsys):
    left = [
        root / ".store" / ".part" / "bank-abc-123" / "vectors.safetensors",
        root / ".store" / ".journal" / "choices-abc" / "plan.json",
        root / ".store" / ".damaged" / "choices-abc-1" / "meta.json",
        root / ".store" / "overflow" / "abc.json",
        root / "run" / ".run.json.1234abcd",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    age(root, 2 * DAY)
    storekeeping.main(["gc", f"paths.root={root}"])
    assert not any(path.exists() for path in left)
    assert (root / "run" / "run.json").exists()
    assert "6 things were removed" in capsys.readouterr().out


def unfinished(root: Path, days: float, state: str = "interrupted") -> None:
    """A run that began so many days ago, and does not say what it has used."""
    started = datetime.fromtimestamp(time.time() - days * DAY, UTC).isoformat(timespec="seconds")
    (root / "pending").mkdir()
    write_json(root / "pending" / "run.json", {"config": CONFIG, "artifacts": [], "state": state, "started": started})


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_gc_leaves_the_work_of_runs_that_are_not_finished(root, state, capsys):
    """However long ago a process was at it: its job may wait in a queue."""
    journal = root / ".store" / ".journal" / "choices-abc" / "plan.json"
    journal.parent.mkdir(parents=True)
    journal.write_text("{}")
    age(root, 2 * DAY)
    then = time.time() - 10 * DAY
    for path in (root / ".store" / "verdicts" / UNUSED.digest).rglob("*"):
        os.utime(path, (then, then))
    os.utime(root / ".store" / "verdicts" / UNUSED.digest, (then, then))
    later = Key.of("verdicts", 1, x=3)
    Store(root).make(later, rows)
    age(root / ".store" / "verdicts" / later.digest, 2 * DAY)
    unfinished(root, 3, state)
    storekeeping.main(["gc", f"paths.root={root}"])
    assert there(root, later)
    assert journal.exists()
    assert not there(root, UNUSED), "long before that run began"
    assert (
        f"since pending began was looked at: it is not finished. Type its command again, or remove {root / 'pending'}"
        in (capsys.readouterr().out)
    )
    shutil.rmtree(root / "pending")
    storekeeping.main(["gc", f"paths.root={root}"])
    assert not there(root, later)
    assert not journal.exists()


def test_gc_removes_nothing_where_an_unfinished_run_does_not_say_when_it_began(root):
    (root / "pending").mkdir()
    write_json(root / "pending" / "run.json", {"config": CONFIG, "artifacts": [], "state": "running"})
    storekeeping.main(["gc", f"paths.root={root}", "hours=0"])
    assert there(root, UNUSED)


@pytest.mark.parametrize("moment", ["_changed", "_bytes", "_remove"])
def test_gc_goes_on_where_what_it_looks_at_vanishes(root, moment, monkeypatch):
    """A process that ends its work takes its journal away, at any moment."""
    journal = root / ".store" / ".journal" / "choices-abc"
    journal.mkdir(parents=True)
    (journal / "plan.json").touch()
    age(root, 2 * DAY)
    real = getattr(storekeeping, moment)

    def late(path):
        if path == journal:
            shutil.rmtree(journal)
        return real(path)

    monkeypatch.setattr(storekeeping, moment, late)
    storekeeping.main(["gc", f"paths.root={root}"])
    assert not there(root, UNUSED)


def test_list_goes_on_where_a_file_vanishes(root, monkeypatch, capsys):
    real = Path.is_file

    def late(path):
        found = real(path)
        if path.name == "rows.jsonl":
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", late)
    storekeeping.main(["list", f"paths.root={root}"])
    assert "2 artifacts" in capsys.readouterr().out


def test_what_a_killed_gc_left_is_no_artifact_and_goes_next_time(root, capsys):
    left = root / ".store" / "verdicts" / f".gone-{UNUSED.digest}"
    (root / ".store" / "verdicts" / UNUSED.digest).rename(left)
    (left / "rows.jsonl").unlink()
    age(root, 2 * DAY)
    storekeeping.main(["verify", f"paths.root={root}"])
    assert "1 artifacts are as they were published" in capsys.readouterr().out
    storekeeping.main(["gc", f"paths.root={root}"])
    assert not left.exists()


def test_an_artifact_that_vanishes_while_it_is_read_is_made_again_and_nothing_was_damaged(root, caplog, monkeypatch):
    folder = root / ".store" / "verdicts" / UNUSED.digest

    def late(path):
        shutil.rmtree(folder)
        return damage(path)

    monkeypatch.setattr("truthsteer.store.damage", late)
    assert Store(root).find(UNUSED) is None
    assert damage(folder) == "its meta.json is gone"
    assert "damaged" not in caplog.text
    assert not (root / ".store" / ".damaged").exists()


def test_an_artifact_is_young_before_it_is_hashed(root, monkeypatch):
    """Hashing a large one takes long enough for gc to come by."""
    seen = []

    def look(path):
        seen.append(storekeeping._changed(path) > time.time() - DAY)

    monkeypatch.setattr("truthsteer.store.damage", look)
    Store(root).find(UNUSED)
    assert seen == [True]


def test_a_clock_that_ran_ahead_removes_nothing(root):
    age(root, -2 * DAY)
    storekeeping.main(["gc", f"paths.root={root}", "hours=0"])
    assert there(root, UNUSED)


@pytest.mark.parametrize(
    ("record", "words"),
    [({"config": CONFIG}, "older version"), ([str(NEEDED)], "is damaged")],
    ids=["says_nothing", "damaged"],
)
def test_gc_removes_nothing_where_a_run_does_not_say_what_it_uses(root, record, words):
    (root / "other").mkdir()
    write_json(root / "other" / "run.json", record)
    with pytest.raises(UserError, match=words):
        storekeeping.main(["gc", f"paths.root={root}"])
    assert there(root, UNUSED)


def test_list_says_which_runs_use_how_much(root, capsys):
    storekeeping.main(["list", f"paths.root={root}"])
    shown = capsys.readouterr().out
    assert "2 artifacts" in shown
    (kind,) = [line.split() for line in shown.splitlines() if "verdicts" in line]
    assert kind[:2] == ["verdicts", "2"]
    size = storekeeping.size([kept for kept in storekeeping.artifacts(root) if kept.key == str(NEEDED)])
    (run,) = [line.split() for line in shown.splitlines() if line.split()[:1] == ["run"] and "size" not in line]
    assert run == ["run", "1", *size.split()]


def test_list_shows_a_run_of_an_older_version_too(root, capsys):
    (root / "other").mkdir()
    write_json(root / "other" / "run.json", {"config": CONFIG})
    storekeeping.main(["list", f"paths.root={root}"])
    assert "of an older version, which did not record what they used: other" in capsys.readouterr().out


FLIPS = [(name, place) for name in ("meta.json", "rows.jsonl") for place in (0, 7, 40, -2)]
FLIPS += [(name, place) for name in ("vectors.safetensors", "bank.json") for place in (0, 9, -1)]


@pytest.mark.parametrize(("name", "place"), FLIPS)
def test_a_flipped_byte_anywhere_is_found_and_made_again(tmp_path, name, place):
    """By verify, and by whoever reads it; what a run computes from is never the damaged one."""
    write = rows if name in ("meta.json", "rows.jsonl") else vectors
    key = Key.of("thing", 1)
    path = Store(tmp_path).make(key, write).path / name
    content = path.read_bytes()
    for bit in (1, 4, 128):
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        assert Store(tmp_path).find(key) is None, (bit, "it is set aside")
        assert Store(tmp_path).make(key, write).path == path.parent
        assert path.read_bytes() == content
    assert len(list((tmp_path / ".store" / ".damaged").iterdir())) == 3


@pytest.mark.parametrize("how", ["torn", "gone", "changed_fact", "another_artifact"])
def test_other_damage_is_found_too(root, how, capsys):
    folder = root / ".store" / "verdicts" / NEEDED.digest
    if how == "torn":
        (folder / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes()[:-5])
    elif how == "gone":
        (folder / "rows.jsonl").unlink()
    elif how == "changed_fact":
        meta = json.loads((folder / "meta.json").read_text())
        write_json(folder / "meta.json", meta | {"facts": {"device": "cuda"}})
    else:
        shutil.rmtree(folder)
        shutil.copytree(root / ".store" / "verdicts" / UNUSED.digest, folder)
    with pytest.raises(UserError, match="1 of 2 artifacts were damaged"):
        storekeeping.main(["verify", f"paths.root={root}"])
    assert f"damaged: {NEEDED}" in capsys.readouterr().err
    assert not there(root, NEEDED)
    storekeeping.main(["verify", f"paths.root={root}"])


def test_a_damaged_artifact_that_cannot_be_moved_is_named(root, monkeypatch):
    (root / ".store" / "verdicts" / NEEDED.digest / "rows.jsonl").write_text("{}\n")

    def read_only(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", read_only)
    with pytest.raises(
        UserError, match=f"{NEEDED.digest} is damaged .*rows.jsonl was changed.*truthsteer store verify"
    ):
        Store(root).find(NEEDED)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verfy"], "Did you mean 'verify'"),
        (["gc", "dry_run=maybe"], "dry_run=maybe"),
        (["gc", "hours=-1"], "hours=-1"),
        (["gc", "hours=nan"], "hours=nan"),
        (["verify", "dry_run=true"], "dry_run=true is not something"),
        (["list", "paths.root=nowhere"], "paths.root=nowhere has no store"),
    ],
)
def test_mistakes_say_what_to_type(root, arguments, words, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=words):
        storekeeping.main([*arguments, *([] if "paths.root" in str(arguments) else [f"paths.root={root}"])])
