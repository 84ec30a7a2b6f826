"""The command ``doctor``: every failure it can find says what to do, and has its exit code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_process import Terminal

from pyllama_dsv4 import doctor

Run = Callable[..., subprocess.CompletedProcess[bytes]]
NAMES = ["system", "build", "CPU", "memory", "cache folder", "state folder", "GPU", "demo model"]


def findings(run: Run, *args: object, **options: Any) -> dict[str, dict[str, str]]:
    done = run("doctor", *args, "--json", **options)
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_a_sound_machine(run: Run, model: Path) -> None:
    done = run("doctor", model)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr.decode()
    found = findings(run, model)
    assert list(found) == [*NAMES, "model", "plan"]
    assert not [name for name, finding in found.items() if finding["status"] == "failure"]
    assert "deepseek4" in found["model"]["text"]


def test_a_terminal_gets_colours(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("doctor")
    assert shown.end()[1] == 0
    assert b"\x1b[32mok" in shown.raw


def test_a_bad_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"x")
    for file in (path, tmp_path / "none.gguf"):
        done = run("doctor", file, "-q")
        assert done.returncode == 3
        text = done.stdout.decode()
        assert "XX  model" in text
        assert "-> pyllama-dsv4 verify" in text
        assert "ok" not in [line[:2] for line in text.splitlines()]


def test_a_cache_folder_that_is_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    found = findings(run, env={"XDG_CACHE_HOME": str(path)})["cache folder"]
    assert found["status"] == "warning"
    assert "XDG_CACHE_HOME" in found["fix"]


def test_wrong_usage(run: Run) -> None:
    assert run("doctor", "--jsno").returncode == 2
    assert run("doctor", "a", "b").returncode == 2


# --- what this machine does not show ---


def by_name(name: str, model: Path | None = None) -> doctor.Finding:
    return next(finding for finding in doctor.doctor(model) if finding.name == name)


def test_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("the native module could not be loaded")

    monkeypatch.setattr(doctor, "import_module", fail)
    found = by_name("build")
    assert (found.status, found.text) == ("failure", "the native module could not be loaded")
    assert "pip install" in found.fix


@pytest.mark.parametrize(
    ("n_bytes", "status"), [(10**9, "warning"), (5 * 10**9, "ok"), (None, "warning")], ids=str
)
def test_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int | None, status: str) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: n_bytes)
    assert by_name("memory").status == status


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    from pyllama_dsv4 import plan

    monkeypatch.setattr(plan, "available_bytes", lambda: 10**6)
    found = by_name("plan", model)
    assert found.status == "failure"
    assert type(found.error).__name__ == "MemoryLimitError"
    needs = plan.plan_file(model, host_bytes=10**12).needs
    monkeypatch.setattr(plan, "available_bytes", lambda: needs - 1)
    found = by_name("plan", model)
    assert (found.status, "--rpc" in found.fix) == ("warning", True)


@pytest.mark.parametrize(
    ("flags", "status", "part"),
    [
        ({"avx2", "fma"}, "ok", "avx2, fma"),
        ({"sse2"}, "warning", "plain C"),
        ({"avx2", "avx512_bf16"}, "warning", "Build on this machine"),
    ],
)
def test_cpus(monkeypatch: pytest.MonkeyPatch, flags: set[str], status: str, part: str) -> None:
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    found = doctor._cpu("AVX2 = 1")
    assert found.status == status
    assert part in found.text + found.fix


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    found = doctor._folder("cache folder", tmp_path / "new", 10**9)
    assert (found.status, "Make room" in found.fix) == ("warning", True)
    assert not (tmp_path / "new").exists()
