"""The demo model: a tiny native file with random weights, made on the first call and kept in the cache."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pyllama_dsv4.convert import convert
from pyllama_dsv4.errors import DiskFullError, ModelFileError, PyllamaError

from .checkpoints import write_checkpoint
from .configs import tiny_config
from .tokenizers import N_VOCAB, Tokenizer, find_deepseek_tokenizer

__all__ = ["demo_model"]

DEMO_NAME: Final = "Random demo of DeepSeek V4"
DEMO_SEED: Final = 4
KEEP_DAYS: Final = 30


def demo_model(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a tiny native file with random weights, built on the first call.

    It has V4's real vocabulary if the package ``deepseek-tokenizer`` is installed, else a small byte-level
    one. The file is made by this generator and the converter, like any other, and cached under a name that
    changes with them.

    Args:
        cache_dir: Folder to keep it in; by default the user's cache folder.

    Raises:
        DiskFullError, ModelFileError: It cannot be written.
    """
    if cache_dir is None:
        from platformdirs import user_cache_path

        cache_dir = user_cache_path("pyllama-dsv4")
    cache = Path(cache_dir)
    tokenizer: Tokenizer = "bytes" if find_deepseek_tokenizer() is None else "deepseek"
    path = cache / f"demo-{tokenizer}-{_demo_digest(tokenizer)}.gguf"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _build_demo(path, tokenizer)
    except PyllamaError:
        raise
    except OSError as e:
        kind = DiskFullError if e.errno == errno.ENOSPC else ModelFileError
        raise kind(
            "cannot build the demo model",
            path=cache,
            found=e.strerror or e,
            hint="Free some space there (250 MB), or name a model file instead",
        ) from e
    _forget_old_demos(cache, path)
    return path


def _build_demo(path: Path, tokenizer: Tokenizer) -> None:
    # FP8 tiles need multiples of 128, so 128 is the narrowest model; the vocabulary makes up most of the file
    config = tiny_config(hidden_size=128, vocab_size=N_VOCAB[tokenizer])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="demo-") as folder:
        write_checkpoint(folder, config, seed=DEMO_SEED, tokenizer=tokenizer)
        result = convert(folder, Path(folder) / "demo.gguf", name=DEMO_NAME)
        os.replace(result.path, path)


def _demo_digest(tokenizer: Tokenizer) -> str:
    """Hash everything the demo file's bytes depend on."""
    package = Path(__file__).parents[1]
    code = [package / name for name in ("checkpoint.py", "safetensors.py", "tensors.py", "gguf_types.py")]
    for folder in ("synth", "convert"):
        code += sorted((package / folder).glob("*.py"))
    code += sorted(package.glob("_codec*.so"))
    code += sorted((package / "data").glob("*.jinja"))
    place = find_deepseek_tokenizer()
    if tokenizer == "deepseek" and place is not None:
        code += [place / "tokenizer.json", place / "tokenizer_config.json"]
    digest = hashlib.sha256()
    for file in code:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _forget_old_demos(cache: Path, path: Path) -> None:
    """Remove demo files of other versions, and what killed builds left, when unused for a while."""
    limit = time.time() - KEEP_DAYS * 86400
    with suppress(OSError):  # a cache that cannot be changed still serves
        os.utime(path)
        for old in cache.glob("demo-*"):
            if old.stat().st_mtime < limit:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
