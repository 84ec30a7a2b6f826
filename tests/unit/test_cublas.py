"""A CUDA build that does not find cuBLAS takes pip's, and otherwise says how to install it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_module() -> Any:
    # by path: the package's own import needs the engine
    spec = importlib.util.spec_from_file_location("_cublas", ROOT / "pyllama_dsv4" / "_cublas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cublas = load_module()
MISSING = ImportError("libcublas.so.13: cannot open shared object file: No such file or directory")


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's folder, with files that are no libraries."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    importlib.invalidate_caches()
    return folder


def test_another_missing_library_is_left_alone(nvidia: Path) -> None:
    (nvidia / "libcublas.so.13").write_bytes(b"")
    assert not cublas.load_for(ImportError("libm.so.7: cannot open shared object file"))


def test_nothing_is_loaded_where_it_is_not_installed(nvidia: Path) -> None:
    assert not cublas.load_for(MISSING)


def test_another_major_version_is_not_taken(nvidia: Path) -> None:
    (nvidia / "libcublas.so.13").write_bytes(b"")
    assert not cublas.load_for(ImportError("libcublas.so.12: cannot open shared object file"))


def test_pips_library_is_loaded(nvidia: Path) -> None:
    for name in ("libcublas.so.13", "libcublasLt.so.13"):
        (nvidia / name).write_bytes(b"no library")
    with pytest.raises(OSError, match=r"libcublasLt\.so\.13"):  # tried, the one that the other needs first
        cublas.load_for(MISSING)


def test_advice_names_the_version() -> None:
    assert cublas.advice(MISSING) == "pip install 'nvidia-cublas==13.*'"
