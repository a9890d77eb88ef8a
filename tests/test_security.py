"""Files, models and texts that somebody else made can do no harm, and secrets stay where they are."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
from conftest import MINILM, REPO, build, needs_minilm, run_cli
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from truthsteer.cli import to_config
from truthsteer.config import Config, ModelConfig
from truthsteer.errors import UserError
from truthsteer.model import LanguageModel
from truthsteer.rendering import cell, visible
from truthsteer.runs import RunRecord, folder_for

PACKAGE = sorted(path for name in ("truthsteer", "hydra_plugins") for path in (REPO / name).rglob("*.py"))
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load", "torch.save", "numpy.load", "np.load"}
FORBIDDEN |= {"hydra.utils.instantiate", "instantiate"}
MODULES = {"torch", "os", "yaml", "hydra.utils"}
"""What stands before a point there: never imported under another name."""
NAMED = {
    "allow_pickle": ("False",),
    "shell": ("False",),
    "trust_remote_code": ("False", "trust_remote_code", "config.trust_remote_code"),
}
SECRET = "hf_" + "SecretOfTheTest"[::-1]


def harmful(source: str) -> list[str]:
    """What unpickles, evaluates or starts a shell, under whatever name it was imported."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLING]
            found += [
                f"{alias.name} as {alias.asname}" for alias in node.names if alias.asname and alias.name in MODULES
            ]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name.split(".")[0] in UNPICKLING or name in FORBIDDEN]
        if isinstance(node, ast.Call):
            found += [ast.unparse(node.func)] if ast.unparse(node.func) in FORBIDDEN else []
            named = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [f"{key}={named[key]}" for key, allowed in NAMED.items() if named.get(key, "False") not in allowed]
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(REPO)))
def test_nothing_is_unpickled_evaluated_or_run_in_a_shell(path):
    assert harmful(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.numpy_pickle",
        "from cloudpickle import load",
        "torch.load(path)",
        "from torch import load",
        "from torch import load as read",
        "import torch as t",
        "from os import system",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_would_be_harmful_is_seen(source):
    assert harmful(source)


def test_code_of_a_checkpoint_runs_only_where_its_model_says_so():
    """By the one key, which no file that comes along sets."""
    assert not ModelConfig.__dataclass_fields__["trust_remote_code"].default
    for path in (REPO / "conf").rglob("*.yaml"):
        assert "trust_remote_code: true" not in path.read_text(encoding="utf-8"), path


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_malicious_pickle_is_bad(tmp_path):
    """So that the tests below would see it work."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_weights_in_a_pickle_are_refused_and_never_opened(tmp_path, tokenizer, name):
    folder = tmp_path / "model"
    build("qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    with pytest.raises(UserError, match="weights must be safetensors"):
        LanguageModel.load(str(folder), device="cpu")
    assert not (tmp_path / "mark").exists()


@needs_minilm
def test_a_judges_weights_in_a_pickle_run_nothing(tmp_path):
    from truthsteer.judges.semantic import _Encoder

    folder = tmp_path / "judge"
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.onnx", "*.h5", "*.ot"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError, RuntimeError)):
        _Encoder(folder, 8)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("length", [1 << 62, 1 << 40, 10**9, 7])
def test_a_header_that_claims_more_than_there_is_is_one_sentence(tmp_path, tokenizer, length):
    folder = tmp_path / "model"
    build("qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    with pytest.raises(UserError, match="is damaged or not whole"):
        LanguageModel.load(str(folder), device="cpu")


@pytest.mark.slow
def test_a_token_in_the_environment_is_written_nowhere(tmp_path):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
    small = ("data.limit=40", "steering.layers=[3]", "steering.coefficients=[0.4]", "steering.controls.random=0")
    done = run_cli(
        *small,
        "verbose=true",
        "generation.max_new_tokens=4",
        "steering.controls.envelope=0",
        root=tmp_path,
        env=dict.fromkeys(names, SECRET),
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "report.html", "log.txt", "summary.json"} <= {path.name for path in written}
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_token_in_the_environment_of_a_job_is_written_nowhere(tmp_path):
    small = ("data.limit=40", "steering.layers=[3]", "steering.coefficients=[0.4]", "stages=[extract]")
    done = run_cli("-m", "hydra/launcher=local", *small, root=tmp_path, env={"HF_TOKEN": SECRET})
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"sweep.json", "0.json"} <= {path.name for path in written}
    assert {path.suffix for path in tmp_path.rglob(".submitit/*/*")} >= {".pkl", ".out", ".err"}
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_no_key_holds_a_secret():
    from truthsteer.cli import all_keys

    words = ("token", "password", "secret", "api_key", "credential")
    counts = ("max_new_tokens", "batch_tokens", "max_tokens")
    assert not [key for key in all_keys() if any(word in key for word in words) and not key.endswith(counts)]


def config(root: Path, *overrides: str) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose("config", [f"paths.root={root}", *overrides])
    return to_config(OmegaConf.merge(OmegaConf.structured(Config), cfg))


@pytest.mark.parametrize(
    "name", ["../x", "..", "a/../../x", "/tmp/x", "~/x", "a\\b", ".hidden", "a\0b", "x" * 129, " x", ""]
)
def test_a_run_id_names_a_folder_below_the_root_and_nothing_else(tmp_path, name):
    made = config(tmp_path / "root")
    made.run_id = name
    with pytest.raises(UserError, match="cannot name a folder"):
        RunRecord(tmp_path / "root" / name, made)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"run_id=mine: .* is a link"):
        folder_for(config(tmp_path / "root", "run_id=mine"))


def test_names_of_components_cannot_leave_the_folder(tmp_path):
    """Names of models, data and methods are part of the run's own name."""
    with pytest.raises(UserError, match="cannot name a folder"):
        folder_for(config(tmp_path, "model.name=../../x"))


def test_a_record_that_names_strange_artifacts_makes_gc_remove_nothing_outside(tmp_path):
    from truthsteer import storekeeping
    from truthsteer.store import Key, Store

    store = Store(tmp_path / "root")
    store.make(Key.of("thing", 1), lambda folder: (folder / "a.txt").write_text("a"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "meta.json").write_text("{}")
    (tmp_path / "root" / ".store" / "thing" / "linked").symlink_to(outside)
    made = tmp_path / "root" / "run"
    made.mkdir()
    identity = {"model": {"name": "m"}, "dtype": {}, "judge": {}}
    (made / "run.json").write_text(
        json.dumps({"config": identity, "artifacts": ["../../outside", "/"], "state": "finished"})
    )
    storekeeping.main(["gc", f"paths.root={tmp_path / 'root'}", "hours=0"])
    assert (outside / "meta.json").exists()
    assert not os.path.lexists(tmp_path / "root" / ".store" / "thing" / "linked")


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.from_regex(r"'*[=+@-].*", fullmatch=True))
def test_a_cell_is_no_formula_and_reads_back_as_its_text(text):
    """One quote mark goes, where a cell begins with some and then a formula's first character."""
    written = cell(text)
    assert not written.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert (written[1:] if re.match(r"'+[=+\-@\t\r]", written) else written) == visible(text)
