"""Prefixes on disk: found by content and engine, shared, capped, never a wrong token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import Llama, errors

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 320, 700)]
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "warmup": False}


def tokens(model: Path, prompt: list[int], folder: Path | None, **options: Any) -> tuple[list[int], int]:
    """Return what follows a prompt in a fresh Llama, and how much of the prompt was cached."""
    with Llama(model, prefix_cache=folder, **{**OPTIONS, **options}) as llm:
        pieces = list(llm._pieces(prompt, llm._params({"temperature": 0}), request(4)))
        return [p.token for p in pieces if p.token is not None], llm.stats.n_tokens_cached


def request(n: int) -> Any:
    from pyllama_dsv4.generate import Request

    return Request(max_tokens=n)


def test_another_llama_finds_the_longest_prefix_and_says_the_same(tiny_model: Path, tmp_path: Path) -> None:
    tokens(tiny_model, IDS[:300], tmp_path)
    tokens(tiny_model, IDS[:500], tmp_path)
    longer, n_cached = tokens(tiny_model, IDS[:600], tmp_path)
    assert n_cached == 499
    plain, n_plain = tokens(tiny_model, IDS[:600], None)
    assert n_plain == 0
    assert longer == plain
    other, n_other = tokens(tiny_model, [*IDS[:350], 5, 6, 7], tmp_path)
    assert n_other == 299
    assert other == tokens(tiny_model, [*IDS[:350], 5, 6, 7], None)[0]


def test_other_settings_and_models_do_not_use_it(
    tiny_model: Path, tiny_upstream: Path, tmp_path: Path
) -> None:
    tokens(tiny_model, IDS[:400], tmp_path)
    assert tokens(tiny_model, IDS[:420], tmp_path, cache_type="f32")[1] == 0
    assert tokens(tiny_upstream, IDS[:420], tmp_path)[1] == 0
    assert tokens(tiny_model, IDS[:420], tmp_path)[1] == 399


def test_damaged_files_are_prefixes_that_are_not_there(tiny_model: Path, tmp_path: Path) -> None:
    expected, _ = tokens(tiny_model, IDS[:400], tmp_path)
    (path,) = tmp_path.glob("*.prefix")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert tokens(tiny_model, IDS[:400], tmp_path) == (expected, 0)
    path.write_bytes(data[:100])
    assert tokens(tiny_model, IDS[:400], tmp_path) == (expected, 0)
    assert tokens(tiny_model, IDS[:400], tmp_path) == (expected, 399)


def test_the_folder_stays_below_its_size(tiny_model: Path, tmp_path: Path) -> None:
    tokens(tiny_model, IDS[:300], tmp_path)
    (first,) = tmp_path.glob("*.prefix")
    room = int(first.stat().st_size * 2.5)
    for i in range(5):
        tokens(tiny_model, IDS[i : i + 300], tmp_path, prefix_cache_bytes=room)
    files = list(tmp_path.glob("*.prefix"))
    assert 1 <= len(files) <= 2
    assert sum(f.stat().st_size for f in files) <= room
    with pytest.raises(errors.ArgumentError, match="prefix_cache_bytes"):
        Llama(tiny_model, prefix_cache=tmp_path, prefix_cache_bytes=0, **OPTIONS)


def test_processes_share_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    expected, _ = tokens(tiny_model, IDS[:320], None)
    code = (
        "import sys; sys.path[:0] = sys.argv[4:]\n"
        "from pyllama_dsv4 import Llama; from pyllama_dsv4.generate import Request\n"
        "ids = [int(i) for i in sys.argv[3].split()]\n"
        "for _ in range(4):\n"
        "    with Llama(sys.argv[1], prefix_cache=sys.argv[2], prefix_cache_bytes=1 << 20, n_ctx=1024,\n"
        "               n_threads=1, warmup=False) as llm:\n"
        "        pieces = llm._pieces(ids, llm._params({'temperature': 0}), Request(max_tokens=4))\n"
        "        print([p.token for p in pieces][:4])\n"
    )
    ids = " ".join(map(str, IDS[:320]))
    args = [sys.executable, "-c", code, str(tiny_model), str(tmp_path), ids, *sys.path]
    children = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        assert out == f"{expected}\n" * 4
