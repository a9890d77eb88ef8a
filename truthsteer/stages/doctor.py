"""doctor: why a run breaks, or would: the model's numbers under this run's dtype, on its own prompts, on this machine.

Runs only when it is named, and looks anew each time: what it finds may be the machine's fault. The report goes to the run's
folder (doctor.json) and, in lines, to its log.
"""

from __future__ import annotations

import logging
from typing import Any

from truthsteer import preflight
from truthsteer.config import Stage
from truthsteer.files import write_json
from truthsteer.numerics_text import lines
from truthsteer.workspace import Workspace

log = logging.getLogger("truthsteer")


def run(ws: Workspace) -> dict[str, Any]:
    """The report.

    Raises:
        UserError: the numbers are not finite, other stages are to follow, and `dtype.on_overflow` is error.
    """
    report = preflight.examine(ws, ws.steer_questions, thorough=True)
    write_json(ws.folder / preflight.REPORT, report)
    for line in lines(report):
        log.info(line)
    log.info("in full: %s", ws.folder / preflight.REPORT)
    if ws.runs(Stage.extract):
        preflight.enforce(ws, report)
    return report
