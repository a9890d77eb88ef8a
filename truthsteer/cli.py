"""The command line. Hydra ends here: the rest of the program sees a checked `Config`.

    truthsteer KEY=VALUE ...          one run
    truthsteer -m KEY=A,B ...         a sweep
    truthsteer COMMAND ...            another command, see `COMMANDS`

No torch here, so that `--cfg job`, a misspelt key and tab completion answer at once.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from truthsteer.config import Config, Stage
from truthsteer.errors import TerminatedError, UserError, did_you_mean
from truthsteer.files import disk_error
from truthsteer.shards import others, sweep_of
from truthsteer.terminal import console

if TYPE_CHECKING:
    from truthsteer.checkpoint import Checkpoint

log = logging.getLogger("truthsteer")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
COMMANDS = {"status": "truthsteer.status", "resume": "truthsteer.resume", "store": "truthsteer.storekeeping"}
"""What may be typed first instead of KEY=VALUE -> the module whose `main` takes the rest."""
SEVERAL = ("judge", "method")
"""Groups of which several options can be chosen at once."""
EXAMINED = "examined"
"""A job's note to its sweep, made as it starts: the folder of a run that the doctor is to look at."""
REJUDGING = (
    "experiment",
    "run",
    "run_id",
    "judge",
    "paths",
    "device",
    "threads",
    "shards",
    "shard",
    "dry_run",
    "verbose",
)
"""What may be typed with `run=`."""


def conf_dir() -> Path:
    """The configuration folder: inside an installed wheel, or at the root of a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of `truthsteer` and `python -m truthsteer`."""
    with ends_well():
        if sys.argv[1:] and _command(sys.argv[1]):
            import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])
        else:
            _compose()


@contextmanager
def ends_well(quiet: bool = False) -> Iterator[None]:
    """What ends a run, from a mistake to a signal, is one sentence and an exit code of its own.

    Args:
        quiet: say nothing of signals, where another process does.
    """
    _listen()
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error))
    except OSError as error:
        disk = disk_error(error, _root(sys.argv[1:]))
        if disk is None:
            raise
        _fail(str(disk))
    except KeyboardInterrupt as error:
        terminated = isinstance(error, TerminatedError)
        if not quiet:
            sys.stderr.write(
                f"\n{'Terminated' if terminated else 'Interrupted'}. The same command goes on from here.\n"
            )
        sys.exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)


def _listen() -> None:
    """SIGTERM ends a run as Ctrl-C does. SIGUSR2, by which Slurm tells its jobs that their time is up, would end it
    without a word: it is for those who set a handler of their own, and everything finished is on disk anyway.
    """

    def terminate(*_: Any) -> None:
        raise TerminatedError

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    if hasattr(signal, "SIGUSR2") and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextmanager
def unwarned() -> Iterator[None]:
    """Block SIGUSR2 in what is started inside: a process that has no handler yet is killed by it."""
    number = getattr(signal, "SIGUSR2", None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number}) if number is not None else set()
    try:
        yield
    finally:
        if number is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _root(arguments: list[str]) -> Path:
    """`paths.root` as typed, for errors that come before the config."""
    typed = [argument.partition("=")[2] for argument in arguments if argument.startswith("paths.root=")]
    return Path(typed[-1] if typed else "multirun")


def _compose() -> None:
    """Hydra composes the config and calls `_task`, once or for each point of a sweep."""
    ConfigStore.instance().store(name="schema", node=Config)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function, which prints those meant for users
    refused: list[UserError] = []

    def task(cfg: DictConfig) -> None:
        try:
            _task(cfg)
        except UserError as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise  # the launcher records which job failed
            refused.append(error)

    sys.argv[1:] = sweep_of([_quoted_null(argument) for argument in sys.argv[1:]])
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)()
    finally:
        Sweep.show()  # Hydra does not say that a sweep has ended when one of its jobs has failed
    if refused:
        raise refused[0]


def _command(word: str) -> bool:
    """Whether the first word typed is another command.

    Raises:
        UserError: it is a word of its own, and not one of them.
    """
    if word in COMMANDS or not re.fullmatch(r"[A-Za-z_]\w*", word):
        return word in COMMANDS
    raise UserError(
        f"'{word}' is neither an override nor a command. {did_you_mean(word, COMMANDS)}Type KEY=VALUE, or one of "
        f"{', '.join(COMMANDS)}; --help says more."
    )


def _quoted_null(argument: str) -> str:
    """A prompt preset is called by YAML's word for nothing: quoted for those who type it plainly.

    Raises:
        UserError: nothing is chosen of a group that needs an option.
    """
    if re.fullmatch(r"\+?prompt(@[\w.]+)?=null", argument):
        return argument.removesuffix("null") + "'null'"
    if found := re.fullmatch(r"(model|dtype|data|steering|method|operator|judge|gauge)=null", argument):
        raise UserError(f"{argument} is not an option. {_options(found[1])}")
    return argument


