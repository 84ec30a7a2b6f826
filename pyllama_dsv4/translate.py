"""Translation of DeepSeek-V4 files between the native and the upstream dialect, and for engines without FP8.

It owns which keys change on the way and how the way back is remembered; names are ``tensors``', the derivation of
keys ``model_keys``', the container ``convert.writer``'s. Tensor data is copied byte for byte, except the FP8
tensors when ``dense`` asks for another type.

    from pyllama_dsv4.translate import translate

    translate("flash-native.gguf", "flash-q8.gguf", to="upstream", dense="q8_0")

What is added is listed in the file under ``RECORD``, and what is replaced is kept beside it, so that translating
back gives the bytes of the original: same keys in the same order, same tensors. Not kept are what no reader sees:
GGUF version 2, bytes behind the last tensor, padding that is not zero, another ``general.alignment`` than 32,
and the division into shards.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from .convert.template import Generation, chat_template
from .convert.writer import (
    Job,
    MetadataEntry,
    OutputFile,
    OutputTensor,
    Progress,
    ValueType,
    check_output_path,
    header_bytes,
    lay_out,
    write_tensors,
)
from .errors import ArgumentError, DiskFullError, FormatError
from .formats import generation_of_file
from .gguf_file import ArrayValue, KeyValue
from .gguf_types import F8_E4M3_B128, FILE_TYPES, FileType
from .header import Header, HeaderReport, Tensor, check_header
from .inspect import V4_TEMPLATE_MARK
from .model_keys import read_model_keys
from .tensor_data import Bytes, DataReader
from .tensors import ARCHITECTURE, native_to_upstream, upstream_to_native

__all__ = ["DENSE_TYPES", "DIALECTS", "RECORD", "TranslateResult", "translate"]

Target = Literal["upstream", "native"]
Dense = Literal["q8_0", "bf16"]

DIALECTS: Final[tuple[Target, ...]] = ("upstream", "native")
DENSE_TYPES: Final[tuple[Dense, ...]] = ("q8_0", "bf16")

RECORD: Final = "pyllama_dsv4.translated"
"""Prefix of the keys that remember a translation: ``.from``, ``.added``, and ``.was.KEY`` for a replaced value."""

_FROM: Final = f"{RECORD}.from"
_ADDED: Final = f"{RECORD}.added"
_WAS: Final = f"{RECORD}.was."

_TEMPLATE: Final = "tokenizer.chat_template"
_FILE_TYPE: Final = "general.file_type"
_ALIGNMENT_KEY: Final = "general.alignment"
MXFP4_MOE: Final = 38
"""``general.file_type`` of upstream's own conversions. Source: upstream ``include/llama.h:llama_ftype``."""

_DENSE_FILE_TYPES: Final[dict[Dense, FileType]] = {"q8_0": FILE_TYPES[8], "bf16": FILE_TYPES[30]}

PIECE_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class TranslateResult:
    """What was written, or would be.

    Attributes:
        path: The output file.
        n_bytes: Its size.
        n_tensors: Tensors in it.
        n_renamed: Tensors whose name changed.
        n_reencoded: Tensors whose type changed; the data of all others is copied.
        added: Keys that were added.
        replaced: Keys whose value changed.
        removed: Keys that were removed.
        notes: What the user should know, one sentence each.
        duration_s: Seconds spent on tensor data; 0 for a dry run.
        is_dry_run: Whether nothing was written.
    """

    path: Path
    n_bytes: int
    n_tensors: int
    n_renamed: int
    n_reencoded: int
    added: Sequence[str]
    replaced: Sequence[str]
    removed: Sequence[str]
    notes: Sequence[str]
    duration_s: float
    is_dry_run: bool


