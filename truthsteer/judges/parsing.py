"""What a judge that was asked for `{"match": 0 or 1, ...}` said, read from whatever text it wrote.

The first object that has a field `match` decides. Whole and valid JSON is read by `json`; everything else by one pass
over the text that knows brackets, strings, comments and keys, and tells a field from words inside another field's
string. No text makes it raise, and its time grows with the text's length, since no pattern goes back over what it has
read (`*+`, `++`). It knows no models, no prompts and no scores.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ParseStatus(StrEnum):
    """How a verdict was reached."""

    OK = "ok"
    """Valid JSON with `match` 0 or 1."""
    REPAIRED = "repaired"
    """The verdict is certain, the syntax was not."""
    COERCED = "coerced"
    """There is a field `match`, but it is no number 0 or 1, or says both: 0 by the rule."""
    INVALID = "invalid"
    """There is no field `match`."""


@dataclass(frozen=True)
class Parsed:
    """The verdict in a judge's reply."""

    value: int | None
    """1 or 0; None exactly where the status is `invalid`."""
    status: ParseStatus
    lenient: int | None
    """A forgiving reading ("yes", 0.9, another key), for sensitivity only; None where nothing can be read."""


_INVISIBLE = "\0\ufeff\u200b\u2060"
"""NUL, byte order mark, zero-width space, word joiner: they can stand between any two characters and mean nothing."""

_OTHER_KEY = re.compile("score|verdict|label|correct|answer|result|rating|judge?ment|value|matche[sd]|is_match")
"""Keys that judges use instead of `match`; read leniently only."""

_YES = ("yes", "y", "true", "t", "one", "correct", "match")
_NO = ("no", "n", "false", "f", "zero", "incorrect", "no match")

_SHORT = 80
"""So many characters of a key, or of a value that is a list, an object or has escapes, are looked at."""

_DOUBLE, _SINGLE = "“”„‟", "‘’‚‛"
_MARKS = "\"'`" + _DOUBLE + _SINGLE
_COLONS, _SEPARATORS = ":：=>", ",;，；"
_COLON = r"\s*+(?:[:：]|=(?!=)>?)"
_COMMENT = r"//|/\*|\#"
_QUOTED_KEY = (
    r'(?:"(?:[^"\\]++|\\(?s:.))*+"' + rf"|'(?:[^'\\]++|\\(?s:.))*+'"
    rf'|[{_DOUBLE}][^{_DOUBLE}"]*+[{_DOUBLE}"]|[{_SINGLE}][^{_SINGLE}\']*+[{_SINGLE}\']){_COLON}'
)
_BARE_KEY = rf"\w[\w$-]*+{_COLON}"
_KEY = re.compile(rf"{_QUOTED_KEY}|{_BARE_KEY}|[{_MARKS}]?(?i:match)[{_MARKS}]?{_COLON}")
_LINE_KEY = re.compile(
    r"^(?:[0-9][.)]|json|verdict|judge?ment|answer|output|result|response)?(?:[^\w\n]|_){0,40}+"
    rf"match[*_)\s{_MARKS}]{{0,8}}+{_COLON}(?:[\s*_`]*+(?![0-9]++[.)]\s)|[^\S\n]*+)",
    re.IGNORECASE | re.MULTILINE,
)
"""A field without braces begins its line, but for bullets, markup and a label; a list may follow it, no value."""
_ESCAPED = re.compile(r'\{(?:\s|\\[nrt])*+\\"')
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)

_NUMBER = r"[+-]?[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_WHOLE_NUMBER = re.compile(_NUMBER + r"\.?")
_VALUE_END = (
    rf"\.(?:\s|\Z)|\.?[^\S\n]*+"
    rf"(?:\Z|[\n}}\]);，；。{_MARKS}]|,(?!\s*+[0-9])|{_COMMENT}|<[a-z/|]|[*_]*+[^\W\d_]++[*_]*+{_COLON})"
)
_LITERAL = re.compile(rf"((?i:true|false)|{_NUMBER})[*`]*+(?={_VALUE_END})")
"""A number or a boolean that ends where a value may end: not the 0 of `0 or 1`, `0/1` or `0,9`."""
_WORDS = re.compile(r"(?:[^,}\]\n]|,(?=\s*+[0-9]))*+")
_GAP = re.compile(r"(?:[\s*`]++|(?://|\#)[^\n]*+|/\*(?:[^*]++|\*(?!/))*+(?:\*/|\Z))*+")


