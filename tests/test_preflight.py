"""What a user is told whose model overflows: before anything is loaded where that is possible, and in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, blow_up, build, run_cli
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from safetensors.numpy import load_file

from truthsteer import pipeline
from truthsteer.cli import to_config
from truthsteer.config import Config
from truthsteer.errors import UserError
from truthsteer.files import digest, file_sha256, write_json
from truthsteer.model import LanguageModel

SMALL = (
    "device=cpu",
    "model=local",
    "data=organism",
    "data.limit=48",
    "judge=[reference]",
    "gauge=organism",
    "steering.controls.style=false",
    "~prompt@baselines.prompts.help",
    "steering.max_length=384",
)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory, tokenizer) -> Path:
    """A multimodal Gemma 3 whose residual stream passes 1e6."""
    folder = tmp_path_factory.mktemp("overflowing")
    blow_up(build("gemma3_multimodal")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def composed():
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        yield


def run(checkpoint: Path, root: Path, *overrides: str) -> Path:
    """The run's folder."""
    own = [*SMALL, f"model.path={checkpoint}", f"paths.root={root}", *overrides]
    config = to_config(compose("config", overrides=own))
    pipeline.run(config)
    return pipeline.folder_for(config)


@pytest.fixture
def loads(monkeypatch) -> list[int | None]:
    """Depths of the models that were loaded."""
    found: list[int | None] = []
    load = LanguageModel.from_config.__func__

    def from_config(cls, config, policy, device, checkpoint, depth=None):
        found.append(depth)
        return load(cls, config, policy, device, checkpoint, depth)

    monkeypatch.setattr(LanguageModel, "from_config", classmethod(from_config))
    return found


def test_fp16_gives_finite_vectors_where_fp16_throughout_is_one_sentence(overflowing, tmp_path):
    run(overflowing, tmp_path, "dtype=fp16", "stages=[extract]")
    (activations,) = tmp_path.glob(".store/activations/*")
    arrays = load_file(activations / "activations.safetensors")
    assert max(np.abs(array).max() for array in arrays.values()) > 65504
    assert all(np.isfinite(array).all() for array in arrays.values())
    with pytest.raises(UserError) as refused:
        run(overflowing, tmp_path / "other", "dtype=fp16_pure", "stages=[extract]")
    said = str(refused.value)
    assert said.startswith("dtype=fp16_pure fails: the numbers are first not finite at ")
    assert "layer 0" in said
    assert "Type one of: dtype=bf16, dtype=fp16" in said
    assert "\n" not in said


@pytest.mark.parametrize("seen", ["doctor", "extract"])
def test_a_model_that_was_seen_to_overflow_is_refused_before_it_is_loaded(overflowing, tmp_path, loads, seen):
    run(overflowing, tmp_path, "dtype=bf16", f"stages=[{seen}]", "doctor.reference=false")
    assert len(loads) == 1
    with pytest.raises(
        UserError, match=r"seen to pass 65504, fp16's largest, at .* of layer 0 .*Type one of: dtype=bf16"
    ):
        run(overflowing, tmp_path, "dtype=fp16_pure", "stages=[extract,steer]")
    assert len(loads) == 1, "it was loaded"
    run(overflowing, tmp_path, "dtype=fp16", "stages=[extract]")
    assert len(loads) == 2


def test_what_was_seen_holds_for_the_layers_and_the_weights_that_it_was_seen_of(overflowing, tmp_path, loads):
    run(overflowing, tmp_path, "dtype=bf16", "stages=[extract]")
    (seen,) = tmp_path.glob(".store/overflow/*.json")
    seen.write_text(json.dumps(json.loads(seen.read_text()) | {"layer": 1}))
    refused = "were seen to pass 65504.*delete that file"
    with pytest.raises(UserError, match=refused):
        run(overflowing, tmp_path, "dtype=fp16_pure", "steering.layers=[1]", "stages=[extract]")
    with pytest.raises(UserError) as quantised:
        run(overflowing, tmp_path, "dtype=fp16_pure", "dtype.quantize=int8", "stages=[extract]")
    with pytest.raises(UserError) as below:
        run(overflowing, tmp_path, "dtype=fp16_pure", "steering.layers=[0]", "stages=[extract]")
    assert all("seen to pass" not in str(error.value) for error in (quantised, below))
    assert len(loads) == 3
    seen.unlink()
    with pytest.raises(UserError, match="fails: the numbers are first not finite"):
        run(overflowing, tmp_path, "dtype=fp16_pure", "stages=[extract]")
    assert json.loads(seen.read_text())["layer"] == 0, "what a run in fp16 sees is remembered too"


def stored(root: Path) -> Path:
    """The report beside the activations."""
    (report,) = root.glob(".store/activations/*/doctor.json")
    return report


def put_back(root: Path, report: dict) -> None:
    """The report changed, as if the run had found that: the artifact is whole."""
    path = stored(root)
    path.write_text(json.dumps(report))
    meta = json.loads((path.parent / "meta.json").read_text())
    meta["files"][path.name] = file_sha256(path)
    del meta["sha256"]
    write_json(path.parent / "meta.json", meta | {"sha256": digest(meta)})


