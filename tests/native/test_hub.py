"""``Llama.from_pretrained`` against a hub of our own on the loopback interface, with the real client."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="the client of the hub is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from pyllama_dsv4 import Llama, errors

arguments, options = json.loads(sys.argv[1])
stages = []
def progress(event):
    stages.append((event.stage, event.fraction))
    return not (options.get("stop") and event.stage == "download")
more = {k: v for k, v in options.items() if k != "stop"}
try:
    with Llama.from_pretrained(*arguments, n_ctx=64, n_threads=1, warmup=False, progress=progress, **more) as llm:
        llm.eval([1, 2, 3])
        print(json.dumps({"path": str(llm.report.header.path), "stages": stages, "n_tokens": llm.n_tokens}))
except (errors.PyllamaError, ImportError) as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


class Hub:
    """The requests that the client makes: the list of files, HEAD and GET of one."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.gets: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/own/model/tree/"):
                    entries = [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(data),
                            "oid": hashlib.sha1(data).hexdigest(),
                        }
                        for name, data in hub.files.items()
                    ]
                    self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
                elif path.startswith("/api/models/own/model"):
                    siblings = [{"rfilename": name} for name in hub.files]
                    info = {
                        "id": "own/model",
                        "sha": COMMIT,
                        "siblings": siblings,
                        "private": False,
                        "tags": [],
                    }
                    self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
                elif path.startswith("/own/model/resolve/"):
                    name = path.split("/", 5)[5]
                    if name not in hub.files:
                        self.answer(404, b"", X_Error_Code="EntryNotFound")
                        return
                    data = hub.files[name]
                    if self.command == "GET":
                        hub.gets.append(name)
                    etag = f'"{hashlib.sha256(data).hexdigest()}"'
                    if name == "forbidden.gguf" and self.command == "GET":
                        self.answer(403, b"")
                        return
                    self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
                else:
                    self.answer(404, b"", X_Error_Code="RepoNotFound")

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def split_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from pyllama_dsv4.convert import convert

    folder = tmp_path_factory.mktemp("split")
    convert(tiny_checkpoint, folder / "split.gguf", max_file_bytes=8 << 20)
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("split-*-of-*.gguf"))}
    assert len(files) >= 2
    return files


@pytest.fixture
def hub(tiny_model: Path, split_model: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(
        {
            "README.md": b"# a model",
            "forbidden.gguf": b"GGUF",
            "tiny-native.gguf": tiny_model.read_bytes(),
            **{f"parts/{name}": data for name, data in split_model.items()},
        }
    )
    yield hub
    hub.close()


def run(hub: Hub, home: Path, *arguments: str, **options: Any) -> tuple[dict[str, Any], str]:
    """Call from_pretrained in a process of its own: the client reads its environment when it is imported."""
    environment = {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([arguments, options])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result, done.stderr


def test_a_model_is_fetched_once_and_opened(hub: Hub, tmp_path: Path) -> None:
    result, stderr = run(hub, tmp_path, "own/model", "*native.gguf")
    assert result["n_tokens"] == 3
    assert Path(result["path"]).read_bytes() == hub.files["tiny-native.gguf"]
    assert Path(result["path"]).is_relative_to(tmp_path)
    fractions = [f for stage, f in result["stages"] if stage == "download"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert "tiny-native" not in stderr  # no bars from a library
    assert hub.gets == ["tiny-native.gguf"]
    again, _ = run(hub, tmp_path, "own/model", "tiny-native.gguf")
    assert again["path"] == result["path"]
    assert hub.gets == ["tiny-native.gguf"]


@pytest.mark.parametrize("pattern", ["parts/*.gguf", "parts/split-00001-of-*.gguf"])
def test_all_shards_of_a_split_model_are_fetched(hub: Hub, tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "here"
    result, _ = run(hub, tmp_path, "own/model", pattern, local_dir=str(folder), additional_files=["README*"])
    assert result["n_tokens"] == 3
    assert sorted(hub.gets) == sorted(n for n in hub.files if n.startswith(("parts", "README")))
    assert (folder / "README.md").read_bytes() == b"# a model"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("own/other", "*.gguf"), {}, "ModelNotFoundError", "own/other"),
        (("own/model", "*q4*.gguf"), {}, "ModelNotFoundError", "tiny-native.gguf"),
        (("own/model", "*.gguf"), {}, "ArgumentError", "several files"),
        (("own/model", "README.md"), {}, "NotGGUFError", "README.md"),
        (("own/model", "forbidden.gguf"), {}, "ModelFileError", "403"),
        (("not a name", "x"), {}, "ArgumentError", "repo_id"),
        (("own/model", "*native.gguf"), {"stop": True}, "CancelledError", "callback"),
        (("own/model", "*native.gguf"), {"n_ctxx": 1}, "UnknownOptionError", "n_ctxx"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    hub: Hub, tmp_path: Path, arguments: Any, options: Any, error: str, text: str
) -> None:
    result, _ = run(hub, tmp_path, *arguments, **options)
    assert result["error"] == error
    assert text in result["text"]


@pytest.mark.slow  # the client tries for half a minute
def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    result, _ = run(hub, tmp_path, "own/model", "*native.gguf")
    assert result["error"] == "ModelFileError"
