"""Completions on a tiny model with the real vocabulary: stops, log-probabilities, biases, grammars, choices."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Grammar, Llama, errors
from pyllama_dsv4.logprobs import token_logprobs

GREEDY: Any = {"temperature": 0}
PROMPT = "The capital of France is"


def forced(llm: Llama, text: str) -> str:
    """Return GBNF that allows one text only."""
    return "root ::= " + json.dumps(text, ensure_ascii=False)


# --- stops ---


def test_stop_strings_and_stop_token_ids_end_the_text_and_are_no_part_of_it(llm: Llama) -> None:
    grammar = forced(llm, "one two three four")
    assert llm.create_completion(PROMPT, grammar=grammar)["choices"][0]["text"] == "one two three four"
    cut = llm.create_completion(PROMPT, grammar=grammar, stop=["xx", "thr"])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == ("one two ", "stop")
    logits_of = llm.tokenize(" three")
    assert len(logits_of) == 1
    ids = [llm.tokenize(w)[0] for w in ("one", " two", " three")]
    bias = dict.fromkeys(ids, 100.0)
    first = llm.create_completion(PROMPT, logit_bias=bias, max_tokens=8, **GREEDY)["choices"][0]["text"]
    stopped = llm.create_completion(PROMPT, logit_bias=bias, max_tokens=8, stop_token_ids=ids, **GREEDY)[
        "choices"
    ][0]
    assert first != ""
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


# --- log-probabilities ---


@pytest.mark.parametrize("n_top", [0, 1, 5, 200])
def test_logprobs_are_those_of_the_logits(n_top: int) -> None:
    logits = np.random.default_rng(n_top).normal(0, 4, 129280).astype(np.float32)
    logits[77] = logits.max()  # a tie: the lower id comes first
    found = token_logprobs(logits, 77, n_top)
    wide = logits.astype(np.float64)
    log_p = wide - (np.log(np.exp(wide - wide.max()).sum()) + wide.max())
    assert found.logprob == pytest.approx(log_p[77], abs=1e-5)
    order = np.lexsort((np.arange(len(logits)), -logits))[:n_top]
    assert [i for i, _ in found.top] == order.tolist()
    assert [p for _, p in found.top] == pytest.approx(log_p[order], abs=1e-5)


def test_logprobs_in_both_shapes(llm: Llama) -> None:
    answer = llm.create_completion(PROMPT, max_tokens=4, logprobs=3, echo=True, **GREEDY)["choices"][0]
    logprobs = answer["logprobs"]
    assert logprobs is not None
    assert answer["text"].startswith(PROMPT)
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 4
    assert all(
        max(t.values()) == p
        for t, p in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )
    assert logprobs["text_offset"][0] == len(PROMPT)
    chat = llm.create_chat_completion(
        [{"role": "user", "content": "hi"}], max_tokens=3, logprobs=True, top_logprobs=2, **GREEDY
    )["choices"][0]["logprobs"]
    assert chat is not None
    assert [len(entry["top_logprobs"]) for entry in chat["content"]] == [2, 2, 2]
    assert chat["content"][0]["bytes"] == list(chat["content"][0]["token"].encode()) or "\ufffd" in str(chat)


def test_top_logprobs_without_logprobs_is_refused(llm: Llama) -> None:
    with pytest.raises(errors.ArgumentError, match="needs logprobs"):
        llm.create_chat_completion([{"role": "user", "content": "hi"}], top_logprobs=2)


# --- biases and processors ---


def test_biases_hold_together_with_processors(llm: Llama) -> None:
    """A peer lost logit_bias when a processor was given."""
    token = llm.tokenize("banana")[0]
    seen: list[tuple[int, ...]] = []

    def look(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        seen.append(logits.shape)
        assert ids.dtype == np.int32

    biased = llm.create_completion(
        PROMPT, max_tokens=2, logit_bias={token: 1000.0}, logits_processor=look, **GREEDY
    )
    assert biased["choices"][0]["text"] == llm.detokenize([token, token])
    assert seen == [(129280,), (129280,)]


def test_a_processor_changes_logits_in_place_or_returns_others(llm: Llama) -> None:
    token = llm.tokenize("banana")[0]

    def in_place(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        logits[:] = -np.inf
        logits[token] = 0

    def other(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        out = np.full_like(logits, -10)
        out[token] = 10
        return out

    for process in (in_place, other):
        text = llm.create_completion(PROMPT, max_tokens=1, logits_processor=[process])["choices"][0]["text"]
        assert text == llm.detokenize([token])
    with pytest.raises(errors.ArgumentError, match="another shape"):
        llm.create_completion(PROMPT, max_tokens=1, logits_processor=lambda ids, logits: logits[:5])


@pytest.mark.parametrize("bias", [{-1: 1.0}, {129280: 1.0}, {"a": 1.0}, {1: float("nan")}, [1]])
def test_biases_out_of_range_are_named(llm: Llama, bias: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="logit_bias"):
        llm.create_completion(PROMPT, max_tokens=1, logit_bias=bias)


@pytest.mark.parametrize(
    "options",
    [
        {"top_n_sigma": 1e-6},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 1},
        {"adaptive_target": 0.5, "top_k": 1},
        {"mirostat": 2, "mirostat_tau": 0.0, "temperature": 1e-4},
        {"mirostat": 1, "mirostat_tau": 0.0, "temperature": 1e-4},
        {"dynatemp_range": 1e-5, "temperature": 1e-4},
    ],
)
def test_samplers_that_leave_the_best_token_only_are_greedy(llm: Llama, options: Any) -> None:
    llm.eval(llm.tokenize(PROMPT, add_bos=True))
    assert llm.sample(seed=3, **options) == int(llm.logits.argmax())


def test_dry_ends_a_repetition(llm: Llama) -> None:
    ids = llm.tokenize("a b c d a b c d a b c", add_bos=True)
    d = llm.tokenize(" d")[0]
    # the bias makes " d" the best token by ten
    llm.eval(ids)
    lead = {d: float(llm.logits.max() - llm.logits[d] + 10)}
    plain = llm.create_completion(ids, max_tokens=1, logit_bias=lead, **GREEDY)
    dry = llm.create_completion(ids, max_tokens=1, logit_bias=lead, dry_multiplier=50, **GREEDY)
    assert plain["choices"][0]["text"] == " d"
    assert dry["choices"][0]["text"] != " d"


# --- choices and reproducibility ---


def test_seed_reproduces_and_choices_differ(llm: Llama) -> None:
    options: Any = {"max_tokens": 6, "temperature": 1.5, "seed": 9, "n": 3}
    first = llm.create_completion(PROMPT, **options)
    again = llm.create_completion(PROMPT, **options)
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in again["choices"]]
    assert len(set(texts)) == 3
    assert [c["index"] for c in first["choices"]] == [0, 1, 2]
    assert first["usage"]["completion_tokens"] == 18
    one = llm.create_completion(PROMPT, max_tokens=6, temperature=1.5, seed=10)["choices"][0]["text"]
    assert one == texts[1]
    chats = llm.create_chat_completion([{"role": "user", "content": "x"}], **options)
    assert len({c["message"]["content"] for c in chats["choices"]}) == 3
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in llm.create_completion(PROMPT, stream=True, **options):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(streamed.values()) == texts


def test_fingerprint_names_engine_patches_and_model(llm: Llama) -> None:
    answer = llm.create_completion(PROMPT, max_tokens=1)
    assert answer["system_fingerprint"] == llm.system_fingerprint
    assert answer["system_fingerprint"].endswith(llm.fingerprint)


def test_suffix_asks_for_what_stands_between(llm: Llama) -> None:
    llm.create_completion("def f(", suffix="): pass", max_tokens=1)
    ids = llm._prompt_ids("def f(", "): pass")
    assert llm.detokenize(ids, special=True) == (
        "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f(<｜fim▁hole｜>): pass<｜fim▁end｜>"
    )


def test_loop_guard(llm: Llama) -> None:
    a, b = llm.tokenize("ab")[0], llm.tokenize(" cd")[0]

    def alternate(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        logits[b if ids[-1] == a else a] = 1e6

    answer = llm.create_completion(
        PROMPT, max_tokens=100, logits_processor=alternate, loop_guard=16, **GREEDY
    )
    assert answer["choices"][0]["finish_reason"] == "loop"
    assert 16 <= answer["usage"]["completion_tokens"] <= 18


# --- grammars ---


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= (", r"expecting '\)'"),
        ('start ::= "a"', "no rule 'root'"),
        ('root ::= root "a"', "left-recursive"),
        ("root ::= nowhere", "'nowhere' is used"),
        ('root ::= "a"{99999999}', "grammar"),
        ('root ::= "a"{0}', "grammar"),
        ("root ::= <[999999]>", "grammar"),
        ("root ::= " + "(" * 300 + '"a"' + ")" * 300, "256 levels"),
        ('root ::= "a"\n' * 20001, "20000 rules"),
        ('root ::= "' + "a" * (5 << 20) + '"', "4 MiB"),
        ("", "grammar"),
        ('root ::= "\ud800"', "surrogate"),
    ],
)
def test_bad_grammars_are_named_and_end_nothing(llm: Llama, grammar: str, message: str) -> None:
    if grammar.endswith("{0}"):  # an empty text: legal, and ends at once
        assert llm.create_completion(PROMPT, grammar=grammar, max_tokens=3)["choices"][0]["text"] == ""
        return
    with pytest.raises((errors.ArgumentError, errors.InferenceError), match=message):
        llm.create_completion(PROMPT, grammar=grammar, max_tokens=3)
    assert llm.create_completion(PROMPT, max_tokens=1, **GREEDY)


def test_a_grammar_needs_a_vocabulary(tiny_model: Any) -> None:
    with (
        Llama(tiny_model, n_ctx=64, n_threads=1, warmup=False) as llm,
        pytest.raises(errors.ArgumentError, match="vocabulary"),
    ):
        llm.create_completion([1, 2], grammar='root ::= "a"', max_tokens=1)


def test_unicode_and_tokens_longer_than_32_bytes_pass_a_grammar(llm: Llama) -> None:
    """A peer cut tokens at 32 bytes."""
    text = "日本語 ≥ 🙂 " + " " * 40 + "=" * 64 + "é"
    answer = llm.create_completion(PROMPT, grammar=forced(llm, text))
    assert answer["choices"][0]["text"] == text
    longest = max(range(0, 129280, 7), key=lambda i: len(llm.token_to_bytes(i)))
    assert len(llm.token_to_bytes(longest)) > 32


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["anna", "bert"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def check_value(value: Any) -> None:
    assert set(value) == {"name", "age", "tags"}
    assert value["name"] in ("anna", "bert")
    assert 0 <= value["age"] <= 99
    assert len(value["tags"]) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_holds_for_completions(llm: Llama, seed: int) -> None:
    answer = llm.create_completion(
        PROMPT, grammar=Grammar.from_json_schema(SCHEMA), seed=seed, max_tokens=300
    )["choices"][0]
    assert answer["finish_reason"] == "stop"
    check_value(json.loads(answer["text"]))


@pytest.mark.parametrize(
    "schema",
    ["{", '{"$ref": "#/nowhere"}', '{"type": "unheard"}', {"x": float("nan")}, "[" * 300 + "]" * 300, None],
)
def test_schemas_that_cannot_be_expressed_are_named(schema: Any) -> None:
    with pytest.raises(errors.ArgumentError):
        Grammar.from_json_schema(schema)


def test_speed_of_sampling_and_logprobs(llm: Llama) -> None:
    """Bounds ten times what was measured on an idle core; 129,280 entries."""
    llm.eval(llm.tokenize(PROMPT, add_bos=True))
    logits = llm.logits

    def per_call_s(work: Any, n: int = 20) -> float:
        work()
        start = time.process_time()
        for _ in range(n):
            work()
        return (time.process_time() - start) / n

    assert per_call_s(lambda: token_logprobs(logits, 1, 20)) < 0.02
    assert per_call_s(lambda: llm.sample(temperature=0)) < 0.02
