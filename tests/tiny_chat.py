"""Tiny chat models in folders: random weights on the organism's tokenizer, whose replies mean nothing.

For plumbing: what is asked, batched, loaded, freed and counted. `leaning` ones have a liking for some next tokens,
whatever they are asked, so that every status can be reached with a real forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from truthsteer.organism import WEIGHTS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""In the manner of Gemma: no system role."""

VOCABULARY = 1728
"""The organism's tokenizer has 1714; the rest is for tokens that a test adds."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tokenizer(template: str | None = CHAT_TEMPLATE) -> Any:
    """The organism's tokenizer with a chat template of turns, or with none."""
    made = AutoTokenizer.from_pretrained(WEIGHTS)
    made.chat_template = template
    return made


def letter_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that " yes" and " no" begin with the same one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    inner = Tokenizer(models.BPE({piece: place for place, piece in enumerate([*specials, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=template,
    )


def random_chat(folder: Path, tokens: Any = None, seed: int = 0, window: int = 48) -> Path:
    """A random Gemma 3 (a sliding and a full layer) with its tokenizer; about 0.1 million parameters."""
    torch.manual_seed(seed)
    kinds = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=window, query_pre_attn_scalar=8, layer_types=kinds)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)  # logits that are not flat
    return _save(model, tokens or tokenizer(), folder)


def leaning_chat(folder: Path, likes: Mapping[str, float], tokens: Any = None) -> Path:
    """A random Qwen 2 whose logits of some tokens (in the vocabulary's spelling) are about `likes` above the others'."""
    torch.manual_seed(0)
    tokens = tokens or tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 100.0  # one channel that says the same of every text
        model.lm_head.weight[:, 0] = 0.0
        for name, value in likes.items():
            model.lm_head.weight[tokens.convert_tokens_to_ids(name), 0] = value / SIZES["hidden_size"] ** 0.5
    return _save(model, tokens, folder)


def sharded(folder: Path) -> Path:
    """The same checkpoint in several files with an index."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def _save(model: Any, tokens: Any, folder: Path) -> Path:
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
