"""One GGUF file's header, parsed by the rules of the engine's own parser.

It owns the byte level of a single file (or shard): what is accepted, what is refused, and in which order,
are those of ``ggml/src/gguf.cpp:gguf_init_from_reader``, so that both name the same first offender. Lengths
and counts in the file are never trusted: nothing is allocated beyond bytes that are really there, and arrays
are skipped and read when asked for. Shards, dialects and what a model needs are left to ``header``.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, Final, overload

from .errors import (
    FormatError,
    ModelFileError,
    ModelNotFoundError,
    NotGGUFError,
    PyllamaError,
    TruncatedFileError,
)
from .gguf_types import (
    FILE_TYPES,
    TYPE_42,
    FileType,
    TensorInfo,
    Type42,
    resolve_type42,
    unreadable_type42,
)
from .gguf_types import Q2_0 as PROVISIONAL_42

__all__ = ["ArrayValue", "GGUFFile", "KeyValue", "ValueType", "parse_gguf"]

# limits of gguf.cpp; the two sizes are those of its records on 64-bit systems
_MAGIC: Final = b"GGUF"
_MAX_VERSION: Final = 3
_MAX_STRING: Final = 1 << 30
_MAX_ARRAY: Final = 1 << 30
_MAX_TENSORS: Final = (2**64 - 1) // 344
_MAX_KEYS: Final = (2**64 - 1) // 88
_MAX_NAME: Final = 64
_MAX_DIMS: Final = 4
_INT64_MAX: Final = 2**63 - 1
_SIZE_MAX: Final = 2**64 - 1
_DEFAULT_ALIGNMENT: Final = 32
_LENGTH_BYTES: Final = 8  # in front of every string

_CHUNK: Final = 1 << 20
_RESUME: Final = "The file is damaged or its download was interrupted; fetch it again."
_DAMAGED: Final = "The file is damaged; fetch or convert it again."
_FOREIGN: Final = (
    "The file is damaged, or made for an engine with types of its own: some DeepSeek-V4 files keep their FP8"
    " codes that way; use the software that made it."
)


class ValueType(IntEnum):
    """Types of metadata values, numbered as in the file."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STR = 8
    ARR = 9
    U64 = 10
    I64 = 11
    F64 = 12

    def __str__(self) -> str:
        return self.name.lower()


_FORMATS: Final = {
    ValueType.U8: "B",
    ValueType.I8: "b",
    ValueType.U16: "H",
    ValueType.I16: "h",
    ValueType.U32: "I",
    ValueType.I32: "i",
    ValueType.F32: "f",
    ValueType.BOOL: "?",
    ValueType.U64: "Q",
    ValueType.I64: "q",
    ValueType.F64: "d",
}
_SIZES: Final = {type_: struct.calcsize("<" + code) for type_, code in _FORMATS.items()}


