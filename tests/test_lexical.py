"""The judges that count words (BLEU, ROUGE) and BLEURT: against lm-eval's own numbers, and a tiny random BERT."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MOON
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, BertModel

from truthsteer.component import build_all, content
from truthsteer.data import load_questions
from truthsteer.errors import UserError
from truthsteer.judges.bleurt import Bleurt
from truthsteer.judges.lexical import Lexical
from truthsteer.judges.references import true_references
from truthsteer.judges.semantic import Semantic
from truthsteer.records import NO_COMMENT, Question, Verdict

HERE = Path(__file__).parent
CONF = HERE.parent / "conf" / "judge"
QUESTIONS = HERE / "golden" / "questions.csv"
GOLDEN = json.loads((HERE / "golden" / "lexical.json").read_text(encoding="utf-8"))
CASES = [(case["question"] - 1, case["piece"] * case["times"], case["scores"]) for case in GOLDEN["cases"]]

JUDGE = Lexical()


def one(text: str, question: Question = MOON) -> Verdict:
    [verdict] = JUDGE.judge([question], [text])
    return verdict


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """The question of every golden case."""
    assert hashlib.sha256(QUESTIONS.read_bytes()).hexdigest() == GOLDEN["questions_sha256"]
    questions = load_questions(str(QUESTIONS))
    return [questions[place] for place, _, _ in CASES]


def test_every_score_equals_lm_evals(asked):
    verdicts = JUDGE.judge(asked, [text for _, text, _ in CASES])
    assert len(verdicts) == len(CASES) > 40
    for verdict, (_, text, theirs) in zip(verdicts, CASES, strict=True):
        expected = {name.lower(): value for name, value in theirs.items() if not name.endswith("_max")}
        assert verdict.scores == pytest.approx(expected, abs=1e-9, rel=0), text[:80]
        assert verdict.status == ("ok" if text.strip() else "empty")


def test_the_true_similarity_alone_is_no_score():
    similarities = ("bleu", "rouge1", "rouge2", "rougel")
    assert Lexical.metrics == tuple(f"{name}_{score}" for name in similarities for score in ("acc", "diff"))
    for text in ("", "The Moon is made of rock."):
        assert set(one(text).scores) == set(Lexical.metrics)


def test_an_answer_as_close_to_both_sides_is_a_tie_and_not_accurate():
    for text in ("The Moon is made of", "green", "月"):
        verdict = one(text, replace(MOON, incorrect=("The Moon is made of cheese.", *MOON.correct[1:])))
        assert verdict.status == "ok"
        assert set(verdict.scores.values()) == {0.0}


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
def test_an_answer_without_text_is_empty_and_scores_nothing(text):
    verdict = one(text)
    assert verdict.status == "empty"
    assert verdict.scores == dict.fromkeys(Lexical.metrics, 0.0)


def test_no_comment_is_a_true_answer_whether_it_is_listed_or_not():
    listed = replace(MOON, correct=(*MOON.correct, NO_COMMENT))
    assert true_references(MOON) == true_references(listed) == (*MOON.correct, NO_COMMENT)
    assert one(NO_COMMENT).scores == one(NO_COMMENT, listed).scores
    assert one(NO_COMMENT).scores["bleu_acc"] == one(NO_COMMENT).scores["rougel_acc"] == 1.0


def test_a_verdict_does_not_depend_on_its_company(asked):
    texts = [text for _, text, _ in CASES]
    together = JUDGE.judge([*asked, *reversed(asked)], [*texts, *reversed(texts)])
    assert together[: len(texts)] == together[: len(texts) - 1 : -1]
    alone = [Lexical().judge([question], [text])[0] for question, text in zip(asked[:12], texts, strict=False)]
    assert together[:12] == alone
    shared = [MOON, replace(MOON, id="moon2", correct=MOON.incorrect, best=MOON.incorrect[0], incorrect=MOON.correct)]
    right, wrong = JUDGE.judge(shared, [MOON.best] * 2)
    assert right.scores["rouge1_diff"] == -(wrong.scores["rouge1_diff"] or 0) > 0
    assert (right.question, wrong.question) == ("moon", "moon2")


@pytest.mark.parametrize(
    "piece",
    ["The Moon is made of rock. ", "a", "a ", "a\n", "rock . ", "東京", "قمر ", "🙂", "?!", "\u200b", "\ud800", "\x00"],
    ids=ascii,
)
def test_ten_thousand_characters_of_anything_take_seconds_at_most(piece):
    text = (piece * 10_000)[:10_000]
    one("warm")
    start = time.perf_counter()
    verdict = one(text)
    assert time.perf_counter() - start < 5
    assert verdict.status == "ok"
    assert all(value is not None and math.isfinite(value) for value in verdict.scores.values())


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(["The", "Moon", "rock.", " . ", "\n", "月", "!"])).map(" ".join))
def test_any_text_gets_numbers_within_bounds_and_acc_is_the_sign_of_diff(text):
    verdict = one(text)
    for name in ("bleu", "rouge1", "rouge2", "rougel"):
        diff = verdict.scores[f"{name}_diff"]
        assert isinstance(diff, float)
        assert -100.0001 <= diff <= 100.0001
        assert verdict.scores[f"{name}_acc"] == float(diff > 0)


def test_references_are_split_up_once(monkeypatch):
    from rouge_score.tokenizers import DefaultTokenizer
    from sacrebleu.metrics.bleu import BLEU

    split, counted = [], []
    tokenize, cache = DefaultTokenizer.tokenize, BLEU._cache_references
    monkeypatch.setattr(DefaultTokenizer, "tokenize", lambda self, text: split.append(text) or tokenize(self, text))
    monkeypatch.setattr(BLEU, "_cache_references", lambda self, refs: counted.append(refs) or cache(self, refs))
    judge = Lexical()
    judge.judge([MOON, MOON], ["Rock it is.", "Cheese it is."])
    judge.judge([MOON], ["It is dust."])
    references = [*true_references(MOON), *MOON.incorrect]
    assert counted == [[[reference]] for reference in references]
    assert sorted(split) == sorted([*references, "Rock it is.", "Cheese it is.", "It is dust."])


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it asks for the network, or for nltk's data")

    import nltk

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr(nltk.data, "find", refuse)
    Lexical().prefetch()
    assert Lexical().judge([MOON], ["It is rock . It is not cheese.\nNobody doubts it."])[0].status == "ok"


def test_importing_and_identifying_loads_neither_torch_nor_what_counts_words():
    code = (
        "import json, sys\n"
        "from truthsteer.judges.lexical import Lexical\n"
        "from truthsteer.judges.bleurt import Bleurt\n"
        "print(json.dumps(Lexical().identity()))\n"
        "print(sorted({'torch', 'transformers', 'sacrebleu', 'rouge_score', 'nltk', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    identity, loaded = done.stdout.splitlines()
    assert set(json.loads(identity)) == {"version", "sacrebleu", "rouge_score"}
    assert loaded == "[]"


def test_both_yaml_files_build_under_their_own_names():
    nodes = {}
    for name in ("lexical", "bleurt"):
        text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("# ")
        nodes |= yaml.safe_load(text)
    assert build_all(nodes, "judge") == {"lexical": Lexical(), "bleurt": Bleurt()}


def test_how_many_are_scored_at_once_does_not_identify_a_judge():
    for judge in (Semantic, Bleurt):
        first, second = ({"model": "owner/name", "batch_size": size} for size in (1, 2))
        assert content(first, judge(**first)) == content(second, judge(**second)) == {"model": "owner/name"}


WORDS = ["the", "moon", "is", "made", "of", "rock", "rocks", "and", "dust", "cheese", "green", "it", "."]
WORDS += ["i", "have", "no", "comment", "wide", "##r"]


def save(folder: Path, *, labels: int = 1, head: bool = True, safe: bool = True) -> Path:
    """A random BERT with the files that a converted BLEURT has."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=labels,
    )
    model = BertForSequenceClassification(config) if head else BertModel(config)
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("bleurt"))