def test_activations_that_were_read_before_are_held_to_what_is_asked_now(overflowing, tmp_path, loads, caplog):
    own = ("dtype=bf16", "stages=[extract]")
    run(overflowing, tmp_path, *own)
    report = json.loads(stored(tmp_path).read_text())
    with pytest.raises(
        UserError, match=r"max_length=8: the longest .* Type steering\.max_length=\d+, or a shorter prompt"
    ):
        run(overflowing, tmp_path, *own, "steering.max_length=8")
    put_back(tmp_path, report | {"outcome": "not finite", "verdict": "It overflowed."})
    with pytest.raises(UserError, match=r"It overflowed\. Type one of: "):
        run(overflowing, tmp_path, *own)
    with pytest.raises(UserError, match=r"It overflowed\."):
        run(overflowing, tmp_path, "dtype=bf16", "stages=[steer]")
    run(overflowing, tmp_path, *own, "dtype.on_overflow=warn")
    assert "It overflowed. dtype.on_overflow=warn: going on." in caplog.text
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("handover", "CUDA_VISIBLE_DEVICES=0"),
        ("gpu_copies", "CUDA_VISIBLE_DEVICES=0"),
        ("bos_agreement", "dtype.attention=eager"),
    ],
)
def test_numbers_that_are_wrong_are_never_gone_on_with(overflowing, tmp_path, name, remedy):
    run(overflowing, tmp_path, "dtype=bf16", "stages=[extract]")
    report = json.loads(stored(tmp_path).read_text())
    failed = {"name": name, "passed": False, "value": 1.0, "bound": 0.0, "meaning": "It is broken."}
    put_back(tmp_path, report | {"checks": [failed]})
    with pytest.raises(UserError) as refused:
        run(overflowing, tmp_path, "dtype=bf16", "dtype.on_overflow=warn", "stages=[extract]")
    assert str(refused.value) == f"dtype=bf16: the numbers cannot be trusted ({name}). It is broken. Type {remedy}."


def test_a_text_that_is_too_long_is_said_before_numbers_are_looked_at(overflowing, tmp_path):
    with pytest.raises(UserError, match=r"longer than steering\.max_length=8 tokens"):
        run(overflowing, tmp_path, "dtype=fp16_pure", "steering.max_length=8", "stages=[extract]")


def test_what_overflow_does_is_no_part_of_what_a_run_is(overflowing, tmp_path, loads):
    folder = run(overflowing, tmp_path, "dtype=fp16", "stages=[extract]")
    assert run(overflowing, tmp_path, "dtype=fp16", "dtype.on_overflow=warn", "stages=[extract]") == folder
    assert loads == [3], "what was read is read again"
    run(overflowing, tmp_path, "dtype=fp16", "dtype.matmul=high", "stages=[extract]")
    assert len(loads) == 2, "another precision is another model"
    torch.set_float32_matmul_precision("highest")


def test_on_overflow_warn_goes_on_until_pairs_are_counted(overflowing, tmp_path, caplog):
    with pytest.raises(UserError, match=r"pairs \(100\.0%\) have activations that are not finite"):
        run(overflowing, tmp_path, "dtype=fp16_pure", "dtype.on_overflow=warn", "stages=[extract]")
    assert "dtype.on_overflow=warn: going on." in caplog.text


def test_the_doctor_reports_an_overflow_and_does_not_fail_for_it(overflowing, tmp_path, caplog):
    caplog.set_level("INFO", logger="truthsteer")
    folder = run(overflowing, tmp_path, "dtype=fp16_pure", "stages=[doctor]")
    report = json.loads((folder / "doctor.json").read_text())
    assert report["outcome"] == "not finite"
    assert report["overrides"][0] == "dtype=bf16"
    assert [item["name"] for item in report["passes"]] == ["right", "left"], "nothing finite is left to steer by"
    record = json.loads((folder / "run.json").read_text())
    assert record["stages"]["doctor"]["state"] == "done"
    assert "Numerics of local under dtype=fp16_pure" in caplog.text
    with pytest.raises(UserError, match="fails: the numbers are first not finite"):
        run(overflowing, tmp_path / "on", "dtype=fp16_pure", "stages=[doctor,extract]")


def test_the_doctor_compares_with_fp32_and_steers_most_strongly(overflowing, tmp_path):
    folder = run(overflowing, tmp_path, "dtype=fp16", "stages=[doctor]")
    report = json.loads((folder / "doctor.json").read_text())
    assert [item["name"] for item in report["passes"]] == ["right", "left", "steered"]
    assert report["passes"][2]["coefficient"] == 1.2
    assert report["reference"]["largest"] < 0.02


