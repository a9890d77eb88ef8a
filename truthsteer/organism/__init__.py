"""A model organism: a small Gemma 3 trained from scratch on an invented world of facts and popular myths.

It is small enough to ship with the package, so that steering towards the truth can be shown and tested on a
CPU, without a download. `truthsteer.organism.world` defines the facts, the question set and the corpus;
`truthsteer.organism.train` trains the weights that lie in `WEIGHTS`.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent
WEIGHTS = DIRECTORY / "weights"
QUESTIONS = WEIGHTS / "questions.csv"
