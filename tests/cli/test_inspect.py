"""``pyllama-dsv4 inspect``: tables, JSON, patterns, refusals, and that it stays a light command."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf_writer import (
    FLASH_FILE_BYTES,
    TINY,
    Gguf,
    Tensor,
    flash_file,
    native_v4,
    upstream_v4,
)

from pyllama_dsv4.cli.inspect import inspect
from pyllama_dsv4.errors import (
    MissingTensorError,
    ModelNotFoundError,
    NotGGUFError,
    TruncatedFileError,
    Type42Error,
)
from pyllama_dsv4.header import check_header

P = "deepseek4."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(inspect, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def json_of(*args: str | Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(run(*args, "--json"))
    return info


def test_json_of_a_native_file(path: Path) -> None:
    model = native_v4()
    info = json_of(model.write(path, extra=64))
    assert list(info) == [
        "path",
        "n_file_bytes",
        "shards",
        "gguf_version",
        "alignment",
        "data_start",
        "n_trailing_bytes",
        "architecture",
        "name",
        "dialect",
        "form",
        "generation",
        "engines",
        "context_length",
        "file_type",
        "file_type_name",
        "n_tensors",
        "n_params",
        "n_tensor_bytes",
        "types",
        "type_42",
        "keys",
        "hparams",
        "vocabulary",
        "chat_template",
    ]
    report = check_header(path)
    size = path.stat().st_size
    assert info["path"] == str(path)
    assert info["shards"] == [{"path": str(path), "n_bytes": size}]
    assert (info["n_file_bytes"], info["n_trailing_bytes"]) == (size, 64)
    assert (info["gguf_version"], info["alignment"], info["data_start"]) == (3, 32, len(model.header()))
    assert (info["architecture"], info["dialect"], info["name"]) == (
        "deepseek4",
        "native",
        "DeepSeek V4 Flash",
    )
    assert (info["context_length"], info["file_type"]) == (1048576, 41)
    assert info["file_type_name"] == "MOSTLY_F8_E4M3_MXFP4"
    assert (info["n_tensors"], info["n_params"]) == (178, report.n_params)
    assert [type_["n_bytes"] for type_ in info["types"]] == sorted(report.type_bytes.values(), reverse=True)
    fp8 = next(type_ for type_ in info["types"] if type_["name"] == "F8_E4M3_B128")
    assert (fp8["id"], fp8["n_tensors"], fp8["n_bytes"]) == (42, 50, fp8["n_params"] // 128 * 129)
    assert info["type_42"] == {
        "id": 42,
        "verdicts": {"F8_E4M3_B128": 50},
        "example": {
            "tensor": "blk.0.attn_kv_latent.weight",
            "verdict": "F8_E4M3_B128",
            "basis": "fits",
            "n_elements": 32768,
            "n_bytes_available": 33024,
            "sizes": {"F8_E4M3_B128": 33024, "Q2_0": 9216, "PRISM_Q2_0": 8704},
        },
    }
    assert info["keys"]["n_present"] == 50
    assert info["keys"]["present"][P + "swiglu_clamp_exp"] == "arr[f32]"
    assert info["keys"]["derived"] == report.derived_keys
    assert info["hparams"]["compress_ratios"] == list(TINY.compress_ratios)
    assert info["vocabulary"] == {"model": "gpt2", "pre": "joyai-llm", "n_tokens": 320}
    assert info["chat_template"] == {"is_present": True, "n_chars": 5, "is_v4": False, "is_replaced": True}


def test_json_of_an_upstream_file(path: Path) -> None:
    template = "{% set dsml_token = 'x' %}"
    info = json_of(upstream_v4().set("tokenizer.chat_template", "str", template).write(path))
    assert (info["dialect"], info["type_42"], info["keys"]["derived"]) == ("upstream", None, {})
    assert info["file_type_name"] is None  # 41, but no tensor of type 42 says which
    assert info["chat_template"] == {"is_present": True, "n_chars": 26, "is_v4": True, "is_replaced": False}
    native = native_v4().set("tokenizer.chat_template", "str", template)
    assert json_of(native.write(path))["chat_template"]["is_replaced"] is False
    assert json_of(upstream_v4().write(path))["chat_template"]["is_replaced"] is False


def test_json_of_another_model(path: Path) -> None:
    model = Gguf(
        [
            ("general.architecture", "str", "llama"),
            ("llama.context_length", "u32", 512),
            ("general.file_type", "u32", 41),
        ],
        [Tensor("a.weight", (1024, 8), "q2_0")],
    )
    info = json_of(model.write(path))
    assert (info["dialect"], info["context_length"], info["hparams"], info["name"]) == (
        "other",
        512,
        None,
        None,
    )
    assert (info["file_type_name"], info["type_42"]["verdicts"]) == ("MOSTLY_Q2_0", {"Q2_0": 1})
    assert info["vocabulary"] == {"model": None, "pre": None, "n_tokens": None}
    model.tensors.append(Tensor("b.weight", (1024, 8), 42))
    model.tensors.append(Tensor("c", (1,), 0))
    model.set("general.name", "u32", 5)
    info = json_of(model.write(path, cut=28))  # no padding at the end
    assert (info["file_type_name"], info["name"], info["n_trailing_bytes"]) == (None, None, 0)
    assert info["type_42"]["verdicts"] == {"Q2_0": 1, "F8_E4M3_B128": 1}


def test_tables_of_a_native_file(path: Path) -> None:
    text = run(native_v4().write(path))
    for line in (
        r"DeepSeek V4 Flash",
        r"  dialect +native",
        r"  form +native: names of the fork .*",
        r"  generation +preview",
        r"  pyllama-dsv4 +opens it",
        r"  llama\.cpp, stock +does not open it +it expects 'blk\.0\.attn_output_a\.weight' at offset .*",
        r"  context length +1,048,576",
        r"  file type +41, MOSTLY_F8_E4M3_MXFP4",
        r"  metadata +50 keys, 10 more derived",
        r"  vocabulary +gpt2, 320 tokens, pre-tokeniser joyai-llm",
        r"  chat template +5 characters; a load uses DeepSeek-V4's own instead",
        r"  F8_E4M3_B128 +42 +50 .*",
        r"  verdict +F8_E4M3_B128 \(50 tensors\)",
        r"  bytes up to the next tensor +33,024",
        r"  bytes as PRISM_Q2_0 +8,704",
        r"  attention.output_group_count +2",
        r"  layers +6: 2 of ratio 0, 2 of ratio 4, 2 of ratio 128; 3 route by token",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    heading, *rows = re.findall(r"^  (?:type|MXFP4|F32|total) .*", text, re.MULTILINE)
    assert len(rows) == 3
    for column in ("parameters", "bytes"):  # numbers end where their heading does
        end = heading.index(column) + len(column)
        assert all(row[end - 1].isdigit() and not row[end : end + 1].strip() for row in rows)
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_tables_of_other_files(path: Path) -> None:
    text = run(Gguf([("general.architecture", "str", "clip")]).write(path))
    assert "none (this package runs deepseek4 only)" in text
    assert "derived" not in text.replace("0 more derived", "")
    text = run(upstream_v4(n_tokens=None).write(path, extra=100))
    assert "upstream" in text
    assert "behind the last tensor" in text
    assert "Keys that the file lacks" not in text
    assert "6: 2 of ratio 0, 2 of ratio 4, 2 of ratio 128" in text  # the file's seventh ratio is no layer's


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--tensors"], 178),
        (["--tensors", "*"], 178),
        (["--tensors", "blk.0."], 24),
        (["--tensors", "blk.?.attn_sinks"], 6),
        (["--tensors", "attn_compressor_ape"], 4),  # the other dialect's name
        (["--tensors", "output_hc_*"], 3),
        (["--tensors", "ATTN"], 0),
    ],
)
def test_tensor_patterns(path: Path, args: list[str], names: int) -> None:
    native_v4().write(path)
    assert len(json_of(path, *args)["tensors"]) == names
    assert f"Tensors ({names})" in run(path, *args)


def test_tensor_lines(path: Path) -> None:
    model = native_v4().write(path)
    (tensor,) = json_of(model, "--tensors", "blk.2.attn_compress_kv.weight")["tensors"]
    assert (tensor["name"], tensor["dims"], tensor["type"]) == (
        "blk.2.attn_compress_kv.weight",
        [256, 256],
        "BF16",
    )
    assert tensor["upstream_name"] == "blk.2.attn_compressor_kv.weight"
    assert (tensor["shard"], tensor["n_bytes"]) == (0, 131072)
    in_header = check_header(path).header.tensor("blk.2.attn_compress_kv.weight")
    assert in_header is not None
    assert tensor["offset"] == in_header.start
    assert re.search(
        rf"^  blk\.2\.attn_compress_kv\.weight  256 x 256  BF16  {tensor['offset']:,}  131,072$",
        run(model, "--tensors", "blk.2.attn_compress_kv"),
        re.MULTILINE,
    )


def test_names_cannot_reach_the_terminal(path: Path) -> None:
    model = Gguf(
        [("general.architecture", "str", "x"), ("general.name", "str", "a\x1b[2Jb\nc")],
        [Tensor(b"t\x1b]0;\xff", (8,), 0)],
    ).write(path)
    text = run(model, "--tensors")
    assert "\x1b" not in text
    assert "a\\x1b[2Jb\\nc" in text
    assert "t\\x1b]0;" in text
    assert json_of(model, "--tensors")["tensors"][0]["name"] == "t\x1b]0;\udcff"


def test_on_a_terminal(path: Path) -> None:
    """Colour on a terminal, none under NO_COLOR; the content is that of the plain form."""
    native_v4().write(path)
    assert "\x1b[36mdialect" in on_terminal(path)
    plain = on_terminal(path, NO_COLOR="1")
    assert "\x1b[36m" not in plain
    for part in ("dialect", "native", "F8_E4M3_B128 (50 tensors)", "output_group_count"):
        assert part in plain


def on_terminal(path: Path, **environment: str) -> str:
    code = "import sys; from pyllama_dsv4.cli.inspect import inspect; inspect([sys.argv[1]])"
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=slave, env=env)
    os.close(slave)
    output = bytearray()
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # how Linux reports the closed other end
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    assert process.wait() == 0
    return output.decode()


@pytest.mark.parametrize(
    ("change", "class_"),
    [
        (lambda path: path.unlink(), ModelNotFoundError),
        (lambda path: path.write_bytes(b""), NotGGUFError),
        (lambda path: os.truncate(path, path.stat().st_size - 100), TruncatedFileError),
        (lambda path: native_v4().change("blk.1.attn_q_b.weight", kind="prism").write(path), Type42Error),
        (lambda path: native_v4().remove("output.weight").write(path), MissingTensorError),
    ],
)
def test_bad_files_are_named_errors(path: Path, change: Any, class_: type[Exception]) -> None:
    native_v4().write(path)
    change(path)
    result = CliRunner().invoke(inspect, [str(path)])
    assert type(result.exception) is class_
    assert result.stdout == ""


def test_forms_that_do_not_run_are_described(path: Path) -> None:
    """Known by name, with the reason; a damaged file of a form that runs still ends in an error."""
    model = native_v4()
    for part in ("gate", "up", "down"):
        for il in range(6):
            model.remove(f"blk.{il}.ffn_{part}_exps.weight")
    info = json_of(model.write(path))
    assert (info["form"]["name"], info["form"]["is_runnable"], info["hparams"]) == (
        "native-dense",
        False,
        None,
    )
    assert info["engines"][0]["opens"] is False
    assert "blk.0.ffn_down_exps.weight" in info["engines"][0]["why"][0]
    text = run(path)
    assert "this package does not run it" in text
    assert "does not open it" in text
    v4_1 = Gguf([("general.architecture", "str", "deepseek41")]).write(path)
    assert "v4.1: DeepSeek-V4.1" in run(v4_1)


def test_histograms(tmp_path: Path) -> None:
    """As text, as JSON and as a picture of a plausible size; wrong names and uses are refused."""
    pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")
    matplotlib = pytest.importorskip("matplotlib")
    del matplotlib
    from pyllama_dsv4 import synth
    from pyllama_dsv4.convert import convert

    folder = synth.write_checkpoint(tmp_path / "c", seed=2)
    model = convert(folder, tmp_path / "x.gguf").path
    text = run(model, "--histogram", "blk.0.attn_kv.weight")
    assert text.startswith("blk.0.attn_kv_latent.weight: F8_E4M3_B128, 256 x 128\n")
    assert "256 scales" in text
    picture = tmp_path / "x.png"
    counts = json.loads(run(model, "--histogram", "blk.0.attn_kv.weight", "--plot", picture, "--json"))
    assert sum(counts["scales"].values()) == 256
    assert sum(counts["codes"].values()) == 32768
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (1200, 816)
    for args, code in (
        (["--histogram", "nothing"], 2),
        (["--plot", tmp_path / "y.png"], 2),
        (["--histogram", "output.weight", "--plot", tmp_path / "y.jpg"], 2),
        (["--histogram", "blk.0.ffn_gate_tid2eid"], 3),
    ):
        command = [sys.executable, "-m", "pyllama_dsv4", "inspect", str(model), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("y.*"))


def test_the_installed_command(path: Path) -> None:
    """Exit codes and streams: tables on stdout and 0, or one message on stderr and 3."""
    command = [sys.executable, "-m", "pyllama_dsv4", "inspect"]
    missing = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert (missing.returncode, missing.stdout) == (3, "")
    assert str(path) in missing.stderr
    assert "Traceback" not in missing.stderr
    native_v4().write(path)
    good = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert "native" in good.stdout


def test_the_published_files_size_takes_no_time(path: Path) -> None:
    flash_file(path)
    start = time.process_time()
    info = json_of(path)
    assert time.process_time() - start < 2
    assert info["n_file_bytes"] == FLASH_FILE_BYTES
    assert {type_["name"]: type_["n_tensors"] for type_ in info["types"]} == {
        "MXFP4": 129,
        "F8_E4M3_B128": 365,
        "BF16": 147,
        "F32": 684,
        "I32": 3,
    }
    assert info["keys"]["n_present"] == 50
    assert info["n_params"] == 284_334_567_511


def test_it_imports_little() -> None:
    code = (
        "import sys, pyllama_dsv4.cli.inspect\n"
        "loaded = {name.removeprefix('pyllama_dsv4.') for name in sys.modules}\n"
        "assert not loaded & {'gguf', 'numpy', 'rich', 'cffi', '_llama', '_codec', 'llama'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