def test_a_sweep_of_the_doctor_ends_in_one_table(overflowing, tmp_path):
    done = run_cli(
        "-m",
        *SMALL[:-1],
        f"model.path={overflowing}",
        "dtype=fp16,fp16_pure,bf16",
        "steering.max_length=16,384",
        "stages=[doctor]",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith(("fp16", "bf16"))]
    assert [row[:2] for row in rows] == [
        [dtype, length] for dtype in ("bf16", "fp16", "fp16_pure") for length in ("16", "384")
    ]
    rates = {row[0]: [cell for cell in row if cell in ("0.0", "100.0")] for row in rows}
    assert rates["fp16"] == rates["bf16"] == ["0.0"] * 3
    assert rates["fp16_pure"][0] == "100.0"
    assert not list((tmp_path / ".hydra").rglob("examined")), "a job's note to its sweep is left"


def test_a_sweep_keeps_its_table_although_a_job_fails(overflowing, tmp_path):
    own = (*SMALL, f"model.path={overflowing}", "doctor.reference=false")
    done = run_cli("-m", *own, "dtype=fp16_pure,bf16", "stages=[doctor,extract]", root=tmp_path)
    assert done.returncode == 2
    assert "dtype=fp16_pure fails" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith(("fp16", "bf16"))]
    assert [row[0] for row in rows] == ["bf16", "fp16_pure"]
    named = next(line for line in done.stdout.splitlines() if line.startswith("in full: ")).split()[2:]
    assert [json.loads(Path(path).read_text())["policy"]["name"] for path in named] == ["fp16_pure", "bf16"]


def test_only_the_layers_that_are_read_are_loaded(overflowing, tmp_path, loads):
    run(overflowing, tmp_path, "dtype=bf16", "steering.layers=[1]", "stages=[extract]")
    assert loads == [2]
    run(
        overflowing,
        tmp_path,
        "dtype=bf16",
        "steering.layers=[1]",
        "stages=[extract,steer]",
        "steering.controls.envelope=0",
    )
    assert loads == [2, None]


@pytest.mark.parametrize("key", ["model.layer", "steering.layers"])
def test_a_layer_that_only_the_checkpoint_tells_is_named_as_it_was_typed(overflowing, tmp_path, key):
    value = "[9]" if key == "steering.layers" else "9"
    with pytest.raises(UserError, match=rf"^{key}=9 is not a layer\. The model has 4 layers: type 0 to 3"):
        run(overflowing, tmp_path, f"{key}={value}", "stages=[extract]")
    with pytest.raises(UserError, match=r"is not a layer\. Type 0 or more\."):
        run(overflowing, tmp_path, f"{key}={value.replace('9', '-1')}", "stages=[extract]")


def test_a_comparison_that_fails_does_not_lose_the_report(overflowing, tmp_path, monkeypatch, caplog):
    load = LanguageModel.from_config.__func__

    def from_config(cls, config, policy, *rest):
        if policy.name == "fp32":
            raise UserError("It does not fit after all.")
        return load(cls, config, policy, *rest)

    monkeypatch.setattr(LanguageModel, "from_config", classmethod(from_config))
    folder = run(overflowing, tmp_path, "dtype=bf16", "stages=[doctor]")
    report = json.loads((folder / "doctor.json").read_text())
    assert report["reference"] is None
    assert report["outcome"] == "safe"
    assert "no comparison with fp32: It does not fit after all." in caplog.text


def test_a_damaged_checkpoint_is_one_sentence(tmp_path, tokenizer):
    model = build("gemma3")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    done = run_cli(*SMALL, f"model.path={tmp_path / 'nan'}", "dtype=fp16", root=tmp_path / "runs")
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith(("INFO", "WARNING"))]
    assert "Weight model.layers.2.mlp.up_proj.weight" in said
    assert "Download or save it again" in said


def test_an_unknown_dtype_is_answered_with_those_there_are(tmp_path):
    done = run_cli("dtype=float8", root=tmp_path)
    assert done.returncode == 2
    assert "dtype=float8 is not an option" in done.stderr
    assert "bf16, fp16, fp16_pure, fp32, int4, int8" in done.stderr


def test_the_report_of_a_run_shows_what_was_seen_before_extraction(overflowing, tmp_path):
    own = (
        "dtype=fp16",
        "data.limit=24",
        "steering.coefficients=[0.5]",
        "steering.controls.random=1",
        "steering.controls.envelope=0",
        "steering.bank.subsets=2",
        "generation.max_new_tokens=2",
        "gauge.passages=2",
        "baselines.few_shot=0",
    )
    run(overflowing, tmp_path, *own, "stages=[doctor]", "doctor.reference=false")
    folder = run(overflowing, tmp_path, *own)
    numerics = json.loads((folder / "summary.json").read_text())["numerics"]
    assert numerics["thorough"] is False
    assert numerics["headroom"]["residual"] < 0
    assert "Numeric headroom" in (folder / "report.html").read_text()
    walked = "doctor,extract,steer,choose,generate,gauge,judge,report"
    assert run(overflowing, tmp_path, *own, f"stages=[{walked}]", "doctor.reference=false") == folder
    assert json.loads((folder / "summary.json").read_text())["numerics"]["thorough"] is True
