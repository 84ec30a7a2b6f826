"""The header check of a model file, before anything native touches it.

It owns the view of a model over all its shards, the dialect, and the verdict whether the engine can load
it; the bytes of one file are ``gguf_file``'s, metadata keys ``model_keys``', the list of tensors
``tensors``'. Everything later (loading, planning, verifying, translating) builds on ``check_header``.

The verdict is the first refusal in this order. The engine's own check, ``native/llama/dsv4-check.cpp``,
follows the same order, and a test compares class, tensor and key of both over thousands of damaged
headers.

1. Per shard, ``gguf.cpp``'s checks in its order (``gguf_file``). After the padding before the data section
   come tensors of type 42, in file order, that have a successor and whose stride fits no supported format;
   then tensors that do not start at the running padded sum.
2. Per shard, in file order: names that are equal as C strings, and tensors that end beyond the file. Then,
   for the first shard, ``split.count``, ``split.no`` and its file name; for each further shard steps 1 and 2,
   ``split.no``, and names that an earlier shard has; after the last, ``split.tensors.count``.
3. Tensors of type 42 in file order over all shards: unresolved or unsupported ones, and meanings other than
   that of the first.
4. ``general.architecture``; then ``general.alignment`` of each shard.
5. Dialect: the first tensor in file order whose name belongs to another dialect than the first renamed
   tensor's.
6. Metadata keys in the order of the format specification's table (``model_keys``), the tokenizer's last; then
   prediction (MTP) layers.
7. Tensors in the order of ``tensors.tensor_table``: each missing, then its dimensions, then its type. Last,
   in file order, the file's other tensors.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from .errors import (
    DialectError,
    FormatError,
    MissingKeyError,
    MissingTensorError,
    TensorShapeError,
    TruncatedFileError,
    Type42Error,
    UnsupportedModelError,
)
from .gguf_file import GGUFFile, KeyValue, ValueType, parse_gguf
from .gguf_types import PRISM_Q2_0, Basis, FileType, Type42, unreadable_type42
from .model_keys import read_model_keys
from .tensors import (
    ARCHITECTURE,
    HParams,
    TensorSpec,
    native_to_upstream,
    tensor_table,
    upstream_to_native,
)

__all__ = ["Dialect", "Header", "HeaderReport", "Tensor", "check_header", "read_header"]

Dialect = Literal["native", "upstream", "mixed", "other"]
"""``other``: not a DeepSeek-V4 file. ``mixed``: names of both dialects, which ``check_header`` refuses."""

_MIN_ALIGNMENT: Final = 32
_INCOMPLETE: Final = "The download or copy was interrupted; fetch the file again."
_CONVERT_AGAIN: Final = "The file does not match its own metadata; convert the checkpoint again."


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model file.

    Attributes:
        name: As spelled in the file.
        dims: ne0 first; trailing ones are left out.
        type: Its type, with type 42 resolved.
        shard: Index of the shard that holds it.
        offset: Bytes from the start of that shard's data section.
        start: Bytes from the start of that shard's file.
        type42: For file id 42, how it was resolved.
    """

    name: str
    dims: tuple[int, ...]
    type: FileType
    shard: int
    offset: int
    start: int
    type42: Type42 | None = None

    @property
    def upstream_name(self) -> str:
        """Its name in the upstream dialect."""
        return native_to_upstream(self.name)

    @property
    def n_elements(self) -> int:
        """Product of the dimensions."""
        n = 1
        for dim in self.dims:
            n *= dim
        return n

    @property
    def n_bytes(self) -> int:
        """Bytes of its data, without padding."""
        return self.type.n_bytes(self.n_elements)


