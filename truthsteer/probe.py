"""What one forward pass computes, point by point: the largest number of every token, and where numbers stop being finite.

Hooks take one maximum per point and token and never wait for the device; everything is fetched once, at the end. The two
residual adds of a layer are not modules: they are read where their sums arrive, and blamed when what they add is finite.
A point that the model does not pass through (fused kernels, other names) is listed as missing. Attention scores are never
seen: under eager attention a bound on them is read from queries and keys.

It knows token ids and masks, no texts. Hooks see nothing inside a compiled model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.numerics import FINITE_MAX
from truthsteer.operators import Add, Operator
from truthsteer.points import OUTSIDE, place
from truthsteer.reading import Peak, Point, Reading, cause

HAND_OVER = "norm_in"
"""What the first norm of a layer is given: the same numbers as the layer, unless moving them to its device broke them."""

LOGITS_PER_STEP = 1 << 24
"""Logits held at once."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Probe:
    """Hooks for one forward pass of a padded batch; `reading()` afterwards.

    Args:
        lm: the model.
        mask: [batch, tokens], 1 for real tokens.
        steered: a layer that a `RowSteering` entered before this changes: its output is then read before and after.
    """

    def __init__(self, lm: LanguageModel, mask: Tensor, steered: int | None = None) -> None:
        self._lm = lm
        self._steered = steered
        self._real = mask.bool().cpu()
        self._first = self._real.int().argmax(1)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._points: list[Point] = []
        self._largest: list[Tensor] = []
        self._peaks: list[tuple[int, int, Tensor]] = []  # layer, number of the point, (token, channel) on its device
        self._starts: dict[int, Tensor] = {}
        self._differ: dict[int, list[Tensor]] = {}
        self._expected: set[tuple[int, str]] = set()
        self._seen: set[tuple[int, str]] = set()
        self._stream: Tensor | None = None  # what the layer before put out, or the embedding did
        self._given: Tensor | None = None  # what the present layer was given
        self._queries = torch.zeros(0)  # [batch, tokens] length of the present layer's longest query
        self._eager = lm.text_config._attn_implementation == "eager"

    def __enter__(self) -> Probe:
        with ExitStack() as stack:
            self._stack = stack
            self._put(self._lm.decoder.embed_tokens, -1, "embed")
            for number, layer in enumerate(self._lm.layers):
                self._enter_layer(number, layer)
            self._get(self._lm.decoder.norm, self._lm.num_layers, HAND_OVER)
            self._put(self._lm.decoder.norm, self._lm.num_layers, "final_norm")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _enter_layer(self, number: int, layer: nn.Module) -> None:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        after_mlp = getattr(layer, "post_feedforward_layernorm", None)  # Gemma 2 and 3
        sandwich = after_mlp is not None
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        self._get(layer, number, "resid_in")
        self._get(getattr(layer, "input_layernorm", None), number, HAND_OVER)
        self._get(attention, number, "attn_in")
        for name in ("q", "k", "v"):
            self._put(getattr(attention, f"{name}_proj", None), number, name)
        for name in ("q", "k"):
            norm = getattr(attention, f"{name}_norm", None)
            if norm is not None:  # Gemma 3, Qwen 3
                self._put(norm, number, f"{name}_normed")
        self._get(getattr(attention, "o_proj", None), number, "attn_ctx")
        self._put(attention, number, "attn_out")
        if sandwich:
            self._put(getattr(layer, "post_attention_layernorm", None), number, "attn_normed")
            self._put(after_mlp, number, "mlp_normed")
        self._get(getattr(layer, before_mlp, None), number, "resid_mid")
        self._get(mlp, number, "mlp_in")
        for name in ("gate", "up"):
            self._put(getattr(mlp, f"{name}_proj", None), number, f"mlp_{name}")
        self._get(getattr(mlp, "down_proj", None), number, "mlp_act")
        self._put(mlp, number, "mlp_out")
        if number == self._steered:
            self._put(layer, number, "resid_add", prepend=True)
        self._put(layer, number, "resid_out")

    def _get(self, module: nn.Module | None, layer: int, name: str) -> None:
        """Read what goes into a module, before its device is seen to."""
        self._expected.add((layer, name))
        if module is None:
            return

        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._take(layer, name, inputs[0] if inputs else named.get("hidden_states"))

        self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _put(self, module: nn.Module | None, layer: int, name: str, prepend: bool = False) -> None:
        """Read what comes out of a module."""
        self._expected.add((layer, name))
        if module is None:
            return

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._take(layer, name, output[0] if isinstance(output, tuple) else output)

        self._stack.callback(module.register_forward_hook(hook, prepend=prepend).remove)

    def _take(self, layer: int, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or not self._fits(value) or (layer, name) in self._seen:
            return
        value = value.detach()
        self._seen.add((layer, name))
        if name in ("resid_in", HAND_OVER):
            before = self._stream if name == "resid_in" or layer == self._lm.num_layers else self._given
            self._given = value
            if before is not None and _same(value, before):
                return  # read already
            if before is not None:
                self._differ.setdefault(layer, []).append(_differ(before, value))
        self._add(layer, name, value, self._by_token(value.abs().amax(-1)))  # NaN and infinity pass through
        if self._eager and name in ("q", "k", "q_normed", "k_normed"):
            self._bound_scores(layer, name, value)
        if name in ("resid_mid", "resid_out"):
            self._peaks.append((layer, len(self._points) - 1, self._peak(value, self._largest[-1])))
        if name in ("embed", "resid_out"):
            self._stream = value
        if name == "resid_out":
            _, first = self._place(value.device)
            self._starts[layer] = value[torch.arange(len(value), device=value.device), first]

    def _add(self, layer: int, name: str, value: Tensor, largest: Tensor) -> None:
        self._points.append(Point(layer, name, str(value.dtype).removeprefix("torch."), str(value.device)))
        self._largest.append(largest.float())

    def _fits(self, value: Tensor) -> bool:
        """Whether it has the batch's tokens: [batch, tokens, ...], or [batch, heads, tokens, head_dim]."""
        batch, tokens = self._real.shape
        return len(value) == batch and tokens in (value.shape[1], value.shape[2] if value.ndim == 4 else -1)

    def _by_token(self, largest: Tensor) -> Tensor:
        """The largest over heads, where there are heads: [batch, tokens]."""
        if largest.ndim == 2:
            return largest
        return largest.amax(1 if largest.shape[2] == self._real.shape[1] else 2)

    def _bound_scores(self, layer: int, name: str, value: Tensor) -> None:
        """|query| times the longest key bounds every score of a token, before it is scaled; rotation changes neither."""
        attention: Any = self._lm.layers[layer].self_attn
        if name in ("q", "k") and hasattr(attention, f"{name}_norm"):
            return  # what the norm puts out is what is multiplied
        heads = value if value.ndim == 4 else value.unflatten(-1, (-1, attention.head_dim))
        length = self._by_token(heads.float().norm(dim=-1))  # [batch, tokens]
        if name[0] == "q":
            self._queries = length
            return
        real, _ = self._place(value.device)
        longest = torch.where(real, length, 0.0).amax(1, keepdim=True)
        self._add(layer, "attn_scores", value, self._queries.to(value.device) * longest)

    @torch.no_grad()
    def read_logits(self, hidden: Tensor) -> None:
        """Read the head too, at real tokens, after a pass whose final hidden states are [batch, tokens, hidden]."""
        head = self._lm.model.get_output_embeddings()
        rows, columns = self._real.nonzero(as_tuple=True)
        states = hidden[rows.to(hidden.device), columns.to(hidden.device)]  # [real tokens, hidden]
        largest = torch.zeros(self._real.shape)
        step = max(1, LOGITS_PER_STEP // self._lm.text_config.vocab_size)
        for first in range(0, len(states), step):
            part = slice(first, first + step)
            logits = head(states[part])
            largest[rows[part], columns[part]] = logits.abs().amax(-1).float().cpu()
        self._add(self._lm.num_layers, "logits", logits, largest)

    def _peak(self, value: Tensor, largest: Tensor) -> Tensor:
        """The place of the largest finite number: token and channel, [2], without waiting for either."""
        real, _ = self._place(value.device)
        token = torch.where(real & (largest <= FINITE_MAX), largest, -1.0).flatten().argmax()
        row = value.reshape(-1, value.shape[-1]).index_select(0, token[None])[0]
        return torch.stack([token, row.abs().argmax()])

    def _place(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mask and each row's first real token, on a device."""
        if device not in self._on:
            self._on[device] = self._real.to(device), self._first.to(device)
        return self._on[device]

    def reading(self) -> Reading:
        """What the pass computed."""
        largest = torch.stack(_fetch(self._largest))
        found = _fetch([peak for _, _, peak in self._peaks])
        peaks: dict[int, Peak] = {}
        for (layer, index, _), peak in zip(self._peaks, found, strict=True):
            row, column = divmod(int(peak[0]), self._real.shape[1])
            value = float(largest[index, row, column])
            usable = bool(self._real[row, column]) and value <= FINITE_MAX
            if usable and (layer not in peaks or value > peaks[layer].value):
                peaks[layer] = Peak(value, row, column, int(peak[1]))
        starts = [start.float() for start in _fetch([self._starts[layer] for layer in sorted(self._starts)])]
        return Reading(
            tuple(self._points),
            largest,
            self._real,
            peaks,
            torch.stack(starts) if starts else torch.zeros(0, len(self._real), self._lm.hidden_size),
            tuple(layer for layer, found in sorted(self._differ.items()) if any(bool(differ) for differ in found)),
            self._missing(),
        )

    def _missing(self) -> tuple[str, ...]:
        absent: dict[str, list[int]] = {}
        for layer, name in sorted(self._expected - self._seen):
            absent.setdefault(name, []).append(layer)
        count = self._lm.num_layers
        return tuple(
            name if len(layers) >= count or name in OUTSIDE else f"{name} of layers {layers}"
            for name, layers in absent.items()
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, so that nothing need be compared."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _differ(given: Tensor, arrived: Tensor) -> Tensor:
    """Whether any bit changed on the way; through the host where the two stand on different devices."""
    if given.dtype != arrived.dtype:
        return torch.tensor(True)
    if given.device != arrived.device:
        given, arrived = given.cpu(), arrived.cpu()
    bits = _BITS[given.element_size()]
    return (given.contiguous().view(bits) != arrived.contiguous().view(bits)).any()


def _fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape onto the host, in one copy per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        found |= dict(zip(members, torch.stack([tensors[index] for index in members]).cpu(), strict=True))
    return [found[index] for index in range(len(tensors))]


@contextmanager
def probing(
    lm: LanguageModel, mask: Tensor, injection: Injection | None = None, operator: Operator | None = None
) -> Iterator[Probe]:
    """A probe around forward passes whose rows are all steered by `injection`, if there is one."""
    with ExitStack() as stack:
        if injection is not None:
            steering = stack.enter_context(RowSteering(lm, [injection], operator or Add()))
            steering.assign(torch.zeros(len(mask), dtype=torch.long))
        yield stack.enter_context(Probe(lm, mask, None if injection is None else injection.layer))


def diagnose(
    lm: LanguageModel, ids: Sequence[int], injection: Injection | None = None, operator: Operator | None = None
) -> str:
    """Where the numbers of one text are first not finite.

    Args:
        lm: the model.
        ids: its token ids.
        injection: what steers it.
        operator: how; addition by default.

    Returns:
        One sentence; "" if all numbers are finite in a pass of this text alone, up to the logits.
    """
    row, mask = lm.pad([ids])
    with probing(lm, mask, injection, operator) as probe:
        hidden = lm.forward(row)
        assert hidden is not None
        probe.read_logits(hidden)
        spot = probe.reading().first()
    if spot is None:
        return ""
    return (
        f"The numbers are first not finite at {_where(spot.point, injection)} (token {spot.column} "
        f"{lm.tokenizer.decode([ids[spot.column]])!r}): {cause(spot)}."
    )


def _where(point: Point, injection: Injection | None) -> str:
    return place(point.name, point.layer, injection is not None and injection.layer == point.layer)
