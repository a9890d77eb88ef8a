"""The estimate of memory against what work really takes; what it rests on, and what is made of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, build
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st
from real_configs import CONFIGS

from truthsteer import fitting, memory, pipeline
from truthsteer.cli import to_config
from truthsteer.config import Attention, Config, Device, DtypeConfig, Quantize, Residual, Shape, Weights
from truthsteer.errors import UserError
from truthsteer.fitting import FEWEST_TOKENS, RESERVE, check, check_judge, fits
from truthsteer.memory import GIB, Available, Load, Work, available, estimate, free_memory, weight_bytes
from truthsteer.plan import show_plan
from truthsteer.sizes import Sizes, of_checkpoint, of_model, of_shape

MIB = 1 << 20
FP32 = DtypeConfig("fp32")
BF16 = DtypeConfig("bf16", Weights.bf16)
INT8 = DtypeConfig("int8", Weights.fp16, Residual.fp32, quantize=Quantize.int8)
INT4 = DtypeConfig("int4", Weights.bf16, quantize=Quantize.int4)
MODEL = Sizes(16, 256, 1024, 4, 2, 64, 8192, 8192 * 256, 0, 985_000, 983_040, 256)

PEAK = """
import sys
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig
sys.path.insert(0, "tests")
from conftest import make_questions
from dataclasses import replace
from truthsteer import decoding, extraction, scoring
from truthsteer.config import GenerationConfig
from truthsteer.hooks import Injection
from truthsteer.model import LanguageModel
from truthsteer.organism import WEIGHTS
from truthsteer.prompts import Branch

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
config = Gemma3TextConfig(vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=16,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=128)
lm = LanguageModel(Gemma3ForCausalLM(config).to(torch.float32), AutoTokenizer.from_pretrained(WEIGHTS))
work, tokens, pairs = sys.argv[1], 4096, 0
ids = lambda first, count: tuple(range(first + 100, first + 100 + count))
branches = [Branch(ids(index, 32), tuple(ids(index + other, 32) for other in range(2))) for index in range(110)]
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
if work == "extract":
    questions = [replace(question, id=str(n), text=f"{n} " + "x " * 8) for n, question in enumerate(make_questions(3) * 80)]
    pairs = len(extraction.extract(lm, questions, pairs_per_question=4, batch_tokens=tokens).pairs)
elif work == "score":
    conditions = [None, *(Injection(1, torch.ones(256), 0.1 * index) for index in range(1, 4))]
    list(scoring.score(lm, branches[:32], conditions, batch_tokens=tokens))
else:
    requests = [decoding.Request(branch.context, 0) for branch in branches]
    asked = GenerationConfig(max_new_tokens=8)
    list(decoding.decode(lm, requests, [None], config=asked, stop=(), batch_tokens=tokens))
print(status("VmHWM") - before, pairs)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's own count")
@pytest.mark.parametrize("work", [Work.extract, Work.score, Work.generate])
def test_work_takes_less_than_is_estimated_and_not_much_less(work):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, work.value], cwd=REPO, capture_output=True, text=True, check=True
    )
    took, pairs = map(int, done.stdout.split())
    need = estimate(
        MODEL, DtypeConfig("fp32"), Load(work, 4096, 64, max_new_tokens=8, pairs=pairs, lowest=1), parted=True
    )
    said = need.total - need.weights + need.host
    assert took <= said + 32 * MIB, "32 MiB: what a first pass sets up"
    assert said <= 3 * took


def test_what_the_code_keeps_alive_is_counted():
    """Extraction holds every layer's output; answers are computed on a copy of their contexts' keys and values."""
    slots, keys_and_values = 4096, 2 * 2 * 64 * 2  # key-value heads, head_dim, bytes
    policy = DtypeConfig("bf16", Weights.bf16)
    read, scored = (estimate(MODEL, policy, Load(work, slots, 64)) for work in (Work.extract, Work.score))
    assert read.kept >= 16 * slots * 256 * 2
    assert estimate(MODEL, policy, Load(Work.extract, slots, 64, depth=4)).kept < read.kept / 2
    for need in (read, scored):
        assert need.cache >= 2 * 16 * slots * keys_and_values


