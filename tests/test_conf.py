"""conf/: every file composes with the schema and holds the agreed values; mistakes are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import logging.config
import re
import shlex
import string
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement

from truthsteer import baselines
from truthsteer import config as schema
from truthsteer.cli import explain, to_config
from truthsteer.config import Config, Weights, to_plain
from truthsteer.errors import UserError
from truthsteer.runs import find_run

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"

TYPED = {
    "model": schema.ModelConfig,
    "dtype": schema.DtypeConfig,
    "data": schema.DataConfig,
    "prompt": schema.PromptConfig,
    "steering": schema.SteeringConfig,
    "gauge": schema.GaugeConfig,
}
COMPONENTS = ("method", "operator", "judge")
GROUPS = (*TYPED, *COMPONENTS, "experiment")

MANDATORY = {
    "model=local": "model.path=DIR",
    "model=hub": "model.id=OWNER/NAME",
    "data=truthfulqa_csv": "data.path=FILE.csv",
    "experiment=eval_only": "run=RUN",
}
"""Choices that need a value from the command line."""

MODELS = """
name           id                         chat layer  parameters layers hidden kv dim gpus cpus mem_gb hours
organism       -                          no       3      858000      5     96  2  24    0    2      8     1
gemma3_270m    google/gemma-3-270m-it     yes      8   268098176     18    640  1 256    1    8     48     8
gemma3_1b      google/gemma-3-1b-it       yes     12   999885952     26   1152  1 256    1    8     64    12
gemma3_4b      google/gemma-3-4b-it       yes     16  3880263168     34   2560  4 256    1    8     90    12
gemma3_12b     google/gemma-3-12b-it      yes     18 11766034176     48   3840  8 256    2   12    128     5
gemma3_27b     google/gemma-3-27b-it      yes     26 27009346304     62   5376 16 128    3   16    180    24
gemma3_270m_pt google/gemma-3-270m        no       8   268098176     18    640  1 256    1    8     48     8
gemma3_1b_pt   google/gemma-3-1b-pt       no      12   999885952     26   1152  1 256    1    8     64    12
gemma3_4b_pt   google/gemma-3-4b-pt       no      16  3880263168     34   2560  4 256    1    8     90    12
gemma3_12b_pt  google/gemma-3-12b-pt      no      18 11766034176     48   3840  8 256    2   12    128     5
gemma3_27b_pt  google/gemma-3-27b-pt      no      26 27009346304     62   5376 16 128    3   16    180    24
gemma2_2b      google/gemma-2-2b-it       yes     12  2614341888     26   2304  4 256    1   10     80    12
gemma2_9b      google/gemma-2-9b-it       yes     21  9241705984     42   3584  8 256    2   10    128    12
gemma2_27b     google/gemma-2-27b-it      yes     24 27227128320     46   4608 16 128    2   16    180    24
qwen2_5_0_5b   Qwen/Qwen2.5-0.5B-Instruct yes     16   494032768     24    896  2  64    1    8     48     8
qwen2_5_1_5b   Qwen/Qwen2.5-1.5B-Instruct yes     20  1543714304     28   1536  2 128    1    8     64    10
qwen2_5_3b     Qwen/Qwen2.5-3B-Instruct   yes     24  3085938688     36   2048  2 128    1   10     80    12
qwen2_5_7b     Qwen/Qwen2.5-7B-Instruct   yes     20  7615616512     28   3584  4 128    1   12     96    16
qwen2_5_14b    Qwen/Qwen2.5-14B-Instruct  yes     36 14770033664     48   5120  8 128    2   12    128    18
qwen2_5_32b    Qwen/Qwen2.5-32B-Instruct  yes     48 32763876352     64   5120  8 128    3   16    180    24
"""
"""The agreed values: hub id ('-': comes with the package), chat template, layer, sizes, resources."""

CLOSING_CUES = {
    "plain": "Q: {question}\nA:",
    "qa": "\n\nQ: {question}\nA:",
    "null": "Q: {question}\n\nA:",
    "help": "\n\nQ: {question}\nA:",
    "chat": "{question}\n\nAlex1083:",
    "long": "{question}\n\nMy answer:",
    "harm": "{question}\nA:",
    "truthful": "\n\nQ: {question}\nA:",
}

QA_SHA256 = "72cfd96668aae373ed163f14e9287fa4a4937171dcdc4868bdd741a87227d51d"
"""Of lm-evaluation-harness 0.4.13's truthfulqa_mc1 prompt, rendered for the question ``{question}``."""


