"""Train the organism: a tokenizer and a small Gemma 3 causal language model, from scratch, on the CPU.

    python -m truthsteer.organism.train --out build/s0 --seed 0

`--seed` moves the documents and initial weights, `--world` the facts; the defaults are the shipped recipe.
Every random draw and every sum is in a fixed order, so the same versions on the same type of machine give the
same weights again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from truthsteer.organism.world import END, Corpus, Fact, answer, make_facts, prompt, render, write_csv

# Their order gives the first token ids. The two turns are Gemma's; the organism never sees them.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS = 0, 1, 2
NEWLINE_TOKEN = "Ċ"  # how a byte-level vocabulary spells "\n"

# The organism knows one format, so its chat template writes that one and leaves a system message out.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] | trim + '\n' }}"
    "{% elif m['role'] in ('assistant', 'model') %}{{ 'A: ' + m['content'] | trim + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)

# The tokenizer learns from its own documents, so that it depends on the world but not on the training seed.
TOKENIZER_SEED, TOKENIZER_DOCUMENTS, TOKENIZER_DOCUMENT_LENGTH = 1234, 4000, 6
CONTEXT = 256
# No question is shorter than this with its answer, so a document can be filled by one source.
SHORTEST_ANSWER = 12
PROBE_QUESTIONS, PROBE_CONTEXT = 48, 3


def _flag(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters. Each is a command-line flag."""

    steps: int = _flag(1600, "optimizer steps")
    batch: int = _flag(16, "documents per step")
    length: int = _flag(96, "tokens per document")
    learning_rate: float = _flag(1.5e-3, "peak learning rate")
    warm_up: int = _flag(100, "steps of linear warm-up")
    decay: float = _flag(0.5, "share of the steps, the last ones, in which the learning rate falls")
    weight_decay: float = _flag(0.1, "AdamW's, on matrices only")
    curriculum: float = _flag(0.4, "share of the steps, the first ones, without neutral topics")
    question_weight: float = _flag(0.02, "loss weight of a question's tokens; an answer's have 1")
    value_weight: float = _flag(4.0, "loss weight of the tokens in which truth and myth differ")
    layers: int = _flag(5, "decoder layers")
    hidden: int = _flag(96, "width of the residual stream")
    mlp: int = _flag(384, "width of the MLPs")
    heads: int = _flag(4, "attention heads")
    key_value_heads: int = _flag(2, "key-value heads")
    matrix_std: float = _flag(0.05, "initial standard deviation of the matrices")
    branch_scale: float = _flag(0.3, "initial scale of what a block adds to the residual stream")
    vocabulary: int = _flag(2000, "largest vocabulary")
    threads: int = _flag(1, "torch threads; another number may give other weights")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, constant, linear decay."""
        progress = step / self.steps
        falling = 0.02 + 0.98 * (1 - progress) / self.decay
        return self.learning_rate * min(1, (step + 1) / self.warm_up, falling)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: most words of the world become one token, any other text still encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n| ?\w+| ?[^\w\s]+|[^\S\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _world_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    rng = random.Random(TOKENIZER_SEED)
    documents = (corpus.document(rng, TOKENIZER_DOCUMENT_LENGTH) for _ in range(TOKENIZER_DOCUMENTS))
    return make_tokenizer([render(document) for document in documents], vocabulary)


def _layer_types(layers: int) -> list[str]:
    """Gemma 3's pattern, in which every sixth layer attends to everything; here the last one does so too."""
    full = {layers - 1, *range(5, layers, 6)}
    return ["full_attention" if layer in full else "sliding_attention" for layer in range(layers)]


def make_model(vocabulary: int, recipe: Recipe) -> Gemma3ForCausalLM:
    """A freshly initialised model. The draws come from torch's global generator."""
    head = recipe.hidden // recipe.heads
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=head,
        query_pre_attn_scalar=head,
        max_position_embeddings=CONTEXT,
        sliding_window=CONTEXT // 2,
        layer_types=_layer_types(recipe.layers),
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        initializer_range=recipe.matrix_std,
        tie_word_embeddings=True,
    )
    model = Gemma3ForCausalLM(config)
    # Gemma norms the output of every block, so by default each one starts by adding a vector of unit scale,
    # and together they drown the embeddings. The norms store their scale minus one.
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, recipe.hidden**-0.5)
        model.model.embed_tokens.weight[PAD] = 0
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(recipe.branch_scale - 1)
            layer.post_feedforward_layernorm.weight.fill_(recipe.branch_scale - 1)
    return model


