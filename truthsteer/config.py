"""The whole description of an experiment, typed. Hydra composes it; nothing here imports torch or reads a file.

Every field has its meaning under it and every value is checked when the config is built, before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from truthsteer.errors import UserError

EMBEDDED = "embedded"
"""Value of `model.path` and `data.path` that means the organism shipped with the package."""


class Stage(Enum):
    """The stages in the order in which they run. `prefetch` and `doctor` run only when they are named."""

    prefetch = "prefetch"
    doctor = "doctor"
    extract = "extract"
    steer = "steer"
    choose = "choose"
    generate = "generate"
    gauge = "gauge"
    judge = "judge"
    report = "report"


ON_DEMAND = (Stage.prefetch, Stage.doctor)
DEFAULT_STAGES = [stage for stage in Stage if stage not in ON_DEMAND]


class Weights(Enum):
    """Number format of weights and matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Residual(Enum):
    """Number format of the residual stream: the weights' own, or fp32 throughout."""

    same = "same"
    fp32 = "fp32"


class Attention(Enum):
    """Attention implementation of transformers."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Matmul(Enum):
    """Float32 matrix products on a GPU: IEEE float32, or TF32 (10 bits of mantissa)."""

    highest = "highest"
    high = "high"


class Quantize(Enum):
    """Weights of the linear layers in 8 or 4 bits (bitsandbytes); products in the format of `weights`."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


class OnOverflow(Enum):
    """What happens where the model's numbers are found not to be finite, or must be expected not to be."""

    error = "error"
    warn = "warn"


class TooLong(Enum):
    """What happens to an answer pair with a text longer than `steering.max_length`: both of its texts count."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


class DataSource(Enum):
    """Where questions come from."""

    csv = "csv"
    hub = "hub"


class CoefficientUnit(Enum):
    """What a coefficient of 1 adds: the mean residual norm at the layer, or the vector as it was estimated."""

    residual_norm = "residual_norm"
    raw = "raw"


class Device(Enum):
    """Where the model runs. `auto`: CUDA, else Apple's MPS, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _check_min(key: str, value: float, minimum: float) -> None:
    _require(value >= minimum, f"{key}={value} is below {minimum:g}. Type {key}={minimum:g} or more.")


@dataclass
class Resources:
    """What one job asks of a cluster."""

    gpus: int = 0
    cpus: int = 2
    mem_gb: int = 8
    timeout_min: int = 60

    def __post_init__(self) -> None:
        _check_min("model.resources.gpus", self.gpus, 0)
        _check_min("model.resources.cpus", self.cpus, 1)
        _check_min("model.resources.mem_gb", self.mem_gb, 1)
        _check_min("model.resources.timeout_min", self.timeout_min, 1)


@dataclass
class Shape:
    """Sizes known without the checkpoint, for the plan and its estimate of memory. Null: read from config.json."""

    parameters: int | None = None
    """Of what is loaded: of a multimodal Gemma 3 the text model alone. A tied head counts once."""
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    """Width inside a decoder layer's MLP."""
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    tied_head: bool | None = None
    """Whether the head that gives logits is the embedding's own matrix."""


@dataclass
class ModelConfig:
    """A causal language model, from the hub or from a folder."""

    name: str = MISSING
    """Short name, used in run folders and the report."""
    id: str | None = None
    """Hub id, such as `google/gemma-3-4b-it`."""
    revision: Any = None
    """Branch, tag or commit on the hub. Null: the newest; the commit it resolves to is recorded."""
    path: str | None = None
    """Folder with config, weights and tokenizer; wins over `id`. `embedded`: the organism."""
    chat_template: bool = False
    """Whether the model is instruction-tuned and is to be asked through its chat template."""
    layer: int | None = None
    """Default layer to steer: index of the decoder layer whose output is changed. Null: the middle one."""
    layers: list[int] | None = None
    """Layers tried on the tune split when `steering.layers` is null. Null: only `layer`."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Only for checkpoints you have read."""
    shape: Shape = field(default_factory=Shape)
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if self.revision is not None and not isinstance(self.revision, str):
            raise UserError(
                f"model.revision={self.revision!r} was read as a number. "
                f"Type it quoted: \"model.revision='{self.revision}'\" with the digits of the revision."
            )
        _require(
            bool(self.id or self.path),
            f"model '{self.name}' has neither an id nor a path. Type model.path=FOLDER or model.id=OWNER/NAME.",
        )
        for layer in [*([] if self.layer is None else [self.layer]), *(self.layers or [])]:
            check_layer("model.layer", layer, self.shape.num_layers)


