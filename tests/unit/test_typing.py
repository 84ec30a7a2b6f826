"""The package's types are enough for a strict program, and they refuse wrong arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "tests" / "typing" / "user_example.py"


def mypy(path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        str(cache),
        "--config-file",
        "",
        str(path),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_users_program_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    good = mypy(EXAMPLE, tmp_path)
    assert good.returncode == 0, good.stdout
    wrong = tmp_path / "wrong.py"
    text = EXAMPLE.read_text("utf-8").replace("temperature=0.6", "temprature=0.6")
    assert text.count("temprature") == 1
    wrong.write_text(text.replace('n_ctx=4096, act_quant="full"', 'n_ctx="4096"'), encoding="utf-8")
    bad = mypy(wrong, tmp_path)
    assert "temprature" in bad.stdout + bad.stderr
    assert 'incompatible type "str"; expected "int"' in bad.stdout