def _options(group: str) -> str:
    options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    return f"Its options are: {', '.join(options)}." if options else ""


def _fail(message: str) -> None:
    sys.stderr.write(f"truthsteer: {message}\n")
    sys.exit(EXIT_USER_ERROR)


def _task(cfg: DictConfig) -> None:
    config = to_config(cfg)
    if config.verbose:
        log.setLevel(logging.DEBUG)
    set_hub_cache(config.paths.hf_cache)
    hydra_config = HydraConfig.get()
    launcher = [word for word in hydra_config.overrides.hydra if word.startswith("hydra/launcher=")]
    if hydra_config.mode is RunMode.RUN and launcher:
        raise UserError(f"{launcher[0]} is used by sweeps only. Type -m with it, also for a single run.")
    scratch = Path(hydra_config.runtime.output_dir)
    try:
        if hydra_config.mode is RunMode.MULTIRUN and Stage.doctor in config.stages:
            from truthsteer.runs import folder_for

            scratch.mkdir(parents=True, exist_ok=True)
            (scratch / EXAMINED).write_text(str(folder_for(config).resolve()), encoding="utf-8")
        execute(config, list(hydra_config.overrides.task))
    finally:
        remove_if_empty(scratch)


class Sweep(Callback):
    """What a sweep says beyond its jobs: a failed one in its log, and one table of what the doctor found in all of them."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status is JobStatus.FAILED and HydraConfig.get().mode is RunMode.MULTIRUN:
            error = job_return._return_value
            log.error("%s", error, exc_info=None if isinstance(error, UserError) else error)

    folder: ClassVar[Path | None] = None
    """Where the jobs of this process's sweep leave their notes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Sweep.folder = Path(config.hydra.sweep.dir)

    @staticmethod
    def show() -> None:
        """The doctor's table, if it has looked at anything in this sweep."""
        if Sweep.folder is None:
            return
        from truthsteer import numerics_text, preflight
        from truthsteer.files import read_json
        from truthsteer.terminal import table

        reports = []
        for mark in sorted(Sweep.folder.glob(f"*/{EXAMINED}"), key=lambda path: int(path.parent.name)):
            report = Path(mark.read_text(encoding="utf-8")) / preflight.REPORT
            if report.exists() and report.stat().st_mtime >= mark.stat().st_mtime and report not in reports:
                reports.append(report)
            mark.unlink()
            remove_if_empty(mark.parent)
        if reports:
            columns = numerics_text.rates_table([read_json(report) for report in reports])
            console().print(table("Numerics", numerics_text.RATES_CAPTION, columns))
            console().print(f"in full: {' '.join(map(str, reports))}", soft_wrap=True, highlight=False)


def execute(config: Config, overrides: list[str]) -> None:
    """Run, judge again, or print the plan, and show the result."""
    from truthsteer.pipeline import run
    from truthsteer.runs import folder_for

    checkpoint = None
    if config.run is not None:
        config, checkpoint = rejudged(config, overrides)
    if config.dry_run:
        from truthsteer.plan import show_plan

        show_plan(config)
        return
    folder = folder_for(config)
    log.info("run %s", folder)
    if config.shards > 1 and config.shard is None:
        with ExitStack() as stack:
            with unwarned():
                first = stack.enter_context(others(config, overrides, checkpoint))
            summary = run(first, overrides, checkpoint)
    else:
        summary = run(config, overrides, checkpoint)
    if summary is not None:
        from truthsteer.stages.report import table

        out = console()
        out.print(table(summary, out.width))
        for sentence in (*(item["effect"] for item in summary["verdict"]), *summary["warnings"]):
            out.print(f"- {sentence}", soft_wrap=True, highlight=False, markup=False)
        out.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def to_config(cfg: DictConfig) -> Config:
    """Hydra's config as the typed one.

    Raises:
        UserError: a key that does not exist (Hydra lets `+key=value` add any), or a value out of range.
    """
    _refuse_unknown(cfg, Config, "")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config


