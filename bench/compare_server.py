"""Compare ``pyllama-dsv4 serve`` with the unpatched pin's llama-server, on the same file in upstream's dialect.

    python bench/compare_server.py FILE.gguf [--clients 1 4 16] [--prompt 64] [--gen 32] [--rounds 9]

FILE is a native file, whose stock conversion is written beside it once, or with --as-is a file that both open. The
unpatched server is built once in build/stock. Both servers stay loaded with the same options and take turns in random
order; in a round N clients at once stream one chat each. Time to first token is the median of a round's clients,
throughput all their tokens by the time until the last has ended. Ratios are medians of the pairs, above 1 where ours is
better, with their quartiles: of time on the wall, which says something on a quiet machine only, and of the servers' CPU
time. ``--act-quant none`` leaves out what ours does beyond the other.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from compare_stock import build_stock, convert_for_stock, quartiles

START_S = 300.0
WORDS = ("the", "river", "stone", "light", "house", "under", "before", "seven", "letters", "walk", "number")


@dataclass(frozen=True)
class Round:
    """What one engine did in one round.

    Attributes:
        first_s: Median over the clients of the time to the first token.
        rate: Tokens per second of all clients together.
        cpu_s: CPU time of the server.
    """

    first_s: float
    rate: float
    cpu_s: float


class Server:
    """A server process on a free port."""

    def __init__(self, command: list[str], log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)], stdout=stream, stderr=stream
            )
        end_s = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end_s:
                self.close()
                sys.exit(f"{command[0]} did not start; its log is {log}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """Return the CPU time of the process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


def chat(port: int, prompt: str, n_tokens: int) -> tuple[float, float, int]:
    """Stream one answer; return when it began and ended, and its number of tokens."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": n_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"status {answer.status}: {answer.read().decode()}")
    first_s, n = None, 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            sys.exit(f"an error in the stream: {event['error']}")
        for choice in event["choices"]:
            if first_s is None and any(choice["delta"].get(key) for key in ("content", "reasoning_content")):
                first_s = time.perf_counter()
        if event.get("usage"):
            n = event["usage"]["completion_tokens"]
    connection.close()
    end_s = time.perf_counter()
    return end_s if first_s is None else first_s, end_s, n


def run_round(server: Server, prompts: list[str], n_tokens: int) -> Round:
    """Ask everything at once."""
    cpu_start_s, start_s = server.cpu_s(), time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        done = list(pool.map(lambda prompt: chat(server.port, prompt, n_tokens), prompts))
    n_all = sum(n for _, _, n in done)
    return Round(
        statistics.median(first_s - start_s for first_s, _, _ in done),
        n_all / (max(end_s for _, end_s, _ in done) - start_s),
        server.cpu_s() - cpu_start_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--as-is", action="store_true", help="FILE is in upstream's dialect already")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="words of each prompt")
    parser.add_argument("--gen", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--act-quant", default="cache", help="rounding of ours; the other has none")
    parser.add_argument("--json", action="store_true", help="the numbers of every round")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the spread is part of the answer")

    file = args.file if args.as_is else convert_for_stock(args.file)
    program = build_stock("stock-server")
    n_slots = max(args.clients)
    n_ctx = n_slots * (2 * args.prompt + args.gen + 64)
    shared = ["-c", str(n_ctx), "-np", str(n_slots), "-t", str(args.threads), "-b", "512", "-ub", "512"]
    ours = [str(Path(sys.executable).with_name("pyllama-dsv4")), "serve", str(file)]
    logs = program.parent
    servers = {
        "stock": Server([str(program), "-m", str(file), *shared, "-lv", "1"], logs / "stock-server.log"),
        "ours": Server([*ours, *shared, "--act-quant", args.act_quant, "-q"], logs / "our-server.log"),
    }
    order = random.Random(1)
    times: dict[tuple[int, str], list[Round]] = {}
    try:
        for server in servers.values():  # untimed: pages and caches are warm afterwards
            run_round(server, ["Hello"] * n_slots, 2)
        for i in range(args.rounds):
            for n_clients in args.clients:
                prompts = [
                    " ".join([f"{i} {n_clients} {k}", *(order.choices(WORDS, k=args.prompt))])
                    for k in range(n_clients)
                ]
                for name in order.sample(sorted(servers), 2):
                    found = run_round(servers[name], prompts, args.gen)
                    times.setdefault((n_clients, name), []).append(found)
    finally:
        for server in servers.values():
            server.close()

    if args.json:
        rows = [{"clients": n, "server": s, "rounds": [vars(r) for r in t]} for (n, s), t in times.items()]
        print(json.dumps({"threads": args.threads, "file": file.name, "rows": rows}, indent=2))
        return
    print(
        f"{file.name}: {args.threads} threads, {args.rounds} rounds, {args.prompt} words, {args.gen} tokens"
    )
    print(f"{'clients':>7} {'what':16} {'stock':>9} {'ours':>9} {'ratio':>7}  quartiles")
    for n_clients in args.clients:
        stock, here = times[n_clients, "stock"], times[n_clients, "ours"]
        lines = (
            ("first token, ms", [r.first_s * 1e3 for r in stock], [r.first_s * 1e3 for r in here], -1),
            ("tokens/s", [r.rate for r in stock], [r.rate for r in here], 1),
            ("CPU time, s", [r.cpu_s for r in stock], [r.cpu_s for r in here], -1),
        )
        for what, theirs, own, power in lines:
            low, middle, high = quartiles([(a / b) ** power for a, b in zip(own, theirs, strict=True)])
            print(
                f"{n_clients:7} {what:16} {statistics.median(theirs):9.2f} {statistics.median(own):9.2f}"
                f" {middle:6.2f}x  {low:.2f}..{high:.2f}"
            )


if __name__ == "__main__":
    main()