@dataclass(frozen=True)
class Header:
    """What the headers of a model file say, over all its shards; nothing is checked beyond the parse.

    Attributes:
        path: The file that was opened, the first shard.
        shards: The parsed shards, in order.
        tensors: All tensors, shard after shard in file order.
    """

    path: str
    shards: tuple[GGUFFile, ...]
    tensors: tuple[Tensor, ...]

    @property
    def kv(self) -> Mapping[str, KeyValue]:
        """Metadata with types: that of the first shard, which alone carries the model's keys."""
        return self.shards[0].kv

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Metadata values by key; arrays are read from the file when looked into."""
        return {key: entry.value for key, entry in self.kv.items()}

    @property
    def architecture(self) -> str | None:
        """``general.architecture``; None when absent or not a string."""
        entry = self.kv.get("general.architecture")
        return str(entry.value) if entry is not None and entry.type is ValueType.STR else None

    @property
    def alignment(self) -> int:
        """Alignment of the first shard's data section and tensors, in bytes."""
        return self.shards[0].alignment

    @property
    def data_start(self) -> int:
        """Where the first shard's data section starts, in bytes."""
        return self.shards[0].data_start

    @property
    def n_file_bytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def dialect(self) -> Dialect:
        """Which names the tensors have."""
        if self.architecture != ARCHITECTURE:
            return "other"
        forms = {form for tensor in self.tensors if (form := _form(tensor.name)) is not None}
        if len(forms) > 1:
            return "mixed"
        return forms.pop() if forms else "upstream"

    @cached_property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """Dimensions by tensor name as spelled in the file."""
        return {tensor.name: tensor.dims for tensor in self.tensors}

    def tensor(self, name: str) -> Tensor | None:
        """Look a tensor up by its name in the file's own or in the upstream dialect."""
        return self._by_name.get(name) or self._by_upstream_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def _by_upstream_name(self) -> dict[str, Tensor]:
        return {tensor.upstream_name: tensor for tensor in self.tensors}


