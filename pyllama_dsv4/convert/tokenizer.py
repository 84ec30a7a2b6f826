"""Turns a checkpoint's tokenizer files into the GGUF vocabulary keys.

It reads the byte-level BPE of ``tokenizer.json`` and the ids named by ``tokenizer_config.json``. Tokenising
itself is the engine's. The engine has the splitting rules compiled in under a name, so a tokenizer with other
rules is refused rather than written under that name.

Source: spec section 7.1 and 4.2; upstream ``conversion/base.py:get_vocab_base``, ``gguf-py/gguf/vocab.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import CheckpointError, MissingShardError

from .writer import MetadataEntry

__all__ = ["PRE_TOKENIZER_PATTERNS", "TokenType", "Vocabulary", "read_vocabulary", "vocabulary_keys"]

TOKENIZER_NAME: Final = "tokenizer.json"
TOKENIZER_CONFIG_NAME: Final = "tokenizer_config.json"

PRE_TOKENIZER: Final = "joyai-llm"
"""The engine's name for these splitting rules. Source: upstream ``src/llama-vocab.cpp``."""

PRE_TOKENIZER_PATTERNS: Final = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+",
)
"""Regular expressions by which DeepSeek-V4 splits text before the merges, in order."""

# Delimiters of added tokens that steer the model although the checkpoint does not flag them as special.
_CONTROL_DELIMITERS: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type`` values. Source: upstream ``include/llama.h:llama_token_type``."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary in the form the file stores.

    Attributes:
        tokens: Text of each id; of ordinary tokens in the byte-level alphabet.
        types: Type of each id.
        merges: ``"left right"``, the earlier the stronger.
        special_ids: ``bos``, ``eos`` and ``padding``, as far as the checkpoint names them.
    """

    tokens: Sequence[str]
    types: Sequence[TokenType]
    merges: Sequence[str]
    special_ids: Mapping[str, int]


def read_vocabulary(checkpoint: Checkpoint, n_vocab: int) -> Vocabulary | None:
    """Read a checkpoint's vocabulary.

    Args:
        checkpoint: The checkpoint.
        n_vocab: Rows of the embedding; ids without a token become unused ``[PADn]`` entries.

    Returns:
        The vocabulary, or None if the checkpoint has no tokenizer file at all.

    Raises:
        MissingShardError: Only one of the tokenizer files is there.
        CheckpointError: The tokenizer is not a DeepSeek-V4 one, or is malformed.
    """
    tokenizer = checkpoint.json(TOKENIZER_NAME)
    config = checkpoint.json(TOKENIZER_CONFIG_NAME)
    if tokenizer is None and config is None:
        return None
    if tokenizer is None or config is None:
        found, missing = (
            (TOKENIZER_CONFIG_NAME, TOKENIZER_NAME)
            if tokenizer is None
            else (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME)
        )
        raise MissingShardError(
            "the tokenizer is incomplete",
            path=checkpoint.folder / missing,
            found=f"only {found}",
            expected=f"{TOKENIZER_NAME} and {TOKENIZER_CONFIG_NAME}",
            hint="Download the missing file",
        )
    reader = _Reader(tokenizer, checkpoint.folder / TOKENIZER_NAME)
    tokens, types = reader.tokens(n_vocab)
    special_ids = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        token_id = reader.added_id(
            _content(config.get(name)), checkpoint.folder / TOKENIZER_CONFIG_NAME, name
        )
        if token_id is not None:
            special_ids[key] = token_id
    return Vocabulary(tokens, types, reader.merges(), special_ids)


def vocabulary_keys(vocabulary: Vocabulary | None) -> list[MetadataEntry]:
    """Return the ``tokenizer.ggml.*`` keys in the native file's order (spec section 4.2)."""
    if vocabulary is None:
        return [MetadataEntry("tokenizer.ggml.model", "str", "none")]
    keys = [
        MetadataEntry("tokenizer.ggml.model", "str", "gpt2"),
        MetadataEntry("tokenizer.ggml.pre", "str", PRE_TOKENIZER),
        MetadataEntry("tokenizer.ggml.tokens", "str[]", vocabulary.tokens),
        MetadataEntry("tokenizer.ggml.token_type", "i32[]", vocabulary.types),
        MetadataEntry("tokenizer.ggml.merges", "str[]", vocabulary.merges),
    ]
    keys += (
        MetadataEntry(f"tokenizer.ggml.{name}_token_id", "u32", token_id)
        for name, token_id in vocabulary.special_ids.items()
    )
    # neither is ever added by itself: the chat template and plain completion write BOS (spec section 7.2)
    keys += (MetadataEntry(f"tokenizer.ggml.add_{name}_token", "bool", False) for name in ("bos", "eos"))
    return keys


