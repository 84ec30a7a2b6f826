"""``serve --model-draft``: upstream's drafting in the server, with draft models of our converter."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_process import TIMEOUT_S, command
from draft_pair import KINDS, N_CYCLE, counting_pair, random_pair
from server_process import EXACT, Server, Start


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return random_pair(tmp_path_factory.mktemp(request.param), request.param)


def ask(server: Server, prompt: list[int], n: int = 40) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    status, answer = server.post("/completion", body)
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


def test_the_text_is_the_one_without(start: Start, pair: tuple[Path, Path]) -> None:
    """Random weights: nearly every proposal is wrong, and the cache is rolled back."""
    prompts = [[3 + (7 * i + j) % 250 for j in range(20 + 30 * i)] for i in range(4)]
    plain = start(pair[0], "-c", 2048, "-np", 2, *EXACT).wait()
    expected = [ask(plain, prompt)["tokens"] for prompt in prompts]
    plain.stop()
    drafting = start(pair[0], "-c", 2048, "-np", 2, "-md", pair[1], *EXACT).wait()
    answers = [ask(drafting, prompt) for prompt in prompts]
    assert [answer["tokens"] for answer in answers] == expected
    assert all(answer["timings"]["draft_n"] > 40 for answer in answers)
    together: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: ask(drafting, prompts[i])["tokens"]}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(4)] == expected


@pytest.mark.parametrize("n_draft", [1, 4])
def test_right_proposals_are_taken(
    start: Start, pair: tuple[Path, Path], tmp_path: Path, n_draft: int
) -> None:
    model, draft = counting_pair(pair, tmp_path)
    server = start(model, "-c", 512, "-np", 1, "-md", draft, "--draft-max", n_draft, *EXACT).wait()
    answer = ask(server, [0, 1, 2], 36)  # not as far as token 1, which ends a text
    assert answer["tokens"] == [(3 + i) % N_CYCLE for i in range(36)]
    timings = answer["timings"]
    assert timings["draft_n"] == timings["draft_n_accepted"]
    assert timings["draft_n"] >= 36 * n_draft // (1 + n_draft) - n_draft


def test_the_plan_counts_it(pair: tuple[Path, Path]) -> None:
    done = run("plan", pair[0], "-md", pair[1], "--json")
    plan = json.loads(done.stdout)
    assert plan["draft"]["weights"] > 1e6
    assert plan["needs"] == sum(
        plan[part][name] for part in ("host", "draft") for name in ("weights", "cache", "compute")
    )


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_what_does_not_fit_is_named_before_the_load(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other, _ = random_pair(tmp_path, "mtp", n_vocab=640)
    for args, code, text in (
        ((other, "-md", pair[1]), 3, "number of tokens 512, the model has 640"),
        ((pair[0], "-md", pair[0]), 3, "drafts nothing"),
        ((pair[0], "-md", tmp_path / "none.gguf"), 3, "none.gguf"),
        ((pair[0], "-md", pair[1], "-ub", 2), 2, "n_ubatch = 2"),
        ((pair[0], "--", "-md", pair[1]), 2, "it before --"),
    ):
        done = run("serve", *args)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
        assert "loading model" not in done.stderr
