"""The DeepSeek-V4 forward pass in NumPy, written from the specification to be read and compared with.

Owns the numbers that parity tests hold the engine against. It shares no code with the package (it imports
nothing of it) and leaves speed, sampling, text and files other than hub-form checkpoints to others.

One file per noun, each small enough to read in one go:

==============  =====================================================================================
config.py       the sizes and constants of one model
weights.py      a hub-form checkpoint -> dict of float arrays by official tensor names
quant.py        the rounding steps of the official code (FP8 and FP4 fake quantisers, levels)
elementary.py   rms norm, sigmoid, accurate softplus, Hadamard transform
rope.py         rotary positions, with the YaRN frequencies of compressed layers
hyper.py        hyper-connections: n residual streams, mixed by a doubly stochastic matrix
compressor.py   4 or 128 tokens -> one row
indexer.py      which compressed rows a token may read
attention.py    window + compressed rows + sink -> one vector
moe.py          routing, routed experts, shared expert
model.py        the trunk: embedding, layers, logits, carried state, selection margins
==============  =====================================================================================

Letters in shape comments: n tokens, S streams, d hidden, H heads, D head width, W window, R rows, E experts.
"""

from __future__ import annotations

from .config import Config
from .model import LayerResult, Model, Result, State
from .quant import LEVELS, fq4_32, fq8_64, fq8_128
from .weights import load_checkpoint

__all__ = [
    "LEVELS",
    "Config",
    "LayerResult",
    "Model",
    "Result",
    "State",
    "fq4_32",
    "fq8_64",
    "fq8_128",
    "load_checkpoint",
]
