"""What a model file is, as plain data: the substance of ``pyllama-dsv4 inspect``.

It owns the description, whose keys are stable; checks are ``header``'s, formatting for people is the command's.
Nothing here reads tensor data or loads the engine.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Final

from .errors import FormatError
from .formats import engines, form_of, generation_of_file
from .gguf_file import ArrayValue, KeyValue, ValueType
from .gguf_types import TYPE_42
from .header import Header, HeaderReport, Tensor, check_header, read_header

__all__ = ["describe", "inspect_file"]

_FILE_TYPE_41: Final = {"F8_E4M3_B128": "MOSTLY_F8_E4M3_MXFP4", "Q2_0": "MOSTLY_Q2_0"}
"""``general.file_type`` 41 has two meanings; the one of type 42 in the same file tells which."""

V4_TEMPLATE_MARK: Final = "dsml_token"
"""In every chat template of DeepSeek-V4, and what the engine selects its tool-call parser by."""


def inspect_file(path: str | os.PathLike[str], *, tensors: str | None = None) -> dict[str, Any]:
    """Check a GGUF file of any architecture and describe it.

    Args:
        path: The file; the first shard of a split model.
        tensors: List the tensors whose name matches: a pattern with ``*``, ``?`` or ``[]``, else a part of the
            name. Names of both dialects are looked at. None lists no tensors.

    Returns:
        See ``describe``.

    Raises:
        ModelFileError: The file cannot be read.
        FormatError: Or a subclass: as ``header.check_header``.
    """
    header = read_header(path)
    try:
        return describe(check_header(header, any_architecture=True), tensors=tensors)
    except FormatError as error:
        form = form_of(header)
        if form is None or form.is_runnable:
            raise  # damage, not a form of its own
        return describe(HeaderReport(header, None, {}), tensors=tensors, refusal=str(error))


def describe(
    report: HeaderReport, *, tensors: str | None = None, refusal: str | None = None
) -> dict[str, Any]:
    """Describe a checked file, or one of a known form that this package does not run.

    Args:
        report: The header's check; one without hyper-parameters if the file was refused.
        tensors: As for ``inspect_file``.
        refusal: Why the file was refused.

    Returns:
        A dictionary of JSON types. Sizes are in bytes. Keys:

        - ``path``, ``n_file_bytes``, ``shards`` (``path``, ``n_bytes``), ``gguf_version``, ``alignment``,
          ``data_start``, ``n_trailing_bytes`` (behind the last tensor of any shard)
        - ``architecture``, ``name``, ``dialect`` (native, upstream, other), ``context_length``
        - ``form``: ``name``, ``description``, ``is_runnable`` of a known form of DeepSeek-V4 (``formats.FORMS``),
          None for other models; ``generation``: ``preview`` or ``0731``, None for other models
        - ``engines``: ``engine``, ``opens`` (None: not known), ``why``
        - ``file_type``, ``file_type_name`` (where it is known)
        - ``n_tensors``, ``n_params``, ``n_tensor_bytes``
        - ``types``: by bytes, the largest first: ``name``, ``id`` (as in the file), ``n_tensors``, ``n_params``,
          ``n_bytes``
        - ``type_42``: None without such tensors, else ``n_tensors`` by meaning in ``verdicts``, and ``example``,
          the first one: ``tensor``, ``verdict``, ``basis``, ``n_elements``, ``n_bytes_available``, ``sizes`` (by
          claimant, None where the rows rule it out)
        - ``keys``: ``n_present``, ``present`` (name to type), ``derived`` (name to value)
        - ``hparams``: the model's dimensions and constants, None for other architectures
        - ``vocabulary``: ``model``, ``pre``, ``n_tokens``; None where absent
        - ``chat_template``: ``is_present``, ``n_chars``, ``is_v4``, ``is_replaced`` (when loaded)
        - ``tensors``, if asked for: ``name``, ``upstream_name``, ``dims`` (ne0 first), ``type``, ``shard``,
          ``offset`` (from the start of that file), ``n_bytes``
    """
    header = report.header
    info: dict[str, Any] = {
        "path": header.path,
        "n_file_bytes": header.n_file_bytes,
        "shards": [{"path": shard.path, "n_bytes": shard.size} for shard in header.shards],
        "gguf_version": header.shards[0].version,
        "alignment": header.alignment,
        "data_start": header.data_start,
        "n_trailing_bytes": _n_trailing_bytes(header),
        "architecture": header.architecture,
        "name": _value(header, "general.name", ValueType.STR),
        "dialect": report.dialect,
        "form": None if (form := form_of(header)) is None else form._asdict(),
        "generation": generation_of_file(header),
        "engines": [engine.to_json() for engine in engines(report, refusal)],
        "context_length": _value(header, f"{header.architecture}.context_length", ValueType.U32),
        "file_type": _value(header, "general.file_type", ValueType.U32),
        "file_type_name": _file_type_name(header),
        "n_tensors": len(header.tensors),
        "n_params": report.n_params,
        "n_tensor_bytes": sum(report.type_bytes.values()),
        "types": _types(report),
        "type_42": _type_42(header),
        "keys": {
            "n_present": len(header.kv),
            "present": {key: entry.type_name for key, entry in header.kv.items()},
            "derived": report.derived_keys,
        },
        "hparams": None if report.hparams is None else asdict(report.hparams),
        "vocabulary": {
            "model": _value(header, "tokenizer.ggml.model", ValueType.STR),
            "pre": _value(header, "tokenizer.ggml.pre", ValueType.STR),
            "n_tokens": _n_tokens(header.kv.get("tokenizer.ggml.tokens")),
        },
        "chat_template": _chat_template(report),
    }
    if tensors is not None:
        info["tensors"] = [_tensor(tensor) for tensor in header.tensors if _matches(tensor, tensors)]
    return info


def _value(header: Header, key: str, type_: ValueType) -> Any:
    entry = header.kv.get(key)
    return entry.value if entry is not None and entry.type is type_ else None


def _n_trailing_bytes(header: Header) -> int:
    used = [shard.data_start for shard in header.shards]
    for tensor in header.tensors:
        alignment = header.shards[tensor.shard].alignment
        end = (tensor.offset + tensor.n_bytes + alignment - 1) // alignment * alignment
        used[tensor.shard] = max(used[tensor.shard], header.shards[tensor.shard].data_start + end)
    return sum(max(0, shard.size - n) for shard, n in zip(header.shards, used, strict=True))


def _file_type_name(header: Header) -> str | None:
    if _value(header, "general.file_type", ValueType.U32) != 41:
        return None
    verdicts = {tensor.type.name for tensor in header.tensors if tensor.type42 is not None}
    return _FILE_TYPE_41.get(verdicts.pop()) if len(verdicts) == 1 else None


def _types(report: HeaderReport) -> list[dict[str, Any]]:
    ids = {tensor.type.name: tensor.type.id for tensor in report.header.tensors}
    n_params: Counter[str] = Counter()
    for tensor in report.header.tensors:
        n_params[tensor.type.name] += tensor.n_elements
    return [
        {
            "name": name,
            "id": ids[name],
            "n_tensors": report.type_counts[name],
            "n_params": n_params[name],
            "n_bytes": n_bytes,
        }
        for name, n_bytes in sorted(report.type_bytes.items(), key=lambda item: -item[1])
    ]


def _type_42(header: Header) -> dict[str, Any] | None:
    resolved = [tensor.type42 for tensor in header.tensors if tensor.type42 is not None]
    if not resolved:
        return None
    first = resolved[0]
    return {
        "id": TYPE_42,
        "verdicts": dict(Counter(verdict.type.name for verdict in resolved)),
        "example": {
            "tensor": first.tensor.name,
            "verdict": first.type.name,
            "basis": first.basis.value,
            "n_elements": first.tensor.n_elements,
            "n_bytes_available": first.avail,
            "sizes": first.sizes,
        },
    }


def _n_tokens(entry: KeyValue | None) -> int | None:
    return len(entry.value) if entry is not None and isinstance(entry.value, ArrayValue) else None


def _chat_template(report: HeaderReport) -> dict[str, Any]:
    text = _value(report.header, "tokenizer.chat_template", ValueType.STR)
    is_v4 = text is not None and V4_TEMPLATE_MARK in text
    has_place = text is not None or "tokenizer.ggml.tokens" in report.header.kv
    return {
        "is_present": text is not None,
        "n_chars": None if text is None else len(text),
        "is_v4": is_v4,
        "is_replaced": report.dialect == "native" and not is_v4 and has_place,
    }


def _matches(tensor: Tensor, pattern: str) -> bool:
    names = (tensor.name, tensor.upstream_name)
    if any(char in pattern for char in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(pattern in name for name in names)


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "upstream_name": tensor.upstream_name,
        "dims": list(tensor.dims),
        "type": tensor.type.name,
        "shard": tensor.shard,
        "offset": tensor.start,
        "n_bytes": tensor.n_bytes,
    }
