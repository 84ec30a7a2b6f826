"""Tensor types as GGUF files number them, and what type 42 means in a given file.

This file owns the one table of file ids (name, block size in elements and bytes) and the stride rule that
tells the claimants of id 42 apart; ``register`` teaches the same to the PyPI ``gguf`` package. Ids *in
memory* belong to the engine and are read from it, never from here. Parsing headers is left to ``header``, the
codecs to ``_codec``.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = [
    "FILE_TYPES",
    "TYPE_42",
    "FileType",
]

TYPE_42: Final = 42
"""The file id claimed by F8_E4M3_B128, by upstream's Q2_0 and by PrismML's Q2_0."""


class FileType(NamedTuple):
    """One tensor type of the file format.

    Attributes:
        id: Number in the file's tensor info.
        name: ggml's name in upper case.
        block: Elements per block, along ne0.
        block_bytes: Bytes per block.
    """

    id: int
    name: str
    block: int
    block_bytes: int

    def n_bytes(self, n_elements: int) -> int:
        """Return the bytes of a tensor of ``n_elements``, whose ne0 is a multiple of the block."""
        return n_elements // self.block * self.block_bytes


FILE_TYPES: Final[dict[int, FileType]] = {
    t.id: t
    for t in (
        FileType(0, "F32", 1, 4),
        FileType(1, "F16", 1, 2),
        FileType(2, "Q4_0", 32, 18),
        FileType(3, "Q4_1", 32, 20),
        FileType(6, "Q5_0", 32, 22),
        FileType(7, "Q5_1", 32, 24),
        FileType(8, "Q8_0", 32, 34),
        FileType(9, "Q8_1", 32, 36),
        FileType(10, "Q2_K", 256, 84),
        FileType(11, "Q3_K", 256, 110),
        FileType(12, "Q4_K", 256, 144),
        FileType(13, "Q5_K", 256, 176),
        FileType(14, "Q6_K", 256, 210),
        FileType(15, "Q8_K", 256, 292),
        FileType(16, "IQ2_XXS", 256, 66),
        FileType(17, "IQ2_XS", 256, 74),
        FileType(18, "IQ3_XXS", 256, 98),
        FileType(19, "IQ1_S", 256, 50),
        FileType(20, "IQ4_NL", 32, 18),
        FileType(21, "IQ3_S", 256, 110),
        FileType(22, "IQ2_S", 256, 82),
        FileType(23, "IQ4_XS", 256, 136),
        FileType(24, "I8", 1, 1),
        FileType(25, "I16", 1, 2),
        FileType(26, "I32", 1, 4),
        FileType(27, "I64", 1, 8),
        FileType(28, "F64", 1, 8),
        FileType(29, "IQ1_M", 256, 56),
        FileType(30, "BF16", 1, 2),
        FileType(34, "TQ1_0", 256, 54),
        FileType(35, "TQ2_0", 256, 66),
        FileType(39, "MXFP4", 32, 17),
        FileType(40, "NVFP4", 64, 36),
        FileType(41, "Q1_0", 128, 18),
        # 42 stands here as F8_E4M3_B128, what this package writes; reading a 42 goes through the stride rule
        FileType(TYPE_42, "F8_E4M3_B128", 128, 129),
    )
}
"""Every type a file may name, by id. 4, 5, 31-33 and 36-38 were removed from the format and are refused.

Source: ``ggml/src/ggml.c:type_traits``, ``ggml/src/ggml-common.h``.
"""