def check_layer(key: str, layer: int, num_layers: int | None) -> None:
    """Raise unless `layer` indexes one of `num_layers` decoder layers (unknown: only negative ones are refused)."""
    top = (
        " Type 0 or more." if num_layers is None else f" The model has {num_layers} layers: type 0 to {num_layers - 1}."
    )
    _require(layer >= 0 and (num_layers is None or layer < num_layers), f"{key}={layer} is not a layer.{top}")


@dataclass
class DtypeConfig:
    """A numeric policy."""

    name: str = MISSING
    weights: Weights = Weights.fp32
    """Of weights and matrix products."""
    residual: Residual = Residual.same
    """Of the residual stream and the norms: the weights' own, or fp32."""
    attention: Attention = Attention.sdpa
    matmul: Matmul = Matmul.highest
    """Precision of float32 products on a GPU."""
    quantize: Quantize = Quantize.none
    on_overflow: OnOverflow = OnOverflow.error
    """error: stop where the doctor or the check before extraction finds numbers that overflow. warn: go on; pairs that are
    not finite are dropped and counted."""

    def __post_init__(self) -> None:
        if self.weights is Weights.fp32 and self.attention is Attention.flash_attention_2:
            raise UserError(
                "dtype.attention=flash_attention_2 computes in 16 bits only. Type dtype=bf16 with it, or dtype.attention=sdpa."
            )


@dataclass
class SplitSizes:
    """Relative sizes of the four roles; under cross-fitting (`data.folds` > 1) `test` follows from the folds."""

    steer: float = 100
    train: float = 250
    tune: float = 117
    test: float = 350

    def __post_init__(self) -> None:
        for role in fields(self):
            _check_min(f"data.split.{role.name}", getattr(self, role.name), 0)
        for role_name in ("steer", "tune", "test"):
            _require(
                getattr(self, role_name) > 0, f"data.split.{role_name}=0 leaves nobody for it. Type a number above 0."
            )


@dataclass
class DataConfig:
    """The questions and who of them does what."""

    name: str = MISSING
    source: DataSource = DataSource.csv
    path: str | None = None
    """CSV in TruthfulQA's schema. `embedded`: the organism's questions."""
    id: str | None = None
    """Hub id of the dataset (configs `generation` and `multiple_choice`)."""
    revision: Any = None
    """Commit of the dataset on the hub."""
    folds: int = 1
    """1: one split. k > 1: cross-fitting, each question is tested once, with everything chosen on other folds."""
    limit: int | None = None
    """Use only this many questions, drawn with the seed."""
    split: SplitSizes = field(default_factory=SplitSizes)

    def __post_init__(self) -> None:
        _require(self.folds >= 1 and self.folds <= 50, f"data.folds={self.folds} is not 1 to 50. Type data.folds=5.")
        if self.limit is not None:
            _check_min("data.limit", self.limit, 8)
        if self.source is DataSource.csv:
            _require(bool(self.path), f"data={self.name} needs a file. Type data.path=FILE.csv.")
        if self.source is DataSource.hub:
            _require(bool(self.id), f"data={self.name} needs a dataset. Type data.id=OWNER/NAME.")
        if self.revision is not None and not isinstance(self.revision, str):
            raise UserError(
                f"data.revision={self.revision!r} was read as a number. Type it quoted: \"data.revision='...'\"."
            )


