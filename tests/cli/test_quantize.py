"""The command ``pyllama-dsv4 quantize``: report, progress, dry run, exit codes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllama_dsv4.header import check_header

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def rows(done: subprocess.CompletedProcess[bytes]) -> dict[str, str]:
    pairs = (line.split(maxsplit=1) for line in done.stdout.decode().splitlines()[1:])
    return {pair[0]: pair[1] for pair in pairs}


def test_a_file_is_written_and_described(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = run("quantize", model, out, "q8_0", "-t", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith(f"wrote {out}\n")
    assert check_header(out).dialect == "native"
    report = rows(done)
    assert report["type"] == "Q8_0"
    assert report["dialect"] == "native, as the input"
    assert report["size"].startswith(f"{out.stat().st_size:,} bytes")
    assert b"100.0 %" in done.stderr
    assert run("run", out, "-p", "Hello", "-n", 4, "-c", 128).returncode == 0


def test_a_dry_run(run: Run, model: Path, tmp_path: Path) -> None:
    done = run(
        "quantize", model, tmp_path / "out.gguf", "IQ2_XXS", "--dialect", "upstream", "--dry-run", "-v"
    )
    assert done.returncode == 0, done.stderr
    assert f"would write {tmp_path / 'out.gguf'}\n" in done.stdout.decode()
    assert b"blk.0.attn_kv.weight\n" in done.stdout
    assert b"upstream, the input is native" in done.stdout
    assert b"importance matrix" in done.stderr
    assert not list(tmp_path.iterdir())


def test_quiet(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("quantize", model, tmp_path / "out.gguf", "F8_E4M3_MXFP4", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("good.gguf", "out.gguf", "Q9"), 2, "moe-f8-e4m3-mxfp4"),
        (("good.gguf", "out.gguf", "IQ1_S"), 2, "importance matrix"),
        (("good.gguf", "out.gguf"), 2, "TYPE"),
        (("good.gguf", "good.gguf", "Q8_0"), 2, "another file than the input"),
        (("good.gguf", "out.gguf", "Q8_0", "--dialect", "other"), 2, "--dialect"),
        (("good.gguf", "out.gguf", "Q2_K", "--imatrix", "good.gguf"), 3, "no importance matrix"),
        (("cut.gguf", "out.gguf", "Q8_0"), 3, "ends"),
        (("missing.gguf", "out.gguf", "Q8_0"), 3, "no such file"),
    ],
)
def test_refusals(
    run: Run, model: Path, tmp_path: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "good.gguf").symlink_to(model)
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-5000])
    done = run("quantize", *args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.decode()
    assert not (tmp_path / "out.gguf").exists()
