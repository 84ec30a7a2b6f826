"""Where a model is to lie: options are checked before the load, and GPUs that do not exist are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyllama_dsv4 import Llama
from pyllama_dsv4._native import build_info, lib
from pyllama_dsv4.errors import ArgumentError
from pyllama_dsv4.placement import Placement, parse_overrides, parse_shares

HAS_GPU = bool(lib.llama_supports_gpu_offload())
without_gpu = pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")


def ids_of(path: Path, **options: Any) -> list[int]:
    with Llama(path, n_ctx=64, n_threads=1, warmup=False, **options) as llm:
        llm.eval([0, 5, 6, 7])
        return [int(i) for i in llm.logits.argsort()[-5:]]


def test_experts_and_single_tensors_can_be_placed_by_name(tiny_model: Path) -> None:
    plain = ids_of(tiny_model)
    assert ids_of(tiny_model, n_cpu_moe=2, tensor_overrides={r"attn_.*\.weight": "CPU"}) == plain
    assert ids_of(tiny_model, split_mode="none", main_gpu=0, tensor_split=[1, 1]) == plain


def test_a_buffer_that_does_not_exist_is_named(tiny_model: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no buffer CUDA9; there are: CPU") as caught:
        ids_of(tiny_model, tensor_overrides={"exps": "CUDA9"})
    assert caught.value.key == "tensor_overrides"


@without_gpu
@pytest.mark.parametrize("n_gpu_layers", [1, -1])
def test_layers_for_gpus_that_are_not_there_stop_the_load(tiny_model: Path, n_gpu_layers: int) -> None:
    with pytest.raises(ArgumentError, match="no device was found") as caught:
        ids_of(tiny_model, n_gpu_layers=n_gpu_layers)
    assert build_info()["backends"] in str(caught.value)


@without_gpu
def test_auto_goes_on_without_a_gpu_and_says_so(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="pyllama_dsv4"):
        ids_of(tiny_model, n_gpu_layers="auto")
    assert "no GPU was found" in caplog.text


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"split_mode": "half"}, "split_mode"),
        ({"n_gpu_layers": "many"}, "n_gpu_layers"),
        ({"n_cpu_moe": -1}, "n_cpu_moe"),
        ({"main_gpu": -1}, "main_gpu"),
        ({"tensor_split": [1, -1]}, "tensor_split"),
        ({"tensor_split": [float("nan")]}, "tensor_split"),
        ({"tensor_overrides": {"(": "CPU"}}, "tensor_overrides"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Placement(**options)
    assert caught.value.key == key


def test_too_many_shares_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ArgumentError, match="shares can be given"):
        ids_of(tiny_model, tensor_split=[1.0] * 1000)


def test_command_line_spellings() -> None:
    assert parse_overrides(r"blk\.[0-3]\.ffn_.*_exps=CPU,output=CUDA0") == {
        r"blk\.[0-3]\.ffn_.*_exps": "CPU",
        "output": "CUDA0",
    }
    assert parse_shares("3,1") == parse_shares("3/1") == [3.0, 1.0]
    with pytest.raises(ArgumentError, match="PATTERN=BUFFER"):
        parse_overrides("exps")
    with pytest.raises(ArgumentError, match="numbers"):
        parse_shares("a")
