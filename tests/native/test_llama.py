"""``Llama`` on a tiny model without a vocabulary: evaluation, sampling, lifetime, arguments."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from gguf_writer import Gguf

from pyllama_dsv4 import Llama, Progress, errors, synth
from pyllama_dsv4.bench import bench
from pyllama_dsv4.context import Context
from pyllama_dsv4.convert import convert
from pyllama_dsv4.generate import Request
from pyllama_dsv4.model import Model

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 300)]


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Llama]:
    with Llama(tiny_model, n_ctx=512, n_threads=1, warmup=False) as llm:
        yield llm


# Flash attention rounds to F16 inside, and how depends on the batch's shape; a wrong position or row gives 1.
@pytest.mark.parametrize(("flash_attn", "nmse_max"), [("off", 1e-9), ("on", 5e-3)])
def test_logits_of_all_positions_equal_those_of_single_steps(
    tiny_model: Path, flash_attn: Literal["on", "off"], nmse_max: float
) -> None:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "cache_type": "f32", "warmup": False}
    with Llama(tiny_model, flash_attn=flash_attn, **options) as llm:
        rows = llm.eval(IDS[:140], logits="all")
        assert rows.shape == (140, 320)
        assert rows.dtype == np.float32
        llm.reset()
        steps = np.empty_like(rows)
        for n, token in enumerate(IDS[:140]):
            llm.eval([token])
            steps[n] = llm.logits
        assert llm.n_tokens == 140
    assert np.mean((steps - rows) ** 2) / np.mean(rows**2) < nmse_max


def test_logits_are_a_read_only_array_that_outlives_the_next_call(llm: Llama) -> None:
    llm.eval(IDS[:5])
    first = llm.logits
    kept = first.copy()
    llm.eval(IDS[5:9])
    assert np.array_equal(first, kept)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_logits_before_any_evaluation(llm: Llama) -> None:
    with pytest.raises(errors.InferenceError, match="no logits yet"):
        _ = llm.logits
    with pytest.raises(errors.InferenceError, match="no logits yet"):
        llm.sample()


def test_batches_smaller_than_the_prompt_give_the_same_tokens(tiny_model: Path, llm: Llama) -> None:
    llm.eval(IDS)
    with Llama(tiny_model, n_ctx=512, n_batch=37, n_ubatch=19, n_threads=1, warmup=False) as small:
        small.eval(IDS)
        error = np.mean((small.logits - llm.logits) ** 2) / np.mean(llm.logits**2)
        assert error < 1e-2


@pytest.mark.parametrize("ids", [[320], [-1], [3, 2**40], ["a"], [[1, 2]], [1.5, None]])
def test_ids_out_of_range_are_refused_and_change_nothing(llm: Llama, ids: list[int]) -> None:
    llm.eval(IDS[:4])
    with pytest.raises(errors.ArgumentError):
        llm.eval(ids)
    assert llm.n_tokens == 4


def test_context_full_is_named_and_changes_nothing(llm: Llama) -> None:
    llm.eval(IDS)
    with pytest.raises(errors.ContextFullError, match="n_ctx = 512"):
        llm.eval(IDS)
    assert llm.n_tokens == 300
    assert llm.logits.shape == (320,)


def test_empty_eval(llm: Llama) -> None:
    llm.eval([])
    assert llm.eval([], logits="all").shape == (0, 320)
    assert llm.n_tokens == 0


def test_sampling_at_temperature_zero_is_the_argmax(llm: Llama) -> None:
    for token in IDS[:20]:
        llm.eval([token])
        assert llm.sample(temperature=0) == int(llm.logits.argmax())


def test_sampling_follows_the_distribution(llm: Llama) -> None:
    llm.eval(IDS[:3])
    z = llm.logits.astype(np.float64)
    p = np.exp(z - z.max())
    p /= p.sum()
    counts = np.bincount([llm.sample(temperature=1, seed=5) for _ in range(4000)], minlength=320)
    best = np.argsort(-p)[:5]
    for token in best:
        sigma = np.sqrt(4000 * p[token] * (1 - p[token]))
        assert abs(counts[token] - 4000 * p[token]) < 5 * sigma + 1


def test_top_k_and_top_p_and_min_p_cut_the_tail(llm: Llama) -> None:
    llm.eval(IDS[:3])
    order = np.argsort(-llm.logits)
    drawn = {llm.sample(temperature=1.5, top_k=3, seed=1) for _ in range(200)}
    assert drawn <= set(order[:3].tolist())
    assert len(drawn) > 1
    assert llm.sample(top_p=1e-6) == order[0]
    assert llm.sample(min_p=1.0) == order[0]


def test_seed_reproduces_and_differs(llm: Llama) -> None:
    def draw(seed: int) -> list[int]:
        llm.reset()
        llm.eval(IDS[:3])
        return [llm.sample(temperature=1, seed=seed) for _ in range(12)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("repeat_penalty", 0),
     ("temperature", float("nan")), ("seed", -1), ("temperature", "hot")],
)  # fmt: skip
def test_sampling_options_out_of_range(llm: Llama, option: str, value: object) -> None:
    llm.eval(IDS[:3])
    with pytest.raises(errors.ArgumentError) as caught:
        llm.sample(**{option: value})  # type: ignore[misc, arg-type]
    assert caught.value.key == option


def test_repeat_penalty_pushes_a_repeated_token_down(llm: Llama) -> None:
    llm.eval(IDS[:3])
    best = int(llm.logits.argmax())
    assert llm.sample(temperature=0, repeat_penalty=1.0) == best
    assert llm.sample(temperature=0, presence_penalty=100.0) == best  # nothing sampled with this chain yet
    assert llm.sample(temperature=0, presence_penalty=100.0) != best


def test_generation_is_deterministic_at_temperature_zero(llm: Llama) -> None:
    first = [p.token for p in llm._pieces(IDS[:50], llm._params({"temperature": 0}), Request(max_tokens=16))]
    again = [p.token for p in llm._pieces(IDS[:50], llm._params({"temperature": 0}), Request(max_tokens=16))]
    assert first == again
    assert llm.stats.n_tokens_cached == 49  # the checkpoint before the prompt's last token


def test_a_changed_prompt_reuses_the_checkpoint_and_matches_a_fresh_run(tiny_model: Path, llm: Llama) -> None:
    params = llm._params({"temperature": 0})
    list(llm._pieces(IDS[:130], params, Request(max_tokens=10)))
    changed = [*IDS[:129], 7, 8]
    reused = [p.token for p in llm._pieces(changed, params, Request(max_tokens=10))]
    assert llm.stats.n_tokens_cached == 129
    with Llama(tiny_model, n_ctx=512, n_threads=1, warmup=False) as fresh:
        assert [p.token for p in fresh._pieces(changed, params, Request(max_tokens=10))] == reused


def test_two_generations_at_once_are_noticed(llm: Llama) -> None:
    params = llm._params({"temperature": 0})
    first = llm._pieces(IDS[:10], params, Request(max_tokens=10))
    next(first)
    second = llm._pieces(IDS[10:20], params, Request(max_tokens=10))
    next(second)
    with pytest.raises(errors.ThreadError, match="interrupted"):
        list(first)
    assert len(list(second)) == 10


def test_no_vocabulary_is_named(llm: Llama) -> None:
    with pytest.raises(errors.TokenizeError, match="no vocabulary"):
        llm.tokenize("hi")
    with pytest.raises(errors.TokenizeError, match="no vocabulary"):
        list(llm.generate("hi"))


def test_unknown_keyword_names_the_nearest_or_the_replacement(tiny_model: Path, llm: Llama) -> None:
    with pytest.raises(TypeError, match="Did you mean 'n_threads'"):
        Llama(tiny_model, n_thread=1)  # type: ignore[arg-type]
    with pytest.raises(errors.UnknownOptionError, match="cache_type"):
        Llama(tiny_model, type_k=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='logits="all"'):
        Llama(tiny_model, logits_all=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Did you mean 'max_tokens'"):
        llm.generate([1], max_token=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="`temperature`"):
        llm.sample(temp=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value"), [("n_ctx", 0), ("n_batch", -1), ("cache_type", "q4_0"), ("seed", -3)]
)
def test_constructor_arguments_out_of_range(tiny_model: Path, name: str, value: object) -> None:
    with pytest.raises(errors.ArgumentError) as caught:
        Llama(tiny_model, warmup=False, **{name: value})  # type: ignore[arg-type]
    assert caught.value.key == name


@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16", "q8_0"])
def test_cache_types(tiny_model: Path, cache_type: str) -> None:
    with Llama(tiny_model, n_ctx=256, n_threads=1, cache_type=cache_type, warmup=False) as llm:
        llm.eval(IDS[:200])
        assert np.isfinite(llm.logits).all()


def test_a_cache_beyond_memory_is_refused_before_it_is_allocated(tiny_model: Path) -> None:
    with pytest.raises(errors.MemoryLimitError, match="does not fit into memory"):
        Llama(tiny_model, n_ctx=2**31 - 1, warmup=False)


def context(model: Model, n_ctx: int) -> Context:
    return Context(model, n_ctx=n_ctx, n_batch=64, n_ubatch=64, n_threads=1, cache_type="f16")


def test_memory_is_blamed_only_if_it_lacks(tiny_model: Path, draft_model: Path) -> None:
    with Model(draft_model) as model, pytest.raises(errors.ModelLoadError, match="ctx_other") as error:
        context(model, 64)
    assert not isinstance(error.value, MemoryError)
    with Model(tiny_model) as model, pytest.raises(errors.MemoryLimitError, match="smaller n_ctx"):
        context(model, 2**31 - 256)


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that drafts for another one; the engine knows its architecture."""
    folder = tmp_path_factory.mktemp("draft")
    synth.write_checkpoint(folder / "checkpoint", seed=3, tokenizer="bytes", draft="dspark")
    return convert(folder / "checkpoint", folder / "draft.gguf", draft=True).path