def from_plain(plain: Mapping[str, Any]) -> Config:
    """The checked config that a record holds."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), dict(plain))
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def _refuse_unknown(node: DictConfig, schema: type[Any], prefix: str) -> None:
    hints = get_type_hints(schema)
    for key in map(str, node):
        if key not in hints:
            raise UserError(_unknown(f"{prefix}{key}"))
        if is_dataclass(hints[key]) and not OmegaConf.is_missing(node, key):
            _refuse_unknown(node[key], hints[key], f"{prefix}{key}.")


def rejudged(config: Config, overrides: list[str]) -> tuple[Config, Checkpoint]:
    """The config of the finished run that `run=` names, with this config's judges; and that run's weights.

    Raises:
        UserError: there is no such run, or something else is typed that would change it.
    """
    from truthsteer.checkpoint import Checkpoint
    from truthsteer.runs import find_run

    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] not in REJUDGING:
            raise UserError(
                f"{key} cannot be changed where run={config.run} is judged again: its answers are made. "
                f"Leave it out; what can be typed is {', '.join(REJUDGING)}."
            )
    assert config.run is not None
    folder, record = find_run(Path(config.paths.root), config.run)
    if "checkpoint" not in record:
        raise UserError(
            f"run={config.run} never came as far as its model. Finish it first: type its own command again."
        )
    old = OmegaConf.merge(OmegaConf.structured(Config), record["config"])
    assert isinstance(old, DictConfig)
    old.judge = config.judge
    old.stages = [Stage.judge, Stage.report]
    old.run_id = config.run_id
    old.run = None
    old.dry_run = config.dry_run
    old.verbose = config.verbose
    old.device = config.device
    old.shards, old.shard = config.shards, config.shard
    old.paths.root = str(folder.parent)
    old.paths.hf_cache = config.paths.hf_cache
    checkpoint = Checkpoint(**record["checkpoint"])
    if checkpoint.commit is not None:
        old.model.revision = checkpoint.commit
    return to_config(old), checkpoint


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages as one sentence that names the key and says what to type."""
    chain = []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        chain.append(str(cause))
        cause = cause.__cause__
    text = " ".join(" ".join(chain).split())
    if found := re.search(r"Could not override '([^']+)'", text):
        group, at, _ = found.group(1).partition("@")
        return f"{found.group(1)} adds an option: type +{found.group(1)}=OPTION." if at else _unknown(group)
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        return f"{group}={option} is not an option. {did_you_mean(option, options)}{_options(group)}"
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        key, values = found.groups()
        together = f"'{key}=[{values}]' for all in one run, or " if key in SEVERAL else ""
        return f"{key}={values} is several values. Type {together}-m {key}={values} for a run each."
    if found := re.search(r"Invalid value assigned: \w+ is not a ListConfig.*full_key: (\S+)", text):
        return f"{found.group(1)} must be a list. Type '{found.group(1)}=[VALUE]'."
    if found := re.search(r"Error merging override (\S+)", text):
        reason = chain[-1].splitlines()[0].rstrip(".") if len(chain) > 1 else "the value has the wrong type"
        return f"{found.group(1)} cannot be used: {reason}."
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{found.group(1)} has no value. Type {found.group(1)}=VALUE."
    if found := re.search(r"Error parsing override '([^']*)'", text):
        return f"'{found.group(1)}' is not an override. Type KEY=VALUE; quote values with spaces, commas or brackets."
    return text


def _unknown(key: str) -> str:
    parts = key.split(".")
    option = conf_dir() / parts[0] / f"{parts[1]}.yaml" if parts[0] in SEVERAL and len(parts) > 2 else None
    if option is not None and option.is_file():
        fields = list(OmegaConf.select(OmegaConf.load(option), parts[1]))
        if parts[2] not in fields:
            return f"'{key}' is not a key. {did_you_mean(parts[2], fields)}{parts[1]} has {', '.join(fields[1:])}."
        return f"{key} needs that {parts[0]}, which is not chosen. Type {parts[0]}=[{parts[1]}] with it."
    if key.startswith("hydra.launcher."):
        from hydra_plugins.truthsteer_launcher import LocalConf, SlurmConf

        known = sorted(
            {field.name for launcher in (SlurmConf, LocalConf) for field in fields_of(launcher)} - {"_target_"}
        )
        guess = did_you_mean(key.removeprefix("hydra.launcher."), known)
        return f"'{key}' is not a key. {guess}Those of hydra.launcher are: {', '.join(known)}."
    return f"'{key}' is not a key. {did_you_mean(key, all_keys())}`truthsteer --cfg job` lists them all."


def all_keys(schema: type[Any] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the typed config."""
    found = []
    for name, hint in get_type_hints(schema).items():
        found.append(f"{prefix}{name}")
        if is_dataclass(hint):
            found += all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def set_hub_cache(folder: str | None) -> None:
    """HF_HOME must be set before any hub library is imported."""
    if folder is not None:
        os.environ["HF_HOME"] = str(Path(folder).expanduser().resolve())


def remove_if_empty(folder: Path) -> None:
    """Hydra makes a scratch folder for every start; leave none behind."""
    for path in (folder, folder.parent):
        try:
            path.rmdir()
        except OSError:
            return
