"""Texts longer than steering.max_length: refused, or dropped, or cut; counted in every case, and never where answers count."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, build, make_questions
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import given
from hypothesis import strategies as st
from made_results import make_bank, make_results
from omegaconf import OmegaConf

from truthsteer import cautions, metrics
from truthsteer.activations import Activations, Dropped, Loss, Truncated, drop_bad, drop_equal
from truthsteer.conditions import score_choices
from truthsteer.config import Config, SteeringConfig, TooLong
from truthsteer.errors import UserError
from truthsteer.extraction import extract
from truthsteer.hooks import capture
from truthsteer.lengths import MEMBERS, check_generated, check_scored, fit
from truthsteer.model import LanguageModel
from truthsteer.pairs import Pair, make_pairs
from truthsteer.prompts import PLAIN, Branch, Prompts
from truthsteer.records import Choice, Condition, ConditionKind, Question
from truthsteer.stages import extract as extract_stage
from truthsteer.stages import generate as generate_stage
from truthsteer.stages import report, steer
from truthsteer.summary import scores_of, summarise
from truthsteer.workspace import Workspace

CUT = (TooLong.drop, TooLong.truncate)


def encoded(lm: LanguageModel, questions: tuple[Question, ...]) -> dict[str, tuple[int, tuple[tuple[int, ...], ...]]]:
    """Pair -> tokens of its prompt, and its two texts as token ids."""
    prompts, found = Prompts(PLAIN, lm.tokenizer, False), {}
    texts = {question.id: question.text for question in questions}
    for pair in make_pairs(questions, 2):
        [branch] = prompts.branches([texts[pair.question]], [[pair.true, pair.false]])
        found[pair.id] = (len(branch.context), tuple(branch.context + answer for answer in branch.continuations))
    return found


def longest(texts: tuple[tuple[int, ...], ...]) -> int:
    return max(map(len, texts))


# ------------------------------------------------------------------------------------------------ what is read

ANSWER = st.integers(1, 8).flatmap(lambda size: st.tuples(*[st.integers(3, 5)] * size))
BRANCHES = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.tuples(ANSWER, ANSWER), min_size=1, max_size=3)), min_size=2, max_size=4
)


def same_or_none(texts: list[tuple[int, ...]], max_length: int) -> bool:
    """Whether a cut leaves nothing to tell the texts apart by: the same beginning, or the prompt alone."""
    return texts[0][:max_length] == texts[1][:max_length]


@pytest.mark.parametrize("too_long", TooLong)
@given(drawn=BRANCHES, max_length=st.integers(2, 14))
def test_what_is_read_is_the_beginning_of_what_there_was_and_nothing_goes_uncounted(too_long, drawn, max_length):
    branches, pairs, names, texts = [], [], [], {}
    for number, (size, own) in enumerate(drawn):
        branches.append(Branch((2,) * size, tuple(answer for both in own for answer in both)))
        names.append(f"question {number}")
        for place, both in enumerate(own):
            pairs.append(Pair(f"q{number}.{place}", f"q{number}", "true", "false"))
            texts[pairs[-1].id] = [(2,) * size + answer for answer in both]
    long = [pair.id for pair in pairs if longest(texts[pair.id]) > max_length]
    gone = [pair for pair in long if too_long is TooLong.drop or same_or_none(texts[pair], max_length)]
    if len(gone) == len(pairs) or (long and too_long is TooLong.error):
        with pytest.raises(UserError, match=rf"steering\.max_length={max_length}\b"):
            fit(pairs, branches, names, max_length, too_long)
        return
    fitted = fit(pairs, branches, names, max_length, too_long)
    # every pair once, in order: used, or dropped with a reason
    used, lost = [pair.id for pair in fitted.pairs], {item.pair: item for item in fitted.dropped}
    assert sorted([*used, *lost]) == sorted(texts)
    assert used == [pair.id for pair in pairs if pair.id not in lost]
    assert sorted(lost) == sorted(gone)
    assert all(item.reason and str(max_length) in item.reason for item in lost.values())
    for pair, item in lost.items():
        room = max_length > len(branches[int(item.question[1:])].context)
        assert pair.startswith(item.question)
        assert (item.kind is Loss.EQUAL) == (room and too_long is TooLong.truncate)
    # what is read, pair by pair
    read = [
        (branch.context, branch.continuations[place : place + 2])
        for branch in fitted.branches
        for place in range(0, len(branch.continuations), 2)
    ]
    assert len(read) == len(used)
    assert {(item.pair, item.member): item.tokens for item in fitted.truncated} == {
        (pair, member): len(text)
        for pair in used
        for member, text in zip(MEMBERS, texts[pair], strict=True)
        if len(text) > max_length
    }
    for pair, (context, answers) in zip(used, read, strict=True):
        for answer, whole in zip(answers, texts[pair], strict=True):
            text = context + answer
            assert answer
            assert len(text) <= max_length
            assert text == whole[: len(text)]
            assert len(text) == min(len(whole), max_length)
        assert pair not in long or answers[0] != answers[1]


def test_error_is_the_default_and_comes_before_anything_is_computed(gemma3, questions, monkeypatch):
    monkeypatch.setattr(gemma3, "forward", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(UserError, match=r"longer than steering\.max_length=20 tokens"):
        extract(gemma3, questions, max_length=20)


def test_drop_leaves_out_both_members_and_counts_them_apart_from_numbers_that_are_not_finite(gemma3, questions):
    texts = encoded(gemma3, questions)
    limit = sorted(longest(both) for _, both in texts.values())[len(texts) // 2]
    found = extract(gemma3, questions, max_length=limit, too_long=TooLong.drop, max_dropped=0.0)
    whole = extract(gemma3, questions)
    kept = [pair.id for pair in whole.pairs if longest(texts[pair.id][1]) <= limit]
    assert 0 < len(kept) < len(whole.pairs)
    assert [pair.id for pair in found.pairs] == kept
    assert found.truncated == ()
    places = [index for index, pair in enumerate(whole.pairs) if pair.id in kept]
    for name in ("answer_mean", "answer_last", "prompt_last", "norms"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[places], rtol=1e-4, atol=1e-4)
    assert {item.pair for item in found.dropped} == set(texts) - set(kept)
    for item in found.dropped:
        lengths = [len(text) for text in texts[item.pair][1]]
        member = MEMBERS[lengths.index(max(lengths))]
        assert item.reason == f"the {member} answer's text has {max(lengths)} tokens; steering.max_length={limit}"
        assert item.kind is Loss.TOO_LONG


def test_truncate_reads_the_same_values_as_the_whole_text_up_to_the_cut(tiny, questions):
    texts = encoded(tiny, questions)
    limit = max(prompt for prompt, _ in texts.values()) + 4
    found = extract(tiny, questions, max_length=limit, too_long=TooLong.truncate, batch_tokens=200)
    cut = {(item.pair, item.member): item.tokens for item in found.truncated}
    assert cut == {
        (pair.id, member): len(text)
        for pair in found.pairs
        for member, text in zip(MEMBERS, texts[pair.id][1], strict=True)
        if len(text) > limit
    }
    assert len(cut) > 3
    for index, pair in enumerate(found.pairs):
        prompt, both = texts[pair.id]
        for member, text in enumerate(both):
            with capture(tiny, [3]) as taken:
                tiny.forward(torch.tensor([text]))  # the whole text, one pass
            read = taken[3][0, prompt:limit].numpy()
            scale = np.abs(read).max()
            np.testing.assert_allclose(found.answer_last[index, member, 3], read[-1], atol=2e-4 * scale)
            np.testing.assert_allclose(found.answer_mean[index, member, 3], read.mean(0), atol=2e-4 * scale)
            assert found.tokens[index, member] == len(read)


def alike() -> tuple[Question, ...]:
    """Answers that begin alike, and part late."""
    first, *others = make_questions(4)
    true, false = "The flowers of it are yellow.", "The flowers of it are red."
    return (dataclasses.replace(first, best=true, correct=(true,), incorrect=(false,)), *others)


def test_a_pair_that_is_the_same_once_cut_is_dropped_and_counted(gemma3):
    questions = alike()
    prompt, both = encoded(gemma3, questions)["q0.0"]
    shared = next(place for place, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
    assert shared > prompt + 2
    found = extract(gemma3, questions, max_length=shared, too_long=TooLong.truncate, max_dropped=0.0)
    [lost] = [item for item in found.dropped if item.question == "q0"]
    assert (lost.kind, lost.reason) == (Loss.EQUAL, f"its answers are the same once cut; steering.max_length={shared}")
    longer = extract(gemma3, questions, max_length=shared + 1, too_long=TooLong.truncate)
    assert "q0.0" in [pair.id for pair in longer.pairs]
    assert np.abs(longer.answer_last[0, 0] - longer.answer_last[0, 1]).min(-1).max() > 0


@pytest.mark.parametrize("too_long", CUT)
def test_a_prompt_that_fills_the_length_loses_its_pairs(gemma3, questions, too_long):
    wordy = dataclasses.replace(questions[1], text="What is " + "very " * 60 + "red?")
    asked = (questions[0], wordy, *questions[2:])
    texts = encoded(gemma3, asked)
    limit = texts["q1.0"][0]
    found = extract(gemma3, asked, max_length=limit, too_long=too_long, max_dropped=0.0)
    reason = f"its prompt has {limit} tokens and leaves no room for an answer; steering.max_length={limit}"
    assert [(item.pair, item.kind, item.reason) for item in found.dropped] == [
        ("q1.0", Loss.TOO_LONG, reason),
        ("q1.1", Loss.TOO_LONG, reason),
    ]
    assert len(found.pairs) == len(make_pairs(asked, 2)) - 2
    assert found.truncated == ()


def test_answers_that_the_model_cannot_tell_apart_are_dropped_when_texts_may_be_cut(tokenizer):
    model = build("gemma3")
    red, yellow = (tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("red", "yellow"))
    with torch.no_grad():
        model.model.embed_tokens.weight[red] = model.model.embed_tokens.weight[yellow]
    lm, questions = LanguageModel(model, tokenizer), make_questions(3)
    found = extract(lm, questions, too_long=TooLong.truncate, max_dropped=0.0)
    assert [(item.pair, item.kind) for item in found.dropped] == [(f"q{n}.0", Loss.EQUAL) for n in range(3)]
    assert all("same activations" in item.reason for item in found.dropped)
    assert [pair.id for pair in found.pairs] == [f"q{n}.1" for n in range(3)]
    assert len(extract(lm, questions).pairs) == 6
    with pytest.raises(UserError, match=r"In all 3 answer pairs.*stages=\[doctor\]"):
        drop_equal(extract(lm, questions, pairs_per_question=1))


@pytest.mark.parametrize("too_long", CUT)
def test_if_nothing_is_left_what_to_type_is_said_and_helps(gemma3, questions, too_long):
    with pytest.raises(UserError, match=rf"too_long={too_long.value} leaves none of 12 answer pairs") as caught:
        extract(gemma3, questions, max_length=8, too_long=too_long)
    assert ("Or type steering.too_long=truncate" in str(caught.value)) == (too_long is TooLong.drop)
    typed = int(str(caught.value).split("Type steering.max_length=")[1].split(",")[0])
    found = extract(gemma3, questions, max_length=typed, too_long=too_long)
    assert (len(found.pairs), found.dropped, found.truncated) == (12, (), ())


# ------------------------------------------------------------------------------------------------ counts

LOST = Dropped("q0.1", "q0", "its text is long", Loss.TOO_LONG)
SHORT = (Truncated("q1.0", "q1", "true", 40), Truncated("q2.0", "q2", "false", 41))


def made_up(pairs: int = 4) -> Activations:
    random = np.random.default_rng(0)
    values = random.standard_normal((2, pairs, 2, 3, 5)).astype(np.float32)
    return Activations(
        tuple(Pair(f"q{n}.0", f"q{n}", "t.", "f.") for n in range(pairs)),
        *values,
        random.standard_normal((pairs, 3, 5)).astype(np.float32),
        np.ones((pairs, 2, 3), np.float32),
        np.ones((pairs, 2), np.int64),
        dropped=(LOST,),
        truncated=SHORT,
    )


def test_losses_are_told_by_kind():
    whole = made_up()
    whole.answer_last[2, 1, 1, 0] = np.nan
    assert drop_bad(whole, max_dropped=0.25).losses() == [
        "1 of 5 answer pairs dropped: its text is long",
        "1 of 5 answer pairs dropped: not finite from layer 1 on",
        "1 texts of 3 answer pairs read without their end",
    ]
    assert dataclasses.replace(whole, dropped=(), truncated=()).losses() == []


def test_counts_survive_their_file_and_every_selection(tmp_path):
    whole = made_up()
    whole.save(tmp_path)
    again = Activations.load(tmp_path)
    assert (again.dropped, again.truncated) == (whole.dropped, whole.truncated)
    whole.answer_last[2, 1, 1, 0] = np.nan
    kept = drop_bad(whole, max_dropped=0.25)  # the one that was too long is none of the four that were read
    assert [(item.pair, item.kind) for item in kept.dropped] == [("q0.1", Loss.TOO_LONG), ("q2.0", Loss.NOT_FINITE)]
    assert kept.truncated == SHORT[:1]
    some = kept.of([q for q in make_questions(4) if q.id in ("q2", "q3")])
    assert ([pair.id for pair in some.pairs], some.truncated) == (["q3.0"], ())
    assert [item.pair for item in some.dropped] == ["q2.0"]


def test_losing_everything_to_numbers_stops_the_run_whatever_may_be_lost():
    whole = made_up()
    whole.answer_mean[:, 0, 1, 2] = np.inf
    with pytest.raises(
        UserError,
        match=r"4 of 4 pairs.*not finite from layer 1 on; none is left\..*stages=\[doctor\] to see where",
    ):
        drop_bad(whole, max_dropped=1.0)


# ------------------------------------------------------------------------------------------------ a run

SMALL = (
    "steering.layers=[2]",
    "steering.coefficients=[0.4]",
    "steering.controls.random=1",
    "steering.controls.shuffled=0",
    "steering.controls.style=false",
    "steering.controls.envelope=0",
    "steering.bank.subsets=0",
    "data.limit=48",
    "device=cpu",
    "threads=1",
    "judge=[reference]",
    "baselines.few_shot=0",
    "~prompt@baselines.prompts.help",
)
LIMITS = {TooLong.drop: 23, TooLong.truncate: 20}
"""In tokens; the organism's texts have 17 to 30, its prompts up to 19."""


