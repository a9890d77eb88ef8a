"""Every family of models through every stage, as a user runs it, and in the shapes in which checkpoints come."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, REPO, blow_up, build, make_questions
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from truthsteer.cli import to_config
from truthsteer.config import Config, GenerationConfig
from truthsteer.decoding import Request, decode
from truthsteer.errors import UserError
from truthsteer.extraction import extract
from truthsteer.hooks import Injection, capture, steered
from truthsteer.model import LanguageModel
from truthsteer.numerics_text import lines
from truthsteer.pipeline import run
from truthsteer.prompts import PLAIN, Prompts
from truthsteer.records import ALL_STYLE
from truthsteer.scoring import score

QUICK = (
    "device=cpu",
    "data=organism",
    "judge=[reference]",
    "gauge=organism",
    "gauge.passages=2",
    "data.limit=24",
    "steering.coefficients=[0.5]",
    "steering.bank.subsets=2",
    "steering.controls.random=1",
    "steering.controls.envelope=0",
    "generation.max_new_tokens=4",
    "baselines.few_shot=2",
    "~prompt@baselines.prompts.help",
)
LARGE = "gemma3_multimodal_large"
"""The same family with a residual stream that passes fp16's largest number, as that of the real checkpoints does."""

IDS = torch.randint(3, 1700, (2, 20), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Finished:
    """A run that went through."""

    summary: dict[str, Any]
    rows: dict[str, dict[str, str]]
    """Of metrics.csv, by condition."""
    bank: dict[str, torch.Tensor]


Runs = Callable[[str, str], Finished]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer) -> Iterator[Runs]:
    """A family's random checkpoint, saved with its tokenizer and run under a dtype; once for all tests."""
    folder = tmp_path_factory.mktemp("families")
    made: dict[tuple[str, str], Finished] = {}

    def finished(family: str, dtype: str) -> Finished:
        if (family, dtype) not in made:
            made[family, dtype] = _run(_save(family, folder / family, tokenizer), folder / f"{family}-{dtype}", dtype)
        return made[family, dtype]

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        yield finished


def _save(family: str, folder: Path, tokenizer: Any) -> Path:
    if not folder.exists():
        model = blow_up(build("gemma3_multimodal")) if family == LARGE else build(family)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _run(checkpoint: Path, root: Path, dtype: str) -> Finished:
    family = checkpoint.name
    own = [
        "model=local",
        f"model.path={checkpoint}",
        f"model.chat_template={str(family.startswith('gemma3')).lower()}",
        f"dtype={dtype}",
        f"paths.root={root}",
        *(["dtype.attention=eager"] if family == "gemma2" else []),
    ]
    summary = run(to_config(compose("config", overrides=[*own, *QUICK])))
    assert summary is not None
    (table,) = root.glob("*/metrics.csv")
    (vectors,) = root.glob(".store/bank/*/*.safetensors")
    with table.open(encoding="utf-8", newline="") as file:
        return Finished(summary, {row["condition"]: row for row in csv.DictReader(file)}, load_file(vectors))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "fp32") for family in FAMILIES)]
    + [(family, dtype) for family in ("gemma3_multimodal", "qwen2") for dtype in ("fp16", "bf16")]
    + [(LARGE, "fp16")],
)
def test_a_family_goes_through_every_stage(family, dtype, runs):
    finished = runs(family, dtype)
    (proof,) = finished.summary["proof"]
    assert proof["passed"]
    assert len(proof["checks"]) == 7
    assert finished.summary["pairs"][0]["dropped"] == []
    for name in ("baseline", "few-shot", "mean_diff chosen", "mean_diff sign_flip", "mean_diff random_1"):
        assert name in finished.rows
    asked = [row for row in finished.rows.values() if row["kind"] not in ("abstain", "shortest", "surface")]
    assert len(asked) >= 7
    for row in asked:
        assert row["n"] == "12"
        for metric in ("mc1", "mc2", "mc3", "true", "info", "true_info", "length"):
            assert math.isfinite(float(row[metric])), (row["condition"], metric)
    for name, vector in finished.bank.items():
        assert torch.isfinite(vector).all(), name
        assert vector.dtype == torch.float32, name


