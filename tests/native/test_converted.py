"""Converted files in the engine: split ones give what whole ones give, and draft models load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyllama_dsv4 import Llama, errors, synth
from pyllama_dsv4._native import check_ptr, encode_path, ffi, lib
from pyllama_dsv4.convert import convert
from pyllama_dsv4.tensors import HParams

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 320, 40)]


def logits_of(path: Path) -> np.ndarray:
    with Llama(path, n_ctx=256, n_threads=1, warmup=False) as llm:
        return np.array(llm.eval(TOKENS, logits="all"))


def test_split_files_open_by_the_first(tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path) -> None:
    result = convert(tiny_checkpoint, tmp_path / "x.gguf", max_file_bytes=3_000_000)
    assert len(result.paths) > 3
    np.testing.assert_array_equal(logits_of(result.path), logits_of(tiny_model))
    with pytest.raises(errors.FormatError, match="opened by its first shard"):
        Llama(result.paths[1])
    result.paths[2].unlink()
    with pytest.raises(errors.ModelNotFoundError) as caught:
        Llama(result.path)
    assert caught.value.path == str(result.paths[2])


@pytest.mark.parametrize(("draft", "n_layer"), [("mtp", 6), ("dspark", 3)])
def test_draft_models_load(tmp_path: Path, draft: synth.Draft, n_layer: int) -> None:
    """The engine's own loader wants every tensor of them and no other, in these dimensions.

    It is the loader that upstream's server uses for ``--spec-type draft-mtp`` and ``draft-dspark``; our own ``Llama``
    runs neither and says so.
    """
    folder = synth.write_checkpoint(tmp_path / "c", seed=1, tokenizer="bytes", draft=draft)
    path = convert(folder, tmp_path / "draft.gguf", draft=True).path
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    params.load_mtp = True
    monitor = ffi.new("struct pyl_monitor *")
    pointer = lib.pyl_model_load(ffi.new("char[]", encode_path(path)), params, monitor)
    model = ffi.gc(check_ptr(pointer, "loading", errors.ModelLoadError, path=path), lib.llama_model_free)
    hp = HParams.from_hf_config(synth.tiny_config(vocab_size=512))
    specs = synth.weights.draft_specs(hp, draft)
    n_params = sum(spec.n_elements for spec in specs)
    if draft == "mtp":
        n_params += 2 * hp.n_vocab * hp.n_embd + hp.n_embd  # embedding, head and norm of the trunk
    assert lib.llama_model_n_params(model) == n_params
    assert lib.llama_model_n_layer(model) == n_layer
    with pytest.raises(errors.PyllamaError):
        Llama(path)
