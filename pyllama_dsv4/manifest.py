"""SHA-256 sums of a model file, tensor by tensor: a small JSON file that travels instead of the checkpoint.

It owns the format of that file, and what a file is compared with it for; hashing is part of ``verify``'s pass over
the data. Sums are of the tensors' bytes without padding, so a file that was split, or whose names were translated,
still answers to the manifest of the original.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from .errors import DiskFullError, FormatError, ModelFileError, ModelNotFoundError
from .findings import Finding, Findings
from .header import Header

__all__ = ["Manifest", "ManifestShard", "ManifestTensor", "read_manifest", "write_manifest"]

FORMAT: Final = "pyllama-dsv4 manifest"
VERSION: Final = 1
MAX_BYTES: Final = 100_000_000


@dataclass(frozen=True)
class ManifestShard:
    """One file of the model.

    Attributes:
        name: File name without its folder.
        n_bytes: Size.
        header_sha256: Sum of everything before the data section: keys, names, offsets.
    """

    name: str
    n_bytes: int
    header_sha256: str


@dataclass(frozen=True)
class ManifestTensor:
    """One tensor.

    Attributes:
        name: As spelled in the file.
        type: Type name.
        dims: ne0 first; trailing ones are left out.
        n_bytes: Size without padding.
        sha256: Sum of its bytes, 64 hexadecimal digits.
    """

    name: str
    type: str
    dims: tuple[int, ...]
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``verify`` writes about a file that it found sound.

    Attributes:
        dialect: ``native``, ``upstream`` or ``other``.
        shards: Its files, in order.
        tensors: Its tensors, in file order.
    """

    dialect: str
    shards: tuple[ManifestShard, ...]
    tensors: tuple[ManifestTensor, ...]


def write_manifest(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write a manifest; an existing file is replaced when the new one is complete.

    Raises:
        DiskFullError: The disk is full.
        ModelFileError: The file cannot be written.
    """
    target = Path(path)
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    # one tensor per line: the file can be read, sorted and compared by people
    lines = [json.dumps(tensor, ensure_ascii=True) for tensor in content.pop("tensors")]
    head = json.dumps(content, indent=1, ensure_ascii=True)
    text = head.removesuffix("\n}") + ',\n "tensors": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="ascii")
        os.replace(partial, target)
    except OSError as error:
        kind = DiskFullError if error.errno == 28 else ModelFileError
        raise kind("cannot write the manifest", path=target, found=error.strerror or error) from error


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest.

    Raises:
        ModelNotFoundError: No such file.
        ModelFileError: It cannot be read.
        FormatError: It is not a manifest, or of a later version.
    """
    target = Path(path)
    try:
        n_bytes = target.stat().st_size
        raw = target.read_bytes() if n_bytes <= MAX_BYTES else b""
    except FileNotFoundError:
        raise ModelNotFoundError("no such manifest", path=target) from None
    except OSError as error:
        raise ModelFileError(
            "cannot read the manifest", path=target, found=error.strerror or error
        ) from error
    if n_bytes > MAX_BYTES:
        raise _malformed(target, f"{n_bytes:,} bytes", f"at most {MAX_BYTES:,}")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _malformed(target, error, "JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _malformed(target, "another JSON file", f'"format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise _malformed(target, f"version {content.get('version')!r}", f"version {VERSION}")
    try:
        return _manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(target, f"{type(error).__name__}: {error}", "the fields of a manifest") from error


def _manifest(content: Mapping[str, Any]) -> Manifest:
    shards = tuple(
        ManifestShard(str(s["name"]), _count(s["n_bytes"]), _sum(s["header_sha256"]))
        for s in content["shards"]
    )
    tensors = tuple(
        ManifestTensor(
            str(t["name"]),
            str(t["type"]),
            tuple(_count(dim) for dim in t["dims"]),
            _count(t["n_bytes"]),
            _sum(t["sha256"]),
        )
        for t in content["tensors"]
    )
    if not shards or len({t.name for t in tensors}) != len(tensors):
        raise ValueError("no shards, or a tensor twice")
    return Manifest(str(content["dialect"]), shards, tensors)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _sum(value: object) -> str:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise ValueError(f"{value!r} is not a SHA-256 sum")
    return value


def _malformed(path: Path, found: object, expected: str) -> FormatError:
    return FormatError(
        "not a manifest of this package",
        path=path,
        found=found,
        expected=expected,
        hint="Write one on the machine that has the original: pyllama-dsv4 verify FILE --manifest M.",
    )


def check_against(
    manifest: Manifest,
    header: Header,
    header_sums: list[str],
    sums: Mapping[str, str],
    findings: Findings,
) -> list[str]:
    """Compare a file with a manifest.

    Args:
        manifest: The manifest.
        header: The file.
        header_sums: Sum of each shard's bytes before its data section.
        sums: Sum of each tensor by name; tensors that could not be read are absent.
        findings: Where to report to.

    Returns:
        Notes for the user.
    """
    from .tensors import native_to_upstream

    wanted = {native_to_upstream(tensor.name): tensor for tensor in manifest.tensors}
    for tensor in header.tensors:
        path = header.shards[tensor.shard].path
        expected = wanted.pop(tensor.upstream_name, None)
        if expected is None:
            _add(
                findings, "manifest_extra", path, tensor.name, "a tensor that the manifest does not have", ""
            )
        elif (tensor.type.name, tensor.dims) != (expected.type, expected.dims):
            _add(
                findings,
                "manifest_type",
                path,
                tensor.name,
                f"{tensor.type.name} {' x '.join(map(str, tensor.dims))}",
                f"{expected.type} {' x '.join(map(str, expected.dims))}",
            )
        elif tensor.name in sums and sums[tensor.name] != expected.sha256:
            _add(findings, "sha256", path, tensor.name, sums[tensor.name], expected.sha256, tensor.start)
    for missing in wanted.values():
        _add(findings, "manifest_missing", header.path, missing.name, "no such tensor", "one of the manifest")
    return _check_shards(manifest, header, header_sums, findings)


def _check_shards(
    manifest: Manifest, header: Header, header_sums: list[str], findings: Findings
) -> list[str]:
    if header.dialect != manifest.dialect or len(header.shards) != len(manifest.shards):
        return [
            f"the manifest is of a {manifest.dialect} file in {len(manifest.shards)} parts, this is a "
            f"{header.dialect} file in {len(header.shards)}: tensors were compared, keys were not"
        ]
    for shard, expected, sum_ in zip(header.shards, manifest.shards, header_sums, strict=True):
        if shard.size != expected.n_bytes:
            _add(findings, "size", shard.path, None, f"{shard.size:,} bytes", f"{expected.n_bytes:,}")
        if sum_ != expected.header_sha256:
            _add(findings, "header_sha256", shard.path, None, sum_, expected.header_sha256, 0)
    return []


def _add(
    findings: Findings,
    check: str,
    path: str,
    tensor: str | None,
    found: str,
    expected: str,
    offset: int | None = None,
) -> None:
    findings.add(Finding(check, "error", path, tensor=tensor, offset=offset, found=found, expected=expected))