def workspace(root: Path, *overrides: str) -> Workspace:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        built = OmegaConf.to_object(compose("config", overrides=[*SMALL, f"paths.root={root}", *overrides]))
    assert isinstance(built, Config)
    (root / "run").mkdir(parents=True, exist_ok=True)
    return Workspace(built, root / "run")


def banked(ws: Workspace):
    [split] = ws.splits
    activations = extract_stage.run(ws)
    return activations, steer.run(ws, split, activations)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """too_long -> (workspace, activations, bank), of one store."""
    root = tmp_path_factory.mktemp("runs")
    whole = workspace(root)
    found = {TooLong.error: (whole, *banked(whole))}
    for too_long, limit in LIMITS.items():
        ws = workspace(root, f"steering.max_length={limit}", f"steering.too_long={too_long.value}")
        ws.__dict__["model"] = whole.model
        found[too_long] = (ws, *banked(ws))
    return found


def test_the_limit_is_in_the_keys_where_it_decides_numbers_and_only_there(runs):
    root = runs[TooLong.error][0].store.root.parent
    keys = {activations.key for _, activations, _ in runs.values()} | {bank.key for _, _, bank in runs.values()}
    assert len(keys) == 6
    longer = workspace(root, "steering.max_length=300", "stages=[report]")  # computes nothing
    assert [made.key for made in banked(longer)] == [made.key for made in runs[TooLong.error][1:]]
    for too_long, limit in LIMITS.items():
        typed = (f"steering.max_length={limit}", f"steering.too_long={too_long.value}")
        same = workspace(root, *typed, "stages=[report]")
        assert [made.key for made in banked(same)] == [made.key for made in runs[too_long][1:]]
        other = workspace(root, "steering.max_length=21", f"steering.too_long={too_long.value}", "stages=[report]")
        with pytest.raises(UserError, match="extract"):
            banked(other)


