"""Weights of DeepSeek-V4 are never repacked, whoever loads them: the decision is native."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyllama_dsv4._llama", reason="the native extension is not built")

from pyllama_dsv4._native import encode_path, ffi, lib

REPACK = "CPU_REPACK"


def buffers(path: Path) -> set[str]:
    """Load with repacking allowed, and return the kinds of memory that hold weights."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    assert params.use_extra_bufts
    model = lib.pyl_model_load(encode_path(path), params, ffi.NULL)
    assert model != ffi.NULL
    context_params = lib.llama_context_default_params()
    context_params.n_ctx = 256
    context = lib.pyl_context_init(model, context_params, ffi.NULL)
    entries = ffi.new("struct pyl_memory[8]")
    n = lib.pyl_memory_breakdown(context, entries, 8)
    names = {ffi.string(entries[i].name).decode() for i in range(n) if entries[i].weights}
    lib.llama_free(context)
    lib.llama_model_free(model)
    return names


def test_v4_is_not_repacked(tiny_model: Path) -> None:
    assert not {name for name in buffers(tiny_model) if REPACK in name}