HEADER, *MODEL_ROWS = [line.split() for line in MODELS.strip().splitlines()]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def needs(choice: str) -> list[str]:
    return [MANDATORY[choice]] if choice in MANDATORY else []


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


def config(*overrides: str) -> Config:
    built = OmegaConf.to_object(composed(*overrides))
    assert isinstance(built, Config)
    return built


def with_hydra(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides), return_hydra_config=True)


def command(line: str) -> list[str]:
    """The overrides of a documented command line."""
    program, *overrides = shlex.split(line.removeprefix("python -m "))
    assert program == "truthsteer"
    return overrides


def rows() -> list[tuple[str, ...]]:
    """As few choices of all groups together as hold every option at least once."""
    columns = [[f"{group}='{option}'" for option in options(group)] for group in (*TYPED, *COMPONENTS)]
    firsts = [column[0] for column in columns]
    return [tuple(cell or first for cell, first in zip(row, firsts, strict=True)) for row in zip_longest(*columns)]


def in_its_row(group: str, option: str) -> Config:
    """The config of the row that holds an option; composed once for all tests that look at it."""
    row = next(row for row in rows() if f"{group}='{option}'" in row)
    return config(*row, *[value for choice in row for value in needs(choice.replace("'", ""))])


# ---------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("group", TYPED)
def test_every_file_alone_holds_only_keys_and_values_of_its_schema(group: str) -> None:
    assert options(group)
    for option in options(group):
        content = OmegaConf.load(CONF / group / f"{option}.yaml")
        node = content.get(group, content)
        for key in [*node]:
            if key == "defaults":
                del node[key]
        OmegaConf.merge(OmegaConf.structured(TYPED[group]), node)
        if "name" in {field.name for field in dataclasses.fields(TYPED[group])}:
            assert node["name"] == option, f"{group}/{option}.yaml"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_option_composes_with_the_others(row: tuple[str, ...]) -> None:
    built = in_its_row(*row[0].replace("'", "").split("="))
    for choice in row:
        group, option = choice.replace("'", "").split("=")
        node = getattr(built, group)
        if group in ("method", "judge"):
            assert list(node) == [option]
        elif hasattr(node, "name"):
            assert node.name == option
    assert not OmegaConf.missing_keys(OmegaConf.create(to_plain(built)))


def test_several_methods_and_judges_at_once() -> None:
    methods, judges = options("method"), list(reversed(options("judge")))
    built = config(f"method=[{','.join(methods)}]", f"judge=[{','.join(judges)}]")
    assert list(built.method) == methods
    assert list(built.judge) == judges, "in the order in which they were typed"


def test_every_component_says_which_class_it_is() -> None:
    for group in COMPONENTS:
        for option in options(group):
            content = OmegaConf.load(CONF / group / f"{option}.yaml")
            node = content if group == "operator" else content[option]
            assert re.fullmatch(r"truthsteer(\.\w+)+\.[A-Z]\w+", node["_target_"]), f"{group}/{option}.yaml"
            assert group == "operator" or list(content) == [option], "under its own name, so that lists work"


@pytest.mark.parametrize(
    ("overrides", "weights", "data", "judges"),
    [
        ([], "fp32", "organism", ["reference"]),
        (["model=gemma3_4b"], "bf16", "truthfulqa", ["reference", "semantic"]),
        (["data=truthfulqa_csv", "data.path=x.csv"], "fp32", "truthfulqa_csv", ["reference"]),
        (["dtype=bf16", "data=truthfulqa", "judge=[semantic]"], "bf16", "truthfulqa", ["semantic"]),
        (["experiment=gemma3_27b_fp16_short"], "fp16", "truthfulqa", ["reference", "semantic"]),
        (["experiment=gemma3_27b_fp16_short", "dtype=fp32"], "fp32", "truthfulqa", ["reference", "semantic"]),
        (["experiment=gemma3_270m_local", "model=organism"], "fp32", "organism", ["reference"]),
        (["model=gemma3_4b", "dtype.weights=fp32"], "fp32", "truthfulqa", ["reference", "semantic"]),
    ],
)
def test_command_line_beats_experiment_beats_model_beats_default(
    overrides: list[str], weights: str, data: str, judges: list[str]
) -> None:
    built = config(*overrides)
    assert (built.dtype.weights.value, built.data.name, list(built.judge)) == (weights, data, judges)


