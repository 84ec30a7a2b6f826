"""The NumPy reference and the engine against transformers' implementation of DeepSeek-V4: one set of weights.

Transformers reads the weights from a hub-form folder by the official names through its own renaming table, so
nothing here maps names. It has none of the fake quantisers, so only level "none" can be compared. Needs torch
and transformers, which are not dependencies of the package: without them every test here is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Config, Model, load_checkpoint

from pyllama_dsv4 import Llama
from pyllama_dsv4.convert import convert
from pyllama_dsv4.synth import tiny_config, write_checkpoint, write_upstream_f32

torch = pytest.importorskip("torch", reason="torch is not installed (pip install torch transformers)")
transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="transformers >= 5.23 is not installed"
)
save_file = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file

# Changes to the tiny configuration.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "wide rows, few heads": {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_attention_heads": 2,
        "head_dim": 512,
        "index_topk": 8,
    },
    "no hash layers, ratio 128 first": {
        "num_hidden_layers": 3,
        "compress_ratios": [128, 4, 0, 0],
        "num_hash_layers": 0,
        "o_groups": 4,
        "index_n_heads": 16,
    },
}
# Two F32 programs that sum in different order; logits have an RMS of 4.
MAX_ERROR = 2e-4
ENGINE_MAX_ERROR = 1e-3
N_TOKENS = 300


def open_in_both(folder: Path, seed: int, changes: dict[str, Any]) -> tuple[Config, dict[str, Any], Any]:
    """Write a random checkpoint and open it here, and as exact float32 under the same names in transformers."""
    released = write_checkpoint(folder / "released", tiny_config(**changes), seed=seed)
    config, weights = load_checkpoint(released)
    plain = folder / "float32"
    plain.mkdir()
    raw = json.loads((released / "config.json").read_text())
    del raw["quantization_config"]
    (plain / "config.json").write_text(json.dumps(raw))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return config, weights, model.eval()


def random_tokens(config: Config, n_tokens: int) -> Any:
    return np.random.default_rng(0).integers(0, config.vocab_size, n_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_transformers(name: str, seed: int, tmp_path: Path) -> None:
    config, weights, theirs = open_in_both(tmp_path, seed, CONFIGS[name])
    tokens = random_tokens(config, N_TOKENS)
    ours = Model(config, weights, np.float32).forward(tokens)
    with torch.no_grad():
        prefill = theirs(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
    report(name, seed, "prefill", ours.logits, prefill)
    assert np.isfinite(ours.row_margin).any(), "the indexer never had to choose"
    assert np.abs(ours.logits - prefill).max() < MAX_ERROR


@pytest.mark.slow
def test_logits_equal_transformers_in_uneven_steps(tmp_path: Path) -> None:
    config, weights, theirs = open_in_both(tmp_path, 2, CONFIGS["tiny"])
    tokens = random_tokens(config, N_TOKENS)
    ours = Model(config, weights, np.float32).forward(tokens).logits
    steps, cache, begin = [], None, 0
    with torch.no_grad():
        for n in (1, 2, 125, 1, 3, 129, *[1] * 39):
            out = theirs(torch.tensor(tokens[begin : begin + n])[None], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, begin + n
            steps.append(out.logits[0].numpy())
    assert begin == N_TOKENS
    report("tiny", 2, "steps", ours, np.concatenate(steps))
    assert np.abs(ours - np.concatenate(steps)).max() < MAX_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("file", ["f32", "native"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_engine_equals_transformers(file: str, seed: int, tmp_path: Path) -> None:
    config, _, theirs = open_in_both(tmp_path, seed, CONFIGS["tiny"])
    tokens = random_tokens(config, N_TOKENS)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
    write = write_upstream_f32 if file == "f32" else convert
    write(tmp_path / "released", tmp_path / "model.gguf")
    with Llama(
        tmp_path / "model.gguf",
        n_ctx=512,
        n_threads=1,
        warmup=False,
        cache_type="f32",
        flash_attn="off",
        act_quant="none",
    ) as llm:
        got = llm.eval([int(token) for token in tokens], logits="all")
    report(file, seed, "engine", got, want)
    assert np.abs(got - want).max() < ENGINE_MAX_ERROR


def report(name: str, seed: int, how: str, ours: Any, theirs: Any) -> None:
    """Print what was measured, for pytest -s and for failures."""
    error = ours.astype(np.float64) - theirs
    nmse = (error**2).sum() / (theirs.astype(np.float64) ** 2).sum()
    same = (ours.argmax(1) == theirs.argmax(1)).mean()
    print(
        f"{name}, seed {seed}, {how}: max {np.abs(error).max():.2e}, NMSE {nmse:.1e}, argmax equal {same:.1%}"
    )


def test_a_wrong_weight_is_seen(tmp_path: Path) -> None:
    """The comparison itself: one sign in one compressor table is far outside the tolerance."""
    config, weights, theirs = open_in_both(
        tmp_path, 3, {"num_hidden_layers": 3, "compress_ratios": [0, 0, 4, 0]}
    )
    tokens = random_tokens(config, 80)
    with torch.no_grad():
        prefill = theirs(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
    assert np.abs(Model(config, weights, np.float32).forward(tokens).logits - prefill).max() < MAX_ERROR
    changed = {**weights, "layers.2.attn.compressor.ape": -weights["layers.2.attn.compressor.ape"]}
    assert np.abs(Model(config, changed, np.float32).forward(tokens).logits - prefill).max() > 100 * MAX_ERROR
