"""Files that memory cannot hold: whether that is so, and how much of the chosen experts came from the disk.

The engine announces the experts of a token to the system as soon as they are chosen (`Llama(page_experts=...)`), so
that their pages are read many at once and nothing else is; the system's page cache keeps those that are used often.
The announcements themselves are native.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._native import ffi, lib
from .header import HeaderReport
from .machine import available_bytes
from .warmup import RESERVE_BYTES

__all__ = ["PagingCounts", "fits_in_memory", "paging_counts"]


@dataclass(frozen=True)
class PagingCounts:
    """What was announced in this process so far, by all models.

    Attributes:
        n_bytes: Bytes of chosen experts, in whole pages.
        n_bytes_missing: How many of them were not in the page cache then. Systems may hide this for files that the user
            neither owns nor may write: then it stays 0.
    """

    n_bytes: int
    n_bytes_missing: int

    @property
    def hit_rate(self) -> float:
        """Part of the chosen experts' bytes that was in memory; 1 while nothing was announced."""
        return 1.0 - self.n_bytes_missing / self.n_bytes if self.n_bytes else 1.0

    def since(self, earlier: PagingCounts) -> PagingCounts:
        """Return what was added after `earlier`."""
        return PagingCounts(self.n_bytes - earlier.n_bytes, self.n_bytes_missing - earlier.n_bytes_missing)


def paging_counts() -> PagingCounts:
    """Return this process's counts."""
    n_bytes, n_bytes_missing = ffi.new("int64_t *"), ffi.new("int64_t *")
    lib.pyl_paging_counts(n_bytes, n_bytes_missing)
    return PagingCounts(int(n_bytes[0]), int(n_bytes_missing[0]))


def fits_in_memory(report: HeaderReport) -> bool:
    """Return whether free and reclaimable memory holds all tensors of a file and leaves room for everything else."""
    available = available_bytes()
    n_bytes = sum(tensor.n_bytes for tensor in report.header.tensors)
    return available is None or n_bytes <= available - RESERVE_BYTES
