"""When a GPU's memory runs out: the same work in halves, and one sentence where there is nothing left to halve.

Estimates and `batch_tokens` bound what is computed at once, but other programs take memory too. It knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from truthsteer.errors import UserError

log = logging.getLogger("truthsteer")

T = TypeVar("T")
R = TypeVar("R")


def in_halves(work: Callable[[T], list[R]], batch: T, halves: Callable[[T], Sequence[T]]) -> list[R]:
    """What `work` makes of a batch, or of its halves one after the other if memory does not suffice for the whole.

    Args:
        work: may be called again for what it has already begun.
        batch: to work on.
        halves: of a batch; empty if there are none.

    Raises:
        UserError: memory does not suffice even for the smallest part.
    """
    try:
        return work(batch)
    except torch.OutOfMemoryError as error:
        parts = halves(batch)
        if not parts:
            raise UserError(
                "The GPU's memory does not suffice for a single text. Type a smaller model, dtype=int8 or dtype=int4, a "
                "smaller generation.max_new_tokens, or use more GPUs."
            ) from error
    # Outside the handler, whose traceback holds the tensors of the pass that failed.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log.warning("The GPU's memory ran out: going on with half a batch. A smaller batch_tokens avoids the second try.")
    return [result for part in parts for result in in_halves(work, part, halves)]
