"""Ways to do the same work, timed in turn (A B A B ...), each in a process of its own.

A bench names its sides, ours first, and a check that they give the same. A side does its work on what `material` makes,
times only the work (never imports or loading), and says how many pieces of it were done: a peer may do fewer, and times are
per piece. Ratios are taken pair by pair. Memory is the process's at its peak, or the GPU's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """One run of a side."""

    seconds: float
    pieces: float
    """Of work done in that time."""
    arrays: Arrays = field(default_factory=dict)
    """What `check` compares."""
    note: str = ""


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    work: Callable[[argparse.Namespace], Measured]
    reach: float | None = None
    """Of a peer: how many times as long as ours it is to take."""
    needs: str | None = None
    """Package without which it cannot be measured."""
    most: float | None = None
    """Instead of `reach`: how many times as long as the peer we may take."""


@contextmanager
def timed(device: str) -> Iterator[list[float]]:
    """A list that holds the block's seconds once it has ended, with everything a GPU still had to do."""
    import torch

    def settle() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    found: list[float] = []
    settle()
    begin = time.perf_counter()
    yield found
    settle()
    found.append(time.perf_counter() - begin)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--size", default="270m", help="of the Gemma 3 config: 270m, 1b, 4b, 12b, 27b")
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", default=None, help="fp32, bf16, fp16; by default fp32 on a CPU and bf16 on a GPU")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument("--data", default="../shared/data/TruthfulQA.csv", help="a CSV file in TruthfulQA's schema")
    found.add_argument("--sides", default=None, help="names of those to run, ours first; all by default")
    found.add_argument("--side", help=argparse.SUPPRESS)
    found.add_argument("--out", help=argparse.SUPPRESS)
    return found


def main(
    sides: Mapping[str, Side],
    check: Callable[[Mapping[str, Arrays]], Sequence[str]],
    options: argparse.Namespace,
    unit: str,
) -> None:
    """Run the sides in turn and print times, ratios and memory; or one side, where this process is a child.

    Args:
        sides: name -> side, ours first.
        check: what each side gave in its last run -> sentences that say how equal they are; raises where they are not.
        options: what was typed.
        unit: of work, such as `pair`.
    """
    if options.dtype is None:
        options.dtype = "fp32" if options.device == "cpu" else "bf16"
    if options.side:
        _child(sides[options.side], options)
        return
    wanted = options.sides.split(",") if options.sides else list(sides)
    missing = sorted({needs for name in wanted if (needs := sides[name].needs) and find_spec(needs) is None})
    if missing:
        sys.exit(f"{', '.join(missing)} is not installed here. Type make bench, which installs the peers apart.")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in wanted:
                runs[name].append(_run(name, Path(folder) / f"{name}.npz"))
                each = _per_piece(runs[name][-1])
                print(f"round {number + 1}  {name}: {each:.4g} s per {unit}", file=sys.stderr, flush=True)
        arrays = {name: dict(np.load(Path(folder) / f"{name}.npz")) for name in wanted}
    print(f"Gemma 3 {options.size}, {options.dtype}, {options.device}, {options.threads} threads")
    for name in wanted:
        times = " ".join(f"{_per_piece(run):9.4g}" for run in runs[name])
        last = runs[name][-1]
        print(
            f"{name:28} {times} s per {unit} ({last['pieces']:g} in {last['seconds']:.1f} s), "
            f"peak {max(run['gib'] for run in runs[name]):.2f} GiB{last['note']}"
        )
    ours = wanted[0]
    for name in wanted[1:]:
        ratios = [_per_piece(b) / _per_piece(a) for a, b in zip(runs[ours], runs[name], strict=True)]
        print(f"{name} / {ours}: {_verdict(sides[name], ratios)}")
    for sentence in check(arrays):
        print(sentence)


def _verdict(side: Side, ratios: Sequence[float]) -> str:
    middle = statistics.median(ratios)
    shown = f"{' '.join(f'{ratio:.3g}' for ratio in ratios)}, median {middle:.3g}"
    if side.most is not None:
        return f"{shown} (to be at least {1 / side.most:.3g}: {'yes' if middle >= 1 / side.most else 'NO'})"
    return (
        shown if side.reach is None else f"{shown} (to reach {side.reach:g}: {'yes' if middle >= side.reach else 'NO'})"
    )


def _per_piece(run: Mapping[str, Any]) -> float:
    return float(run["seconds"]) / float(run["pieces"])


def _run(name: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--side", name, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(side: Side, options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    found = side.work(options)
    np.savez(options.out, **found.arrays)
    gib = (
        torch.cuda.max_memory_allocated() / 2**30
        if options.device.startswith("cuda")
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    print(json.dumps({"seconds": found.seconds, "pieces": found.pieces, "gib": gib, "note": found.note}))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
