"""What is installed: files, exported symbols, identity, and what importing costs."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pyllama_dsv4
from pyllama_dsv4 import _codec, _native

PACKAGE = Path(pyllama_dsv4.__file__).parent


def test_version_commit_and_series() -> None:
    assert pyllama_dsv4.__version__ == metadata.version("pyllama-dsv4")
    assert _native.text(_native.lib.pyl_build_version()) == pyllama_dsv4.__version__
    assert len(_native.text(_native.lib.pyl_build_commit())) == 40
    assert len(_native.series_digest()) == 16


def test_licences_are_installed() -> None:
    files = {str(f) for f in metadata.files("pyllama-dsv4") or []}
    for name in (
        "LICENSE",
        "llama.cpp.txt",
        "nlohmann-json.txt",
        "cpp-httplib.txt",
        "pybind11.txt",
        "xxhash.txt",
    ):
        assert any(f.endswith(name) for f in files), name


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_the_engine_exports_only_its_init_symbol() -> None:
    from pyllama_dsv4 import _llama

    out = subprocess.run(
        ["nm", "-D", "--defined-only", str(_llama.__file__)], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in out.stdout.splitlines()] == ["PyInit__llama"]


@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
@pytest.mark.parametrize("module", ["_llama", "_codec"])
def test_only_system_libraries_are_needed(module: str) -> None:
    path = (
        _codec.__file__ if module == "_codec" else __import__("pyllama_dsv4._llama", fromlist=["x"]).__file__
    )
    out = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[0].split("/")[-1].split(".so")[0] for line in out.splitlines()}
    assert needed <= {
        "linux-vdso",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libpthread",
        "libdl",
        "ld-linux-x86-64",
    }


def test_looking_at_files_loads_no_engine() -> None:
    code = (
        "import sys, pyllama_dsv4, pyllama_dsv4.header, pyllama_dsv4.convert, pyllama_dsv4.cli\n"
        "assert not any(m.endswith('._llama') for m in sys.modules), 'engine loaded'\n"
        "for heavy in ('rich', 'prompt_toolkit', 'gguf'):\n"
        "    assert heavy not in sys.modules, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_engine_is_silent() -> None:
    code = """
from pyllama_dsv4 import Llama, errors
try:
    Llama("nothing.gguf")
except errors.ModelNotFoundError:
    pass
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr == ""


def test_a_stale_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.metadata, "version", lambda name: "0.0.0")
    with pytest.raises(ImportError, match=r"0\.0\.0 is installed"):
        _native._handshake()


@pytest.mark.parametrize("name", ["chat_template_v4.jinja", "chat_template_v4_0731.jinja"])
def test_chat_templates_are_package_data(name: str) -> None:
    from importlib import resources

    assert "dsml_token" in resources.files("pyllama_dsv4").joinpath("data", name).read_text(encoding="utf-8")


def test_the_demo_model_is_installed_with_its_exam() -> None:
    from pyllama_dsv4 import demo

    source = Path(__file__).parents[2] / "pyllama_dsv4" / "data" / demo.TRAINED.name
    assert demo.is_trained() == source.is_file()
    exam = demo.read_exam()
    if exam is not None:
        assert demo.TRAINED.stat().st_size <= 8_000_000
        assert demo.TRAINED.read_bytes() == source.read_bytes()
        assert exam.questions
        assert set(exam.nll) == {"none", "cache", "full"}


def test_the_engine_is_not_loaded_on_a_cpu_that_lacks_instructions() -> None:
    code = (
        "from pyllama_dsv4 import _codec\n"
        "_codec.missing_cpu_features = lambda: ('avx512f', 'avx512vl')\n"
        "from pyllama_dsv4.errors import UnsupportedCpuError\n"
        "try:\n"
        "    import pyllama_dsv4.llama\n"
        "except UnsupportedCpuError as error:\n"
        "    import sys\n"
        "    assert isinstance(error, ImportError)\n"
        "    assert 'pyllama_dsv4._llama' not in sys.modules\n"
        "    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "avx512f, avx512vl" in out
    assert "pip install ." in out


def test_this_cpu_has_what_the_engine_was_built_for() -> None:
    assert _codec.missing_cpu_features() == ()
    if platform.machine() == "x86_64":
        assert "avx2" in _codec.cpu_features.split()
