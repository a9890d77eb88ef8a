"""What is said to fit does, what does not is refused before it is loaded, and every remedy would have fitted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO, build
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st
from real_configs import CONFIGS, TEXT_PARAMETERS
from tiny_chat import leaning_chat

from truthsteer import fitting, judge_model, memory, pipeline
from truthsteer.cli import to_config
from truthsteer.config import Attention, Config, DtypeConfig, Quantize, Residual, Weights
from truthsteer.errors import UserError
from truthsteer.fitting import Keys, check, fits, remedies
from truthsteer.judge_model import ModelSpec, acquire
from truthsteer.memory import GIB, Available, Load, Work, estimate, free_memory, weight_bytes
from truthsteer.model import LanguageModel
from truthsteer.sizes import Sizes, of_checkpoint, of_shape

POLICIES = {
    "fp32": DtypeConfig("fp32"),
    "bf16": DtypeConfig("bf16", Weights.bf16),
    "fp16": DtypeConfig("fp16", Weights.fp16, Residual.fp32),
    "int8": DtypeConfig("int8", Weights.fp16, Residual.fp32, quantize=Quantize.int8),
    "int4": DtypeConfig("int4", Weights.bf16, quantize=Quantize.int4),
}


@pytest.fixture(scope="module", autouse=True)
def composed():
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        yield


def config(*overrides: str) -> Config:
    return to_config(compose("config", overrides=list(overrides)))


SIZES: dict[str, Sizes] = {}


def known(name: str) -> Sizes:
    """Sizes as a file of conf/model states them."""
    if name not in SIZES:
        found = of_shape(config(f"model={name}").model.shape)
        assert found is not None
        SIZES[name] = found
    return SIZES[name]


LOADS = st.builds(
    Load,
    st.sampled_from(list(Work)),
    st.sampled_from([256, 1024, 8192, 65536]),
    st.sampled_from([64, 384, 512]),
    st.sampled_from([0, 50]),
    pairs=st.sampled_from([0, 1600]),
    lowest=st.sampled_from([0, 8]),
)
MACHINES = st.one_of(
    st.builds(
        lambda count, each: Available((each * GIB,) * count, gpu=True),
        st.integers(1, 8),
        st.sampled_from([8, 16, 24, 80]),
    ),
    st.builds(lambda each: Available((each * GIB,), gpu=False), st.integers(4, 256)),
)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_model_is_as_large_by_its_config_as_by_its_checkpoint(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    stated, read = known(name), of_checkpoint(str(tmp_path))
    assert read is not None
    assert stated.parameters == pytest.approx(read.parameters, rel=1e-6)
    assert replace(stated, rest=0, layer=0, linear=0) == replace(read, rest=0, layer=0, linear=0)
    assert stated.linear == read.linear
    if name in TEXT_PARAMETERS:
        assert read.parameters == TEXT_PARAMETERS[name]


def test_a_cut_model_is_smaller_by_its_layers():
    whole = known("gemma3_27b")
    cut = whole.first_layers(27)
    assert whole.parameters - cut.parameters == (62 - 27) * whole.layer
    assert whole.first_layers(None) == whole.first_layers(99) == whole


@settings(max_examples=60)
@given(load=LOADS, name=st.sampled_from(["gemma3_270m", "gemma3_27b", "qwen2_5_7b"]))
def test_more_of_anything_takes_more(load, name):
    model = known(name)
    for policy in POLICIES.values():
        base = estimate(model, policy, load).total
        assert estimate(model, policy, replace(load, batch_tokens=2 * load.batch_tokens)).total >= base
        assert estimate(model, policy, replace(load, max_length=2 * load.max_length)).total >= base
        assert (
            estimate(model.first_layers(model.num_layers - 1), policy, load).weights
            < estimate(model, policy, load).weights
        )
        eager = replace(policy, attention=Attention.eager)
        assert estimate(model, eager, load).total > base
    taken = [weight_bytes(model, POLICIES[policy]) for policy in ("fp32", "bf16", "int8", "int4")]
    assert taken == sorted(taken, reverse=True)
    assert weight_bytes(model, POLICIES["int8"]) > model.embedding * 2 + model.num_layers * model.linear


@settings(max_examples=150)
@given(
    works=st.lists(LOADS, min_size=1, max_size=3),
    name=st.sampled_from(["gemma3_270m", "gemma3_4b", "gemma3_27b", "qwen2_5_7b"]),
    policy=st.sampled_from(list(POLICIES)),
    there=MACHINES,
)
def test_what_is_suggested_would_fit_and_what_fits_is_not_refused(works, name, policy, there):
    model, own = known(name), POLICIES[policy]
    batch = works[0].batch_tokens
    works = [replace(load, batch_tokens=batch) for load in works]
    over = [load for load in works if not fits(model, own, load, there)]
    if not over:
        check(model, own, works, there)
        return
    with pytest.raises(UserError, match=r"does not fit: to .* GiB free") as refused:
        check(model, own, works, there, Keys("model=it"))
    assert "check_memory=false" in str(refused.value)
    for remedy in remedies(model, own, over, there, Keys()):
        tokens = re.search(r"batch_tokens=(\d+)", remedy)
        dtype = re.search(r"dtype=(\w+)", remedy)
        gpus = re.match(r"(\d+) such GPUs", remedy)
        assert tokens or dtype or gpus
        assert tokens is None or int(tokens[1]) < batch
        changed = POLICIES[dtype[1]] if dtype else own
        machine = Available((min(there.parts),) * int(gpus[1]), gpu=True) if gpus else there
        for load in over:
            now = replace(load, batch_tokens=int(tokens[1])) if tokens else load
            assert fits(model, changed, now, machine), remedy
        assert str(refused.value).count(remedy) >= 1


def test_a_layer_with_the_embedding_must_fit_on_one_gpu():
    model, load = known("gemma3_27b"), Load(Work.score, 1024, 384)
    assert fits(model, POLICIES["bf16"], load, Available((80 * GIB,), gpu=True))
    assert fits(model, POLICIES["bf16"], load, Available((32 * GIB,) * 2, gpu=True))
    assert not fits(model, POLICIES["bf16"], load, Available((4 * GIB,) * 20, gpu=True))
    assert not fits(model, POLICIES["bf16"], load, Available((29 * GIB,) * 2, gpu=True)), "no margin for whole layers"


def test_the_readmes_large_run_is_answered_with_what_would_fit():
    model, works = known("gemma3_27b"), [Load(Work.score, 8192, 384)]
    with pytest.raises(UserError) as refused:
        check(model, POLICIES["fp16"], works, Available((24 * GIB,), gpu=True), Keys("model=gemma3_27b"))
    said = str(refused.value)
    assert said.startswith("model=gemma3_27b as fp16 does not fit: to score takes ")
    assert "weights 50.3" in said
    assert "1 GPU has 24.0 GiB free. What" in said
    assert "dtype=int4" in said
    assert re.search(r"\d such GPUs", said)
    with pytest.raises(UserError, match="Nothing smaller of it fits: type a smaller model"):
        check(model, POLICIES["int4"], works, Available((2 * GIB,), gpu=False))
    with pytest.raises(
        UserError, match=r"2 GPUs have 48\.0 GiB free \(layers are whole: 10% of several GPUs stays empty\)"
    ):
        check(model, POLICIES["fp16"], works, Available((24 * GIB,) * 2, gpu=True))


def test_what_is_kept_in_the_computers_memory_is_none_of_a_gpus():
    load = Load(Work.extract, 1024, 384, pairs=100_000)
    said = []
    for gpu in (True, False):
        with pytest.raises(UserError) as refused:
            check(known("gemma3_27b"), POLICIES["fp16"], [load], Available((GIB,), gpu=gpu))
        said.append(str(refused.value))
    assert "in the computer's memory" not in said[0]
    assert "in the computer's memory" in said[1]


def test_fewer_bits_are_the_policies_of_the_configuration():
    for policy in fitting.NARROWER:
        assert policy == config("device=cpu", f"dtype={policy.name}").dtype
    for name in ("fp32", "bf16", "fp16"):
        assert ModelSpec("owner/name", dtype=name).policy == config("device=cpu", f"dtype={name}").dtype


@pytest.fixture
def small_machine(monkeypatch):
    """One on which nothing fits; and what was loaded all the same."""
    loaded: list[str] = []
    load = LanguageModel.from_config.__func__

    def from_config(cls, config, *rest):
        loaded.append(config.name)
        return load(cls, config, *rest)

    monkeypatch.setattr(LanguageModel, "from_config", classmethod(from_config))
    monkeypatch.setattr(fitting, "available", lambda device: Available((GIB // 8,), gpu=False))
    return loaded


def test_a_run_that_cannot_fit_is_refused_before_it_is_loaded(small_machine, tmp_path):
    quick = ("device=cpu", "data.limit=24", "stages=[extract]", f"paths.root={tmp_path}")
    with pytest.raises(UserError, match=r"model\.path=embedded as fp32 does not fit: to extract takes"):
        pipeline.run(config(*quick))
    assert small_machine == []
    pipeline.run(config(*quick, "check_memory=false"))
    assert small_machine == ["organism"]


def test_a_judge_that_cannot_fit_is_refused_in_its_own_words(small_machine, tmp_path):
    folder = leaning_chat(tmp_path / "judge", {})
    with pytest.raises(UserError) as refused:
        acquire(ModelSpec(str(folder), dtype="fp32", device="cpu"))
    said = str(refused.value)
    assert said.startswith(f"judge.llm.model={folder} as fp32 does not fit: to judge takes ")
    assert "check_memory" not in said
    assert "int8" not in said
    assert small_machine == []
    judge_model.release()


def test_only_the_layers_that_are_loaded_count(tmp_path):
    asked = config("model=gemma3_27b", "dtype=bf16", "device=cpu")
    works = fitting.loads(asked, [8, 20], questions=100)
    assert [load.work for load in works] == [Work.extract, Work.score, Work.generate]
    assert works[0].depth == 21
    assert works[0].pairs == 200
    assert works[1].lowest == 8
    whole, policy = known("gemma3_27b"), POLICIES["bf16"]
    cut = estimate(whole.first_layers(21), policy, works[0]).total
    assert cut < 0.5 * estimate(whole, policy, works[0]).total
    doctor = fitting.loads(config("stages=[doctor]"), [2])
    assert [load.work for load in doctor] == [Work.extract]


def test_what_does_not_fit_twice_is_not_compared_with(monkeypatch):
    asked = config("device=cpu")
    monkeypatch.setattr(fitting, "available", lambda device: Available((GIB // 8,), gpu=False))
    assert "GiB left" in fitting.lacking(asked, POLICIES["fp32"], "embedded", None)
    monkeypatch.setattr(fitting, "available", lambda device: Available((4 * GIB,), gpu=False))
    assert fitting.lacking(asked, POLICIES["fp32"], "embedded", None) == ""


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_cgroup_bounds_what_is_free(tmp_path):
    group = tmp_path / "sys/fs/cgroup/job/step"
    write(tmp_path / "proc/self", cgroup="0::/job/step\n")
    write(group, memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 1\n")
    write(
        group.parent,
        memory__max="3000\n",
        memory__current="2500\n",
        memory__stat="anon 5\ninactive_file 700\nactive_file 90\n",
    )
    assert free_memory(tmp_path) == 3000 - (2500 - 790)
    (group.parent / "memory.stat").unlink()
    assert free_memory(tmp_path) == 500, "a limit counts although nothing is known of the cache"
    write(group, memory__max="1000\n", memory__current="900\n", memory__stat="inactive_file 0\n")
    assert free_memory(tmp_path) == 100
    write(group, memory__max="800\n", memory__current="900\n", memory__stat="inactive_file 0\n")
    assert free_memory(tmp_path) == 0, "over its limit, not less than nothing"


def test_an_old_cgroup_bounds_it_too_and_none_does_not(tmp_path):
    old = tmp_path / "old"
    write(old / "proc/self", cgroup="5:cpu:/x\n4:memory:/job\n")
    folder = old / "sys/fs/cgroup/memory/job"
    write(
        folder,
        memory__limit_in_bytes="4000",
        memory__usage_in_bytes="1000",
        memory__stat="total_inactive_file 500\ninactive_file 9\n",
    )
    assert free_memory(old) == 3500
    assert free_memory(tmp_path / "none") > 3500


def test_the_plan_states_every_kind_of_work(tmp_path, capsys, monkeypatch):
    from truthsteer.plan import show_plan

    folder = leaning_chat(tmp_path / "judge", {})
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(memory, "available", lambda device: Available((24 * GIB,), gpu=True))
    show_plan(
        config(
            "model=gemma3_12b",
            "dtype=bf16",
            "data=organism",
            "gauge=organism",
            "judge=[reference,llm]",
            f"judge.llm.model={folder}",
            f"paths.root={tmp_path}",
        )
    )
    shown = capsys.readouterr().out
    assert "memory     in GiB, by an estimate; 1 GPU: 24.0 free" in shown
    for work in ("extract", "score", "generate", "train"):
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {work} ")]
        assert "weights 21.9" in line
        assert line.endswith("does not fit here"), line
    assert "  What would fit: batch_tokens=" in shown
    assert re.search(r"  judge llm +0\.\d: weights 0\.0", shown)


def test_the_plan_of_an_unknown_size_says_so(capsys):
    from truthsteer.plan import show_plan

    show_plan(config("model=hub", "model.id=a/b", "judge=[reference]", "gauge=organism"))
    assert "memory     unknown before the checkpoint is read" in capsys.readouterr().out


def test_a_model_on_disk_is_measured_from_its_config(tmp_path, tokenizer):
    model = build("gemma3_multimodal")
    model.save_pretrained(tmp_path)
    found = of_checkpoint(str(tmp_path))
    assert found is not None
    text = sum(p.numel() for name, p in model.named_parameters() if "vision" not in name and "projector" not in name)
    assert found.parameters == text
    (tmp_path / "config.json").write_text("{")
    assert of_checkpoint(str(tmp_path)) is None