@dataclass
class PromptConfig:
    """How a question becomes text, and where its answer ends."""

    name: str = MISSING
    text: str = MISSING
    """Text before the answer, with `{question}`, for base models; ends with the closing cue."""
    chat_text: str = MISSING
    """Text of the user's turn, with `{question}`, for models asked through a chat template."""
    chat: bool | None = None
    """Use the chat template. Null: as `model.chat_template` says."""
    stop: list[str] = field(default_factory=list)
    """A generated answer ends where one of these begins."""

    def __post_init__(self) -> None:
        for key, text in (("prompt.text", self.text), ("prompt.chat_text", self.chat_text)):
            _require(text.count("{question}") == 1, f"{key} must hold {{question}} exactly once; it is {text!r}.")
        _require(all(self.stop), "prompt.stop holds an empty string. Remove it.")


@dataclass
class BankConfig:
    """Vectors from random subsets of the pairs: how much the vector depends on which questions made it."""

    subsets: int = 12
    min_pairs: int = 30
    max_pairs: int = 50
    """Subset sizes are drawn between these, clamped to the pairs there are."""

    def __post_init__(self) -> None:
        _check_min("steering.bank.subsets", self.subsets, 0)
        _check_min("steering.bank.min_pairs", self.min_pairs, 2)
        _require(
            self.max_pairs >= self.min_pairs,
            f"steering.bank.max_pairs={self.max_pairs} is below min_pairs={self.min_pairs}. "
            f"Type steering.bank.max_pairs={self.min_pairs}.",
        )


@dataclass
class ControlsConfig:
    """Conditions that must show nothing, or the opposite."""

    random: int = 5
    """Random directions of the vector's norm, orthogonal to it."""
    shuffled: int = 1
    """Vectors estimated with the labels of half the questions swapped: of the vector's norm, orthogonal to it."""
    sign_flip: bool = True
    """The vector at minus the chosen coefficient."""
    style: bool = True
    """Directions of style (negation, length, hedging) at the vector's norm, and the vector without them."""
    envelope: int = 20
    """Random directions per cell of the tune split's grid, at the chosen layer (of the first fold): what chance does there.
    0: none."""

    def __post_init__(self) -> None:
        _check_min("steering.controls.random", self.random, 0)
        _check_min("steering.controls.shuffled", self.shuffled, 0)
        _check_min("steering.controls.envelope", self.envelope, 0)


@dataclass
class SteeringConfig:
    """What is estimated, where and how strongly it is added."""

    max_length: int = 512
    """Longest prompt plus answer in tokens."""
    too_long: TooLong = TooLong.error
    """Longer texts. error: say so before anything is computed. drop: leave out pairs with such a text. truncate: read
    activations of the text without its end. Dropped and truncated texts are counted in the report. Answers that are scored
    or generated are never cut."""
    layers: list[int] | None = None
    """Layers tried on the tune split. Null: the model's own `layers`."""
    coefficients: list[float] = field(default_factory=list)
    """Coefficients tried on the tune split and shown in the dose response."""
    coefficient_unit: CoefficientUnit = CoefficientUnit.residual_norm
    pairs_per_question: int = 2
    """At most this many (true, false) answer pairs of one question."""
    max_dropped: float = 0.01
    """Largest share of pairs that may be lost to non-finite activations before the run stops."""
    bank: BankConfig = field(default_factory=BankConfig)
    controls: ControlsConfig = field(default_factory=ControlsConfig)

    def __post_init__(self) -> None:
        _check_min("steering.max_length", self.max_length, 8)
        _check_min("steering.pairs_per_question", self.pairs_per_question, 1)
        _require(
            0 <= self.max_dropped <= 1,
            f"steering.max_dropped={self.max_dropped} is not a share. Type a number from 0 to 1.",
        )
        _require(bool(self.coefficients), "steering.coefficients is empty. Type steering.coefficients=[0.5,1].")
        for value in self.coefficients:
            _require(
                value == value and abs(value) != float("inf") and value != 0,
                f"steering.coefficients holds {value}. 0 is the baseline, which is always run; type finite numbers other than 0.",
            )
        _require(
            any(value > 0 for value in self.coefficients),
            f"steering.coefficients={self.coefficients} has no positive value to choose from. Add one.",
        )
        self.coefficients = sorted(set(self.coefficients))
        if self.layers is not None:
            _require(bool(self.layers), "steering.layers is empty. Type steering.layers=[12] or steering.layers=null.")
            self.layers = sorted(set(self.layers))


