"""From a YAML node to a checked component: `_target_` names a dataclass, the other keys are its fields.

No registry: a method, operator or judge from outside the package works by its import path.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from truthsteer.errors import UserError, did_you_mean

TRANSIENT = {"transient": True}
"""`field(metadata=TRANSIENT)`: how a component computes, not what."""


def build(node: Mapping[str, Any], key: str) -> Any:
    """The dataclass instance that `node` describes.

    Args:
        node: mapping with `_target_` (dotted path of a dataclass) and its fields.
        key: where the node stands in the config, for messages.

    Raises:
        UserError: unknown target, unknown, missing or mistyped field; whatever the dataclass itself refuses.
    """
    target = node.get("_target_")
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"{key} has no _target_. Type {key}._target_=package.module.Class.")
    cls = _locate(target, key)
    values = {str(name): value for name, value in node.items() if name != "_target_"}
    known = {item.name: item for item in fields(cls) if item.init}
    hints = get_type_hints(cls)
    for name in values:
        if name not in known:
            raise UserError(
                f"{key}.{name} is not a field of {cls.__name__}. {did_you_mean(name, known)}"
                f"Its fields are: {', '.join(known) or 'none'}."
            )
    for name, item in known.items():
        if name not in values:
            if item.default is MISSING and item.default_factory is MISSING:
                raise UserError(f"{key}.{name} is missing. Type {key}.{name}=VALUE.")
        else:
            values[name] = _checked(values[name], hints[name], f"{key}.{name}")
    return cls(**values)


def build_all(nodes: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Every named component under `key`, in the order in which they were given."""
    for name, node in nodes.items():
        if not isinstance(node, Mapping):
            raise UserError(f"{key}.{name}={node!r} is not a component. Type {key}={name}.")
    return {name: build(node, f"{key}.{name}") for name, node in nodes.items()}


def content(node: Mapping[str, Any], component: Any) -> dict[str, Any]:
    """What determines a component, for keys: its node, and its source file where it is not part of this package.

    Fields marked `TRANSIENT` (a device, a batch size) do not change results and are left out. The package's own
    components change with their stage's VERSION; nobody raises a version for a file of their own.
    """
    cls = type(component)
    own = cls.__module__.split(".")[0] == __name__.split(".")[0]
    source = {} if own else {"source": hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()}
    known = {item.name: item for item in fields(cls)}
    lasting = {
        name: value for name, value in node.items() if name not in known or not known[name].metadata.get("transient")
    }
    return {**lasting, **source}


def _locate(target: str, key: str) -> type[Any]:
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}._target_={target}: there is no module '{error.name}'. Is it installed, or on PYTHONPATH?"
        ) from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and is_dataclass(cls)):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and is_dataclass(value)]
        raise UserError(
            f"{key}._target_={target} is not a dataclass of {module_name}. "
            f"{did_you_mean(class_name, classes)}It has: {', '.join(classes) or 'none'}."
        )
    return cls


def _checked(value: Any, hint: Any, key: str) -> Any:
    """`value` as `hint` asks for it: whole numbers pass as floats, lists as tuples, a bare true as text; nothing else."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        kind = get_origin(option) or option
        if option is Any or (kind is NoneType and value is None):
            return value
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind is tuple and isinstance(value, (list, tuple)):
            inner = get_args(option)[0] if get_args(option) else Any
            return tuple(_checked(item, inner, f"{key}[{place}]") for place, item in enumerate(value))
        if kind in (int, str, bool, dict, list) and type(value) is kind:
            return value
        if kind is str and isinstance(value, bool):
            return str(value).lower()  # YAML's bare true, where the text is meant
    wanted = " or ".join(getattr(option, "__name__", str(option)).replace("NoneType", "null") for option in options)
    raise UserError(f"{key}={value!r} must be {wanted}.")
