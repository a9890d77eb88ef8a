"""truthsteer: steer language models toward truthfulness, and measure honestly whether it worked.

In a notebook, without Hydra:

    from truthsteer import LanguageModel, estimate, extract, generate, load_questions, steered

    lm = LanguageModel.load("organism")
    questions = load_questions("embedded")
    vector = estimate(extract(lm, questions[:100]), layer=3)
    with steered(lm, vector, coefficient=0.4):
        print(generate(lm, ["What is the capital of Farrowen?"]))

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truthsteer.activations import Activations
    from truthsteer.bank import SteeringVector, estimate
    from truthsteer.config import Config
    from truthsteer.data import load_questions
    from truthsteer.decoding import generate
    from truthsteer.errors import UserError
    from truthsteer.extraction import extract
    from truthsteer.hooks import capture, steered
    from truthsteer.model import LanguageModel
    from truthsteer.pipeline import run
    from truthsteer.prompts import Prompts
    from truthsteer.records import Question
    from truthsteer.scoring import score

_HOME = {
    "Activations": "activations",
    "Config": "config",
    "LanguageModel": "model",
    "Prompts": "prompts",
    "Question": "records",
    "SteeringVector": "bank",
    "UserError": "errors",
    "capture": "hooks",
    "estimate": "bank",
    "extract": "extraction",
    "generate": "decoding",
    "load_questions": "data",
    "run": "pipeline",
    "score": "scoring",
    "steered": "hooks",
}

__all__ = [
    "Activations",
    "Config",
    "LanguageModel",
    "Prompts",
    "Question",
    "SteeringVector",
    "UserError",
    "capture",
    "estimate",
    "extract",
    "generate",
    "load_questions",
    "run",
    "score",
    "steered",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'truthsteer' has no attribute '{name}'")
    return getattr(importlib.import_module(f"truthsteer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
