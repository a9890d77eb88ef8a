"""Components from YAML nodes: checked, from anywhere, with errors that say what to type."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from truthsteer.component import TRANSIENT, build, build_all, content
from truthsteer.errors import UserError
from truthsteer.methods.mean_diff import MeanDiff


@dataclass(frozen=True)
class Example:
    """A component of this test."""

    count: int
    rate: float = 0.5
    name: str | None = None
    parts: tuple[str, ...] = ()


HERE = f"{__name__}.Example"


def test_builds_with_defaults_and_whole_numbers_for_floats():
    assert build({"_target_": HERE, "count": 3, "rate": 1, "parts": ["a"]}, "x") == Example(3, 1.0, None, ("a",))
    assert build({"_target_": "truthsteer.methods.mean_diff.MeanDiff"}, "method.mean_diff") == MeanDiff()


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": HERE, "cuont": 3}, "x.cuont is not a field of Example. Did you mean 'count'?"),
        ({"_target_": HERE}, "x.count is missing. Type x.count=VALUE."),
        ({"_target_": HERE, "count": "3"}, "x.count='3' must be int."),
        ({"_target_": HERE, "count": True}, "x.count=True must be int."),
        ({"_target_": HERE, "count": 1, "name": 5}, "x.name=5 must be str or null."),
        ({"_target_": HERE, "count": 1, "parts": [1]}, r"x.parts\[0\]=1 must be str."),
        ({"count": 1}, "x has no _target_"),
        ({"_target_": "no_such_package.Thing"}, "no module 'no_such_package'"),
        ({"_target_": f"{__name__}.Exmaple", "count": 1}, "Did you mean 'Example'?"),
        ({"_target_": "truthsteer.store.file_sha256"}, "is not a dataclass"),
    ],
)
def test_mistakes_are_named_with_what_to_type(node, words):
    with pytest.raises(UserError, match=words):
        build(node, "x")


def test_a_node_that_is_not_a_component_is_refused():
    with pytest.raises(UserError, match="judge=reference"):
        build_all({"reference": 3}, "judge")


def test_a_component_from_a_folder_outside_works(tmp_path: Path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Mine:\n    size: int = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build({"_target_": "elsewhere.Mine", "size": 4}, "method.mine").size == 4
    sys.modules.pop("elsewhere")


def test_a_file_of_ones_own_is_part_of_every_key_it_decides(tmp_path: Path, monkeypatch):
    """Editing it makes other artifacts; the package's own components change with their stage's version."""
    node = {"_target_": "own_operator.Mine"}
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for sign in "+-":
        (tmp_path / "own_operator.py").write_text(
            f"from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Mine:\n    sign: str = '{sign}'\n"
        )
        found.append(content(node, build(node, "operator")))
        sys.modules.pop("own_operator")
    assert found[0] != found[1]
    inside = {"_target_": "truthsteer.methods.mean_diff.MeanDiff"}
    assert content(inside, MeanDiff()) == inside


@dataclass(frozen=True)
class Costly:
    """A component that can be computed in several ways."""

    model: str
    batch: int = field(default=8, metadata=TRANSIENT)
    device: str | None = field(default=None, metadata=TRANSIENT)


def test_how_a_component_computes_is_no_part_of_what_it_is():
    """Another batch size or device finds the same artifacts; another model does not."""
    target = {"_target_": f"{__name__}.Costly", "model": "a"}
    plain = content(target, build(target, "judge.costly"))
    for other in ({"batch": 2}, {"device": "cuda"}, {"batch": 2, "device": "cpu"}):
        node = target | other
        assert content(node, build(node, "judge.costly")) == plain
    assert plain["model"] == "a"
    assert "source" in plain
    node = target | {"model": "b"}
    assert content(node, build(node, "judge.costly")) == plain | {"model": "b"}
