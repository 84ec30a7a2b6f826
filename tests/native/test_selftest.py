"""The self test passes here, and every one of its checks fails when the thing it checks is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import _codec, demo, errors, selftest
from pyllama_dsv4.context import Context

Patch = Callable[[pytest.MonkeyPatch], None]


def test_it_passes_on_the_built_in_model() -> None:
    checks = selftest.selftest()
    assert [c.name for c in checks] == [
        "codecs",
        "rounding",
        "repeats",
        "splits",
        "states",
        "sequences",
        "caches",
        "levels",
        "native weights",
        *(["demo model"] if demo.is_trained() else []),
    ]
    assert [c.failures for c in checks] == [[]] * len(checks)
    assert sum(c.seconds for c in checks) < 120


def _swap_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = _codec.e4m3_decode
    monkeypatch.setattr(_codec, "e4m3_decode", lambda codes: decode(codes)[::-1].copy())


def _lose_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = _codec.mxfp4_unpack

    def wrong(blocks: Any) -> Any:
        weight, scale = unpack(blocks)
        weight[0, 0] ^= 1
        return weight, scale

    monkeypatch.setattr(_codec, "mxfp4_unpack", wrong)


def _ties_away(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to = selftest._round_to

    def wrong(x: Any, *args: Any) -> Any:
        return round_to(np.nextafter(x, np.copysign(np.inf, x).astype(np.float32)), *args)

    monkeypatch.setattr(selftest, "_round_to", wrong)


def _damage_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state whose last rows are lost."""
    save = Context.save_state

    def wrong(self: Context, seq: int = 0) -> bytes:
        state = save(self, seq)
        return state[:-4096] + bytes(4096)

    monkeypatch.setattr(Context, "save_state", wrong)


def _mix_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Context.decode

    def wrong(self: Context, ids: Any, *, all_logits: bool = False, seq: int = 0) -> Any:
        return decode(self, ids, all_logits=all_logits, seq=0)

    monkeypatch.setattr(Context, "decode", wrong)


def _option_ignored(name: str, value: object) -> Patch:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        context = selftest._Runs.context

        def wrong(self: Any, **options: object) -> Context:
            return context(self, **(options | {name: value}))

        monkeypatch.setattr(selftest._Runs, "context", wrong)

    return apply


def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that gives other logits every time."""
    decode = Context.decode
    rng = np.random.default_rng(0)

    def wrong(self: Context, ids: Any, *, all_logits: bool = False, seq: int = 0) -> Any:
        rows = decode(self, ids, all_logits=all_logits, seq=seq)
        return None if rows is None else (rows + rng.normal(0, 2, rows.shape)).astype(np.float32)

    monkeypatch.setattr(Context, "decode", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaks", "failing"),
    [
        (_swap_codes, {"codecs"}),
        (_lose_a_code, {"codecs"}),
        (_ties_away, {"rounding"}),
        (_damage_states, {"states"}),
        (_mix_sequences, {"sequences"}),
        (_option_ignored("act_quant", "none"), {"levels"}),
        (_noise, {"repeats", "splits", "states", "sequences", "caches", "levels", "native weights"}),
    ],
)
def test_a_broken_part_is_named(monkeypatch: pytest.MonkeyPatch, breaks: Patch, failing: set[str]) -> None:
    breaks(monkeypatch)
    checks = selftest.selftest()
    assert {c.name for c in checks if not c.passed} - {"demo model"} == failing  # which fails with several


def test_a_check_that_ends_in_an_error_has_failed(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def fail(self: Context, seq: int = 0) -> bytes:
        raise errors.StateError("saving the state failed")

    monkeypatch.setattr(Context, "save_state", fail)
    checks = {c.name: c for c in selftest.selftest(tiny_model)}
    assert checks["states"].failures == ["StateError: saving the state failed"]
    assert checks["sequences"].passed
    assert "native weights" not in checks


def test_the_command_reports_lines_or_json(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "pyllama_dsv4", "selftest", str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()][:3] == [
        ["pass", "codecs"],
        ["pass", "rounding"],
        ["pass", "repeats"],
    ]
    assert done.stderr == "8 checks passed\n"
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["checks"][3]["numbers"]["micro-batches of 7_max"] == 1e-8


def test_a_missing_file_has_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyllama_dsv4", "selftest", "missing.gguf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "missing.gguf" in done.stderr
