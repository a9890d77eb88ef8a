"""Every dtype policy, and what else is done against fp16's overflow, against fp32: error, non-finite share, speed, memory.

    python bench/policies.py                                      270m with blown-up norms, on the CPU
    python bench/policies.py --device cuda --size 27b             the whole 27B (fp32 needs 104 GiB: leave it out with
                                                                  --against bf16, or cut the model with --layers 20)

One process per policy and repetition, in the order A B C A B C ..., so that memory is each one's own. All have the same
random weights. Errors are relative, of the residual stream over all real tokens: the worst layer, and the last one.
Not ours, for comparison: `scaled`, the residual stream divided by 64 (huggingface/transformers#37226), `clamp`, every
norm's input and output held at 65504 (#36832), `autocast` of fp16 over fp32 weights. `left` is left padding, `right` is right.
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
from pathlib import Path
from typing import Any

import numpy as np

POLICIES = ("fp32", "bf16", "fp16", "fp16_pure", "scaled", "clamp", "autocast")
SCALE = 64.0
FP16_MAX = 65504.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One policy in this process: times, memory; residual streams into a file."""
    import torch
    from gemma3_sizes import random_model

    from truthsteer.config import DtypeConfig, Residual, Weights
    from truthsteer.precision import DTYPES, apply

    torch.set_num_threads(options.threads)
    name = options.one
    weights = Weights(name) if name in ("fp32", "bf16") else Weights.fp32 if name == "autocast" else Weights.fp16
    policy = DtypeConfig(name, weights, Residual.fp32 if name == "fp16" else Residual.same)
    before = memory(options.device)
    model = random_model(options.size, DTYPES[weights], options.device, options.layers, options.massive)
    apply(model, policy)
    alternative(model, name)
    ids = torch.randint(3, 200_000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(1))
    lengths = torch.linspace(options.tokens // 2, options.tokens, options.rows).long()
    right = torch.arange(options.tokens)[None] < lengths[:, None]
    moved = [int(options.tokens - length) for length in lengths]
    left = torch.stack([row.roll(shift) for row, shift in zip(right, moved, strict=True)])
    moved_ids = torch.stack([row.roll(shift) for row, shift in zip(ids, moved, strict=True)])
    found = {"right": run(model, ids, right, name, options), "left": run(model, moved_ids, left, name, options)}
    times = []
    for _ in range(options.repeats + 1):
        begin = time.perf_counter()
        run(model, ids, torch.ones_like(ids), name, options, keep=False)
        times.append(time.perf_counter() - begin)
    np.savez(options.out, **found)
    return {"policy": name, "seconds": min(times[1:]), "gib": (memory(options.device) - before) / 2**30}


def run(model: Any, ids: Any, mask: Any, name: str, options: argparse.Namespace, keep: bool = True) -> Any:
    """[layers, real tokens, hidden] float32 residual streams, rows one after another."""
    import torch

    taken: list[Any] = []
    real = mask.bool()

    def read(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        taken.append(hidden[real.to(hidden.device)].float().cpu() if keep else None)

    handles = [layer.register_forward_hook(read) for layer in model.model.layers]
    device = torch.device(options.device)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=name == "autocast"):
        model.model(
            input_ids=ids.to(device),
            attention_mask=real.long().to(device),
            position_ids=positions.to(device),
            use_cache=False,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    return np.stack([hidden.numpy() for hidden in taken]) * (SCALE if name == "scaled" else 1.0) if keep else None


def alternative(model: Any, name: str) -> None:
    """What others do against the overflow."""
    import torch
    from torch import nn

    if name == "scaled":
        model.model.embed_tokens.embed_scale.div_(SCALE)
        for layer in model.model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                # (1 + w) / s - 1 is near -1: in fp16 it would lose the digits that matter.
                norm.weight = nn.Parameter((1.0 + norm.weight.float()) / SCALE - 1.0, requires_grad=False)
    if name == "clamp":

        def hold(value: torch.Tensor) -> torch.Tensor:
            return value.clamp(-FP16_MAX, FP16_MAX)

        for module in model.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.register_forward_pre_hook(lambda _m, inputs: (hold(inputs[0]), *inputs[1:]))
                module.register_forward_hook(lambda _m, _i, output: hold(output))
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _m, _i, output: hold(output))


def memory(device: str) -> float:
    """Bytes at the peak so far."""
    import torch

    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def relative(found: Any, reference: Any) -> tuple[float, float]:
    """Worst layer and last layer, over tokens that are finite in both; nan if there are none."""
    errors = []
    for own, wanted in zip(found, reference, strict=True):
        both = np.isfinite(own).all(-1) & np.isfinite(wanted).all(-1)
        own, wanted = own[both].astype(np.float64), wanted[both].astype(np.float64)
        errors.append(np.linalg.norm(own - wanted) / np.linalg.norm(wanted) if both.any() else np.nan)
    return float(np.max(errors)), float(errors[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--massive", type=float, default=30_000.0)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", default="fp32")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    names = list(dict.fromkeys([options.against, *options.policies.split(",")]))
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in names:
                own = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--out", f"{folder}/{name}.npz"]
                done = subprocess.run(own, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                measured[name].append(json.loads(done.stdout.splitlines()[-1]))
        reference = np.load(Path(folder) / f"{options.against}.npz")
        largest = float(np.abs(reference["right"]).max())
        print(f"{options.size}, {options.device}: largest residual {largest:.3g}; against {options.against}")
        base = statistics.median(run["seconds"] for run in measured[options.against])
        heads = ("worst layer", "last layer", "left/right", "not finite")
        print(f"{'policy':10} {' '.join(f'{head:>11}' for head in heads)} {'time':>6} {'GiB':>6}")
        for name in names:
            found = np.load(Path(folder) / f"{name}.npz")
            worst, last = relative(found["right"], reference["right"])
            sides = relative(found["left"], found["right"])[1]
            bad = float((~np.isfinite(found["right"][-1])).any(-1).mean())
            seconds = statistics.median(run["seconds"] for run in measured[name])
            gib = max(run["gib"] for run in measured[name])
            print(
                f"{name:10} {worst:11.2g} {last:11.2g} {sides:11.2g} {bad:11.0%} {seconds / base:6.2f} {gib:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
