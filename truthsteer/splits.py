"""Who is used for what: near-duplicate groups dealt out to the roles, evenly over category and kind.

A group is never divided, so nothing that is fitted, trained or chosen has seen a twin of a test question. The
one exception is a source that fixes its own test questions: `leaks` counts what that costs. Splits depend on
the questions, the sizes and the seed alone, not on their order in the file or the version of any library.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from truthsteer.config import DataConfig, SplitSizes
from truthsteer.errors import UserError
from truthsteer.records import Question, Splits

POOL, TEST = "pool", "test"

Group = Sequence[Question]


def split(questions: Sequence[Question], fixed: Mapping[str, str], config: DataConfig, seed: int) -> tuple[Splits, ...]:
    """The role of every question in every fold; within a role questions keep their order.

    With `config.folds` = 1 the four roles are in proportion to `config.split`, unless the source fixes its
    test questions: then only the rest is dealt out. With more folds each question is tested in exactly one,
    what the source fixes is ignored, and the rest of each fold goes to steer, train and tune in proportion.

    Args:
        questions: each with its near-duplicate group.
        fixed: question id -> `POOL` or `TEST`, or empty.
        config: sizes and number of folds.
        seed: draws who does what.

    Raises:
        UserError: there are too few groups for a role to get any.
    """
    sizes = config.split
    others = {"steer": sizes.steer, "train": sizes.train, "tune": sizes.tune}
    if config.folds > 1:
        tests = deal(questions, dict.fromkeys(map(str, range(config.folds)), 1.0), f"{seed}/folds")
        held_out = [tests[str(fold)] for fold in range(config.folds)]
    elif fixed:
        held_out = [tuple(question for question in questions if fixed[question.id] == TEST)]
    else:
        roles = deal(questions, {**others, "test": sizes.test}, str(seed))
        return (_checked(Splits(fold=0, **roles), sizes),)
    splits = []
    for fold, test in enumerate(held_out):
        tested = {question.id for question in test}
        rest = [question for question in questions if question.id not in tested]
        splits.append(_checked(Splits(fold=fold, test=test, **deal(rest, others, f"{seed}/{fold}")), sizes))
    return tuple(splits)


def deal(questions: Sequence[Question], sizes: Mapping[str, float], seed: str) -> dict[str, tuple[Question, ...]]:
    """Whole groups dealt out to roles in proportion to `sizes`.

    Largest groups first, then in an order drawn with the seed, each group goes to the role that is furthest
    behind its share of what has been dealt: of all questions, of the group's kinds, categories, and both.
    A role of size 0 gets nothing; any other gets at least one group if there are enough.
    """
    total = sum(sizes.values())
    shares = {role: size / total for role, size in sizes.items() if size > 0}
    behind: dict[tuple[str, ...], dict[str, float]] = defaultdict(lambda: dict.fromkeys(shares, 0.0))
    taken: dict[str, set[str]] = {role: set() for role in sizes}
    groups = sorted(_groups(questions), key=lambda group: (-len(group), _draw(seed, group)))
    for place, group in enumerate(groups):
        empty = [role for role in shares if not taken[role]]
        open_roles = empty if len(empty) >= len(groups) - place else list(shares)
        strata = [stratum for question in group for stratum in _strata(question)]
        for stratum in strata:
            for role, share in shares.items():
                behind[stratum][role] += share
        chosen = max(open_roles, key=lambda role: sum(behind[stratum][role] for stratum in strata))
        for stratum in strata:
            behind[stratum][chosen] -= 1
        taken[chosen].update(question.id for question in group)
    return {role: tuple(question for question in questions if question.id in ids) for role, ids in taken.items()}


def leaks(folds: Iterable[Splits]) -> int:
    """How many test questions have a near-duplicate in another role of their fold."""
    count = 0
    for fold in folds:
        others = {question.group for role in (fold.steer, fold.train, fold.tune) for question in role}
        count += sum(question.group in others for question in fold.test)
    return count


def _groups(questions: Iterable[Question]) -> list[Group]:
    members: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        members[question.group].append(question)
    return list(members.values())


def _draw(seed: str, group: Group) -> str:
    return hashlib.sha256(f"{seed}/{min(question.id for question in group)}".encode()).hexdigest()


def _strata(question: Question) -> tuple[tuple[str, ...], ...]:
    """Everything, the question's kind, its category, and both together."""
    kind, category = question.kind, question.category
    return (), ("kind", kind), ("category", category), ("both", kind, category)


def _checked(splits: Splits, sizes: SplitSizes) -> Splits:
    """The splits, unless a role that is to have questions has none."""
    for role in ("steer", "train", "tune", "test"):
        if getattr(sizes, role) > 0 and not getattr(splits, role):
            n = sum(len(part) for part in (splits.steer, splits.train, splits.tune, splits.test))
            raise UserError(
                f"Of {n} questions none is left for data.split.{role} (fold {splits.fold}): near-duplicates "
                "stay together. Type a larger data.limit, fewer data.folds, or another data.path."
            )
    return splits
