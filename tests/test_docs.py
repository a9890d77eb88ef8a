"""README and docs: what they tell a newcomer to type works, and what they point to is there."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import REPO
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from truthsteer.checkpoint import resolve
from truthsteer.cli import execute, to_config
from truthsteer.config import DEFAULT_STAGES, Config, Stage
from truthsteer.organism import QUESTIONS, WEIGHTS
from truthsteer.runs import RunRecord

README = REPO / "README.md"
DOCS = REPO / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
PICTURE_KB = 400


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page that are in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.strip() for line in page.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if re.match(r"python -m truthsteer(\s|$)", line)]


def typed(line: str) -> list[str]:
    """What stands after `python -m truthsteer`, as a shell passes it on."""
    return shlex.split(line, comments=True)[3:]


# --------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with a run called RUN and a model's folder called DIR; Hydra is ready to compose."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "DIR").mkdir()
    (folder / "DIR" / "config.json").write_text("{}")
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        config = to_config(compose("config", [f"paths.root='{folder}'"]))
        record = RunRecord(folder / "RUN", config)
        record.data["checkpoint"] = asdict(resolve(config.model))
        record.write()
        yield folder


def filled_in(override: str, root: Path) -> str:
    """The override with a file or folder that exists in place of one that the reader has to name."""
    there = {
        "data.path": QUESTIONS,
        "model.path": WEIGHTS,
        "judge.semantic.model": root / "DIR",
        "judge.llm.model": root / "DIR",
        "paths.hf_cache": root / "DIR",
    }
    key, _, _ = override.partition("=")
    return f"{key}='{there[key]}'" if key in there else override


def jobs(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if not override.get_key_element().startswith("hydra"):
            key = override.get_key_element()
            line = override.input_line or ""
            sweeps = override.is_sweep_override()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()] if sweeps else [line])
    for chosen in itertools.product(*choices):
        yield list(chosen)


OWN_FOLDER = "--config-dir"
DRY = [(page.name, line) for page in PAGES for line in commands(page) if OWN_FOLDER not in line]


def test_the_documents_have_commands() -> None:
    names = {line for name, line in DRY if name == "README.md"}
    assert {
        "python -m truthsteer",
        "python -m truthsteer model=gemma3_27b dtype=fp16 steering.max_length=384",
    } <= names
    assert [line for line in names if typed(line)[:1] == ["-m"] and "hydra/launcher=slurm" in line]


@pytest.mark.parametrize(("page", "line"), DRY, ids=[line.removeprefix("python -m ") for _, line in DRY])
def test_every_command_line_has_a_plan(page: str, line: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = typed(line)
    sweep = words[:1] == ["-m"]
    overrides = [filled_in(word, root) for word in words[sweep:]]
    assert not [word for word in overrides if word.startswith("-")], f"{page}: {line}"
    if sweep:
        composer = GlobalHydra.instance().hydra
        assert composer is not None
        whole = composer.compose_config("config", overrides, run_mode=RunMode.MULTIRUN, from_shell=True)
        assert whole.hydra.launcher._target_
    for job in jobs(overrides) if sweep else [overrides]:
        given = [*job, "dry_run=true", f"paths.root='{root}'"]
        execute(to_config(compose("config", given)), given)
        assert "mean_diff chosen" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- links, pictures, tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert found.is_relative_to(REPO), f"{page.name}: {target} leaves the repository"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"
    for picture in DOCS.glob("*.png"):
        assert picture.stat().st_size < PICTURE_KB * 1000, picture.name


def test_every_page_and_picture_is_linked_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for path in [*DOCS.glob("*.md"), *DOCS.glob("*.png")]:
        assert f"](docs/{path.name})" in text, path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_speaks_of_one_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.])/(?:work|tmp|home|root|mnt)/\S*", page.read_text(encoding="utf-8"))


def table(first_column: str) -> dict[str, list[str]]:
    """The rows of the README's table with that heading: name in the first column -> the other cells."""
    _, _, rest = README.read_text(encoding="utf-8").partition(f"| {first_column} | default |")
    rows = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[2:])
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {first.strip("`"): others for first, *others in cells}


@pytest.fixture(scope="module")
def real_model(root: Path) -> DictConfig:
    return compose("config", ["model=gemma3_4b"])


def test_the_table_of_groups_holds_every_option(real_model: DictConfig) -> None:
    rows = table("group")
    groups = {path.name for path in (REPO / "conf").iterdir() if path.is_dir()} - {"hydra"}
    assert set(rows) == groups
    for group, (default, options) in rows.items():
        there = {path.stem for path in (REPO / "conf" / group).glob("*.yaml")}
        named = set(re.findall(r"\w+", options)) | {default}
        missing = {name for name in there if name not in named and name.removesuffix("_pt") not in named}
        assert not missing, f"{group} lacks {missing}"
        node = OmegaConf.select(real_model, group)
        if group in ("dtype", "data", "prompt"):
            assert node.name == default
        elif group in ("method", "judge"):
            assert ", ".join(node) == default