def _string(after: str) -> str:
    """A quoted string, cut or whole. A mark that is not followed by `after` lacks its backslash: the string goes on."""
    kinds = (('"', '"'), ("'", "'"), (_DOUBLE, _DOUBLE + '"'), (_SINGLE, _SINGLE + "'"))
    return "|".join(
        rf"[{opening}](?:[^{closing}\\]++|\\(?:(?s:.)|\Z)|[{closing}](?!{after}))*+(?:[{closing}]|\Z)"
        for opening, closing in kinds
    )


_ELEMENT = rf"[\[\]{{}}0-9{_MARKS}-]|(?:true|false|null|NaN|Infinity|True|False|None)\b"
_STRING = _string(
    rf"\s*+(?:\Z|[}}\]]|//|/\*|{_QUOTED_KEY}|[{_SEPARATORS}]\s*+(?:\Z|[}}\]]|{_COMMENT}|{_QUOTED_KEY}|{_BARE_KEY}))"
)
_LISTED_STRING = _string(rf"\s*+(?:\Z|[}}\]]|//|/\*|[{_SEPARATORS}]\s*+(?:\Z|{_ELEMENT}|{_COMMENT}))")
_IN_OBJECT, _IN_LIST = (re.compile(rf"{string}|[^{_SEPARATORS}{{}}\[\]\n]++") for string in (_STRING, _LISTED_STRING))
"""What is read in one go: a string, or words up to the next separator."""


def parse_verdict(text: str) -> Parsed:
    """The value of the field `match` in a judge's reply.

    Args:
        text: the reply, of any length and content.

    Returns:
        The verdict, how it was reached, and the lenient reading. Valid JSON that is nested deeper than `json` reads
        counts as `repaired`.
    """
    data = _json(text)
    if isinstance(data, tuple):
        values = [value for key, value in data if key == "match"]
        if values and all(isinstance(value, bool | float) and value == values[0] in (0, 1) for value in values):
            return Parsed(int(values[0]), ParseStatus.OK, int(values[0]))
    for character in _INVISIBLE:
        text = text.replace(character, "")
    return _search(text)


