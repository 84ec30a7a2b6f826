"""Tensor types as GGUF files number them, and what type 42 means in a given file.

This file owns the one table of file ids (name, block size in elements and bytes) and the stride rule that
tells the claimants of id 42 apart; ``register`` teaches the same to the PyPI ``gguf`` package. Ids *in
memory* belong to the engine and are read from it, never from here. Parsing headers is left to ``header``, the
codecs to ``_codec``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from itertools import pairwise
from typing import Any, Final, NamedTuple

from .errors import Type42Error

__all__ = [
    "CLAIMANTS",
    "F8_E4M3_B128",
    "FILE_TYPES",
    "PRISM_Q2_0",
    "Q2_0",
    "TYPE_42",
    "Basis",
    "FileType",
    "TensorInfo",
    "Type42",
    "register",
    "resolve_type42",
    "unreadable_type42",
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


# --- type 42 --------------------------------------------------------------------------------------

F8_E4M3_B128: Final = FILE_TYPES[TYPE_42]
Q2_0: Final = FileType(TYPE_42, "Q2_0", 64, 18)
"""Upstream's meaning of id 42: what a stock file means by it."""
PRISM_Q2_0: Final = FileType(TYPE_42, "PRISM_Q2_0", 128, 34)
"""PrismML's own format of the same name; recognised, not supported."""

CLAIMANTS: Final = (F8_E4M3_B128, Q2_0, PRISM_Q2_0)

_INT64_MAX: Final = 2**63 - 1


class TensorInfo(NamedTuple):
    """What a GGUF header says about one tensor.

    Attributes:
        name: As in the file, up to the first NUL byte.
        dims: ne0 first, always four.
        type_id: The raw file id.
        offset: Bytes from the start of the data section.
    """

    name: str
    dims: tuple[int, int, int, int]
    type_id: int
    offset: int

    @property
    def n_elements(self) -> int:
        """Product of the dimensions."""
        ne0, ne1, ne2, ne3 = self.dims
        return ne0 * ne1 * ne2 * ne3


class Basis(str, Enum):
    """Why a type-42 tensor was read the way it was."""

    FITS = "fits"
    """Its own stride fits exactly one claimant."""
    STOCK = "stock"
    """The stride fits both 2-bit formats, and no other tensor of the file is PrismML's: upstream's Q2_0."""
    BORROWED = "borrowed"
    """Its own stride does not decide; the other type-42 tensors of the file agree."""
    TOO_SMALL = "too small"
    """The stride fits FP8 and a 2-bit format, and nothing else decides. Read as Q2_0 for want of better."""
    UNKNOWN = "unknown"
    """The stride fits no claimant, and nothing else decides. Read as Q2_0 for want of better."""


@dataclass(frozen=True)
class Type42:
    """How one tensor of file id 42 was resolved, with the evidence.

    Attributes:
        tensor: The tensor.
        type: The claimant to read it as.
        basis: Why.
        avail: Bytes up to the next tensor, or to the end of the data section; None if that is not known.
        is_last: Whether it is the last tensor of its file by offset.
    """

    tensor: TensorInfo
    type: FileType
    basis: Basis
    avail: int | None
    is_last: bool

    @property
    def sizes(self) -> dict[str, int | None]:
        """Bytes the tensor would have for each claimant; None where ne0 is not a multiple of the block."""
        n = self.tensor.n_elements
        return {c.name: c.n_bytes(n) if _divides(c, self.tensor) else None for c in CLAIMANTS}

    @property
    def breaks_offsets(self) -> bool:
        """Whether no type the engine has explains where the next tensor starts; a parser refuses that."""
        is_prism = self.type == PRISM_Q2_0 and self.basis is Basis.FITS
        return not self.is_last and (is_prism or self.basis is Basis.UNKNOWN)

    def evidence(self) -> str:
        """Say in one line what the verdict rests on: n, avail and the three expected sizes."""
        sizes = ", ".join(
            f"{name} {f'{size:,}' if size is not None else f'impossible (row of {self.tensor.dims[0]:,})'}"
            for name, size in self.sizes.items()
        )
        avail = "unknown" if self.avail is None else f"{self.avail:,}"
        return f"{self.tensor.n_elements:,} elements, {avail} bytes available; expected sizes: {sizes}"