def test_the_bank_says_what_its_vectors_rest_on(runs):
    for too_long, (ws, activations, bank) in runs.items():
        pairs, made = bank.json("bank.json")["pairs"], make_pairs(ws.splits[0].steer, 2)
        assert pairs["used"] + len(pairs["dropped"]) == len(made)
        assert pairs["used"] == len(Activations.load(activations.path).pairs)
        assert sum(pairs["lost"].values()) == len(pairs["dropped"])
        assert set(pairs["lost"]) == {"too_long", "equal", "not_finite"}
        assert (pairs["lost"]["too_long"] > 0) == (too_long is TooLong.drop)
        assert (pairs["truncated"] > 0) == (too_long is TooLong.truncate)
        assert pairs["lost"]["not_finite"] == 0
    hashes = {bank.json("bank.json")["conditions"][1]["vector_sha256"] for _, _, bank in runs.values()}
    assert len(hashes) == 3, "each estimated on what was read"


def test_the_same_cut_gives_the_same_vector_again(runs, tmp_path):
    ws = workspace(tmp_path, "steering.max_length=20", "steering.too_long=truncate")
    ws.__dict__["model"] = runs[TooLong.error][0].model
    _, bank = banked(ws)
    path = Path("vectors.safetensors")
    assert (bank.path / path).read_bytes() == (runs[TooLong.truncate][2].path / path).read_bytes()


