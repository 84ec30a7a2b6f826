"""The plan against what the engine reserves: caches and compute buffers of three models, and the check of a load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from draft_pair import KINDS, random_pair
from gguf_writer import FLASH, PRO, native_v4

from pyllama_dsv4 import Llama, errors, synth
from pyllama_dsv4 import context as contexts
from pyllama_dsv4._native import drain_log, encode_path, ffi, lib
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.context import CACHE_TYPES, FLASH_ATTN
from pyllama_dsv4.convert.draft import make_draft_plan
from pyllama_dsv4.convert.output import OutputFile
from pyllama_dsv4.convert.plan import make_plan
from pyllama_dsv4.convert.writer import header_bytes
from pyllama_dsv4.plan import plan_file

TOLERANCE = 0.05
# what this build of the engine can round; one that cannot rounds nothing
LEVELS: dict[str, Any] = getattr(contexts, "ACT_QUANT_LEVELS", {"none": None})


class Reservation:
    """A model of which only the header is read: the engine says what it would allocate."""

    def __init__(self, path: Path, *, is_draft: bool = False) -> None:
        params = lib.llama_model_default_params()
        params.no_alloc = True
        params.load_mtp = is_draft
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
        is_unified: bool = False,
        flash_attn: str = "auto",
        n_copies: int = 0,
        draft: Reservation | None = None,
    ) -> tuple[int, int, int]:
        """Return bytes of weights, caches and compute buffer; with `draft`, those of its context beside this one's."""
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_batch = params.n_ubatch = min(n_ubatch, n_ctx)
        params.n_seq_max = n_seq
        params.kv_unified = is_unified
        params.type_k = params.type_v = CACHE_TYPES[cache_type]
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        params.swa_full = False
        if LEVELS[act_quant] is not None:
            params.act_quant = LEVELS[act_quant]
        params.n_rs_seq = n_copies
        context = own = lib.pyl_context_init(self._model, params, ffi.NULL)
        assert context != ffi.NULL, drain_log()
        if draft is not None:
            params.n_rs_seq = 0
            params.ctx_other = context
            if "mtp" in draft.path.name:
                params.ctx_type = lib.LLAMA_CONTEXT_TYPE_MTP
            context = lib.pyl_context_init(draft._model, params, ffi.NULL)
            assert context != ffi.NULL, drain_log()
        entries = ffi.new("struct pyl_memory[4]")
        n = lib.pyl_memory_breakdown(context, entries, 4)
        lib.llama_free(context)
        if draft is not None:
            lib.llama_free(own)
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


@pytest.mark.parametrize(("n_seq", "is_unified"), [(2, False), (4, False), (4, True)])
def test_sequences_of_the_server_are_counted(tiny_model: Path, n_seq: int, is_unified: bool) -> None:
    """Asked for, slots divide the context; otherwise each of four can hold all of it."""
    reserved = Reservation(tiny_model)
    _, cache, compute = reserved.memory(n_ctx=4096 // n_seq, n_seq=n_seq, is_unified=is_unified)
    reserved.close()
    plan = plan_file(tiny_model, n_ctx=4096 if is_unified else 4096 // n_seq, n_seq=n_seq, act_quant="none")
    assert plan.host.cache == cache
    assert plan.host.compute == pytest.approx(compute, rel=TOLERANCE)


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


@pytest.fixture(scope="module", params=KINDS)
def drafting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Reservation, Reservation]]]:
    """Models with their draft models, of which only the headers are there: a tiny pair and Flash's."""
    pairs = {}
    for name, config in (("tiny", synth.tiny_config(vocab_size=512)), ("flash", synth.flash_config())):
        folder = tmp_path_factory.mktemp(f"{name}-{request.param}")
        synth.write_checkpoint(
            folder / "c", config, seed=0, is_sparse=True, draft=request.param, tokenizer="bytes"
        )
        paths = []
        with Checkpoint(folder / "c") as checkpoint:
            plans = {"model": make_plan(checkpoint), request.param: make_draft_plan(checkpoint)}
        for kind, plan in plans.items():
            with OutputFile(folder / f"{kind}.gguf", header_bytes(plan.metadata, plan.infos)) as out:
                out.skip(plan.n_bytes - plan.n_bytes_header)
                out.commit()
                paths.append(out.path)
        pairs[name] = (Reservation(paths[0]), Reservation(paths[1], is_draft=True))
    yield pairs
    for pair in pairs.values():
        for reserved in pair:
            reserved.close()


@pytest.mark.parametrize("size", ["tiny", "flash"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 512},
        {"n_ctx": 8192},
        {"n_ctx": 131072, "cache_type": "q8_0"},
        {"n_ctx": 8192, "cache_type": "f32", "n_ubatch": 64},
        {"n_ctx": 8192, "n_seq": 4},
        {"n_ctx": 8192, "act_quant": "full"},
        {"n_ctx": 8192, "flash_attn": "off"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_draft_model_is_counted(
    drafting: dict[str, tuple[Reservation, Reservation]], size: str, options: dict[str, Any]
) -> None:
    """Its file, window and graph, and the copies of the model's states that let tokens be dropped."""
    model, draft = drafting[size]
    plan = plan_file(model.path, draft=draft.path, n_draft=3, **{"act_quant": "none", **options})
    assert plan.draft is not None
    _, cache, _ = model.memory(n_copies=3, **options)
    assert plan.host.cache == pytest.approx(cache, rel=TOLERANCE)
    weights, cache, compute = model.memory(n_copies=3, draft=draft, **options)
    # what a load reads of the file: of MTP not the last norm, which is the model's
    assert plan.draft.weights == pytest.approx(weights, rel=TOLERANCE)
    assert plan.draft.cache == cache
    if "mtp" in draft.path.name:
        assert plan.draft.compute == compute
    else:
        assert compute <= plan.draft.compute <= 1.25 * compute
    plain = plan_file(model.path, **{"act_quant": "none", **options})
    assert plan.needs - plain.needs == plan.draft.total + plan.host.cache - plain.host.cache
    assert plan.resident - plain.resident == plan.needs - plain.needs - plan.draft.weights


def test_an_open_pair_takes_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = random_pair(tmp_path, "mtp")
    options: Any = {"n_ctx": 4096, "n_threads": 1, "warmup": False, "draft_model": draft, "n_draft": 5}
    with Llama(model, **options) as llm:
        entries = ffi.new("struct pyl_memory[4]")
        assert llm._draft is not None
        assert llm.plan.draft is not None
        for context, place in (
            (llm._context, llm.plan.host),
            (llm._draft._context, llm.plan.draft),
        ):
            n = lib.pyl_memory_breakdown(context.pointer, entries, 4)
            for part in ("weights", "cache", "compute"):
                measured = sum(getattr(entries[i], part) for i in range(n))
                assert getattr(place, part) == pytest.approx(measured, rel=TOLERANCE)
        resident = llm.plan.resident
    with Llama(model, **{**options, "draft_model": None}) as llm:
        assert llm.plan.resident < resident
        room = (llm.plan.resident + resident) // 2
    monkeypatch.setattr("pyllama_dsv4.plan.available_bytes", lambda: room)
    with Llama(model, **{**options, "draft_model": None}):
        pass
    with pytest.raises(errors.MemoryLimitError, match="KV cache of 4096 tokens"):
        Llama(model, **options)


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
