"""Damaged DeepSeek-V4 headers for comparing checkers: the same seed gives the same files.

A case is a well-formed file with up to three changes, from single bits to whole tensors, so that every step
of the header check is reached. Files are sparse: a header and a hole. Writing well-formed ones is left to
``gguf_writer``.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf_writer import BLOCKS, TINY, VALUE_TYPES, Gguf, Tensor, native_v4, padded, upstream_v4

from pyllama_dsv4.tensors import native_to_upstream, upstream_to_native

# Small enough for thousands of files, with every kind of layer; more tensors are only more of the same.
HP = replace(
    TINY,
    n_layer=3,
    compress_ratios=(0, 4, 128),
    n_hash_layer=1,
    n_vocab=48,
    n_expert=4,
    n_expert_used=2,
)

SMALL = (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 63, 64, 65, 127, 128, 129, 256, 512, 513, 1024)
NUMBERS = (*SMALL, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
DIMS = (*NUMBERS, -1, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
OFFSETS = (0, 1, 32, 4096, 2**40, 2**63, 2**64 - 32)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
WORDS = ("", "yarn", "none", "linear", "gpt2", "llama", "test", "no_vocab", "\0", "a\0b", "x" * 70)
ARCHITECTURES = ("deepseek4", "deepseek4", "deepseek41", "deepseek2")
ARRAYS = ("arr[i32]", "arr[u32]", "arr[f32]", "arr[str]")
TYPE_IDS = (*range(-1, 48), 255, 2**31 - 1)

# Keys that V4 files do not have, but that the engine reads, or that change how a file is read.
FOREIGN_KEYS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("general.alignment", "u32", (*SMALL, 16, 2048, 2**31)),
    ("deepseek4.nextn_predict_layers", "u32", NUMBERS),
    ("deepseek4.attention.causal", "bool", (False, True)),
    ("deepseek4.attention.key_length_swa", "u32", NUMBERS),
    ("deepseek4.attention.value_length_swa", "u32", NUMBERS),
    ("deepseek4.rope.dimension_count_swa", "u32", NUMBERS),
    ("deepseek4.expert_group_count", "u32", NUMBERS),
    ("deepseek4.expert_group_used_count", "u32", NUMBERS),
    ("deepseek4.pooling_type", "u32", NUMBERS),
    ("deepseek4.feed_forward_length", "u32", NUMBERS),
    ("deepseek4.embedding_length_out", "u32", NUMBERS),
    ("deepseek4.rope.scaling.attn_factor", "f32", FLOATS),
    ("deepseek4.rope.scale_linear", "f32", FLOATS),
    ("split.count", "u16", (0, 1, 2, 3)),
    ("split.no", "u16", (0, 1, 2)),
    ("split.tensors.count", "i32", (0, 1, 50)),
    ("tokenizer.ggml.scores", "arr[f32]", ([], [0.0], [0.0] * HP.n_vocab)),
)

OPTIONAL_TENSORS = (
    Tensor("blk.1.exp_probs_b_vl.bias", (HP.n_expert,)),
    Tensor("blk.0.ffn_gate_shexp.scale", (1,)),
    Tensor("blk.2.ffn_up_exps.input_scale", (HP.n_expert,)),
    Tensor("output.scale", (1,)),
    Tensor("blk.2.nextn.eh_proj.weight", (2 * HP.n_embd, HP.n_embd), 30),
    Tensor("blk.3.attn_norm.weight", (HP.n_embd,)),
    Tensor("rope_freqs.weight", (32,)),
)


@dataclass
class Case:
    """One damaged model: its files, the first one first, and what was done to it."""

    paths: list[Path]
    changes: list[str]


class Mutator:
    """Source of cases; ``next(folder)`` writes one, over the files of the one before."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._changes = (
            *(self._list_of_keys,) * 2,
            *(self._key_value,) * 4,
            *(self._foreign_key,) * 2,
            *(self._tensor_name,) * 3,
            *(self._tensor_dims,) * 2,
            *(self._tensor_kind,) * 3,
            self._tensor_type,
            self._tensor_offset,
            *(self._list_of_tensors,) * 3,
            self._version,
        )

    def next(self, folder: Path) -> Case:
        r = self._random
        model = self._base()
        changes = [r.choice(self._changes)(model) for _ in range(r.choice((0, 1, 1, 1, 1, 2, 2, 3)))]
        shards = self._split(model, changes) if r.random() < 0.1 else [model]
        paths = []
        for i, shard in enumerate(shards):
            suffix = "" if len(shards) == 1 else f"-{i + 1:05d}-of-{len(shards):05d}"
            path = folder / f"model{suffix}.gguf"
            self._write(shard, path, changes)
            paths.append(path)
        if len(shards) > 1 and r.random() < 0.1:
            paths.pop().unlink()
            changes.append("remove the last shard")
        return Case(paths, changes)

    def _base(self) -> Gguf:
        r = self._random
        n_tokens = r.choice((0, None))
        kind = r.choice(("native",) * 4 + ("no rope", "upstream", "upstream", "stock", "requant", "prism"))
        if kind == "upstream":
            return upstream_v4(HP, n_tokens=n_tokens)
        model = native_v4(HP, n_tokens=n_tokens, with_rope_scaling=kind != "no rope")
        other = {"stock": "q2_0", "requant": 8, "prism": "prism"}.get(kind)
        if other is not None:
            model.tensors = [replace(t, kind=other) if t.kind == 42 else t for t in model.tensors]
        return model

    # keys

    def _list_of_keys(self, model: Gguf) -> str:
        r = self._random
        i = r.randrange(len(model.keys))
        name, type_, value = model.keys[i]
        action = r.choice(("drop", "drop", "drop", "duplicate", "rename", "swap"))
        if action == "drop":
            del model.keys[i]
        elif action == "duplicate":
            model.keys.insert(r.randrange(len(model.keys)), (name, type_, value))
        elif action == "rename":
            new = r.choice(("", name + "x", name + "\0x", name[1:], name.upper()))
            model.keys[i] = (new, type_, value)
        else:
            j = r.randrange(len(model.keys))
            model.keys[i], model.keys[j] = model.keys[j], model.keys[i]
        return f"{action} key {name}"

    def _key_value(self, model: Gguf) -> str:
        r = self._random
        i = r.randrange(len(model.keys))
        name, type_, value = model.keys[i]
        if name == "general.architecture" and r.random() < 0.8:
            value = r.choice(ARCHITECTURES)
        elif r.random() < 0.3:
            type_ = r.choice((*VALUE_TYPES, *ARRAYS))
            value = self._value(type_)
        elif isinstance(value, list):
            value = self._changed_list(value, type_[4:-1])
        else:
            value = self._value(type_)
        model.keys[i] = (name, type_, value)
        return f"set key {name} {type_} {str(value)[:40]}"

    def _changed_list(self, value: list[Any], item_type: str) -> list[Any]:
        r = self._random
        action = r.choice(("cut", "extend", "change", "repeat"))
        if action == "cut":
            return value[: r.randrange(len(value) + 1)]
        if action == "extend":
            return [*value, *(self._value(item_type) for _ in range(r.choice((1, 2, 600))))]
        i = r.randrange(len(value))
        item = self._value(item_type) if action == "change" else value[r.randrange(len(value))]
        return [*value[:i], item, *value[i + 1 :]]

    def _value(self, type_: str) -> Any:
        r = self._random
        if type_.startswith("arr["):
            return [self._value(type_[4:-1]) for _ in range(r.choice((0, 1, HP.n_layer, HP.n_vocab)))]
        if type_ == "str":
            return r.choice(WORDS)
        if type_ == "bool":
            return r.random() < 0.5
        if type_ in ("f32", "f64"):
            return r.choice(FLOATS)
        bits = struct.calcsize(VALUE_TYPES[type_][1]) * 8
        value = r.choice(NUMBERS) % 2**bits
        return value - 2**bits if type_.startswith("i") and value >= 2 ** (bits - 1) else value

    def _foreign_key(self, model: Gguf) -> str:
        r = self._random
        name, type_, values = r.choice(FOREIGN_KEYS)
        value = r.choice(values)
        model.set(name, type_, value)
        if name == "general.alignment" and value > 0 and value & (value - 1) == 0:
            model.alignment = min(value, 2048)
        return f"set key {name} {value}"

    # tensors

    def _pick(self, model: Gguf) -> int:
        if not model.tensors:
            model.tensors.append(Tensor("lonely", (32,)))
        return self._random.randrange(len(model.tensors))

    def _tensor_name(self, model: Gguf) -> str:
        r = self._random
        i = self._pick(model)
        name = model.tensors[i].name
        text = name if isinstance(name, str) else name.decode("latin1")
        new = r.choice(
            (
                *(native_to_upstream(text), upstream_to_native(text)) * 3,
                model.tensors[r.randrange(len(model.tensors))].name,
                text.replace("blk.0", "blk.1"),
                text.replace("blk.2", "blk.3"),
                text + "\0x",
                text[:-1],
                text + "x" * 60,
                text.encode() + b"\xff\xc3\x28",
                "",
            )
        )
        model.tensors[i] = replace(model.tensors[i], name=new)
        return f"rename {text!r} to {new!r}"

    def _tensor_dims(self, model: Gguf) -> str:
        r = self._random
        i = self._pick(model)
        t = model.tensors[i]
        dims = list(t.dims)
        action = r.choice(("drop", "add", "swap", "change", "change", "change"))
        if action == "drop":
            dims = dims[:-1]
        elif action == "add":
            dims += [r.choice((1, 1, 2, 0, -1))] * r.choice((1, 1, 4))
        elif action == "swap":
            dims = dims[::-1]
        elif dims:
            j = r.randrange(len(dims))
            old = dims[j]
            dims[j] = r.choice((old * 2, old + 128, old + 64, old + 1, old // 2, r.choice(DIMS)))
        model.tensors[i] = replace(t, dims=dims)
        return f"dims of {t.name!r}: {list(t.dims)} -> {dims}"

    def _tensor_kind(self, model: Gguf) -> str:
        """Another type with its own size: the layout stays consistent."""
        i = self._pick(model)
        t = model.tensors[i]
        kind = self._random.choice(tuple(BLOCKS))
        model.tensors[i] = replace(t, kind=kind, type_id=None)
        return f"kind of {t.name!r}: {kind}"

    def _tensor_type(self, model: Gguf) -> str:
        """Another type id with the old size."""
        i = self._pick(model)
        t = model.tensors[i]
        model.tensors[i] = replace(t, type_id=self._random.choice(TYPE_IDS))
        return f"type id of {t.name!r}: {model.tensors[i].type_id}"

    def _tensor_offset(self, model: Gguf) -> str:
        i = self._pick(model)
        t = model.tensors[i]
        model.tensors[i] = replace(t, offset=self._random.choice(OFFSETS))
        return f"offset of {t.name!r}: {model.tensors[i].offset}"

    def _list_of_tensors(self, model: Gguf) -> str:
        r = self._random
        i = self._pick(model)
        t = model.tensors[i]
        action = r.choice(("remove",) * 4 + ("duplicate", "swap", "optional", "optional", "none", "keep few"))
        if action == "remove":
            del model.tensors[i]
        elif action == "duplicate":
            model.tensors.insert(r.randrange(len(model.tensors)), t)
        elif action == "swap":
            j = r.randrange(len(model.tensors))
            model.tensors[i], model.tensors[j] = model.tensors[j], model.tensors[i]
        elif action == "optional":
            model.tensors.insert(i, r.choice(OPTIONAL_TENSORS))
        elif action == "none":
            model.tensors = []
        else:
            model.tensors = model.tensors[:: r.choice((2, 7, 100))]
        return f"{action} tensor {t.name!r}"

    def _version(self, model: Gguf) -> str:
        model.version = self._random.choice((0, 1, 2, 3, 4, 2**16, 3 << 24))
        return f"version {model.version}"

    # files

    def _split(self, model: Gguf, changes: list[str]) -> list[Gguf]:
        r = self._random
        cut = r.randrange(len(model.tensors) + 1)
        n_tensors = len(model.tensors)
        keys: list[tuple[str, str, Any]] = [
            ("split.count", "u16", 2),
            ("split.tensors.count", "i32", n_tensors),
        ]
        if model.alignment != 32:
            keys.append(("general.alignment", "u32", model.alignment))
        own = [
            key for key in model.keys if key[0] not in {"general.alignment", *(name for name, _, _ in keys)}
        ]
        first = replace(model, keys=[*own, *keys, ("split.no", "u16", 0)], tensors=model.tensors[:cut])
        second = replace(model, keys=[*keys, ("split.no", "u16", 1)], tensors=model.tensors[cut:])
        for shard in (first, second):
            for change, chance in (
                (self._key_value, 0.2),
                (self._list_of_keys, 0.1),
                (self._tensor_kind, 0.1),
            ):
                if r.random() < chance:
                    changes.append(change(shard))
        return [first, second]

    def _write(self, model: Gguf, path: Path, changes: list[str]) -> None:
        r = self._random
        offset = 0
        for i, t in enumerate(model.tensors):
            if t.offset is None:  # absurd dimensions may exceed what the format's 64 bits hold
                model.tensors[i] = replace(t, offset=offset % 2**64)
            offset += padded(t.n_bytes, model.alignment)
        header = bytearray(model.header())
        size = len(header) + min(max(model.data_bytes, 0), 2**40)
        action = r.random()
        if action < 0.1:
            size += r.choice((1, 31, 32, 1000))
        elif action < 0.25:
            size = r.choice((r.randrange(len(header) + 1), max(0, size - r.choice((1, 32, 33, 4096)))))
        if action < 0.25:
            changes.append(f"{path.name} of {size} bytes")
        if r.random() < 0.25:
            changes.append(self._damage(header))
        path.write_bytes(header[:size])
        with path.open("r+b") as file:
            file.truncate(size)

    def _damage(self, header: bytearray) -> str:
        r = self._random
        i = r.randrange(len(header))
        action = r.choice(("flip a bit", "flip a bit", "overwrite", "delete"))
        if action == "flip a bit":
            header[i] ^= 1 << r.randrange(8)
        elif action == "overwrite":
            header[i : i + 8] = r.choice((b"\0" * 8, b"\xff" * 8, r.randbytes(8)))
        else:
            del header[i : i + r.choice((1, 4, 8, 32))]
        return f"{action} at {i}"
