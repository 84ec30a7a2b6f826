"""What a check of a file found, in a form for people and programs.

It owns the names of all checks, the record of one finding and the collector that counts repetitions; the checks
themselves are ``verify``'s parts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

__all__ = ["CHECKS", "Finding", "Findings", "Severity"]

Severity = Literal["error", "warning"]

CHECKS: Final[dict[str, str]] = {
    "header": "the header is one that a load accepts: keys, names, dimensions, types, dialect",
    "truncated": "every tensor ends within its file",
    "padding": "bytes between tensors, and before the data section, are zero",
    "trailing": "nothing lies behind the last tensor (warning)",
    "scale_nan": "no scale byte is 255, NaN (FP8, MXFP4)",
    "scale_zero": "no scale byte is 0, 2^-127 (FP8, MXFP4; warning)",
    "code_nan": "no code is NaN, 0x7f or 0xff (FP8)",
    "tile": "the 128 rows of a 128x128 tile share their scale (FP8)",
    "hole": "no run of zeros as long as a disk page in quantised weights, no tensor of zeros"
    " (other models, or with a checkpoint: warning)",
    "zeros": "no run of zeros as long as a disk page in other weights (warning)",
    "not_finite": "no infinity and no NaN (F32, F16, BF16, scales of Q8_0)",
    "expert_id": "the routing table names experts that exist",
    "expert_twice": "the routing table names no expert twice for a token (warning)",
    "no_source": "every tensor has its source in the checkpoint",
    "not_in_file": "every tensor of the checkpoint is in the file",
    "shape": "the file's and the checkpoint's dimensions agree",
    "lossy": "every tensor has a type that can hold the checkpoint's values",
    "differs": "every tensor is bit for bit the checkpoint's",
    "key": "hyper-parameters, generation and vocabulary are the checkpoint's",
    "manifest_missing": "every tensor of the manifest is in the file",
    "manifest_extra": "every tensor of the file is in the manifest",
    "manifest_type": "types and dimensions are the manifest's",
    "sha256": "every tensor has the manifest's sum",
    "header_sha256": "every header has the manifest's sum",
    "size": "every file has the manifest's size",
}
"""Names of all checks, as in ``Finding.check``."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one tensor, key or file; repetitions within a tensor are counted.

    Attributes:
        check: Name of the check, a key of ``CHECKS``.
        severity: An ``error`` fails the verification, a ``warning`` is worth a look.
        path: File concerned.
        tensor: Name as spelled in the file; None for what belongs to no tensor.
        key: Metadata key concerned.
        offset: Bytes from the start of ``path`` to the first occurrence.
        where: The first occurrence within the tensor: row, block, element.
        found: Value of the first occurrence.
        expected: What would have been right.
        n: Occurrences.
    """

    check: str
    severity: Severity
    path: str
    tensor: str | None = None
    key: str | None = None
    offset: int | None = None
    where: str | None = None
    found: str = ""
    expected: str = ""
    n: int = 1

    def __str__(self) -> str:
        subject = self.tensor or self.key or self.path
        place = [] if self.offset is None else [f"byte {self.offset:,}"]
        place += [] if self.where is None else [self.where]
        text = f"{self.severity}: {subject}: {self.check}"
        if place:
            text += f" at {', '.join(place)}"
        if self.found:
            text += f": found {self.found}"
        if self.expected:
            text += f"{',' if self.found else ':'} expected {self.expected}"
        return text + (f" ({self.n:,} times)" if self.n > 1 else "")


class Findings:
    """Collects findings from several threads; per tensor, key and check only the first is kept, and a count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: dict[tuple[str, str, str | None, str | None], Finding] = {}

    def add(self, finding: Finding) -> None:
        """Add a finding. Of one tensor, they must come in the order of their offsets."""
        if finding.check not in CHECKS:
            raise ValueError(f"no check is called {finding.check!r}")
        key = (finding.check, finding.path, finding.tensor, finding.key)
        with self._lock:
            first = self._all.get(key)
            self._all[key] = finding if first is None else replace(first, n=first.n + finding.n)

    def sorted(self, paths: Sequence[str]) -> list[Finding]:
        """Return all findings: errors first, then by shard and offset."""
        order = {path: i for i, path in enumerate(paths)}
        with self._lock:
            return sorted(
                self._all.values(),
                key=lambda f: (
                    f.severity != "error",
                    order.get(f.path, len(order)),
                    -1 if f.offset is None else f.offset,
                    f.tensor or "",
                    f.key or "",
                    f.check,
                ),
            )