@dataclass
class GenerationConfig:
    """How answers are generated."""

    max_new_tokens: int = 50
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus of sampling; read only when temperature > 0."""

    def __post_init__(self) -> None:
        _check_min("generation.max_new_tokens", self.max_new_tokens, 1)
        _check_min("generation.temperature", self.temperature, 0)
        _require(
            0 < self.top_p <= 1, f"generation.top_p={self.top_p} is not a share. Type a number above 0, at most 1."
        )


@dataclass
class BaselinesConfig:
    """Rows without steering that a steered row has to beat."""

    prompts: dict[str, PromptConfig] = field(default_factory=dict)
    """Name -> another prompt, without steering. `+prompt@baselines.prompts.NAME=PRESET` adds one."""
    few_shot: int = 5
    """Best answers of so many train questions put before each question, in the run's own prompt. 0: none."""
    abstain: bool = True
    """Always "I have no comment."."""
    shortest: bool = True
    """Multiple choice by the shortest answer."""
    surface: bool = True
    """Multiple choice by wording alone: a classifier that never sees the question, fitted on the other splits."""

    def __post_init__(self) -> None:
        _check_min("baselines.few_shot", self.few_shot, 0)
        for name in self.prompts:
            _require(
                bool(re.fullmatch(r"[A-Za-z0-9_]+", name)) and name != FEW_SHOT,
                f"baselines.prompts.{name} cannot name a prompt. Type letters, digits and '_', and not '{FEW_SHOT}'.",
            )


FEW_SHOT = "few_shot"


@dataclass
class GaugeConfig:
    """What steering costs elsewhere."""

    text: str | None = None
    """Neutral text, passages separated by blank lines. Null: the English one that comes along; `embedded`: the
    organism's."""
    passages: int = 40
    """Use at most so many passages. 0: measure nothing on neutral text."""
    max_tokens: int = 128
    """Tokens read of each passage."""
    capability: str | None = None
    """CSV of multiple-choice questions (question,A,B,C,D,answer). Null: none."""

    def __post_init__(self) -> None:
        _check_min("gauge.passages", self.passages, 0)
        _check_min("gauge.max_tokens", self.max_tokens, 2)


@dataclass
class DoctorConfig:
    """What `stages=[doctor]` looks at."""

    texts: int = 8
    """Answers read, from the shortest to the longest."""
    reference: bool = True
    """Compare with the same model in fp32, where memory allows."""

    def __post_init__(self) -> None:
        _check_min("doctor.texts", self.texts, 2)


@dataclass
class PathsConfig:
    """Where things are kept."""

    root: str = "multirun"
    """Holds everything a run writes: run folders and the store."""
    hf_cache: str | None = None
    """HF_HOME for this run, set before any hub library is imported. Null: the environment's."""


