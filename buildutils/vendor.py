"""Prepare vendor/llama.cpp: fetch the pinned archive, prune it, apply the patch series, stamp the result.

This is the only code that uses the network (pip, by package name). It is build-time only and needs nothing beyond
the standard library (plus tomli on Python 3.10), pip and git. What is compiled from the tree is CMake's business;
how patches are edited and exported is tools/patches.py's.

The archive comes from the first of: ``PYLLAMA_DSV4_LLAMA_CPP`` (a local archive of the pinned package, or a
checkout of llama.cpp at the pinned commit), the user's cache folder, the package index. Archives are always
checked against the pinned SHA-256, wherever they came from.
"""

from __future__ import annotations

import filecmp
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "vendor" / "llama.cpp"
PATCHES = ROOT / "patches"
STAMP = ".pyllama-dsv4-stamp.json"
ENV_SOURCE = "PYLLAMA_DSV4_LLAMA_CPP"
ENV_CACHE = "PYLLAMA_DSV4_CACHE_DIR"

__all__ = ["VendorError", "apply_series", "ensure", "pin", "pristine", "read_series", "series_digest"]


class VendorError(RuntimeError):
    """The upstream source cannot be prepared; the message says what to do."""


def say(text: str) -> None:
    print(f"[vendor] {text}", file=sys.stderr, flush=True)


def pin() -> dict[str, Any]:
    """Return vendor/pin.toml as nested dictionaries."""
    with open(ROOT / "vendor" / "pin.toml", "rb") as file:
        config: dict[str, Any] = tomllib.load(file)
    return config


def cache_dir() -> Path:
    """Return the folder for archives and extracted trees (PYLLAMA_DSV4_CACHE_DIR, else the XDG cache)."""
    chosen = os.environ.get(ENV_CACHE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyllama-dsv4"


# --- the series ----------------------------------------------------------------------------------------


def read_series(patches_dir: Path = PATCHES) -> list[Path]:
    """Return the patch files in order of application. Lines starting with ``#`` or ``budget`` are not patches."""
    series = patches_dir / "series"
    if not series.exists():
        return []
    names = [line.split("#", 1)[0].strip() for line in series.read_text(encoding="utf-8").splitlines()]
    return [patches_dir / name for name in names if name and not name.startswith("budget")]


def series_digest(patches_dir: Path = PATCHES) -> str:
    """Return 16 hex digits over the names and bytes of the series in order; the build's identity with the pin."""
    digest = hashlib.sha256()
    for patch in read_series(patches_dir):
        digest.update(patch.name.encode() + b"\0" + patch.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def apply_series(tree: Path, patches_dir: Path = PATCHES) -> None:
    """Apply the series to a pristine extraction, strictly (no fuzz, no reject files)."""
    # Below another repository `git apply` skips every path silently: the ceiling stops the search for one.
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tree.resolve().parent), GIT_CONFIG_NOSYSTEM="1")
    env.pop("GIT_DIR", None)
    for patch in read_series(patches_dir):
        try:
            run = subprocess.run(
                ["git", "apply", "--whitespace=nowarn", str(patch.resolve())],
                cwd=tree, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise VendorError("git is needed to apply the patches and was not found; install git") from None
        if run.returncode != 0:
            raise VendorError(
                f"patch {patch.name} does not apply to the pinned source:\n{run.stderr.strip()}\n"
                "Run tools/patches.py verify; a bumped pin needs re-exported patches."
            )


# --- the archive ---------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise VendorError(
            f"{path} is not the pinned archive: SHA-256 {found}, expected {expected}. "
            "Remove it and build again, or fix vendor/pin.toml if the pin was meant to change."
        )


def _download(folder: Path, package: dict[str, str]) -> Path:
    """Download the pinned sdist with pip into `folder` and return its path."""
    name, version, sha256 = package["name"], package["version"], package["sha256"]
    say(f"downloading {name} {version} (about 77 MB) for the pinned llama.cpp source")
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        # Without build isolation pip prepares the metadata with our own scikit-build-core: nothing else is fetched.
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "-r", str(requirements), "-d", tmp,
        ]  # fmt: skip
        run = subprocess.run(command, stdout=sys.stderr, check=False)
        archives = sorted(Path(tmp).glob("*.tar.gz"))
        if run.returncode != 0 or not archives:
            raise VendorError(
                f"pip could not download {name}=={version} (exit code {run.returncode}). Check the network or the "
                f"package index, or set {ENV_SOURCE} to a local copy of the archive."
            )
        target = folder / archives[0].name
        os.replace(archives[0], target)
    return target


