"""The plan of a load: sizes, placement and verdict from headers alone. The engine's sizes are in ``tests/native``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import FLASH, FLASH_FILE_BYTES, PRO, TINY, Gguf, Tensor, flash_file, native_v4, upstream_v4

from pyllama_dsv4.errors import ArgumentError, MemoryLimitError
from pyllama_dsv4.gguf_types import FILE_TYPES
from pyllama_dsv4.graph_memory import BatchShape, compute_bytes
from pyllama_dsv4.machine import read_bandwidth
from pyllama_dsv4.plan import Plan, plan_file
from pyllama_dsv4.tensors import HParams

GIB = 1 << 30
INVENTORY = Path(__file__).parents[1] / "data" / "flash-tensors.tsv"
BYTES_PER_BLOCK = {t.name: (t.block, t.block_bytes) for t in FILE_TYPES.values()}


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flash") / "flash.gguf"
    flash_file(path)
    return path


def counted_by_hand() -> dict[str, float]:
    """Count the bytes that a token of Flash reads, from the published inventory."""
    total = {"dense": 0.0, "head": 0.0, "experts": 0.0}
    for line in INVENTORY.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, _, first, last, step, dims, type_, _ = line.split("\t")
        n_layers = len(range(int(first), int(last) + 1, int(step))) if first else 1
        block, block_bytes = BYTES_PER_BLOCK[type_]
        ne = [int(n) for n in dims.split("x")]
        n = 1
        for dim in ne:
            n *= dim
        n_bytes = n_layers * n / block * block_bytes
        if "_exps" in name:
            total["experts"] += n_bytes * 6 / 256
        elif name == "output.weight":
            total["head"] += n_bytes
        elif name in ("token_embd.weight", "blk.N.ffn_gate_tid2eid"):
            total["dense"] += n_bytes / ne[1]
        else:
            total["dense"] += n_bytes
    return total


@pytest.mark.parametrize("n_ctx", [512, 65536, 1048576])
def test_bytes_per_token_of_flash(flash: Path, n_ctx: int) -> None:
    token = plan_file(flash, n_ctx=n_ctx).token
    counted = counted_by_hand()
    assert (token.dense, token.head, token.experts) == pytest.approx(tuple(counted.values()), rel=1e-6)
    # 128 tokens and those of a batch in the window; rows of 512 values per layer, and 128 for each indexer; two bytes
    n_window = 43 * min(n_ctx, 768)
    n_csa, n_hca = max(n_ctx // 4, 256), max(n_ctx // 128, 256)
    cache = 2 * (512 * (n_window + 21 * n_csa + 20 * n_hca) + 128 * 21 * n_csa)
    assert token.cache == pytest.approx(cache, rel=0.02)
    assert token.total == pytest.approx(sum(counted.values()) + cache, rel=0.02)


@pytest.mark.parametrize("hp", [TINY, PRO], ids=["tiny", "pro"])
@pytest.mark.parametrize("n_ctx", [512, 65536, 1048576])
def test_bytes_per_token_of_other_dimensions(tmp_path: Path, hp: HParams, n_ctx: int) -> None:
    """Counted from the tensors that the test's own writer lays out."""
    model = native_v4(hp, n_tokens=None)
    dense = experts = 0.0
    for tensor in model.tensors:
        name = str(tensor.name)
        if "_exps" in name:
            experts += tensor.n_bytes * hp.n_expert_used / hp.n_expert
        elif name == "token_embd.weight" or "tid2eid" in name:
            dense += tensor.n_bytes / tensor.dims[1]
        else:
            dense += tensor.n_bytes
    ratios = hp.compress_ratios[: hp.n_layer]
    n_csa, n_hca = max(n_ctx // 4, 256), max(n_ctx // 128, 256)
    n_window = len(ratios) * min(n_ctx, 768)
    rows = n_window + ratios.count(4) * n_csa + ratios.count(128) * n_hca
    cache = 2 * (hp.head_dim * rows + hp.indexer_head_dim * ratios.count(4) * n_csa)
    token = plan_file(model.write(tmp_path / "model.gguf"), n_ctx=n_ctx).token
    assert (token.dense + token.head, token.experts, token.cache) == pytest.approx(
        (dense, experts, cache), rel=0.02
    )


def test_the_design_figures(flash: Path) -> None:
    """A token reads 7.90 GB that are no routed experts, 1.06 GB of it the head, and 3.45 GB of experts."""
    token = plan_file(flash, n_ctx=512).token
    assert round((token.dense + token.head) / 1e9, 2) == 7.90
    assert round(token.head / 1e9, 2) == 1.06
    assert round(token.experts / 1e9, 2) == 3.45


def test_flash_is_planned_within_a_second_and_without_the_engine(flash: Path) -> None:
    script = (
        "import sys, time; from pyllama_dsv4.plan import plan_file; start = time.process_time();"
        "plan = plan_file(sys.argv[1], bandwidth=1e10); end = time.process_time();"
        "print(end - start, plan.n_file_bytes, 'pyllama_dsv4._llama' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(flash)], capture_output=True, text=True, check=True
    )
    seconds, n_bytes, has_engine = run.stdout.split()
    assert float(seconds) < 1
    assert int(n_bytes) == FLASH_FILE_BYTES
    assert has_engine == "False"


def test_both_dialects_are_planned_alike(tmp_path: Path) -> None:
    native = plan_file(native_v4(n_tokens=None).write(tmp_path / "native.gguf"))
    upstream = plan_file(upstream_v4(n_tokens=None).write(tmp_path / "upstream.gguf"))
    for part in ("experts", "cache", "compute"):
        assert getattr(native.host, part) == getattr(upstream.host, part) > 0
    # the FP8 weights are Q8_0 there, 34 bytes for 32 values
    assert native.token.dense < upstream.token.dense < 1.1 * native.token.dense


# --- verdicts -------------------------------------------------------------------------------------


def verdicts(path: Path, gib: float, **options: Any) -> Plan:
    return plan_file(path, host_bytes=int(gib * GIB), bandwidth=100e9, **options)


def test_memory_for_everything(flash: Path) -> None:
    plan = verdicts(flash, 192)
    assert (plan.verdict, plan.fits, plan.token_from_disk) == ("fits", True, 0)
    assert plan.tokens_per_s == pytest.approx(100e9 / plan.token.total)
    assert plan.needs == plan.host.weights + plan.host.cache + plan.host.compute
    plan.check()


def test_less_memory_than_the_file(flash: Path) -> None:
    plan = verdicts(flash, 64, disk_bandwidth=2e9)
    assert (plan.verdict, plan.fits) == ("runs from disk", True)
    # all but the experts is 8.35 GiB; what remains of 64 GiB holds four tenths of the 137 GiB of experts
    assert plan.token_from_disk == pytest.approx(
        plan.token.experts * (1 - (64 - 8.35 - 0.36) / 137.06), rel=0.03
    )
    assert plan.tokens_per_s == pytest.approx(1 / (plan.token.total / 100e9 + plan.token_from_disk / 2e9))
    plan.check()


def test_less_memory_than_a_token_reads(flash: Path) -> None:
    plan = verdicts(flash, 4)
    assert plan.verdict == "runs from disk"
    read = plan.token.dense + plan.token.head + plan.token.experts
    assert plan.token_from_disk == read - (4 * GIB - plan.resident)


@pytest.mark.parametrize(
    ("gib", "options", "key"),
    [
        (64, {"is_mapped": False}, "use_mmap"),
        (4, {"n_ctx": 1 << 20}, "n_ctx"),
        (146, {"is_mapped": False, "n_ctx": 1 << 20}, "n_ctx"),
        (192, {"gpu_bytes": [16 * GIB], "n_gpu_layers": -1, "n_cpu_moe": 0}, "n_gpu_layers"),
    ],
)
def test_what_does_not_fit(flash: Path, gib: float, options: dict[str, Any], key: str) -> None:
    plan = verdicts(flash, gib, **options)
    assert (plan.verdict, plan.fits) == ("does not fit", False)
    with pytest.raises(MemoryLimitError) as error:
        plan.check()
    assert error.value.key == key


def test_locked_weights_that_have_room(flash: Path) -> None:
    plan = verdicts(flash, 160, is_mapped=False)
    assert plan.fits
    assert plan.resident == plan.needs
    plan.check()


def test_the_line(flash: Path) -> None:
    assert verdicts(flash, 192).line() == "needs 156.5 GB, has 206.2 GB, at most 8.7 tokens/s"
    assert "runs from disk" in verdicts(flash, 64).line()
    assert "does not fit" in verdicts(flash, 0.1).line()


def test_the_plan_is_json(flash: Path) -> None:
    fields = json.loads(json.dumps(verdicts(flash, 192).as_dict()))
    assert fields["verdict"] == "fits"
    assert fields["token"]["total"] == sum(fields["token"][k] for k in ("dense", "head", "experts", "cache"))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"cache_type": "q4_0"}, "cache_type"),
        ({"act_quant": "some"}, "act_quant"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_ubatch": 0}, "n_ubatch"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"disk_bandwidth": -1.0}, "disk_bandwidth"),
    ],
)
def test_arguments(flash: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ArgumentError) as error:
        plan_file(flash, **options)
    assert error.value.key == key