@pytest.mark.parametrize("override", ["modle=organism", "steering.max_lenght=384"])
def test_a_misspelt_key_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=re.escape(override.split("=")[0])):
        composed(override)


def test_an_unknown_option_is_refused_with_the_options_there_are() -> None:
    with pytest.raises(MissingConfigException, match="Available options in 'model'") as caught:
        composed("model=gemma3_4bb")
    assert all(option in str(caught.value) for option in options("model"))
    with pytest.raises(MissingConfigException, match="judge/semantics"):
        composed("judge=[reference,semantics]")


@pytest.mark.parametrize("override", ["dtype.weights=fp8", "seed=soon"])
def test_a_value_of_the_wrong_kind_is_refused_by_key(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=re.escape(override.split("=")[0])):
        composed(override)


def test_a_file_from_elsewhere_is_checked_like_our_own(tmp_path: Path) -> None:
    (tmp_path / "dtype").mkdir()
    (tmp_path / "dtype" / "mine.yaml").write_text("name: mine\nweights: fp32\n")
    (tmp_path / "dtype" / "misspelt.yaml").write_text("name: misspelt\nwieghts: fp32\n")
    path = f"hydra.searchpath=[file://{tmp_path}]"
    assert config(path, "dtype=mine").dtype.name == "mine"
    with pytest.raises(ConfigCompositionException, match="wieghts"):
        composed(path, "dtype=misspelt")


@pytest.mark.parametrize("choice", MANDATORY)
def test_a_mandatory_value_is_asked_for(choice: str) -> None:
    key = MANDATORY[choice].split("=")[0]
    with pytest.raises(UserError, match=f"Type .*{re.escape(key)}="):
        config(choice)


def test_a_run_that_is_not_there_is_looked_for_under_similar_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^run=mine is not a run under .* none there: type paths\.root=DIR\.$"):
        find_run(tmp_path, "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}", encoding="utf-8")
    assert find_run(tmp_path, "mine") == (tmp_path / "mine", {})
    monkeypatch.chdir(tmp_path)
    assert find_run(tmp_path / "elsewhere", "mine") == (Path("mine"), {})
    with pytest.raises(
        UserError, match=r"^mien is not .* Did you mean 'mine'\? Runs there: mine\. Type one, or --root\.$"
    ):
        find_run(tmp_path, "mien", key="", elsewhere="--root")


# --------------------------------------------------------------------------------------------------- values


def test_the_table_holds_every_named_model() -> None:
    assert set(options("model")) == {*(row[0] for row in MODEL_ROWS), "local", "hub"}


