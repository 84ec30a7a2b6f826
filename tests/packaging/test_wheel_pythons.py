"""For which Python ``make wheel`` builds: versions and paths that are found, and those that are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import wheel as tool


def interpreter(path: Path, answer: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any Python but those that a test puts there."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def test_a_path_is_asked_what_it_is() -> None:
    found = tool.find_python(sys.executable)
    assert found.version == sys.version_info[:2]
    assert found.tag == f"cp{sys.version_info[0]}{sys.version_info[1]}"


def test_a_shim_that_does_not_work_is_passed_over(machine: Path) -> None:
    interpreter(machine / "bin" / "python3.98", "exit 127")
    right = interpreter(machine / "pyenv" / "versions" / "3.98.1" / "bin" / "python3.98", "echo cpython 3 98")
    assert tool.find_python("3.98") == tool.Python(right, (3, 98))


@pytest.mark.parametrize(
    ("answer", "part"), [("echo cpython 3 9", "cpython 3.9"), ("echo pypy 3 11", "pypy 3.11")]
)
def test_others_are_refused(machine: Path, answer: str, part: str) -> None:
    interpreter(machine / "bin" / "python3.97", answer)
    with pytest.raises(SystemExit, match=rf"{part}; CPython 3\.10 or newer"):
        tool.find_python("3.97")


def test_what_is_not_there_says_how_to_name_it(machine: Path) -> None:
    with pytest.raises(SystemExit, match=r"no Python '3\.96'.*PYTHONS="):
        tool.find_python("3.96")
