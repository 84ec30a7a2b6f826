"""The command ``pyllama-dsv4 plan``: tables, JSON, exit codes; it never loads the engine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_writer import Gguf, flash_file

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flash") / "flash.gguf"
    flash_file(path)
    return path


def test_tables(run: Run, flash: Path) -> None:
    done = run("plan", flash, "--ram", 192, "--bandwidth", 100)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert text.startswith(f"{flash}: fits\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "weights 156.14 GB mapped; memory holds what it can",
        "dense weights 6.85 GB",
        "routed experts 3.45 GB",
        "host memory 100.0 GB/s given",
        "at most 8.74 tokens/s",
        "1,048,576 14.51 GB 7.26 GB 7.26 GB 3.86 GB 1.87 GB",
    ):
        assert line in lines


def test_json(run: Run, flash: Path) -> None:
    done = run("plan", flash, "--json", "--ram", 64, "--disk", 3, "--gpu", 24, "-ctk", "q8_0", "--ctx", 65536)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["verdict"] == "runs from disk"
    assert (plan["n_ctx"], plan["cache_type"], plan["n_gpu_layers"]) == (65536, "q8_0", 44)
    assert plan["host"]["available"] == 64 << 30
    assert plan["gpus"][0]["weights"] > 20e9
    assert plan["host"]["bandwidth"] > 1e8  # measured
    assert plan["tokens_per_s"] > 0


@pytest.mark.parametrize(
    "args",
    [
        ("--ram", "4", "--ctx", "1048576"),
        ("--ram", "100", "--no-mmap"),
        ("--ram", "192", "--gpu", "8", "-ngl", "all", "-ncmoe", "0"),
    ],
)
def test_what_does_not_fit_is_exit_code_4(run: Run, flash: Path, args: tuple[str, ...]) -> None:
    done = run("plan", flash, *args)
    assert done.returncode == 4
    assert b": does not fit\n" in done.stdout
    assert run("plan", flash, *args, "--json").returncode == 4


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("missing.gguf",), 3, "no such file"),
        (("text.gguf",), 3, "not a GGUF file"),
        (("text.gguf", "-ngl", "some"), 2, "not a number of layers"),
        (("text.gguf", "--gpu", "0"), 2, "--gpu"),
        ((), 2, "FILE"),
    ],
)
def test_refusals(run: Run, tmp_path: Path, args: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "text.gguf").write_text(
        "not a model, but longer than a GGUF header is\n" * 4, encoding="utf-8"
    )
    done = run("plan", *args, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr.decode()


def test_other_models_are_marked_as_estimates(run: Run, tmp_path: Path) -> None:
    model = Gguf().set("general.architecture", "str", "llama").set("llama.block_count", "u32", 1)
    model.write(tmp_path / "other.gguf")
    done = run("plan", tmp_path / "other.gguf", "--bandwidth", 10)
    assert done.returncode == 0, done.stderr
    assert b"estimates" in done.stdout
