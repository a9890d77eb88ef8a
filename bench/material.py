"""What benches work on: a model of a real Gemma 3 config with random weights, a tokenizer made on the spot, and questions."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from truthsteer.config import DtypeConfig, Residual, Weights
from truthsteer.data import load_questions
from truthsteer.errors import UserError
from truthsteer.model import LanguageModel
from truthsteer.precision import DTYPES, apply
from truthsteer.records import Question

VOCABULARY = 16_000
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
"""With Gemma's ids."""


def questions(options: argparse.Namespace, count: int | None = None) -> list[Question]:
    """Every n-th question of the file, so that all of it is stood for; all without `count`."""
    try:
        found = load_questions(options.data)
    except UserError as error:
        sys.exit(f"{error} It is --data here.")
    if count is None or count >= len(found):
        return found
    return [found[index * len(found) // count] for index in range(count)]


def tokenizer(options: argparse.Namespace) -> Any:
    """A byte-level BPE of all the file's texts, that puts a beginning-of-sequence token first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    asked = questions(options)
    texts = itertools.chain.from_iterable((q.text, q.best, *q.correct, *q.incorrect) for q in asked)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    pad, eos, bos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unknown, padding_side="left"
    )


def transformers_model(options: argparse.Namespace) -> Any:
    """The plain model of transformers, the same for every side."""
    from gemma3_sizes import random_model

    return random_model(options.size, DTYPES[policy(options).weights], options.device)


def language_model(options: argparse.Namespace) -> LanguageModel:
    """The same, as truthsteer has it."""
    model = transformers_model(options)
    apply(model, policy(options))
    return LanguageModel(model, tokenizer(options))


def policy(options: argparse.Namespace) -> DtypeConfig:
    weights = Weights(options.dtype)
    return DtypeConfig(options.dtype, weights, Residual.fp32 if weights is Weights.fp16 else Residual.same)


def preset(name: str) -> Any:
    """A prompt preset of the configuration."""
    import yaml

    from truthsteer.cli import conf_dir
    from truthsteer.config import PromptConfig

    return PromptConfig(**yaml.safe_load(Path(conf_dir() / "prompt" / f"{name}.yaml").read_text(encoding="utf-8")))
