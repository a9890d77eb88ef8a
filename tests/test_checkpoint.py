"""Other weights under the same name are another model."""

from __future__ import annotations

import json

import pytest

from truthsteer.checkpoint import fingerprint, resolve
from truthsteer.config import ModelConfig
from truthsteer.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 7}}))
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path / "model"


def test_any_changed_byte_is_another_model_and_notes_are_not(folder):
    before = fingerprint(folder)
    (folder / "README.md").write_text("notes")
    assert fingerprint(folder) == before
    (folder / "model.safetensors").write_bytes(bytes(500) + b"\x01" + bytes(499))
    assert fingerprint(folder) != before


def test_large_files_are_hashed_once_and_again_when_they_change(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("truthsteer.checkpoint.REMEMBER_ABOVE", 500)
    memory = tmp_path / "store" / "fingerprints.json"
    before = fingerprint(folder, memory)
    hashed = []
    monkeypatch.setattr("truthsteer.checkpoint.file_sha256", lambda path: hashed.append(path.name) or "x")
    assert "model.safetensors" not in hashed
    fingerprint(folder, memory)
    assert hashed == ["config.json"]
    (folder / "model.safetensors").write_bytes(b"\x02" * 1000)
    assert fingerprint(folder, memory) != before
    assert "model.safetensors" in hashed


def test_layers_are_read_from_the_text_models_part(folder):
    assert resolve(ModelConfig(name="m", path=str(folder))).num_layers == 7


def test_a_whole_commit_needs_no_hub():
    commit = "0123456789abcdef0123456789abcdef01234567"
    config = ModelConfig(name="m", id="a/b", revision=commit)
    config.shape.num_layers = 3
    assert resolve(config).fingerprint == commit


def test_a_folder_without_a_model_says_what_to_type(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json.*Type model\.path=FOLDER"):
        resolve(ModelConfig(name="m", path=str(tmp_path)))
