"""Recipes: what a GGUF file does not hold of its checkpoint, so that the checkpoint can be rebuilt from it.

A recipe is a ZIP archive of two members: ``recipe.json`` (shards with size and SHA-256, the hashes of the other files)
and ``headers``, the shards' headers verbatim, one behind the other. It says nothing about how tensors were converted:
that follows from their names. Rebuilding is ``rebuild``'s.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import CancelledError, FormatError, ModelFileError, ModelNotFoundError
from pyllama_dsv4.safetensors import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    SourceTensor,
    is_plain_shard_name,
    parse_header,
)

from .writer import OutputFile, Progress

__all__ = ["FileEntry", "Recipe", "ShardEntry", "is_current", "read_recipe", "write_recipe"]

FORMAT: Final = 1
MANIFEST: Final = "recipe.json"
HEADERS: Final = "headers"
# one date for all recipes: the same checkpoint gives the same bytes
DATE: Final = (1980, 1, 1, 0, 0, 0)

MAX_SHARDS: Final = 100_000
MAX_HEADERS_BYTES: Final = 1 << 30
MAX_MANIFEST_BYTES: Final = 1 << 28
PIECE_BYTES: Final = 8 << 20
REPORT_INTERVAL_S: Final = 0.1


@dataclass(frozen=True)
class ShardEntry:
    """One safetensors shard.

    Attributes:
        name: File name.
        n_bytes: Size of the file.
        sha256: Of the whole file, in hexadecimal.
        n_bytes_header: Size of its header, length included.
    """

    name: str
    n_bytes: int
    sha256: str
    n_bytes_header: int


@dataclass(frozen=True)
class FileEntry:
    """Another file of the checkpoint, of which only the hash is kept; ``name`` may have folders before it."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """What is needed to rebuild the shards of a checkpoint from a GGUF file.

    Attributes:
        path: The recipe.
        shards: In the order of their names.
        headers: The shards' headers, in the same order.
        files: The checkpoint's other files.
    """

    path: Path
    shards: Sequence[ShardEntry]
    headers: Sequence[bytes]
    files: Sequence[FileEntry]

    def tensors(self, i: int) -> list[SourceTensor]:
        """Return the tensors of a shard, in the order of their data.

        Raises:
            CheckpointError: Its header is malformed.
        """
        return parse_header(self.headers[i], Path(self.shards[i].name), self.shards[i].n_bytes)


def write_recipe(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    n_threads: int = 1,
    progress: Progress | None = None,
) -> Recipe:
    """Write the recipe of a checkpoint. Reads every byte of it once, for the hashes.

    Args:
        checkpoint: The checkpoint folder.
        path: The recipe to write; a few hundred KB for V4-Flash.
        n_threads: Shards hashed at the same time.
        progress: Called as ``progress(bytes_done, bytes_total, file_name)``; returning False cancels.

    Returns:
        What was written.

    Raises:
        CheckpointError: The checkpoint is malformed or incomplete.
        ModelFileError: A file cannot be read or written.
        DiskFullError: There is not enough space.
        CancelledError: ``progress`` returned False.
    """
    with Checkpoint(checkpoint) as source:
        others = _other_files(source, Path(path))
        headers = [source.header(shard) for shard in source.shards]
        sums = _hash_all([*source.shards, *others], n_threads, progress)
    shards = [
        ShardEntry(shard.name, *sums[shard], len(header))
        for shard, header in zip(source.shards, headers, strict=True)
    ]
    files = [FileEntry(other.relative_to(source.folder).as_posix(), *sums[other]) for other in others]
    manifest = {
        "format": FORMAT,
        "shards": [asdict(shard) for shard in shards],
        "files": [asdict(file) for file in files],
    }
    raw = json.dumps(manifest, ensure_ascii=False, indent=1).encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in ((MANIFEST, raw), (HEADERS, b"".join(headers))):
            archive.writestr(zipfile.ZipInfo(name, DATE), content, zipfile.ZIP_LZMA)
    with OutputFile(path, b"") as out:
        out.write(buffer.getvalue())
        out.commit()
    return Recipe(out.path, shards, headers, files)


def _other_files(source: Checkpoint, recipe: Path) -> list[Path]:
    """List what else a checkpoint consists of: no hidden files, none that a conversion into its folder leaves there."""
    found = []
    for folder, names, files in os.walk(source.folder):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(folder) / name for name in files if not name.startswith(".") and ".gguf" not in name]
    return sorted(
        p for p in found if p.is_file() and p not in source.shards and p.resolve() != recipe.resolve()
    )


def _hash_all(
    paths: Sequence[Path], n_threads: int, progress: Progress | None
) -> Mapping[Path, tuple[int, str]]:
    """Return size and SHA-256 of files."""
    n_total = sum(path.stat().st_size for path in paths)
    done = dict.fromkeys(paths, 0)
    is_cancelled = False

    def hash_one(path: Path) -> tuple[int, str]:
        digest, buffer = hashlib.sha256(), np.empty(PIECE_BYTES, np.uint8)
        try:
            with open(path, "rb", buffering=0) as f:
                while n := f.readinto(buffer.data):
                    if is_cancelled:
                        break
                    digest.update(buffer[:n].data)
                    done[path] += n
        except OSError as e:
            raise ModelFileError("cannot read", path=path, found=e.strerror or e) from e
        return done[path], digest.hexdigest()

    with ThreadPoolExecutor(n_threads, thread_name_prefix="hash") as pool:
        futures = {pool.submit(hash_one, path): path for path in paths}
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, REPORT_INTERVAL_S, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                name = futures[next(iter(pending or finished))].name
                if progress is not None and progress(sum(done.values()), n_total, name) is False:
                    raise CancelledError("writing the recipe was cancelled", path=paths[0].parent)
        except BaseException:
            is_cancelled = True
            pool.shutdown(cancel_futures=True)
            raise
    return {path: future.result() for future, path in futures.items()}


def is_current(path: str | os.PathLike[str], checkpoint: str | os.PathLike[str]) -> bool:
    """Tell whether a recipe exists that was written after the shards, and with their headers."""
    path = Path(path)
    try:
        recipe = read_recipe(path)
        written_ns = path.stat().st_mtime_ns
    except (FormatError, OSError):
        return False
    with Checkpoint(checkpoint) as source:
        stamps = [source.stamp(shard) for shard in source.shards]
        return (
            [shard.name for shard in source.shards] == [entry.name for entry in recipe.shards]
            and [n_bytes for n_bytes, _ in stamps] == [entry.n_bytes for entry in recipe.shards]
            and all(changed_ns < written_ns for _, changed_ns in stamps)
            and [source.header(shard) for shard in source.shards] == list(recipe.headers)
        )


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFileError: It cannot be read.
        FormatError: It is not a recipe, or a malformed one.
        CheckpointError: A header in it is malformed.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(_member(archive, MANIFEST, MAX_MANIFEST_BYTES, path))
            raw = _member(archive, HEADERS, MAX_HEADERS_BYTES, path)
    except FileNotFoundError as e:
        raise ModelNotFoundError("no such recipe", path=path) from e
    except OSError as e:
        raise ModelFileError("cannot read the recipe", path=path, found=e.strerror or e) from e
    except (
        zipfile.BadZipFile,
        lzma.LZMAError,
        EOFError,
        ValueError,
        RecursionError,
        NotImplementedError,
    ) as e:
        raise _malformed(path, e, "what convert --recipe writes") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise _malformed(path, f"format {ascii(found)[:40]}", FORMAT)
    shards = [ShardEntry(**_entry(path, e, _SHARD_FIELDS)) for e in _list(path, manifest, "shards")]
    files = [FileEntry(**_entry(path, e, _FILE_FIELDS)) for e in _list(path, manifest, "files")]
    headers, start = [], 0
    for shard in shards:
        header = raw[start : start + shard.n_bytes_header]
        start += shard.n_bytes_header
        if not is_plain_shard_name(shard.name):
            raise _malformed(
                path, f"the shard name {ascii(shard.name)[:80]}", "the name of a .safetensors file"
            )
        if not LENGTH_BYTES <= len(header) == shard.n_bytes_header <= MAX_HEADER_BYTES:
            raise _malformed(path, f"{len(header)} bytes of header for {shard.name}", shard.n_bytes_header)
        if int.from_bytes(header[:LENGTH_BYTES], "little") + LENGTH_BYTES != len(header):
            raise _malformed(path, f"a header of another length for {shard.name}", len(header))
        headers.append(header)
    if start != len(raw):
        raise _malformed(path, f"{len(raw) - start} bytes after the last header", "none")
    if len({shard.name for shard in shards}) != len(shards):
        raise _malformed(path, "two shards of one name", "different names")
    return Recipe(path, shards, headers, files)


_SHARD_FIELDS: Final = {"name": str, "n_bytes": int, "sha256": str, "n_bytes_header": int}
_FILE_FIELDS: Final = {"name": str, "n_bytes": int, "sha256": str}


def _member(archive: zipfile.ZipFile, name: str, limit: int, path: Path) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise _malformed(path, f"no member {name!r}", "one") from None
    if info.file_size > limit:
        raise _malformed(path, f"{info.file_size} bytes of {name!r}", f"at most {limit}")
    return archive.read(info)


def _list(path: Path, manifest: Mapping[str, Any], key: str) -> list[Any]:
    value = manifest.get(key)
    if not isinstance(value, list) or len(value) > MAX_SHARDS:
        raise _malformed(path, f"{key}: {ascii(value)[:40]}", f"a list of at most {MAX_SHARDS}")
    return value


def _entry(path: Path, value: object, fields: Mapping[str, type]) -> dict[str, Any]:
    is_good = isinstance(value, dict) and value.keys() == fields.keys()
    if not is_good or not isinstance(value, dict) or any(type(value[k]) is not t for k, t in fields.items()):
        raise _malformed(path, ascii(value)[:80], f"an object of {', '.join(fields)}")
    return value


def _malformed(path: Path, found: object, expected: object) -> FormatError:
    return FormatError("malformed recipe", path=path, found=found, expected=expected)
