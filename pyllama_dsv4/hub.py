"""Models out of a repository of the Hugging Face hub, by its own client (the extra ``hub``).

Owns which files of a repository make a model, progress and the names of errors. Leaves the cache, tokens, endpoints
(``HF_ENDPOINT``) and resuming to the client.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import ArgumentError, CancelledError, ModelFileError, ModelNotFoundError

__all__ = ["download"]

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def download(
    repo_id: str,
    filename: str,
    *,
    additional_files: Sequence[str] = (),
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    on_progress: Callable[[float], bool] | None = None,
) -> Path:
    """Fetch a model, all its shards, and further files; what is there already is not fetched again.

    Args:
        repo_id: ``owner/name``.
        filename: Name or pattern (``*Q4_K_M.gguf``) of one file; of a split model any or all of its shards.
        additional_files: Names or patterns of further files, each of one file.
        revision: Branch, tag or commit.
        local_dir: Folder to put the files in; None puts them in the client's cache.
        cache_dir: Another cache.
        token: For private repositories; None takes the one that the client knows.
        on_progress: Called with the fraction of all files, 0..1; returning False cancels.

    Returns:
        The path of the model, or of its first shard.

    Raises:
        ImportError: The client is not installed.
        ModelNotFoundError: No such repository, revision or file.
        ArgumentError: A pattern of several files.
        ModelFileError: It cannot be fetched.
        CancelledError: `on_progress` returned False.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors as hub_errors
    except ImportError as error:
        raise ImportError("from_pretrained needs huggingface_hub: pip install 'pyllama-dsv4[hub]'") from error
    try:
        files = hub.HfApi(token=token).list_repo_files(repo_id, revision=revision)
        first, *rest = _with_shards(_one_of(files, filename, repo_id, is_model=True), files, repo_id)
        rest += [_one_of(files, pattern, repo_id) for pattern in additional_files]
        n_files = 1 + len(rest)
        paths = [
            hub.hf_hub_download(
                repo_id,
                name,
                revision=revision,
                local_dir=None if local_dir is None else Path(local_dir),
                cache_dir=None if cache_dir is None else Path(cache_dir),
                token=token,
                tqdm_class=_bar(on_progress, i, n_files),
            )
            for i, name in enumerate((first, *rest))
        ]
    except (
        hub_errors.RepositoryNotFoundError,
        hub_errors.RevisionNotFoundError,
        hub_errors.EntryNotFoundError,
    ) as error:
        raise ModelNotFoundError(
            "fetching a model", path=repo_id, found=_first_line(error), hint="Private ones need token=."
        ) from error
    except hub_errors.HFValidationError as error:
        raise ArgumentError(
            "fetching a model", key="repo_id", found=repr(repo_id), expected="owner/name"
        ) from error
    except (getattr(hub_errors, "HTTPError", OSError), OSError) as error:  # the first with clients on httpx
        if isinstance(error, (ModelFileError, CancelledError)):
            raise
        raise ModelFileError("fetching a model", path=repo_id, found=_first_line(error)) from error
    return Path(paths[0])


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _one_of(files: Sequence[str], pattern: str, repo_id: str, *, is_model: bool = False) -> str:
    found = [name for name in files if fnmatch.fnmatch(name, pattern)]
    if is_model and len(found) > 1:  # the shards of one model
        stems = {_SHARD.sub("", name) if _SHARD.search(name) else None for name in found}
        if len(stems) == 1 and None not in stems:
            return min(found)
    if not found:
        known = [name for name in files if name.endswith(".gguf")] or list(files)
        raise ModelNotFoundError(
            "fetching a model: no file of the repository has this name",
            path=repo_id,
            found=", ".join(known[:10]) or "no files",
            expected=pattern,
        )
    if len(found) > 1:
        raise ArgumentError(
            "fetching a model: several files have this name",
            key="filename",
            found=", ".join(found[:10]),
            expected="a pattern of one",
        )
    return found[0]


def _with_shards(name: str, files: Sequence[str], repo_id: str) -> list[str]:
    """Return the shards that a model consists of, the first first."""
    match = _SHARD.search(name)
    if match is None:
        return [name]
    shards = [f"{name[: match.start()]}-{i:05}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]
    for shard in shards:
        if shard not in files:
            raise ModelNotFoundError(
                "fetching a model: a shard is not in the repository", path=repo_id, expected=shard
            )
    return shards


def _bar(on_progress: Callable[[float], bool] | None, index: int, n_files: int) -> Any:
    """Return a class of progress bars that print nothing and tell `on_progress`."""
    tqdm: Any = import_module("tqdm").tqdm  # without types

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def clear(self, *args: Any, **kwargs: Any) -> None:
            pass

        def close(self) -> None:
            self.leave = True
            self.disable = True

        def update(self, n: float | None = 1) -> bool:
            self.n += n or 0
            if (
                on_progress is not None
                and self.total
                and not on_progress((index + self.n / self.total) / n_files)
            ):
                raise CancelledError("fetching a model", hint="The progress callback returned False.")
            return True

    return Bar
