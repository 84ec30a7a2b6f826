"""Writing a model in another type, with upstream's quantiser.

Owns the names of types, what is checked before a run (so that nothing in the engine asserts), importance matrices, and
the output's life as ``NAME.partial``. Which tensor gets which type is the quantiser's choice; the hooks that keep a
native file's dialect and report progress are in ``native/llama/dsv4-quant.h``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ._native import check, encode_path, ffi, lib, log_tail, run_cancellable, text
from .convert.run import not_enough_space
from .convert.writer import PARTIAL_SUFFIX, check_output_path, lock_file, sync_folder
from .errors import (
    ArgumentError,
    ConvertError,
    DialectError,
    DiskFullError,
    FormatError,
    MemoryLimitError,
    ModelFileError,
    UnsupportedModelError,
)
from .gguf_types import FILE_TYPES
from .header import Header, HeaderReport, check_header, read_header
from .machine import n_cpus
from .tensors import ARCHITECTURE, native_to_upstream

__all__ = [
    "QuantizeResult",
    "QuantizedTensor",
    "load_imatrix",
    "quantize",
    "quantize_types",
]

Dialect = Literal["keep", "native", "upstream"]
Imatrix = Mapping[str, npt.NDArray[np.float32]]
Progress = Callable[[int, int, str], Any]

NATIVE_TYPE: Final = "F8_E4M3_MXFP4"
_ALIASES: Final = {
    "moe-f8-e4m3-mxfp4": NATIVE_TYPE,
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
}
_RELEASED_TYPES: Final = frozenset({"F8_E4M3_B128", "MXFP4"})
"""What the checkpoint itself is in: quantising from these loses no more than from F16."""
_MAX_BUFFER_BYTES: Final = 256 << 20
"""Rows of one tensor that are in memory at once, in all forms together."""
_SUM_SUFFIX: Final = ".in_sum2"
_COUNT_SUFFIX: Final = ".counts"


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor of the output.

    Attributes:
        name: In the output's dialect.
        type_in: Type in the input.
        type_out: Type in the output.
        n_bytes_in: Bytes in the input.
        n_bytes_out: Bytes in the output, without padding.
    """

    name: str
    type_in: str
    type_out: str
    n_bytes_in: int
    n_bytes_out: int