class ArrayValue(Sequence[Any]):
    """A metadata array; its items are read from the file when first asked for, then kept.

    Attributes:
        item_type: Type of the items.
        n_bytes: Bytes the items occupy in the file.
    """

    def __init__(self, item_type: ValueType, n: int, path: str, start: int, n_bytes: int) -> None:
        self.item_type = item_type
        self.n_bytes = n_bytes
        self._n = n
        self._path = path
        self._start = start
        self._items: list[Any] | None = None

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._load()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._load())

    def __repr__(self) -> str:
        return f"<array of {self._n:,} {self.item_type}>"

    def byte_strings(self) -> list[bytes]:
        """Return the items of a string array as stored."""
        data = self._read()
        items, pos = [], 0
        for _ in range(self._n):
            (length,) = struct.unpack_from("<Q", data, pos)
            items.append(data[pos + 8 : pos + 8 + length])
            pos += 8 + length
        return items

    def _load(self) -> list[Any]:
        if self._items is None:
            if self.item_type is ValueType.STR:
                self._items = [item.decode("utf-8", "replace") for item in self.byte_strings()]
            else:
                self._items = list(struct.unpack(f"<{self._n}{_FORMATS[self.item_type]}", self._read()))
        return self._items

    def _read(self) -> bytes:
        with _open(self._path) as (file, _):
            file.seek(self._start)
            data = file.read(self.n_bytes)
        if len(data) != self.n_bytes:
            raise TruncatedFileError(
                "the file became shorter while it was read",
                path=self._path,
                hint="Do not write to it meanwhile.",
            )
        return data


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry.

    Attributes:
        type: Its GGUF type; ``ValueType.ARR`` for arrays.
        value: int, float, bool, str or ``ArrayValue``.
    """

    type: ValueType
    value: Any

    @property
    def type_name(self) -> str:
        """The type as people write it: ``u32``, ``arr[str]``."""
        return f"arr[{self.value.item_type}]" if self.type is ValueType.ARR else str(self.type)


@dataclass(frozen=True)
class GGUFFile:
    """The parsed header of one file.

    Attributes:
        path: The file.
        size: Its size in bytes.
        version: GGUF version, 2 or 3.
        kv: Metadata by key, in file order.
        alignment: ``general.alignment``, or 32.
        data_start: Offset of the data section.
        infos_end: Where the tensor infos end; zeros pad from there to the data section.
        kv_spans: First byte and end of each metadata entry, key, type and value together.
        tensors: Tensor infos in file order; offsets are relative to ``data_start``.
        types: The type of each tensor, type 42 resolved.
        type42: How each tensor of type 42 was resolved, by index.
    """

    path: str
    size: int
    version: int
    kv: dict[str, KeyValue]
    alignment: int
    data_start: int
    infos_end: int
    kv_spans: dict[str, tuple[int, int]]
    tensors: tuple[TensorInfo, ...]
    types: tuple[FileType, ...]
    type42: dict[int, Type42] = field(default_factory=dict)


def parse_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Parse the header of one GGUF file, without looking at its data.

    Missing or trailing data is no error here, as in the engine's parser.

    Raises:
        ModelNotFoundError: No such file.
        ModelFileError: Not a regular file, or not readable.
        NotGGUFError: Empty, no magic, a version or byte order that is not supported.
        TruncatedFileError: The file ends inside its header.
        Type42Error: The offsets do not add up after a type-42 tensor whose stride fits no supported format.
        FormatError: Anything else that the engine's parser refuses.
    """
    path = os.fspath(path)
    with _open(path) as (file, size):
        return _Parser(file, path, size).parse()


@contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Yield a regular file and its size; whatever the system refuses becomes a named error."""
    attempted = "cannot read the model file"
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise _not_a_file(path, info.st_mode)
        with open(path, "rb", buffering=0) as file:
            yield file, info.st_size
    except PyllamaError:
        raise
    except FileNotFoundError:
        raise ModelNotFoundError(attempted, path=path, found="no such file", hint=_nearby(path)) from None
    except OSError as error:
        raise ModelFileError(attempted, path=path, found=error.strerror or str(error)) from error
    except ValueError as error:  # a NUL byte in the path
        raise ModelFileError(attempted, path=repr(path), found=str(error)) from error


def _not_a_file(path: str, mode: int) -> ModelFileError:
    is_dir = stat.S_ISDIR(mode)
    return ModelFileError(
        "cannot read the model file",
        path=path,
        found="a directory" if is_dir else "something that is not a regular file",
        expected="a GGUF file",
        hint=_nearby(os.path.join(path, "")) if is_dir else "Save the data to a file first.",
    )


def _nearby(path: str) -> str:
    """Name the GGUF files in the folder of a path that could not be opened."""
    folder = Path(path).parent if not path.endswith(os.sep) else Path(path)
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".gguf")
    except OSError:
        return f"There is no folder '{folder}' either."
    if not names:
        return f"There is no .gguf file in '{folder}'."
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"'{folder}' has: {', '.join(names[:5])}{more}."


class _Parser:
    """A bounded cursor over one file, and the parse in the order of gguf.cpp."""

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._chunk = b""
        self._chunk_start = 0
        self._pos = 0
        self._kv_spans: dict[str, tuple[int, int]] = {}

    # bytes

    def _take(self, n: int, what: str) -> bytes:
        begin = self._pos - self._chunk_start
        if begin + n > len(self._chunk):
            self._file.seek(self._pos)
            self._chunk = self._read_fully(max(n, _CHUNK))
            self._chunk_start = self._pos
            begin = 0
            if len(self._chunk) < n:
                raise self._truncated(what, n)
        self._pos += n
        return self._chunk[begin : begin + n]

    def _read_fully(self, n: int) -> bytes:
        # one read of a raw file may return less than asked for
        parts = []
        while n > 0 and (part := self._file.read(n)):
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _skip(self, n: int, what: str) -> None:
        if n > self._size - self._pos:
            raise self._truncated(what, n)
        self._pos += n

    def _scalar(self, code: str, what: str) -> Any:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))
        return value

    def _string(self, what: str) -> bytes:
        length = self._scalar("Q", what)
        self._check_string_length(length, what)
        return self._take(length, what)

    def _check_string_length(self, length: int, what: str) -> None:
        if length > _MAX_STRING:
            raise self._error(
                f"{what} is too long", found=f"{length:,} bytes", expected=f"at most {_MAX_STRING:,}"
            )
        if length > self._size - self._pos:
            raise self._truncated(what, length)

    # errors

    def _truncated(self, what: str, n: int) -> TruncatedFileError:
        return TruncatedFileError(
            f"the file ends inside {what}",
            path=self._path,
            found=f"{self._size - self._pos:,} bytes left at offset {self._pos:,}",
            expected=f"at least {n:,}",
            hint=_RESUME,
        )

    def _error(
        self,
        attempted: str,
        *,
        tensor: str | None = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
        hint: str = _DAMAGED,
    ) -> FormatError:
        return FormatError(
            attempted,
            path=self._path,
            tensor=tensor or None,  # an empty name names nothing
            key=key or None,
            found=found,
            expected=expected,
            hint=hint,
        )

    # the parse

    def parse(self) -> GGUFFile:
        version, n_tensors, n_keys = self._header()
        kv = self._metadata(n_keys)
        alignment = self._alignment(kv)
        tensors = self._tensor_infos(n_tensors)
        infos_end = self._pos
        if n_tensors > 0:
            padding = -self._pos % alignment
            self._skip(padding, "the padding before the data section")
        data_start = self._pos
        type42 = resolve_type42(tensors, self._size - data_start, alignment)
        types = tuple(
            type42[i].type if i in type42 else FILE_TYPES[tensor.type_id] for i, tensor in enumerate(tensors)
        )
        for verdict in type42.values():
            if verdict.breaks_offsets:
                raise unreadable_type42(verdict, path=self._path)
        self._check_offsets(tensors, types, alignment)
        return GGUFFile(
            path=self._path,
            size=self._size,
            version=version,
            kv=kv,
            alignment=alignment,
            data_start=data_start,
            infos_end=infos_end,
            kv_spans=self._kv_spans,
            tensors=tuple(tensors),
            types=types,
            type42=type42,
        )

    def _header(self) -> tuple[int, int, int]:
        if self._size < len(_MAGIC):
            raise NotGGUFError(
                "the file is empty" if self._size == 0 else "the file is too short for a GGUF file",
                path=self._path,
                found=f"{self._size} bytes",
                expected="a GGUF file",
                hint="The download may not have started; fetch it again.",
            )
        magic = self._take(len(_MAGIC), "the magic")
        if magic != _MAGIC:
            raise NotGGUFError(
                "this is not a GGUF file",
                path=self._path,
                found=f"it starts with {magic!r}",
                expected=repr(_MAGIC),
                hint=_other_format_hint(self._path, magic),
            )
        version = self._scalar("I", "the version")
        if version & 0xFFFF == 0:
            raise self._bad_version(version, "It may be a big-endian file; convert it to little endian.")
        if version == 1:
            raise self._bad_version(
                version, "GGUF version 1 is no longer supported; convert the model again."
            )
        if version > _MAX_VERSION:
            raise self._bad_version(version, "The file is newer than this package, or damaged.")
        n_tensors = self._scalar("q", "the number of tensors")
        if not 0 <= n_tensors <= _MAX_TENSORS:
            raise self._error("the number of tensors is impossible", found=f"{n_tensors:,}")
        n_keys = self._scalar("q", "the number of metadata keys")
        if not 0 <= n_keys <= _MAX_KEYS:
            raise self._error("the number of metadata keys is impossible", found=f"{n_keys:,}")
        return version, n_tensors, n_keys

    def _bad_version(self, version: int, hint: str) -> NotGGUFError:
        found = f"version {version}" if version <= 0xFFFF else f"version 0x{version:08x}"
        return NotGGUFError(
            "cannot read this GGUF version",
            path=self._path,
            found=found,
            expected="version 2 or 3",
            hint=hint,
        )

    def _metadata(self, n: int) -> dict[str, KeyValue]:
        kv: dict[str, KeyValue] = {}
        seen: set[bytes] = set()
        for i in range(n):
            start = self._pos
            raw = self._string(f"the name of metadata key {i}")
            if not raw:
                raise self._error(f"the name of metadata key {i} is empty")
            key = _text(raw)
            if raw in seen:
                raise self._error(f"metadata key {i} is a duplicate", key=key)
            seen.add(raw)
            value = self._value(key)
            # the engine looks keys up as C strings and takes the first match
            kv.setdefault(key, value)
            self._kv_spans.setdefault(key, (start, self._pos))
        return kv

    def _value(self, key: str) -> KeyValue:
        what = f"the value of metadata key '{key}'"
        type_ = self._value_type(what)
        if type_ is not ValueType.ARR:
            return KeyValue(self._checked_type(type_, key), self._plain_value(type_, what))
        item_type = self._value_type(what)
        n = self._scalar("Q", what)
        return KeyValue(type_, self._array(self._checked_type(item_type, key), n, what))

    def _value_type(self, what: str) -> ValueType | int:
        number = self._scalar("i", what)
        return ValueType(number) if 0 <= number < len(ValueType) else number

    def _checked_type(self, type_: ValueType | int, key: str) -> ValueType:
        if not isinstance(type_, ValueType) or type_ is ValueType.ARR:
            raise self._error("a metadata key has an invalid value type", key=key, found=f"type {int(type_)}")
        return type_

    def _plain_value(self, type_: ValueType | int, what: str) -> Any:
        if type_ is ValueType.STR:
            return self._string(what).decode("utf-8", "replace")
        return self._scalar(_FORMATS[ValueType(type_)], what)

    def _array(self, item_type: ValueType, n: int, what: str) -> ArrayValue:
        if n > _MAX_ARRAY:
            raise self._truncated(what, n)  # the engine's parser gives up in the same way
        if item_type is not ValueType.STR:
            start = self._pos
            self._skip(n * _SIZES[item_type], what)
            return ArrayValue(item_type, n, self._path, start, self._pos - start)
        if n * _LENGTH_BYTES > self._size - self._pos:
            raise self._truncated(what, n * _LENGTH_BYTES)
        start = self._pos
        self._skip_strings(n, what)
        return ArrayValue(item_type, n, self._path, start, self._pos - start)

    def _skip_strings(self, n: int, what: str) -> None:
        # a vocabulary has 10^5 of them: stay inside the current chunk as long as possible
        unpack_length = struct.Struct("<Q").unpack_from
        for _ in range(n):
            begin = self._pos - self._chunk_start
            if begin + _LENGTH_BYTES <= len(self._chunk):
                (length,) = unpack_length(self._chunk, begin)
                self._pos += _LENGTH_BYTES
            else:
                length = self._scalar("Q", what)
            if length > _MAX_STRING or length > self._size - self._pos:
                self._check_string_length(length, what)
            self._skip(length, what)

    def _alignment(self, kv: dict[str, KeyValue]) -> int:
        key = "general.alignment"
        entry = kv.get(key)
        if entry is None:
            return _DEFAULT_ALIGNMENT
        if entry.type is not ValueType.U32:
            raise self._error(
                "a metadata key has the wrong type", key=key, found=entry.type_name, expected="u32"
            )
        alignment = int(entry.value)
        if alignment == 0 or alignment & (alignment - 1) != 0:
            raise self._error(
                "the alignment is impossible", key=key, found=alignment, expected="a power of two"
            )
        return alignment

    def _tensor_infos(self, n: int) -> list[TensorInfo]:
        tensors: list[TensorInfo] = []
        seen: set[bytes] = set()
        for i in range(n):
            raw = self._string(f"the name of tensor {i}")
            if len(raw) >= _MAX_NAME:
                raise self._error(
                    f"the name of tensor {i} is too long",
                    found=f"{len(raw):,} bytes",
                    expected=f"at most {_MAX_NAME - 1}",
                )
            name = _text(raw)
            if raw in seen:
                raise self._error("two tensors have the same name", tensor=name)
            seen.add(raw)
            dims = self._dims(name)
            type_id = self._type_id(name, dims)
            tensors.append(TensorInfo(name, dims, type_id, self._scalar("Q", f"the info of tensor '{name}'")))
        return tensors

    def _dims(self, name: str) -> tuple[int, int, int, int]:
        what = f"the info of tensor '{name}'"
        n_dims = self._scalar("I", what)
        if n_dims > _MAX_DIMS:
            raise self._error(
                "a tensor has too many dimensions", tensor=name, found=n_dims, expected=f"at most {_MAX_DIMS}"
            )
        dims = [1] * _MAX_DIMS
        for j in range(n_dims):
            dims[j] = self._scalar("q", what)
            if dims[j] < 0:
                raise self._error("a tensor has a negative dimension", tensor=name, found=dims[j])
        n_elements = dims[0]
        for dim in dims[1:]:
            # the engine's arithmetic: a zero dimension in front hides an overflow behind it
            if dim > 1 and _INT64_MAX // dim < n_elements:
                raise self._error("a tensor has too many elements", tensor=name, found=_shape(dims))
            n_elements *= dim
        return dims[0], dims[1], dims[2], dims[3]

    def _type_id(self, name: str, dims: tuple[int, int, int, int]) -> int:
        type_id = int(self._scalar("i", f"the info of tensor '{name}'"))
        # which 42 it is cannot be told before all offsets are known: Q2_0 has the smallest block of the three
        type_ = PROVISIONAL_42 if type_id == TYPE_42 else FILE_TYPES.get(type_id)
        if type_ is None:
            raise self._error(
                "a tensor has an unknown type",
                tensor=name,
                found=f"type id {type_id}",
                expected="a known type id",
                hint=_FOREIGN,
            )
        if dims[0] % type_.block != 0:
            raise self._error(
                f"the rows of a {type_.name} tensor are not whole blocks",
                tensor=name,
                found=f"ne0 = {dims[0]:,}",
                expected=f"a multiple of {type_.block}",
            )
        n_blocks = dims[0] * dims[1] * dims[2] * dims[3] // type_.block
        if n_blocks > _SIZE_MAX // type_.block_bytes:
            raise self._error("a tensor is too big", tensor=name, found=_shape(dims))
        return type_id

    def _check_offsets(
        self, tensors: Sequence[TensorInfo], types: Sequence[FileType], alignment: int
    ) -> None:
        """Require every tensor to start where the padded sizes of those before it end."""
        expected = 0
        for tensor, type_ in zip(tensors, types, strict=True):
            if tensor.offset != expected:
                raise self._error(
                    "a tensor does not start where the one before it ends",
                    tensor=tensor.name,
                    found=f"offset {tensor.offset:,}",
                    expected=f"{expected:,}",
                )
            size = type_.n_bytes(tensor.n_elements)
            padded = (size + alignment - 1) // alignment * alignment
            if size > _SIZE_MAX - (alignment - 1) or padded > _SIZE_MAX - expected:
                raise self._error("the data section is too big", tensor=tensor.name, found=f"{size:,} bytes")
            expected += padded


def _text(raw: bytes) -> str:
    # names are C strings to the engine
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _shape(dims: Sequence[int]) -> str:
    return " x ".join(f"{dim:,}" for dim in dims)


def _other_format_hint(path: str, magic: bytes) -> str:
    if path.endswith(".safetensors"):
        return "This is a hub checkpoint; convert its folder: pyllama-dsv4 convert FOLDER --outfile F."
    if magic in (b"<!DO", b"<htm", b"vers"):
        return "It looks like a web page or a Git LFS pointer instead of the file; download it again."
    if magic in (b"FUGG", b"ggjt", b"ggml", b"lmgg", b"tjgg"):
        return "It is a GGML file of an older or foreign kind; convert the model again."
    return "Give the path of a .gguf file."
