"""The installed command ``pyllama-dsv4 translate``: the report, exit codes, and that nothing is left of a failure."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cli_process import TIMEOUT_S, command

from pyllama_dsv4 import synth
from pyllama_dsv4.convert import convert
from pyllama_dsv4.header import check_header

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synth.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V4", seed=3)
    return convert(folder, tmp_path_factory.mktemp("out") / "x.gguf").path


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("translate", *args), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_for_stock_engines(native: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.gguf"
    dry = run(native, path, "--to", "upstream", "--dense", "q8_0", "--dry-run")
    assert (dry.returncode, path.exists()) == (0, False)
    assert f"would write {path}" in dry.stdout
    done = run(native, path, "--to", "upstream", "--dense", "q8_0")
    assert done.returncode == 0, done.stderr
    size = rf"  size +{path.stat().st_size:,} bytes"
    assert re.search(size, done.stdout)
    assert re.search(size, dry.stdout)
    assert re.search(r"  tensors +178: 81 renamed, 50 re-encoded, 128 copied", done.stdout)
    assert "100.0 %" in done.stderr
    assert check_header(path).type_counts["Q8_0"] == 50


def test_a_note_says_what_stock_engines_cannot_open(native: Path, tmp_path: Path) -> None:
    done = run(native, tmp_path / "u.gguf", "--to", "upstream")
    assert "note: 50 tensors stay F8_E4M3_B128 (type 42)" in done.stderr
    quiet = run(native, tmp_path / "u.gguf", "--to", "upstream", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_exit_codes(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert run(native, out).returncode == 2
    assert run(native, out, "--to", "elsewhere").returncode == 2
    assert run(native, native, "--to", "upstream").returncode == 2
    missing = run(tmp_path / "absent.gguf", out, "--to", "upstream")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert "Traceback" not in missing.stderr
    assert list(tmp_path.iterdir()) == []