def _json(text: str) -> Any:
    """The data of valid JSON, objects as tuples of (key, value), numbers as floats; None where it is not valid."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    """NaN and Infinity: `json` reads them, though JSON has no such numbers."""
    raise ValueError(constant)


_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float, parse_constant=_refuse)


def _search(text: str) -> Parsed:
    """Goes through objects and lines like `match: 1` in order. A line without a verdict counts if nothing else does."""
    unclear: list[Any] = []
    others: list[Any] = []
    if _ESCAPED.match(text, max(text.find("{"), 0)):  # an object that was encoded twice
        text = _ESCAPE.sub(lambda escape: "\n" if escape[1] in "nrt" else escape[1], text)
    at = 0
    while True:
        brace = text.find("{", at)
        for key in _LINE_KEY.finditer(text, at, brace if brace >= 0 else len(text)):
            end = text.find("\n", key.end())
            found, _ = _value(text, key.end(), end if end >= 0 else len(text))
            if found and _verdict(found[0]) is not None:
                return _decide(found)
            unclear += found
        if brace < 0:
            break
        found, named, at = _object(text, brace)
        if found and named:
            return _decide(found)
        others += found
    if unclear:
        return _decide(unclear[:1])
    return Parsed(None, ParseStatus.INVALID, _lenient(others[0] if others else text))


def _object(text: str, start: int) -> tuple[list[Any], bool, int]:
    """Reads the object that opens at `start`, to its end or the text's.

    Returns:
        The values of its field `match`, several if that is repeated: of the outermost such field, spelt exactly where
        there is a choice, else the first. Failing that, those of another known key. Then, whether it is `match`, and
        where the object ends.
    """
    opened: list[int] = []  # where each bracket stands that is still open
    best = (True, len(text), True, start)
    values: list[Any] = []
    at = start
    while True:
        at = _end(_GAP.match(text, at))
        within = text[opened[-1]] if opened else ""
        if within == "{" and (field := _KEY.match(text, at)):
            at = field.end()
            key = field[0].rstrip(_COLONS + " \t\r\n")[:_SHORT]
            name = key.strip(_MARKS + " \t\r\n").lower()
            rank = (name != "match", len(opened), key[1:-1] != "match" != key, opened[-1])
            if (name == "match" or _OTHER_KEY.fullmatch(name)) and (rank[:3] < best[:3] or rank == best):
                found, at = _value(text, at, len(text))
                if found and rank != best:
                    best, values = rank, []
                values += found
                continue
            at = _end(_GAP.match(text, at))
        if at == len(text):
            break
        if text[at] in "{[":
            opened.append(at)
            at += 1
        elif text[at] in "}]":
            opened.pop()
            at += 1
            if not opened:
                break
        elif text[at] in _SEPARATORS:
            at += 1
        else:
            at = _end((_IN_OBJECT if within == "{" else _IN_LIST).match(text, at))
    return values, not best[0], at


def _end(match: re.Match[str] | None) -> int:
    """For patterns that match wherever they are tried."""
    assert match is not None
    return match.end()


def _value(text: str, at: int, stop: int) -> tuple[list[Any], int]:
    """The value at `at`, as a list of one, or of none if the text was cut before it; and where it ends.

    Words without quotes are a string. A list or an object ends where it starts: its insides are read like others.
    """
    at = _end(_GAP.match(text, at, stop))
    if literal := _LITERAL.match(text, at, stop):
        word = literal[1].lower()
        return [word == "true" if word in ("true", "false") else float(word)], literal.end()
    if at == stop:
        return [], at
    if text[at] in "[{":
        end = text.find("]" if text[at] == "[" else "}", at, at + _SHORT)
        return [_json(text[at : end + 1]) or ()], at
    if text[at] in _MARKS:
        end = _end(_IN_OBJECT.match(text, at, stop))
        content = text[at:end].strip(_MARKS)
        decoded = _json(f'"{content}"') if "\\" in content and len(content) <= _SHORT else None
        return [] if end == at + 1 else [content if decoded is None else decoded], end
    end = _end(_WORDS.match(text, at, stop))
    return [text[at:end]], end


def _decide(values: list[Any]) -> Parsed:
    """The verdict of a field `match` that has this value, or these where it is repeated."""
    verdicts, readings = ({read(value) for value in values} for read in (_verdict, _lenient))
    verdict, reading = (found.pop() if len(found) == 1 else None for found in (verdicts, readings))
    if verdict is not None:
        return Parsed(verdict, ParseStatus.REPAIRED, verdict)
    return Parsed(0, ParseStatus.COERCED, reading)


def _verdict(value: Any) -> int | None:
    """0 or 1 if the value is that number, a boolean, or a string of ASCII digits that is that number."""
    if isinstance(value, str):
        value = float(value) if _WHOLE_NUMBER.fullmatch(value.strip()) else None
    return int(value) if isinstance(value, bool | float) and value in (0, 1) else None


def _lenient(value: Any) -> int | None:
    """Numbers from .5 up and words of assent are 1, other numbers and words of denial 0."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0][1] if isinstance(value, tuple) else value[0]
    if isinstance(value, bool | float):
        return int(value >= 0.5) if math.isfinite(value) else None
    word = value.strip().strip(" .!*_" + _MARKS).lower() if isinstance(value, str) else ""
    if not word:
        return None
    top, _, bottom = word.partition("/")
    try:
        number = float(top) / float(bottom or 1) if len(word) > 1 else unicodedata.numeric(word)
    except (ValueError, ZeroDivisionError):
        first = re.split(r"[,.;!]", word, maxsplit=1)[0]
        return 1 if first in _YES else 0 if first in _NO else None
    return int(number >= 0.5) if math.isfinite(number) else None