def _archive(package: dict[str, str]) -> Path:
    """Return the checked archive: the one named by the environment, the cached one, or a fresh download."""
    chosen = os.environ.get(ENV_SOURCE)
    if chosen:
        path = Path(chosen)
    else:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{package['name'].replace('-', '_')}-{package['version']}.tar.gz"
        path = folder / stem
        if not path.exists():
            path = _download(folder, package)
    _check_hash(path, package["sha256"])
    return path


# --- the tree ------------------------------------------------------------------------------------------


def _kept(path: str, keep: dict[str, list[str]]) -> bool:
    def matches(patterns: list[str]) -> bool:
        return any(path.startswith(p) if p.endswith("/") else fnmatch.fnmatchcase(path, p) for p in patterns)

    return matches(keep["paths"]) and not matches(keep["drop"])


def _extract(archive: Path, target: Path, subdir: str, keep: dict[str, list[str]]) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/", 1)
            if len(parts) != 2 or not parts[1].startswith(subdir + "/") or not member.isfile():
                continue
            inner = parts[1][len(subdir) + 1 :]
            if ".." in inner.split("/") or not _kept(inner, keep):
                continue
            source = tar.extractfile(member)
            assert source is not None  # isfile() above
            path = target / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)


def _copy_checkout(checkout: Path, target: Path, keep: dict[str, list[str]], commit: str) -> None:
    run = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if run.returncode == 0 and run.stdout.strip() != commit:
        raise VendorError(
            f"{checkout} is at commit {run.stdout.strip()}, the pin is {commit}; check out the pin"
        )
    for path in sorted(checkout.rglob("*")):
        inner = path.relative_to(checkout).as_posix()
        if path.is_file() and not inner.startswith(".git/") and _kept(inner, keep):
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / inner)
    if not (target / "CMakeLists.txt").exists():
        raise VendorError(f"{checkout} ({ENV_SOURCE}) is not a llama.cpp checkout: it has no CMakeLists.txt")


def pristine() -> Path:
    """Return the pruned, unpatched tree of the pin (extracted once into the cache folder; never edit it)."""
    config = pin()
    keep = config["keep"]
    chosen = os.environ.get(ENV_SOURCE)
    key = hashlib.sha256(json.dumps([config["package"]["sha256"], keep, chosen or ""]).encode()).hexdigest()[
        :16
    ]
    target = cache_dir() / f"pristine-{key}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        if chosen and Path(chosen).is_dir():
            _copy_checkout(Path(chosen), tmp, keep, config["llama_cpp"]["commit"])
        else:
            _extract(_archive(config["package"]), tmp, config["package"]["subdir"], keep)
        try:
            tmp.rename(target)
        except OSError:  # another build was faster
            if not target.exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return target


def _stamp_text() -> str:
    config = pin()
    return json.dumps(
        {
            "sha256": config["package"]["sha256"],
            "commit": config["llama_cpp"]["commit"],
            "keep": hashlib.sha256(json.dumps(config["keep"]).encode()).hexdigest()[:16],
            "series": series_digest(),
        },
        indent=1,
    )


def _sync(source: Path, target: Path) -> int:
    """Make `target` equal to `source`, touching only files whose content differs; return how many were written."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    n_written = 0
    for inner in sorted(wanted):
        old, new = target / inner, source / inner
        if old.is_file() and filecmp.cmp(old, new, shallow=False):
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new, old)
        shutil.copymode(new, old)
        n_written += 1
    for path in sorted(target.rglob("*"), reverse=True):
        inner = path.relative_to(target)
        if path.is_file() and inner not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return n_written


def ensure() -> Path:
    """Make vendor/llama.cpp the patched pin and return it; an unchanged stamp means no work.

    Raises:
        VendorError: download, hash, extraction or a patch failed.
    """
    stamp = TREE / STAMP
    text = _stamp_text()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        return TREE
    base = pristine()
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "llama.cpp"
        shutil.copytree(base, tree)
        apply_series(tree)
        TREE.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        n_written = _sync(tree, TREE)
    stamp.write_text(text, encoding="utf-8")
    say(f"vendor/llama.cpp is the pin with {len(read_series())} patches; {n_written} files written")
    return TREE


if __name__ == "__main__":
    try:
        print(ensure())
    except VendorError as error:
        sys.exit(f"error: {error}")
