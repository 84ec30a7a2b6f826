"""Verification of a model file: structure, values, and on request a checkpoint or a manifest beside it.

It owns the one pass over the data: every byte is read once, by several threads, a piece per thread at a time,
whatever is asked for. What a piece must look like is ``value_checks``', the pairing with a checkpoint
``checkpoint_compare``'s, sums ``manifest``'s. Never loads the engine::

    from pyllama_dsv4.verify import verify

    report = verify("flash.gguf", against="DeepSeek-V4-Flash")
    for finding in report.findings:
        print(finding)
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

from .checkpoint_compare import Comparison, Pair
from .errors import ArgumentError, CancelledError, FormatError
from .findings import CHECKS, Finding, Findings
from .formats import form_of
from .gguf_file import GGUFFile, ValueType
from .header import Header, HeaderReport, Tensor, check_header, read_header
from .manifest import (
    Manifest,
    ManifestShard,
    ManifestTensor,
    check_against,
    read_manifest,
    write_manifest,
)
from .tensor_data import DataReader
from .value_checks import ValueChecker, rows_per_piece, values_are_checked

__all__ = ["CHECKS", "Finding", "Progress", "VerifyReport", "verify"]

Progress = Callable[[int, int, str], object]
"""Called with bytes checked, bytes in all, and a tensor in work; returning False cancels."""

MAX_THREADS: Final = 64
"""A thread holds some 12 MiB; more of them would not be faster than the memory."""


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification.

    Attributes:
        path: The file, its first shard.
        dialect: ``native``, ``upstream``, ``mixed`` or ``other``.
        n_tensors: Tensors in the file.
        n_bytes: Bytes of tensor data that were read from the file.
        n_bytes_checkpoint: Bytes of the checkpoint that were compared.
        n_tensors_compared: Tensors compared with the checkpoint.
        findings: What was found, errors first.
        notes: What the user should know, one sentence each.
        manifest: Sums of the file; None unless asked for.
        duration_s: Seconds that reading and checking data took.
    """

    path: str
    dialect: str
    n_tensors: int
    n_bytes: int
    n_bytes_checkpoint: int
    n_tensors_compared: int
    findings: Sequence[Finding]
    notes: Sequence[str]
    manifest: Manifest | None
    duration_s: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; warnings do not count."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types: the attributes, ``ok``, and ``findings`` as objects of theirs.

        The sums of a manifest are left out; they have a file of their own.
        """
        return {
            "ok": self.ok,
            "path": self.path,
            "dialect": self.dialect,
            "n_tensors": self.n_tensors,
            "n_bytes": self.n_bytes,
            "n_bytes_checkpoint": self.n_bytes_checkpoint,
            "n_tensors_compared": self.n_tensors_compared,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
            "duration_s": round(self.duration_s, 3),
        }


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    check_manifest: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a GGUF file, every byte of it.

    Memory stays at a few pieces of 2 MiB per thread. Files of any architecture are accepted; what is special to
    DeepSeek-V4 is checked for it alone.

    Args:
        path: The file, or the first shard of a split model.
        against: Folder of the checkpoint it was made from: compare every tensor, both ways.
        manifest: Write the sums of all tensors to this file, if nothing is wrong.
        check_manifest: Compare the sums of all tensors with those of this file.
        n_threads: Threads; by default one per core this process may use.
        progress: Called after each piece, from the calling thread; returning False cancels.

    Returns:
        What was found. A file that is only found wrong, however badly, gives a report, not an exception.

    Raises:
        ModelNotFoundError: The file, a shard, the checkpoint or the manifest to check does not exist.
        ModelFileError: One of them cannot be read.
        FormatError: The header cannot be parsed, or the manifest is none.
        CheckpointError: The checkpoint itself is malformed or incomplete.
        ArgumentError: ``n_threads`` is out of range.
        CancelledError: ``progress`` returned False.
    """
    n_threads = _default_n_threads() if n_threads is None else n_threads
    if not 1 <= n_threads <= 1024:
        raise ArgumentError(
            "cannot use so many threads", key="n_threads", found=n_threads, expected="1 to 1024"
        )
    wanted = None if check_manifest is None else read_manifest(check_manifest)
    header = read_header(path)
    findings = Findings()
    notes: list[str] = []
    report = _check_structure(header, findings, notes)
    with ExitStack() as stack:
        reader = stack.enter_context(DataReader(header))
        comparison = None
        if against is not None:
            comparison = stack.enter_context(Comparison(header, report, os.fspath(against), findings))
            notes += comparison.notes
        for i, shard in enumerate(header.shards):
            _check_padding(reader, i, shard.infos_end, shard.data_start, None, findings)
        work = _Work(reader, comparison, report, findings, has_sums=bool(manifest or wanted))
        start_s = time.monotonic()
        work.run(min(n_threads, MAX_THREADS), progress)
        duration_s = time.monotonic() - start_s
        notes += _unchecked(header)
        made = None
        if manifest is not None or wanted is not None:
            header_sums = [_header_sum(reader, i, shard) for i, shard in enumerate(header.shards)]
            if wanted is not None:
                notes += check_against(wanted, header, header_sums, work.sums, findings)
            made = _manifest(header, header_sums, work.sums)
    result = VerifyReport(
        path=header.path,
        dialect=header.dialect,
        n_tensors=len(header.tensors),
        n_bytes=work.n_bytes_done,
        n_bytes_checkpoint=0 if comparison is None else comparison.n_bytes,
        n_tensors_compared=0 if comparison is None else len(comparison.pairs),
        findings=findings.sorted([shard.path for shard in header.shards]),
        notes=notes,
        manifest=made,
        duration_s=duration_s,
    )
    if manifest is not None and made is not None and result.ok:
        write_manifest(manifest, made)
    return result


