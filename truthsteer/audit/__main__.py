"""The command `python -m truthsteer.audit`. Judges, data and paths are those of the main command, composed by Hydra."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from truthsteer import data
from truthsteer.audit import ask, summarise
from truthsteer.audit.labels import LabelFile, read
from truthsteer.audit.output import tables, write_answers
from truthsteer.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, conf_dir, explain, set_hub_cache, to_config
from truthsteer.component import build_all, content
from truthsteer.config import Config, Stage
from truthsteer.errors import UserError
from truthsteer.files import digest, write_json
from truthsteer.terminal import console

VERSION = 1
HELP = """\
Holds judges against answers that people have labelled.

  python -m truthsteer.audit LABELS.csv KEY=VALUE ...

Examples
  python -m truthsteer.audit labels.csv judge=[reference,semantic] data=truthfulqa_csv data.path=TruthfulQA.csv
      two judges; questions without references in the file are looked up in TruthfulQA.csv
  python -m truthsteer.audit labels.csv judge=[llm] judge.llm.model=OWNER/NAME
      a language model as judge; any key of the judge can be typed, as with the main command

LABELS.csv, with its columns in any order:
  question, answer, label        label 1 or 0, true or false, yes or no: is the answer true?
  info_label                     optional: is the answer informative?
  best_answer, correct_answers, incorrect_answers
                                 optional: references, the last two separated by ";"; else the question is looked up
                                 by its text in data=... (data.path=FILE.csv)
  group                          optional: such as the model that answered; gives a breakdown

Keys
  judge=[reference,semantic]     the judges, and judge.NAME.FIELD=VALUE for their fields
  data=truthfulqa_csv data.path=FILE.csv
                                 where questions are looked up
  stages=[prefetch]              download what the judges need, and stop
  seed=42                        of resampling
  paths.root=multirun            results go to paths.root/audit-HASH: audit.json, and audit.csv with every verdict

Each judge stands beside what it must beat: always yes, always no, and the length of an answer alone.
"""


def main() -> None:
    """Entry point; exits with 2 and one sentence where the user can mend what is wrong."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        (sys.stdout if arguments else sys.stderr).write(HELP)
        sys.exit(0 if arguments else EXIT_USER_ERROR)
    try:
        run(arguments[0], arguments[1:])
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error))
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Nothing was written.\n")
        sys.exit(EXIT_INTERRUPTED)


def _fail(message: str) -> None:
    sys.stderr.write(f"truthsteer: {message}\n")
    sys.exit(EXIT_USER_ERROR)


def run(labels: str, overrides: Sequence[str]) -> None:
    """Audit the judges of a config and show the result.

    Raises:
        UserError: whatever the user can mend, before any judge is asked where that is possible.
    """
    path = Path(labels).expanduser()
    if "=" in labels and not path.exists():
        raise UserError(f"'{labels}' stands where the labels' file should. Type the CSV file first, then KEY=VALUE.")
    flags = [word for word in overrides if word.startswith("-")]
    if flags:
        raise UserError(
            f"'{flags[0]}' is not known here. Type KEY=VALUE; python -m truthsteer.audit --help says which."
        )
    config = composed(overrides)
    set_hub_cache(config.paths.hf_cache)
    judges = build_all(config.judge, "judge")
    if Stage.prefetch in config.stages:
        for judge in judges.values():
            judge.prefetch()
        data.prefetch(config.data)
        return
    identities = {
        name: {**content(config.judge[name], judge), **judge.identity()} for name, judge in judges.items()
    }  # a judge that is not there is missed now
    source = f"data={config.data.name}"
    found = read(path, lambda: data.load(config.data, config.seed).questions, source)
    verdicts = ask(judges, found.rows)
    summary = summarise(found.rows, verdicts, config.seed)
    folder = _folder(config, found, identities)
    folder.mkdir(parents=True, exist_ok=True)
    write_answers(folder / "audit.csv", found.rows, verdicts)
    whole = {"file": found.name, "sha256": found.sha256, "problems": list(found.problems), "judges": identities}
    write_json(folder / "audit.json", {**whole, **summary})
    _show(summary, found, folder)


def composed(overrides: Sequence[str]) -> Config:
    """The checked config that the main command would have with these overrides.

    Raises:
        UserError: a key that does not exist, or a value out of range.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", overrides=list(overrides)))


def _folder(config: Config, found: LabelFile, identities: dict[str, Any]) -> Path:
    """The same labels, judges, references and seed are the same folder."""
    source = data.fingerprint(config.data) if found.looked_up else None
    return Path(config.paths.root) / f"audit-{digest([VERSION, found.sha256, identities, source, config.seed])[:8]}"


def _show(summary: dict[str, Any], found: LabelFile, folder: Path) -> None:
    out = console()
    for table in tables(summary, out.width):
        out.print(table)
    lines = [f"Warning: {warning}" for warning in summary["warnings"]]
    lines += [f"{found.name} {problem}" for problem in found.problems[:10]]
    if len(found.problems) > 10:
        lines.append(f"... and {len(found.problems) - 10} more, in audit.json.")
    if summary["empty"]:
        lines.append(f"{summary['empty']} of {summary['answers']} answers are empty; they were judged like the others.")
    for line in (*lines, f"audit: {folder}"):
        out.print(line, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
