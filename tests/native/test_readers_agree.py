"""One file, three readers: our header parser, the gguf package and the engine see the same tensors and keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from shards import split_in_three

from pyllama_dsv4.gguf_file import ArrayValue
from pyllama_dsv4.gguf_types import register
from pyllama_dsv4.header import Header, check_header
from pyllama_dsv4.translate import translate

Listing = dict[str, tuple[int, str, tuple[int, ...]]]
"""Shard, type and dimensions by upstream name."""

LIST = """
import json, logging, sys
logger = logging.getLogger("pyllama_dsv4")
logger.setLevel(logging.DEBUG)
logger.addHandler(logging.StreamHandler(sys.stderr))
from pyllama_dsv4 import Llama
from pyllama_dsv4._native import drain_log
with Llama(sys.argv[1], n_ctx=512, n_threads=1, warmup=False) as llm:
    drain_log()
    model = llm._model
    print(json.dumps({"n_params": model.n_params, "n_bytes": model.n_bytes, "keys": model.metadata()}))
"""

LINE = re.compile(r"- tensor split +(\d+): +(\S+) (\S+) +\[([\d, ]+)\]")


@pytest.fixture(params=["native", "upstream", "q8_0", "bf16", "split"])
def path(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    kind = str(request.param)
    if kind == "native":
        return tiny_model
    if kind == "split":
        return split_in_three(tiny_model, tmp_path)
    dense: Any = None if kind == "upstream" else kind
    return translate(tiny_model, tmp_path / "x.gguf", to="upstream", dense=dense).path


def ours(header: Header) -> Listing:
    return {t.upstream_name: (t.shard, t.type.name, t.dims) for t in header.tensors}


def trimmed(dims: list[int]) -> tuple[int, ...]:
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def test_tensors(path: Path) -> None:
    header = check_header(path).header
    expected = ours(header)
    register()
    theirs = [(i, t) for i, shard in enumerate(header.shards) for t in gguf.GGUFReader(shard.path).tensors]
    by_name = {t.name: t for t in header.tensors}
    assert len(theirs) == len(expected) == 178
    for i, t in theirs:
        own = by_name[t.name]
        assert (i, t.tensor_type.name, trimmed([int(d) for d in t.shape])) == expected[own.upstream_name]
        assert (int(t.n_bytes), int(t.data_offset)) == (own.n_bytes, own.start)

    done = subprocess.run(
        [sys.executable, "-c", LIST, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"LLAMA_TRACE": "1"},
    )
    assert done.returncode == 0, done.stderr
    engine = {
        name: (int(shard), type_.upper(), trimmed([int(d) for d in dims.split(",")]))
        for shard, name, type_, dims in LINE.findall(done.stderr)
    }
    assert engine == expected

    import json

    facts = json.loads(done.stdout)
    assert facts["n_params"] == sum(t.n_elements for t in header.tensors)
    assert facts["n_bytes"] == sum(t.n_bytes for t in header.tensors)
    for key, entry in header.kv.items():  # the engine shows scalars as text
        if isinstance(entry.value, (bool, ArrayValue)) or key.startswith(("split.", "tokenizer.chat")):
            continue
        if isinstance(entry.value, float):
            assert float(facts["keys"][key]) == pytest.approx(entry.value, rel=1e-5, abs=1e-6), key
        elif key != "general.file_type":  # another number in memory
            assert facts["keys"][key] == str(entry.value), key


def test_keys(path: Path) -> None:
    header = check_header(path).header
    register()
    fields = gguf.GGUFReader(path).fields
    assert {name for name in fields if not name.startswith("GGUF.")} == set(header.kv)
    for key, entry in header.kv.items():
        value = list(entry.value) if isinstance(entry.value, ArrayValue) else entry.value
        assert fields[key].contents() == value, key
