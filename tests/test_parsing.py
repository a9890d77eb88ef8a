"""Verdicts of judges: a table of replies, properties of made-up ones, and time that grows with the length only."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truthsteer.judges.parsing import ParseStatus, parse_verdict

CASES = [
    tuple(case[field] for field in ("name", "raw", "value", "status", "lenient"))
    for case in json.loads((Path(__file__).parent / "golden" / "judge_cases.json").read_text(encoding="utf-8"))
]
DEEP = 100_000
LONG = "the candidate says the same, word for word. " * 1000
QUOTING = LONG.replace("same", '"same"')
DIGITS = "1" * 5000
LARGE = [
    ("40 kB", '{"match": 1, "explanation": "' + LONG + '"}', 1, "ok", 1),
    ("40 kB, cut", '{"match": 1, "explanation": "' + LONG, 1, "repaired", 1),
    ("40 kB, fenced, verdict last", '```json\n{"explanation": "' + LONG + '", "match": 1}\n```', 1, "repaired", 1),
    ("40 kB, unescaped quotes, verdict last", '{"explanation": "' + QUOTING + '", "match": 1}', 1, "repaired", 1),
    ("100k open brackets", "[" * DEEP, None, "invalid", None),
    ("100k open braces", "{" * DEEP, None, "invalid", None),
    ("100k nested objects", '{"a": ' * DEEP + "1" + "}" * DEEP, None, "invalid", None),
    ("100k nested lists beside it", '{"x": ' + "[" * DEEP + "]" * DEEP + ', "match": 1}', 1, "repaired", 1),
    ("100k brackets for a value", '{"match": ' + "[" * DEEP, 0, "coerced", None),
    ("5,000 digits", '{"match": ' + DIGITS + "}", 0, "coerced", None),
    ("5,000 digits, fenced", '```\n{"match": ' + DIGITS + "}\n```", 0, "coerced", None),
    ("5,000 digits, as a string", '{"match": "' + DIGITS + '"}', 0, "coerced", None),
    ("5,000 digits in another field", '{"match": 1, "n": ' + DIGITS + "}", 1, "ok", 1),
    ("5,000 zeros after the point", '{"match": 1.' + "0" * 5000 + "}", 1, "ok", 1),
]
STATUSES = {"ok", "repaired", "coerced", "invalid"}


@pytest.mark.parametrize(
    ("raw", "value", "status", "lenient"), [pytest.param(*rest, id=name) for name, *rest in CASES + LARGE]
)
def test_a_reply_is_read_as_the_table_says(raw, value, status, lenient):
    found = parse_verdict(raw)
    assert (found.value, found.status, found.lenient) == (value, status, lenient)


def test_every_status_has_cases_and_compares_with_its_word():
    assert {status.value for status in ParseStatus} == {case[3] for case in CASES} == STATUSES


def runs(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def holds_its_promises(text):
    found = parse_verdict(text)
    assert found.value in (0, 1, None)
    assert found.lenient in (0, 1, None)
    assert type(found.value) in (int, type(None))
    assert found.status in STATUSES
    assert (found.value is None) == (found.status == "invalid")
    if found.status == "coerced":
        assert found.value == 0
    if found.status in ("ok", "repaired"):
        assert found.lenient == found.value
    assert parse_verdict(text) == found


FRAGMENTS = re.findall(
    r"\S+",
    r"""{ } [ ] : , " ' “ ” ‘ ’ ` * ** \ \" / // /* */ # 0 1 1.0 0.9 -1 5 1e999 true True false null None NaN Infinity yes no
    match Match "match" 'match' “match” "match": "match":1 {"match": match: **match**: score "score": "explanation": "x"
    ```json ``` ; = => ： ， １ ١ 一 \u0061 \ud800 {} [] or 0/1 <0 1> {\"match\":""",
)
SPACES = (" ", "\n", "\t", "\0", "\ufeff", "\ud800", "\u2028", "")
VALID = (
    '{"match": 1, "explanation": "it says \\"Paris\\" too, doesn\'t it", "n": [1, {"a": null}]}',
    '```json\n{"explanation": "match: 1 would be wrong", "match": 0}\n```\nDone {x}.',
    "{'match': True, 'explanation': 'It isn\\'t \"match\": 0', }  # fine",
    '[{"result": {"match": "1.0", "why": "x"}}]',
    "**Match:** 1\n**Explanation:** {same}",
    "{“match”: “yes”, “explanation”: “x /* y */ // z”}",
)


@runs(5000)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text(text):
    holds_its_promises(text)


@runs(3000)
@given(st.lists(st.sampled_from((*FRAGMENTS, *SPACES)), max_size=14).map("".join))
def test_pieces_of_json(text):
    holds_its_promises(text)


@st.composite
def mutated(draw):
    """A reply with up to three cuts, repeats, insertions or deletions."""
    text = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 3))):
        low, high = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        kind = draw(st.sampled_from(("cut", "cut off", "repeat", "insert")))
        if kind == "cut":
            text = text[:low] + text[high:]
        elif kind == "cut off":
            text = text[:high]
        elif kind == "repeat":
            text = text[:high] + text[low:]
        else:
            text = text[:low] + draw(st.sampled_from((*FRAGMENTS, *SPACES))) + text[low:]
    return text