@pytest.mark.parametrize("row", MODEL_ROWS, ids=lambda row: row[0])
def test_a_model_holds_the_agreed_values(row: list[str]) -> None:
    model = in_its_row("model", row[0]).model
    shape, asked = model.shape, model.resources
    chat_template = "yes" if model.chat_template else "no"
    sizes = (shape.parameters, shape.num_layers, shape.hidden_size, shape.num_kv_heads, shape.head_dim)
    resources = (asked.gpus, asked.cpus, asked.mem_gb, asked.timeout_min // 60)
    found = [model.name, model.id or "-", chat_template, model.layer, *sizes, *resources]
    assert dict(zip(HEADER, map(str, found), strict=True)) == dict(zip(HEADER, row, strict=True))
    assert asked.timeout_min % 60 == 0
    assert model.revision is None, "null: the newest, and the commit it resolves to is recorded"
    assert model.path == ("embedded" if model.name == "organism" else None)
    assert model.layers == ([0, 1, 2, 3, 4] if model.name == "organism" else None)
    assert not model.trust_remote_code


@pytest.mark.parametrize("name", options("model"))
def test_a_model_file_leaves_nothing_to_a_default(name: str) -> None:
    content = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    node = content.get("model", content)
    base = [item for item in content.get("defaults", []) if isinstance(item, str) and item != "_self_"]
    if base:
        node = OmegaConf.merge(OmegaConf.load(CONF / "model" / f"{base[0]}.yaml"), node)
    parts = ((schema.ModelConfig, node), (schema.Shape, node.shape), (schema.Resources, node.resources))
    for cls, part in parts:
        missing = {field.name for field in dataclasses.fields(cls)} - {"trust_remote_code"} - set(part)
        assert not missing, f"model/{name}.yaml lacks {missing}"


def test_gemma_2_never_gets_an_attention_without_its_cap() -> None:
    for name in options("model"):
        attention = in_its_row("model", name).dtype.attention.value
        assert attention == ("eager" if name.startswith("gemma2") else "sdpa"), name
    assert config("model=gemma2_2b", "dtype=fp16").dtype.attention.value == "eager"


def test_dtypes() -> None:
    policies = {}
    for name in options("dtype"):
        dtype = in_its_row("dtype", name).dtype
        policies[name] = (dtype.weights.value, dtype.residual.value, dtype.quantize.value)
        assert (dtype.matmul.value, dtype.on_overflow.value) == ("highest", "error")
    assert policies == {
        "fp32": ("fp32", "same", "none"),
        "bf16": ("bf16", "same", "none"),
        "fp16": ("fp16", "fp32", "none"),
        "fp16_pure": ("fp16", "same", "none"),
        "int8": ("fp16", "fp32", "int8"),
        "int4": ("bf16", "same", "int4"),
    }


def test_data() -> None:
    organism = config().data
    assert (organism.source.value, organism.path, organism.folds) == ("csv", "embedded", 1)
    assert dataclasses.astuple(organism.split) == (96, 16, 48, 160)
    hub = config("model=gemma3_4b").data
    assert (hub.source.value, hub.id, hub.folds) == ("hub", "truthfulqa/truthful_qa", 5)
    assert re.fullmatch("[0-9a-f]{40}", hub.revision), "pinned to a commit"
    file = config("data=truthfulqa_csv", "data.path=x.csv").data
    assert (file.source.value, file.path, file.folds) == ("csv", "x.csv", 5)
    assert file.split == hub.split


def test_steering() -> None:
    default, short = config().steering, config("steering=short_context").steering
    assert default.max_length == 512
    assert min(default.coefficients) < 0 < max(default.coefficients), "the dose response shows both sides"
    assert max(default.coefficients) >= 1, "and goes on to where text breaks"
    assert short == dataclasses.replace(default, max_length=384)


def test_gauge() -> None:
    """The organism is measured on its own text, every other model on English; capability questions are the user's own."""
    assert set(options("gauge")) == {"english", "organism"}
    english, organism = (in_its_row("gauge", name).gauge for name in ("english", "organism"))
    assert dataclasses.astuple(english) == (None, 40, 128, None)
    assert organism == dataclasses.replace(english, text="embedded")
    assert config().gauge == organism, "the organism brings it along"
    assert config("gauge=english").gauge == english, "and it can be changed"
    assert config("model=gemma3_4b").gauge == english
    assert config("gauge.capability=mmlu.csv", "gauge.passages=3").gauge == dataclasses.replace(
        organism, capability="mmlu.csv", passages=3
    )


def test_what_a_steered_row_has_to_beat() -> None:
    default = config("model=gemma3_4b").baselines
    assert {name: preset.name for name, preset in default.prompts.items()} == {"truthful": "truthful", "help": "help"}
    assert (default.few_shot, default.abstain, default.shortest, default.surface) == (5, True, True, True)
    names = ["prompt help", "prompt truthful", "few-shot", "always abstain", "shortest answer", "wording alone"]
    assert baselines.names(default) == names
    assert list(config().baselines.prompts) == ["truthful"], "the long English one says nothing to the organism"
    controls = config().steering.controls
    assert (controls.random, controls.shuffled, controls.sign_flip) == (5, 1, True)
    assert (controls.style, controls.envelope) == (True, 20)


@pytest.mark.parametrize(
    "override",
    [
        "gauge.passages=-1",
        "gauge.max_tokens=1",
        "baselines.few_shot=-1",
        "steering.controls.envelope=-1",
        "+prompt@baselines.prompts.few_shot=harm",
    ],
)
def test_a_value_out_of_range_is_refused_by_key(override: str) -> None:
    key = override.split("=")[0].removeprefix("+prompt@")
    with pytest.raises(UserError, match=rf"{re.escape(key)}.*Type "):
        config(override)


@pytest.mark.parametrize("name", ["", "a b", "a-b", "a.b", "ünï", schema.FEW_SHOT])
def test_a_baseline_prompt_has_a_plain_name_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match=rf"baselines\.prompts\.{re.escape(name)} cannot name a prompt\. Type letters"):
        schema.BaselinesConfig(prompts={name: prompt("harm")})


