"""The language model that judges read with: which one it is, and the one that is loaded.

A process holds at most one at a time. Judges that name the same model share it; before another is loaded, the first is
freed. Which weights a name stands for is told without torch and without network: a folder by its content, a hub id by
the commit in the local cache, where `stages=[prefetch]` put it. It knows nothing of questions or verdicts.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthsteer import fitting
from truthsteer.checkpoint import SUFFIXES, Checkpoint, fingerprint
from truthsteer.config import Device, DtypeConfig, ModelConfig, Residual, Weights
from truthsteer.errors import UserError
from truthsteer.memory import Estimate, Load, Work, estimate
from truthsteer.sizes import of_checkpoint

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel

log = logging.getLogger("truthsteer")

_FILES = [f"*{suffix}" for suffix in SUFFIXES]
"""What is fetched of a hub repository, and looked for in the cache."""

_KEYS = re.compile(r"(?:model=local )?\bmodel\.(?:id|path)\b(?: or model\.path\b)?|\b(?:dtype|device)(?==)")
"""Keys of the steered model in messages of what loads it."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to judge with.

    Raises:
        UserError: a field that cannot work, named by its key.
    """

    model: str
    """Hub id, or a folder with config.json, weights (safetensors) and tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: the newest that was fetched."""
    dtype: str = "bf16"
    """`fp32`, `bf16`, or `fp16` (weights in fp16 on a float32 residual stream)."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` (every GPU there is) or `mps`; never the number of a GPU, which another machine lacks."""
    chat: bool = False
    """Asked through its chat template: a checkpoint without one is refused."""
    key: str = "judge.llm"
    """Where the judge stands in the config, for messages."""

    def __post_init__(self) -> None:
        key, folder = f"{self.key}.model", self.folder
        if folder is None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.model):
            raise UserError(
                f"{key}={self.model!r} is neither a folder on this machine nor a hub id. Type {key}=FOLDER or "
                f"{key}=OWNER/NAME."
            )
        if folder is not None and self.revision is not None:
            raise UserError(
                f"{self.key}.revision={self.revision} means nothing for the folder {self.model}. "
                f"Type {self.key}.revision=null."
            )
        if folder is not None and not (folder / "config.json").is_file():
            raise UserError(
                f"{key}={self.model} holds no config.json, so it is not a model's folder. Type {key}=FOLDER with the "
                "folder that has it."
            )
        for name, value, known in (("dtype", self.dtype, Weights), ("device", self.device, Device)):
            options = [option.value for option in known]
            if value not in options:
                raise UserError(
                    f"{self.key}.{name}={value!r} is not one of {', '.join(options)}. Type {self.key}.{name}="
                    f"{'bf16' if name == 'dtype' else 'auto'}."
                )

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.model).expanduser()
        return path.resolve() if path.is_dir() else None

    @property
    def policy(self) -> DtypeConfig:
        """The number formats that `dtype` stands for."""
        return DtypeConfig(self.dtype, Weights(self.dtype), Residual.fp32 if self.dtype == "fp16" else Residual.same)

    @property
    def loads(self) -> str:
        """What is loaded, and how: judges with the same text here share one model."""
        where = str(self.folder or f"{self.model}@{self.revision or 'newest'}")
        return f"{where} {self.dtype} {self.device}"


def check_counts(key: str, **counts: int) -> None:
    """Raise unless every one is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{key}.{name}={value} is below 1. Type {key}.{name}=1 or more.")


def check_share(key: str, **shares: float) -> None:
    """Raise unless every one lies between 0 and 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key}.{name}={value} is not a share. Type {key}.{name}=0.5, or 0 to 1.")


def weights(spec: ModelSpec) -> str:
    """The commit of a hub model, or a hash of a folder's content; imports no torch and uses no network.

    Raises:
        UserError: it is not (wholly) on this machine, or lacks the chat template that it is asked through.
    """
    found = located(spec)
    return found.name if spec.folder is None else fingerprint(found, _memory())


def located(spec: ModelSpec) -> Path:
    """The folder that holds the checkpoint, whole: the one given, or the one in the hub's cache; uses no network.

    Raises:
        UserError: it is not (wholly) on this machine, has no safetensors, or lacks the chat template that it is asked
            through.
    """
    if spec.folder is not None:
        folder = spec.folder
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = snapshot_download(spec.model, revision=spec.revision, allow_patterns=_FILES, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise UserError(_not_here(spec)) from error
        folder = Path(found)
    index = folder / "model.safetensors.index.json"
    shards = set(_json(index)["weight_map"].values()) if index.is_file() else set()
    if not (folder / "config.json").is_file() or any(not (folder / name).is_file() for name in shards):
        raise UserError(_not_here(spec))
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{spec.key}.model={spec.model} has no weights as safetensors, and other formats are not read. Many hub "
            f"repositories have them converted in a pull request: type {spec.key}.revision=refs/pr/N with its number, "
            f"or convert them and type {spec.key}.model=FOLDER."
        )
    if spec.chat and not _has_template(folder):
        raise UserError(_no_template(spec))
    return folder