BASELINE = Condition("baseline", ConditionKind.BASELINE, 0)


def test_answers_are_scored_whole_whatever_pairs_were_cut_to(runs, tmp_path):
    whole = runs[TooLong.error][0]

    def scored(name: str, *overrides: str):
        ws = workspace(tmp_path / name, *overrides)
        ws.__dict__["model"] = whole.model
        return score_choices(ws, ws.splits[0].tune, ws.prompt(), [BASELINE], lambda: {}, "scoring")[0]

    expected = scored("whole")
    for too_long in CUT:
        found = scored(too_long.value, "steering.max_length=20", f"steering.too_long={too_long.value}")
        assert found.key == expected.key
        assert found.rows(Choice) == expected.rows(Choice)
    assert max(row.tokens for row in expected.rows(Choice)) > 5
    with pytest.raises(UserError, match=r"longer than steering\.max_length=20"):
        scored("refused", "steering.max_length=20")


@pytest.mark.parametrize("too_long", CUT)
def test_what_is_asked_is_bounded_by_the_models_positions(gemma3, too_long):
    limit = gemma3.text_config.max_position_embeddings
    steering = SteeringConfig(coefficients=[1.0], max_length=8, too_long=too_long)
    fits, long = Branch((2,) * (limit - 5), ((3,) * 5,)), Branch((2,) * (limit - 5), ((3,) * 5, (3,) * 6))
    check_scored(gemma3, [fits], ["Who?"], steering)
    words = (
        rf"1 of 2 texts are longer than the model's {limit} positions.*'Why\?', has {limit + 1} tokens.*another prompt"
    )
    with pytest.raises(UserError, match=words):
        check_scored(gemma3, [fits, long], ["Who?", "Why?"], steering, "another prompt")
    check_generated(gemma3, [(2,) * 12], ["Who?"], steering, limit - 12)
    words = rf"{limit} positions.*'Who\?', has {limit + 1} tokens.*smaller generation\.max_new_tokens \(it is {limit - 11}\)"
    with pytest.raises(UserError, match=words):
        check_generated(gemma3, [(2,) * 12], ["Who?"], steering, limit - 11)
    plain = dataclasses.replace(steering, too_long=TooLong.error)
    check_generated(gemma3, [(2,) * 12], ["Who?"], plain, limit)  # as ever
    with pytest.raises(UserError, match=r"longer than steering\.max_length=8"):
        check_scored(gemma3, [fits], ["Who?"], plain)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            ("generation.max_new_tokens=250", "~prompt@baselines.prompts.truthful"),
            r"256 positions.*smaller generation\.max_new_tokens \(it is 250\), or a shorter prompt preset",
        ),
        (("baselines.few_shot=40",), r"256 positions.*baselines\.few_shot=0 to leave out the row 'few-shot'"),
    ],
)
def test_what_the_model_has_no_room_for_is_told_before_anything_is_measured(runs, tmp_path, typed, words):
    ws = workspace(tmp_path, "steering.max_length=20", "steering.too_long=truncate", "data.limit=160", *typed)
    ws.__dict__["model"] = runs[TooLong.error][0].model
    with pytest.raises(UserError, match=words):
        banked(ws)
    assert not (tmp_path / ".store" / "choices").exists()