def test_a_control_of_which_nothing_is_left_is_skipped_with_its_reason(runs):
    """One massive channel outweighs all others, in the vector and in the directions of style alike."""
    finished = runs(LARGE, "fp16")
    assert not [name for name in finished.rows if " without_" in name]
    told = [row for row in finished.summary["selection"]["mean_diff"]["style"] if row["cosine"] is not None]
    assert told
    assert {row["reason"] for row in told} == {ALL_STYLE}
    assert any(ALL_STYLE in warning for warning in finished.summary["warnings"])
    assert [name for name in runs("gemma3_multimodal", "fp16").rows if " without_" in name]


@pytest.mark.parametrize("family", ["gemma3_multimodal", "qwen2", LARGE])
@pytest.mark.parametrize(("dtype", "vector", "margin", "mc2"), [("fp16", 0.01, 0.02, 0.002), ("bf16", 0.1, 0.1, 0.01)])
def test_a_run_in_16_bits_says_what_the_run_in_fp32_says(family, dtype, vector, margin, mc2, runs):
    exact, found = runs(family, "fp32"), runs(family, dtype)
    assert found.bank.keys() == exact.bank.keys()
    for name, wanted in exact.bank.items():
        assert (found.bank[name] - wanted).norm() < vector * wanted.norm(), name
    (wanted,), (chosen,) = (each.summary["selection"]["mean_diff"]["chosen"] for each in (exact, found))
    for name in ("baseline_margin", "margin"):
        assert chosen[name] == pytest.approx(wanted[name], abs=margin)
    assert found.rows.keys() == exact.rows.keys()
    for name, row in exact.rows.items():
        if row["mc2"]:  # not of rows without probabilities
            assert float(found.rows[name]["mc2"]) == pytest.approx(float(row["mc2"]), abs=mc2), name


def test_fp16_throughout_stops_at_a_model_that_passes_it_and_names_the_dtypes_that_hold_it(runs):
    with pytest.raises(UserError, match=r"fp16_pure.* not finite .*layer 0.*dtype=bf16.*dtype=fp16"):
        runs(LARGE, "fp16_pure")


