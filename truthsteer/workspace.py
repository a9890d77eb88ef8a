"""What the stages of one run share: its config, components, store, checkpoint, and the model once it is needed.

Everything is made when it is first asked for: a rerun of a finished run never loads the model, nor imports torch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthsteer import capability, data, fitting
from truthsteer.capability import Item
from truthsteer.checkpoint import Checkpoint, resolve
from truthsteer.component import build, build_all
from truthsteer.config import FEW_SHOT, Config, PromptConfig, Stage, check_layer, to_plain
from truthsteer.files import digest, write_json
from truthsteer.progress import Advance, on_file, progress_bar
from truthsteer.prompts import few_shot, uses_chat
from truthsteer.records import Question, Splits, from_json, to_json
from truthsteer.store import Artifact, Key, Store

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel
    from truthsteer.prompts import Prompts

log = logging.getLogger("truthsteer")

SPLITS_VERSION = 2
ROLES = ("steer", "train", "tune", "test")
SMALL_HIDDEN = 256
"""Up to this width one thread is as fast as several, and on a busy machine many times faster."""


class Workspace:
    """One run's shared parts.

    Args:
        config: the composed config.
        folder: the run's folder.
        checkpoint: the weights, where they are known already (from the record of a run that is judged again).

    Raises:
        UserError: a component is misconfigured.
    """

    def __init__(self, config: Config, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.config = config
        self.folder = folder
        if checkpoint is not None:
            self.__dict__["checkpoint"] = checkpoint
        self.store = Store(Path(config.paths.root), (config.shard or 0, config.shards))
        self.methods: dict[str, Any] = build_all(config.method, "method")
        self.operator: Any = build(config.operator, "operator")
        self.judges: dict[str, Any] = build_all(config.judge, "judge")

    def runs(self, stage: Stage) -> bool:
        """Whether a stage may compute; otherwise its artifacts must be in the store."""
        return stage in self.config.stages

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's weights, pinned down."""
        return resolve(self.config.model, self.store.root / "fingerprints.json")

    @cached_property
    def judge_identities(self) -> dict[str, dict[str, Any]]:
        """What verdicts rest on beyond a judge's fields; asked once, since it may read a whole checkpoint.

        Raises:
            UserError: a judge lacks something on this machine.
        """
        return {name: judge.identity() for name, judge in self.judges.items()}

    @cached_property
    def capability(self) -> tuple[tuple[Item, ...], tuple[str, ...]]:
        """The capability questions, and what was left out of their file; nothing without a file."""
        path = self.config.gauge.capability
        return capability.read(path) if path else ((), ())

    @cached_property
    def layers(self) -> list[int]:
        """Layers tried on the tune split."""
        known = self.config.model.shape.num_layers
        total = known or self.checkpoint.num_layers
        layers = self.config.steering.layers or [total // 2]
        model = self.config.model
        own = layers in (model.layers, [model.layer])  # what `steering.layers` is unless it is typed
        key = "model.layer" if own else "steering.layers"
        for layer in layers:
            check_layer(key, layer, total)
        return layers

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        """What determines the model's numbers, for keys."""
        policy = to_plain(self.config.dtype)
        for name in ("name", "on_overflow"):
            policy.pop(name)
        return {"weights": self.checkpoint.fingerprint, "dtype": policy}

    def prompt(self, name: str = "", split: Splits | None = None) -> PromptConfig:
        """The run's own prompt, or the baseline of that name; `few_shot` is made from the train questions of `split`."""
        if not name:
            return self.config.prompt
        if name != FEW_SHOT:
            return self.config.baselines.prompts[name]
        assert split is not None
        ranked = sorted(split.train, key=lambda question: digest([self.config.seed, FEW_SHOT, question.id]))
        return few_shot(self.config.prompt, [(q.text, q.best) for q in ranked[: self.config.baselines.few_shot]])

    def prompt_inputs(self, prompt: PromptConfig | None = None) -> dict[str, Any]:
        """What determines the text a question becomes, for keys."""
        prompt = prompt or self.config.prompt
        chat = uses_chat(prompt, self.config.model.chat_template)
        return {"chat": chat, "text": prompt.chat_text if chat else prompt.text}

    @cached_property
    def splits_artifact(self) -> Artifact:
        """The questions and who does what."""
        config = self.config
        plain = to_plain(config.data)
        plain.pop("name")
        plain.pop("path")
        key = Key.of("splits", SPLITS_VERSION, source=data.fingerprint(config.data), config=plain, seed=config.seed)

        return self.store.make(key, lambda folder: write_json(folder / "splits.json", self.deal()))

    def deal(self) -> dict[str, Any]:
        """Load the data and deal the roles, without the store."""
        config = self.config
        found = data.load(config.data, config.seed)
        splits = data.split(found, config.data, config.seed)
        return {
            "folds": [to_json(fold) for fold in splits],
            "data": {
                "n": len(found.questions),
                "sha256": found.sha256,
                "version": found.version,
                "problems": list(found.problems),
                "leaks": data.leaks(splits),
                "sizes": {role: [len(getattr(fold, role)) for fold in splits] for role in ROLES},
            },
        }

    @cached_property
    def _splits(self) -> dict[str, Any]:
        whole: dict[str, Any] = self.splits_artifact.json("splits.json")
        return whole

    @cached_property
    def splits(self) -> tuple[Splits, ...]:
        """Who does what, one per fold."""
        return tuple(from_json(Splits, fold) for fold in self._splits["folds"])

    @cached_property
    def steer_questions(self) -> tuple[Question, ...]:
        """Those that vectors are estimated from, of all folds, each once."""
        return tuple({question.id: question for fold in self.splits for question in fold.steer}.values())

    @property
    def data_facts(self) -> dict[str, Any]:
        """Counts, hash, version and problems of the data."""
        facts: dict[str, Any] = self._splits["data"]
        return facts

    @property
    def depth(self) -> int | None:
        """How many of the model's layers this run needs; None: all of them."""
        return max(self.layers) + 1 if set(self.config.stages) <= {Stage.prefetch, Stage.extract} else None

    @cached_property
    def model(self) -> LanguageModel:
        """The model, loaded now if it was not yet.

        Raises:
            UserError: it cannot be loaded, or does not fit into memory.
        """
        from truthsteer.model import LanguageModel

        config, known = self.config, self.checkpoint
        questions = len(self.steer_questions)
        fitting.check_run(config, self.layers, known.location, known.commit, self.depth, questions)
        log.info("loading %s as %s", config.model.name, config.dtype.name)
        lm = LanguageModel.from_config(config.model, config.dtype, config.device, known, self.depth)
        for sentence in lm.cautions:
            log.warning(sentence)
        threads = config.threads or (1 if lm.hidden_size <= SMALL_HIDDEN else None)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.store.facts |= {"device": lm.device.type, "dtype": config.dtype.name, "hardware": list(lm.cautions)}
        return lm

    def prompts(self, prompt: PromptConfig | None = None) -> Prompts:
        """Renders under a prompt, the run's own by default."""
        from truthsteer.prompts import Prompts

        return Prompts(prompt or self.config.prompt, self.model.tokenizer, self.config.model.chat_template)

    def free_model(self) -> None:
        """Forget the model, so that judges have its memory."""
        if self.__dict__.pop("model", None) is not None:
            gc.collect()
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def label(self, text: str, split: Splits) -> str:
        """A progress bar's description, with the fold where there are several."""
        return f"{text} ({split.fold + 1}/{len(self.splits)})" if len(self.splits) > 1 else text

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Advance]:
        with progress_bar(description, total) as advance:
            yield on_file(advance, self.folder, description, total, self.config.shard)


def questions_digest(questions: tuple[Question, ...]) -> str:
    """Content of questions with their answers, for keys; near-duplicate groups do not matter to a model."""
    return digest([[q.id, q.text, q.best, list(q.correct), list(q.incorrect)] for q in questions])