def test_generation_finds_out_for_itself_if_the_bank_was_there_before(runs):
    ws, _, bank = runs[TooLong.truncate]
    more = workspace(
        ws.store.root.parent, "steering.max_length=20", "steering.too_long=truncate", "generation.max_new_tokens=250"
    )
    more.__dict__["model"] = ws.model
    [split] = more.splits
    assert banked(more)[1].key == bank.key
    with pytest.raises(UserError, match=r"256 positions.*generation\.max_new_tokens"):
        generate_stage.run(more, split, bank, [BASELINE])


# ------------------------------------------------------------------------------------------------ the report


def summed(pairs) -> tuple[dict, object]:
    results = dataclasses.replace(make_results(), banks=(make_bank(0, ("mean_diff",), pairs=pairs),))
    columns = metrics.judge_columns([row.verdicts for row in results.rows])
    return summarise(results, scores_of(results, columns), columns, seed=42), results


def test_the_report_counts_what_was_cut_and_dropped_also_where_it_is_nothing(runs, tmp_path):
    for _, _, bank in runs.values():
        pairs = bank.json("bank.json")["pairs"]
        summary, results = summed(pairs)
        assert summary["pairs"] == [{"fold": 0, **pairs}]
        report.run(results, tmp_path, seed=3)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        section = page.split("<h3>Answer pairs</h3>")[1].split("</section>")[0]
        head, row = section.split("<thead>")[1].split("<tbody>")[:2]
        names = [cell.split("</th>")[0].split(">")[-1] for cell in head.split("<th ")[1:]]
        cells = [cell.split("</td>")[0].split(">")[-1] for cell in row.split("</table>")[0].split("<td ")[1:]]
        assert dict(zip(names, cells, strict=True)) == {
            "fold": "0",
            "used": str(pairs["used"]),
            "texts of these cut": str(pairs["truncated"]),
            "abstentions skipped": str(pairs["abstentions_skipped"]),
            "dropped: too long": str(pairs["lost"]["too_long"]),
            "dropped: the same": str(pairs["lost"]["equal"]),
            "dropped: not finite": "0",
        }
        assert all(item["reason"] in html.unescape(section) for item in pairs["dropped"])


