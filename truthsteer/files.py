"""Files that a reader finds whole or not at all, and what a disk that fails is called. Knows no artifacts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from truthsteer.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def canonical(value: Any) -> str:
    """JSON with sorted keys and shortest floats; NaN is refused, since nothing may be keyed by it."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def digest(value: Any) -> str:
    """The first 20 hex digits of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old text or the new one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def create_json(path: Path, value: Any) -> bool:
    """Write atomically unless the file is there; of several processes that try at once, one is told True."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    write_json(part, value)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return True


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def remembered(path: Path) -> Any:
    """A JSON file that only saves time: None where it is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def sync(path: Path) -> None:
    """On disk when this returns: a file's content, a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: BaseException, root: Path) -> UserError | None:
    """What to do about a disk that is full or may not be written to; None if `error` is about something else.

    Args:
        error: an OSError, or another library's that quotes one (`os error 28`).
        root: where everything is written.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (quoted := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(quoted[1])
    if number in _FULL:
        return UserError(
            f"{root} is on a disk that is full, or over its quota ({os.strerror(number)}). Free some space (`truthsteer "
            f"store gc paths.root={root}` removes what no run needs), or type paths.root=DIR on another disk. The same "
            "command then goes on from here."
        )
    named = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else root
    if number in _FORBIDDEN and _inside(named, root):
        return UserError(
            f"{root} cannot be written to ({os.strerror(number)}: {named}). Type paths.root=DIR, a folder that you may write "
            "to, or mend its permissions."
        )
    return None


def _inside(path: Path, root: Path) -> bool:
    """Whether a failure at `path` is one of `root`: below it, or a folder that it would stand in."""
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    return root in (path, *path.parents) or path in root.parents
