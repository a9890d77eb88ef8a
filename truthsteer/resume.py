"""`truthsteer resume SWEEP [paths.root=DIR] [hydra.launcher.KEY=VALUE]`: submit again what is neither done nor under way."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from truthsteer import launching, sweeps
from truthsteer.errors import UserError

HELP = """\
Submits again, with the configs that were frozen then, those jobs of a sweep that are neither finished nor under way.

  truthsteer resume SWEEP                                    by its name or a part of it: `truthsteer status` shows it
  truthsteer resume SWEEP hydra.launcher.timeout_min=2880    with another size
  truthsteer resume SWEEP paths.root=DIR                     of sweeps that were started with this root
"""


def main(arguments: Sequence[str]) -> None:
    """Entry point.

    Raises:
        UserError: no sweep is named, there is none of that name, or its jobs cannot be submitted.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    name, root, keys = sweeps.typed(arguments, keys=True)
    if name is None:
        newest = sweeps.find(root, None)
        raise UserError(f"No sweep is named. Type `{sweeps.command('resume', newest)}` for the newest.")
    launching.resume(sweeps.find(root, name), keys)