def test_a_reader_is_warned_of_texts_that_were_cut_and_of_pairs_lost_to_their_length():
    pairs = {"used": 95, "truncated": 7, "abstentions_skipped": 0, "lost": {}}
    lost = [
        {
            "pair": "a.0",
            "question": "a",
            "reason": "the true answer's text has 40 tokens; steering.max_length=20",
            "kind": "too_long",
        },
        {"pair": "b.0", "question": "b", "reason": "not finite from layer 3 on", "kind": "not_finite"},
        {"pair": "c.0", "question": "c", "reason": "the same", "kind": "too_long"},
    ]
    summary, _ = summed(pairs | {"dropped": lost})
    warned = [text for text in cautions.warnings(summary) if "pairs" in text]
    assert warned == [
        "2 of 98 answer pairs were dropped in fold 0, such as a: the true answer's text has 40 tokens; "
        "steering.max_length=20: the vectors rest on shorter texts.",
        "1 of 98 answer pairs were dropped in fold 0, such as b: not finite from layer 3 on.",
        "7 of 190 answers to pairs of fold 0 were read without their end: the vectors do not know what was cut. Type a larger "
        "steering.max_length.",
    ]
    summary, _ = summed(pairs | {"truncated": 0, "dropped": []})
    assert not [text for text in cautions.warnings(summary) if "pairs" in text]
