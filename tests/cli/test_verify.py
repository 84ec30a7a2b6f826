"""The installed command ``pyllama-dsv4 verify``: streams, exit codes, JSON, manifests."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_process import TIMEOUT_S, command

from pyllama_dsv4 import synth
from pyllama_dsv4.convert import convert
from pyllama_dsv4.header import read_header

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")

F8 = "blk.1.attn_q_b.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V4", seed=3)


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("out") / "x.gguf").path


@pytest.fixture
def damaged(original: Path, tmp_path: Path) -> tuple[Path, int]:
    """A copy with one NaN scale, and its offset."""
    path = Path(shutil.copy(original, tmp_path / "x.gguf"))
    tensor = read_header(path).tensor(F8)
    assert tensor is not None
    with path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\xff")
    return path, tensor.start


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("verify", *args), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_a_sound_file(original: Path, source: Path) -> None:
    done = run(original, "--against", source)
    assert done.returncode == 0, done.stderr
    assert f"{original}: sound\n" in done.stdout
    assert "compared 178 tensors" in done.stdout
    assert "100.0 %" in done.stderr  # progress stays out of the report
    assert "\x1b" not in done.stdout + done.stderr


def test_a_damaged_file(damaged: tuple[Path, int]) -> None:
    path, at = damaged
    done = run(path)
    assert done.returncode == 1
    first, *_, last = done.stdout.splitlines()
    assert first == (
        f"error: {F8}: scale_nan at byte {at:,}, row 0, block 0: found scale byte 255, NaN, expected 0 to 254"
    )
    assert last == f"{path}: 2 errors"
    quiet = run(path, "-q")
    assert (quiet.returncode, quiet.stderr) == (1, "")
    assert quiet.stdout.splitlines()[0] == first


def test_json(damaged: tuple[Path, int], original: Path) -> None:
    path, at = damaged
    done = run(path, "--json", "-q")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert report["findings"][0] == {
        "check": "scale_nan",
        "severity": "error",
        "path": str(path),
        "tensor": F8,
        "key": None,
        "offset": at,
        "where": "row 0, block 0",
        "found": "scale byte 255, NaN",
        "expected": "0 to 254",
        "n": 1,
    }
    sound = run(original, "--json", "-q")
    assert (sound.returncode, json.loads(sound.stdout)["findings"]) == (0, [])


def test_manifests(original: Path, damaged: tuple[Path, int], tmp_path: Path) -> None:
    sums = tmp_path / "sums.json"
    done = run(original, "--manifest", sums)
    assert (done.returncode, f"wrote {sums}" in done.stdout) == (0, True)
    assert run(original, "--check-manifest", sums).returncode == 0
    done = run(damaged[0], "--check-manifest", sums)
    assert done.returncode == 1
    assert f"error: {F8}: sha256 at byte" in done.stdout
    refused = run(damaged[0], "--manifest", tmp_path / "no.json")
    assert refused.returncode == 1
    assert "no sums were written" in refused.stdout
    assert not (tmp_path / "no.json").exists()


def test_what_cannot_be_read(tmp_path: Path, original: Path) -> None:
    for args in (
        [tmp_path / "absent.gguf"],
        [original, "--against", tmp_path / "absent"],
        [original, "--check-manifest", tmp_path / "absent"],
    ):
        done = run(*args)
        assert (done.returncode, done.stdout) == (3, "")
        assert "absent" in done.stderr
        assert "Traceback" not in done.stderr
    assert run(original, "--agianst", "x").returncode == 2
