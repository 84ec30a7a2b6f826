"""What a user's program looks like to a strict type checker; checked by test_typing.py, never run."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from pyllama_dsv4 import AsyncLlama, Grammar, Llama, PyllamaError


def forbid_five(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
    logits[5] = -np.inf


def chat(path: str) -> str | None:
    with Llama(path, n_ctx=4096, act_quant="full") as llm:
        answer = llm.create_chat_completion(
            [{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            tool_choice="auto",
            temperature=0.6,
            stop_event=threading.Event(),
        )
        for call in answer["choices"][0]["message"].get("tool_calls", []):
            print(call["function"]["arguments"])
        for chunk in llm.create_chat_completion([{"role": "user", "content": "hi"}], stream=True, n=2):
            print(chunk["choices"][0]["delta"].get("content", ""))
        return answer["choices"][0]["message"]["content"]


def complete(llm: Llama) -> int:
    grammar = Grammar.from_json_schema({"type": "object"})
    try:
        whole = llm.create_completion("x", grammar=grammar, logprobs=3, logits_processor=forbid_five)
    except PyllamaError as error:
        print(error.hint)
        raise
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs is not None
    print(logprobs["token_logprobs"][0] + 1.0, whole["system_fingerprint"])
    text = "".join(piece["choices"][0]["text"] for piece in llm("x", stream=True))
    return len(text) + whole["usage"]["completion_tokens_details"]["reasoning_tokens"]


async def later(llm: Llama) -> list[str]:
    async with AsyncLlama(llm) as async_llm:
        return [text async for text in async_llm.generate("x", max_tokens=3)]
