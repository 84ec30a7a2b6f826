"""Experts of files that memory cannot hold: what is announced, when, and that nothing else changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pyllama_dsv4 import Llama, paging
from pyllama_dsv4._native import lib
from pyllama_dsv4.machine import _group_memory
from pyllama_dsv4.model import check_model

N_PROMPT, N_DECODED = 40, 6
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    lib.pyl_paging_set(False)


def _run(path: Path, pages: bool | None) -> tuple[np.ndarray, list[paging.PagingCounts]]:
    """Return all logits, and what was announced for the prompt and for each token after it."""
    logits, counts = [], [paging.paging_counts()]
    with Llama(path, n_ctx=256, warmup=False, page_experts=pages) as llm:
        for ids in [list(range(5, 5 + N_PROMPT)), *([50 + i] for i in range(N_DECODED))]:
            logits.append(llm.eval(ids, logits="all"))
            counts.append(llm.paging)
    return np.concatenate(logits), [b.since(a) for a, b in pairwise(counts)]


def _expert_bytes(path: Path) -> tuple[list[int], int]:
    """Sizes of one expert's matrices, of all layers; and how many experts a token uses."""
    report = check_model(path)
    n_experts = report.header.metadata["deepseek4.expert_count"]
    sizes = [t.n_bytes // n_experts for t in report.header.tensors if "_exps" in t.name]
    return sizes, report.header.metadata["deepseek4.expert_used_count"]


def test_a_token_announces_its_experts_once(tiny_model: Path) -> None:
    sizes, n_used = _expert_bytes(tiny_model)
    _, counts = _run(tiny_model, True)
    for count in counts[1:]:
        assert n_used * sum(sizes) <= count.n_bytes <= n_used * sum(size + 2 * PAGE for size in sizes)
        assert 0 <= count.n_bytes_missing <= count.n_bytes
        assert 0 <= count.hit_rate <= 1


def test_a_prompt_announces_every_expert_that_it_uses(tiny_model: Path) -> None:
    sizes, _ = _expert_bytes(tiny_model)
    n_experts = check_model(tiny_model).header.metadata["deepseek4.expert_count"]
    _, counts = _run(tiny_model, True)
    assert counts[0].n_bytes > counts[1].n_bytes
    assert counts[0].n_bytes <= n_experts * sum(size + 2 * PAGE for size in sizes)


def test_logits_do_not_depend_on_it(tiny_model: Path) -> None:
    plain, counts = _run(tiny_model, False)
    assert sum(count.n_bytes for count in counts) == 0
    np.testing.assert_array_equal(_run(tiny_model, True)[0], plain)


def test_a_file_that_fits_is_left_alone(tiny_model: Path) -> None:
    _, counts = _run(tiny_model, None)
    assert sum(count.n_bytes for count in counts) == 0


def test_a_file_that_does_not_fit_is_paged(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "available_bytes", lambda: paging.RESERVE_BYTES + 1000)
    _, counts = _run(tiny_model, None)
    assert all(count.n_bytes > 0 for count in counts)


def test_an_unknown_size_of_memory_pages_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "available_bytes", lambda: None)
    assert paging.fits_in_memory(check_model(tiny_model))


@pytest.mark.parametrize(
    ("line", "files"),
    [
        (
            "0::/a/b",
            {"a/b/memory.max": "1000", "a/b/memory.current": "600", "a/b/memory.stat": "anon 5\nfile 200"},
        ),
        (
            "4:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "1000",
                "memory/a/memory.usage_in_bytes": "600",
                "memory/a/memory.stat": "cache 1\ntotal_cache 200",
            },
        ),
        (
            "0::/elsewhere",
            {"memory.max": "1000", "memory.current": "600", "memory.stat": "file 200"},
        ),  # a container
    ],
)
def test_limits_of_control_groups(line: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text(f"9:cpu:/x\n{line}\n")
    assert list(_group_memory(str(tmp_path / "groups"), str(tmp_path))) == [(1000, 600, 200)]


def test_no_limit_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "memory.current").write_text("600")
    (tmp_path / "groups").write_text("0::/")
    assert list(_group_memory(str(tmp_path / "groups"), str(tmp_path))) == []
