"""The plan against what the engine reserves: caches and compute buffers of three models, and the check of a load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import FLASH, PRO, native_v4

from pyllama_dsv4 import Llama, errors
from pyllama_dsv4 import context as contexts
from pyllama_dsv4._native import drain_log, encode_path, ffi, lib
from pyllama_dsv4.context import CACHE_TYPES, FLASH_ATTN
from pyllama_dsv4.plan import plan_file

TOLERANCE = 0.05
# what this build of the engine can round; one that cannot rounds nothing
LEVELS: dict[str, Any] = getattr(contexts, "ACT_QUANT_LEVELS", {"none": None})


class Reservation:
    """A model of which only the header is read: the engine says what it would allocate."""

    def __init__(self, path: Path) -> None:
        params = lib.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = 0
        params.use_extra_bufts = False
        self.path = path
        self._model = lib.pyl_model_load(encode_path(path), params, ffi.NULL)
        assert self._model != ffi.NULL, drain_log()

    def memory(
        self,
        *,
        n_ctx: int,
        n_ubatch: int = 512,
        cache_type: str = "f16",
        act_quant: str = "none",
        n_seq: int = 1,
        flash_attn: str = "auto",
    ) -> tuple[int, int, int]:
        """Return bytes of weights, caches and compute buffer."""
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_batch = params.n_ubatch = min(n_ubatch, n_ctx)
        params.n_seq_max = n_seq
        params.type_k = params.type_v = CACHE_TYPES[cache_type]
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        params.swa_full = False
        if LEVELS[act_quant] is not None:
            params.act_quant = LEVELS[act_quant]
        context = lib.pyl_context_init(self._model, params, ffi.NULL)
        assert context != ffi.NULL, drain_log()
        entries = ffi.new("struct pyl_memory[4]")
        n = lib.pyl_memory_breakdown(context, entries, 4)
        lib.llama_free(context)
        assert n == 1
        assert entries[0].is_host
        return entries[0].weights, entries[0].cache, entries[0].compute

    def close(self) -> None:
        lib.llama_model_free(self._model)


@pytest.fixture(scope="module")
def reservations(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Reservation]]:
    folder = tmp_path_factory.mktemp("sizes")
    models = {
        "tiny": Reservation(tiny_model),
        "flash": Reservation(native_v4(FLASH, n_tokens=None).write(folder / "flash.gguf")),
        "pro": Reservation(native_v4(PRO, n_tokens=None).write(folder / "pro.gguf")),
    }
    yield models
    for model in models.values():
        model.close()


@pytest.mark.parametrize("model", ["tiny", "flash", "pro"])
@pytest.mark.parametrize("n_ctx", [512, 8192, 131072])
@pytest.mark.parametrize("cache_type", ["f16", "f32", "q8_0"])
def test_predicted_memory_is_what_the_engine_reserves(
    reservations: dict[str, Reservation], model: str, n_ctx: int, cache_type: str
) -> None:
    reserved = reservations[model]
    weights, cache, compute = reserved.memory(n_ctx=n_ctx, cache_type=cache_type)
    host = plan_file(reserved.path, n_ctx=n_ctx, cache_type=cache_type).host
    assert host.cache == pytest.approx(cache, rel=TOLERANCE)
    assert host.compute == pytest.approx(compute, rel=TOLERANCE)
    assert host.weights == pytest.approx(weights, rel=TOLERANCE)


@pytest.mark.parametrize("model", ["tiny", "flash"])
@pytest.mark.parametrize("n_seq", [2, 8])
def test_caches_of_several_sequences(reservations: dict[str, Reservation], model: str, n_seq: int) -> None:
    reserved = reservations[model]
    _, cache, _ = reserved.memory(n_ctx=8192, n_seq=n_seq)
    assert plan_file(reserved.path, n_ctx=8192, n_seq=n_seq).host.cache == pytest.approx(cache, rel=TOLERANCE)


@pytest.mark.parametrize("n_ubatch", [1, 7, 64, 128, 1024, 2048])
@pytest.mark.parametrize("n_ctx", [3000, 1048576])
def test_batches_of_other_sizes(reservations: dict[str, Reservation], n_ubatch: int, n_ctx: int) -> None:
    reserved = reservations["flash"]
    _, cache, compute = reserved.memory(n_ctx=n_ctx, n_ubatch=n_ubatch)
    host = plan_file(reserved.path, n_ctx=n_ctx, n_ubatch=n_ubatch).host
    assert (host.cache, host.compute) == pytest.approx((cache, compute), rel=TOLERANCE)


@pytest.mark.parametrize("model", ["tiny", "flash"])
@pytest.mark.parametrize("act_quant", LEVELS)
def test_rounded_activations(reservations: dict[str, Reservation], model: str, act_quant: Any) -> None:
    reserved = reservations[model]
    for n_ctx in (512, 65536):
        _, _, compute = reserved.memory(n_ctx=n_ctx, act_quant=act_quant)
        planned = plan_file(reserved.path, n_ctx=n_ctx, act_quant=act_quant).host.compute
        assert planned == pytest.approx(compute, rel=TOLERANCE)


@pytest.mark.parametrize("model", ["tiny", "flash", "pro"])
@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("n_ubatch", [1, 64, 512])
def test_attention_in_steps(
    reservations: dict[str, Reservation], model: str, cache_type: str, n_ubatch: int
) -> None:
    """Without flash attention the scores of all heads are most of the buffer."""
    reserved = reservations[model]
    for n_ctx, act_quant in ((512, "cache"), (8192, "full"), (131072, "none")):
        options: dict[str, Any] = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "cache_type": cache_type}
        options |= {"act_quant": act_quant, "flash_attn": "off"}
        _, cache, compute = reserved.memory(**options)
        host = plan_file(reserved.path, **options).host
        assert (host.cache, host.compute) == pytest.approx((cache, compute), rel=TOLERANCE), options


def test_an_open_model_takes_what_was_planned(tiny_model: Path) -> None:
    with Llama(tiny_model, n_ctx=4096, n_threads=1, warmup=False) as llm:
        entries = ffi.new("struct pyl_memory[4]")
        n = lib.pyl_memory_breakdown(llm._context.pointer, entries, 4)
        assert n == 2  # the mapped weights are one of their own
        assert all(entries[i].is_host for i in range(n))
        host = llm.plan.host
        for part in ("weights", "cache", "compute"):
            measured = sum(getattr(entries[i], part) for i in range(n))
            assert getattr(host, part) == pytest.approx(measured, rel=TOLERANCE)
        assert llm.plan.line().startswith("needs ")


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("n_ctx", [64, 4096, 65536])
def test_estimates_for_another_architecture(n_ctx: int, flash_attn: Any) -> None:
    """The cache of a model that attends over everything is exact, the buffer within a factor of two."""
    reserved = Reservation(Path(__file__).parents[1] / "data" / "stock-q2_0.gguf")
    weights, cache, compute = reserved.memory(n_ctx=n_ctx, flash_attn=flash_attn)
    reserved.close()
    plan = plan_file(reserved.path, n_ctx=n_ctx, flash_attn=flash_attn)
    assert plan.is_estimate
    assert (plan.host.weights, plan.host.cache) == pytest.approx((weights, cache), rel=TOLERANCE)
    assert compute / 2 < plan.host.compute < compute * 2


@pytest.mark.parametrize(
    ("options", "key"),
    [({"n_ctx": 1 << 20, "n_ubatch": 2048, "n_batch": 2048}, "n_ctx"), ({"use_mmap": False}, "use_mmap")],
)
def test_llama_refuses_what_does_not_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], key: str
) -> None:
    monkeypatch.setattr("pyllama_dsv4.plan.available_bytes", lambda: 1 << 20)
    with pytest.raises(errors.MemoryLimitError) as error:
        Llama(tiny_model, **options)
    assert error.value.key == key
