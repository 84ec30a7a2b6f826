"""Small GGUF files for tests, written from the format's description and by nothing of the package.

``Gguf`` is any file: keys, tensors, and every way to get it wrong. ``native_v4`` and ``upstream_v4`` are complete
DeepSeek-V4 models of given dimensions; their data is a hole in the file, so they may be as big as the real one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyllama_dsv4.tensors import HParams, tensor_table

VALUE_TYPES = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "str": (8, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
ARRAY = 9

# file id -> elements and bytes per block; the other two claimants of 42 are given by name
BLOCKS: dict[int | str, tuple[int, int]] = {
    0: (1, 4),
    1: (1, 2),
    8: (32, 34),
    9: (32, 36),
    12: (256, 144),
    15: (256, 292),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    30: (1, 2),
    39: (32, 17),
    40: (64, 36),
    42: (128, 129),
    "q2_0": (64, 18),
    "prism": (128, 34),
}
TYPE_IDS = {"f32": 0, "i32": 26, "bf16": 30, "f8": 42, "mxfp4": 39}


@dataclass
class Tensor:
    """One tensor info; ``kind`` gives its size, ``type_id`` what the file says it is."""

    name: str | bytes
    dims: Sequence[int]
    kind: int | str = 0
    type_id: int | None = None
    offset: int | None = None

    @property
    def n_bytes(self) -> int:
        n = 1
        for dim in self.dims:
            n *= dim
        block, size = BLOCKS[self.kind]
        return n // block * size

    def file_type_id(self) -> int:
        if self.type_id is not None:
            return self.type_id
        return self.kind if isinstance(self.kind, int) else 42


@dataclass
class Gguf:
    """A file to be written: metadata as (key, type, value), tensors in file order."""

    keys: list[tuple[str, str, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    alignment: int = 32

    def key(self, name: str) -> Any:
        return next(value for key, _, value in self.keys if key == name)

    def set(self, name: str, type_: str, value: Any) -> Gguf:
        """Replace a key in place, or append it."""
        for i, (key, _, _) in enumerate(self.keys):
            if key == name:
                self.keys[i] = (name, type_, value)
                return self
        self.keys.append((name, type_, value))
        return self

    def drop(self, *names: str) -> Gguf:
        assert {key for key, _, _ in self.keys} >= set(names)
        self.keys = [entry for entry in self.keys if entry[0] not in names]
        return self

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def change(self, tensor_name: str, /, **fields: Any) -> Gguf:
        """Replace fields of one tensor."""
        i = self.tensors.index(self.tensor(tensor_name))
        self.tensors[i] = replace(self.tensors[i], **fields)
        return self

    def rename(self, old: str, new: str) -> Gguf:
        return self.change(old, name=new)

    def remove(self, name: str) -> Gguf:
        self.tensors.remove(self.tensor(name))
        return self

    def header(self) -> bytes:
        """Everything up to the data section, padding included."""
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys))]
        for name, type_, value in self.keys:
            parts += [string(name), typed_value(type_, value)]
        offset = 0
        for tensor in self.tensors:
            parts += [
                string(tensor.name),
                struct.pack(f"<I{len(tensor.dims)}q", len(tensor.dims), *tensor.dims),
                struct.pack("<iQ", tensor.file_type_id(), offset if tensor.offset is None else tensor.offset),
            ]
            offset += padded(tensor.n_bytes, self.alignment)
        data = b"".join(parts)
        return data + b"\0" * (-len(data) % self.alignment) if self.tensors else data

    @property
    def data_bytes(self) -> int:
        return sum(padded(tensor.n_bytes, self.alignment) for tensor in self.tensors)

    def write(self, path: Path, *, cut: int = 0, extra: int = 0) -> Path:
        """Write the header and a hole for the data, ``cut`` bytes too short or ``extra`` bytes too long."""
        header = self.header()
        path.write_bytes(header)
        with path.open("r+b") as file:
            file.truncate(len(header) + self.data_bytes - cut + extra)
        return path


def padded(n: int, alignment: int = 32) -> int:
    return (n + alignment - 1) // alignment * alignment


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def typed_value(type_: str, value: Any) -> bytes:
    """Encode a type and a value: ``u32`` or ``arr[u32]``."""
    if type_.startswith("arr["):
        item = type_[4:-1]
        number, code = VALUE_TYPES[item]
        head = struct.pack("<iiQ", ARRAY, number, len(value))
        if item == "str":
            return head + b"".join(map(string, value))
        return head + struct.pack(f"<{len(value)}{code}", *value)
    number, code = VALUE_TYPES[type_]
    return struct.pack("<i", number) + (string(value) if type_ == "str" else struct.pack("<" + code, value))


# --- DeepSeek-V4 ----------------------------------------------------------------------------------

TINY = HParams(
    n_layer=6,
    n_embd=256,
    n_head=4,
    head_dim=128,
    n_rot=64,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    n_swa=128,
    compress_ratios=(0, 0, 4, 128, 4, 128),
    indexer_n_head=64,
    indexer_head_dim=128,
    indexer_top_k=16,
    n_ff_exp=128,
    n_expert=8,
    n_expert_used=3,
    n_expert_shared=1,
    n_hash_layer=3,
    expert_weights_scale=1.5,
    swiglu_limit=3.0,
    hc_count=4,
    hc_sinkhorn_iterations=20,
    hc_eps=1e-6,
    rms_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn_factor=16.0,
    yarn_n_ctx_orig=65536,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    n_ctx_train=1048576,
    n_vocab=320,
)

FLASH = replace(
    TINY,
    n_layer=43,
    n_embd=4096,
    n_head=64,
    head_dim=512,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    compress_ratios=(0, 0) + (4, 128) * 20 + (4,),
    indexer_top_k=512,
    n_ff_exp=2048,
    n_expert=256,
    n_expert_used=6,
    swiglu_limit=10.0,
    n_vocab=129280,
)
FLASH_FILE_BYTES = 156_148_189_760

PRO = replace(
    FLASH,
    n_layer=61,
    n_embd=7168,
    n_head=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4,),
    indexer_top_k=1024,
    n_ff_exp=3072,
    n_expert=384,
    expert_weights_scale=2.5,
)


def vocabulary_keys(n_vocab: int | None) -> list[tuple[str, str, Any]]:
    """Return the tokenizer's keys for made-up tokens; None for a file without a vocabulary."""
    if n_vocab is None:
        return [("tokenizer.ggml.model", "str", "none")]
    return [
        ("tokenizer.ggml.model", "str", "gpt2"),
        ("tokenizer.ggml.pre", "str", "joyai-llm"),
        ("tokenizer.ggml.tokens", "arr[str]", [f"t{i:x}" for i in range(n_vocab)]),
        ("tokenizer.ggml.token_type", "arr[i32]", [1] * n_vocab),
        ("tokenizer.ggml.merges", "arr[str]", [f"{i:x} {i:x}" for i in range(n_vocab - n_vocab // 84)]),
        ("tokenizer.ggml.bos_token_id", "u32", 0),
        ("tokenizer.ggml.eos_token_id", "u32", 1),
        ("tokenizer.ggml.padding_token_id", "u32", 1),
        ("tokenizer.ggml.add_bos_token", "bool", False),
        ("tokenizer.ggml.add_eos_token", "bool", False),
    ]


def native_keys(
    hp: HParams, *, with_rope_scaling: bool = True, template: str = "short"
) -> list[tuple[str, str, Any]]:
    """Return the 40 keys of the published native file, in its order."""
    p = "deepseek4."
    keys = [
        ("general.architecture", "str", "deepseek4"),
        ("general.type", "str", "model"),
        ("general.sampling.top_p", "f32", 1.0),
        ("general.sampling.temp", "f32", 1.0),
        ("general.name", "str", "DeepSeek V4 Flash"),
        ("general.size_label", "str", "256x8.4B"),
        ("general.license", "str", "mit"),
        (p + "block_count", "u32", hp.n_layer),
        (p + "context_length", "u32", hp.n_ctx_train),
        (p + "embedding_length", "u32", hp.n_embd),
        (p + "attention.head_count", "u32", hp.n_head),
        (p + "attention.head_count_kv", "u32", 1),
        (p + "rope.scaling.type", "str", "yarn"),
        (p + "rope.scaling.factor", "f32", hp.yarn_factor),
        (p + "rope.scaling.original_context_length", "u32", hp.yarn_n_ctx_orig),
        (p + "rope.scaling.yarn_beta_fast", "f32", hp.yarn_beta_fast),
        (p + "rope.scaling.yarn_beta_slow", "f32", hp.yarn_beta_slow),
        (p + "rope.freq_base", "f32", hp.rope_theta),
        (p + "attention.layer_norm_rms_epsilon", "f32", hp.rms_eps),
        (p + "expert_used_count", "u32", hp.n_expert_used),
        (p + "attention.key_length", "u32", hp.head_dim),
        (p + "attention.value_length", "u32", hp.head_dim),
        ("general.file_type", "u32", 41),
        ("tokenizer.chat_template", "str", template),
        (p + "vocab_size", "u32", hp.n_vocab),
        (p + "attention.q_lora_rank", "u32", hp.q_lora_rank),
        (p + "rope.dimension_count", "u32", hp.n_rot),
        (p + "attention.sliding_window", "u32", hp.n_swa),
        (p + "rope.freq_base_swa", "f32", hp.compress_rope_theta),
        (p + "leading_dense_block_count", "u32", 0),
        (p + "expert_feed_forward_length", "u32", hp.n_ff_exp),
        (p + "expert_count", "u32", hp.n_expert),
        (p + "expert_shared_count", "u32", hp.n_expert_shared),
        (p + "expert_weights_scale", "f32", hp.expert_weights_scale),
        (p + "expert_weights_norm", "bool", True),
        (p + "swiglu_clamp_exp", "arr[f32]", [hp.swiglu_limit] * hp.n_layer),
        (p + "attention.indexer.head_count", "u32", hp.indexer_n_head),
        (p + "attention.indexer.key_length", "u32", hp.indexer_head_dim),
        (p + "attention.indexer.top_k", "u32", hp.indexer_top_k),
        ("general.quantization_version", "u32", 2),
    ]
    return keys if with_rope_scaling else [key for key in keys if ".rope.scaling." not in key[0]]


def keys_native_lacks(hp: HParams) -> list[tuple[str, str, Any]]:
    """Return what upstream's writer adds to the keys above."""
    p = "deepseek4."
    return [
        (p + "swiglu_clamp_shexp", "arr[f32]", [hp.swiglu_limit] * hp.n_layer),
        (p + "attention.output_group_count", "u32", hp.o_groups),
        (p + "attention.output_lora_rank", "u32", hp.o_lora_rank),
        (p + "attention.compress_rope_freq_base", "f32", hp.compress_rope_theta),
        (p + "attention.compress_ratios", "arr[i32]", [*hp.compress_ratios, 0]),
        (p + "hyper_connection.count", "u32", hp.hc_count),
        (p + "hyper_connection.sinkhorn_iterations", "u32", hp.hc_sinkhorn_iterations),
        (p + "hyper_connection.epsilon", "f32", hp.hc_eps),
        (p + "hash_layer_count", "u32", hp.n_hash_layer),
        (p + "expert_gating_func", "u32", 4),
    ]


def native_v4(hp: HParams = TINY, *, n_tokens: int | None = 0, **key_options: Any) -> Gguf:
    """A native-dialect model. ``n_tokens``: None for a file without a vocabulary, 0 for the model's own."""
    tensors = [Tensor(spec.native, spec.dims, TYPE_IDS[spec.kind]) for spec in tensor_table(hp)]
    n_vocab = hp.n_vocab if n_tokens == 0 else n_tokens
    return Gguf(native_keys(hp, **key_options) + vocabulary_keys(n_vocab), tensors)


def upstream_v4(hp: HParams = TINY, *, n_tokens: int | None = 0) -> Gguf:
    """An upstream-dialect model as upstream's converter writes it: Q8_0 instead of FP8, all keys."""
    kinds = TYPE_IDS | {"f8": 8}
    tensors = [Tensor(spec.upstream, spec.dims, kinds[spec.kind]) for spec in tensor_table(hp)]
    n_vocab = hp.n_vocab if n_tokens == 0 else n_tokens
    unwritten = {"deepseek4.rope.freq_base_swa"} | (
        {"deepseek4.vocab_size"} if n_vocab is not None else set()
    )
    keys = [key for key in native_keys(hp) if key[0] not in unwritten]
    return Gguf(keys + keys_native_lacks(hp) + vocabulary_keys(n_vocab), tensors)


def flash_file(path: Path) -> Path:
    """The published file with its true size, tensor list, offsets and data start; no data, made-up tokens."""
    data_start = FLASH_FILE_BYTES - 156_142_864_448
    model = native_v4(FLASH)
    spare = data_start - len(model.header())
    assert spare > 0
    model.set("tokenizer.chat_template", "str", "short" + "x" * spare)
    assert len(model.header()) == data_start
    return model.write(path)