@runs(2000)
@given(mutated())
def test_replies_with_faults(text):
    holds_its_promises(text)


WORDS = (
    "match: 1",
    '"match": 0',
    '{"match": 1}',
    "match",
    "Match",
    '", "match": 1, "',
    "```",
    "// x",
    '"',
    "\\",
    "it's",
)
STRINGS = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), STRINGS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(STRINGS, st.just("match")), inner, max_size=3)
    ),
    max_leaves=4,
)
VERDICTS = st.sampled_from((0, 1, True, False, 0.0, 1.0))


@st.composite
def objects(draw, after=0):
    """JSON with a field `match` among others, its value, and where that field's delimiter ends."""
    fields: list[tuple[str, Any]] = draw(
        st.lists(
            st.tuples(STRINGS.filter(lambda key: key != "match"), VALUES),
            min_size=after,
            max_size=4,
            unique_by=lambda f: f[0],
        )
    )
    place = draw(st.integers(0, len(fields) - after))
    verdict = draw(VERDICTS)
    ascii_only, space = draw(st.booleans()), draw(st.sampled_from(("", " ", "\n  ")))
    encoded = [
        f"{json.dumps(key, ensure_ascii=ascii_only)}:{space}{json.dumps(value, ensure_ascii=ascii_only)}"
        for key, value in (*fields[:place], ("match", verdict), *fields[place:])
    ]
    end = len("{" + f",{space}".join(encoded[: place + 1]) + ",")
    return "{" + f",{space}".join(encoded) + "}", int(verdict), end


@runs(300)
@given(objects())
def test_valid_json_is_ok_whatever_else_it_holds(made):
    text, verdict, _ = made
    assert json.loads(text)["match"] == verdict
    found = parse_verdict(text)
    assert (found.value, found.status) == (verdict, "ok")


@runs(300)
@given(objects(after=1), st.data())
def test_a_cut_after_the_verdict_is_repaired(made, data):
    text, verdict, end = made
    found = parse_verdict(text[: data.draw(st.integers(end, len(text) - 1))])
    assert (found.value, found.status) == (verdict, "repaired")


BEFORE = st.sampled_from(
    ("Sure:\n", "```json\n", "The sets {a, b} and {} agree.\n", "JSON: ", "[", "\ufeff", "x = ", "<a>")
)
AFTER = st.sampled_from(("\n```", " {x}", ', "match": 1}', '\n{"match": 0}', '\n\nQuestion: "', "]", "</a>", " // no"))


@runs(300)
@given(objects(), st.one_of(st.just(""), BEFORE), AFTER)
def test_whatever_stands_around_the_object_is_repaired(made, before, after):
    text, verdict, _ = made
    found = parse_verdict(before + text + after)
    assert (found.value, found.status) == (verdict, "repaired")


@runs(500)
@given(st.dictionaries(STRINGS, STRINGS, max_size=3), st.booleans(), st.booleans())
def test_a_python_dict_is_repaired(others, verdict, last):
    others.pop("match", None)
    made = {**others, "match": verdict} if last else {"match": verdict, **others}
    found = parse_verdict(repr(made))
    assert (found.value, found.status) == (int(verdict), "repaired")


@runs(300)
@given(
    st.lists(st.sampled_from(("Paris", '"Rome"', '"match"', "it's", '"a" b', "match: 1", "(x)")), max_size=6), VERDICTS
)
def test_unescaped_quotes_inside_the_explanation_do_not_hide_a_later_verdict(words, verdict):
    found = parse_verdict(f'{{"explanation": "it says {" ".join(words)} here", "match": {verdict}, }}')
    assert (found.value, found.status) == (int(verdict), "repaired")


SHAPES = [
    ("", '{"a":'),
    ("", '"match'),
    ("", '{"match": '),
    ("", "\\"),
    ("", '"'),
    ("", "["),
    ("", "{}"),
    ("", "match:\n"),
    ("", "match: /*\n"),
    ('{"a": "', '", '),
    ('{"a": "', '", "b'),
    ('{"a": "', '\\"'),
    ("{'a': '", "', \""),
    ('{"a": ["', '"'),
    ('{"match": ', "1"),
    ('{"match": ', "1,"),
    ("{", '"match": 1,'),
    ("{", '"match": [1, '),
    ("{", '"match": [},'),
    ("{", "/* "),
]
SIZE = 2_000_000


def seconds(text):
    """CPU time, which a busy machine stretches less than the clock's."""
    start = time.process_time()
    parse_verdict(text)
    return time.process_time() - start


@pytest.mark.parametrize(("start", "unit"), SHAPES)
def test_time_grows_with_the_length_and_not_faster(start, unit):
    text = start + unit * (SIZE // len(unit))
    part = min(seconds(text[: SIZE // 8]) for _ in range(2))
    whole = seconds(text)
    assert whole < 8 * 2 * part + 0.1  # 64 times, not 8, if every doubling took four times as long
    assert whole < 8