# --- GPUs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_gpu_layers", [0, 1, 2, 20, 44])
@pytest.mark.parametrize("n_cpu_moe", [0, 10, 43])
def test_nothing_is_lost_between_host_and_gpus(flash: Path, n_gpu_layers: int, n_cpu_moe: int) -> None:
    alone = plan_file(flash)
    plan = plan_file(flash, gpu_bytes=[24 * GIB, 48 * GIB], n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe)
    for part in ("weights", "experts", "cache"):
        assert getattr(plan.host, part) + sum(getattr(g, part) for g in plan.gpus) == getattr(
            alone.host, part
        )
    assert 0 <= plan.token_on_host <= plan.token.total == alone.token.total


def test_one_layer_is_the_output_layer(flash: Path) -> None:
    plan = plan_file(flash, gpu_bytes=[24 * GIB], n_gpu_layers=1, n_cpu_moe=0)
    head = 4096 * 129280 * 2
    assert head < plan.gpus[0].weights < head + 1e6  # with its norm and the head's mixing
    assert plan.gpus[0].cache == 0


def test_experts_of_the_first_layers_stay(flash: Path) -> None:
    plan = plan_file(flash, gpu_bytes=[200 * GIB], n_gpu_layers=-1, n_cpu_moe=3)
    assert plan.host.experts == 3 * 3 * 1_140_850_688
    assert plan.host.weights == plan.host.experts + 4096 * 129280 * 2  # and the embedding
    assert plan.token_on_host == pytest.approx(plan.host.experts * 6 / 256 + 4096 * 2, abs=10)