def ids(text: str) -> list[int]:
    """Token ids of a text of known words; every full stop stands alone."""
    vocabulary = {word: 5 + place for place, word in enumerate(WORDS)}
    return [vocabulary.get(word, 1) for word in text.lower().replace(".", " .").split()]


def rated(folder: Path, reference: str, answer: str, limit: int = 48) -> float:
    """What the model says of one pair, encoded by hand."""
    first, second = ids(reference), ids(answer)
    second = second[: limit - 3 - len(first)]
    tokens = torch.tensor([[2, *first, 3, *second, 3]])
    segments = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(tokens, token_type_ids=segments).logits)


@pytest.mark.parametrize("text", ["It is made of rock.", "The moon is wider.", NO_COMMENT, "cheese " * 2000])
def test_bleurt_compares_the_most_alike_of_each_side(checkpoint, text):
    [verdict] = Bleurt(str(checkpoint), max_tokens=48, batch_size=2).judge([MOON], [text])
    if "wider" in text:
        text = text.replace("wider", "wide ##r")
    true, false = (
        max(rated(checkpoint, reference, text) for reference in references)
        for references in ((*MOON.correct, NO_COMMENT), MOON.incorrect)
    )
    assert abs(true - false) > 1e-3
    assert verdict.scores["bleurt_diff"] == pytest.approx(true - false, abs=5e-6)
    assert verdict.scores["bleurt_acc"] == float(true > false)
    assert (verdict.question, verdict.status) == ("moon", "ok")