def translate(
    infile: str | os.PathLike[str],
    outfile: str | os.PathLike[str],
    *,
    to: Target,
    dense: Dense | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> TranslateResult:
    """Rewrite a DeepSeek-V4 file in another dialect.

    Args:
        infile: A file of either dialect, or the first shard of a split model.
        outfile: The file to write; an existing one is replaced when the new one is complete.
        to: ``upstream`` for the names and keys of stock llama.cpp, ``native`` for those of native files.
        dense: Type for the FP8 tensors: ``q8_0`` or ``bf16``, which stock engines know; None keeps them.
        n_threads: Worker threads; by default one per core this process may use.
        progress: Called as ``progress(bytes_done, bytes_total, tensor_name)`` after each piece; returning False
            cancels.
        dry_run: Check everything and compute all sizes, but write nothing.

    Raises:
        FormatError: Or a subclass: the input is not a sound DeepSeek-V4 file, or an FP8 tensor has values that
            are no numbers.
        ModelFileError: A file cannot be read or written.
        ArgumentError: An argument is out of range, or the output is an input.
        DiskFullError: There is not enough space; nothing is left of the output.
        CancelledError: ``progress`` returned False.
    """
    if to not in DIALECTS:
        raise ArgumentError("unknown dialect", key="to", found=repr(to), expected=" or ".join(DIALECTS))
    if dense is not None and dense not in DENSE_TYPES:
        raise ArgumentError(
            "unknown type for dense weights",
            key="dense",
            found=repr(dense),
            expected=" or ".join(DENSE_TYPES),
        )
    if n_threads is not None and not 1 <= n_threads <= 1024:
        raise ArgumentError(
            "cannot use so many threads", key="n_threads", found=n_threads, expected="1 to 1024"
        )
    report = check_header(infile)
    header = report.header
    path = check_output_path(outfile)
    if any(path.exists() and path.samefile(shard.path) for shard in header.shards):
        raise ArgumentError(
            "the output file is an input file", key="outfile", found=str(path), expected="another name"
        )
    rename = native_to_upstream if to == "upstream" else upstream_to_native
    plan = [(tensor, rename(tensor.name), _target_type(tensor, dense)) for tensor in header.tensors]
    n_reencoded = sum(type_ != tensor.type for tensor, _, type_ in plan)
    infos = lay_out((name, t.dims, type_.id, type_.n_bytes(t.n_elements)) for t, name, type_ in plan)
    keys = _Keys(report)
    keys.translate(to)
    if n_reencoded:
        keys.replace(MetadataEntry(_FILE_TYPE, "u32", MXFP4_MOE), is_recorded=False)
    front = header_bytes(keys.entries(), infos)
    n_bytes = len(front) + sum((info.n_bytes + 31) // 32 * 32 for info in infos)
    duration_s = 0.0
    if not dry_run:
        free = shutil.disk_usage(path.parent).free
        if n_bytes > free:
            raise DiskFullError(
                "there is not enough space for the output file",
                path=path,
                found=f"{free:,} bytes free",
                expected=f"{n_bytes:,}",
                hint="Free some space, or write to another disk; nothing was written",
            )
        start_s = time.monotonic()
        with DataReader(header) as reader, OutputFile(path, front) as out:
            write_tensors(
                out,
                (
                    (info, _jobs(reader, tensor, type_))
                    for info, (tensor, _, type_) in zip(infos, plan, strict=True)
                ),
                n_threads=_default_n_threads() if n_threads is None else n_threads,
                n_bytes_total=sum(info.n_bytes for info in infos),
                progress=progress,
            )
            out.commit()
        duration_s = time.monotonic() - start_s
    return TranslateResult(
        path=path,
        n_bytes=n_bytes,
        n_tensors=len(infos),
        n_renamed=sum(name != tensor.name for tensor, name, _ in plan),
        n_reencoded=n_reencoded,
        added=keys.added,
        replaced=keys.replaced,
        removed=keys.removed,
        notes=_notes(header, to, dense, infos, n_reencoded),
        duration_s=duration_s,
        is_dry_run=dry_run,
    )


def _notes(
    header: Header, to: Target, dense: Dense | None, infos: Sequence[OutputTensor], n_reencoded: int
) -> list[str]:
    notes = []
    if header.dialect == to:
        notes.append(f"the file is of the {to} dialect already: names stay")
    if dense is not None and n_reencoded == 0:
        notes.append("the file has no FP8 tensors: all weights stay")
    n_fp8 = sum(info.type_id == F8_E4M3_B128.id for info in infos)
    if to == "upstream" and n_fp8:
        notes.append(
            f"{n_fp8} tensors stay F8_E4M3_B128 (type 42), which stock llama.cpp takes for another type;"
            " for stock engines give dense q8_0 or bf16"
        )
    return notes


def _target_type(tensor: Tensor, dense: Dense | None) -> FileType:
    is_fp8 = tensor.type == F8_E4M3_B128
    return _DENSE_FILE_TYPES[dense] if dense is not None and is_fp8 else tensor.type


# --- data -----------------------------------------------------------------------------------------------


def _jobs(reader: DataReader, tensor: Tensor, type_: FileType) -> Iterator[Job]:
    row_bytes = tensor.type.n_bytes(tensor.dims[0])
    if type_ == tensor.type:
        n_bytes = tensor.n_bytes
        for start in range(0, n_bytes, PIECE_BYTES):
            yield partial(reader.read_tensor, tensor, start, min(PIECE_BYTES, n_bytes - start))
        return
    n_rows, step = tensor.n_elements // tensor.dims[0], max(1, PIECE_BYTES // 4 // row_bytes)
    for row in range(0, n_rows, step):
        yield partial(_reencoded, reader, tensor, type_, row * row_bytes, min(step, n_rows - row))


def _reencoded(reader: DataReader, tensor: Tensor, type_: FileType, start: int, n_rows: int) -> Bytes:
    import gguf

    from . import _codec

    row_bytes = tensor.type.n_bytes(tensor.dims[0])
    blocks = reader.read_tensor(tensor, start, n_rows * row_bytes).reshape(n_rows, row_bytes)
    values = _codec.f8_e4m3_b128_decode(blocks, n_threads=1)
    is_bad = ~np.isfinite(values)
    if is_bad.any():
        row, column = (int(i) for i in np.argwhere(is_bad)[0])
        raise FormatError(
            "cannot re-encode a value that is no number",
            path=reader.header.shards[tensor.shard].path,
            tensor=tensor.name,
            found=f"{values[row, column]} in row {start // row_bytes + row:,}, column {column:,}",
            expected="a finite number",
            hint="The file is damaged; pyllama-dsv4 verify says where.",
        )
    encoded: Bytes = gguf.quantize(values, gguf.GGMLQuantizationType(type_.id))
    return encoded.view(np.uint8).reshape(-1)


# --- keys -----------------------------------------------------------------------------------------------


class _Keys:
    """The metadata on its way: entries in order, as bytes of the input or as new ones."""

    def __init__(self, report: HeaderReport) -> None:
        self._report = report
        self._header = report.header
        self._entries: dict[str, MetadataEntry | bytes] = _raw_entries(self._header)
        self.added: list[str] = []
        self.replaced: list[str] = []
        self.removed: list[str] = []
        for key in list(self._entries):
            if key.startswith("split.") or key == _ALIGNMENT_KEY:
                self._remove(key)

    def entries(self) -> list[MetadataEntry | bytes]:
        """Return all entries, in order."""
        return list(self._entries.values())

    def translate(self, to: Target) -> None:
        """Change what the target dialect wants changed."""
        kv = self._header.kv
        origin = kv.get(_FROM)
        if origin is not None and origin.value == to:
            self._undo(to)
            return
        if origin is not None or self._header.dialect == to:
            return  # its record leads back; a second one would hide it
        self._add_all(self._wanted(to))
        if to == "upstream":
            self._replace_template()
        if self.added or self.replaced:
            self._entries[_FROM] = MetadataEntry(_FROM, "str", self._header.dialect)
            self._entries[_ADDED] = MetadataEntry(_ADDED, "str[]", self.added)

    def replace(self, entry: MetadataEntry, *, is_recorded: bool) -> None:
        """Give a key another value in its place, or add it; its old value is kept if it is to be recorded."""
        if entry.key not in self._entries:
            self._add_all([entry])
            return
        if is_recorded:
            self._entries[_WAS + entry.key] = _renamed(self._entries[entry.key], _WAS + entry.key)
        self._entries[entry.key] = entry
        self.replaced.append(entry.key)

    def _remove(self, key: str) -> None:
        del self._entries[key]
        if not key.startswith(RECORD):
            self.removed.append(key)

    def _add_all(self, entries: Sequence[MetadataEntry]) -> None:
        for entry in entries:
            if entry.key not in self._entries:
                self._entries[entry.key] = entry
                self.added.append(entry.key)

    def _wanted(self, to: Target) -> list[MetadataEntry]:
        """Return the keys that readers of the target dialect want; those that are there will not be touched."""
        if to == "upstream":
            return [_entry(key, value) for key, value in self._report.derived_keys.items()]
        hp = self._report.hparams
        assert hp is not None
        prefix = f"{ARCHITECTURE}."
        return [
            MetadataEntry(prefix + "vocab_size", "u32", hp.n_vocab),
            MetadataEntry(prefix + "rope.freq_base_swa", "f32", hp.compress_rope_theta),
            MetadataEntry(prefix + "leading_dense_block_count", "u32", 0),
        ]

    def _replace_template(self) -> None:
        """Write V4's template where the loader of native files would use it instead of the file's own."""
        kv = self._header.kv
        own = kv.get(_TEMPLATE)
        has_vocabulary = "tokenizer.ggml.tokens" in kv
        if own is None and not has_vocabulary:
            return
        if own is not None and V4_TEMPLATE_MARK in str(own.value):
            return
        generation: Generation = "0731" if generation_of_file(self._header) == "0731" else "preview"
        self.replace(MetadataEntry(_TEMPLATE, "str", chat_template(generation)), is_recorded=True)

    def _undo(self, to: Target) -> None:
        """Take back what the translation from this dialect added and replaced."""
        kv = self._header.kv
        listed = kv.get(_ADDED)
        names = list(listed.value) if listed is not None and isinstance(listed.value, ArrayValue) else []
        keep = self._changed_since(names, to)
        for key in names:
            if key in self._entries and key not in keep:
                self._remove(key)
        for key in [key for key in self._entries if key.startswith(_WAS)]:
            original = key.removeprefix(_WAS)
            if original in self._entries:
                self._entries[original] = _renamed(self._entries[key], original)
                self.replaced.append(original)
            del self._entries[key]
        for key in (_FROM, _ADDED):
            self._entries.pop(key, None)

    def _changed_since(self, names: Sequence[str], to: Target) -> set[str]:
        """Return those added keys whose value is no longer what a reader of the target would derive."""
        if to != "native":
            return set()  # what is added on the way to native repeats other keys
        kv = {key: entry for key, entry in self._header.kv.items() if key not in names}
        dims = {upstream_to_native(tensor.name): tensor.dims for tensor in self._header.tensors}
        derived = read_model_keys(kv, dims, path=self._header.path).derived
        return {
            key
            for key in names
            if key in self._header.kv
            and key != _TEMPLATE
            and not _is_equal(self._header.kv[key], derived.get(key))
        }


def _is_equal(entry: KeyValue, value: Any) -> bool:
    own = list(entry.value) if isinstance(entry.value, ArrayValue) else entry.value
    if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
        return bool(np.array_equal(np.asarray(own, np.float32), np.asarray(value, np.float32)))
    return bool(own == value)


def _raw_entries(header: Header) -> dict[str, MetadataEntry | bytes]:
    """Read all entries of the first shard as they stand in the file."""
    shard = header.shards[0]
    with DataReader(replace(header, shards=(shard,))) as reader:
        return {
            key: reader.read(0, start, end - start).tobytes() for key, (start, end) in shard.kv_spans.items()
        }


def _renamed(entry: MetadataEntry | bytes, key: str) -> MetadataEntry | bytes:
    """Return an entry under another key."""
    if isinstance(entry, MetadataEntry):
        return replace(entry, key=key)
    raw = key.encode("utf-8", "surrogateescape")
    n_old = int.from_bytes(entry[:8], "little")
    return len(raw).to_bytes(8, "little") + raw + entry[8 + n_old :]


def _entry(key: str, value: Any) -> MetadataEntry:
    """Give a derived value the type that the format has for it."""
    kind: ValueType
    if isinstance(value, list):
        kind = "f32[]" if value and isinstance(value[0], float) else "i32[]"
    elif isinstance(value, float):
        kind = "f32"
    else:
        kind = "str" if isinstance(value, str) else "u32"
    return MetadataEntry(key, kind, value)


def _default_n_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
