"""The source archive: complete, licensed, and buildable without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "build", "--sdist", "-o", str(out), str(ROOT)], check=True)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def names(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as tar:
        return {m.name.split("/", 1)[1] for m in tar.getmembers() if "/" in m.name}


@pytest.mark.slow
def test_it_holds_the_prepared_source_and_all_licences(names: set[str]) -> None:
    assert {
        "CMakeLists.txt", "LICENSE", "licenses/llama.cpp.txt", "pyproject.toml", "vendor/pin.toml",
        "vendor/llama.cpp/.pyllama-dsv4-stamp.json", "vendor/llama.cpp/ggml/src/ggml.c", "vendor/llama.cpp/LICENSE",
        "vendor/llama.cpp/models/templates/deepseek-ai-DeepSeek-V4.jinja", "patches/series",
        "native/capi/pyllama.h", "pyllama_dsv4/cdef.h", "pyllama_dsv4/py.typed", "buildutils/backend.py",
    } <= names  # fmt: skip


@pytest.mark.slow
def test_it_holds_the_demo_model_if_there_is_one(names: set[str]) -> None:
    for name in ("pyllama_dsv4/data/demo.gguf", "pyllama_dsv4/data/demo.json"):
        assert (name in names) == (ROOT / name).is_file()


@pytest.mark.slow
def test_it_holds_no_build_products(names: set[str]) -> None:
    assert not [
        n
        for n in names
        if not n.startswith(("tests/data/", "pyllama_dsv4/data/demo."))  # fixtures; the demo model
        and (n.endswith((".so", ".o", ".a", ".pyc", ".gguf")) or n.startswith(("build/", ".venv/")))
    ]
    assert len([n for n in names if n.startswith("vendor/llama.cpp/")]) > 1000


@pytest.mark.slow
def test_it_builds_without_network_and_git(sdist: Path, tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    bin_folder = tmp_path / "bin"  # a git that fails: nothing of the build may need one
    bin_folder.mkdir()
    (bin_folder / "git").write_text("#!/bin/sh\nexit 77\n")
    (bin_folder / "git").chmod(0o755)
    env = dict(
        os.environ,
        PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        PIP_NO_INDEX="1",
        PYLLAMA_DSV4_CACHE_DIR=str(tmp_path / "empty-cache"),
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert len(list(tmp_path.glob("*.whl"))) == 1
    assert not (tmp_path / "empty-cache").exists()
