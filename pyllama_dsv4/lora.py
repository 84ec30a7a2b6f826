"""LoRA adapters: files of upstream's ``convert_lora_to_gguf.py``, checked before the engine sees them.

Owns which of their tensors count: upstream's graphs leave some products without an adapter's part and say nothing, and
an adapter that works by half gives fluent, wrong text. Leaves applying them to the engine and to ``Context``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ._native import check_ptr, encode_path, ffi, lib
from .errors import FormatError, ModelLoadError, TensorShapeError, UnsupportedModelError
from .gguf_file import ValueType
from .header import Header, HeaderReport, read_header
from .model import Model

__all__ = ["LoraAdapter"]

_TYPES: Final = ("F32", "F16", "BF16", "Q8_0")

# the weights that upstream's graph of deepseek4 multiplies together with an adapter's part; wo_a and the head are not
# Source: src/models/deepseek4.cpp and llama-graph.cpp, build_lora_mm, build_lora_mm_id, build_inp_embd
_DEEPSEEK4: Final = (
    "token_embd",
    "attn_q_a",
    "attn_q_b",
    "attn_kv",
    "attn_output_b",
    "attn_compressor_kv",
    "attn_compressor_gate",
    "indexer.attn_q_b",
    "indexer.proj",
    "indexer_compressor_kv",
    "indexer_compressor_gate",
    "ffn_gate_inp",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
)


def _text(header: Header, key: str, path: Path) -> str:
    entry = header.kv.get(key)
    if entry is None or entry.type is not ValueType.STR:
        raise FormatError(
            "opening a LoRA adapter",
            path=path,
            key=key,
            found="nothing" if entry is None else entry.type.name,
            expected="text",
        )
    return str(entry.value)


def _check(report: HeaderReport, path: Path) -> None:
    """Refuse what upstream would assert, leave out, or apply to another model's weights."""
    header = read_header(path)
    for key, expected in (
        ("general.type", "adapter"),
        ("general.architecture", report.header.architecture or ""),
        ("adapter.type", "lora"),
    ):
        found = _text(header, key, path)
        if found != expected:
            raise UnsupportedModelError(
                "opening a LoRA adapter", path=path, key=key, found=found, expected=expected
            )
    alpha = header.kv.get("adapter.lora.alpha")
    if alpha is not None and alpha.type is not ValueType.F32:
        raise FormatError(
            "opening a LoRA adapter",
            path=path,
            key="adapter.lora.alpha",
            found=alpha.type.name,
            expected="F32",
        )
    if "adapter.alora.invocation_tokens" in header.kv:
        raise UnsupportedModelError(
            "opening a LoRA adapter",
            path=path,
            key="adapter.alora.invocation_tokens",
            found="an adapter that begins at a token",
            expected="one that holds for all of them",
        )
    weights = {tensor.upstream_name: tensor.dims for tensor in report.header.tensors}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in header.tensors:
        name, _, part = tensor.name.rpartition(".lora_")
        if part not in ("a", "b") or name not in weights:
            raise UnsupportedModelError(
                "opening a LoRA adapter",
                path=path,
                tensor=tensor.name,
                found="a tensor that would not be applied",
                expected="the name of a weight of this model, and .lora_a or .lora_b",
            )
        if not _is_applied(name, report.header.architecture):
            raise UnsupportedModelError(
                "opening a LoRA adapter: upstream's graph multiplies this weight without adapters",
                path=path,
                tensor=tensor.name,
                hint="Merge it into the weights, or train the adapter on other weights.",
            )
        if tensor.type.name not in _TYPES:
            raise UnsupportedModelError(
                "opening a LoRA adapter",
                path=path,
                tensor=tensor.name,
                found=tensor.type.name,
                expected=", ".join(_TYPES),
            )
        parts.setdefault(name, {})[part] = tensor.dims
    if not parts:
        raise UnsupportedModelError("opening a LoRA adapter", path=path, found="no tensors")
    for name, pair in parts.items():
        _check_dims(name, weights[name], pair, path)


def _is_applied(name: str, architecture: str | None) -> bool:
    stem = name.removesuffix(".weight")
    if architecture != "deepseek4":
        return not stem.endswith("_norm")
    return (name.endswith(".weight") and stem.partition("blk.")[2].partition(".")[2] in _DEEPSEEK4) or (
        stem == "token_embd"
    )


def _check_dims(name: str, weight: tuple[int, ...], pair: Mapping[str, tuple[int, ...]], path: Path) -> None:
    a, b = (_padded(pair.get(part, ())) for part in ("a", "b"))
    n_in, n_out, *more = _padded(weight)
    if name.startswith("token_embd."):  # looked up by rows, not multiplied
        n_in, n_out = n_out, n_in
        fits = a[1] == n_in and b[1] == n_out and a[0] == b[0]
    else:
        fits = a[0] == n_in and b[1] == n_out and a[1] == b[0]
    if len(pair) != 2 or not fits or list(a[2:]) != more or list(b[2:]) != more:
        raise TensorShapeError(
            "opening a LoRA adapter",
            path=path,
            tensor=name,
            found=f"lora_a {list(pair.get('a', ()))}, lora_b {list(pair.get('b', ()))}",
            expected=f"two matrices whose product is {list(weight)}",
            hint="The adapter is of another model.",
        )


def _padded(dims: tuple[int, ...]) -> tuple[int, ...]:
    return (*dims, *(1,) * (4 - len(dims)))


class LoraAdapter:
    """Owner of one adapter; made by ``Llama.load_lora``.

    Args:
        path: GGUF file.
        model: Stays referenced as long as the adapter lives.
        report: Of the model's header.

    Attributes:
        path: As given.
        digest: Of the whole file, 16 hex digits.

    Raises:
        UnsupportedModelError, TensorShapeError, FormatError: The file does not fit the model, or has tensors that
            upstream's graph does not apply.
        ModelLoadError: The engine refused it.
    """

    def __init__(self, path: str | os.PathLike[str], model: Model, report: HeaderReport) -> None:
        self.path = Path(path)
        _check(report, self.path)
        self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        self._model = model
        pointer = lib.llama_adapter_lora_init(model.pointer, encode_path(path))
        check_ptr(pointer, "loading the LoRA adapter", ModelLoadError, path=path)
        self._pointer: Any = ffi.gc(pointer, lib.llama_adapter_lora_free)

    @property
    def pointer(self) -> Any:
        """The ``llama_adapter_lora *``; None once it is freed."""
        return self._pointer

    def __repr__(self) -> str:
        return f"<LoraAdapter {self.path.name}>"

    def close(self) -> None:
        """Free it. Idempotent; no context may use it any more."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
