"""One step of training a small network that makes a vector, through the frozen model, against gradients through all of it.

    python bench/training_step.py
    python bench/training_step.py --device cuda --size 4b

Both take the same hinge on the log-probabilities of pairs of answers, with the vector added at the middle layer. The earlier
way runs the whole model forwards and back, head at every position, its weights asking for gradients as they do when loaded.
Ours computes what is below the layer once, before the steps; a step's time is of the steps alone, and the note says what
came before.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import material
import numpy as np
from extraction_one_layer import pairs
from side_by_side import Arrays, Measured, Side, cosine, main, parser, timed

MARGIN = 1.0


def network(hidden: int, device: str) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, hidden)).to(
        device
    )


def hinge(logprobs: Any) -> Any:
    """Of true and false answers in turn."""
    return (MARGIN - logprobs[0::2] + logprobs[1::2]).clamp(min=0).mean()


def texts(options: argparse.Namespace) -> list[Any]:
    """(question, true, false) of each pair."""
    asked, made = pairs(options)
    names = {question.id: question.text for question in asked}
    return [(names[pair.question], pair.true, pair.false) for pair in made]


def steps(options: argparse.Namespace, hidden: int, logprobs: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Seconds, and the loss of each step with the network's first gradient."""
    import torch

    f, start = network(hidden, options.device), torch.ones(hidden, device=options.device)
    optimizer = torch.optim.AdamW(f.parameters(), lr=1e-3)
    losses, first = [], None

    def step() -> None:
        nonlocal first
        optimizer.zero_grad()
        loss = hinge(logprobs(start + f(start)))
        loss.backward()
        if first is None:
            first = f[0].weight.grad.flatten().float().cpu().numpy().copy()
        optimizer.step()
        losses.append(float(loss))

    step()
    with timed(options.device) as seconds:
        for _ in range(options.steps):
            step()
    return seconds, {"losses": np.array(losses), "gradient": np.asarray(first)}


def ours(options: argparse.Namespace) -> Measured:
    from truthsteer.prompts import PLAIN, Prompts
    from truthsteer.upper import Upper

    lm = material.language_model(options)
    asked = texts(options)
    branches = Prompts(PLAIN, lm.tokenizer, False).branches([q for q, _, _ in asked], [[t, f] for _, t, f in asked])
    with timed(options.device) as before:
        upper = Upper(lm, lm.num_layers // 2, branches)
    seconds, arrays = steps(options, lm.hidden_size, upper.logprobs)
    assert all(parameter.grad is None for parameter in lm.model.parameters()), "a weight of the model has a gradient"
    return Measured(seconds[0], options.steps, arrays, f"; once before, {before[0]:.2f} s")


def earlier(options: argparse.Namespace) -> Measured:
    model, tokenizer = material.transformers_model(options), material.tokenizer(options)
    model.requires_grad_(True)
    tokenizer.padding_side = "right"
    pairs_ = texts(options)
    contexts = [len(tokenizer(f"Q: {q}\nA:").input_ids) for q, _, _ in pairs_ for _ in range(2)]
    written = [f"Q: {q}\nA: {answer}" for q, true, false in pairs_ for answer in (true, false)]
    batch = tokenizer(written, return_tensors="pt", padding=True).to(options.device)
    lengths = batch.attention_mask.sum(1).tolist()
    layer = model.model.layers[model.config.num_hidden_layers // 2]

    def logprobs(added: Any) -> Any:
        import torch

        handle = layer.register_forward_hook(lambda _m, _i, output: output + added.to(output.dtype))
        logits = model(**batch).logits.float()
        handle.remove()
        picked = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        own = [
            picked[row, start - 1 : end - 1].sum()
            for row, (start, end) in enumerate(zip(contexts, lengths, strict=True))
        ]
        return torch.stack(own)

    seconds, arrays = steps(options, model.config.hidden_size, logprobs)
    return Measured(seconds[0], options.steps, arrays)


def check(found: Mapping[str, Arrays]) -> list[str]:
    a, b = found["truthsteer"], found["earlier way"]
    apart = float(np.abs(a["losses"] - b["losses"]).max() / np.abs(b["losses"]).max())
    same = float(cosine(a["gradient"], b["gradient"]))
    assert apart < 1e-3, apart
    assert same > 0.999, same
    return [
        f"losses of all steps within {apart:.1g}, the network's first gradient at cosine {same:.6f}; no weight has one"
    ]


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--pairs", type=int, default=4, help="of a batch")
    typed.add_argument("--steps", type=int, default=5)
    sides = {"truthsteer": Side(ours), "earlier way": Side(earlier, reach=3.0)}
    main(sides, check, typed.parse_args(), "step")