@pytest.mark.parametrize("open_model", [Llama, bench], ids=["Llama", "bench"])
def test_a_draft_model_is_refused_by_its_architecture(draft_model: Path, open_model: Any) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"'dflash'.* drafts for another") as error:
        open_model(draft_model)
    assert (error.value.path, error.value.key) == (str(draft_model), "general.architecture")


@pytest.mark.parametrize("architecture", ["eagle3", "gemma4-assistant", "t5", "t5encoder", "klingon"])
def test_architectures_that_are_not_run_are_named(tmp_path: Path, architecture: str) -> None:
    path = Gguf().set("general.architecture", "str", architecture).write(tmp_path / "x.gguf")
    with pytest.raises(errors.UnsupportedModelError, match=f"'{architecture}'"):
        Llama(path)


def test_close_is_idempotent_and_use_after_close_is_named(tiny_model: Path) -> None:
    llm = Llama(tiny_model, n_ctx=64, n_threads=1)
    llm.eval([1])
    llm.close()
    llm.close()
    assert "closed" in repr(llm)
    for use in (lambda: llm.eval([1]), lambda: llm.logits, llm.reset, lambda: llm.tokenize("a")):
        with pytest.raises(errors.ClosedError):
            use()


def test_another_thread_waits_while_one_evaluates(llm: Llama) -> None:
    done = threading.Event()

    def other() -> None:
        llm.eval([1])
        done.set()

    with llm._use():
        thread = threading.Thread(target=other)
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(30)
    thread.join()
    assert llm.n_tokens == 1