def test_a_row_of_logits_is_no_more_than_scoring_holds():
    large = replace(MODEL, vocab_size=262_144)
    held = memory.LOGITS_AT_ONCE * 12
    assert estimate(large, DtypeConfig("fp32"), Load(Work.score, 65_536, 512)).logits == held + 65_536 * 256 * 4
    assert estimate(MODEL, DtypeConfig("fp32"), Load(Work.score, 1024, 512)).logits == 1024 * 8192 * 12 + 1024 * 256 * 4
    parted = estimate(large, DtypeConfig("fp32"), Load(Work.score, 65_536, 512), parted=True)
    assert parted.logits == memory.LOGITS_IN_CACHE * 12 + 65_536 * 256 * 4
    assert estimate(large, DtypeConfig("fp32"), Load(Work.judge, 16, 1024)).logits < held / 100, (
        "it reads one token of each"
    )


def test_more_text_at_once_never_means_fewer_answers_at_once():
    few, many = (
        estimate(MODEL, DtypeConfig("bf16", Weights.bf16), Load(Work.generate, tokens, 512, 50, sampled=True))
        for tokens in (512, 4096)
    )
    assert 0 < few.host < many.host
    assert few.logits < many.logits


def test_the_folder_of_a_cgroup_may_hold_spaces(tmp_path):
    group = tmp_path / "sys/fs/cgroup/my job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/my job\n")
    for name, text in {"memory.max": "1000", "memory.current": "400", "memory.stat": "inactive_file 100"}.items():
        (group / name).write_text(f"{text}\n")
    assert free_memory(tmp_path) == 1000 - (400 - 100)


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "qwen2", "llama"])
def test_sizes_are_counted_by_hand(family):
    model = build(family)
    found = of_model(model)
    assert (found.num_layers, found.hidden_size, found.intermediate_size, found.vocab_size) == (4, 32, 64, 1714)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (4, 2, 8)
    assert found.embedding == 1714 * 32
    assert found.head == (0 if family.startswith("gemma") else 1714 * 32)
    assert found.linear == 32 * 8 * 4 * 2 + 32 * 8 * 2 * 2 + 3 * 32 * 64
    assert found.rest == 32
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("field", [item.name for item in fields(Shape)])
def test_a_config_that_leaves_a_size_open_tells_none(field):
    whole = {item.name: getattr(MODEL, item.name, None) for item in fields(Shape)}
    whole |= {"parameters": MODEL.parameters, "tied_head": True}
    assert of_shape(Shape(**whole)) == MODEL
    assert of_shape(Shape(**whole | {field: None})) is None


def test_fewer_bits_shrink_the_matrices_of_the_layers_and_nothing_else():
    model = build("qwen2")
    sizes = of_model(model)
    inside = [module for module in model.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)]
    matrices = sum(module.weight.numel() for module in inside)
    others = sizes.parameters - matrices
    assert weight_bytes(sizes, FP32) == 4 * sizes.parameters
    assert weight_bytes(sizes, BF16) == 2 * sizes.parameters
    assert weight_bytes(sizes, INT8) == 2 * others + matrices
    assert weight_bytes(sizes, INT4) == 2 * others + matrices // 2 + matrices // 64 * 4
    work = Load(Work.extract, 2048, 128)
    wide, narrow = estimate(sizes, BF16, work), estimate(sizes, INT4, work)
    # A quantised matrix is unpacked while it is multiplied; nothing else of the work changes.
    assert narrow.mlp - wide.mlp == sizes.hidden_size * sizes.intermediate_size * 2
    assert replace(narrow, weights=wide.weights, mlp=wide.mlp) == wide


LOADS = st.builds(
    Load,
    st.sampled_from(list(Work)),
    st.integers(1, 20_000),
    st.integers(8, 1024),
    max_new_tokens=st.integers(0, 100),
    sampled=st.booleans(),
    pairs=st.integers(0, 2000),
    lowest=st.integers(0, 15),
    depth=st.one_of(st.none(), st.integers(1, 16)),
)
POLICIES = (
    st.tuples(st.sampled_from(list(Weights)), st.sampled_from(list(Residual)), st.sampled_from(list(Attention)))
    .filter(lambda found: found[0] is not Weights.fp32 or found[2] is not Attention.flash_attention_2)  # refused
    .map(lambda found: DtypeConfig("any", *found))
)