@dataclass
class Config:
    """One experiment."""

    model: ModelConfig = MISSING
    dtype: DtypeConfig = MISSING
    data: DataConfig = MISSING
    prompt: PromptConfig = MISSING
    steering: SteeringConfig = MISSING
    method: dict[str, Any] = field(default_factory=dict)
    """Name -> component (`_target_` and its fields). Several at once: `method=[mean_diff,other]`."""
    operator: dict[str, Any] = field(default_factory=dict)
    """How a vector is applied: one component."""
    judge: dict[str, Any] = field(default_factory=dict)
    """Name -> component. Several at once: `judge=[reference,semantic]`; the first with truth scores fills the table."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    gauge: GaugeConfig = MISSING
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    stages: list[Stage] = field(default_factory=lambda: list(DEFAULT_STAGES))
    """Which stages run; what the others would make must be in the store."""
    run: str | None = None
    """A finished run (its id or folder) to judge again without its model: `experiment=eval_only run=...`."""
    run_id: str | None = None
    """Name of the run folder. Null: a readable name and the hash of the config."""
    seed: int = 42
    """Moves splits, subsets, controls, sampling and resampling."""
    device: Device = Device.auto
    threads: int | None = None
    """Threads of torch on the CPU. Null: 1 for models too small to gain from more, else torch's own choice."""
    batch_tokens: int = 8192
    """Tokens computed at once: lower it if memory runs out."""
    shards: int = 1
    """So many processes share the run's work: on this machine, or with `-m` and a launcher as one job each."""
    shard: int | None = None
    """Which of them this process is, from 0. Null: the first one, which starts the others."""
    check_memory: bool = True
    """Refuse, before weights are loaded, what cannot fit into memory by the estimate that `dry_run=true` prints."""
    dry_run: bool = False
    """Compose, build and check everything that needs no weights, print the plan, and stop."""
    verbose: bool = False

    def __post_init__(self) -> None:
        _check_min("batch_tokens", self.batch_tokens, 16)
        _check_min("shards", self.shards, 1)
        _require(
            self.shard is None or 0 <= self.shard < self.shards,
            f"shard={self.shard} is not one of the shards={self.shards}, counted from 0. Type shards=N with it, or leave "
            "shard out.",
        )
        if self.threads is not None:
            _check_min("threads", self.threads, 1)
        _check_min("seed", self.seed, 0)
        _require(self.run != "", "run= names no run. Type run=RUN, the name of a finished run's folder.")
        _require(bool(self.method), "No method is chosen. Type method=mean_diff.")
        _require(bool(self.judge), "No judge is chosen. Type judge=reference.")
        _require(
            bool(self.stages),
            f"stages is empty. Type stages=[{','.join(stage.value for stage in DEFAULT_STAGES)}] or leave it out.",
        )
        if self.run_id is not None:
            check_run_id(str(self.run_id))
        if self.steering.layers is None:
            self.steering.layers = self.model.layers or (None if self.model.layer is None else [self.model.layer])
        for layer in self.steering.layers or []:
            check_layer("steering.layers", layer, self.model.shape.num_layers)


def check_run_id(run_id: str, key: str = "run_id") -> None:
    """Raise unless `run_id`, which `key` holds, is a plain folder name: no separators, no `..`, nothing hidden."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=,-]{0,127}", run_id) or ".." in run_id:
        raise UserError(
            f"{key}={run_id!r} cannot name a folder. Type letters, digits, '_', '-', '.', '=', ',' or '+' "
            "(at most 128, beginning with a letter, digit or '_'); no path separators and no '..'."
        )


def to_plain(value: Any) -> Any:
    """A config as plain dicts, lists and scalars: what is hashed and written to run.json."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


TRANSIENT = (
    "paths",
    "stages",
    "run",
    "run_id",
    "device",
    "threads",
    "batch_tokens",
    "shards",
    "shard",
    "check_memory",
    "doctor",
    "dry_run",
    "verbose",
)
"""Keys that do not change what a run is, so that changing them continues the same run."""


JUDGE_TRANSIENT = ("device", "batch_tokens", "batch_size")
"""The same of judges; their verdicts' keys say what else decides them."""


def identity(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config (or of its plain form, as a record holds it) that a run is: everything but `TRANSIENT`, what a
    cluster is asked for, and what only decides a plan or an error."""
    plain = deepcopy(dict(config)) if isinstance(config, Mapping) else to_plain(config)
    plain = {key: value for key, value in plain.items() if key not in TRANSIENT}
    for name in ("shape", "resources"):
        plain["model"].pop(name, None)
    plain["dtype"].pop("on_overflow", None)
    for node in plain["judge"].values():
        for name in JUDGE_TRANSIENT:
            node.pop(name, None)
    return plain