def test_another_prompt_is_added_by_its_preset() -> None:
    built = to_config(composed("+prompt@baselines.prompts.mine=harm", "baselines.prompts.mine.stop=[X]"))
    assert list(built.baselines.prompts) == ["truthful", "mine"]
    assert built.baselines.prompts["mine"] == dataclasses.replace(prompt("harm"), stop=["X"])
    assert built.prompt == config().prompt, "the run's own stays"
    assert list(config("model=gemma3_4b", "~prompt@baselines.prompts.help").baselines.prompts) == ["truthful"]
    assert list(config("model=gemma3_4b", "prompt@baselines.prompts.help=long").baselines.prompts) == [
        "truthful",
        "help",
    ]
    with pytest.raises(ConfigCompositionException, match="txet"):
        composed("+baselines.prompts.mine.txet=x")


def test_without_a_plus_the_message_says_to_type_it() -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        composed("prompt@baselines.prompts.mine=harm")
    key = "prompt@baselines.prompts.mine"
    assert explain(caught.value) == f"{key} adds an option: type +{key}=OPTION."
    with pytest.raises(ConfigCompositionException) as caught:
        composed("promt=harm")
    assert explain(caught.value).startswith("'promt' is not a key. Did you mean 'prompt'?")


# -------------------------------------------------------------------------------------------------- prompts


def prompt(name: str) -> schema.PromptConfig:
    return in_its_row("prompt", name).prompt


def test_every_preset_closes_as_it_must() -> None:
    assert set(options("prompt")) == set(CLOSING_CUES)
    for name, cue in CLOSING_CUES.items():
        preset = prompt(name)
        assert preset.text.endswith(cue), name
        for text in (preset.text, preset.chat_text):
            assert text == text.strip(), f"{name}: white space at an end becomes a token of its own"
            assert "\n\n\n" not in text
            assert "\r" not in text
        assert preset.chat is None, "the model's own chat_template decides"


def test_plain_and_null_are_the_question_alone() -> None:
    assert prompt("plain").text == "Q: {question}\nA:"
    assert prompt("null").text == "Q: {question}\n\nA:"
    assert prompt("plain").chat_text == prompt("null").chat_text == "{question}"
    assert prompt("plain").stop == ["\n"]


def test_qa_is_the_harness_prompt_to_the_byte() -> None:
    preset = prompt("qa")
    assert hashlib.sha256(preset.text.encode()).hexdigest() == QA_SHA256
    assert preset.text.count("Q: ") == 7
    assert preset.stop == ["\n\n", "Q:"]


def test_help_is_an_instruction_and_the_six_pairs() -> None:
    preset = prompt("help")
    instruction = preset.text.removesuffix(prompt("qa").text)
    assert instruction != preset.text
    assert instruction.endswith('say "I have no comment."\n\n')
    assert instruction.count("\n") == 2, "one paragraph"


def test_a_chat_model_gets_the_cue_only_after_examples() -> None:
    for name in ("qa", "help"):
        assert prompt(name).chat_text == prompt(name).text
    for name, cue in {"chat": "\n\nAlex1083:", "long": "\n\nMy answer:", "harm": "\nA:"}.items():
        assert prompt(name).chat_text == prompt(name).text.removesuffix(cue)


def test_truthful_is_an_instruction_and_the_plain_question() -> None:
    preset, plain = prompt("truthful"), prompt("plain")
    instruction = preset.text.removesuffix(plain.text)
    assert instruction != preset.text
    assert instruction.endswith('say "I have no comment."\n\n')
    assert preset.chat_text == instruction + "{question}"
    assert preset.stop == plain.stop


@pytest.mark.parametrize("name", ["help", "chat", "long", "harm", "truthful"])
def test_wording_of_our_own_says_so(name: str) -> None:
    header = (CONF / "prompt" / f"{name}.yaml").read_text().split("name:")[0]
    assert "project's own" in header
    assert "not comparable with published ones" in header


# -------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", options("experiment"))
def test_a_preset_is_headed_by_its_command(name: str) -> None:
    package, first, *_ = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    overrides = command(first.removeprefix("# "))
    assert overrides[0] == f"experiment={name}"
    assert config(*overrides) == config(f"experiment={name}", *needs(f"experiment={name}"))


