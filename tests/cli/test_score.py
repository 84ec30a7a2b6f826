"""The command ``pyllama-dsv4 score``: its ways to a text, its outputs, its refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[bytes]]
TEXT = "The quick brown fox jumps over the lazy dog."
SHORT = ("-c", 128, "-t", 1)


def test_text_from_an_option_a_file_and_a_pipe_scores_alike(run: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    outputs = [
        run("score", model, "--text", TEXT, *SHORT),
        run("score", model, "-f", path, *SHORT),
        run("score", model, *SHORT, input=TEXT.encode()),
    ]
    assert [done.returncode for done in outputs] == [0, 0, 0], outputs
    assert len({done.stdout for done in outputs}) == 1
    assert outputs[0].stdout.startswith(b"nll ")


def test_a_second_level_a_record_and_json(run: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    done = run("score", model, "--text", TEXT, "--vs-act-quant", "none", "--json", *SHORT)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["kl"] > 0
    assert facts["n_tokens"] > 5
    assert run("score", model, "--text", TEXT, "--record", path, *SHORT).returncode == 0
    done = run("score", model, "--text", TEXT, "--against", path, "--json", *SHORT)
    assert done.returncode == 0, done.stderr
    against = json.loads(done.stdout)
    assert against["max_logprob_error"] < 1e-9
    assert against["kl"] is None
    assert against["nll"] == pytest.approx(facts["nll"])
    done = run("score", model, "--text", TEXT, "--against", path, *SHORT)
    assert b"top 1 100.00%" in done.stdout


def test_ids_instead_of_text(run: Run, model: Path) -> None:
    done = run("score", model, "--text", "0 5, 6 7", "--ids", "--json", *SHORT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_tokens"] == 3


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--text", "a", "-f", "b"), 2, b"two texts"),
        (("--text", "a", "--record", "x", "--vs-act-quant", "none"), 2, b"give one of"),
        (("--text", "1 two", "--ids"), 2, b"--ids"),
        (("-f", "missing.txt"), 3, b"missing.txt"),
        (("--text", "0 1", "--ids", "--against", "missing.jsonl"), 3, b"missing.jsonl"),
    ],
)
def test_refusals(run: Run, model: Path, args: tuple[str, ...], code: int, message: bytes) -> None:
    done = run("score", model, *args, *SHORT)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_no_model(run: Run) -> None:
    done = run("score", "--text", TEXT)
    assert done.returncode == 2
    assert b"no model" in done.stderr