@given(LOADS, POLICIES)
def test_no_part_shrinks_when_more_is_asked_for(load, policy):
    flash = policy.attention is Attention.flash_attention_2
    in_fp32 = Attention.eager if flash else policy.attention
    need = estimate(MODEL, policy, load)
    deeper = replace(load, depth=None if load.depth is None else load.depth + 1)
    for more in (
        estimate(MODEL, policy, replace(load, batch_tokens=load.batch_tokens + 100)),
        estimate(MODEL, policy, replace(load, max_length=load.max_length + 1)),
        estimate(MODEL, policy, replace(load, pairs=load.pairs + 1)),
        estimate(MODEL, policy, deeper),
        estimate(replace(MODEL, num_layers=17), policy, load),
        estimate(replace(MODEL, hidden_size=257), policy, load),
        estimate(replace(MODEL, vocab_size=40_000), policy, load),
        estimate(MODEL, replace(policy, weights=Weights.fp32, attention=in_fp32), load),
        estimate(MODEL, replace(policy, residual=Residual.fp32), load),
        estimate(MODEL, replace(policy, attention=Attention.eager), load),
    ):
        for name in ("weights", "cache", "stream", "attention", "mlp", "logits", "kept", "host"):
            assert getattr(more, name) >= getattr(need, name), name


def test_each_part_follows_what_it_is_made_of():
    load = Load(Work.extract, 2048, 128, pairs=10)
    need = estimate(MODEL, FP32, load)
    half = estimate(MODEL, FP32, replace(load, depth=8))
    assert half.kept < need.kept
    assert half.host == need.host // 2
    assert half.cache < need.cache
    assert half.weights == need.weights, "a depth says what is computed, not what is loaded"
    assert estimate(MODEL, FP32, replace(load, work=Work.score)).logits > need.logits == 0
    one_text = estimate(MODEL, FP32, replace(load, batch_tokens=16))
    assert one_text == estimate(MODEL, FP32, replace(load, batch_tokens=128)), "a text is never cut into batches"
    train = Load(Work.train, 2048, 128)
    assert estimate(MODEL, FP32, replace(train, lowest=8)).kept < estimate(MODEL, FP32, train).kept
    assert estimate(MODEL, FP32, train).cache < need.cache


@given(LOADS, POLICIES)
def test_it_fits_exactly_where_the_estimate_and_the_reserve_do(load, policy):
    on_gpu = estimate(MODEL, policy, load).total + RESERVE
    need = estimate(MODEL, policy, load, parted=True)
    on_cpu = need.total + need.host + RESERVE
    for least, gpu in ((on_gpu, True), (on_cpu, False)):
        assert fits(MODEL, policy, load, Available((least,), gpu))
        assert not fits(MODEL, policy, load, Available((least - 1,), gpu))


