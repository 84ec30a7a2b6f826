"""Sixteen clients at once, for a while: the same answers as alone, no memory that grows, no slot that stays taken."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_process import EXACT, Server, Start

CHAT = "/v1/chat/completions"
N_CLIENTS = 16
N_PROMPTS = 32
GROWTH_BYTES = 24 << 20  # answers that are remembered and the server's prompt cache are full long before


def body(number: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"Tell me about number {number}. " * (1 + number % 4)}],
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "cache_prompt": False,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def ask(server: Server, number: int) -> str:
    _, text = server.post(CHAT, body(number))
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for event in events for c in event.get("choices", ()))


def leave(server: Server, number: int) -> None:
    """Ask for much, and leave when the answer has begun."""
    request = urllib.request.Request(
        server.url + CHAT,
        json.dumps({**body(number), "max_tokens": 3000, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.readline()


def resident_bytes(server: Server) -> int:
    """Return the memory of the process that is no mapped file."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def keep_asking(server: Server, seconds: float) -> None:
    alone = [ask(server, i) for i in range(N_PROMPTS)]
    assert len(set(alone)) == N_PROMPTS
    end_s = time.monotonic() + seconds
    half_s = time.monotonic() + seconds / 2

    def client(seed: int) -> int:
        order = random.Random(seed)
        n = 0
        while time.monotonic() < end_s:
            number = order.randrange(N_PROMPTS)
            if order.random() < 0.05:
                leave(server, number)
            else:
                assert ask(server, number) == alone[number]
                n += 1
        return n

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        answers = [pool.submit(client, seed) for seed in range(N_CLIENTS)]
        time.sleep(max(half_s - time.monotonic(), 0))
        n_half = resident_bytes(server)
        counts = [answer.result() for answer in answers]
    n_end = resident_bytes(server)
    assert min(counts) > 0
    assert n_end - n_half < GROWTH_BYTES, f"{n_half} bytes in the middle, {n_end} at the end"
    time.sleep(1)
    assert server.n_busy() == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "seconds", [60, pytest.param(600, marks=pytest.mark.soak)], ids=["a minute", "ten minutes"]
)
def test_sixteen_clients_for_a_while(start: Start, model: Path, seconds: float) -> None:
    keep_asking(start(model, "-c", 4096, *EXACT).wait(), seconds)
