"""The layers above a steered one, as a differentiable function of what is added there.

What trains through a frozen model changes nothing below the layer it steers: that part is computed once, kept, and never
run again. No weight of the model gets a gradient; logits are computed at the positions that are asked for. The function is
that of `scoring` under addition at every position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from truthsteer.hooks import capture
from truthsteer.model import LanguageModel
from truthsteer.prompts import Branch


class Upper:
    """Answers in their contexts, known up to the output of one layer.

    Args:
        lm: the model.
        layer: decoder layer to whose output something is added.
        branches: contexts with the answers whose log-probabilities are wanted.

    Attributes:
        rows: (branch, continuation) of each row.

    Raises:
        UserError: there is no such layer.
    """

    def __init__(self, lm: LanguageModel, layer: int, branches: Sequence[Branch]) -> None:
        lm.check_layer(layer)
        self._lm, self._layer = lm, layer
        self.rows = [
            (place, index) for place, branch in enumerate(branches) for index in range(len(branch.continuations))
        ]
        texts = [branches[place].context + branches[place].continuations[index] for place, index in self.rows]
        self._ids, _ = lm.pad(texts)  # on the right, where nothing real sees it
        kinds: list[bool] = []
        watched = lm.layers[layer].register_forward_hook(lambda _m, _i, output: kinds.append(isinstance(output, tuple)))
        with capture(lm, [layer], stop=True) as taken:
            lm.forward(self._ids)
        watched.remove()
        self._below, self._tuples = taken[layer], kinds[0]  # [rows, tokens, hidden]
        starts = [len(branches[place].context) for place, _ in self.rows]
        answered = [(row, column) for row, text in enumerate(texts) for column in range(starts[row] - 1, len(text) - 1)]
        self._row = torch.tensor([row for row, _ in answered])
        self._column = torch.tensor([column for _, column in answered])

    def logprobs(self, added: Tensor) -> Tensor:
        """log p of each row's answer, [rows] float32, with a gradient for `added`.

        Args:
            added: [hidden], or [rows, hidden] for each row its own; at every position.
        """
        own = added if added.ndim == 1 else added[:, None]
        hidden = self._below + own.to(self._below)
        with _from(self._lm, self._layer, hidden, self._tuples):
            final = self._lm.decoder(input_ids=self._ids, use_cache=False).last_hidden_state
        row, column = self._row.to(final.device), self._column.to(final.device)
        head: nn.Module = self._lm.model.get_output_embeddings()
        logits = self._lm.capped(head(final[row, column]).float())  # [answered, vocabulary]
        targets = self._ids[self._row.to(self._ids.device), self._column.to(self._ids.device) + 1].to(logits.device)
        picked = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return torch.zeros(len(self.rows), device=picked.device).index_add(0, row.to(picked.device), picked)


@contextmanager
def _from(lm: LanguageModel, layer: int, hidden: Tensor, tuples: bool) -> Iterator[None]:
    """Passes that begin with `hidden` as the output of `layer`: that layer and those below it are not run."""

    def skipped(states: Tensor, *_: Any, **__: Any) -> Any:
        return (states,) if tuples else states

    def given(*_: Any, **__: Any) -> Any:
        return skipped(hidden)

    with ExitStack() as stack:
        for number in range(layer + 1):
            stack.enter_context(_forward(lm.layers[number], given if number == layer else skipped))
        yield


@contextmanager
def _forward(module: nn.Module, replaced: Any) -> Iterator[None]:
    """The module with another `forward`, and with what it had again afterwards (accelerate puts its own there)."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = replaced
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