def resolve_type42(tensors: Sequence[TensorInfo], data_size: int | None, alignment: int) -> dict[int, Type42]:
    """Tell what each tensor of file id 42 means, by the stride to its successor.

    Every type-42 tensor is resolved by itself from the bytes up to the next tensor (in order of offset) or,
    for the last one, up to the end of the data section. A claimant of size s fits when
    s <= avail < s + alignment.

    1. Exactly one fit decides.
    2. Fits of Q2_0 and PrismML's Q2_0 only: Q2_0, unless rule 1 made another tensor PrismML's.
    3. More fits than that, or the last tensor without a fit: the verdict that all tensors decided by 1 and 2
       share, provided it is among the fits if there are any; failing that Q2_0, marked ``TOO_SMALL`` or
       ``UNKNOWN``.
    4. Any other tensor without a fit: Q2_0, marked ``UNKNOWN``. Its successor's offset cannot be right.

    The architecture and ``general.file_type`` are no evidence. Nothing is refused here: a parser accepts what
    a stock one accepts, and ``header.check_header`` refuses models whose verdicts are doubtful.

    Args:
        tensors: All tensors of one file (one shard), in any order.
        data_size: Bytes from the start of the data section to the end of the file; None if not known.
        alignment: The file's ``general.alignment``.

    Returns:
        The verdicts by index into ``tensors``; tensors of other types have none.

    Source: format specification section 3.1.
    """
    avail, last = _strides(tensors, data_size)
    fits: dict[int, tuple[FileType, ...]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.type_id == TYPE_42:
            fits[i] = tuple(c for c in CLAIMANTS if _fits(c, tensor, avail[i], alignment))

    decided: dict[int, tuple[FileType, Basis]] = {}
    decided |= {i: (found[0], Basis.FITS) for i, found in fits.items() if len(found) == 1}
    two_bit = PRISM_Q2_0 if any(type_ is PRISM_Q2_0 for type_, _ in decided.values()) else Q2_0
    two_bit_basis = Basis.STOCK if two_bit is Q2_0 else Basis.BORROWED
    decided |= {i: (two_bit, two_bit_basis) for i, found in fits.items() if found == (Q2_0, PRISM_Q2_0)}

    verdicts = {type_ for type_, _ in decided.values()}
    common = verdicts.pop() if len(verdicts) == 1 else None
    result: dict[int, Type42] = {}
    for i, found in fits.items():
        if i in decided:
            type_, basis = decided[i]
        elif common is not None and (
            common in found if found else i == last and _divides(common, tensors[i])
        ):
            type_, basis = common, Basis.BORROWED
        else:
            type_, basis = Q2_0, Basis.TOO_SMALL if found else Basis.UNKNOWN
        result[i] = Type42(tensors[i], type_, basis, avail[i], i == last)
    return result


def _strides(tensors: Sequence[TensorInfo], data_size: int | None) -> tuple[dict[int, int | None], int]:
    """Return the bytes available to each tensor by index, and the index of the last by offset (-1: none)."""
    order = sorted(range(len(tensors)), key=lambda i: tensors[i].offset)
    if not order:
        return {}, -1
    avail: dict[int, int | None] = {
        i: tensors[successor].offset - tensors[i].offset for i, successor in pairwise(order)
    }
    last = order[-1]
    avail[last] = None if data_size is None else max(0, data_size - tensors[last].offset)
    return avail, last


def _divides(claimant: FileType, tensor: TensorInfo) -> bool:
    """Tell whether the rows are whole blocks; the bound keeps the engine's size arithmetic from overflowing."""
    return tensor.dims[0] % claimant.block == 0 and tensor.n_elements <= _INT64_MAX // claimant.block_bytes


def _fits(claimant: FileType, tensor: TensorInfo, avail: int | None, alignment: int) -> bool:
    if avail is None or not _divides(claimant, tensor):
        return False
    size = claimant.n_bytes(tensor.n_elements)
    return size <= avail < size + alignment


# --- the PyPI package "gguf" ----------------------------------------------------------------------


def register() -> Any:
    """Teach the PyPI package ``gguf`` the meanings of type 42, once per process.

    Afterwards ``gguf.GGMLQuantizationType`` has the members ``F8_E4M3_B128`` and ``Q2_0``.
    ``gguf.GGUFWriter`` writes 42 for both, ``gguf.GGUFReader`` tells them apart by the stride rule, and
    ``gguf.quantize`` and ``gguf.dequantize`` handle F8_E4M3_B128. Files without type 42 are read by the
    package's own code as before.

    Two members of an ``IntEnum`` with one value would be equal, so only one of the two can be 42 in memory:
    the one the package knows already, else F8_E4M3_B128. The other gets the next free number, which no file
    ever holds.

    Returns:
        The enum member ``F8_E4M3_B128``, to be given as ``raw_dtype`` to ``GGUFWriter.add_tensor``.

    Raises:
        Type42Error: From ``GGUFReader``: a type-42 tensor is PrismML's, or fits no claimant.
    """
    import gguf  # half a second of imports that reading headers does not need

    enum = gguf.GGMLQuantizationType
    if F8_E4M3_B128.name in enum.__members__:
        return enum[F8_E4M3_B128.name]
    members = {}
    for type_ in (F8_E4M3_B128, Q2_0):
        member = enum.__members__.get(type_.name)
        if member is None:
            values = {int(other) for other in enum}
            member = _add_enum_member(enum, type_.name, max(values) + 1 if TYPE_42 in values else TYPE_42)
            gguf.GGML_QUANT_SIZES[member] = (type_.block, type_.block_bytes)
        members[type_] = member
    _register_codec(members[F8_E4M3_B128])
    _register_writer(gguf.GGUFWriter, members)
    _register_reader(gguf.GGUFReader, members)
    return members[F8_E4M3_B128]


def _add_enum_member(enum: Any, name: str, value: int) -> Any:
    member = int.__new__(enum, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    return member


def _register_writer(writer: Any, members: dict[FileType, Any]) -> None:
    add_tensor_info = writer.add_tensor_info

    @wraps(add_tensor_info)
    def add_tensor_info_as_42(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        add_tensor_info(self, name, *args, **kwargs)
        info = self.tensors[-1][name]
        if info.dtype in members.values():
            info.dtype = TYPE_42

    writer.add_tensor_info = add_tensor_info_as_42


def _register_codec(member: Any) -> None:
    from gguf import quants

    class F8E4M3B128(vars(quants)["__Quant"], qtype=member):  # type: ignore[call-arg, misc]
        """Blocks of one E8M0 scale byte and 128 E4M3 codes; subclassing is the package's registration."""

        @classmethod
        def quantize_blocks(cls, blocks: Any) -> Any:
            """(n, 128) float32 -> (n, 129) uint8."""
            from . import _codec

            return _codec.f8_e4m3_b128_encode(blocks)

        @classmethod
        def dequantize_blocks(cls, blocks: Any) -> Any:
            """(n, 129) uint8 -> (n, 128) float32."""
            from . import _codec

            return _codec.f8_e4m3_b128_decode(blocks)


def _register_reader(reader: Any, members: dict[FileType, Any]) -> None:
    build_tensors = reader._build_tensors

    @wraps(build_tensors)
    def build_tensors_by_stride(self: Any, data_start: int, fields: list[Any]) -> None:
        """Run the package's own code on infos whose raw id 42 is replaced by the member it stands for."""
        infos = [_reader_info(field) for field in fields]
        verdicts = resolve_type42(infos, self.data.nbytes - data_start, int(self.alignment))
        resolved = list(fields)
        for i, verdict in verdicts.items():
            if verdict.type not in members or verdict.breaks_offsets:
                raise unreadable_type42(verdict, path=getattr(self.data, "filename", None))
            parts = list(fields[i].parts)
            parts[4] = [members[verdict.type]]
            resolved[i] = fields[i]._replace(parts=parts)
        build_tensors(self, data_start, resolved)
        self.tensors = [tensor._replace(field=fields[i]) for i, tensor in enumerate(self.tensors)]

    reader._build_tensors = build_tensors_by_stride


def _reader_info(field: Any) -> TensorInfo:
    dims = [int(dim) for dim in field.parts[3]]
    ne0, ne1, ne2, ne3 = dims[:4] + [1] * (4 - len(dims))
    return TensorInfo(field.name, (ne0, ne1, ne2, ne3), int(field.parts[4][0]), int(field.parts[5][0]))


def unreadable_type42(verdict: Type42, *, path: str | None) -> Type42Error:
    """Build the error for a type-42 tensor whose bytes this package cannot interpret."""
    if verdict.type is PRISM_Q2_0:
        return Type42Error(
            "a tensor of type 42 is in PrismML's Q2_0 format",
            path=path,
            tensor=verdict.tensor.name,
            found=verdict.evidence(),
            expected="F8_E4M3_B128 or upstream's Q2_0",
            hint="That format is known but not supported; use the software that made the file.",
        )
    if verdict.basis is Basis.TOO_SMALL:
        return Type42Error(
            "a tensor of type 42 is too small to tell its format",
            path=path,
            tensor=verdict.tensor.name,
            found=verdict.evidence(),
            expected="a stride that fits one format only",
            hint="Write the file with a smaller general.alignment.",
        )
    n, ne0 = verdict.tensor.n_elements, verdict.tensor.dims[0]
    f8_bytes = n // F8_E4M3_B128.block * F8_E4M3_B128.block_bytes
    if ne0 % F8_E4M3_B128.block != 0 and verdict.avail is not None and verdict.avail >= f8_bytes:
        return Type42Error(
            "a tensor of type 42 has rows that F8_E4M3_B128 cannot store",
            path=path,
            tensor=verdict.tensor.name,
            found=f"ne0 {ne0:,} ({verdict.evidence()})",
            expected="ne0 a multiple of 128",
            hint="Convert the checkpoint again.",
        )
    return Type42Error(
        "a tensor of type 42 has an unknown block size",
        path=path,
        tensor=verdict.tensor.name,
        found=verdict.evidence(),
        expected="one of these sizes, plus less than one alignment",
        hint="The file is damaged, incomplete, or uses id 42 for a format this package does not know.",
    )
