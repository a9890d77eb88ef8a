"""Which code this is: a hash of every file that comes with it, so that a job can tell whether one changed while it was queued.

Not of YAML files: a job reads none, since its config is composed before it is queued. Nor of components of your own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PLUGIN = PACKAGE.parent / "hydra_plugins" / "truthsteer_launcher"


def files() -> dict[str, str]:
    """Path below the folder that holds the package -> the first 16 hex digits of the file's sha256."""
    found = sorted(
        path
        for folder in (PACKAGE, PLUGIN)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".yaml") and not path.name.startswith(".")
    )
    return {str(path.relative_to(PACKAGE.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found}


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Files that were added, removed or edited."""
    return sorted(name for name in before | now if before.get(name) != now.get(name))