def with_tuples(lm: LanguageModel) -> LanguageModel:
    """Decoder layers whose forward returns a tuple, as in older versions of transformers, under a loop that wants a tensor.

    What a layer's hooks see is the tuple; its caller unpacks it.
    """
    for layer in lm.layers:
        base = type(layer)

        def forward(self: Any, *inputs: Any, base: Any = base, **named: Any) -> tuple[Any, str]:
            return base.forward(self, *inputs, **named), "weights"

        def call(self: Any, *inputs: Any, base: Any = base, **named: Any) -> Any:
            hidden, rest = base.__call__(self, *inputs, **named)
            assert rest == "weights", "a hook lost what else the layer returns"
            return hidden

        layer.__class__ = type(f"Tuple{base.__name__}", (base,), {"forward": forward, "__call__": call})
    return lm


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_return_a_tuple_compute_the_same(family, tokenizer):
    plain, tuples = (LanguageModel(build(family), tokenizer) for _ in range(2))
    with_tuples(tuples)
    questions = make_questions(4)
    first, second = (extract(lm, questions, batch_tokens=200, depth=3) for lm in (plain, tuples))
    for name in ("answer_mean", "answer_last", "prompt_last", "norms"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name

    direction = torch.randn(plain.hidden_size, generator=torch.Generator().manual_seed(3))
    conditions = [None, Injection(1, direction, 4.0), Injection(2, direction, -4.0)]
    prompts = Prompts(PLAIN, tokenizer, chat=False)
    names = [question.text for question in questions]
    branches = prompts.branches(names, [[*question.correct, *question.incorrect] for question in questions])
    requests = [Request(context, index) for context in prompts.contexts(names) for index in range(len(conditions))]
    results = []
    for lm in (plain, tuples):
        scores = [list(unit) for unit in score(lm, branches, conditions)]
        config = GenerationConfig(max_new_tokens=6)
        answers = [list(batch) for batch in decode(lm, requests, conditions, config=config, stop=())]
        with steered(lm, direction, 4.0, layer=1), capture(lm, [0, 1, 3]) as taken:
            hidden = lm.forward(IDS)
        results.append((scores, answers, hidden, taken))
    (scores, answers, hidden, taken), (others, other_answers, other_hidden, other_taken) = results
    assert scores == others
    assert answers == other_answers
    assert torch.equal(hidden, other_hidden)
    assert all(torch.equal(taken[layer], other_taken[layer]) for layer in taken)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Callable[..., tuple[Path, Any]]:
    """A multimodal Gemma 3 in a folder, and the model that was saved."""

    def save(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Any]:
        model = build("gemma3_multimodal").to(dtype)
        model.save_pretrained(tmp_path, **options)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path, model

    return save


def load(folder: Path, **options: str) -> LanguageModel:
    return LanguageModel.load(str(folder), device="cpu", **options)


@pytest.mark.parametrize(
    ("dtype", "residual", "weights"),
    [("fp32", "same", torch.float32), ("bf16", "same", torch.bfloat16), ("fp16", "fp32", torch.float16)],
)
def test_the_policy_and_not_the_checkpoint_says_in_which_format_weights_are(dtype, residual, weights, checkpoint):
    """Checkpoints of Gemma and Qwen are bf16."""
    folder, _ = checkpoint(torch.bfloat16)
    lm = load(folder, dtype=dtype, residual=residual)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = dict(exact.model.language_model.named_parameters())
    for name, parameter in lm.decoder.named_parameters():
        assert parameter.dtype == weights, name
        assert torch.equal(parameter, whole[name].to(weights)), name
    error = (logits(lm.model) - logits(exact)).norm() / logits(exact).norm()
    assert error < {"fp32": 1e-5, "fp16": 0.005, "bf16": 0.05}[dtype]


def test_a_checkpoint_in_several_files_is_read_whole_and_a_missing_file_is_named(checkpoint):
    """As the hub has all from 4B on."""
    folder, whole = checkpoint(max_shard_size="100KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    assert torch.equal(logits(load(folder).model), logits(whole))
    files[1].unlink()
    with pytest.raises(UserError, match=files[1].name):
        load(folder)


def test_a_head_that_is_saved_beside_the_embedding_is_used(checkpoint):
    """Fine-tuned copies have it, equal or, where it was untied, not."""
    folder, whole = checkpoint()
    file = folder / "model.safetensors"
    weights = load_file(file)
    (embedding,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    save_file({**weights, "language_model.lm_head.weight": weights[embedding].clone()}, file, {"format": "pt"})
    assert torch.equal(logits(load(folder).model), logits(whole))
    save_file({**weights, "language_model.lm_head.weight": weights[embedding].flip(0)}, file, {"format": "pt"})
    torch.testing.assert_close(logits(load(folder).model), logits(whole).flip(-1))


@pytest.mark.parametrize("named", [True, False])
def test_every_token_that_ends_a_turn_ends_an_answer_of_the_text_part(named, checkpoint):
    """Gemma's instruction-tuned checkpoints name two ends; the one of a turn is only in the whole model's config."""
    folder, _ = checkpoint()
    for file in ("config.json", "generation_config.json"):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 106]}))
    if not named:
        (folder / "generation_config.json").unlink()
    assert load(folder).eos_ids == {1, 106}


@pytest.mark.parametrize(
    ("family", "dtype", "outcome"),
    [
        *((family, "fp32", "safe") for family in FAMILIES),
        (LARGE, "bf16", "safe"),
        (LARGE, "fp16", "safe"),
        (LARGE, "fp16_pure", "not finite"),
    ],
)
def test_the_doctor_sees_every_family(family, dtype, outcome, runs, tmp_path, tokenizer):
    own = ["model=local", f"model.path={_save(family, tmp_path / family, tokenizer)}", f"dtype={dtype}"]
    own += ["dtype.attention=eager"] if family == "gemma2" else []
    run(to_config(compose("config", overrides=[*own, f"paths.root={tmp_path}", "stages=[doctor]", *QUICK])))
    (path,) = tmp_path.glob("*/doctor.json")
    report = json.loads(path.read_text())
    assert report["outcome"] == outcome, report["verdict"]
    assert 18 <= len(lines(report)) <= 30
    assert len(report["layers"]) == 4
