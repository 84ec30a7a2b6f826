"""The training of the demonstration model: its arithmetic, its data, its file, its continuation.

The module is held against the NumPy reference at all levels of rounding, and the exported file, run by the engine,
against the module.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from reference import Model as Reference
from reference import load_checkpoint
from reference_chat import ASSISTANT, EOS, THINK, THINK_END, Wording, prompt_text

pytest.importorskip("pyllama_dsv4._llama", reason="the native extension is not built")
pytest.importorskip("tokenizers", reason="the extra demo-train is not installed")
torch = pytest.importorskip("torch", reason="the extra demo-train is not installed")

from demo_model import exam  # noqa: E402
from demo_model.config import demo_config, parameter_specs  # noqa: E402
from demo_model.data import FIRST, SHORT, Conversation, Formatter, batch, conversation  # noqa: E402
from demo_model.export import export_gguf, hub_tensors, write_hub_checkpoint  # noqa: E402
from demo_model.model import LEVELS, Model  # noqa: E402
from demo_model.score_demo import GOALS  # noqa: E402
from demo_model.table import table_lines  # noqa: E402
from demo_model.tasks import CALCULATOR, TASKS, draw, split_of  # noqa: E402
from demo_model.train import Recipe, Run, phase_of  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from pyllama_dsv4 import Llama, demo, selftest, synth  # noqa: E402
from pyllama_dsv4.convert.plan import sources  # noqa: E402
from pyllama_dsv4.convert.template import chat_template  # noqa: E402
from pyllama_dsv4.score import score  # noqa: E402
from pyllama_dsv4.tensors import HParams  # noqa: E402

Array = npt.NDArray[np.floating]

torch.set_num_threads(1)  # on a busy machine several spin while they wait for each other

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


# --- a run: its vocabulary, data, file and continuation ---------------------------------------------------------------

N_STEPS = 6
SMALL = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "index_topk": 16, "vocab_size": 640}
RECIPE = Recipe(n_tokens=100_000, n_batch=256, n_warmup=2, level="cache")
# mean over 600 tokens; single tokens differ by flips of rounding, as between any two programs
NLL_ERROR = {"none": 1e-4, "cache": 5e-3, "full": 2e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps, without a stop."""
    run = Run(tmp_path_factory.mktemp("run"), RECIPE, demo_config(**SMALL))
    for _ in range(N_STEPS):
        run.train_step()
    return run


@pytest.fixture(scope="module")
def formatter(run: Run) -> Formatter:
    return run.formatter


def long_conversation() -> Conversation:
    return conversation(random.Random(3), "train", 1000, kind="name")


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run: Run, tmp_path: Path) -> None:
    first = Run(tmp_path, RECIPE, demo_config(**SMALL))
    for _ in range(N_STEPS // 2):
        first.train_step()
    first.save()
    first.train_step()  # after the last save: done again
    second = Run(tmp_path, RECIPE, demo_config(**SMALL))
    assert second.step == N_STEPS // 2
    while second.step < N_STEPS:
        second.train_step()
    assert second.n_done == run.n_done
    for name, w in run.params.items():
        assert torch.equal(w, second.params[name]), name
    with pytest.raises(ValueError, match="was begun with"):
        Run(tmp_path, Recipe(n_tokens=1, n_batch=256), demo_config(**SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_the_file_computes_what_was_trained(run: Run, tmp_path: Path, level: str) -> None:
    path = export_gguf(run.folder, run.config, run.params, tmp_path / "demo.gguf")
    ids, _ = run.formatter.encode(long_conversation())
    ids = ids[:601]
    with torch.no_grad():
        logits = Model(run.hp, run.params, level).forward(torch.from_numpy(ids[None])).logits[:-1]
    want = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:])).item()
    options = {"n_ctx": 1024, "n_threads": 1, "warmup": False, "cache_type": "f32", "flash_attn": "off"}
    with Llama(path, act_quant=level, **options) as llm:  # type: ignore[arg-type]
        got = score(llm, ids.tolist())
    assert got.n_tokens == 600
    assert abs(got.nll - want) < NLL_ERROR[level]


def test_a_run_stops_at_a_file_and_may_be_told_another_end(tmp_path: Path) -> None:
    first = Run(tmp_path, RECIPE, demo_config(**SMALL))
    (tmp_path / "STOP").touch()
    first.train(seconds=1000, save_minutes=1000)
    assert first.step == 0
    (tmp_path / "STOP").unlink()
    first.train(seconds=0.1, save_minutes=1000)
    assert first.step == 1
    second = Run(tmp_path, replace(RECIPE, n_tokens=first.n_done + 1), demo_config(**SMALL))
    second.train(seconds=1000, save_minutes=1000)
    assert (second.step, second.is_done) == (2, True)
    third = Run(tmp_path, second.recipe, demo_config(**SMALL))
    assert third.totals == [(0, RECIPE.n_tokens), (1, first.n_done + 1)]
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]


