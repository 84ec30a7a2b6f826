"""Feed every layer of the engine the reference's own streams, and keep what the layer makes of them.

Owns the callback that the engine's scheduler runs between the nodes of a graph, and the reference's streams that go
with it; levels and bounds are the tests' choice. Errors of one layer never reach the next one here, so a
deep model is compared as tightly as a single layer. The engine is used as it is: the callback is an option of contexts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from reference import Model

from pyllama_dsv4._native import ffi, lib

Array = npt.NDArray[np.floating]

# Changes to the tiny model: every ratio with experts chosen by token, then with experts chosen by score.
DEEP: dict[str, Any] = {"compress_ratios": [0, 4, 128, 0, 4, 128, 0], "num_hash_layers": 3}

# The streams that enter the first layer, and those that leave layer N. Upstream's names: models/deepseek4.cpp:graph.
STREAMS = re.compile(r"hc_init|l_last-(\d+)")


def reference_streams(model: Model, ids: Sequence[int]) -> list[Array]:
    """Return what enters each layer of the reference, and what leaves the last one.

    L + 1 arrays (n, S, d) float32: streams are rounded between layers, so that the engine can be given the same bits.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    streams = [model.embed(tokens).astype(np.float32)]
    for i_layer in range(len(model.layers)):
        streams.append(layer_output(model, i_layer, streams[-1], ids).astype(np.float32))
    return streams


def layer_output(model: Model, i_layer: int, streams: Array, ids: Sequence[int]) -> Array:
    """Run one layer of the reference on streams (n, S, d) of a sequence's first tokens."""
    layer = model.layers[i_layer]
    tokens = np.asarray(ids, dtype=np.int64)
    return layer.forward(streams.astype(model.dtype), tokens, layer.attn.new_state()).streams


class Probe:
    """What to give to each layer, and what the engine had made instead.

    Attributes:
        made: As `streams`, by the engine; `made[i + 1]` is the output of layer i on `streams[i]`.
    """

    def __init__(self, streams: Sequence[Array]) -> None:
        self._streams = streams
        self._rows: list[list[Array]] = [[] for _ in streams]  # by place in the chain, one array a graph
        self._error: BaseException | None = None
        self.callback = ffi.callback("ggml_backend_sched_eval_callback", self._on_node)

    @property
    def made(self) -> list[Array]:
        if self._error is not None:
            raise self._error
        return [np.concatenate(rows) for rows in self._rows]

    def _on_node(self, tensor: Any, is_question: bool, _user_data: Any) -> bool:
        """Say whether a tensor matters, then, once it has been computed, swap its contents."""
        try:
            match = STREAMS.fullmatch(ffi.string(lib.ggml_get_name(tensor)).decode())
            if match is None or is_question:
                return match is not None
            i = 0 if match[1] is None else int(match[1]) + 1
            _, n_streams, n_embd = self._streams[i].shape
            n_bytes = int(lib.ggml_nbytes(tensor))
            rows = np.empty((n_bytes // (4 * n_streams * n_embd), n_streams, n_embd), np.float32)
            lib.ggml_backend_tensor_get(tensor, ffi.from_buffer(rows), 0, n_bytes)
            start = sum(map(len, self._rows[i]))
            self._rows[i].append(rows)
            given = np.ascontiguousarray(self._streams[i][start : start + len(rows)], np.float32)
            assert given.shape == rows.shape
            lib.ggml_backend_tensor_set(tensor, ffi.from_buffer(given), 0, n_bytes)
        except BaseException as error:  # must not cross the engine's frames
            self._error = self._error or error
            return False
        return True


@contextmanager
def probed(streams: Sequence[Array]) -> Iterator[Probe]:
    """Give `streams` to the layers of the one context that is created inside, from its first token on."""
    probe = Probe(streams)

    class Probing:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def pyl_context_init(self, model: Any, params: Any, monitor: Any) -> Any:
            params.cb_eval = probe.callback
            return lib.pyl_context_init(model, params, monitor)

    with mock.patch("pyllama_dsv4.context.lib", Probing()):
        yield probe
