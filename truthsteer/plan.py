"""What a run would do, worked out without weights: `dry_run=true`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from truthsteer import baselines, fitting, judge_model, memory
from truthsteer.checkpoint import folder_of
from truthsteer.config import Config, DataSource, Matmul, Quantize, Residual, Stage, TooLong
from truthsteer.errors import UserError
from truthsteer.prompts import uses_chat
from truthsteer.records import Splits, from_json
from truthsteer.runs import folder_for
from truthsteer.stages import gauge
from truthsteer.style import STYLES
from truthsteer.workspace import Workspace

_TOO_LONG = {
    TooLong.error: "longer: an error",
    TooLong.drop: "longer: its pair is dropped",
    TooLong.truncate: "longer: activations are read without its end",
}


def check(config: Config, deal: bool = True) -> tuple[Path, Workspace, tuple[Splits, ...] | None]:
    """Build every component and check what needs no weights.

    Args:
        config: the run's.
        deal: read questions that are in a file, and deal them.

    Returns:
        The run's folder, its parts, and its splits where they are known.

    Raises:
        UserError: whatever the run itself would refuse before loading weights.
    """
    folder = folder_for(config)
    ws = Workspace(config, folder)
    if config.model.path is not None:
        folder_of(config.model)
    gauge.check(ws)
    known = deal and config.data.source is DataSource.csv
    return folder, ws, tuple(from_json(Splits, fold) for fold in ws.deal()["folds"]) if known else None


def show_plan(config: Config) -> None:
    """Check a config, and print the plan.

    Raises:
        UserError: see `check`.
    """
    out = Console()
    folder, ws, splits = check(config)
    out.print(f"run        {folder}", soft_wrap=True)
    out.print(f"model      {_model(config)}", soft_wrap=True, highlight=False)
    out.print(f"dtype      {_dtype(config)}", highlight=False)
    out.print(f"data       {_data(config, splits)}", soft_wrap=True, highlight=False)
    out.print(
        f"prompt     {config.prompt.name}, at most {config.steering.max_length} tokens with the answer "
        f"({_TOO_LONG[config.steering.too_long]})",
        highlight=False,
    )
    for name, judge in ws.judges.items():
        out.print(f"judge      {name}{_missing(judge)}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"gauge      {_gauge(ws)}", soft_wrap=True, highlight=False)
    out.print(f"stages     {' -> '.join(stage.value for stage in Stage if stage in config.stages)}", highlight=False)
    for part in _memory(ws, splits):
        out.print(part, highlight=False, soft_wrap=True)
    out.print(_conditions(config, ws, splits))


def _missing(judge: Any) -> str:
    """What a judge still lacks on this machine."""
    try:
        judge.identity()
    except UserError as error:
        return f" (not ready: {error})"
    return ""


def _gauge(ws: Workspace) -> str:
    asked = ws.config.gauge
    items, left_out = ws.capability
    bad = f" ({len(left_out)} rows left out)" if left_out else ""
    capability = f"{len(items)} capability questions{bad}" if asked.capability else "no capability questions"
    return f"{asked.passages} passages of {asked.text or 'English'} text, {capability}"


def _model(config: Config) -> str:
    model = config.model
    where = f"folder {model.path}" if model.path else f"hub {model.id}@{model.revision or 'newest'}"
    asked = "chat template" if uses_chat(config.prompt, model.chat_template) else "plain text"
    return f"{model.name} ({where}, {asked})"


def _dtype(config: Config) -> str:
    dtype = config.dtype
    stream = "float32 residual stream" if dtype.residual is Residual.fp32 else "same residual stream"
    weights = dtype.weights.value if dtype.quantize is Quantize.none else dtype.quantize.value
    products = "" if dtype.quantize is Quantize.none else f" {dtype.weights.value} products,"
    tf32 = ", TF32 products" if dtype.matmul is Matmul.high else ""
    return f"{dtype.name} ({weights} weights,{products} {stream}, {dtype.attention.value} attention{tf32})"


def _data(config: Config, splits: tuple[Splits, ...] | None) -> str:
    data = config.data
    folds = f", {data.folds} folds, every question tested once" if data.folds > 1 else ""
    if splits is None:
        return f"{data.name} (hub {data.id}@{data.revision or 'newest'}; counted when it is loaded{folds})"
    sizes = ", ".join(
        f"{role} {'/'.join(str(len(getattr(split, role))) for split in splits)}"
        for role in ("steer", "train", "tune", "test")
    )
    return f"{data.name} ({data.path}): {sizes}{folds}"


def _conditions(config: Config, ws: Workspace, splits: tuple[Splits, ...] | None) -> Table:
    tested = "?" if splits is None else str(sum(len(split.test) for split in splits))
    table = Table(title=f"conditions, each on {tested} test questions", title_justify="left")
    for name in ("condition", "layer", "coefficient"):
        table.add_column(name)
    for row in condition_names(config, ws):
        table.add_row(*row)
    return table


def condition_names(config: Config, ws: Workspace) -> Iterator[tuple[str, str, str]]:
    """(name, layer, coefficient) of every condition that the run will have."""
    tried = _tried(ws)
    layer = str(tried[0]) if len(tried) == 1 else f"one of {tried}, by tune" if tried else "the middle one"
    values = [value for value in config.steering.coefficients if value > 0]
    chosen = f"{values[0]:g}" if len(values) == 1 else "chosen by tune"
    controls = config.steering.controls
    yield "baseline", "", ""
    for name in baselines.names(config.baselines):
        yield name, "", ""
    for name in ws.methods:
        yield f"{name} chosen", layer, chosen
        if controls.sign_flip:
            yield f"{name} sign_flip", layer, f"minus {chosen}"
        for index in range(1, controls.random + 1):
            yield f"{name} random_{index}", layer, chosen
        for index in range(1, controls.shuffled + 1):
            yield f"{name} shuffled_{index}", layer, chosen
        if controls.style:
            for style in STYLES:
                yield f"{name} style_{style} (if the steer answers differ in it)", layer, chosen
            yield f"{name} without_... (if there are such styles)", layer, chosen
        for value in config.steering.coefficients:
            yield f"{name} {value:+g}", layer, f"{value:+g}"


def _memory(ws: Workspace, splits: tuple[Splits, ...] | None) -> Iterator[str]:
    """What each kind of work takes, and whether that is there."""
    config = ws.config
    sizes = fitting.sizes_of(config)
    asked = config.model.resources
    if sizes is None:
        yield "memory     unknown before the checkpoint is read (model.shape is empty)"
    else:
        there = memory.available(config.device)
        yield f"memory     in GiB, by an estimate; {there.what}: {fitting.gib(there.bytes)} free"
        steered = {question.id for split in splits for question in split.steer} if splits else ()
        length, tried = config.steering.max_length, _tried(ws)
        works, loaded = fitting.loads(config, tried, len(steered)), sizes.first_layers(ws.depth)
        training = memory.Load(memory.Work.train, length, length, lowest=min(tried, default=0))
        for load in [*works, training]:
            need = memory.estimate(loaded, config.dtype, load, there.parted)
            fit = fitting.fits(loaded, config.dtype, load, there)
            asks = " (methods that train, a text at a time)" if load is training else ""
            yield (
                f"  {load.work.value:<9}{fitting.gib(fitting.takes(need, there))}: {fitting.parts(need, there)}{asks}"
                f"{'' if fit else '; does not fit here'}"
            )
        if not all(fitting.fits(loaded, config.dtype, load, there) for load in works):
            would = fitting.remedies(loaded, config.dtype, works, there, fitting.Keys())
            yield f"  {fitting.would_fit(would)}"
        for name, judge in ws.judges.items():
            yield from _judge(name, judge, there)
    yield f"resources  {asked.gpus} GPUs, {asked.cpus} CPUs, {asked.mem_gb} GB, {asked.timeout_min} minutes on a cluster"


def _judge(name: str, judge: Any, there: memory.Available) -> Iterator[str]:
    """What a judge's language model takes, where it has one and it is on this machine."""
    if hasattr(judge, "batch_tokens") and not _missing(judge):
        need = judge_model.memory_of(judge.spec, judge.batch_tokens, judge.max_length, there.parted)
        if need is not None:
            yield f"  judge {name:<9}{fitting.gib(need.total)}: {fitting.parts(need, there)}, once the model above is gone"


def _tried(ws: Workspace) -> list[int]:
    """Layers tried on the tune split; empty where only the checkpoint tells how many there are."""
    config = ws.config
    return ws.layers if config.model.path or config.model.shape.num_layers else config.steering.layers or []
