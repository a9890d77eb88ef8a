"""Processes that make the same artifacts share the work, and whatever happens to some of them, the rows are right."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from truthsteer import journal as journal_module
from truthsteer.journal import Journal, PublishedError
from truthsteer.store import JournalRow, Key, Store, damage

FORK = multiprocessing.get_context("fork")
KEYS = [Key.of("rows", 1, name=name) for name in "abcd"]
UNITS = 48


@dataclass(frozen=True)
class Number:
    value: int


def compute(root: Path, seconds: float):
    """Four rows a unit, one per key; a line in a file of its own says that a unit was computed."""

    def units(plan, done):
        for unit in range(UNITS):
            if not done(unit):
                time.sleep(seconds)
                with (root / "computed.txt").open("a") as file:
                    file.write(f"{unit}\n")
                yield unit, [JournalRow(name, unit, Number(1000 * place + unit)) for place, name in enumerate(plan)]

    return units


def make(root: Path, seconds: float = 0.005, share: tuple[int, int] = (0, 1)) -> list[bytes]:
    made = Store(root, share).make_rows(KEYS, {}, compute(root, seconds))
    return [(artifact.path / "rows.jsonl").read_bytes() for artifact in made]


def computed(root: Path) -> list[int]:
    return sorted(map(int, (root / "computed.txt").read_text().split()))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return make(tmp_path_factory.mktemp("calm"), 0)


def begin(root: Path, seconds: float, share: tuple[int, int] = (0, 1)) -> multiprocessing.Process:
    process = FORK.Process(target=make, args=(root, seconds, share))
    process.start()
    return process


@pytest.mark.parametrize("seed", [1, 2])
def test_sixteen_processes_killed_at_random_make_what_one_makes(tmp_path, calm, seed):
    draw = random.Random(seed)
    running = [begin(tmp_path, draw.uniform(0.2, 0.5)) for _ in range(16)]
    killed = 0
    for _ in range(40):
        time.sleep(draw.uniform(0, 0.02))
        place = draw.randrange(16)
        if running[place].is_alive():
            os.kill(running[place].pid, signal.SIGKILL)
            killed += 1
        running[place].join()
        running[place] = begin(tmp_path, draw.uniform(0.2, 0.5))
    for process in running:
        process.join(60)
    assert {process.exitcode for process in running} == {0}
    assert killed >= 5  # thirty or so, on a machine that is not stalled
    assert make(tmp_path) == calm
    assert not [path for path in tmp_path.glob(".store/.journal/*") if not path.name.startswith(".")]
    assert [damage(path.parent) for path in tmp_path.glob(".store/rows/*/meta.json")] == [None] * len(KEYS)


def test_processes_without_shards_divide_the_units_among_them(tmp_path, calm):
    """Whoever comes to a unit first does it; a few are done twice at most."""
    for process in [begin(tmp_path, 0.02) for _ in range(4)]:
        process.join(60)
    assert make(tmp_path) == calm
    assert set(computed(tmp_path)) == set(range(UNITS))
    assert len(computed(tmp_path)) <= UNITS + 6


def test_a_shard_does_its_own_share_first_and_then_all_that_is_missing(tmp_path, calm):
    alone = make(tmp_path, 0, (1, 4))
    order = [int(line) for line in (tmp_path / "computed.txt").read_text().split()]
    assert alone == calm
    assert order[: UNITS // 4] == list(range(1, UNITS, 4))
    assert sorted(order) == list(range(UNITS))


def test_a_unit_begun_on_a_node_that_is_gone_is_waited_for_and_then_done(tmp_path, calm, monkeypatch):
    monkeypatch.setattr(journal_module, "PATIENCE", 0.3)
    monkeypatch.setattr(journal_module, "_host", lambda: "elsewhere")
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).make_rows(KEYS, {}, dying(after=5))
    monkeypatch.undo()
    monkeypatch.setattr(journal_module, "PATIENCE", 0.3)
    start = time.monotonic()
    assert make(tmp_path, 0) == calm
    assert 0.3 <= time.monotonic() - start < 5
    assert len(computed(tmp_path)) == UNITS - 5


def dying(after: int):
    """Computes what `compute` does, and dies within a unit."""

    def units(plan, done):
        for unit in range(UNITS):
            if not done(unit):
                yield unit, [JournalRow(name, unit, Number(1000 * place + unit)) for place, name in enumerate(plan)]
            if unit == after - 1:
                assert not done(after)
                raise ZeroDivisionError

    return units


def test_a_unit_begun_by_a_process_that_is_dead_here_is_done_at_once(tmp_path, calm):
    process = FORK.Process(target=lambda: Store(tmp_path).make_rows(KEYS, {}, dying(after=5)))
    process.start()
    process.join()
    start = time.monotonic()
    assert make(tmp_path, 0) == calm
    assert time.monotonic() - start < 5


def test_another_may_publish_and_forget_the_journal_at_any_unit(tmp_path, calm):
    """The slow process neither fails, nor goes on with what is done, nor leaves anything behind."""
    count = 0

    def slow(plan, done):
        nonlocal count
        for unit in range(UNITS):
            if not done(unit):
                count += 1
                if unit == 3:
                    fast = FORK.Process(target=take_over)
                    fast.start()
                    fast.join()
                yield unit, [JournalRow(name, unit, Number(1000 * place + unit)) for place, name in enumerate(plan)]

    def take_over():
        journal_module.PATIENCE = 0.2
        make(tmp_path, 0)

    made = Store(tmp_path).make_rows(KEYS, {}, slow)
    assert [(artifact.path / "rows.jsonl").read_bytes() for artifact in made] == calm
    assert count == 4
    assert not list(tmp_path.glob(".store/.journal/*"))


def test_a_journal_that_somebody_deletes_is_written_again(tmp_path, calm):
    def units(plan, done):
        for unit in range(UNITS):
            if not done(unit):
                if unit == 3:
                    shutil.rmtree(tmp_path / ".store" / ".journal")
                if unit == 6:
                    raise ZeroDivisionError
                yield unit, [JournalRow(name, unit, Number(1000 * place + unit)) for place, name in enumerate(plan)]

    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).make_rows(KEYS, {}, units)
    assert make(tmp_path, 0) == calm
    assert computed(tmp_path)[0] in (3, 4, 6)  # units 0 to 2 were known to the process, and were written again


@pytest.mark.parametrize("flip", range(0, 400, 7))
def test_a_flipped_byte_in_a_journal_is_a_unit_to_do_again_and_never_another_number(tmp_path, calm, flip):
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).make_rows(KEYS, {}, dying(after=3))
    (file,) = tmp_path.glob(".store/.journal/*/units-*.jsonl")
    content = bytearray(file.read_bytes())
    content[flip % len(content)] ^= 1
    file.write_bytes(content)
    assert make(tmp_path, 0) == calm


def test_a_plan_that_is_damaged_begins_anew(tmp_path, calm):
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).make_rows(KEYS, {}, dying(after=3))
    (plan,) = tmp_path.glob(".store/.journal/*/plan.json")
    plan.write_text(plan.read_text()[:20])
    assert make(tmp_path, 0) == calm


@pytest.mark.parametrize("then", [0, 4e9], ids=["long_ago", "in_the_future"])
def test_times_of_files_mean_nothing(tmp_path, calm, then):
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).make_rows(KEYS, {}, dying(after=5))
    for path in (tmp_path / ".store").rglob("*"):
        os.utime(path, (then, then))
    assert make(tmp_path, 0) == calm
    assert computed(tmp_path)[0] == 5


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {"a": np.random.default_rng(seed).normal(size=(3, 2)).astype(np.float32)}


def blocks(path: Path, published: bool = False) -> Journal:
    return Journal(path / "journal", ["x"], {}, lambda plan: published)


def test_arrays_are_read_as_they_were_put_or_not_at_all(tmp_path):
    made = blocks(tmp_path)
    made.put(0, "zero", arrays(0))
    made.put(1, "one", arrays(1))
    again = blocks(tmp_path)
    np.testing.assert_array_equal(again.get(0, "zero")["a"], arrays(0)["a"])
    assert again.get(1, "another batch") is None
    file = tmp_path / "journal" / "unit-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert again.get(0, "zero") is None
    assert again.units == {}, "both are to be read again"


def test_arrays_of_a_journal_that_is_gone_are_published(tmp_path):
    made = blocks(tmp_path, published=False)
    made.put(0, "zero", arrays(0))
    made._published = lambda plan: True
    shutil.rmtree(tmp_path / "journal")
    with pytest.raises(PublishedError):
        made.get(0, "zero")
    made.put(1, "one", arrays(1))  # too late, and no fault
    assert not (tmp_path / "journal").exists()
