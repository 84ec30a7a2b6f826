"""Python examples of the README and the guides run as they stand, but for the file's name and the length of answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_runs(vocab_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "flash-native.gguf" in code
    code = code.replace("flash-native.gguf", str(vocab_model)).replace("max_tokens=1000", "max_tokens=20")
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["logits"].shape == (2, 129280)  # type: ignore[attr-defined]
    assert capsys.readouterr().out


def pages() -> list[Path]:
    return [
        page
        for page in sorted((README.parent / "docs").glob("*.md"))
        if "with Llama(" in page.read_text("utf-8")
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_examples_of_the_guides_run(
    page: Path, vocab_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        if "with Llama(" not in code:
            continue
        code = code.replace("flash-native.gguf", str(vocab_model)).replace("max_tokens=1000", "max_tokens=20")
        exec(compile(code, str(page), "exec"), {})
        assert capsys.readouterr().out
