"""A tiny Gemma 3 with random weights that are the same everywhere and for ever: the golden file's model.

Five layers of both attention kinds, a sliding window of 64 tokens (below the length of every six-shot prompt,
so a wrong mask shows) and the organism's tokenizer. The weights come from NumPy's legacy generator, whose
stream is frozen; uniform draws need no transcendental function, so they are equal to the last bit everywhere.
Their scale gives logits with a standard deviation of about 1.3, and answers that depend on the whole prompt.

A test in `tests/` imports it with `from golden.model import save`: pytest puts `tests/` on the path (its
default import mode), where this folder is a namespace package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

TOKENIZER = Path(__file__).resolve().parents[2] / "truthsteer" / "organism" / "weights"
SEED = 7  # of 1 to 12, the one under which steering changes the most MC1 verdicts, in both directions
HIDDEN = 64
CONTEXT = 1024
SLIDING_WINDOW = 64
SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = [SLIDING, FULL, SLIDING, SLIDING, FULL]

# Standard deviations. A norm's weight is its scale minus one, and 0.3 moves every channel differently.
NORM_STD = 0.3
EMBEDDING_STD = 0.15


def build() -> Gemma3ForCausalLM:
    """The model in float32, on the CPU, in evaluation mode. Its tied embedding is drawn once."""
    config = Gemma3TextConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(TOKENIZER)),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=len(LAYER_TYPES),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=CONTEXT,
        sliding_window=SLIDING_WINDOW,
        layer_types=LAYER_TYPES,
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    model = Gemma3ForCausalLM(config).float().eval().requires_grad_(False)
    random = np.random.RandomState(SEED)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:
            std = NORM_STD
        elif name.endswith("embed_tokens.weight"):
            std = EMBEDDING_STD
        else:
            std = weight.shape[1] ** -0.5  # [out, in]: keeps a unit-variance input at unit variance
        draw = (2 * random.random_sample(tuple(weight.shape)) - 1) * (3**0.5 * std)
        weight.copy_(torch.from_numpy(draw.astype(np.float32)))
    return model


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of all weights in the order of their names: is this the model the golden file was made with?"""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def save(folder: Path | str) -> Path:
    """Write model and tokenizer into `folder`, loadable with `from_pretrained`; returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.model_max_length = CONTEXT  # the organism's own prompts are shorter than six shots
    tokenizer.save_pretrained(folder)
    build().save_pretrained(folder)
    return Path(folder)
