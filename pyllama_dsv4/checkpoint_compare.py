"""Comparison of a model file with the checkpoint it was made from: every tensor, both ways, bit for bit.

It owns the pairing of tensors and the comparison of one piece. The file's blocks are taken apart again and laid
beside the checkpoint's bytes, so that nothing of the way there, the converter, is trusted. Reading the file and
the threads are ``verify``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .checkpoint import DTYPES, Checkpoint, SourceTensor
from .convert.plan import DRAFT_PREFIX, sources
from .convert.template import generation_of
from .convert.tokenizer import read_vocabulary, vocabulary_keys
from .findings import Finding, Findings
from .formats import GENERATION_KEY, generation_of_file
from .gguf_file import ArrayValue
from .header import Header, HeaderReport, Tensor
from .tensor_data import Bytes
from .tensors import HParams, TensorSpec, tensor_table
from .value_checks import TILE

__all__ = ["Comparison", "Pair"]

GROUP: Final = 32
"""Columns that share a scale in a checkpoint's FP4 weights."""

_WIDENED: Final = frozenset({"F32", "BF16", "F16"})
_DTYPES_OF: Final = {"f32": ("F32", "BF16"), "bf16": ("BF16",), "i32": ("I64", "I32")}


@dataclass(frozen=True)
class Pair:
    """A tensor of the file and what it was made from.

    Attributes:
        tensor: The file's.
        spec: Its place in the model.
        sources: Weight and scale names, one pair per matrix of a stack.
        is_exact: Whether the bytes themselves are compared; if not, the values are.
    """

    tensor: Tensor
    spec: TensorSpec
    sources: tuple[tuple[str, str | None], ...]
    is_exact: bool


