"""Artifacts appear whole or not at all, and interrupted work goes on as if it had not been interrupted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truthsteer.errors import UserError
from truthsteer.files import canonical, digest
from truthsteer.records import (
    Capability,
    Choice,
    Condition,
    ConditionKind,
    Hit,
    Letters,
    Neutral,
    Question,
    Sentinel,
    Splits,
    Verdict,
    from_json,
    to_json,
)
from truthsteer.store import JournalRow, Key, Store, write_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
TEXT = st.text(st.characters(blacklist_categories=("Cs",)))


@given(JSON)
def test_canonical_json_round_trips_and_ignores_key_order(value):
    assert json.loads(canonical(value)) == value
    if isinstance(value, dict):
        assert digest(dict(reversed(value.items()))) == digest(value)


def test_nan_cannot_be_part_of_a_key():
    with pytest.raises(ValueError, match="JSON compliant"):
        digest({"coefficient": float("nan")})


@given(st.builds(Choice, TEXT, TEXT, st.booleans(), st.booleans(), st.floats(allow_nan=False), st.integers(0, 99)))
def test_records_round_trip(choice):
    assert from_json(Choice, json.loads(json.dumps(to_json(choice)))) == choice


def test_nested_records_round_trip():
    question = Question("a", 2, "Adversarial", "c", "t?", "b.", ("b.", "c."), ("d.",), 3)
    against = Question("b", 3, "Adversarial", "c", "u?", "b.", ("b.",), ("d.", "e."), 4, best_incorrect="e.")
    splits = Splits(1, (question,), (), (question, against), (question,))
    assert from_json(Splits, json.loads(json.dumps(to_json(splits)))) == splits
    assert (question.group, question.best_incorrect) == (3, None), "the group is the ninth field, for callers by place"
    condition = Condition("n", ConditionKind.CHOSEN, 0, "m", None, 0.5, prompt="help")
    again = from_json(Condition, json.loads(json.dumps(to_json(condition))))
    assert again == condition
    assert again.kind is ConditionKind.CHOSEN


ROWS = {
    Letters: [Letters("q1", "A", -0.5, -1.25), Letters("q1", "B", -0.1, -2.0)],
    Neutral: [Neutral(3, 127, 301.5, 12.25, 0.75)],
    Capability: [Capability("c1", 1.0, 0.0)],
    Hit: [Hit("q1", 1.0)],
    Sentinel: [Sentinel("q1", "empty", ""), Sentinel("q1", "elsewhere", "Ünïcode\u2028 and\na line.")],
    Verdict: [Verdict("q1", "ok", {"true": None, "info": 1.0}, {"true": 0.25}, "raw"), Verdict("q2", "empty")],
}
"""Record -> rows of it."""


@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_rows_that_are_written_are_rows_that_are_read(tmp_path, cls):
    """As records, or as their plain dicts."""
    store, rows = Store(tmp_path), ROWS[cls]
    records, plain = Key.of("rows", 1, of="records"), Key.of("rows", 1, of="dicts")
    made = store.make(records, lambda folder: write_rows(folder, rows))
    again = store.make(plain, lambda folder: write_rows(folder, [to_json(row) for row in rows]))
    assert made.rows(cls) == again.rows(cls) == rows
    assert (made.path / "rows.jsonl").read_bytes() == (again.path / "rows.jsonl").read_bytes()


def test_an_artifact_is_published_whole_or_not_at_all(tmp_path):
    store, key = Store(tmp_path), Key.of("thing", 1, x=1)

    def half(folder):
        (folder / "half.txt").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.make(key, half)
    assert store.find(key) is None
    assert not list((tmp_path / ".store" / ".part").iterdir())
    made = store.make(key, lambda folder: (folder / "whole.txt").write_text("whole") and None)
    assert (made.path / "whole.txt").read_text() == "whole"
    assert made.json("meta.json")["inputs"]["x"] == 1
    never = store.make(key, lambda folder: pytest.fail("made twice"))
    assert never.path == made.path


def test_the_first_of_two_processes_to_publish_wins(tmp_path):
    store, key = Store(tmp_path), Key.of("thing", 1, x=1)
    with store.publish(key) as slow:
        (slow / "a.txt").write_text("slow")
        store.make(key, lambda folder: (folder / "a.txt").write_text("fast") and None)
    assert (store.find(key).path / "a.txt").read_text() == "fast"


def test_keys_differ_in_every_input():
    keys = {
        Key.of("k", 1, x=1).digest,
        Key.of("k", 2, x=1).digest,
        Key.of("k", 1, x=2).digest,
        Key.of("l", 1, x=1).digest,
    }
    assert len(keys) == 4


def test_what_is_missing_is_named_with_the_stage_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="Add generate to stages"):
        Store(tmp_path).need(Key.of("completions", 1), "generate")


@dataclass(frozen=True)
class Number:
    value: int


class KilledError(Exception):
    """Stands for kill -9."""


def work(units: dict[int, list[tuple[int, int]]], killed_after: int | None, log: list[tuple[int, tuple[str, ...]]]):
    """Computes `units` (unit -> [(key index, order)]) over the plan it is given, and may die on the way."""

    def compute(plan, done):
        for count, unit in enumerate(number for number in units if not done(number)):
            if count == killed_after:
                raise KilledError
            log.append((unit, tuple(plan)))
            yield (
                unit,
                [
                    JournalRow(plan[key], order, Number(100 * key + order))
                    for key, order in units[unit]
                    if key < len(plan)
                ],
            )

    return compute


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=12, unique=True),
    size=st.integers(1, 4),
    kills=st.lists(st.integers(0, 3), max_size=4),
    torn=st.binary(max_size=20),
)
def test_killed_at_any_unit_the_rows_are_the_same(tmp_path_factory, rows, size, kills, torn):
    """However often it is killed, with a torn last line left behind, each unit is done once and the result is the same."""
    keys = [Key.of("rows", 1, name=name) for name in "abc"]
    units = {number: rows[i : i + size] for number, i in enumerate(range(0, len(rows), size))}
    calm = Store(tmp_path_factory.mktemp("calm")).make_rows(keys, {}, work(units, None, []))
    root, log = tmp_path_factory.mktemp("stormy"), []
    store = Store(root)
    for killed_after in kills:
        try:
            store.make_rows(keys, {}, work(units, killed_after, log))
            break
        except KilledError:
            for file in root.glob(".store/.journal/*/units-*.jsonl"):
                with file.open("ab") as end:
                    end.write(torn.replace(b"\n", b""))
    made = store.make_rows(keys, {}, work(units, None, log))
    for ours, theirs in zip(made, calm, strict=True):
        assert (ours.path / "rows.jsonl").read_bytes() == (theirs.path / "rows.jsonl").read_bytes()
    assert sorted(number for number, _ in log) == sorted(units)
    assert not list(root.glob(".store/.journal/*"))


def test_killed_while_publishing_the_plan_stays_the_same(tmp_path, monkeypatch):
    """Some artifacts out, some not: the batches must not be formed anew from what is left."""
    keys = [Key.of("rows", 1, name=name) for name in "abc"]
    units = {0: [(0, 0), (1, 0), (2, 0)], 1: [(0, 1), (1, 1), (2, 1)]}
    store, log = Store(tmp_path), []
    rename, count = os.rename, []

    def dying(source, target):
        count.append(target)
        if len(count) == 2:
            raise KilledError
        rename(source, target)

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(KilledError):
        store.make_rows(keys, {}, work(units, None, log))
    monkeypatch.setattr(os, "rename", rename)
    assert [store.find(key) is not None for key in keys] == [True, False, False]
    made = store.make_rows(keys, {}, work(units, None, log))
    assert [row.value for row in made[2].rows(Number)] == [200, 201]
    assert len(log) == 2
    assert len({plan for _, plan in log}) == 1


def test_another_layout_does_not_continue_a_journal(tmp_path):
    keys = [Key.of("rows", 1, name="a")]
    store, log = Store(tmp_path), []
    with pytest.raises(KilledError):
        store.make_rows(keys, {"batch_tokens": 1}, work({0: [(0, 0)], 1: [(0, 1)]}, 1, log))
    made = store.make_rows(keys, {"batch_tokens": 2}, work({0: [(0, 0), (0, 1)]}, None, log))
    assert [row.value for row in made[0].rows(Number)] == [0, 1]


def test_only_what_is_missing_is_computed(tmp_path):
    first, second = Key.of("rows", 1, name="a"), Key.of("rows", 1, name="b")
    store, log = Store(tmp_path), []
    store.make_rows([first], {}, work({0: [(0, 0)]}, None, log))
    made = store.make_rows([first, second, first], {}, work({0: [(0, 0)]}, None, log))
    assert [plan for _, plan in log] == [(first.digest,), (second.digest,)]
    assert made[0].path == made[2].path != made[1].path


@pytest.mark.parametrize(
    "damaged",
    [b'{"unit": 1, "rows": []}', b'{"unit": 1, "ro\n', b"3\n", b'{"unit": 1}\n'],
    ids=["without_its_newline", "torn_then_ended", "no_unit", "no_rows"],
)
def test_a_damaged_line_of_a_journal_is_a_unit_to_do_again(tmp_path, damaged):
    keys, units = [Key.of("rows", 1, name="a")], {0: [(0, 0)], 1: [(0, 1)]}
    store, log = Store(tmp_path), []
    with pytest.raises(KilledError):
        store.make_rows(keys, {}, work(units, 1, log))
    (file,) = tmp_path.glob(".store/.journal/*/units-*.jsonl")
    file.write_bytes(file.read_bytes() + damaged)
    (made,) = store.make_rows(keys, {}, work(units, None, log))
    assert [row.value for row in made.rows(Number)] == [0, 1]
    assert [unit for unit, _ in log] == [0, 1]


def test_a_folder_without_its_record_is_not_an_artifact(tmp_path):
    """Such as a copy that was interrupted."""
    store, key = Store(tmp_path), Key.of("thing", 1, x=1)
    (tmp_path / ".store" / key.kind / key.digest).mkdir(parents=True)
    assert store.find(key) is None


def test_rows_stand_in_their_order_whatever_order_they_came_in(tmp_path):
    (made,) = Store(tmp_path).make_rows([Key.of("rows", 1)], {}, work({0: [(0, 2), (0, 0)], 1: [(0, 1)]}, None, []))
    assert [row.value for row in made.rows(Number)] == [0, 1, 2]


def test_a_record_may_hold_numpy_numbers(tmp_path):
    """A judge of somebody else's may give a mean of numpy."""
    from truthsteer.records import Verdict, to_json

    assert to_json(Verdict("q", "ok", {"x": np.float32(0.5), "y": np.float64(0.25), "z": np.int64(1)}))["scores"] == {
        "x": 0.5,
        "y": 0.25,
        "z": 1,
    }
    with pytest.raises(TypeError, match="complex cannot be kept in a record"):
        to_json(Verdict("q", "ok", {"x": 1j}))