def test_as_much_as_fits_is_placed_on_the_gpu(flash: Path) -> None:
    plan = plan_file(flash, gpu_bytes=[24 * GIB])
    assert plan.n_gpu_layers == 44
    assert plan.gpus[0].total <= 24 * GIB
    fewer = plan_file(flash, gpu_bytes=[24 * GIB], n_gpu_layers=44, n_cpu_moe=plan.n_cpu_moe - 1)
    assert fewer.gpus[0].total > 24 * GIB
    small = plan_file(flash, gpu_bytes=[4 * GIB])
    assert 0 < small.n_gpu_layers < 44
    assert small.gpus[0].total <= 4 * GIB


def test_layers_are_divided_in_proportion(flash: Path) -> None:
    plan = plan_file(flash, gpu_bytes=[300 * GIB, 100 * GIB], n_gpu_layers=-1, n_cpu_moe=0)
    assert plan.gpus[0].experts == pytest.approx(3 * plan.gpus[1].experts, rel=0.1)


# --- other models ---------------------------------------------------------------------------------


def other_model(**keys: int) -> Gguf:
    model = Gguf().set("general.architecture", "str", "llama")
    for key, value in {
        "block_count": 2,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 128,
        **keys,
    }.items():
        model.set(f"llama.{key}", "u32", value)
    model.tensors = [
        Tensor("token_embd.weight", (64, 100), kind=1),
        Tensor("blk.0.ffn_up_exps.weight", (64, 128, 8), kind=1),
        Tensor("blk.1.attn_q.weight", (64, 64), kind=1),
    ]
    return model


def test_other_models_are_estimated(tmp_path: Path) -> None:
    path = other_model(expert_count=8, expert_used_count=2).write(tmp_path / "other.gguf")
    plan = plan_file(path, n_ctx=1000)
    assert plan.is_estimate
    assert plan.host.cache == 2 * 1024 * 2 * (16 + 16) * 2  # layers, cells, heads, keys and values, bytes
    assert plan.token.head == 64 * 100 * 2  # the embedding is the head
    assert plan.token.dense == 64 * 64 * 2 + 64 * 2
    assert plan.token.experts == 64 * 128 * 8 * 2 // 4


def test_estimates_refuse_nothing(tmp_path: Path) -> None:
    path = other_model().write(tmp_path / "other.gguf")
    plan = plan_file(path, n_ctx=1 << 20, host_bytes=1 << 20)
    assert plan.verdict == "does not fit"
    plan.check()
    with pytest.raises(MemoryLimitError):
        plan_file(path, host_bytes=1000, is_mapped=False).check()


# --- parts ----------------------------------------------------------------------------------------


def test_the_buffer_grows_with_the_batch_and_the_context() -> None:
    def n_bytes(n_tokens: int, n_ctx: int) -> int:
        raw, csa, hca = max(768, n_tokens + 256), n_ctx // 4, n_ctx // 128
        return compute_bytes(FLASH, BatchShape(n_tokens, n_tokens, raw, csa, hca, 2.0, False))

    assert n_bytes(1, 65536) < n_bytes(64, 65536) < n_bytes(512, 65536) < n_bytes(512, 1 << 20)


def test_rounded_inputs_take_memory() -> None:
    plain = BatchShape(512, 512, 768, 2048, 256, 2.0, False)
    rounded = replace(plain, rounds_cache=True, rounds_inputs=True)
    assert compute_bytes(FLASH, rounded) > compute_bytes(FLASH, plain)


def test_bandwidth_is_measured() -> None:
    start = time.perf_counter()
    assert 1e8 < read_bandwidth(1 << 20) < 1e13
    assert time.perf_counter() - start < 5