@dataclass(frozen=True)
class HeaderReport:
    """The result of a header check that found nothing to refuse.

    Attributes:
        header: The header that was checked.
        hparams: The model's dimensions and constants; None for other architectures.
        derived_keys: Metadata keys that the file lacks and that were derived, by full name.
    """

    header: Header
    hparams: HParams | None
    derived_keys: dict[str, Any]

    @property
    def dialect(self) -> Dialect:
        """``native``, ``upstream`` or ``other``."""
        return self.header.dialect

    @cached_property
    def n_params(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.n_elements for tensor in self.header.tensors)

    @cached_property
    def type_counts(self) -> dict[str, int]:
        """Number of tensors by type name."""
        return dict(Counter(tensor.type.name for tensor in self.header.tensors))

    @cached_property
    def type_bytes(self) -> dict[str, int]:
        """Bytes by type name, without padding."""
        total: Counter[str] = Counter()
        for tensor in self.header.tensors:
            total[tensor.type.name] += tensor.n_bytes
        return dict(total)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse the header of a GGUF file and, if it is split, of its other shards.

    Only what a parser must refuse is refused (step 1 and the shards' numbers); a file with missing data,
    unusual type-42 strides or of any architecture is returned.

    Raises:
        ModelNotFoundError: The file or one of its shards does not exist.
        ModelFileError: A directory, a special file, no permission.
        FormatError: Or a subclass: not a GGUF file, or malformed.
    """
    return _open_model(os.fspath(path), check_bounds=False)


def check_header(source: str | os.PathLike[str] | Header, *, any_architecture: bool = False) -> HeaderReport:
    """Check everything that a load would refuse, and everything that would stop the engine's process.

    Args:
        source: A path, or a header that was read already.
        any_architecture: Accept well-formed files of other models. Their type-42 tensors may have mixed or
            unresolved meanings, as in upstream's parser; nothing else of them is checked beyond step 2.

    Raises:
        ModelNotFoundError: The file or one of its shards does not exist.
        ModelFileError: A directory, a special file, no permission.
        NotGGUFError: Not a GGUF file, or of a version or byte order that is not supported.
        TruncatedFileError: The file ends inside its header or before a tensor does.
        Type42Error: Type 42 with an unknown, ambiguous, mixed or unsupported meaning.
        UnsupportedModelError: Another architecture or variant.
        DialectError: Names of both dialects.
        MissingKeyError: A metadata key is absent or of the wrong type.
        MissingTensorError: A tensor is absent.
        TensorShapeError: A tensor has wrong dimensions or a type the engine cannot use there.
        FormatError: Anything else.
    """
    if isinstance(source, Header):
        header = source
        for shard in header.shards:
            _check_bounds(shard)
    else:
        header = _open_model(os.fspath(source), check_bounds=True)
    if any_architecture and header.architecture != ARCHITECTURE:
        return HeaderReport(header, None, {})
    _check_type42(header)
    _check_architecture(header)
    _check_alignment(header)
    _check_dialect(header)
    keys = read_model_keys(header.kv, header.dims, path=header.path)
    _check_mtp(header, keys.hparams.n_layer - keys.n_mtp, keys.n_mtp)
    _check_tensors(header, keys.hparams)
    return HeaderReport(header, keys.hparams, keys.derived)


# --- shards ---------------------------------------------------------------------------------------


def _open_model(path: str, *, check_bounds: bool) -> Header:
    shards = [_open_shard(path, check_bounds)]
    paths = _shard_paths(shards[0])
    seen = {tensor.name for tensor in shards[0].tensors}
    for i, shard_path in enumerate(paths[1:], start=1):
        shard = _open_shard(shard_path, check_bounds)
        _check_shard_number(shard, i)
        for tensor in shard.tensors:
            if tensor.name in seen:
                raise FormatError(
                    "two shards have a tensor of the same name",
                    path=shard.path,
                    tensor=tensor.name,
                    hint="The shards do not belong together; fetch them again.",
                )
            seen.add(tensor.name)
        shards.append(shard)
    if len(paths) > 1:
        expected = _split_key(shards[0], "split.tensors.count", ValueType.I32)
        if expected != len(seen):
            raise FormatError(
                "the shards do not have all tensors of the model",
                path=path,
                key="split.tensors.count",
                found=len(seen),
                expected=expected,
                hint="Fetch the shards again.",
            )
    return Header(path, tuple(shards), tuple(_all_tensors(shards)))


def _all_tensors(shards: list[GGUFFile]) -> Iterator[Tensor]:
    for i_shard, shard in enumerate(shards):
        for i, (info, type_) in enumerate(zip(shard.tensors, shard.types, strict=True)):
            n_dims = max((j for j in range(1, 4) if info.dims[j] != 1), default=0) + 1
            yield Tensor(
                name=info.name,
                dims=info.dims[:n_dims],
                type=type_,
                shard=i_shard,
                offset=info.offset,
                start=shard.data_start + info.offset,
                type42=shard.type42.get(i),
            )


def _open_shard(path: str, check_bounds: bool) -> GGUFFile:
    shard = parse_gguf(path)
    if check_bounds:
        _check_bounds(shard)
    return shard


def _check_bounds(shard: GGUFFile) -> None:
    seen: set[str] = set()
    for i, (tensor, type_) in enumerate(zip(shard.tensors, shard.types, strict=True)):
        # the parser compares whole names, the loader C strings
        if tensor.name in seen:
            raise FormatError("two tensors have the same name", path=shard.path, tensor=tensor.name)
        seen.add(tensor.name)
        have = max(0, shard.size - shard.data_start - tensor.offset)
        need = type_.n_bytes(tensor.n_elements)
        if need > have:
            type42 = shard.type42.get(i)
            raise TruncatedFileError(
                "the file ends before the tensor does",
                path=shard.path,
                tensor=tensor.name,
                found=f"{have:,} bytes" if type42 is None else type42.evidence(),
                expected=f"{need:,}",
                hint=_INCOMPLETE,
            )


def _shard_paths(first: GGUFFile) -> list[str]:
    """Return the paths of all shards, by the file name of the first as the engine derives them."""
    n_shards = _split_key(first, "split.count", ValueType.U16, default=1)
    if n_shards <= 1:
        return [first.path]
    number = _split_key(first, "split.no", ValueType.U16)
    if number != 0:
        raise FormatError(
            "a split model is opened by its first shard",
            path=first.path,
            key="split.no",
            found=number,
            expected=0,
            hint=f"Open the file whose name ends in -00001-of-{n_shards:05d}.gguf.",
        )
    suffix = f"-00001-of-{n_shards:05d}.gguf"
    if not first.path.endswith(suffix) or len(first.path) == len(suffix):
        raise FormatError(
            "the name of the first shard does not fit its keys",
            path=first.path,
            key="split.count",
            found=os.path.basename(first.path),
            expected=f"a name that ends in {suffix}",
            hint="Give the shards their original names.",
        )
    prefix = first.path.removesuffix(suffix)
    return [f"{prefix}-{i:05d}-of-{n_shards:05d}.gguf" for i in range(1, n_shards + 1)]


def _check_shard_number(shard: GGUFFile, expected: int) -> None:
    number = _split_key(shard, "split.no", ValueType.U16)
    if number != expected:
        raise FormatError(
            "a shard has the wrong number",
            path=shard.path,
            key="split.no",
            found=number,
            expected=expected,
            hint="Give the shards their original names.",
        )


def _split_key(shard: GGUFFile, key: str, type_: ValueType, default: int | None = None) -> int:
    entry = shard.kv.get(key)
    if entry is None and default is not None:
        return default
    if entry is None or entry.type is not type_:
        raise MissingKeyError(
            "a shard does not say where it belongs",
            path=shard.path,
            key=key,
            found="no such key" if entry is None else entry.type_name,
            expected=type_,
            hint="The shards were not written by a GGUF splitter; fetch them again.",
        )
    return int(entry.value)


# --- type 42, architecture, dialect ---------------------------------------------------------------


def _check_type42(header: Header) -> None:
    first: Tensor | None = None
    for tensor in header.tensors:
        verdict = tensor.type42
        if verdict is None:
            continue
        path = header.shards[tensor.shard].path
        if verdict.basis in (Basis.UNKNOWN, Basis.TOO_SMALL) or verdict.type == PRISM_Q2_0:
            raise unreadable_type42(verdict, path=path)
        first = first or tensor
        if tensor.type != first.type:
            raise Type42Error(
                "type 42 has mixed meanings in one model",
                path=path,
                tensor=tensor.name,
                found=f"{tensor.type.name} ({verdict.evidence()})",
                expected=f"{first.type.name}, as in '{first.name}'",
                hint="The file was put together from two sources; convert the checkpoint again.",
            )


def _check_architecture(header: Header) -> None:
    key, found = "general.architecture", header.architecture
    if found is None:
        entry = header.kv.get(key)
        raise MissingKeyError(
            "the file does not say what model it is",
            path=header.path,
            key=key,
            found="no such key" if entry is None else entry.type_name,
            expected=ValueType.STR,
            hint="Convert the checkpoint again.",
        )
    if found != ARCHITECTURE:
        raise UnsupportedModelError(
            "this package does not run the model's architecture",
            path=header.path,
            key=key,
            found=repr(found),
            expected=repr(ARCHITECTURE),
            hint="DeepSeek-V4.1 shares V4's name only: its layers, tensors and FP8 tiles are different."
            if found == "deepseek41"
            else "Use llama.cpp, which runs many architectures.",
        )


def _check_alignment(header: Header) -> None:
    # the CPU backend asserts that mapped weights start at multiples of this
    for shard in header.shards:
        if shard.alignment < _MIN_ALIGNMENT:
            raise FormatError(
                "the tensors are packed too tightly to be mapped into memory",
                path=shard.path,
                key="general.alignment",
                found=shard.alignment,
                expected=f"at least {_MIN_ALIGNMENT}",
                hint=_CONVERT_AGAIN,
            )


def _form(name: str) -> Literal["native", "upstream"] | None:
    """Tell which dialect alone uses a name; None when both do."""
    if native_to_upstream(name) != name:
        return "native"
    return "upstream" if upstream_to_native(name) != name else None


def _check_dialect(header: Header) -> None:
    first: Tensor | None = None
    for tensor in header.tensors:
        form = _form(tensor.name)
        if form is None:
            continue
        first = first or tensor
        if form != (expected := _form(first.name)):
            raise DialectError(
                "the file mixes native and upstream tensor names",
                path=header.path,
                tensor=tensor.name,
                found=f"a name of the {form} dialect",
                expected=f"the {expected} dialect, as in '{first.name}'",
                hint="The file was put together from two sources; convert the checkpoint again.",
            )


# --- tensors --------------------------------------------------------------------------------------

# types that no product and no look-up of rows takes
_NOT_WEIGHTS: Final = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})

# tensors that the engine takes when a file has them, all F32: layer suffix, whether there is one value
# per expert
_OPTIONAL: Final = {
    "exp_probs_b_vl.bias": True,
    **{
        f"ffn_{part}_shexp.{kind}": False
        for part in ("gate", "down", "up")
        for kind in ("scale", "input_scale")
    },
    **{
        f"ffn_{part}_exps.{kind}": True
        for part in ("gate", "down", "up")
        for kind in ("scale", "input_scale")
    },
}
_OPTIONAL_NVFP4_HEAD: Final = ("output.scale", "output.input_scale")


def _check_mtp(header: Header, n_trunk: int, n_mtp: int) -> None:
    tensor = header.tensor(f"blk.{n_trunk}.nextn.eh_proj.weight") if n_mtp > 0 else None
    if tensor is not None:
        raise UnsupportedModelError(
            "the file has multi-token prediction layers",
            path=header.path,
            tensor=tensor.name,
            hint="Use a file without them; they serve speculative decoding only.",
        )


def _check_tensors(header: Header, hparams: HParams) -> None:
    table = tensor_table(hparams)
    for spec in table:
        name = spec.native if header.dialect == "native" else spec.upstream
        tensor = header.tensor(name)
        if tensor is None:
            raise MissingTensorError(
                "a tensor that the model needs is absent",
                path=header.path,
                tensor=name,
                found="no such tensor",
                expected=_shape(spec.dims),
                hint="The file is incomplete; fetch or convert it again.",
            )
        _check_dims(header, tensor, _allowed_dims(spec, hparams))
        _check_type(header, tensor, spec)
    _check_extra_tensors(header, hparams, {spec.upstream for spec in table})


def _allowed_dims(spec: TensorSpec, hparams: HParams) -> tuple[tuple[int, ...], ...]:
    if spec.upstream.endswith(".attn_output_a.weight"):
        # upstream's own saver writes the per-group view of the same data
        return spec.dims, (spec.dims[0], hparams.o_lora_rank, hparams.o_groups)
    return (spec.dims,)


def _check_dims(header: Header, tensor: Tensor, allowed: tuple[tuple[int, ...], ...]) -> None:
    if tensor.dims not in {_trimmed(dims) for dims in allowed}:
        raise TensorShapeError(
            "a tensor has wrong dimensions",
            path=header.path,
            tensor=tensor.name,
            found=_shape(tensor.dims),
            expected=_shape(allowed[0]),
            hint=_CONVERT_AGAIN,
        )


def _check_type(header: Header, tensor: Tensor, spec: TensorSpec) -> None:
    if spec.kind == "i32":
        ok, expected = tensor.type.name == "I32", "I32"
    elif len(spec.dims) == 1:
        ok, expected = tensor.type.name == "F32", "F32"
    else:
        ok, expected = tensor.type.name not in _NOT_WEIGHTS, "F32, F16, BF16 or a quantised weight type"
    if not ok:
        raise _wrong_type(header, tensor, expected)


def _wrong_type(header: Header, tensor: Tensor, expected: str) -> TensorShapeError:
    return TensorShapeError(
        "a tensor has a type that the engine cannot use there",
        path=header.path,
        tensor=tensor.name,
        found=tensor.type.name,
        expected=expected,
        hint=_CONVERT_AGAIN,
    )


def _check_extra_tensors(header: Header, hparams: HParams, known: set[str]) -> None:
    optional = {
        f"blk.{il}.{suffix}": hparams.n_expert if is_per_expert else 1
        for il in range(hparams.n_layer)
        for suffix, is_per_expert in _OPTIONAL.items()
    }
    head = header.tensor("output.weight")
    if head is not None and head.type.name == "NVFP4":
        optional |= dict.fromkeys(_OPTIONAL_NVFP4_HEAD, 1)
    for tensor in header.tensors:
        if tensor.upstream_name in known:
            continue
        n = optional.get(tensor.upstream_name)
        if n is None:
            raise UnsupportedModelError(
                "the file has a tensor that DeepSeek-V4 does not have",
                path=header.path,
                tensor=tensor.name,
                found=_shape(tensor.dims),
                hint="It belongs to a variant that this package does not run.",
            )
        _check_dims(header, tensor, ((n,),))
        if tensor.type.name != "F32":
            raise _wrong_type(header, tensor, "F32")


def _trimmed(dims: tuple[int, ...]) -> tuple[int, ...]:
    n = len(dims)
    while n > 1 and dims[n - 1] == 1:
        n -= 1
    return dims[:n]


def _shape(dims: tuple[int, ...]) -> str:
    return " x ".join(map(str, dims))