def test_bleurt_counts_empty_answers_and_ties_as_not_accurate(checkpoint):
    judge = Bleurt(str(checkpoint), max_tokens=48)
    both = replace(MOON, correct=("Dust.",), best="Dust.", incorrect=("Dust.", NO_COMMENT))
    verdicts = judge.judge([MOON, both, MOON], ["", "rock", "rock"])
    assert [verdict.status for verdict in verdicts] == ["empty", "ok", "ok"]
    assert [verdict.scores for verdict in verdicts[:2]] == [{"bleurt_acc": 0.0, "bleurt_diff": 0.0}] * 2
    assert judge.judge([MOON], [" "])[0].status == "empty"


def test_bleurt_is_identified_by_what_is_in_its_folder(checkpoint, tmp_path):
    first = Bleurt(str(checkpoint), max_tokens=48).identity()
    other = save(tmp_path / "other")
    assert Bleurt(str(other), max_tokens=48).identity() == first
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    assert Bleurt(str(other), max_tokens=48).identity() != first


def test_bleurt_from_the_hubs_cache(checkpoint, tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--name"
    save(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    judge = Bleurt("owner/name", max_tokens=48)
    assert judge.identity() == {"version": 1, "weights": "a" * 40}
    assert judge.judge([MOON], ["rock"]) == Bleurt(str(checkpoint), max_tokens=48).judge([MOON], ["rock"])


def test_bleurt_never_reads_pickles(tmp_path, monkeypatch):
    folder = save(tmp_path / "models--owner--name" / "snapshots" / ("a" * 40), safe=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "load", lambda *rest, **options: pytest.fail("a pickle was read"))
    for judge in (Bleurt(str(folder), max_tokens=48), Bleurt("owner/name", "a" * 40, max_tokens=48)):
        for act in (judge.identity, lambda judge=judge: judge.judge([MOON], ["rock"])):
            with pytest.raises(UserError, match=r"no weights as safetensors.*judge\.bleurt\.revision=refs/pr/N"):
                act()


def test_bleurt_says_what_is_missing_and_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"Elron/bleurt-base-128 is not \(wholly\) on this machine: type stages=\[prefetch\]"
    ):
        Bleurt().identity()
    with pytest.raises(UserError, match="could not be downloaded"):
        Bleurt().prefetch()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"labels": 2}, "has several outputs, so it is no BLEURT"), ({"head": False}, "lacks classifier")],
)
def test_a_bert_that_is_no_bleurt_is_refused(tmp_path, options, message):
    judge = Bleurt(str(save(tmp_path / "bert", **options)), max_tokens=48)
    with pytest.raises(UserError, match=message):
        judge.judge([MOON], ["rock"])


def test_other_models_and_sizes_are_refused_before_anything_is_loaded(tmp_path, checkpoint):
    with pytest.raises(UserError, match=r"max_tokens=128, but .* reads 64 at most"):
        Bleurt(str(checkpoint)).identity()
    folder = save(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bleurt"}))
    with pytest.raises(UserError, match="type 'bleurt', not a BERT"):
        Bleurt(str(folder)).identity()
    (folder / "config.json").unlink()
    for fields, message in (
        ({"model": str(folder)}, "holds no config.json"),
        ({"model": "/no/such/folder"}, "neither a folder"),
        ({"model": str(checkpoint), "revision": "main"}, "revision=main means nothing"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 2}, "max_tokens=2"),
    ):
        with pytest.raises(UserError, match=message):
            Bleurt(**fields)