class _Reader:
    """The parts of one ``tokenizer.json``, each checked as it is read."""

    def __init__(self, tokenizer: Mapping[str, Any], path: Path) -> None:
        self.path = path
        model = tokenizer.get("model")
        if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
            kind = model.get("type") if isinstance(model, Mapping) else model
            raise self._error("model.type", ascii(kind), "'BPE'")
        self._check_splitting(tokenizer)
        vocab, merges, added = model.get("vocab"), model.get("merges"), tokenizer.get("added_tokens", [])
        if not isinstance(vocab, Mapping) or not all(type(i) is int and i >= 0 for i in vocab.values()):
            raise self._error("model.vocab", "something else", "an object that maps tokens to ids")
        if not isinstance(merges, list):
            raise self._error("model.merges", ascii(type(merges).__name__), "a list")
        if not isinstance(added, list) or not all(_is_added_token(a) for a in added):
            raise self._error("added_tokens", "something else", "a list of objects with id and content")
        self._vocab: Mapping[str, int] = vocab
        self._merges = merges
        self._added = {a["id"]: a for a in added}
        if len(self._added) != len(added) or len({a["content"] for a in added}) != len(added):
            raise self._error("added_tokens", "an id or a text twice", "each id and each text once")

    def tokens(self, n_vocab: int) -> tuple[list[str], list[TokenType]]:
        texts: list[str | None] = [None] * n_vocab
        types = [TokenType.UNUSED] * n_vocab
        for text, i in self._vocab.items():
            if i >= n_vocab:
                raise self._error("model.vocab", f"id {i}", f"ids below vocab_size, {n_vocab}")
            if texts[i] is not None:
                raise self._error("model.vocab", f"two tokens with id {i}", "each id once")
            texts[i], types[i] = text, TokenType.NORMAL
        for i, token in self._added.items():
            if i >= n_vocab:
                raise self._error("added_tokens", f"id {i}", f"ids below vocab_size, {n_vocab}")
            text = token["content"]
            if texts[i] not in (None, text):
                raise self._error("added_tokens", f"{text!r} for id {i}", f"{texts[i]!r}, as in model.vocab")
            if bool(token.get("special")) or _looks_like_control(text):
                texts[i], types[i] = text, TokenType.CONTROL
            else:
                # the engine matches these against raw text, where a space is a space
                texts[i], types[i] = text.replace("\u2581", " "), TokenType.USER_DEFINED
        filled = [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)]
        if len(set(filled)) != n_vocab:
            twice = next(text for text, n in Counter(filled).items() if n > 1)
            raise self._error("model.vocab", f"{twice!r} twice", "texts that differ")
        return filled, types

    def merges(self) -> list[str]:
        merges = []
        for merge in self._merges:
            if isinstance(merge, str) and merge.count(" ") == 1:
                merges.append(merge)
            elif isinstance(merge, list) and len(merge) == 2 and all(_is_merge_part(p) for p in merge):
                merges.append(f"{merge[0]} {merge[1]}")
            else:
                raise self._error("model.merges", ascii(merge), "'left right' or ['left', 'right']")
        return merges

    def added_id(self, content: str | None, path: Path, name: str) -> int | None:
        if content is None:
            return None
        for i, token in self._added.items():
            if token["content"] == content:
                return int(i)
        raise CheckpointError(
            "cannot use this tokenizer",
            path=path,
            key=name,
            found=repr(content),
            expected=f"one of the added_tokens of {TOKENIZER_NAME}",
        )

    def _check_splitting(self, tokenizer: Mapping[str, Any]) -> None:
        """Refuse rules other than those the engine will apply: they would give fluent, wrong token ids."""
        parts = tokenizer.get("pre_tokenizer")
        parts = parts.get("pretokenizers") if isinstance(parts, Mapping) else None
        if not isinstance(parts, list) or not all(isinstance(p, Mapping) for p in parts):
            raise self._error("pre_tokenizer", "something else", "a sequence of splits and ByteLevel")
        found = []
        for p in parts:
            pattern = p.get("pattern")
            found.append(
                (
                    p.get("type"),
                    pattern.get("Regex") if isinstance(pattern, Mapping) else None,
                    p.get("behavior"),
                )
            )
        expected = [("Split", pattern, "Isolated") for pattern in PRE_TOKENIZER_PATTERNS]
        if found != [*expected, ("ByteLevel", None, None)] or any(
            parts[-1].get(flag) for flag in ("add_prefix_space", "use_regex")
        ):
            raise self._error(
                "pre_tokenizer",
                ascii(found)[:200],
                f"the three splits of DeepSeek-V4 (known to the engine as {PRE_TOKENIZER}), then ByteLevel",
            )
        normalizer = tokenizer.get("normalizer")
        if normalizer is not None and (
            not isinstance(normalizer, Mapping) or normalizer.get("normalizers", True) != []
        ):
            raise self._error("normalizer", ascii(normalizer)[:200], "none")

    def _error(self, key: str, found: object, expected: object) -> CheckpointError:
        return CheckpointError(
            "cannot use this tokenizer", path=self.path, key=key, found=found, expected=expected
        )


def _is_added_token(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and type(value.get("id")) is int
        and value["id"] >= 0
        and isinstance(value.get("content"), str)
        and value["content"] != ""
    )


def _is_merge_part(value: object) -> bool:
    # a space inside a part could not be told from the one between the parts; byte-level text has none
    return isinstance(value, str) and value != "" and " " not in value


def _content(token: object) -> str | None:
    """Text of a special token of ``tokenizer_config.json``: a string, or an object with ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _looks_like_control(text: str) -> bool:
    return any(text.startswith(first) and text.endswith(last) for first, last in _CONTROL_DELIMITERS)
