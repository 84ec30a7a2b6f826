"""CUDA sources compile for the oldest and the newest architecture, and no kernel of ours spills: needs nvcc, no GPU.

What the kernels compute is tested on the CPU by ``test-cuda-kernels`` (native/tests/cuda-host).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "vendor" / "llama.cpp"
UPSTREAM = TREE / "ggml" / "src" / "ggml-cuda"
KERNELS = ("dsv4-act-quant", "dsv4-mul-mat", "dsv4-mul-vec", "dsv4-rows")
TOUCHED = ("convert", "ggml-cuda", "rope", "topk-moe", "unary")  # by patches/ggml-cuda-*.patch
ARCHITECTURES = ("75", "120a")

NVCC = shutil.which("nvcc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine"),
    pytest.mark.skipif(
        not UPSTREAM.exists(), reason="no prepared vendor/llama.cpp: buildutils/vendor.py makes it"
    ),
]


@dataclass(frozen=True)
class Resources:
    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


def compile_cuda(source: Path, out: Path, *flags: str) -> str:
    """Compile for all architectures; returns what the compiler said."""
    assert NVCC is not None
    includes = [
        ROOT / "native/cuda",
        ROOT / "native/ggml",
        TREE / "ggml/src",
        TREE / "ggml/include",
        UPSTREAM,
    ]
    command = [NVCC, "-std=c++17", "-O3", "-extended-lambda", "-DGGML_CUDA_NO_VMM", "-c", str(source)]
    command += ["-o", str(out / f"{source.stem}.o"), *[f"-I{folder}" for folder in includes], *flags]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout + run.stderr


def resources(report: str) -> list[Resources]:
    """Read ptxas' report."""
    found = []
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers, rest in pattern.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Resources(
                name,
                arch,
                int(registers),
                int(stack),
                int(stores) + int(loads),
                int(shared[1]) if shared else 0,
            )
        )
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Resources]]:
    out = tmp_path_factory.mktemp("cuda")

    def report(name: str) -> list[Resources]:
        return resources(compile_cuda(ROOT / "native/cuda" / f"{name}.cu", out, "--resource-usage"))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(report, KERNELS), strict=True))


def test_every_kernel_is_seen(kernels: dict[str, list[Resources]]) -> None:
    for name, found in kernels.items():
        assert {r.architecture for r in found} == set(ARCHITECTURES), name
    assert len(kernels["dsv4-mul-vec"]) == 2 * 4 * 9  # weights (FP8 in two ways) x columns, one column twice
    assert len(kernels["dsv4-mul-mat"]) == 2 * (4 * 2 * 2 + 1)  # weights x widths x terms, and the sorting


def test_no_kernel_spills_or_uses_local_memory(kernels: dict[str, list[Resources]]) -> None:
    bad = [r for found in kernels.values() for r in found if r.stack or r.spilled]
    assert not bad


def test_blocks_fit_as_docs_say(kernels: dict[str, list[Resources]]) -> None:
    """docs/cuda.md: two blocks of 256 threads of the tiles share a multiprocessor, six of 128 of the vector product
    of one column (64 K registers; 48 KB of shared memory without asking for more)."""
    for r in kernels["dsv4-mul-mat"]:
        assert r.registers <= 128, r
        assert r.shared <= 48 * 1024, r
    for r in kernels["dsv4-mul-vec"]:
        assert r.registers <= (80 if "Li1ELi2E" in r.kernel else 128), r


def test_what_the_patches_touch_compiles(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "buildutils"))
    try:
        import find_cuda
    finally:
        sys.path.pop(0)
    assert NVCC is not None
    toolkit = Path(NVCC).resolve().parent.parent / "include"
    version = re.search(
        r"release (\d+)\.", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    )
    assert version is not None
    folder = find_cuda.find(version[1])
    if folder is None and not (toolkit / "cublas_v2.h").exists():
        pytest.skip("no cuBLAS headers: pip install nvidia-cublas of nvcc's version")
    flags = [
        "-use_fast_math",
        "-Xptxas=-O0",
        *([] if folder is None else ["-isystem", str(folder / "include")]),
    ]
    sources = [ROOT / "native/cuda/dsv4-cuda.cu", ROOT / "native/cuda/dsv4-ops.cu"]
    sources += [UPSTREAM / f"{name}.cu" for name in TOUCHED]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: compile_cuda(source, tmp_path, *flags), sources))
