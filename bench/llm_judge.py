"""Verdicts of the LLM judge, against the way of the system that users come from: 128 tokens of JSON, one answer at a time.

    python bench/llm_judge.py
    python bench/llm_judge.py --device cuda --size 4b --verdicts 1000 --peer-verdicts 20

Ours asks twice per verdict, with the lists exchanged, and reads the probability of "1" at one position; the earlier way asks
once and writes. Random weights write no JSON and never stop, so the earlier way writes all of its 128 tokens; where a judge
stops after ten, a verdict takes it about an eighth as long, less what reading the prompt takes. The probability at that
position is compared with that of the plain model, one text at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import material
import numpy as np
from side_by_side import Arrays, Measured, Side, main, parser, timed

ANSWERS = 8
"""To each question: those of as many conditions."""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


def answers(options: argparse.Namespace, count: int) -> tuple[list[Any], list[str]]:
    """Questions with 8 answers each, as many conditions give them: the question's own references, again with another end."""
    asked, texts = [], []
    for question in material.questions(options):
        own = [answer for answer, _ in question.choices]
        for place in range(ANSWERS):
            asked.append(question)
            texts.append(own[place % len(own)] + " I think so." * (place // len(own)))
        if len(asked) >= count:
            break
    return asked[:count], texts[:count]


def ours(options: argparse.Namespace) -> Measured:
    from truthsteer import judge_model
    from truthsteer.judges.llm import Llm

    lm = material.language_model(options)
    lm.tokenizer.chat_template = TEMPLATE
    judge_model.acquire = lambda spec: lm  # what the bench has made, and not what a hub id names
    judge = Llm(model="random/weights", aspects=("true",), batch_tokens=options.batch_tokens)
    asked, texts = answers(options, options.verdicts)
    judge.judge(asked[:2], texts[:2])
    with timed(options.device) as seconds:
        verdicts = []
        for first in range(0, len(asked), judge.rows_at_once):  # as a run hands them over
            part = slice(first, first + judge.rows_at_once)
            verdicts += judge.judge(asked[part], texts[part])
    assert len(verdicts) == len(asked)
    return Measured(seconds[0], len(verdicts), {"logprobs": np.array(read(options, lm))})


def read(options: argparse.Namespace, lm: Any) -> list[tuple[float, ...]]:
    """The judge's own reading of the peer's answers, all in one batch."""
    from truthsteer.judges.reading import next_logprobs

    return next_logprobs(lm, branches(options, lm.tokenizer), options.batch_tokens)


def branches(options: argparse.Namespace, tokenizer: Any) -> list[Any]:
    """What the judge asks of the peer's answers, in one of its two orders."""
    from truthsteer.judges.llm import _branches, _decision, _which_list
    from truthsteer.judges.quoting import chat_prompts

    tokenizer.chat_template = TEMPLATE
    prompts, quote = chat_prompts(tokenizer)
    asked, texts = answers(options, options.peer_verdicts)
    contexts = [_which_list(quote, question, text, False) for question, text in zip(asked, texts, strict=True)]
    return [_decision(branch, "random/weights") for branch in _branches(prompts, contexts)]


def earlier(options: argparse.Namespace) -> Measured:
    import torch

    model, tokenizer = material.transformers_model(options), material.tokenizer(options)
    asked = branches(options, tokenizer)
    found = []
    with torch.no_grad():
        for branch in asked:
            logits = model(torch.tensor([branch.context], device=options.device)).logits[0, -1].float().log_softmax(-1)
            found.append([float(logits[token]) for (token,) in branch.continuations])
        with timed(options.device) as seconds:
            for branch in asked:
                ids = torch.tensor([branch.context], device=options.device)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=128,
                    do_sample=False,
                    pad_token_id=0,
                )
                tokenizer.decode(out[0, ids.shape[1] :])
    return Measured(seconds[0], len(asked), {"logprobs": np.array(found)})


def check(found: Mapping[str, Arrays]) -> list[str]:
    apart = float(np.abs(found["truthsteer"]["logprobs"] - found["earlier way"]["logprobs"]).max())
    assert apart < 1e-3, apart
    return [f"log-probabilities of the two replies within {apart:.1g} of the plain model's"]


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--verdicts", type=int, default=100)
    typed.add_argument("--peer-verdicts", type=int, default=3)
    typed.add_argument("--batch-tokens", type=int, default=8192)
    sides = {"truthsteer": Side(ours), "earlier way": Side(earlier, reach=30.0)}
    main(sides, check, typed.parse_args(), "verdict")
