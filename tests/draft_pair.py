"""Tiny models with draft models of both kinds: random ones, and pairs that were made to count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pyllama_dsv4 import synth
from pyllama_dsv4.convert import convert
from pyllama_dsv4.header import read_header

Kind = Literal["mtp", "dspark"]
KINDS: tuple[Kind, ...] = ("mtp", "dspark")
N_CYCLE = 40
N_VOCAB = 512


def random_pair(folder: Path, kind: Kind, n_vocab: int = N_VOCAB) -> tuple[Path, Path]:
    """Write a random model and its draft model; return their paths."""
    config = synth.tiny_config(vocab_size=n_vocab)
    synth.write_checkpoint(folder / "checkpoint", config, seed=3, tokenizer="bytes", draft=kind)
    convert(folder / "checkpoint", folder / "model.gguf")
    convert(folder / "checkpoint", folder / f"{kind}.gguf", draft=True)
    return folder / "model.gguf", folder / f"{kind}.gguf"


def counting_pair(pair: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """Write copies of a pair that count: token i is followed by i + 1, and N_CYCLE - 1 by 0."""
    model, draft = (Path(shutil.copyfile(path, folder / path.name)) for path in pair)
    embeddings = np.zeros((N_VOCAB, 256), np.float32)
    head = np.zeros((N_VOCAB, 256), np.float32)
    for i in range(N_CYCLE):
        embeddings[i, i] = 1e4  # no layer changes such a direction
        head[(i + 1) % N_CYCLE, i] = 5
    _set_bf16(model, "token_embd.weight", embeddings)
    _set_bf16(model, "output.weight", head)
    if draft.name.startswith("mtp"):
        _set_bf16(draft, "token_embd.weight", embeddings)
        _set_bf16(draft, "output.weight", head)
        _set_eh_proj(draft)
    else:
        first, second = (np.zeros((N_VOCAB, 256), np.float32) for _ in range(2))
        for i in range(N_CYCLE):  # the Markov head's bias: what follows the token before
            first[i, i] = second[(i + 1) % N_CYCLE, i] = 1e3
        _set_bf16(draft, "markov_w1.weight", first)
        _set_bf16(draft, "markov_w2.weight", second)
    return model, draft


def _set_bytes(path: Path, name: str, data: bytes) -> None:
    (info,) = (t for t in read_header(path).tensors if t.name == name)
    assert info.n_bytes == len(data)
    with path.open("r+b") as stream:
        stream.seek(info.start)
        stream.write(data)


def _set_bf16(path: Path, name: str, values: npt.NDArray[np.float32]) -> None:
    _set_bytes(path, name, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _set_eh_proj(path: Path) -> None:
    """Make the prediction block begin with the token's embedding, and nothing of the hidden state."""
    (info,) = (t for t in read_header(path).tensors if t.name.endswith("nextn.eh_proj.weight"))
    n_in, n_out = info.dims
    blocks = np.zeros((n_out, n_in // 128, 129), np.uint8)  # a scale and 128 codes
    blocks[:, :, 0] = 127
    for row in range(n_out):
        blocks[row, row // 128, 0] = 127 + 12
        blocks[row, row // 128, 1 + row % 128] = 0x38  # 1.0
    _set_bytes(path, info.name, blocks.tobytes())
