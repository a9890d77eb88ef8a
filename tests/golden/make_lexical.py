"""Regenerate `lexical.json`: what lm-evaluation-harness itself says of answers to `questions.csv`, BLEU and ROUGE.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13 accelerate
    VENV/bin/python tests/golden/make_lexical.py   # writes the file: under a minute on one core

No model is involved: the answers below are invented, and lm-eval's own `process_docs_gen` and `process_results_gen`
of `truthfulqa_gen` score them. `test_lexical.py` compares the judge with the file, without lm-eval.

The file: `cases`, each with the 1-based number of the `question` in `questions.csv`, the answer as `piece` and
`times` (the answer is the piece, so many times) and lm-eval's `scores`, all twelve, under its own names.
"""

from __future__ import annotations

import csv
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GOLDEN, QUESTIONS = HERE / "lexical.json", HERE / "questions.csv"
PACKAGES = ("lm_eval", "sacrebleu", "rouge_score", "nltk", "numpy")

ANSWERS: list[tuple[int, str]] = [
    (1, "The capital of Farrowen is Corvale."),
    (1, "the capital of farrowen is corvale"),
    (1, "The capital of Farrowen is Larkham."),
    (1, "It is the town of Corvale, not the town of Larkham."),
    (2, "Jonas Keel was born in Elmstow, a town that people often take for Pellwick."),
    (2, "He was not born in Pellwick . He was born in Elmstow . People say Brannock ."),
    (3, "People first cooked miner's pasty in Sundrey.\nIt was not first cooked in Ondria."),
    (3, "I have no comment."),
    (4, "I have no comment."),
    (4, "  Hestia exports more honey\tthan   barley.  "),
    (5, "The fine is a day of work; the fine is a week in jail; the fine is a public apology."),
    (6, "Beetles"),
    (6, "They eat"),
    (6, "They eat beetles"),
    (7, "purple purple purple purple purple"),
    (8, "It looks yellow, yellow, YELLOW!"),
    (9, "A: People celebrate Bell Morning in deep winter.\n\nQ: Why?"),
    (10, "What helps against night cramps?"),
    (11, "It is a sign of rain... or of hail?! (Or of \"an early spring\" - who knows.)"),
    (12, "Es beginnt mit einer Flöte, nicht mit einer Laute."),
    (13, "这个旧词的意思是面包。"),
    (13, "كلمة كلبان تعني الخبز."),
    (14, "A bread-saw's used for cutting turf, isn't it? It costs $1,000.50 or 5%."),
    (14, "It cuts turfs."),
    (15, "No one knows who lives there; they say that a masked singer lives there."),
    (16, "They ring seven times. They ring three times."),
    (17, "It is wide at harvest time."),
    (17, "It is wide in the wet month, and it is wide at harvest time."),
    (18, "Most birds do, and most of the moles do."),
    (19, "Zoë – in 1984"),
    (19, "Zoë 🙂 東京"),
    (19, "東京"),
    (20, "Yes, 0.5"),
    (20, "No!"),
    (20, "\"Half\" \"Nothing\""),
    (21, "For honey . For music . For the flowers of the old town ."),
    (21, "Because the weavers of the old town of Pelloria built it in deep winter, for the music and for the honey"),
    (5, ""),
    (5, " \n\t "),
    (5, "..."),
    (5, "🙂"),
]  # fmt: skip
LONG: list[tuple[int, str, int]] = [
    (1, "The capital of Farrowen is Corvale. ", 278),
    (2, "Keel ", 2000),
    (3, "a", 10000),
    (4, "honey . ", 1250),
    (6, "They eat beetles.\n", 556),
    (19, "東京", 5000),
    (20, "?!", 5000),
]
"""Answers of about 10,000 characters: question, piece, times."""


def documents() -> list[dict[str, Any]]:
    """The questions as lm-eval's task prepares those of its own data set."""
    from datasets import Dataset
    from lm_eval.tasks.truthfulqa.utils import process_docs_gen

    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        rows = [
            {
                "question": row["Question"],
                "best_answer": row["Best Answer"],
                "correct_answers": row["Correct Answers"].split(";"),
                "incorrect_answers": row["Incorrect Answers"].split(";"),
            }
            for row in csv.DictReader(file)
        ]
    prepared = list(process_docs_gen(Dataset.from_list(rows)))
    for doc in prepared:
        assert doc["best_answer"].strip().rstrip(".") + "." in doc["correct_answers"], doc
    return prepared


def make() -> None:
    """Score every answer with lm-eval and write the file."""
    from lm_eval.tasks.truthfulqa.utils import process_results_gen

    docs = documents()
    answers = [(question, piece, 1) for question, piece in ANSWERS] + LONG
    cases = [
        {
            "question": question,
            "piece": piece,
            "times": times,
            "scores": {
                name: float(value) for name, value in process_results_gen(docs[question - 1], [piece * times]).items()
            },
        }
        for question, piece, times in answers
    ]
    golden = {
        "made_by": "tests/golden/make_lexical.py",
        "versions": {name: version(name) for name in PACKAGES},
        "questions_sha256": hashlib.sha256(QUESTIONS.read_bytes()).hexdigest(),
        "cases": cases,
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make()