class Comparison:
    """Pairs a file with a checkpoint; a context manager that keeps the checkpoint open.

    What cannot be paired goes to ``findings`` at once.

    Args:
        header: The file.
        report: Its header check; None if that failed.
        folder: The checkpoint.
        findings: Where to report to.

    Attributes:
        pairs: By name as spelled in the file.
        notes: What the user should know, one sentence each.

    Raises:
        CheckpointError: Or a subclass: the checkpoint itself is malformed or incomplete.
        ModelNotFoundError: The folder does not exist.
        ModelFileError: A file of it cannot be read.
    """

    def __init__(self, header: Header, report: HeaderReport | None, folder: str, findings: Findings) -> None:
        self._header = header
        self._findings = findings
        self.pairs: dict[str, Pair] = {}
        self.notes: list[str] = []
        self._checkpoint = Checkpoint(folder)
        try:
            hp = HParams.from_hf_config(self._checkpoint.config, path=f"{folder}/config.json")
            self._pair(tensor_table(hp))
            if report is not None and report.hparams is not None:
                self._compare_keys(report.hparams, hp)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the checkpoint. Idempotent."""
        self._checkpoint.close()

    @property
    def n_bytes(self) -> int:
        """Bytes of all checkpoint tensors that have a pair."""
        return sum(
            self._checkpoint.tensors[name].n_bytes
            for pair in self.pairs.values()
            for names in pair.sources
            for name in names
            if name is not None
        )

    # --- pairing

    def _add(self, check: str, found: str, expected: str, **place: Any) -> None:
        place.setdefault("path", self._header.path)
        self._findings.add(Finding(check, "error", found=found, expected=expected, **place))

    def _pair(self, specs: list[TensorSpec]) -> None:
        used: set[str] = set()
        by_upstream_name = {tensor.upstream_name: tensor for tensor in self._header.tensors}
        for spec in specs:
            names = [name for pair in sources(spec) for name in pair if name is not None]
            used.update(names)
            tensor = by_upstream_name.pop(spec.upstream, None)
            if tensor is not None:
                path = self._header.shards[tensor.shard].path
                self._pair_one(spec, tensor, path)
            else:
                present = [name for name in names if name in self._checkpoint.tensors]
                self._add(
                    "not_in_file",
                    "no such tensor",
                    f"one made from {present[0] if present else names[0]}",
                    tensor=spec.native if self._header.dialect == "native" else spec.upstream,
                )
        for tensor in by_upstream_name.values():
            self._add(
                "no_source",
                "a tensor that the checkpoint has nothing for",
                "only the tensors that config.json implies",
                tensor=tensor.name,
                path=self._header.shards[tensor.shard].path,
            )
        self._report_unused(used)

    def _report_unused(self, used: set[str]) -> None:
        skipped: list[SourceTensor] = []
        for name, source in self._checkpoint.tensors.items():
            if name in used:
                continue
            if name.startswith(DRAFT_PREFIX):
                skipped.append(source)
            else:
                self._add(
                    "not_in_file",
                    "a tensor of the checkpoint that the file has nothing of",
                    "only the tensors that config.json implies",
                    tensor=name,
                    path=str(source.path),
                )
        if skipped:
            self.notes.append(
                f"the checkpoint's {len(skipped)} draft tensors ({DRAFT_PREFIX}*, from {skipped[0].name} to "
                f"{skipped[-1].name}, {sum(t.n_bytes for t in skipped):,} bytes) have no place in the file"
            )

    def _pair_one(self, spec: TensorSpec, tensor: Tensor, path: str) -> None:
        dims = spec.dims
        if tensor.dims not in (_trimmed(dims), _grouped(tensor, dims)):
            self._add(
                "shape",
                " x ".join(map(str, tensor.dims)),
                " x ".join(map(str, dims)),
                tensor=tensor.name,
                path=path,
            )
            return
        for weight, scale in sources(spec):
            if not self._has_source(spec, tensor, path, weight, scale):
                return
        type_name, own = tensor.type.name, spec.file_type.name
        is_exact = type_name == own
        if not is_exact and type_name not in _WIDENED:
            self._add(
                "lossy",
                type_name,
                f"{own}, or a type that holds the same values; no other can be compared with the checkpoint",
                tensor=tensor.name,
                path=path,
            )
            return
        self.pairs[tensor.name] = Pair(tensor, spec, tuple(sources(spec)), is_exact)

    def _has_source(
        self, spec: TensorSpec, tensor: Tensor, path: str, weight: str, scale: str | None
    ) -> bool:
        cols, rows = (*spec.dims, 1)[:2]
        dtypes: tuple[str, ...]
        shape: tuple[int, ...]
        if spec.kind == "f8":
            dtypes, shape, scale_shape = ("F8_E4M3",), (rows, cols), (rows // TILE, cols // TILE)
        elif spec.kind == "mxfp4":
            dtypes, shape, scale_shape = ("I8",), (rows, cols // 2), (rows, cols // GROUP)
        else:
            dtypes, scale_shape = _DTYPES_OF[spec.kind], (0, 0)
            shape = (rows, cols) if len(spec.dims) > 1 else (cols,)
        wanted = [(weight, dtypes, shape)]
        if scale is not None:
            wanted.append((scale, ("F8_E8M0", "F32"), scale_shape))
        for name, allowed, expected_shape in wanted:
            source = self._checkpoint.tensors.get(name)
            if source is None:
                self._add("no_source", f"no {name} in the checkpoint", "one", tensor=tensor.name, path=path)
                return False
            if source.dtype not in allowed or source.shape != expected_shape:
                self._add(
                    "shape",
                    f"{name} of {source.dtype} {list(source.shape)} in the checkpoint",
                    f"{' or '.join(allowed)} {list(expected_shape)}",
                    tensor=tensor.name,
                    path=path,
                )
                return False
        return True

    # --- keys

    def _compare_keys(self, in_file: HParams, in_config: HParams) -> None:
        for field in fields(HParams):
            found, expected = getattr(in_file, field.name), getattr(in_config, field.name)
            if field.name == "compress_ratios":  # entries beyond the trunk belong to blocks that are not here
                found, expected = found[: in_file.n_layer], expected[: in_config.n_layer]
            is_float = isinstance(expected, float)  # F32 in the file
            if np.float32(found) != np.float32(expected) if is_float else found != expected:
                self._add("key", str(found), f"{expected}, as in config.json", key=field.name)
        generation = generation_of(self._checkpoint.tensors)
        in_header = generation_of_file(self._header)
        if in_header != generation:
            self._add(
                "key", str(in_header), f"{generation}, by the checkpoint's draft tensors", key=GENERATION_KEY
            )
        vocabulary = read_vocabulary(self._checkpoint, in_config.n_vocab)
        if vocabulary is None:
            self.notes.append("the checkpoint has no tokenizer.json: the vocabulary was not compared")
            return
        for wanted in vocabulary_keys(vocabulary):
            have = self._header.kv.get(wanted.key)
            if have is None:
                self._add("key", "no such key", _short(wanted.value), key=wanted.key)
            elif isinstance(have.value, ArrayValue):
                self._compare_list(wanted.key, have.value, wanted.value)
            elif have.value != wanted.value:
                self._add("key", _short(have.value), _short(wanted.value), key=wanted.key)

    def _compare_list(self, key: str, found: ArrayValue, expected: Any) -> None:
        if len(found) != len(expected):
            self._add("key", f"{len(found):,} entries", f"{len(expected):,}", key=key)
            return
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a != b:
                self._add("key", f"{_short(a)} as entry {i:,}", _short(b), key=key)
                return

    # --- data

    def compare(self, pair: Pair, data: Bytes, start: int, expert: int, row: int) -> None:
        """Compare rows of one matrix of a tensor with the checkpoint.

        Args:
            pair: The tensor.
            data: ``(n,) uint8``: whole rows of the file's data; for FP8 whole tiles of them.
            start: Bytes from the start of the tensor.
            expert: Index of the matrix in a stack, else 0.
            row: First row within the matrix.
        """
        weight, scale = pair.sources[expert]
        cols = pair.spec.dims[0]
        n_rows = data.size // pair.tensor.type.n_bytes(cols)
        if pair.spec.kind in ("f8", "mxfp4"):
            assert scale is not None
            if pair.is_exact:
                self._compare_blocks(pair, data, start, weight, scale, row, n_rows)
            else:
                expected = self._decoded(pair.spec, weight, scale, row, n_rows)
                self._compare_values(pair, data, start, expected)
        else:
            self._compare_plain(pair, data, start, weight, row * cols)

    def _compare_blocks(
        self, pair: Pair, data: Bytes, start: int, weight: str, scale: str, row: int, n_rows: int
    ) -> None:
        cols = pair.spec.dims[0]
        block, size = pair.tensor.type.block, pair.tensor.type.block_bytes
        codes, scales = self._source(pair.spec, weight, scale, row, n_rows)
        blocks = data.reshape(n_rows, cols // block, size)
        # taken apart, the scales are the file's own: no tile is assumed
        if pair.spec.kind == "f8":
            scales = scales.repeat(TILE, 0)
            own_codes = blocks[:, :, 1:]
            is_equal = np.array_equal(own_codes, codes.reshape(own_codes.shape))
        else:
            from . import _codec

            own_codes, _ = _codec.mxfp4_unpack(data.reshape(n_rows, -1), n_threads=1)
            is_equal = bool((own_codes.view("<u8") == codes.view("<u8")).all())
        if is_equal and np.array_equal(blocks[:, :, 0], scales):
            return
        self._report_blocks(pair, blocks, own_codes, codes, scales, start)

    def _report_blocks(
        self,
        pair: Pair,
        blocks: npt.NDArray[np.uint8],
        own_codes: npt.NDArray[np.uint8],
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint8],
        start: int,
    ) -> None:
        n_rows, n_blocks, size = blocks.shape
        shape = (n_rows, n_blocks, -1)
        differing = own_codes.reshape(shape) != codes.reshape(shape)
        scale_differs = blocks[:, :, 0] != scales
        is_bad = differing.any(axis=2) | scale_differs
        r, b = (int(i) for i in np.argwhere(is_bad)[0])
        at = start + (r * n_blocks + b) * size
        if scale_differs[r, b]:
            found, expected = f"scale byte {blocks[r, b, 0]}", str(scales[r, b])
        else:
            k = int(differing[r, b].argmax())
            found = f"code byte 0x{int(own_codes.reshape(shape)[r, b, k]):02x} ({k} of the block)"
            expected = f"0x{int(codes.reshape(shape)[r, b, k]):02x}"
            at += 1 + k if pair.spec.kind == "f8" else 0  # FP4 codes change their byte on the way
        row = start // (n_blocks * size) + r
        self._add(
            "differs",
            found,
            f"{expected}, as in the checkpoint",
            tensor=pair.tensor.name,
            path=self._header.shards[pair.tensor.shard].path,
            offset=pair.tensor.start + at,
            where=f"row {row:,}, block {b:,}",
            n=int(np.count_nonzero(is_bad)),
        )

    def _compare_plain(self, pair: Pair, data: Bytes, start: int, name: str, first: int) -> None:
        type_ = pair.tensor.type
        n = data.size // type_.block_bytes
        source = self._read(name, first, (n,))
        dtype = self._checkpoint.tensors[name].dtype
        if pair.spec.kind == "i32":
            own = data.view("<i4")
            self._report_elements(pair, own != source, own, source, start, type_.block_bytes)
        elif dtype == type_.name:
            own = data.view(source.dtype)
            self._report_elements(pair, own != source, own, source, start, type_.block_bytes)
        else:
            wide = (source.astype("<u4") << 16).view("<f4") if dtype == "BF16" else source.view("<f4")
            self._compare_values(pair, data, start, wide)

    def _compare_values(self, pair: Pair, data: Bytes, start: int, expected: npt.NDArray[Any]) -> None:
        """Compare numbers in another type; -0 is 0, as decoding makes no difference between ggml's two zeros."""
        name = pair.tensor.type.name
        if name == "BF16":
            own = (data.view("<u2").astype("<u4") << 16).view("<f4")
        else:
            own = data.view("<f2" if name == "F16" else "<f4").astype("<f4")
        expected = expected.reshape(-1)
        is_bad = ~(own == expected)  # a NaN is always reported
        self._report_elements(pair, is_bad, own, expected, start, pair.tensor.type.block_bytes)

    def _report_elements(
        self,
        pair: Pair,
        is_bad: npt.NDArray[np.bool_],
        own: npt.NDArray[Any],
        expected: npt.NDArray[Any],
        start: int,
        size: int,
    ) -> None:
        if not is_bad.any():
            return
        i = int(is_bad.argmax())
        index = start // size + i
        ne0 = pair.tensor.dims[0]
        is_bits = own.dtype.kind == "u"
        text = (lambda v: f"bits 0x{int(v):x}") if is_bits else str
        self._add(
            "differs",
            text(own[i]),
            f"{text(expected[i])}, as in the checkpoint",
            tensor=pair.tensor.name,
            path=self._header.shards[pair.tensor.shard].path,
            offset=pair.tensor.start + start + i * size,
            where=f"element {index:,}"
            if len(pair.tensor.dims) == 1
            else f"row {index // ne0:,}, {index % ne0:,}",
            n=int(np.count_nonzero(is_bad)),
        )

    # --- the checkpoint

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Read elements from index ``first`` on, as many as ``shape`` has."""
        dtype = DTYPES[self._checkpoint.tensors[name].dtype]
        # compared as bits: a NaN equals itself
        dtype = dtype if dtype.kind != "f" else np.dtype(f"<u{dtype.itemsize}")
        out = np.empty(shape, dtype)
        self._checkpoint.read_into(name, first * dtype.itemsize, out.reshape(-1).view(np.uint8))
        return out

    def _source(
        self, spec: TensorSpec, weight: str, scale: str, row: int, n_rows: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read codes and scales of rows; scales that are stored as F32 as E8M0 bytes."""
        cols = spec.dims[0]
        if spec.kind == "f8":
            codes = self._read(weight, row * cols, (n_rows, cols))
            shape = (n_rows // TILE, cols // TILE)
            first = row // TILE * shape[1]
        else:
            codes = self._read(weight, row * cols // 2, (n_rows, cols // 2)).view(np.uint8)
            shape = (n_rows, cols // GROUP)
            first = row * shape[1]
        scales = self._read(scale, first, shape)
        if scales.dtype == np.uint8:
            return codes, scales
        # F32: 2^-127 is subnormal; what is no power of two has no byte, and 255 equals no sound one
        is_power = ((scales & 0x7FFFFF) == 0) & (scales > 0) & (scales < 0x7F800000)
        bytes_ = np.where(is_power, scales >> 23, np.where(scales == 0x00400000, 0, 255))
        return codes, bytes_.astype(np.uint8)

    def _decoded(
        self, spec: TensorSpec, weight: str, scale: str, row: int, n_rows: int
    ) -> npt.NDArray[np.float32]:
        from . import _codec

        codes, scales = self._source(spec, weight, scale, row, n_rows)
        if spec.kind == "f8":
            return _codec.f8_e4m3_b128_decode(
                _codec.f8_e4m3_b128_pack(codes, scales, n_threads=1), n_threads=1
            )
        return _codec.mxfp4_decode(_codec.mxfp4_pack(codes, scales, n_threads=1), n_threads=1)


def _trimmed(dims: tuple[int, ...]) -> tuple[int, ...]:
    n = len(dims)
    while n > 1 and dims[n - 1] == 1:
        n -= 1
    return dims[:n]


def _grouped(tensor: Tensor, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the dimensions of the same data seen by output group, as upstream's own saver writes them."""
    if tensor.upstream_name.endswith(".attn_output_a.weight") and len(tensor.dims) == 3:
        ne0, ne1, ne2 = tensor.dims
        return tensor.dims if (ne0, ne1 * ne2) == dims else None
    return None


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