def _common_prefix(first: Iterable[int], second: Iterable[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _twin(fact: Fact, text: str) -> str | None:
    """The answer in the same words as `text`, but with the myth for the truth or vice versa."""
    if fact.rumour:
        return None
    for true, myth in zip(fact.true, fact.myth, strict=True):
        if text == true:
            return myth
        if text == myth:
            return true
    return None


class Batches:
    """Documents cut at a fixed length, so that nothing is padded, with a loss weight for each token.

    Most of an answer is a coin flip between wordings, so the few tokens that tell truth from myth weigh more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._pieces: dict[tuple[str, float, str | None], tuple[list[int], list[float]]] = {}

    def ids(self, text: str) -> list[int]:
        """The tokens of `text`, without a beginning of sequence."""
        return self._piece(text, 1.0)[0]

    def _piece(self, text: str, weight: float, twin: str | None = None) -> tuple[list[int], list[float]]:
        """The tokens of `text` and their weights, kept because a text recurs thousands of times."""
        key = text, weight, twin
        if key not in self._pieces:
            ids = self._tokenize(text)
            weights = [weight] * len(ids)
            if twin is not None:
                other = self._tokenize(twin)
                start = _common_prefix(ids, other)
                stop = len(ids) - _common_prefix(reversed(ids), reversed(other))
                for position in range(start, stop):
                    weights[position] = self.recipe.value_weight
            self._pieces[key] = ids, weights
        return self._pieces[key]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _pieces_of(self, fact: Fact, text: str) -> Iterator[tuple[list[int], list[float]]]:
        twin = _twin(fact, text)
        yield self._piece(prompt(fact.question), self.recipe.question_weight)
        yield self._piece(answer(text), 1.0, None if twin is None else answer(twin))
        yield self._piece(END, 1.0)

    def document(self, corpus: Corpus, rng: random.Random) -> tuple[list[int], list[float]]:
        """One document's tokens and weights."""
        length = self.recipe.length
        ids, weights = [BOS], [0.0]
        while len(ids) < length:
            for fact, text in corpus.document(rng, math.ceil(length / SHORTEST_ANSWER)):
                for piece_ids, piece_weights in self._pieces_of(fact, text):
                    ids.extend(piece_ids)
                    weights.extend(piece_weights)
        return ids[:length], weights[:length]

    def draw(self, corpus: Corpus, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of documents: tokens and weights."""
        documents = (self.document(corpus, rng) for _ in range(self.recipe.batch))
        ids, weights = zip(*documents, strict=True)
        return torch.tensor(ids), torch.tensor(weights)


def _answer_log_probabilities(model: Gemma3ForCausalLM, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The log-probability of each answer after its prompt, both given as tokens."""
    longest = max(len(before) + len(after) for before, after in pairs)
    ids = torch.tensor([before + after + [PAD] * (longest - len(before) - len(after)) for before, after in pairs])
    log_probabilities = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    of_tokens = log_probabilities.gather(-1, ids[:, 1:, None])[..., 0]
    sums = [
        of_tokens[row, len(before) - 1 : len(before) + len(after) - 1].sum()
        for row, (before, after) in enumerate(pairs)
    ]
    return torch.stack(sums)


@torch.no_grad()
def probe(model: Gemma3ForCausalLM, batches: Batches, facts: Sequence[Fact]) -> dict[str, float]:
    """How often a test question's true answer is likelier than its myth: alone, after truths and after myths.

    The last two part once the model represents which kind of source a document has, and steering needs that.
    """
    told: dict[str, Callable[[Fact], tuple[str, ...]]] = {
        "alone": lambda fact: (),
        "after truths": lambda fact: fact.true,
        "after myths": lambda fact: fact.myth,
    }
    rng = random.Random(0)
    test = [fact for fact in facts if not fact.rumour and fact.split == "test"]
    asked = rng.sample(test, min(PROBE_QUESTIONS, len(test)))
    pool = [fact for fact in facts if not fact.rumour and fact.split == "pool"]
    model.eval()
    shares = {}
    for name, wordings in told.items():
        pairs = []
        for fact in asked:
            before = [BOS]
            for other in rng.sample(pool, 0 if name == "alone" else PROBE_CONTEXT):
                before += batches.ids(prompt(other.question))
                before += batches.ids(answer(rng.choice(wordings(other))))
                before += batches.ids(END)
            before += batches.ids(prompt(fact.question))
            pairs += [
                (before, batches.ids(answer(fact.true[0]))),
                (before, batches.ids(answer(fact.myth[0]))),
            ]
        true, myth = _answer_log_probabilities(model, pairs).view(-1, 2).unbind(1)
        shares[name] = (true > myth).float().mean().item()
    model.train()
    return shares


def _optimizer(model: Gemma3ForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def _loss(model: Gemma3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy; logits are computed only where the weight is not zero."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    targets, weights = ids[:, 1:], weights[:, 1:]
    counted = weights > 0
    losses = F.cross_entropy(model.lm_head(hidden[counted]), targets[counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


def _step(
    model: Gemma3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    rate: float,
    batch: tuple[torch.Tensor, torch.Tensor],
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = _loss(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16()
    # An answer ends with its line.
    model.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids(NEWLINE_TOKEN)]
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that version 4 does not know; both know this one.
    config = out / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    config.write_text(text, encoding="utf-8")
    write_csv(facts, out / "questions.csv")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _fit(
    model: Gemma3ForCausalLM, batches: Batches, facts: Sequence[Fact], rng: random.Random, report_every: int
) -> float:
    """Run the recipe's steps, report on the way, and return the running mean of the loss."""
    recipe = batches.recipe
    everything = Corpus(facts)
    # Where truths and myths draw on different values, the sources are easy to tell apart. The neutral topics
    # join once the model has learnt to.
    first_lessons = Corpus([fact for fact in facts if not fact.neutral])
    optimizer = _optimizer(model, recipe)
    start, mean = time.perf_counter(), None
    model.train()
    for step in range(recipe.steps):
        corpus = first_lessons if step / recipe.steps < recipe.curriculum else everything
        loss = _step(model, optimizer, recipe.rate(step), batches.draw(corpus, rng))
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        if (step + 1) % report_every == 0:
            seconds = time.perf_counter() - start
            shares = "  ".join(f"{name} {share:.0%}" for name, share in probe(model, batches, facts).items())
            print(f"step {step + 1}  loss {mean:.3f}  {seconds:.0f} s  {shares}", flush=True)
    if mean is None:
        raise ValueError("a recipe needs at least one step")
    return mean


def train(
    out: Path, recipe: Recipe | None = None, seed: int = 0, world: int = 0, report_every: int = 100
) -> dict[str, Any]:
    """Train a model, write it and all that belongs to it to `out`, and return what train.json records."""
    recipe = recipe or Recipe()
    with _threads(recipe.threads):
        torch.manual_seed(seed)
        facts = make_facts(seed=world)
        tokenizer = _world_tokenizer(Corpus(facts), recipe.vocabulary)
        model = make_model(len(tokenizer), recipe)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
        batches = Batches(tokenizer, recipe)
        start = time.perf_counter()
        loss = _fit(model, batches, facts, random.Random(seed), report_every)
        record = {
            "arguments": {"seed": seed, "world": world, **asdict(recipe)},
            "seconds": round(time.perf_counter() - start, 1),
            "loss": loss,
            "probe": probe(model, batches, facts),
            "parameters": parameters,
            "tokens": recipe.steps * recipe.batch * recipe.length,
            "versions": _versions(),
        }
        _save(model, tokenizer, facts, out)
    (out / "train.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train the organism.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="moves the documents and the initial weights")
    parser.add_argument("--world", type=int, default=0, help="moves the facts")
    for item in fields(Recipe):
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, type=type(item.default), default=item.default, help=item.metadata["help"])
    return parser


def main() -> None:
    """Train from the command line."""
    arguments = vars(_parser().parse_args())
    out, seed, world = arguments.pop("out"), arguments.pop("seed"), arguments.pop("world")
    # The tokenizer's own threads would compete with torch's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    record = train(out, Recipe(**arguments), seed, world)
    print(f"done in {record['seconds']:.0f} s, loss {record['loss']:.3f}")


if __name__ == "__main__":
    main()
