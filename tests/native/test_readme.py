"""The README's Python example runs as it stands, but for the file's name and the length of the answer."""

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
