"""Runs ``pyllama-dsv4 serve`` as a user would: helpers of ``tests/server``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli_process import TIMEOUT_S, command

N_CTX = 4096
# flash attention rounds to F16, and differently for other divisions of a prompt into batches
EXACT = ("-fa", "off", "-ctk", "f32")


class Server:
    """A server process on a free port of the loopback interface.

    Attributes:
        log: What it has written to stderr; complete when it has ended.
        url: Address without a slash at the end.
    """

    def __init__(self, log: Path, *args: object, env: dict[str, str] | None = None) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYLLAMA_DSV4_", "LLAMA_"))}
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command("serve", *args, "--port", 0, "-t", 1), stderr=stream, env={**kept, **(env or {})}
            )
        self.url = ""

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> Server:
        """Wait until it has loaded."""
        end_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end_s:
            if found := re.search(r"listening on (http://\S+)", self.log):
                self.url = found[1]
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log}")

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.send(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """Send JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        return self.send(urllib.request.Request(self.url + path, data, headers))

    @staticmethod
    def send(request: urllib.request.Request) -> tuple[int, Any]:
        """Return status and answer: JSON if it is JSON, else text."""
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except json.JSONDecodeError:
            return status, text

    def n_busy(self) -> int:
        """Return the number of slots at work."""
        _, slots = self.get("/slots")
        return sum(slot["is_processing"] for slot in slots)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


Start = Callable[..., Server]