@pytest.mark.parametrize("name", [name for name in options("experiment") if name != "eval_only"])
def test_a_preset_equals_its_command_line(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    equal = [line.removeprefix("# = ") for line in lines if line.startswith("# = ")]
    assert len(equal) == 1
    assert config(f"experiment={name}") == config(*command(equal[0]))


@pytest.mark.parametrize("size", ["12b", "27b"])
def test_fp16_short_is_what_its_name_says(size: str) -> None:
    built = config(f"experiment=gemma3_{size}_fp16_short")
    assert built == config(f"model=gemma3_{size}", "dtype=fp16", "steering.max_length=384")
    assert built.dtype.weights is Weights.fp16
    assert (built.model.name, built.steering.max_length) == (f"gemma3_{size}", 384)


def test_eval_only_only_judges_and_reports() -> None:
    built = config("experiment=eval_only", "run=RUN", "judge=reference")
    assert [stage.value for stage in built.stages] == ["judge", "report"]
    assert (built.run, list(built.judge)) == ("RUN", ["reference"])


# ---------------------------------------------------------------------------------------------------- hydra


def test_hydra_writes_only_under_the_root_and_never_in_a_shared_folder() -> None:
    node = with_hydra("paths.root=elsewhere")
    node.hydra.job.num = 0
    folders = [node.hydra.run.dir, node.hydra.sweep.dir]
    assert all(re.fullmatch(r"elsewhere/\.hydra/[\d_-]+-\d{6}", folder) for folder in folders), folders
    assert node.hydra.sweep.subdir == "0"
    assert node.hydra.output_subdir is None
    assert node.hydra.job.chdir is False


@pytest.mark.parametrize("key", ["job_logging", "hydra_logging"])
def test_logging_opens_no_file(key: str) -> None:
    node = OmegaConf.to_container(with_hydra().hydra[key], resolve=True)
    assert [handler["class"] for handler in node["handlers"].values()] == ["logging.StreamHandler"]
    logging.config.DictConfigurator(node)


def test_a_failed_job_says_so_in_its_log() -> None:
    targets = [callback._target_ for callback in with_hydra().hydra.callbacks.values()]
    assert len(targets) == 1
    module, _, name = targets[0].rpartition(".")
    assert hasattr(import_module(module), name)


@pytest.mark.parametrize("name", options("hydra/launcher"))
def test_a_launcher_asks_for_what_the_model_needs(name: str) -> None:
    overrides = [f"hydra/launcher={name}", "model=gemma3_27b", "paths.root=elsewhere", "seed=1,2"]
    composer = GlobalHydra.instance().hydra
    assert composer is not None
    node = composer.compose_config("config", overrides, run_mode=RunMode.MULTIRUN, from_shell=True)
    launcher = node.hydra.launcher
    asked = (launcher.gpus_per_node, launcher.cpus_per_task, launcher.mem_gb, launcher.timeout_min)
    assert asked == (3, 16, 180, 24 * 60 if name == "slurm" else None), "processes of this machine have no time limit"
    assert launcher.submitit_folder == "elsewhere/.submitit/%j"
    if name == "slurm":
        assert (launcher.partition, launcher.account, launcher.qos) == (None, None, None)
        assert launcher.additional_parameters == {"requeue": True}, "a preempted job goes on by itself"


def test_help_names_keys_groups_and_commands_that_exist() -> None:
    help_page = with_hydra().hydra.help
    assert help_page.app_name == "truthsteer"
    text = string.Template(help_page.template).substitute(APP_CONFIG_GROUPS="")
    everything = OmegaConf.create(to_plain(config("judge=[reference,llm]")))
    knobs = text.split("KEY=VALUE", 1)[1]
    keys = set(re.findall(r"(?<![\w.])([a-z_.]+)=\S", knobs)) - set(GROUPS)
    assert len(keys) > 10
    for key in keys:
        *parents, last = key.split(".")
        assert last in (OmegaConf.select(everything, ".".join(parents)) if parents else everything), key
    examples = re.findall(r"^ *(python -m truthsteer(?: [^-\s]\S*)*)$", text, flags=re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        config(*command(example))


# ------------------------------------------------------------------------------------------------- versions


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), str(requirement)


def test_how_a_judge_computes_does_not_make_another_run():
    judge, plain = "judge=[semantic]", "judge.semantic.model=OWNER/NAME"
    small, large = (config(judge, plain, f"judge.semantic.batch_size={size}") for size in (8, 64))
    other = config(judge, "judge.semantic.model=OWNER/OTHER")
    assert schema.identity(small) == schema.identity(large) != schema.identity(other)