# --- structure ------------------------------------------------------------------------------------------


def _check_structure(header: Header, findings: Findings, notes: list[str]) -> HeaderReport | None:
    """Report what a load would refuse; return the header's check where there is nothing.

    Files of a known form that is not run here, such as draft models, are refused by every load and may be sound.
    """
    n_truncated = 0
    for tensor in header.tensors:
        shard = header.shards[tensor.shard]
        have = max(0, shard.size - tensor.start)
        if have < tensor.n_bytes:
            n_truncated += 1
            findings.add(
                Finding(
                    "truncated",
                    "error",
                    shard.path,
                    tensor=tensor.name,
                    offset=tensor.start,
                    found=f"{have:,} bytes before the end of the file",
                    expected=f"{tensor.n_bytes:,}",
                )
            )
    _check_trailing(header, findings)
    if n_truncated:
        return None  # the header check would stop at the first of them
    try:
        return check_header(header, any_architecture=True)
    except FormatError as error:
        form = form_of(header)
        if form is not None and not form.is_runnable:
            notes.append(
                f"the file is of the form {form.name} ({form.description}), which this package does not run:"
                " its keys and its list of tensors were not checked"
            )
            return None
        findings.add(
            Finding(
                "header",
                "error",
                error.path or header.path,
                tensor=error.tensor,
                key=error.key,
                found=f"{error.attempted}{'' if error.found is None else f' ({error.found})'}",
                expected="" if error.expected is None else str(error.expected),
            )
        )
        return None


def _check_trailing(header: Header, findings: Findings) -> None:
    for i, shard in enumerate(header.shards):
        ends = [t.start + t.n_bytes for t in header.tensors if t.shard == i]
        end = max(ends, default=shard.data_start)
        end += (shard.data_start - end) % shard.alignment
        if shard.size > end:
            findings.add(
                Finding(
                    "trailing",
                    "warning",
                    shard.path,
                    offset=end,
                    found=f"{shard.size - end:,} bytes behind the last tensor",
                    expected="the end of the file",
                )
            )


def _check_padding(
    reader: DataReader, i_shard: int, start: int, end: int, tensor: str | None, findings: Findings
) -> None:
    """Report bytes that are not zero behind a tensor, or behind the header if it is None."""
    path = reader.header.shards[i_shard].path
    end = min(end, reader.header.shards[i_shard].size)  # the last tensor's padding may be missing
    if end <= start:
        return
    is_set = reader.read(i_shard, start, end - start, tensor=tensor) != 0
    if is_set.any():
        at = int(is_set.argmax())
        byte = int(reader.read(i_shard, start + at, 1, tensor=tensor)[0])
        findings.add(
            Finding(
                "padding",
                "error",
                path,
                tensor=tensor,
                offset=start + at,
                where=f"padding behind the {'header' if tensor is None else 'tensor'}",
                found=f"byte {byte}",
                expected="0",
                n=int(is_set.sum()),
            )
        )


def _header_sum(reader: DataReader, i_shard: int, shard: GGUFFile) -> str:
    sum_ = hashlib.sha256()
    step = 1 << 20
    for start in range(0, shard.data_start, step):
        sum_.update(reader.read(i_shard, start, min(step, shard.data_start - start)).data)
    return sum_.hexdigest()


def _manifest(header: Header, header_sums: list[str], sums: dict[str, str]) -> Manifest:
    return Manifest(
        header.dialect,
        tuple(
            ManifestShard(os.path.basename(shard.path), shard.size, sum_)
            for shard, sum_ in zip(header.shards, header_sums, strict=True)
        ),
        tuple(
            ManifestTensor(t.name, t.type.name, t.dims, t.n_bytes, sums[t.name])
            for t in header.tensors
            if t.name in sums
        ),
    )


