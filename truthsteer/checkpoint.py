"""Which weights exactly: a folder's fingerprint or a hub commit, and what config.json says. Imports no torch.

What is resolved here is part of every artifact's key, so that other weights under the same name are another model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truthsteer.config import EMBEDDED, ModelConfig
from truthsteer.errors import UserError
from truthsteer.files import digest, file_sha256, read_json, remembered, write_json
from truthsteer.organism import WEIGHTS

SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".py")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a tokenizer has one."""
REMEMBER_ABOVE = 1 << 26


@dataclass(frozen=True)
class Checkpoint:
    """Weights that are pinned down."""

    location: str
    """Folder, or hub id."""
    commit: str | None
    """Hub commit; None for a folder."""
    fingerprint: str
    """The commit, or a hash of the folder's files."""
    num_layers: int
    """Decoder layers, from config.json."""


def _num_layers(config: Path) -> int:
    try:
        whole: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        return int(whole.get("text_config", whole)["num_hidden_layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config} is not the config.json of a language model ({type(error).__name__}: {error}). Copy the checkpoint "
            "again, or type another model.path."
        ) from error


def folder_of(model: ModelConfig) -> Path | None:
    """The local folder, or None for a hub model.

    Raises:
        UserError: `model.path` is not a folder with a config.json.
    """
    if model.path is None:
        return None
    folder = WEIGHTS if model.path == EMBEDDED else Path(model.path).expanduser()
    if not (folder / "config.json").is_file():
        state = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"model.path={model.path} {state}. Type model.path=FOLDER with config.json, the weights (safetensors) "
            "and the tokenizer's files."
        )
    return folder


def resolve(model: ModelConfig, memory: Path | None = None) -> Checkpoint:
    """Pin the checkpoint down: hash a folder, or ask the hub (its cache, if there is no network) for the commit.

    Args:
        model: which model.
        memory: JSON file that remembers the hashes of files that have not changed.

    Raises:
        UserError: no such folder; or the hub cannot be reached and nothing is cached.
    """
    folder = folder_of(model)
    if folder is not None:
        return Checkpoint(str(folder), None, fingerprint(folder, memory), _num_layers(folder / "config.json"))
    assert model.id is not None
    commit = hub_commit(model.id, model.revision, key="model.id")
    layers = model.shape.num_layers
    if layers is None:
        from huggingface_hub import hf_hub_download

        layers = _num_layers(Path(hf_hub_download(model.id, "config.json", revision=commit)))
    return Checkpoint(model.id, commit, commit, layers)


def hub_commit(repo: str, revision: str | None, key: str, repo_type: str = "model") -> str:
    """The commit that `revision` of a hub repository stands for: from the hub, or from the local cache.

    A whole commit hash stands for itself and asks nobody.

    Raises:
        UserError: neither knows it.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, HFValidationError

    # The HTTP client's base error, whichever client this version of the hub library uses, beside OSError.
    unreachable: tuple[type[Exception], ...] = (
        OSError,
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    )
    try:
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=10)
            assert info.sha is not None
            return info.sha
    except HFValidationError as error:
        raise UserError(f"{key}={repo} is not a hub id. Type {key}=OWNER/NAME.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"The hub refuses {repo} (HTTP {status}): it is gated or private. Accept its licence on its page and "
                "run `hf auth login`."
            ) from error
        if status == 404:
            raise UserError(f"The hub has no {repo} at revision {revision or 'main'}. Check {key}.") from error
    except unreachable:
        pass  # no network: the cache may still know
    try:
        cached = next(item for item in scan_cache_dir().repos if item.repo_id == repo and item.repo_type == repo_type)
        wanted = revision or "main"
        for entry in cached.revisions:
            if wanted in entry.refs or entry.commit_hash.startswith(wanted):
                return entry.commit_hash
    except (StopIteration, CacheNotFound):
        pass
    what = "data.path=FILE.csv with data=truthfulqa_csv" if repo_type == "dataset" else "model=local model.path=FOLDER"
    raise UserError(
        f"{repo} ({key}) is not in the local hub cache and the hub cannot be reached. Run once with "
        f"stages=[prefetch] where there is a network, or type {what}."
    )


def fingerprint(folder: Path, memory: Path | None = None) -> str:
    """Hash of everything in a checkpoint folder that a model or its tokenizer is made from: names and whole contents.

    Large files take their time once: `memory` keeps their hashes by path, size, inode and time of change.
    """
    known: dict[str, str] = (remembered(memory) if memory is not None else None) or {}
    found, fresh = [], {}
    for path in sorted(item for item in folder.iterdir() if item.is_file() and item.suffix in SUFFIXES):
        state = path.stat()
        name = f"{path.resolve()} {state.st_size} {state.st_ino} {state.st_mtime_ns}"
        value = known.get(name) or file_sha256(path)
        if state.st_size >= REMEMBER_ABOVE:
            fresh[name] = value
        found.append([path.name, value])
    if memory is not None and not fresh.items() <= known.items():
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known | fresh)
    return digest(found)


def require_cached(model: ModelConfig) -> None:
    """Raise unless the checkpoint is on this machine, whole as far as its index tells. Asks no network.

    Raises:
        UserError: no such folder; or the hub's cache lacks it or a part of it.
    """
    folder = folder_of(model)
    if folder is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert model.id is not None
        try:
            folder = Path(snapshot_download(model.id, revision=model.revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise UserError(_not_cached(f"{model.id} is")) from error
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    lacking = [name for name in ("config.json", *sorted(shards)) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        lacking.append(TOKENIZERS[0])
    if lacking:
        raise UserError(_not_cached(f"{lacking[0]} of {model.id or model.path} is"))


def _not_cached(what: str) -> str:
    return (
        f"{what} not on this machine, and nodes are offline. Type the same command without hydra/launcher and with "
        "stages=[prefetch] where there is a network; or hydra.launcher.offline=false if nodes have one."
    )


def prefetch(model: ModelConfig) -> Checkpoint:
    """Download a hub checkpoint (config, tokenizer, safetensors) into the local cache; a folder needs nothing."""
    checkpoint = resolve(model)
    if checkpoint.commit is not None:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
        snapshot_download(checkpoint.location, revision=model.revision, allow_patterns=patterns)
    return checkpoint
