"""Levels of rounding through the binding: choosing one, their mark in saved states, other models.

That each level computes the right numbers is tested against the reference in ``parity/test_levels.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Llama, errors
from pyllama_dsv4._native import check, ffi, lib
from pyllama_dsv4.context import ACT_QUANT_LEVELS, Context
from pyllama_dsv4.model import Model

IDS = [int(i) for i in np.random.default_rng(5).integers(0, 320, 140)]


def make_context(model: Model, level: str) -> Context:
    return Context(
        model,
        n_ctx=256,
        n_batch=256,
        n_ubatch=256,
        n_threads=1,
        cache_type="f16",
        act_quant=level,
        flash_attn="auto",
    )


@pytest.fixture
def model(tiny_model: Path) -> Iterator[Model]:
    with Model(tiny_model) as model:
        yield model


def logits(path: Path, **options: object) -> npt.NDArray[np.float32]:
    with Llama(path, n_ctx=256, n_threads=1, warmup=False, **options) as llm:  # type: ignore[arg-type]
        return llm.eval(IDS, logits="all")


def test_the_levels_differ_and_cache_is_the_default(tiny_model: Path) -> None:
    by_level = {level: logits(tiny_model, act_quant=level) for level in ACT_QUANT_LEVELS}
    assert np.array_equal(by_level["cache"], logits(tiny_model))
    assert not np.array_equal(by_level["cache"], by_level["none"])
    assert not np.array_equal(by_level["cache"], by_level["full"])
    assert not np.array_equal(by_level["none"], by_level["full"])


def test_an_unknown_level_is_refused(tiny_model: Path) -> None:
    with pytest.raises(errors.ArgumentError, match=r"act_quant.*'half'.*none, cache, full"):
        Llama(tiny_model, act_quant="half", warmup=False)  # type: ignore[arg-type]


def test_an_unknown_number_makes_no_context(model: Model) -> None:
    params = lib.llama_context_default_params()
    params.n_ctx = 256
    params.act_quant = 7
    assert not lib.pyl_context_init(model.pointer, params, ffi.NULL)


@pytest.fixture
def default_level() -> Iterator[None]:
    yield
    check(lib.pyl_act_quant_set_default(lib.LLAMA_ACT_QUANT_CACHE), "setting the default")


@pytest.mark.usefixtures("default_level")
def test_programs_that_do_not_know_the_field_follow_the_process() -> None:
    assert lib.llama_context_default_params().act_quant == lib.LLAMA_ACT_QUANT_CACHE
    for level in ACT_QUANT_LEVELS.values():
        check(lib.pyl_act_quant_set_default(level), "setting the default")
        assert lib.llama_context_default_params().act_quant == level
    with pytest.raises(errors.ArgumentError):
        check(lib.pyl_act_quant_set_default(3), "setting the default")
    assert lib.llama_context_default_params().act_quant == lib.LLAMA_ACT_QUANT_FULL


@pytest.mark.parametrize("level", ACT_QUANT_LEVELS)
def test_a_state_goes_on_at_its_own_level(model: Model, level: str) -> None:
    first, second = make_context(model, level), make_context(model, level)
    first.decode(IDS[:-1])
    second.restore_state(first.save_state(), first.n_tokens)
    first.decode(IDS[-1:])
    second.decode(IDS[-1:])
    assert np.array_equal(first.logits, second.logits)
    first.close()
    second.close()


@pytest.mark.parametrize(("saved", "own"), [("none", "cache"), ("cache", "none"), ("full", "cache")])
def test_a_state_of_another_level_is_refused(model: Model, saved: str, own: str) -> None:
    first, second = make_context(model, saved), make_context(model, own)
    first.decode(IDS)
    second.decode(IDS)
    expected = second.logits
    with pytest.raises(errors.StateError, match=f"saved at act_quant = {saved}, this context runs at {own}"):
        second.restore_state(first.save_state(), first.n_tokens)
    assert second.n_tokens == 0
    second.decode(IDS)  # still good for work
    assert np.array_equal(second.logits, expected)
    first.close()
    second.close()


def test_a_state_of_the_whole_context_carries_the_level_too(model: Model) -> None:
    ids = IDS[:100]  # a full window is put back in another order, and other sums would flip roundings
    contexts = {level: make_context(model, level) for level in ACT_QUANT_LEVELS}
    source = contexts["full"]
    source.decode(ids[:-1])
    n = lib.llama_state_get_size(source.pointer)
    state = bytearray(n)
    assert lib.llama_state_get_data(source.pointer, ffi.from_buffer("uint8_t[]", state), n) == n
    logits = {}
    for level, context in contexts.items():
        n_read = lib.llama_state_set_data(context.pointer, ffi.from_buffer("uint8_t[]", state), n)
        assert n_read == (n if level == "full" else 0)
        if level == "full":
            context._n_tokens = [len(ids) - 1]
            context.decode(ids[-1:])
            logits["restored"] = context.logits
        context.clear()
    source.decode(ids[:-1])
    source.decode(ids[-1:])
    assert np.array_equal(source.logits, logits["restored"])
    for context in contexts.values():
        context.close()


def test_a_state_without_a_level_is_refused(model: Model) -> None:
    context = make_context(model, "cache")
    context.decode(IDS)
    state = context.save_state()
    mark = state.index(b"V4AQ")
    for damaged in (
        state[:mark] + state[mark + 8 :],  # as a program without levels writes it
        state[: mark + 4] + b"\x09" + state[mark + 5 :],
        state[: mark + 2],
    ):
        with pytest.raises(errors.StateError):
            context.restore_state(damaged, len(IDS))
    context.close()


def test_other_models_ignore_the_level() -> None:
    """Also their states: those of another level, and of programs without levels, go on."""
    path = Path(__file__).parents[1] / "data" / "stock-q2_0.gguf"
    by_level, states = {}, {}
    with Model(path) as model:
        for level in ACT_QUANT_LEVELS:
            context = make_context(model, level)
            context.decode(list(range(20)))
            by_level[level], states[level] = context.logits, context.save_state()
            context.restore_state(states["none"], 20)
            context.close()
    assert b"V4AQ" not in states["full"]
    assert np.array_equal(by_level["none"], by_level["cache"])
    assert np.array_equal(by_level["none"], by_level["full"])


def test_a_chat_goes_back_to_its_checkpoint(tiny_model: Path) -> None:
    """Checkpoints are states too: a prompt that replaces the last token gives what it gives by itself."""
    with Llama(tiny_model, n_ctx=256, n_threads=1, warmup=False) as llm:
        llm._session.prefill(IDS)
        other = [*IDS[:-1], (IDS[-1] + 1) % 320]
        assert llm._session.prefill(other) == len(IDS) - 1
        again = llm.logits
        llm.reset()
        llm._session.prefill(other)
        assert np.array_equal(again, llm.logits)
