"""What a second start costs: unchanged, with one more judge, with one more coefficient; against a run from scratch.

    python bench/rerun.py
    python bench/rerun.py model=gemma3_270m data=truthfulqa        what is typed is the run's

The embedded model by default. Each case follows a run of its own root, in turn; a run from scratch goes before it. What was
computed is told from the store: kinds of artifacts, and how many of them are new. The model is loaded only where the log
says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

CASES = {
    "unchanged": [],
    "one more judge": ["judge=[reference,lexical]"],
    "one more coefficient": ["steering.coefficients=[-0.4,-0.2,0.1,0.2,0.3,0.4,0.6,0.8,1.0,1.2]"],
}
MOST = 3.0
"""Seconds that are allowed where no model is needed."""


def artifacts(root: Path) -> set[Path]:
    return {path.parent for path in root.glob(".store/*/*/meta.json")}


def run(root: Path, typed: list[str]) -> tuple[float, Counter[str], bool]:
    """Seconds, new artifacts by kind, whether a model was loaded."""
    before = artifacts(root)
    begin = time.perf_counter()
    command = [sys.executable, "-m", "truthsteer", f"paths.root={root}", *typed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return seconds, Counter(path.parent.name for path in artifacts(root) - before), "loading" in done.stderr


def main() -> None:
    typed = sys.argv[1:]
    for name, changed in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            scratch, _, _ = run(root, typed)
            again, made, loaded = run(root, [*typed, *changed])
            new = ", ".join(f"{count} {kind}" for kind, count in sorted(made.items())) or "nothing"
            verdict = "" if loaded else f" (at most {MOST:g} s: {'yes' if again <= MOST else 'NO'})"
            print(
                f"{name}: from scratch {scratch:.1f} s, then {again:.1f} s{verdict}; "
                f"model {'loaded' if loaded else 'not loaded'}; new: {new}",
                flush=True,
            )


if __name__ == "__main__":
    main()