@dataclass(frozen=True)
class QuantizeResult:
    """What was written, or what a dry run would write.

    Attributes:
        path: The output file.
        type: Name of the file type.
        input_dialect: ``native`` or ``upstream``; None for models other than DeepSeek-V4.
        dialect: The output's.
        tensors: In file order.
        n_bytes_in: Size of the input, all shards together.
        n_bytes: Size of the output.
        n_bytes_free: Free space for it, measured beforehand.
        needs_imatrix: Whether the type needs an importance matrix that was not given; only a dry run says so.
        duration_s: Seconds spent; 0 for a dry run.
        is_dry_run: Whether nothing was written.
    """

    path: Path
    type: str
    input_dialect: str | None
    dialect: str | None
    tensors: tuple[QuantizedTensor, ...]
    n_bytes_in: int
    n_bytes: int
    n_bytes_free: int
    needs_imatrix: bool
    duration_s: float
    is_dry_run: bool

    @property
    def fits(self) -> bool:
        """Whether the disk had room for the file."""
        return self.n_bytes <= self.n_bytes_free

    @property
    def n_tensors_by_type(self) -> dict[str, int]:
        return dict(Counter(tensor.type_out for tensor in self.tensors))

    @property
    def n_bytes_by_type(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for tensor in self.tensors:
            total[tensor.type_out] += tensor.n_bytes_out
        return dict(total)


def quantize_types() -> dict[str, int]:
    """Return the file types that the quantiser writes: name to the engine's number. Names are upstream's."""
    prefix = "LLAMA_FTYPE_MOSTLY_"
    types = {"F32": int(lib.LLAMA_FTYPE_ALL_F32)}
    types |= {
        name.removeprefix(prefix): int(getattr(lib, name)) for name in dir(lib) if name.startswith(prefix)
    }
    known = {name: ftype for name, ftype in types.items() if lib.pyl_quantize_knows(ftype)}
    return dict(sorted(known.items(), key=lambda item: item[1]))


def quantize(
    infile: str | os.PathLike[str],
    outfile: str | os.PathLike[str],
    type: str,
    *,
    dialect: Dialect = "keep",
    n_threads: int | None = None,
    imatrix: Imatrix | str | os.PathLike[str] | None = None,
    allow_requantize: bool | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> QuantizeResult:
    """Write a model in another type.

    The output gets its name when it is complete; until then it is ``NAME.partial`` and begins with zeros. An existing
    file is replaced at that moment. Shards are joined.

    Args:
        infile: GGUF file of any architecture the engine knows; the first shard of a split model.
        outfile: The file to write.
        type: Key of ``quantize_types``, in any case; ``F8_E4M3_MXFP4`` (also ``moe-f8-e4m3-mxfp4``) is the native mix:
            dense weights F8_E4M3_B128, routed experts MXFP4, the rest as in the native file.
        dialect: Names and keys of a DeepSeek-V4 output: ``keep`` those of the input, ``native`` or ``upstream``.
        n_threads: By default one per CPU this process may use.
        imatrix: Importance of each column by tensor name, or a GGUF file of them: see ``load_imatrix``. The types below
            three bits need it.
        allow_requantize: Take quantised tensors as input. None allows it for types of the released checkpoint.
        progress: Called as ``progress(bytes_done, bytes_total, tensor_name)`` about every 50 ms; returning False
            cancels.
        dry_run: Check everything and compute all sizes, but write nothing.

    Raises:
        ArgumentError: An argument is out of range or contradicts the file.
        ModelNotFoundError, ModelFileError, FormatError and its subclasses: the input.
        UnsupportedModelError: The engine does not know the architecture.
        DialectError: A dialect was asked for that the model does not have.
        DiskFullError: There is not enough space; nothing is left of the file.
        MemoryLimitError: Not enough memory.
        CancelledError: `progress` returned False.
        ConvertError: The quantiser refused, or another process is writing the same file.
    """
    ftype_name, ftype = _file_type(type)
    n_threads = n_cpus() if n_threads is None else n_threads
    if not 1 <= n_threads <= 1024:
        raise _bad_argument("n_threads", n_threads, "1 to 1024")
    if dialect not in _DIALECTS:
        raise _bad_argument("dialect", repr(dialect), ", ".join(_DIALECTS))
    path = check_output_path(outfile)
    header = _checked_input(infile)
    if any(path.exists() and path.samefile(shard.path) for shard in header.shards):
        raise _bad_argument("outfile", str(path), "another file than the input")
    if dialect != "keep" and header.architecture != ARCHITECTURE:
        raise DialectError(
            "only DeepSeek-V4 has dialects",
            path=header.path,
            found=f"architecture {header.architecture!r}",
            expected=repr(ARCHITECTURE),
            hint="Leave the dialect out.",
        )
    if imatrix is not None and not isinstance(imatrix, Mapping):
        imatrix = load_imatrix(imatrix)
    run = _Run(header, ftype, dialect, n_threads, imatrix)

    report, needs_imatrix = run.plan()
    tensors = tuple(
        QuantizedTensor(
            t["name"], t["type_in"].upper(), t["type_out"].upper(), t["n_bytes_in"], t["n_bytes_out"]
        )
        for t in report["tensors"]
    )
    _check_requantizing(header, tensors, allow_requantize)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    n_bytes_free = shutil.disk_usage(path.parent).free + (partial.stat().st_size if partial.exists() else 0)
    duration_s = 0.0
    if not dry_run:
        if needs_imatrix:
            raise _bad_argument("imatrix", "none", f"an importance matrix, which {ftype_name} needs")
        if report["n_bytes"] > n_bytes_free:
            raise not_enough_space(path, report["n_bytes"], n_bytes_free)
        start_s = time.monotonic()
        with _partial_file(partial):
            run.write(partial, report["n_bytes"], _fractions(progress, report["n_bytes"], tensors))
            os.replace(partial, path)
            sync_folder(path.parent)
        duration_s = time.monotonic() - start_s
    return QuantizeResult(
        path=path,
        type=ftype_name,
        input_dialect=report["input_dialect"],
        dialect=report["dialect"],
        tensors=tensors,
        n_bytes_in=header.n_file_bytes,
        n_bytes=report["n_bytes"],
        n_bytes_free=n_bytes_free,
        needs_imatrix=needs_imatrix,
        duration_s=duration_s,
        is_dry_run=dry_run,
    )


_DIALECTS: Final = {
    "keep": lib.PYL_DIALECT_KEEP,
    "native": lib.PYL_DIALECT_NATIVE,
    "upstream": lib.PYL_DIALECT_UPSTREAM,
}


def _bad_argument(key: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError("cannot quantise", key=key, found=found, expected=expected)


def _file_type(name: str) -> tuple[str, int]:
    types = quantize_types()
    names = {known.upper(): known for known in types} | {
        alias.upper(): known for alias, known in _ALIASES.items()
    }
    found = names.get(name.upper())
    if found is None:
        raise _bad_argument("type", repr(name), ", ".join([*types, *_ALIASES]))
    return found, types[found]


def _checked_input(path: str | os.PathLike[str]) -> Header:
    """Check the input as before a load, and refuse architectures that the engine does not know."""
    header = read_header(path)
    is_other = header.architecture not in (None, ARCHITECTURE)
    if is_other and not lib.pyl_knows_architecture((header.architecture or "").encode("utf-8")):
        raise UnsupportedModelError(
            "the engine does not know this architecture",
            path=header.path,
            key="general.architecture",
            found=repr(header.architecture),
        )
    report: HeaderReport = check_header(header, any_architecture=is_other)
    return report.header


def _check_requantizing(
    header: Header, tensors: tuple[QuantizedTensor, ...], allow_requantize: bool | None
) -> None:
    if allow_requantize:
        return
    blocks = {t.name: t.block for t in FILE_TYPES.values()} | {"Q2_0": 64}
    fine = _RELEASED_TYPES if allow_requantize is None else frozenset()
    for tensor in tensors:
        is_quantized = blocks.get(tensor.type_in, 1) > 1
        if is_quantized and tensor.type_in != tensor.type_out and tensor.type_in not in fine:
            raise ArgumentError(
                "quantising a quantised tensor again loses more than necessary",
                path=header.path,
                tensor=tensor.name,
                key="allow_requantize",
                found=tensor.type_in,
                expected="F32, F16, BF16 or a type of the released checkpoint",
                hint="Start from the original file, or allow it.",
            )


# --- importance -----------------------------------------------------------------------------------


def load_imatrix(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Read an importance matrix as llama.cpp's ``llama-imatrix`` writes it (GGUF).

    Returns:
        By tensor name the mean square of each input column: ``(n_columns,)``, or ``(n_experts * n_columns,)`` for
        stacked experts; float32.

    Raises:
        ModelNotFoundError, ModelFileError, FormatError: The file.
    """
    header = read_header(path)
    values: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in header.tensors:
        if not tensor.name.endswith(_SUM_SUFFIX):
            continue
        name = tensor.name.removesuffix(_SUM_SUFFIX)
        sums = _f32_values(header, tensor.name)
        counts = _f32_values(header, name + _COUNT_SUFFIX)
        if counts.size == 0 or sums.size % counts.size != 0:
            raise FormatError(
                "an importance matrix has sums that do not belong to its counts",
                path=header.path,
                tensor=tensor.name,
                found=f"{sums.size} sums, {counts.size} counts",
                expected="a multiple",
            )
        rows = sums.reshape(counts.size, -1)
        counts = counts[:, None]
        # experts that were never used count as if all columns mattered alike, as upstream has it
        means = np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1))
        values[name] = np.ascontiguousarray(means.reshape(-1), np.float32)
    if not values:
        raise FormatError(
            "this is no importance matrix",
            path=header.path,
            found=f"no tensor whose name ends in {_SUM_SUFFIX}",
            hint="llama-imatrix writes them with --output-format gguf.",
        )
    return values


def _f32_values(header: Header, name: str) -> npt.NDArray[np.float32]:
    tensor = header.tensor(name)
    if tensor is None or tensor.type.name != "F32":
        raise FormatError(
            "an importance matrix lacks a tensor",
            path=header.path,
            tensor=name,
            found="none" if tensor is None else tensor.type.name,
            expected="F32",
        )
    with open(header.shards[tensor.shard].path, "rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.n_bytes)
    if len(data) != tensor.n_bytes:
        raise FormatError("the file ends before the tensor does", path=header.path, tensor=name)
    return np.frombuffer(data, "<f4").astype(np.float32)


# --- the run --------------------------------------------------------------------------------------


class _Run:
    """One call of the quantiser and what has to outlive it."""

    def __init__(
        self, header: Header, ftype: int, dialect: Dialect, n_threads: int, imatrix: Imatrix | None
    ) -> None:
        self._path = header.path
        self._dialect = _DIALECTS[dialect]
        self._has_imatrix = imatrix is not None
        self._monitor = ffi.new("struct pyl_monitor *")
        self._params = lib.llama_model_quantize_default_params()
        self._params.ftype = ftype
        self._params.nthread = n_threads
        self._params.allow_requantize = True  # checked here, with a reason
        self._params.max_buf_size = _MAX_BUFFER_BYTES
        self._keep: list[Any] = []
        if imatrix is not None:
            self._params.imatrix = self._imatrix(header, imatrix)

    def _imatrix(self, header: Header, imatrix: Imatrix) -> Any:
        entries = ffi.new("struct llama_model_imatrix_data[]", len(imatrix) + 1)  # the last one stays empty
        for entry, (name, given) in zip(entries, imatrix.items(), strict=False):
            values = np.ascontiguousarray(given, np.float32).reshape(-1)
            tensor = header.tensor(name)
            if tensor is not None:
                n = tensor.dims[0] * (tensor.dims[2] if len(tensor.dims) > 2 else 1)
                if values.size != n:
                    raise ArgumentError(
                        "an importance matrix does not fit its tensor",
                        tensor=name,
                        key="imatrix",
                        found=f"{values.size} values",
                        expected=n,
                    )
            if not np.isfinite(values).all() or (values < 0).any():
                raise ArgumentError(
                    "an importance matrix has values that are no weights",
                    tensor=name,
                    key="imatrix",
                    found="a negative or non-finite value",
                    expected="0 or more",
                )
            c_name = ffi.new("char[]", native_to_upstream(name).encode("utf-8"))
            c_values = ffi.from_buffer("float[]", values)
            self._keep += [c_name, c_values, values]
            entry.name, entry.data, entry.size = c_name, c_values, values.size
        self._keep.append(entries)
        return entries

    def plan(self) -> tuple[dict[str, Any], bool]:
        """Return what would be written, and whether the quantiser misses an importance matrix."""
        self._params.dry_run = True
        report = self._call(None, None)
        return report, not self._has_imatrix and any(
            "require an imatrix" in line for line in log_tail(clear=True)
        )

    def write(self, partial: Path, n_bytes: int, on_poll: Callable[[float], bool] | None) -> None:
        """Write the output and check that it is complete."""
        self._params.dry_run = False
        self._call(partial, None if on_poll is None else lambda: on_poll(float(self._monitor.progress)))
        if on_poll is not None:
            on_poll(1.0)
        if partial.stat().st_size != n_bytes:
            raise _not_written(partial)
        fd = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            raise _not_written(partial) from error
        finally:
            os.close(fd)
        check_header(partial, any_architecture=True)

    def _call(self, out: Path | None, on_poll: Callable[[], bool] | None) -> dict[str, Any]:
        log_tail(clear=True)
        c_in = ffi.new("char[]", encode_path(self._path))
        c_out = ffi.new("char[]", b"" if out is None else encode_path(out))
        c_report = ffi.new("char **")

        def work() -> int:
            return int(lib.pyl_quantize(c_in, c_out, self._params, self._dialect, self._monitor, c_report))

        status = run_cancellable(work, self._monitor, on_poll)
        try:
            if status == lib.PYL_ERROR:
                raise self._error(out)
            check(status, "quantising", path=self._path)
            report: dict[str, Any] = json.loads(text(c_report[0]))
        finally:
            lib.pyl_string_free(c_report[0])
        return report

    def _error(self, out: Path | None) -> Exception:
        """Return the exception for what the quantiser logged as its reason."""
        lines = log_tail(clear=True)
        mark = "failed to quantize: "
        reason = next(
            (line.split(mark)[1].strip() for line in reversed(lines) if mark in line), "no reason given"
        )
        if out is not None and ("cannot be written" in reason or "iostream" in reason):
            return _not_written(out)
        if "bad_alloc" in reason:
            return MemoryLimitError(
                "not enough memory to quantise",
                path=self._path,
                hint="Fewer threads need less.",
                native_log=lines,
            )
        if "invalid data" in reason:
            name = reason.split("'")[1] if "'" in reason else None
            return FormatError(
                "a tensor has values that are no numbers, or scales that no quantiser writes",
                path=self._path,
                tensor=name,
                hint="The file is damaged: fetch or convert it again.",
            )
        return ConvertError(f"the quantiser gave up: {reason}", path=self._path, native_log=lines)


def _not_written(partial: Path) -> DiskFullError:
    return DiskFullError(
        "the output could not be written to its end; nothing of it is left",
        path=partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX)),
        found=f"{shutil.disk_usage(partial.parent).free:,} bytes free",
        hint="The disk, a quota or a file size limit is exhausted.",
    )


@contextmanager
def _partial_file(partial: Path) -> Iterator[None]:
    """Create and lock the partial file; remove it if the body does not rename it."""
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise ModelFileError(
            "cannot create the output file", path=partial, found=error.strerror or str(error)
        ) from error
    try:
        lock_file(fd, partial)
        try:
            yield
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise
    finally:
        os.close(fd)


def _fractions(
    progress: Progress | None, n_bytes: int, tensors: tuple[QuantizedTensor, ...]
) -> Callable[[float], bool] | None:
    """Return a callback that turns the fraction done into bytes and the tensor at work."""
    if progress is None:
        return None
    ends = list(accumulate(tensor.n_bytes_out for tensor in tensors))

    def report(fraction: float) -> bool:
        n_done = n_bytes if fraction >= 1 else int(fraction * n_bytes)
        name = tensors[min(bisect_right(ends, n_done), len(tensors) - 1)].name if tensors else ""
        return progress(n_done, n_bytes, name) is not False

    return report
