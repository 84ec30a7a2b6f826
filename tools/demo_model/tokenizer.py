"""Trains the demonstration model's vocabulary on what its data generator writes.

Byte-level BPE with DeepSeek-V4's splitting rules and special tokens, in the form that the converter takes. Digits
are left out of the text it learns from, so that no merge joins two: arithmetic then works on single digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from pyllama_dsv4.convert.template import chat_template
from pyllama_dsv4.convert.tokenizer import PRE_TOKENIZER_PATTERNS
from pyllama_dsv4.synth.tokenizers import bpe_files, write_json

from .config import N_VOCAB
from .data import Conversation

__all__ = ["learn_merges", "texts_of", "write_vocabulary"]

N_ADDED = 12  # special tokens, which are no merges


def texts_of(conversations: Iterable[Conversation]) -> Iterator[str]:
    """Yield every text of conversations, and the fixed wording of the chat template, which prompts contain."""
    for text in re.findall(r"'((?:[^'\\]|\\.)*)'", chat_template("preview")):
        yield text.replace("\\n", "\n").replace("\\'", "'")
    for conversation in conversations:
        for tool in conversation.tools:
            yield str(tool["function"]).replace("'", '"')
        for message in conversation.messages:
            for key in ("content", "reasoning_content"):
                if message.get(key):
                    yield message[key]


def learn_merges(texts: Iterable[str], n_vocab: int) -> list[str]:
    """Return the merges, ``"left right"``, that fill a vocabulary of `n_vocab` with the bytes and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZER_PATTERNS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - N_ADDED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((re.sub(r"\d", "", text) for text in texts), trainer)
    merges: list[Any] = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def write_vocabulary(folder: Path, texts: Iterable[str], n_vocab: int = N_VOCAB) -> None:
    """Learn a vocabulary and write ``tokenizer.json`` and ``tokenizer_config.json`` into `folder`."""
    model, config = bpe_files(learn_merges(texts, n_vocab))
    n_used = 1 + max(token["id"] for token in model["added_tokens"])
    if n_used > n_vocab:
        raise ValueError(f"the vocabulary has {n_used} tokens, {n_vocab} fit")
    write_json(folder / "tokenizer.json", model)
    write_json(folder / "tokenizer_config.json", config)
