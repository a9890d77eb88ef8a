"""Reading and changing the residual stream with forward hooks, always removed again.

`steered` changes what a whole block of code computes; `RowSteering` gives each row of a batch its own condition;
`capture` reads layer outputs. A layer's index is that of the decoder layer whose output is read or changed
(`hidden_states[index + 1]` of transformers). Decoder layers may return a tensor or a tuple: both are handled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from truthsteer.bank import SteeringVector
from truthsteer.errors import UserError
from truthsteer.operators import Add, Operator

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel


@dataclass(frozen=True)
class Injection:
    """What one condition does to the residual stream."""

    layer: int
    vector: Tensor
    """[hidden], float32, in coefficient units."""
    coefficient: float


HALVINGS = 10


def halved(injection: Injection) -> Iterator[Injection]:
    """The same with a half, a quarter ... of the coefficient, for the largest that a model bears."""
    return (replace(injection, coefficient=injection.coefficient / 2**k) for k in range(1, HALVINGS + 1))


class StopForwardError(Exception):
    """Ends a forward pass at the deepest layer that is read."""


class RowSteering:
    """Hooks that apply to each row of a batch the condition it belongs to.

    Make it once per set of conditions, enter it, and say with `assign` which condition each row of the next forward
    passes belongs to. Rows of the baseline (None) and of other layers are left bitwise unchanged.

    Conditions differ only from the lowest steered layer on: `assign(rows, trunk)` computes what is below it once for all
    of them. The batch that goes in then has one row for each that the conditions share; at the output of layer `trunk` it
    is repeated, one copy per condition, and from there on `rows` counts.
    """

    def __init__(self, lm: LanguageModel, conditions: Sequence[Injection | None], operator: Operator) -> None:
        self._lm = lm
        self._operator = operator
        self._vectors: dict[int, Tensor] = {}  # layer -> [conditions, hidden]
        self._coefficients: dict[int, Tensor] = {}  # layer -> [conditions]
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._trunk: int | None = None
        self.calls = 0
        """How often a hook changed a layer's output."""
        for layer in sorted({condition.layer for condition in conditions if condition}):
            vectors = torch.zeros(len(conditions), lm.hidden_size)
            coefficients = torch.zeros(len(conditions))
            for index, condition in enumerate(conditions):
                if condition is not None and condition.layer == layer:
                    lm.check_vector(condition.vector, layer)
                    vectors[index] = condition.vector
                    coefficients[index] = condition.coefficient
            device = lm.layer_device(layer)
            self._vectors[layer] = vectors.to(device)
            self._coefficients[layer] = coefficients.to(device)

    def trunk_of(self, conditions: Sequence[int]) -> int | None:
        """The lowest layer at which one of these conditions (indices) steers; None if none does."""
        index = torch.tensor(conditions)
        found = [layer for layer, own in self._coefficients.items() if bool((own.cpu()[index] != 0).any())]
        return min(found, default=None)

    def assign(self, rows: Tensor, trunk: int | None = None) -> None:
        """The condition index of each row of the batches to come, copies as blocks. [rows], int64.

        With `trunk`, a layer of `trunk_of`, the batches themselves hold one block only.
        """
        self._trunk = trunk
        self._total = len(rows)
        self._rows = {}
        for layer, vectors in self._vectors.items():
            index = rows.to(vectors.device)
            coefficients = self._coefficients[layer][index]
            if bool((coefficients != 0).any()):
                self._rows[layer] = (vectors[index][:, None, :], coefficients[:, None, None])

    def __enter__(self) -> RowSteering:
        with ExitStack() as stack:
            for layer in self._vectors:
                stack.enter_context(_hook(self._lm.layers[layer], self._change(layer), prepend=True))
            for layer in range(min(self._vectors, default=self._lm.num_layers), self._lm.num_layers):
                hook = self._lm.layers[layer].register_forward_pre_hook(self._widen(layer), with_kwargs=True)
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _change(self, layer: int) -> Any:
        def change(hidden: Tensor) -> Tensor | None:
            if layer == self._trunk:
                hidden = _repeated(hidden, len(hidden), self._total // len(hidden))
            if layer not in self._rows:
                return hidden if layer == self._trunk else None
            self.calls += 1
            vectors, coefficients = self._rows[layer]
            return self._operator.apply(hidden, vectors, coefficients)

        return change

    def _widen(self, layer: int) -> Any:
        """Above the trunk, masks and positions that were made for one block of rows serve all of them."""

        def widen(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if self._trunk is None or layer <= self._trunk:
                return None
            block = len(named["position_ids"])
            return inputs, {key: _repeated(value, block, self._total // block) for key, value in named.items()}

        return widen


def _repeated(value: Any, block: int, copies: int) -> Any:
    """A tensor whose first dimension is a block of rows, `copies` times; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_repeated(item, block, copies) for item in value)
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == block and copies > 1:
        return value.repeat(copies, *([1] * (value.ndim - 1)))
    return value


@contextmanager
def steered(
    lm: LanguageModel,
    vector: Tensor | SteeringVector,
    coefficient: float = 1.0,
    layer: int | None = None,
    operator: Operator | None = None,
) -> Iterator[None]:
    """Everything the model computes inside the block is steered.

    Args:
        lm: the model.
        vector: a `SteeringVector` (it knows its layer), or a tensor [hidden] together with `layer`.
        coefficient: how much of it; 0 changes nothing.
        layer: decoder layer whose output is changed.
        operator: how; addition by default.

    Raises:
        UserError: the layer does not exist, or the vector has another width or is not finite.
    """
    if isinstance(vector, Tensor):
        if layer is None:
            raise UserError("steered() got a bare tensor. Say where it goes: steered(lm, vector, layer=...).")
        where, values = layer, vector.float()
    else:
        where = vector.layer if layer is None else layer
        values = torch.from_numpy(vector.values).float()
    applied = operator or Add()
    lm.check_vector(values, where)
    row = values.to(lm.layer_device(where))[None, None, :]  # [1, 1, hidden]
    strength = torch.full((1, 1, 1), float(coefficient), device=row.device)
    with _hook(lm.layers[where], lambda hidden: applied.apply(hidden, row, strength), prepend=True):
        yield


@contextmanager
def capture(lm: LanguageModel, layers: Sequence[int], stop: bool = False) -> Iterator[dict[int, Tensor]]:
    """A dict that holds, after each forward pass, the output of every layer asked for: layer -> [batch, tokens, hidden].

    Values are those after steering. With `stop`, the pass ends after the deepest of them by `StopForwardError`,
    which `LanguageModel.forward` turns into no result.
    """
    taken: dict[int, Tensor] = {}
    deepest = max(layers)

    def reader(layer: int) -> Any:
        def read(hidden: Tensor) -> None:
            taken[layer] = hidden
            if stop and layer == deepest:
                raise StopForwardError

        return read

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_hook(lm.layers[layer], reader(layer), prepend=False))
        yield taken


@contextmanager
def _hook(module: nn.Module, change: Any, prepend: bool) -> Iterator[None]:
    def run(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = change(hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(run, prepend=prepend)
    try:
        yield
    finally:
        handle.remove()