def prefetch(spec: ModelSpec) -> None:
    """Download a hub model into the local cache; a folder needs nothing.

    Raises:
        UserError: it cannot be had, or has no safetensors.
    """
    if spec.folder is not None:
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(spec.model, revision=spec.revision, allow_patterns=_FILES)
    except (HfHubHTTPError, OSError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}".rstrip(".")
        raise UserError(
            f"{spec.key}.model={spec.model} could not be downloaded ({why}). Check the name and the network; a gated "
            f"model needs its licence accepted on its page and `hf auth login`. Or type {spec.key}.model=FOLDER."
        ) from error
    located(spec)


def memory_of(spec: ModelSpec, batch_tokens: int, max_length: int, parted: bool = False) -> Estimate | None:
    """What reading with the model takes (see `memory.estimate`); None if its config.json does not tell.

    Raises:
        UserError: it is not on this machine.
    """
    sizes = of_checkpoint(str(located(spec)))
    return None if sizes is None else estimate(sizes, spec.policy, Load(Work.judge, batch_tokens, max_length), parted)


_held: tuple[str, LanguageModel] | None = None


def acquire(spec: ModelSpec) -> LanguageModel:
    """The model of `spec`: the one that is held, or loaded now after the one that was held has been freed.

    Do not keep it beyond one call of a judge: whoever keeps it keeps its memory.

    Raises:
        UserError: it is not on this machine, is damaged, or cannot be asked as `spec` says.
    """
    global _held
    if _held is None or _held[0] != spec.loads:
        release()
        _held = (spec.loads, _load(spec))
    lm = _held[1]
    if spec.chat and not lm.tokenizer.chat_template:
        raise UserError(_no_template(spec))
    return lm


def release() -> None:
    """Free the model that is held, if there is one, and give its memory back."""
    global _held
    if _held is None:
        return
    loads, lm = _held
    alive = weakref.ref(lm.model)
    _held = None
    del lm
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if alive() is not None:
        log.warning("the judge's model %s is still in memory: something besides the judges holds it", loads)


def _load(spec: ModelSpec) -> LanguageModel:
    from truthsteer.model import LanguageModel

    folder = located(spec)
    config = ModelConfig(name=spec.model, path=str(folder), chat_template=spec.chat)
    fitting.check_judge(str(folder), spec.policy, Device(spec.device), f"{spec.key}.model={spec.model}")
    log.info("loading the judge's model %s", spec.loads)
    try:
        return LanguageModel.from_config(config, spec.policy, Device(spec.device), Checkpoint(str(folder), None, "", 0))
    except UserError as error:
        raise UserError(f"{spec.key}.model={spec.model}: {_in_our_keys(str(error), spec.key)}") from error


def _in_our_keys(message: str, key: str) -> str:
    """A message about the steered model's keys, said of the judge's."""
    return _KEYS.sub(lambda found: f"{key}.{'model' if 'model' in found[0] else found[0]}", message)


def _not_here(spec: ModelSpec) -> str:
    at = f" at revision {spec.revision}" if spec.revision else ""
    if spec.folder is not None:
        return f"{spec.key}.model={spec.model} lacks some of its weights' files. Copy the whole checkpoint there."
    return (
        f"{spec.key}.model={spec.model}{at} is not (wholly) on this machine: type stages=[prefetch] once where there is "
        f"a network, or {spec.key}.model=FOLDER."
    )


def _no_template(spec: ModelSpec) -> str:
    return (
        f"{spec.key}.model={spec.model} has no chat template, and this judge asks through it. Type {spec.key}.model= "
        "with an instruction-tuned model, or judge=finetuned for a model that was trained to judge in plain text."
    )


def _has_template(folder: Path) -> bool:
    """Where transformers looks for a tokenizer's chat template."""
    config = folder / "tokenizer_config.json"
    files = (folder / "chat_template.jinja").is_file() or any((folder / "additional_chat_templates").glob("*.jinja"))
    return files or (config.is_file() and bool(_json(config).get("chat_template")))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _memory() -> Path | None:
    """Where hashes of large files are remembered: beside the hub's cache, if that can be written to, or made."""
    from huggingface_hub import constants

    memory = Path(constants.HF_HOME) / "truthsteer" / "fingerprints.json"
    nearest = next(folder for folder in memory.parents if folder.exists())
    return memory if nearest.is_dir() and os.access(nearest, os.W_OK) else None