def test_use_from_a_callback_of_its_own_call_is_refused(llm: Llama) -> None:
    with pytest.raises(errors.ThreadError, match="callback"):
        list(llm.generate(IDS[:9], max_tokens=2, on_prefill=lambda fraction: llm.reset()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused(llm: Llama) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            llm.eval([1])
            os.write(write, b"evaluated")
        except errors.ThreadError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"refused"


def test_pickling_is_refused(llm: Llama) -> None:
    with pytest.raises(TypeError, match="open it again"):
        pickle.dumps(llm)


def test_progress_reports_the_load_and_can_cancel_it(tiny_model: Path) -> None:
    seen: list[Progress] = []
    with Llama(tiny_model, n_ctx=64, progress=seen.append) as llm:  # type: ignore[func-returns-value]
        assert llm.warmup is not None
        assert llm.warmup.wait(30)
        assert llm.warmup.error is None
        assert llm.warmup.n_bytes == llm.warmup.n_bytes_total > 0
    assert {p.stage for p in seen} == {"load", "warmup"}
    assert seen[-1].fraction == 1.0


def test_facts(tiny_model: Path, llm: Llama) -> None:
    assert llm.n_vocab == 320
    assert llm.n_ctx_train == 1048576
    assert "deepseek4" in llm.desc
    assert llm.metadata["general.architecture"] == "deepseek4"
    assert tiny_model.name in repr(llm)
    assert llm.report.dialect == "native"
