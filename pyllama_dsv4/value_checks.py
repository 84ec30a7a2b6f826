"""Checks of the values of one tensor, piece by piece: what no sound file contains.

It owns one checker per tensor type and the rules that need the whole tensor; reading is ``verify``'s, comparing
with a checkpoint ``checkpoint_compare``'s. Types without a checker here (K-quants and others that
DeepSeek's own files do not use) are counted by the caller as not checked.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from .findings import Finding, Findings, Severity
from .header import Tensor
from .tensor_data import Bytes

__all__ = ["PIECE_BYTES", "TILE", "ValueChecker", "rows_per_piece", "values_are_checked"]

PIECE_BYTES: Final = 2 << 20
"""Bytes that are read and checked at once, about: they stay in a core's cache."""

TILE: Final = 128
"""Rows that share a scale in a checkpoint's FP8 weights."""

HOLE_BYTES: Final = 4096
"""A run of zeros as long as a disk page is what a preallocated download leaves behind, not weights."""

_FLOATS: Final[dict[str, tuple[str, int]]] = {
    # type: numpy dtype of the bits, mask of the exponent
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_F16_EXPONENT: Final = 0x7C00
_TOKEN_TABLE: Final = "ffn_gate_tid2eid"


def values_are_checked(tensor: Tensor) -> bool:
    """Tell whether ``ValueChecker`` knows the tensor's type."""
    return tensor.type.name in _FLOATS or tensor.type.name in ("F8_E4M3_B128", "MXFP4", "Q8_0", "I32")


def rows_per_piece(tensor: Tensor, *, is_tiled: bool) -> int:
    """Return how many rows to check at once: whole tiles where they are made of them."""
    row_bytes = max(1, tensor.type.n_bytes(tensor.dims[0]))
    n = max(1, PIECE_BYTES // row_bytes)
    return max(n // TILE, 1) * TILE if is_tiled or tensor.type.name == "F8_E4M3_B128" else n


class ValueChecker:
    """Checks one tensor; give it all pieces in order, then call ``finish``.

    Args:
        tensor: The tensor.
        path: Its file.
        n_expert: Routed experts of the model; None if it has none.
        findings: Where to report to.
        holes: How bad long runs of zeros are: DeepSeek-V4's weights have none, other models' may.
    """

    def __init__(
        self,
        tensor: Tensor,
        path: str,
        n_expert: int | None,
        findings: Findings,
        *,
        holes: Severity = "error",
    ) -> None:
        self._tensor = tensor
        self._path = path
        self._n_expert = n_expert
        self._findings = findings
        self._holes: Severity = holes
        self._is_all_zero = True
        self._zeros_start = -1
        self._n_zeros = 0
        self._n_tiles = 0
        self._n_bad_tiles = 0
        self._first_bad_tile: tuple[int, int, int, int] | None = None  # row, block, byte, byte of the tile
        rows = tensor.dims[1] if len(tensor.dims) > 1 else 1
        self._has_tiles = rows % TILE == 0

    def check(self, data: Bytes, start: int) -> None:
        """Check ``(n,) uint8`` data that starts at byte ``start`` of the tensor; whole rows."""
        if self._is_all_zero and data.any():
            self._is_all_zero = False
        name = self._tensor.type.name
        if name == "F8_E4M3_B128":
            self._check_f8(data, start)
        elif name == "MXFP4":
            self._check_mxfp4(data, start)
        elif name == "Q8_0":
            self._check_q8_0(data, start)
        elif name in _FLOATS:
            self._check_floats(data, start)
        elif name == "I32" and _TOKEN_TABLE in self._tensor.name:
            self._check_expert_ids(data, start)

    def finish(self) -> None:
        """Report what only the whole tensor shows."""
        if self._n_zeros:
            # a row of zeros is possible where nothing is scaled: worth a look only
            self._add(
                "hole" if self._is_all_zero else "zeros",
                self._zeros_start,
                None,
                "nothing but zeros" if self._is_all_zero else f"{HOLE_BYTES:,} zeros or more in a row",
                "weights; an interrupted download leaves such holes",
                n=self._n_zeros,
                severity=self._holes if self._is_all_zero else "warning",
            )
        if self._first_bad_tile is None:
            return
        row, block, byte, of_tile = self._first_bad_tile
        # codes of a checkpoint come with tile scales everywhere, weights quantised block by block nearly nowhere
        is_damage = 2 * self._n_bad_tiles <= self._n_tiles
        n_blocks = self._tensor.dims[0] // TILE
        self._add(
            "tile",
            (row * n_blocks + block) * self._tensor.type.block_bytes,
            f"row {row:,}, block {block:,}",
            f"scale byte {byte}",
            f"{of_tile}, as in the other rows of the 128x128 tile"
            if is_damage
            else "tiles of 128x128 with one scale each; these weights were quantised block by block",
            n=self._n_bad_tiles,
            severity="error" if is_damage else "warning",
        )

    def _add(
        self,
        check: str,
        start: int,
        where: str | None,
        found: str,
        expected: str,
        *,
        n: int,
        severity: Severity = "error",
    ) -> None:
        self._findings.add(
            Finding(
                check,
                severity,
                self._path,
                self._tensor.name,
                offset=self._tensor.start + start,
                where=where,
                found=found,
                expected=expected,
                n=n,
            )
        )

    # --- blocks

    def _block_place(self, start: int) -> str:
        n_blocks = self._tensor.dims[0] // self._tensor.type.block
        row, block = divmod(start // self._tensor.type.block_bytes, n_blocks)
        return f"row {row:,}, block {block:,}"

    def _check_scales(
        self, data: Bytes, start: int, n_nan: int, i_nan: int, n_zero: int, i_zero: int
    ) -> None:
        size = self._tensor.type.block_bytes
        if n_nan:
            at = start + i_nan * size
            self._add("scale_nan", at, self._block_place(at), "scale byte 255, NaN", "0 to 254", n=n_nan)
        if n_zero == 0:
            return
        # no zero scale, no hole: looked for only here
        if (hole := _first_hole(data)) is not None:
            at, n = start + hole[0], hole[1]
            self._add(
                "hole",
                at,
                self._block_place(at),
                f"{HOLE_BYTES:,} zeros or more in a row",
                "weights; an interrupted download leaves such holes",
                n=n,
                severity=self._holes,
            )
        at = start + i_zero * size
        is_empty = not data[i_zero * size : (i_zero + 1) * size].any()
        self._add(
            "scale_zero",
            at,
            self._block_place(at),
            "scale byte 0" + (" of a block of zeros" if is_empty else ""),
            "a scale above 2^-127",
            n=n_zero,
            severity="warning",
        )

    def _check_f8(self, data: Bytes, start: int) -> None:
        from . import _codec

        n_blocks = self._tensor.dims[0] // self._tensor.type.block
        blocks = data.reshape(-1, n_blocks, 129)
        stats = _codec.f8_e4m3_b128_check(data.reshape(-1, n_blocks * 129), n_threads=1)
        self._check_scales(
            data, start, stats.n_scale_nan, stats.i_scale_nan, stats.n_scale_zero, stats.i_scale_zero
        )
        if stats.n_code_nan:
            codes = data[stats.i_code_nan * 129 + 1 : (stats.i_code_nan + 1) * 129]
            k = int(np.flatnonzero((codes & 0x7F) == 0x7F)[0])
            at = start + stats.i_code_nan * 129 + 1 + k
            where = f"{self._block_place(at)}, element {k}"
            self._add(
                "code_nan", at, where, f"code 0x{int(codes[k]):02x}, NaN", "a number", n=stats.n_code_nan
            )
        if self._has_tiles:
            self._check_tiles(blocks[:, :, 0], start // (n_blocks * 129))

    def _check_tiles(self, scales: npt.NDArray[np.uint8], first_row: int) -> None:
        tiles = scales.reshape(-1, TILE, scales.shape[1])
        self._n_tiles += tiles.shape[0] * tiles.shape[2]
        bad = (tiles != tiles[:, :1]).any(axis=1)
        n_bad = int(np.count_nonzero(bad))
        if n_bad == 0:
            return
        self._n_bad_tiles += n_bad
        if self._first_bad_tile is None:
            tile, block = (int(i) for i in np.argwhere(bad)[0])
            column = tiles[tile, :, block]
            # the majority is right: damage to the first row must not accuse the other 127
            of_tile = int(np.bincount(column).argmax())
            row = int(np.flatnonzero(column != of_tile)[0])
            self._first_bad_tile = first_row + tile * TILE + row, block, int(column[row]), of_tile

    def _check_mxfp4(self, data: Bytes, start: int) -> None:
        from . import _codec

        row_bytes = self._tensor.dims[0] // 32 * 17
        stats = _codec.mxfp4_check(data.reshape(-1, row_bytes), n_threads=1)
        self._check_scales(
            data, start, stats.n_scale_nan, stats.i_scale_nan, stats.n_scale_zero, stats.i_scale_zero
        )

    def _check_q8_0(self, data: Bytes, start: int) -> None:
        scales = np.ascontiguousarray(data.reshape(-1, 34)[:, :2]).view("<u2")[:, 0]
        bad = np.flatnonzero((scales & _F16_EXPONENT) == _F16_EXPONENT)
        if bad.size:
            at = start + int(bad[0]) * 34
            value = np.array([scales[bad[0]]], np.uint16).view(np.float16)[0]
            self._add(
                "not_finite", at, self._block_place(at), f"scale {value}", "a finite number", n=int(bad.size)
            )
        self._check_plain_hole(data, start)

    # --- plain numbers

    def _element_place(self, index: int) -> str:
        ne0 = self._tensor.dims[0]
        return (
            f"element {index:,}" if len(self._tensor.dims) == 1 else f"row {index // ne0:,}, {index % ne0:,}"
        )

    def _check_floats(self, data: Bytes, start: int) -> None:
        dtype, mask = _FLOATS[self._tensor.type.name]
        bits = data.view(dtype)
        is_bad = (bits & mask) == mask
        if is_bad.any():
            i = int(is_bad.argmax())
            first = start // bits.itemsize + i
            self._add(
                "not_finite",
                start + i * bits.itemsize,
                self._element_place(first),
                _float_text(int(bits[i]), self._tensor.type.name),
                "a finite number",
                n=int(np.count_nonzero(is_bad)),
            )
        self._check_plain_hole(data, start)

    def _check_plain_hole(self, data: Bytes, start: int) -> None:
        if (hole := _first_hole(data)) is not None:
            if self._n_zeros == 0:
                self._zeros_start = start + hole[0]
            self._n_zeros += hole[1]

    def _check_expert_ids(self, data: Bytes, start: int) -> None:
        self._check_plain_hole(data, start)
        ids = data.view("<i4")
        n_expert = self._n_expert
        if n_expert is not None:
            is_bad = (ids < 0) | (ids >= n_expert)
            if is_bad.any():
                i = int(is_bad.argmax())
                token, slot = divmod(start // 4 + i, self._tensor.dims[0])
                self._add(
                    "expert_id",
                    start + 4 * i,
                    f"token {token:,}, slot {slot}",
                    f"expert {int(ids[i])}",
                    f"0 to {n_expert - 1}",
                    n=int(np.count_nonzero(is_bad)),
                )
        rows = np.sort(ids.reshape(-1, self._tensor.dims[0]), axis=1)
        is_twice = (rows[:, 1:] == rows[:, :-1]).any(axis=1)
        if is_twice.any():
            i = int(is_twice.argmax())
            token = start // (4 * self._tensor.dims[0]) + i
            self._add(
                "expert_twice",
                start + i * 4 * self._tensor.dims[0],
                f"token {token:,}",
                "an expert twice",
                "different experts",
                n=int(np.count_nonzero(is_twice)),
                severity="warning",
            )


def _first_hole(data: Bytes) -> tuple[int, int] | None:
    """Return where the first ``HOLE_BYTES`` of zeros start, in steps of that size, and how many there are."""
    n = data.size // HOLE_BYTES
    if n == 0:
        return None
    pages = data[: n * HOLE_BYTES].view("<u8").reshape(n, -1)
    # most pages do not start with a zero word: the rest of them need not be looked at
    candidates = np.flatnonzero(pages[:, 0] == 0)
    holes = candidates[~pages[candidates].any(axis=1)]
    return (int(holes[0]) * HOLE_BYTES, int(holes.size)) if holes.size else None


def _float_text(bits: int, type_name: str) -> str:
    if type_name == "F16":
        return str(np.array([bits], np.uint16).view(np.float16)[0])
    return str(np.array([bits << 16 if type_name == "BF16" else bits], np.uint32).view(np.float32)[0])
