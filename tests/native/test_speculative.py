"""Draft models of our converter: the text is the one without them, and proposals that are right are taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_pair import KINDS, N_CYCLE, counting_pair, random_pair

from pyllama_dsv4 import Llama, batch, errors, synth
from pyllama_dsv4.context import Context
from pyllama_dsv4.convert import convert
from pyllama_dsv4.generate import Request, TextSteps

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 250, 150)]
# rounding that depends on the batch could choose another token where two are nearly equal
EXACT: dict[str, Any] = {"n_threads": 1, "warmup": False, "cache_type": "f32", "flash_attn": "off"}
GREEDY: Any = {"temperature": 0}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model and its draft model."""
    return random_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def scripted(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pair, both made to count."""
    return counting_pair(pair, tmp_path_factory.mktemp("scripted"))


def opened(model: Path, draft: Path | None = None, **options: Any) -> Llama:
    more = {} if draft is None else {"draft_model": draft}
    llm = Llama(model, **{"n_ctx": 512, **EXACT, **more, **options})
    llm._tokenizer.is_eog = lambda token: False  # type: ignore[method-assign]
    return llm


def tokens(llm: Llama, ids: list[int], n: int | None, **sampling: Any) -> list[int]:
    pieces = llm._pieces(ids, llm._params({**GREEDY, **sampling}), Request(max_tokens=n))
    return [p.token for p in pieces if p.token is not None]


# --- the text is the one without ---


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.7, "seed": 8, "top_k": 9}]
)
def test_a_rejected_proposal_changes_nothing(pair: tuple[Path, Path], sampling: Any) -> None:
    with opened(pair[0]) as llm:
        expected = tokens(llm, IDS, 60, **sampling)
        expected_logits = llm.logits
    with opened(*pair) as llm:
        assert tokens(llm, IDS, 60, **sampling) == expected
        assert llm.stats.n_tokens_drafted > 100
        assert llm.stats.acceptance_rate is not None
        assert llm.stats.acceptance_rate < 0.2  # random weights
        assert llm.n_tokens == len(IDS) + 60 - 1  # nothing of the proposals is left
        error = np.square(llm.logits - expected_logits).mean() / np.square(expected_logits).mean()
        assert error < 1e-7  # sums of a batch and of single tokens; a wrong cache gives 1e-3 and more


@pytest.mark.parametrize("n_draft", [1, 3, 5])
def test_right_proposals_are_taken(scripted: tuple[Path, Path], n_draft: int) -> None:
    with opened(scripted[0]) as llm:
        expected = tokens(llm, [0, 1, 2], 100)
        assert expected == [i % N_CYCLE for i in range(3, 103)]
    with opened(*scripted, n_draft=n_draft) as llm:
        calls: list[int] = []
        eval_once = llm._session.eval

        def counted(ids: Any, **options: Any) -> Any:
            calls.append(len(ids))
            return eval_once(ids, **options)

        llm._session.eval = counted  # type: ignore[method-assign]
        assert tokens(llm, [0, 1, 2], 100) == expected
        assert llm.stats.acceptance_rate == 1.0
        assert llm.stats.n_tokens_accepted > 99 * n_draft / (1 + n_draft) - 1 - n_draft
        assert len(calls) < 100 / (1 + n_draft) + 5
        # proposals that are right sometimes: the sampler chooses otherwise, and the counting goes on from there
        asked: list[int] = []

        def other(_: Any, logits: Any) -> None:
            asked.append(0)
            if len(asked) % 7 == 0:
                logits[(len(asked) * 3) % N_CYCLE] = 1e9

        mixed = llm._pieces([0, 1, 2], llm._params(GREEDY), Request(max_tokens=60, processors=(other,)))
        got = [p.token for p in mixed if p.token is not None]
        assert 0.2 < (llm.stats.acceptance_rate or 0) < 0.95
    asked.clear()
    with opened(scripted[0]) as llm:
        mixed = llm._pieces([0, 1, 2], llm._params(GREEDY), Request(max_tokens=60, processors=(other,)))
        assert [p.token for p in mixed if p.token is not None] == got


def test_the_context_fills_to_its_last_token(scripted: tuple[Path, Path]) -> None:
    with opened(scripted[0], n_ctx=64) as llm:
        expected = tokens(llm, [0, 1, 2], None)
    with opened(*scripted, n_ctx=64) as llm:
        assert tokens(llm, [0, 1, 2], None) == expected
        assert llm.n_tokens == 64


# --- batches ---


def batch_tokens(llm: Llama, prompts: list[list[int]], n: int, n_parallel: int, **sampling: Any) -> Any:
    """Return the ids of a batch, in the order of the prompts, and the number of evaluations."""
    seen: list[list[int]] = [[] for _ in prompts]
    made: list[list[int]] = []

    class Recorder(TextSteps):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.ids: list[int] = seen[len(made)]
            made.append(self.ids)

        def feed(self, token: int) -> str | None:
            self.ids.append(token)
            return super().feed(token)

    calls: list[int] = []
    decode_mixed = Context.decode_mixed

    def counted(self: Context, steps: Any, **options: Any) -> Any:
        calls.append(len(steps))
        return decode_mixed(self, steps, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "TextSteps", Recorder)
        patch.setattr(Context, "decode_mixed", counted)
        llm.generate_batch(prompts, max_tokens=n, n_parallel=n_parallel, **{**GREEDY, **sampling})
    return seen, len(calls)


@pytest.mark.parametrize("n_parallel", [1, 3, 8])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}])
def test_rejected_proposals_change_nothing_in_a_batch(
    pair: tuple[Path, Path], n_parallel: int, sampling: Any
) -> None:
    """Sequences of different lengths, more of them than are evaluated at once."""
    prompts = [IDS[i * 9 : i * 9 + 3 + 23 * (i % 4)] for i in range(7)]
    with opened(pair[0]) as llm:
        expected, _ = batch_tokens(llm, prompts, 24, n_parallel, **sampling)
        assert expected[0] == tokens(llm, prompts[0], 24, **sampling)
        assert llm.stats.n_tokens_drafted == 0
    with opened(*pair) as llm:
        assert tokens(llm, IDS[:20], 4)
        held = llm.n_tokens
        assert batch_tokens(llm, prompts, 24, n_parallel, **sampling)[0] == expected
        assert llm.stats.n_tokens_generated == 24 * len(prompts)
        assert llm.stats.n_tokens_drafted > 24 * len(prompts)
        assert (llm.stats.acceptance_rate or 0) < 0.2  # random weights
        assert llm.n_tokens == held
        assert tokens(llm, IDS[:20], 4) == tokens(llm, IDS[:20], 4)


@pytest.mark.parametrize("n_parallel", [2, 5])
def test_right_proposals_are_taken_in_a_batch(scripted: tuple[Path, Path], n_parallel: int) -> None:
    prompts = [[(i + j) % N_CYCLE for j in range(3 + i)] for i in range(5)]
    expected = [[(i + len(p) + j) % N_CYCLE for j in range(40)] for i, p in enumerate(prompts)]
    with opened(scripted[0]) as llm:
        got, n_plain = batch_tokens(llm, prompts, 40, n_parallel)
        assert got == expected
    with opened(*scripted, n_draft=3) as llm:
        got, n_calls = batch_tokens(llm, prompts, 40, n_parallel)
        assert got == expected
        assert llm.stats.acceptance_rate == 1.0
        assert n_calls < n_plain / 3
        # proposals that are right for some tokens and wrong for others
        bias = {7: 1e9}
        mixed, _ = batch_tokens(
            llm, prompts, 40, n_parallel, logit_bias=bias, presence_penalty=2e9, repeat_last_n=5
        )
        assert 0 < (llm.stats.acceptance_rate or 0) < 1
    with opened(scripted[0]) as llm:
        assert (
            batch_tokens(
                llm, prompts, 40, n_parallel, logit_bias=bias, presence_penalty=2e9, repeat_last_n=5
            )[0]
            == mixed
        )


# --- the cache holds what was chosen, and nothing else ---


@pytest.fixture
def counting(scripted: tuple[Path, Path]) -> Iterator[Llama]:
    with opened(*scripted, n_draft=4) as llm:
        yield llm


@pytest.mark.parametrize("n_taken", [1, 2, 3, 4, 5, 6, 7])
def test_closing_a_generation_drops_what_was_proposed(counting: Llama, n_taken: int) -> None:
    pieces = counting._pieces([0, 1, 2], counting._params(GREEDY), Request())
    taken = [next(pieces).token for _ in range(n_taken)]
    pieces.close()  # type: ignore[attr-defined]
    assert list(counting._session.ids) == [0, 1, 2, *taken][: counting.n_tokens]
    assert counting.n_tokens == 3 + n_taken - 1  # the last was not evaluated
    prompt = [0, 1, 2, *(t for t in taken if t is not None)]
    assert tokens(counting, prompt, 5) == [(3 + n_taken + i) % N_CYCLE for i in range(5)]
    assert counting.stats.n_tokens_cached == 3 + n_taken - 1


def test_going_back_to_a_checkpoint(pair: tuple[Path, Path]) -> None:
    prompts = [IDS[:100], [*IDS[:99], 7, *IDS[100:140]], IDS[:120], IDS[:30]]
    with opened(pair[0]) as llm:
        expected = [tokens(llm, prompt, 20) for prompt in prompts]
    with opened(*pair) as llm:
        assert [tokens(llm, prompt, 20) for prompt in prompts] == expected
        assert llm.stats.n_tokens_cached == 0
        assert tokens(llm, prompts[0], 20) == expected[0]
        assert llm.stats.n_tokens_cached > 90


@pytest.mark.parametrize("n_taken", [2, 4, 9])
def test_states_are_saved_between_proposals(scripted: tuple[Path, Path], n_taken: int) -> None:
    with opened(*scripted) as llm:
        pieces = llm._pieces([0, 1, 2], llm._params(GREEDY), Request())
        taken = [next(pieces).token or 0 for _ in range(n_taken)]
        pieces.close()  # type: ignore[attr-defined]
        state = llm.save_state()
    with opened(*scripted) as llm:
        llm.load_state(state)
        assert tokens(llm, [0, 1, 2, *taken], 6) == [(3 + n_taken + i) % N_CYCLE for i in range(6)]
        assert llm.stats.n_tokens_cached == 3 + n_taken - 1
    with opened(scripted[0]) as llm, pytest.raises(errors.StateError, match="n_draft"):
        llm.load_state(state)


def test_a_timeout_ends_a_prefill_with_a_draft_model(pair: tuple[Path, Path]) -> None:
    with opened(*pair, n_ctx=4096) as llm:
        with pytest.raises(errors.CancelledError, match="timeout"):
            llm.create_completion([5] * 4000, max_tokens=1, timeout=0.2)
        assert tokens(llm, IDS[:20], 3) == tokens(llm, IDS[:20], 3)


# --- refusals ---


def test_files_that_are_no_draft_models(pair: tuple[Path, Path]) -> None:
    with pytest.raises(errors.UnsupportedModelError, match="drafts nothing"):
        opened(pair[0], pair[0])
    with pytest.raises(errors.ModelNotFoundError):
        opened(pair[0], pair[0].parent / "nothing.gguf")


def test_a_draft_model_of_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    synth.write_checkpoint(tmp_path / "c", synth.tiny_config(vocab_size=640), seed=3, tokenizer="bytes")
    convert(tmp_path / "c", tmp_path / "other.gguf")
    with pytest.raises(errors.ModelLoadError, match="number of tokens 512, the model has 640"):
        opened(tmp_path / "other.gguf", pair[1])


@pytest.mark.parametrize("n_draft", [0, 17, 3.5, True])
def test_lengths_of_proposals_out_of_range(pair: tuple[Path, Path], n_draft: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="n_draft"):
        opened(*pair, n_draft=n_draft)
    with pytest.raises(errors.ArgumentError, match="n_ubatch"):
        opened(*pair, n_draft=4, n_ubatch=4)