def test_a_loss_that_is_no_number_is_not_learned_from(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE, demo_config(**SMALL))
    with torch.no_grad():
        run.params["head.weight"][0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 0"):
        run.train_step()
    assert run.step == 0


def test_sums_come_first_and_long_conversations_last() -> None:
    recipe = Recipe(n_tokens=1000)
    phases = [phase_of(recipe, n) for n in (0, 99, 100, 450, 700, 2000)]
    assert [max(phase.lengths) for phase in phases] == [128, 128, 256, 1024, 4608, 4608]
    assert all(set(phase.mixture.weights) == {"add", "subtract", "talk"} for phase in phases[:2])
    assert len(phases[2].mixture.weights) == 9


def test_short_conversations_with_thinking_share_a_row(formatter: Formatter) -> None:
    """Else a first question with thinking on would never be seen: rows are longer than one."""
    begin, think = formatter._llm.tokenize("<｜begin▁of▁sentence｜><｜Assistant｜><think>", special=True)[
        :3:2
    ]
    ids, _ = batch(formatter, 1, 2, 64, 256, SHORT)
    starts = ids == begin
    assert starts[:, 0].all()
    assert starts.sum() > 1.5 * len(ids)
    first_thinks = sum(
        ids[row, at : at + 40].tolist().count(think) > 0 for row, at in zip(*starts.nonzero(), strict=True)
    )
    assert first_thinks > 20
    assert not (batch(formatter, 1, 2, 16, 128, FIRST)[0][:, 1:] == begin).any()


@pytest.mark.slow
def test_the_exam_is_passed_by_the_engine(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_gguf(run.folder, run.config, run.params, tmp_path / "demo.gguf")
    monkeypatch.setattr(demo, "TRAINED", path)
    monkeypatch.setattr(exam, "N_TOKENS", 300)
    n_questions = exam.write_exam(run.config, run.params, path, path.with_suffix(".json"))
    assert n_questions == 0  # six steps teach no answer
    read = demo.read_exam()
    assert read is not None
    assert len(read.answers) > 20
    check = selftest.Check("demo model")
    selftest._check_demo(check, read, 1)
    assert check.failures == []


def test_the_table_holds_what_was_measured() -> None:
    lines = table_lines({"cache, F16": {"sort": [3, 4]}, "none, F16": {"sort": [4, 4], "talk": [1, 8]}})
    assert lines[0] == "| Task | Goal | none, F16 | cache, F16 |"
    assert "| sort | 95% | 100.0% | 75.0% |" in lines
    assert "| talk | 95% | 12.5% |  |" in lines
    assert len(lines) == 2 + len(GOALS)


def test_codes_spell_the_values_in_the_loop(run: Run, tmp_path: Path) -> None:
    """Decoded by the reference, every tensor of the checkpoint is the one that the module multiplies with."""
    write_hub_checkpoint(tmp_path, run.config, run.params, None)
    _, weights = load_checkpoint(tmp_path)
    model = Model(run.hp, run.params)
    for name, spec in parameter_specs(run.hp).items():
        with torch.no_grad():
            want = model.stored(name).numpy()
        arrays = [weights[source] for source, _ in sources(spec)]
        assert np.array_equal(np.stack(arrays) if spec.is_expert_stack else arrays[0], want), name
    params = {name: w.detach() for name, w in run.params.items()}
    assert len(hub_tensors(run.hp, params)) > len(params)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_ids_are_those_of_an_independent_encoder(
    run: Run, formatter: Formatter, thinking: bool, tools: bool
) -> None:
    c = Conversation(thinking=thinking, tools=[CALCULATOR] if tools else [])
    rng = random.Random(5)
    for task in (*TASKS, "talk", "talk", "add"):
        if tools or task != "calculate":
            c.add(draw(task, rng, "train"), call_id=f"call_{len(c.messages)}")
    ids, mask = formatter.encode(c)
    text = prompt_text(
        Wording(chat_template("preview")),
        c.messages,
        tools=c.tools,
        thinking=thinking,
        add_generation_prompt=False,
    )
    oracle = Tokenizer.from_file(str(run.folder / "tokenizer.json"))
    assert ids.tolist() == oracle.encode(text, add_special_tokens=False).ids

    # what is to be learned is what follows the prompts of the answers, and nothing else
    pieces = oracle.decode_batch([[i] for i in ids.tolist()], skip_special_tokens=False)
    for i in range(1, ids.size):
        begins = pieces[i - 2] == ASSISTANT and pieces[i - 1] in (THINK, THINK_END)
        goes_on = bool(mask[i - 1]) and pieces[i - 1] != EOS
        assert mask[i] == (begins or goes_on), (i, pieces[i - 3 : i + 1])


def test_the_vocabulary_keeps_digits_apart_and_any_text(run: Run) -> None:
    oracle = Tokenizer.from_file(str(run.folder / "tokenizer.json"))
    assert len(oracle.encode("1234567").ids) == 7
    text = "Ünï ☂ 漢字 \t\n  x 😀"
    assert oracle.decode(oracle.encode(text).ids) == text


def test_batches_depend_on_their_arguments_only(formatter: Formatter) -> None:
    ids, mask = batch(formatter, 1, 2, 3, 128)
    again, _ = batch(formatter, 1, 2, 3, 128)
    assert ids.shape == mask.shape == (3, 129)
    assert np.array_equal(ids, again)
    assert not np.array_equal(ids, batch(formatter, 1, 3, 3, 128)[0])
    assert mask.any(axis=1).all()


def held_out() -> Iterator[tuple[str, str]]:
    rng = random.Random(1)
    for task in TASKS:
        for _ in range(40):
            yield task, draw(task, rng, "held-out").key


def test_no_held_out_instance_is_trained_on() -> None:
    assert all(split_of(key) == "held-out" for _, key in held_out())
    rng = random.Random(2)
    trained = {draw(task, rng, "train").key for task in TASKS for _ in range(2000)}
    assert len(trained) > 5000
    assert not trained & {key for _, key in held_out()}
