"""The training module of the demonstration model against the NumPy reference, at all levels of rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from reference import Model as Reference
from reference import load_checkpoint

torch = pytest.importorskip("torch", reason="the extra demo-train is not installed")

from demo_model.config import demo_config, file_bytes, parameter_specs  # noqa: E402
from demo_model.model import LEVELS, Model  # noqa: E402

from pyllama_dsv4 import synth  # noqa: E402
from pyllama_dsv4.convert.plan import sources  # noqa: E402
from pyllama_dsv4.tensors import HParams  # noqa: E402

Array = npt.NDArray[np.floating]

N_TOKENS = 300  # two whole windows of 128 and 75 rows of ratio 4, of which 16 are chosen
N_VOCAB = 320
TINY = {  # like the demonstration model, chosen rows and experts included
    "vocab_size": N_VOCAB,
    "index_topk": 16,
    "swiglu_limit": 3.0,
}
NONE_MAX, NONE_NMSE = 1e-3, 1e-9
CACHE_MEDIAN, CACHE_NMSE = 5e-3, 5e-3
FULL_NMSE = 2e-2


def load(folder: Path) -> tuple[HParams, dict[str, torch.Tensor], Reference]:
    """The parameters of a checkpoint, and the reference's configuration and weights."""
    config, weights = load_checkpoint(folder)
    hp = HParams.from_hf_config({**demo_config(), **TINY})
    params = {}
    for name, spec in parameter_specs(hp).items():
        arrays = [weights[source] for source, _ in sources(spec)]
        value = np.stack(arrays) if spec.is_expert_stack else arrays[0]
        params[name] = torch.from_numpy(np.array(value))
    return hp, params, (config, weights)


@pytest.fixture(scope="module", params=[1, 2])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("demo")
    synth.write_checkpoint(folder, demo_config(**TINY), seed=request.param)
    tokens = np.random.default_rng(request.param).integers(0, N_VOCAB, N_TOKENS)
    return *load(folder), tokens


def errors(got: Array, want: Array) -> tuple[Array, float]:
    return np.abs(got - want).max(axis=1), float(np.mean((got - want) ** 2) / np.mean(want**2))


@pytest.mark.parametrize("level", LEVELS)
def test_the_training_module_computes_what_the_reference_computes(case: tuple, level: str) -> None:
    hp, params, (config, weights), tokens = case
    want = Reference(config, weights, np.float64, level).forward(tokens).logits
    other = np.random.default_rng(9).integers(0, N_VOCAB, N_TOKENS)
    with torch.no_grad():  # a second sequence beside it must change nothing
        out = Model(hp, params, level).forward(torch.from_numpy(np.stack([other, tokens])))
    by_token, nmse = errors(out.logits.view(2, N_TOKENS, -1)[1].double().numpy(), want)
    if level == "none":
        assert by_token.max() < NONE_MAX
        assert nmse < NONE_NMSE
    elif level == "cache":
        assert np.median(by_token) < CACHE_MEDIAN
        assert nmse < CACHE_NMSE
    else:
        assert nmse < FULL_NMSE
