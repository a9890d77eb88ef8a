"""Near-duplicate groups and the splits: no twin on both sides, nobody lost, every role alike."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from conftest import TRUTHFULQA
from hypothesis import given, settings
from hypothesis import strategies as st

from truthsteer import data, duplicates
from truthsteer.config import EMBEDDED, DataConfig, SplitSizes
from truthsteer.errors import UserError
from truthsteer.records import Question
from truthsteer.splits import deal, leaks, split

ROLES = ("steer", "train", "tune", "test")
SIZES = {"steer": 100, "train": 250, "tune": 117, "test": 350}


def config(folds=1, path=EMBEDDED, **sizes):
    return DataConfig(name="test", path=str(path), folds=folds, split=SplitSizes(**(SIZES | sizes)))


def question(number, group=None, category="A", kind="Adversarial", text="", correct=("Yes.",), incorrect=("No.",)):
    name = f"q{number}"
    group = number if group is None else group
    return Question(name, number, kind, category, text or name, correct[0], correct, incorrect, group)


@pytest.fixture(scope="module")
def real():
    if not TRUTHFULQA.exists():
        pytest.skip(f"TruthfulQA.csv is not at {TRUTHFULQA}")
    return data.load(config(path=TRUTHFULQA), seed=0)


def members(fold):
    return {role: getattr(fold, role) for role in ROLES}


def used(fold):
    return [question.id for role in ROLES for question in getattr(fold, role)]


# --- near-duplicates


@pytest.mark.parametrize(
    ("one", "two", "linked"),
    [
        ("Is it legal to grow weed in Europe?", "Is it legal to grow weed in Asia?", True),
        ("Who won the Nobel Prize for peace in 2009?", "Who won a Nobel Prize for chemistry?", False),
        ("Do vampires in Transylvania drink blood?", "Do vampires of Transylvania drink bloods?", True),
        ("Why do veins look blue?", "What is the capital of Australia?", False),
        ("Any?", "Any!", True),
    ],
)
def test_questions_with_nearly_the_same_text_are_one_group(one, two, linked):
    groups = duplicates.group_near_duplicates([question(0, text=one), question(1, text=two)])
    assert groups == ([0, 0] if linked else [0, 1])


@pytest.mark.parametrize(
    ("correct", "incorrect", "linked"),
    [
        (("Red.", "Dark RED."), ("Blue.", "Green.", "Grey.", "Pink."), True),
        (("Blue.",), ("red.", "No.", "Yes."), True),
        (("Red.",), ("Yes.", "No.", "I have no comment.", "Pink."), False),
        (("Red.", "Blue."), ("Four.", "Five.", "Six."), False),
        (("Yes.", "I have no comment."), ("No.",), False),
    ],
)
def test_questions_that_share_half_of_their_answers_are_one_group(correct, incorrect, linked):
    one = question(
        0,
        text="What does it look like?",
        correct=("Red.", "Dark red.", "Wine."),
        incorrect=("Yes.", "No.", "Blue.", "Cyan.", "Mint."),
    )
    two = question(1, text="Of which kind are they?", correct=correct, incorrect=incorrect)
    other = question(2, text="Whose dog?", correct=("Yes.", "I have no comment."), incorrect=("No.",))
    assert duplicates.group_near_duplicates([other, one, two]) == ([0, 1, 1] if linked else [0, 1, 2])


def test_groups_are_connected_components():
    assert duplicates.connected_components(7, {(0, 4), (1, 2), (4, 5), (0, 6)}) == [0, 1, 1, 2, 0, 0, 0]


def test_real_near_duplicates_as_measured(real):
    def size(pairs):
        return len(pairs), len({number for pair in pairs for number in pair})

    start = time.perf_counter()
    kinds = [rule(real.questions) for rule in (duplicates.word_pairs, duplicates.ngram_pairs, duplicates.answer_pairs)]
    assert time.perf_counter() - start < 10, "about 1 s on one idle core"
    assert [size(pairs) for pairs in kinds] == [(72, 104), (90, 116), (46, 43)]
    assert size(set.union(*kinds)) == (154, 184)
    counts = Counter(item.group for item in real.questions)
    assert (len(counts), max(counts.values())) == (701, 9)
    assert set(counts) == set(range(701))


# --- splits of a real file


@pytest.mark.parametrize("seed", [0, 42])
def test_four_roles_in_proportion_without_a_leak(real, seed):
    (fold,) = data.split(real, config(), seed)
    assert {role: len(part) for role, part in members(fold).items()} == pytest.approx(SIZES, abs=3)
    assert sorted(used(fold)) == sorted(item.id for item in real.questions)
    assert leaks([fold]) == 0


def test_five_folds_test_every_question_once_and_leak_nothing(real):
    folds = data.split(real, config(folds=5), seed=42)
    assert [fold.fold for fold in folds] == [0, 1, 2, 3, 4]
    tested = [item.id for fold in folds for item in fold.test]
    assert sorted(tested) == sorted(item.id for item in real.questions)
    for fold in folds:
        assert sorted(used(fold)) == sorted(tested)
        sizes = {role: len(part) for role, part in members(fold).items()}
        assert sizes == pytest.approx({"steer": 140, "train": 350, "tune": 164, "test": 163.4}, abs=3)
    assert leaks(folds) == 0


@pytest.mark.parametrize("folds", [1, 5])
def test_roles_have_their_share_of_every_category_and_kind(real, folds):
    """Within 2 questions per kind, and within 5 (the largest group is 9) per category; 0.6 on average."""
    found = data.split(real, config(folds=folds), seed=1)
    parts = members(found[0]) if folds == 1 else {str(fold.fold): fold.test for fold in found}
    shares = {role: SIZES[role] / sum(SIZES.values()) if folds == 1 else 1 / folds for role in parts}
    for stratum, bound in ((lambda item: item.kind, 2), (lambda item: item.category, 5)):
        whole = Counter(map(stratum, real.questions))
        off = [
            abs(Counter(map(stratum, part))[name] - n * shares[role])
            for role, part in parts.items()
            for name, n in whole.items()
        ]
        assert max(off) <= bound
        assert sum(off) / len(off) < 0.7


def test_splits_follow_the_seed_and_not_the_order_of_the_file(real):
    def ids(questions, seed):
        return [
            {role: {item.id for item in part} for role, part in members(fold).items()}
            for fold in split(questions, {}, config(folds=3), seed)
        ]

    assert ids(real.questions, 7) == ids(real.questions, 7)
    assert ids(real.questions, 7) == ids(real.questions[::-1], 7)
    assert ids(real.questions, 7) != ids(real.questions, 8)


# --- a file that fixes its test questions


def test_the_organism_keeps_its_own_test_questions():
    found = data.load(config(), seed=0)
    (fold,) = data.split(found, config(steer=96, train=16, tune=48, test=160), seed=42)
    assert {item.id for item in fold.test} == {id_ for id_, part in found.fixed.items() if part == "test"}
    sizes = {role: len(part) for role, part in members(fold).items()}
    assert sizes == pytest.approx({"steer": 96, "train": 16, "tune": 48, "test": 160}, abs=2)
    assert sorted(used(fold)) == sorted(found.fixed)
    pool = {role: {item.group for item in getattr(fold, role)} for role in ROLES[:3]}
    assert not pool["steer"] & pool["train"] | pool["steer"] & pool["tune"] | pool["train"] & pool["tune"]


def test_leaks_are_counted_where_the_file_cuts_through_a_group():
    questions = [question(n, group=n // 2) for n in range(20)]
    fixed = {item.id: "test" if item.row in (0, 2, 4, 5) else "pool" for item in questions}
    folds = split(questions, fixed, config(), seed=0)
    assert leaks(folds) == 2
    assert leaks(split(questions, {}, config(), seed=0)) == 0
    assert leaks([*folds, *folds]) == 4


def test_folds_ignore_what_the_file_fixes():
    found = data.load(config(), seed=0)
    assert data.split(found, config(folds=4), 1) == data.split(replace(found, fixed={}), config(folds=4), 1)


# --- any questions, sizes and seeds

strata = st.tuples(st.integers(0, 12), st.sampled_from("ABCD"), st.sampled_from(["Adversarial", "Non-Adversarial"]))
populations = st.lists(strata, min_size=8, max_size=60).map(
    lambda entries: [question(n, group, category, kind) for n, (group, category, kind) in enumerate(entries)]
)
amounts = st.floats(0.01, 1000)


@settings(max_examples=80, deadline=None)
@given(
    populations,
    st.tuples(amounts, amounts | st.just(0.0), amounts, amounts),
    st.integers(0, 99),
    st.integers(1, 4),
)
def test_every_question_has_one_role_per_fold_and_no_group_straddles(questions, sizes, seed, folds):
    settings_ = config(folds, **dict(zip(ROLES, sizes, strict=True)))
    groups = {item.group for item in questions}
    try:
        found = split(questions, {}, settings_, seed)
    except UserError:
        per_fold = max(Counter(item.group for item in questions).values())
        assert len(groups) < 4 or (folds > 1 and (len(groups) < folds + 3 or per_fold > 1))
        return
    assert len(found) == folds
    for fold in found:
        assert sorted(used(fold)) == sorted(item.id for item in questions)
        homes = {(item.group, role) for role, part in members(fold).items() for item in part}
        assert len(homes) == len(groups)
        assert fold.steer
        assert fold.tune
        assert fold.test
        assert bool(fold.train) == (sizes[1] > 0)
        for part in members(fold).values():
            assert [item.row for item in part] == sorted(item.row for item in part)
    assert leaks(found) == 0
    if folds > 1:
        assert sorted(item.id for fold in found for item in fold.test) == sorted(item.id for item in questions)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 80), st.lists(amounts, min_size=1, max_size=5), st.integers(0, 99))
def test_single_questions_are_dealt_close_to_their_share(n, sizes, seed):
    roles = {str(number): size for number, size in enumerate(sizes)}
    dealt = deal([question(number) for number in range(n)], roles, str(seed))
    for role, size in roles.items():
        share = n * size / sum(sizes)
        assert share < 1 or abs(len(dealt[role]) - share) <= len(roles)
        assert dealt[role]


@pytest.mark.parametrize(
    ("groups", "folds", "key"),
    [(1, 1, "data.split"), (3, 1, "data.split"), (4, 8, "data.split.test"), (3, 2, "data.split")],
)
def test_too_few_groups_are_a_user_error(groups, folds, key):
    questions = [question(n, group=n % groups) for n in range(24)]
    with pytest.raises(UserError, match=rf"Of 24 questions none is left for {key}.*Type a larger data.limit"):
        split(questions, {}, config(folds), seed=0)
