"""llama-cpp-python's README examples run with only the import changed, or fail naming what replaces them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import pyllama_dsv4
from pyllama_dsv4 import Llama, errors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import readme_snippets
from check_migration import find_archive

ARCHIVE = find_archive()
SNIPPETS = [] if ARCHIVE is None else list(readme_snippets.snippets(readme_snippets.peer_readme(ARCHIVE)))

# how an example ends: what its code has in it -> the error, and what that names
REFUSED: tuple[tuple[str, type[Exception], str], ...] = (
    ("ChatHandler", ImportError, "`chat_template`"),
    ("LlamaHFTokenizer", ImportError, "the file's vocabulary"),
    ("LlamaPromptLookupDecoding", ImportError, "`Llama(draft_model=FILE)`"),
    ("llama_backend_init", ImportError, "the methods of `Llama`"),
    ("embedding=True", errors.UnsupportedModelError, "a model that was trained for embeddings"),
    ("chat_format=", errors.UnknownOptionError, "`chat_template`"),
)


class SmallLlama(Llama):
    """Llama with a small context and short answers, so that random weights come to an end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"n_ctx": 1024, "n_threads": 1, "warmup": False, **options})

    def create_chat_completion(self, *args: Any, **options: Any) -> Any:
        return super().create_chat_completion(*args, **{"max_tokens": 8, **options})


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"Llama": pyllama_dsv4.Llama}  # two examples leave the import to those before
    try:
        exec(compile(code, "README", "exec"), names)
    finally:
        for value in names.values():
            if isinstance(value, Llama):
                value.close()
    return names


def refusal(code: str) -> tuple[type[Exception], str] | None:
    return next(((error, text) for mark, error, text in REFUSED if mark in code), None)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, vocab_model: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(pyllama_dsv4, "Llama", SmallLlama)
    monkeypatch.setattr("pyllama_dsv4.llama.download", lambda *args, **options: vocab_model)
    (tmp_path / "file_path.png").write_bytes(b"a picture")
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(ARCHIVE is None, reason="the pinned archive was not fetched on this machine")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: f"line{s.line}")
def test_an_example(snippet: readme_snippets.Snippet, vocab_model: Path) -> None:
    code = snippet.adapted(str(vocab_model))
    assert "llama-model.gguf" not in code
    refused = refusal(code)
    if refused is None:
        run(code)
        return
    with pytest.raises(refused[0]) as caught:
        run(code)
    assert refused[1] in str(caught.value)
    if refused[0] is errors.UnknownOptionError:
        # and it runs when the hint is followed
        run(re.sub(r',\s*chat_format="[^"]*"', "", code))


@pytest.mark.skipif(ARCHIVE is None, reason="the pinned archive was not fetched on this machine")
def test_the_examples_are_found() -> None:
    assert len(SNIPPETS) == 15
    assert sum(refusal(s.code) is None for s in SNIPPETS) == 5
    assert sum("chat_format=" in s.code for s in SNIPPETS) == 5


def test_adapting_changes_imports_and_paths_only() -> None:
    code = 'from llama_cpp.llama_x import Y\nimport llama_cpp\nZ(model_path="./a/b.gguf", x="*q8.gguf")\n'
    snippets = list(readme_snippets.snippets(f"text\n```python\n{code}```\n```bash\nls\n```\n"))
    assert [(s.line, s.code) for s in snippets] == [(3, code)]
    assert snippets[0].adapted("/m.gguf") == (
        "from pyllama_dsv4 import Y\nimport pyllama_dsv4 as llama_cpp\n"
        "Z(model_path='/m.gguf', x=\"*q8.gguf\")\n"
    )


@pytest.mark.parametrize(
    "name", ["LlamaGrammar", "LlamaDiskCache", "LlamaRAMCache", "LLAMA_POOLING_TYPE_NONE"]
)
def test_other_names_of_that_package_are_told_from_mistakes(name: str) -> None:
    with pytest.raises(ImportError, match="Use "):
        getattr(pyllama_dsv4, name)
    with pytest.raises(AttributeError):
        pyllama_dsv4.Lama  # type: ignore[attr-defined]  # noqa: B018
