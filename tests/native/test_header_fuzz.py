"""The header check in Python and the engine's own must give the same verdict, and what passes must not abort.

Cases come from ``header_mutations``: 10,000 damaged headers, the same in every run.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from header_mutations import Case, Mutator

from pyllama_dsv4._native import ffi, lib
from pyllama_dsv4.errors import PyllamaError
from pyllama_dsv4.header import check_header

N_CASES = 10_000
N_BATCHES = 10
KINDS = {
    "DialectError",
    "FormatError",
    "MissingKeyError",
    "MissingTensorError",
    "ModelNotFoundError",
    "NotGGUFError",
    "TensorShapeError",
    "TruncatedFileError",
    "Type42Error",
    "UnsupportedModelError",
    "ok",
}

# One process for many files: a child per file would cost more than the loads. The name is written before the
# load, so that the file is known when the process does not come back.
LOAD = """
import sys
from pyllama_dsv4 import Llama
from pyllama_dsv4.errors import PyllamaError
for line in sys.stdin:
    path = line.rstrip("\\n")
    print(path, flush=True)
    try:
        with Llama(path, n_ctx=512, n_batch=64, n_threads=1, warmup=False) as llm:
            llm.eval(list(range(min(20, llm.n_vocab))))
            llm.eval([0])
    except PyllamaError as error:
        print("refused:", type(error).__name__, flush=True)
print("done", flush=True)
"""


def python_verdict(path: Path) -> tuple[Any, ...]:
    """Class, tensor and key of the refusal; or ok, dialect and derived keys."""
    try:
        report = check_header(path)
    except PyllamaError as error:
        # an empty name is no name on the native side
        return type(error).__name__, error.tensor or None, error.key or None
    return "ok", report.dialect, {key: comparable(value) for key, value in report.derived_keys.items()}


def native_verdict(path: Path) -> tuple[Any, ...]:
    verdict = ffi.new("char **")
    status = lib.pyl_check_file(str(path).encode(), verdict)
    assert status == lib.PYL_OK
    try:
        found = json.loads(ffi.string(verdict[0]))
    finally:
        lib.pyl_string_free(verdict[0])
    if found["ok"]:
        return "ok", found["dialect"], {key: comparable(value) for key, value in found["derived"].items()}
    assert str(path.parent) in found["message"]
    return found["kind"], found["tensor"], found["key"]


def comparable(value: Any) -> Any:
    """Round to float32, which is what the file and the engine hold."""
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if isinstance(value, float):
        return struct.unpack("f", struct.pack("f", value))[0]
    return value


def remove(case: Case) -> None:
    for path in case.paths:
        path.unlink(missing_ok=True)


@pytest.mark.slow
def test_both_checks_agree(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    differences = []
    for batch in range(N_BATCHES):
        mutator = Mutator(seed=batch)
        for i in range(N_CASES // N_BATCHES):
            case = mutator.next(tmp_path)
            expected = python_verdict(case.paths[0])
            found = native_verdict(case.paths[0])
            counts[expected[0]] += 1
            if found != expected:
                differences.append(f"seed {batch}, case {i}, {case.changes}: {expected} != {found}")
            remove(case)
    assert not differences, f"{len(differences)} differ\n" + "\n".join(differences[:20])
    # the cases have to reach every step of the check
    assert set(counts) == KINDS
    assert min(counts.values()) >= N_CASES // 1000, counts


@pytest.mark.slow
def test_nothing_that_passes_ends_the_process(tmp_path: Path) -> None:
    mutator = Mutator(seed=N_BATCHES)
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    n_loaded = 0
    for i in range(400):
        folder = tmp_path / str(i)
        folder.mkdir()
        case = mutator.next(folder)
        if python_verdict(case.paths[0])[0] == "ok":
            process.stdin.write(f"{case.paths[0]}\n")
            n_loaded += 1
        else:
            remove(case)
    output, _ = process.communicate()
    assert process.returncode == 0, output.splitlines()[-1]
    assert output.endswith("done\n")
    assert n_loaded > 50
    # the check lets through a few files whose tokenizer keys the loader refuses by itself
    assert output.count("refused:") < n_loaded // 20