@given(LOADS, POLICIES, st.integers(2, 8))
def test_several_gpus_need_more_in_all_than_one(load, policy, count):
    """Each has its own reserve, and its own copy of what passes through."""
    need = estimate(MODEL, policy, load)
    enough_on_one = need.total + RESERVE
    assert not fits(MODEL, policy, load, Available((enough_on_one // count,) * count, gpu=True))
    assert fits(MODEL, policy, load, Available((enough_on_one * 3,) * count, gpu=True))


def applied(remedy: str, there: Available) -> tuple[int | None, DtypeConfig | None, Available]:
    """(batch_tokens, dtype, machine) that a remedy asks for."""
    batch = re.search(r"batch_tokens=(\d+)", remedy)
    dtype = re.search(r"dtype=(\w+)", remedy)
    gpus = re.match(r"(\d+) such GPUs", remedy)
    assert batch or dtype or gpus, remedy
    machine = Available((min(there.parts),) * int(gpus[1]), gpu=True) if gpus else there
    policies = {"bf16": BF16, "int8": INT8, "int4": INT4}
    return int(batch[1]) if batch else None, policies[dtype[1]] if dtype else None, machine


LARGE = replace(MODEL, num_layers=60, hidden_size=5376, layer=430_000_000, linear=430_000_000)


@settings(max_examples=300)
@given(
    works=st.lists(LOADS, min_size=1, max_size=3),
    policy=st.sampled_from([FP32, BF16, INT8, INT4]),
    eager=st.booleans(),
    sizes=st.sampled_from([MODEL, LARGE]),
    batch=st.integers(FEWEST_TOKENS, 60_000),
    share=st.floats(0.05, 1.2),
    split=st.one_of(st.none(), st.lists(st.integers(1, 3), min_size=1, max_size=6)),
)
def test_after_a_remedy_everything_fits_and_each_is_a_change(works, policy, eager, sizes, batch, share, split):
    """On a computer, or on GPUs of different sizes, with `share` of what the largest work takes."""
    policy = replace(policy, attention=Attention.eager if eager else Attention.sdpa)
    works = [replace(load, batch_tokens=batch) for load in works]
    needs = [estimate(sizes, policy, load) for load in works]
    enough = int(share * max(need.total + need.host for need in needs)) + RESERVE * len(split or [1])
    there = Available(
        tuple(enough * part // sum(split) for part in split) if split else (enough,), gpu=split is not None
    )
    if all(fits(sizes, policy, load, there) for load in works):
        check(sizes, policy, works, there)
        return
    found = re.search(r"What would fit: (.*?)\. This is", refusal(sizes, policy, works, there))
    for remedy in found[1].split("; ") if found else ():
        tokens, other, machine = applied(remedy, there)
        other = policy if other is None else replace(other, attention=policy.attention)
        changed = [replace(load, batch_tokens=tokens or batch) for load in works]
        assert all(fits(sizes, other, load, machine) for load in changed), remedy
        assert FEWEST_TOKENS <= changed[0].batch_tokens <= batch
        narrower = weight_bytes(sizes, other) < weight_bytes(sizes, policy)
        assert narrower or other == policy, remedy
        assert narrower or changed[0].batch_tokens < batch or len(machine.parts) > len(there.parts), remedy
    if found is None:
        least = [replace(load, batch_tokens=FEWEST_TOKENS) for load in works]
        assert not all(fits(sizes, policy, load, there) for load in least)


def refusal(sizes: Sizes, policy: DtypeConfig, works: list[Load], there: Available) -> str:
    with pytest.raises(UserError) as refused:
        check(sizes, policy, works, there)
    return str(refused.value)


def of_gemma3_4b(folder: Path) -> Sizes:
    (folder / "config.json").write_text(json.dumps(CONFIGS["gemma3_4b"]))
    found = of_checkpoint(str(folder))
    assert found is not None
    return found


def test_fewer_bits_are_not_suggested_where_the_wider_stream_undoes_them(tmp_path):
    """int8 keeps the residual stream in fp32: what extraction keeps of every layer doubles."""
    sizes = of_gemma3_4b(tmp_path)
    extract = Load(Work.extract, 65_536, 512, depth=21)
    generate = Load(Work.generate, 60_000, 562, max_new_tokens=50)
    there = Available((estimate(sizes, BF16, extract).total + RESERVE,), gpu=True)
    assert "dtype=int8;" in refusal(sizes, BF16, [generate], there)
    said = refusal(sizes, BF16, [extract, generate], there)
    assert "to generate takes" in said
    assert "dtype=int8;" not in said
    assert "dtype=int4" in said


def test_more_gpus_are_as_small_as_the_smallest_there_is(tmp_path):
    """So work that fits on the larger of two may not fit on any number of the other kind."""
    sizes, there = of_gemma3_4b(tmp_path), Available((round(5.4 * GIB), round(10.4 * GIB)), gpu=True)
    extract = Load(Work.extract, 16_384, 128)
    score = Load(Work.score, 16_384, 128, lowest=30)
    assert fits(sizes, INT4, score, there)
    assert "5 such GPUs" in refusal(sizes, INT4, [extract], there)
    assert "such GPUs" not in refusal(sizes, INT4, [extract, score], there)


def test_a_model_of_unknown_shape_is_measured_by_its_config_json(composed, tmp_path):
    known = of_gemma3_4b(tmp_path)
    assert fitting.sizes_of(composed("model=local", f"model.path={tmp_path}")) == known
    assert fitting.sizes_of(composed("model=hub", "model.id=a/b")) is None
    assert fitting.sizes_of(composed("model=hub", "model.id=a/b"), str(tmp_path)) == known


def test_weights_that_are_quantised_already_are_not_counted(tmp_path):
    path = tmp_path / "config.json"
    build("qwen2").save_pretrained(tmp_path)
    assert of_checkpoint(str(tmp_path)) is not None
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert of_checkpoint(str(tmp_path)) is None


def test_a_judge_is_told_its_own_keys(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2_5_7b"]))
    monkeypatch.setattr(fitting, "available", lambda device: Available((20 * GIB,), gpu=False))
    key = f"judge.finetuned.model={tmp_path}"
    check_judge(str(tmp_path), BF16, Device.cpu, key)
    with pytest.raises(UserError) as refused:
        check_judge(str(tmp_path), FP32, Device.cpu, key)
    said = str(refused.value)
    assert said.startswith(f"{key} as fp32 does not fit: to judge takes 2")
    assert said.endswith("What would fit: judge.finetuned.dtype=bf16.")


@pytest.fixture
def composed():
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        yield lambda *overrides: to_config(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(
    ("stages", "layers", "works"),
    [
        ("stages=[extract]", 4, [Work.extract]),
        ("stages=[extract,steer]", 5, [Work.extract, Work.score]),
        ("stages=[extract,steer,choose,gauge,generate]", 5, [Work.extract, Work.score, Work.generate]),
    ],
)
def test_a_run_is_checked_for_what_its_stages_do(stages, layers, works, composed, tmp_path, monkeypatch):
    """Before it loads anything, with the layers that it will load and the activations that it will keep."""
    asked: list[tuple[Sizes, Any]] = []

    def check_it(sizes: Sizes, policy: DtypeConfig, works: Any, there: Available, keys: fitting.Keys) -> None:
        asked.append((sizes, works))
        raise UserError(keys.model)

    monkeypatch.setattr(fitting, "check", check_it)
    config = composed(
        stages, "steering.layers=[2,3]", "device=cpu", "data.limit=24", "batch_tokens=512", f"paths.root={tmp_path}"
    )
    with pytest.raises(UserError, match=r"^model\.path=embedded$"):
        pipeline.run(config)
    ((sizes, loads),) = asked
    assert sizes.num_layers == layers
    assert [load.work for load in loads] == works
    assert {load.batch_tokens for load in loads} == {512}
    extract = loads[0]
    assert (extract.depth, extract.max_length) == (4, config.steering.max_length)
    assert extract.pairs % config.steering.pairs_per_question == 0
    assert 0 < extract.pairs // config.steering.pairs_per_question <= 24
    if Work.generate in works:
        new = config.generation.max_new_tokens
        assert (loads[1].lowest, loads[2].max_new_tokens) == (2, new)
        assert loads[2].max_length == config.steering.max_length + new


def test_the_plan_of_extraction_alone_counts_the_layers_it_loads(composed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: Available((24 * GIB,), gpu=True))
    monkeypatch.setenv("COLUMNS", "200")
    small = ("model=gemma3_12b", "dtype=bf16", "judge=[reference]", "gauge=organism", f"paths.root={tmp_path}")
    show_plan(composed(*small, "stages=[extract]", "steering.layers=[11]"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  extract ")]
    of_layers = 11_766_034_176 - 262_208 * 3840 - 3840
    assert f"weights {2 * (262_208 * 3840 + of_layers * 12 / 48) / GIB:.1f}," in line
    assert "does not fit" not in line


def gpus(monkeypatch: pytest.MonkeyPatch, free: list[int], reserved: int = 0, allocated: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 99 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: allocated)


def test_every_gpu_counts_with_what_this_process_holds_unused(monkeypatch):
    gpus(monkeypatch, [10, 20], reserved=5, allocated=2)
    for device in (Device.auto, Device.cuda):
        assert available(device) == Available((13, 23), gpu=True)
    assert available(Device.auto).what == "2 GPUs"
    assert available(Device.auto).bytes == 36
    assert not available(Device.cpu).gpu
    gpus(monkeypatch, [])
    assert available(Device.auto).gpu is False
    assert available(Device.cpu).what == "this machine's memory"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def roomy(folder: Path, allowed: str = "5000", used: str = "1000") -> None:
    write(folder, memory__max=allowed, memory__current=used, memory__stat="file 9\ninactive_file 0\n")


def test_in_a_container_the_group_s_own_path_is_not_there(tmp_path):
    """Its files are at the mount's top, whatever path the kernel tells."""
    write(tmp_path / "proc/self", cgroup="0::/../../docker/abc\n")
    roomy(tmp_path / "sys/fs/cgroup")
    assert free_memory(tmp_path) == 4000
    write(tmp_path / "proc/self", cgroup="0::/\n")
    assert free_memory(tmp_path) == 4000


def test_old_and_new_groups_may_be_mixed(tmp_path):
    """Memory may be ruled by either; the other has no limit to read."""
    write(tmp_path / "proc/self", cgroup="3:cpu,memory:/job\n1:name=systemd:/x\n0::/job\n")
    old = tmp_path / "sys/fs/cgroup/memory/job"
    write(old, memory__limit_in_bytes="9000", memory__usage_in_bytes="1000", memory__stat="total_inactive_file 0\n")
    assert free_memory(tmp_path) == 8000
    roomy(tmp_path / "sys/fs/cgroup/job")
    assert free_memory(tmp_path) == 4000


def test_without_a_limit_the_machine_s_own_memory_counts(tmp_path):
    import psutil

    write(tmp_path / "proc/self", cgroup="0::/job\n")
    roomy(tmp_path / "sys/fs/cgroup/job", allowed="max")
    assert free_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    write(tmp_path / "sys/fs/cgroup/job", memory__max=str(1 << 62))
    assert free_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