def test_the_table_of_keys_states_the_defaults(real_model: DictConfig) -> None:
    rows = table("key")
    assert len(rows) > 10
    tried = list(real_model.steering.coefficients)
    special = {
        "model.layer": "per model",
        "steering.coefficients": f"{min(tried):g} to {max(tried):g}",
        "stages": "all",
    }
    for key, (default, _) in rows.items():
        *parents, last = key.split(".")
        parent = OmegaConf.select(real_model, ".".join(parents)) if parents else real_model
        assert last in parent, key
        value = parent[last]
        if isinstance(value, bool) or value is None:
            value = str(value).lower().replace("none", "null")
        assert default == special.get(key, str(getattr(value, "value", value))), key
    assert set(DEFAULT_STAGES) == set(Stage) - {Stage.prefetch, Stage.doctor}


# ---------------------------------------------------------------------------------------------------- notebook


def test_the_notebook_example_runs_and_shows_the_effect() -> None:
    (code,) = blocks(DOCS / "notebook.md", "python")
    (shown,) = blocks(DOCS / "notebook.md", "text")
    assert len(code.splitlines()) <= 15
    names: dict = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "docs/notebook.md", "exec"), names)
    asked = names["held_out"][: len(names["plain"])]
    assert out.getvalue().splitlines()[::4] == [question.text for question in asked] == shown.splitlines()[::4]

    def true(answers: list[str]) -> int:
        return sum(answer in question.correct for question, answer in zip(asked, answers, strict=True))

    assert true(names["changed"]) >= true(names["plain"]) + 2


# --------------------------------------------------------------------------------------------------- extending


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of docs/extending.md in a folder outside the repository."""
    folder = tmp_path_factory.mktemp("mine")
    page = DOCS / "extending.md"
    for code in blocks(page, "python") + blocks(page, "yaml"):
        name = re.match(r"(?:# @package _global_\n)?# (\S+\.(?:py|yaml))\n", code)
        assert name, f"a block of extending.md does not say its file:\n{code}"
        path = folder / name[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    return folder


def run_there(folder: Path, line: str, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "truthsteer", *typed(line), *more, "paths.root=results"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", str(REPO)]), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def own(words: str) -> str:
    """The command of docs/extending.md that has these words."""
    (line,) = [line for line in commands(DOCS / "extending.md") if words in line]
    assert OWN_FOLDER in line
    return line


def test_the_tree_shown_is_the_one_of_the_examples(own_folder: Path) -> None:
    listing = blocks(DOCS / "extending.md", "text")[0].split()[1:]
    assert set(listing) == {str(path.relative_to(own_folder)) for path in own_folder.rglob("*.*")}


@pytest.mark.slow
def test_method_operator_judge_and_prompt_of_another_folder_run(own_folder: Path) -> None:
    small = ("steering.layers=[3]", "steering.coefficients=[0.4]", "steering.controls.random=1", "data.limit=40")
    run_there(own_folder, own("method=["), *small, "generation.max_new_tokens=12", "threads=1")
    (record,) = (own_folder / "results").glob("*/run.json")
    config = json.loads(record.read_text())["config"]
    assert config["operator"]["_target_"] == "add_norm_preserving.AddNormPreserving"
    assert config["prompt"]["name"] == "exam"
    with (record.parent / "metrics.csv").open(newline="") as file:
        rows = {row["condition"]: row for row in csv.DictReader(file)}
    for method in ("mean_diff", "median_diff"):
        assert float(rows[f"{method} chosen"]["true"]) > float(rows["baseline"]["true"]) + 0.2
    assert rows["mean_diff chosen"]["mc2"] != rows["median_diff chosen"]["mc2"]
    assert all(row["hedged"] != "" for row in rows.values() if row["kind"] not in ("shortest", "surface"))
    plan = run_there(own_folder, own("experiment=eval_only").replace("RUN", record.parent.name), "dry_run=true")
    assert re.search("judge +reference.*judge +hedging", plan, flags=re.DOTALL)


def test_model_and_experiment_of_another_folder_compose(own_folder: Path) -> None:
    model = run_there(own_folder, own("model=smollm2_135m"))
    assert "HuggingFaceTB/SmolLM2-135M-Instruct@newest" in model
    assert "weights 0.3" in model
    experiment = run_there(own_folder, own("experiment=mine"), "dry_run=true")
    assert "median_diff +0.2" in experiment
    assert "mean_diff" not in experiment
    assert "prompt     exam" in experiment
    elsewhere = own("experiment=mine").replace("--config-dir conf", "'hydra.searchpath=[file://conf]'")
    again = run_there(own_folder, elsewhere, "dry_run=true")
    assert re.sub("[0-9.]+ free", "", again) == re.sub("[0-9.]+ free", "", experiment)