def _unchecked(header: Header) -> list[str]:
    counts = Counter(t.type.name for t in header.tensors if not values_are_checked(t))
    return [
        f"{n} tensors of type {name}: sizes and padding were checked, values were not"
        for name, n in sorted(counts.items())
    ]


# --- data -----------------------------------------------------------------------------------------------


class _Work:
    """The pass over the data: one task per tensor, so that a tensor's sum can be taken piece by piece."""

    def __init__(
        self,
        reader: DataReader,
        comparison: Comparison | None,
        report: HeaderReport | None,
        findings: Findings,
        *,
        has_sums: bool,
    ) -> None:
        self._reader = reader
        self._header = reader.header
        self._comparison = comparison
        self._findings = findings
        self._has_sums = has_sums
        self._n_expert = _n_expert(reader.header, report)
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()
        self.sums: dict[str, str] = {}
        self.n_bytes_done = 0

    def run(self, n_threads: int, progress: Progress | None) -> None:
        """Check all tensors; raise the first error of any task."""
        tensors = [t for t in self._header.tensors if self._is_complete(t)]
        n_total = sum(t.n_bytes for t in tensors)
        pool = ThreadPoolExecutor(n_threads, thread_name_prefix="verify")
        try:
            for tensor in tensors:
                pool.submit(self._task, tensor)
            n_open = len(tensors)
            while n_open:
                event = self._events.get()
                if event is None:
                    n_open -= 1
                elif isinstance(event, BaseException):
                    raise event
                else:
                    self.n_bytes_done += event[0]
                    if progress is not None and progress(self.n_bytes_done, n_total, event[1]) is False:
                        raise CancelledError("the verification was cancelled", path=self._header.path)
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _is_complete(self, tensor: Tensor) -> bool:
        return tensor.start + tensor.n_bytes <= self._header.shards[tensor.shard].size

    def _task(self, tensor: Tensor) -> None:
        try:
            self._check(tensor)
            self._events.put(None)
        except BaseException as error:
            self._events.put(error)

    def _check(self, tensor: Tensor) -> None:
        path = self._header.shards[tensor.shard].path
        pair = None if self._comparison is None else self._comparison.pairs.get(tensor.name)
        # beside the checkpoint, which knows whether zeros are right, they are only worth a look
        is_v4 = self._header.dialect != "other"
        checker = ValueChecker(
            tensor,
            path,
            self._n_expert,
            self._findings,
            holes="error" if is_v4 and pair is None else "warning",
        )
        sum_ = hashlib.sha256() if self._has_sums else None
        for start, n_bytes, matrix, row in _pieces(tensor, pair):
            if self._stop.is_set():
                return
            data = self._reader.read_tensor(tensor, start, n_bytes)
            checker.check(data, start)
            if sum_ is not None:
                sum_.update(data.data)
            if pair is not None and self._comparison is not None:
                self._comparison.compare(pair, data, start, matrix, row)
            self._events.put((n_bytes, tensor.name))
        checker.finish()
        end = tensor.start + tensor.n_bytes
        padded = end + (-tensor.n_bytes) % self._header.shards[tensor.shard].alignment
        _check_padding(self._reader, tensor.shard, end, padded, tensor.name, self._findings)
        if sum_ is not None:
            self.sums[tensor.name] = sum_.hexdigest()


def _pieces(tensor: Tensor, pair: Pair | None) -> Iterator[tuple[int, int, int, int]]:
    """Yield start, size, matrix and row of the pieces of a tensor; no piece crosses a matrix of a stack."""
    row_bytes = tensor.type.n_bytes(tensor.dims[0])
    if tensor.n_elements == 0 or row_bytes == 0:
        return
    n_rows = tensor.n_elements // tensor.dims[0]
    is_stack = len(tensor.dims) > 2
    if is_stack and pair is not None and not pair.spec.is_expert_stack:
        is_stack = False  # upstream's own saver writes one matrix as a stack of groups
    matrix_rows = tensor.dims[1] if is_stack else n_rows
    step = rows_per_piece(tensor, is_tiled=pair is not None and pair.spec.kind == "f8")
    for first in range(0, n_rows, matrix_rows):
        for row in range(0, matrix_rows, step):
            n = min(step, matrix_rows - row)
            yield (first + row) * row_bytes, n * row_bytes, first // matrix_rows, row


def _n_expert(header: Header, report: HeaderReport | None) -> int | None:
    if report is not None and report.hparams is not None:
        return report.hparams.n_expert
    entry = header.kv.get(f"{header.architecture}.expert_count")
    return int(entry.value) if entry is not None and entry.type is ValueType.U32 else None


def _default_n_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
