"""Imports go one way, and the command line needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

PACKAGE = REPO / "truthsteer"
LAYERS = [
    {"errors", "organism", "sources"},
    {"files"},
    {"config", "records", "progress", "component", "results", "tables", "terminal"},
    {
        "points",
        "numerics",
        "numerics_text",
        "journal",
        "store",
        "operators",
        "abstention",
        "duplicates",
        "checkpoint",
        "prompts",
        "wording",
        "metrics",
        "stats",
        "capability",
    },
    {"pairs", "splits", "selection", "methods", "figures", "multiplicity", "agreement", "sentinels", "surface"},
    {"activations", "findings", "evidence", "reliability"},
    {"bank", "data", "cautions", "contrasts", "tuning"},
    {"hooks", "rendering", "style", "precision", "lengths", "reading"},
    {"loading"},
    {"model", "sizes"},
    {"memory"},
    {"fitting"},
    {"probe", "head", "halving"},
    {"soundness", "nonfinite", "passes"},
    {"branching", "decoding", "doctor", "upper"},
    {"extraction", "scoring"},
    {"judge_model", "neutral"},
    {"judges", "costs"},
    {"proof", "workspace", "summary"},
    {"conditions", "baselines"},
    {"letters", "preflight"},
    {"stages"},
    {"runs", "pipeline", "plan"},
    {"cli", "shards", "storekeeping", "__main__"},
    {"audit", "seeds", "jobs", "slurm"},
    {"sweeps"},
    {"submitting"},
    {"waiting"},
    {"launching"},
    {"status", "resume"},
]
"""From the bottom up: a module imports only from lower rows or its own."""
HEAVY = {
    "torch",
    "transformers",
    "matplotlib",
    "tensorflow",
    "datasets",
    "sentence_transformers",
    "scipy",
    "sklearn",
    "sacrebleu",
    "rouge_score",
    "jinja2",
}
"""What is imported only where it is used."""


def imports(path: Path, module_level: bool) -> set[str]:
    """truthsteer modules (first name below the package) that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not module_level else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "truthsteer":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("truthsteer.")}
    return found


def type_only(path: Path) -> set[str]:
    """Modules imported under TYPE_CHECKING only."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("truthsteer."):
                    found.add(inner.module.split(".")[1])
    return found


def modules() -> list[tuple[str, Path]]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent != PACKAGE]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


def test_every_module_has_its_row():
    assert {name for name, _ in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda item: item.stem if isinstance(item, Path) else "")
def test_imports_go_down(name, path):
    level = {module: index for index, row in enumerate(LAYERS) for module in row}
    for other in imports(path, module_level=False) - type_only(path) - {name}:
        assert level[other] <= level[name], f"{path.name} imports {other}, which stands above it"


def test_stages_never_import_each_other():
    for path in (PACKAGE / "stages").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("truthsteer.stages"), path.name


def test_nothing_is_called_utils():
    assert not [p for p in PACKAGE.rglob("*") if p.stem in ("utils", "common", "base", "helpers")]


def test_the_pipeline_and_every_component_import_without_torch():
    names = sorted(f"truthsteer.judges.{path.stem}" for path in (PACKAGE / "judges").glob("*.py"))
    others = ("cli", "pipeline", "plan", "methods.mean_diff", "operators", "style", "seeds")
    modules = [name.removesuffix(".__init__") for name in names] + [f"truthsteer.{name}" for name in others]
    code = f"import sys, {', '.join(modules)}\nheavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_public_names_exist():
    import truthsteer

    for name in truthsteer.__all__:
        assert getattr(truthsteer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        truthsteer.nothing  # noqa: B018
