"""The installed command ``pyllama-dsv4 convert``: output streams, exit codes, progress, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cli_process import TIMEOUT_S, command

from pyllama_dsv4 import synth
from pyllama_dsv4.convert import convert
from pyllama_dsv4.errors import CancelledError
from pyllama_dsv4.gguf_file import parse_gguf
from pyllama_dsv4.header import check_header

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V4", seed=3)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("convert", *args), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_converts(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    done = run(tiny, "--outfile", path)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}" in done.stdout
    assert f"{path.stat().st_size:,} bytes" in done.stdout
    assert "F8_E4M3_B128" in done.stdout
    # progress and notes stay out of the report
    assert "note: the checkpoint has no tokenizer.json" in done.stderr
    assert re.search(r"100\.0 %  0\.01 of 0\.01 GB  .* GB/s  0:00 left  output_norm\.weight", done.stderr)
    assert "\x1b" not in done.stdout + done.stderr
    assert parse_gguf(path).kv["general.name"].value == "Tiny V4"


def test_the_model_cards_command_line(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    options = ("--outtype", "moe-f8-e4m3-mxfp4", "--torch-threads", 2)
    assert run(tiny, "--outfile", path, *options).returncode == 0
    assert path.exists()


def test_name_and_template(tiny: Path, tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "spoken", seed=1, tokenizer="bytes", is_sparse=True)
    template = tmp_path / "t.jinja"
    template.write_text("{{ bos_token }}\uff5c", encoding="utf-8")
    path = tmp_path / "x.gguf"
    done = run(folder, "--outfile", path, "--model-name", "Mine", "--chat-template-file", template)
    assert done.returncode == 0, done.stderr
    keys = parse_gguf(path).kv
    assert keys["general.name"].value == "Mine"
    assert keys["tokenizer.chat_template"].value == "{{ bos_token }}\uff5c"


def test_dry_run(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    done = run(tiny, "--outfile", path, "--dry-run", "-v")
    assert done.returncode == 0, done.stderr
    assert not os.listdir(tmp_path)
    assert f"would write {path}" in done.stdout
    assert "free space" in done.stdout
    rows = re.findall(r"^ *([\d,]+) +([\d,]+)  (\w+) +([\dx ]+?) +(\S+)$", done.stdout, re.MULTILINE)
    assert run(tiny, "--outfile", path, "-q").returncode == 0
    file = parse_gguf(path)
    assert [row[4] for row in rows] == [t.name for t in file.tensors]
    assert [int(row[0].replace(",", "")) for row in rows] == [t.offset for t in file.tensors]
    size = re.search(r"size +([\d,]+) bytes", done.stdout)
    assert size is not None
    assert int(size[1].replace(",", "")) == path.stat().st_size


def test_dry_run_says_that_the_disk_is_too_small(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "x", synth.tiny_config(), seed=0, is_sparse=True)
    config = json.loads((folder / "config.json").read_text())
    # a terabyte of embedding and one of head
    config |= {"vocab_size": 2**31 - 1, "num_hash_layers": 0, "num_hidden_layers": 1, "compress_ratios": [0]}
    synth.write_checkpoint(folder, config, seed=0, is_sparse=True)
    done = run(folder, "--outfile", tmp_path / "x.gguf", "--dry-run")
    assert done.returncode == 1
    assert "would write" in done.stdout
    assert "there is not enough space" in done.stderr
    assert os.listdir(tmp_path) == ["x"]


def test_quiet(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, "--outfile", tmp_path / "x.gguf", "-q")
    assert (done.returncode, done.stdout) == (0, "")
    assert "%" not in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "--outfile"),
        (("--outfile", "{}/x.gguf", "--outtype", "q8_0"), 2, "moe-f8-e4m3-mxfp4"),
        (("--outfile", "{}/x.gguf", "--threads", "0"), 2, "threads"),
        (("--outfile", "{}/x.gguf", "--thread", "1"), 2, "Did you mean --threads"),
        (("--outfile", "{}"), 2, "a folder"),
        (("--outfile", "{}/no/x.gguf"), 3, "folder of the output file"),
    ],
)
def test_usage_errors(tiny: Path, tmp_path: Path, args: tuple[str, ...], code: int, message: str) -> None:
    done = run(tiny, *(arg.format(tmp_path) for arg in args))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_missing_shard(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "x", seed=0, n_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    done = run(folder, "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 3
    assert "model-00002-of-00003.safetensors" in done.stderr
    assert "1 of 3 shards missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_such_checkpoint(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 3
    assert str(tmp_path / "nowhere") in done.stderr


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("n_mib", [0, 300])
def test_signals_leave_what_can_be_resumed(
    tmp_path: Path, sig: signal.Signals, code: int, n_mib: int
) -> None:
    """Little is not worth keeping; of more, the command says how to go on."""
    folder = synth.write_checkpoint(
        tmp_path / "x",
        synth.flash_config(num_hidden_layers=2, num_hash_layers=2, vocab_size=1024),
        seed=0,
        is_sparse=True,
    )
    out = tmp_path / "out"
    out.mkdir()
    partial = out / "x.gguf.partial"
    process = subprocess.Popen(
        command("convert", folder, "--outfile", out / "x.gguf"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = out / "x.gguf.partial.journal"
    wait_until(
        lambda: (
            process.poll() is not None
            or (partial.exists() and not n_mib)
            or (journal.exists() and b"n_done" in journal.read_bytes())
        )
    )
    process.send_signal(sig)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    if b"n_done" in (journal.read_bytes() if journal.exists() else b""):
        assert sorted(os.listdir(out)) == [partial.name, journal.name]
        assert "--resume to go on" in stderr
        with open(partial, "rb") as f:
            assert f.read(4) == bytes(4)
    else:
        assert not n_mib
        assert os.listdir(out) == []


def test_resumes(tiny: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    assert run(tiny, "--outfile", whole, "-q").returncode == 0
    path = tmp_path / "x.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyllama_dsv4.convert.output.SYNC_BYTES", 100_000)
        with pytest.raises(CancelledError):
            convert(tiny, path, progress=lambda done, *_: done < 5_000_000)
    done = run(tiny, "--outfile", path, "--resume", "--model-name", "Other")
    assert done.returncode == 2
    assert "other options than the conversion began with (key 'model-name')" in done.stderr
    done = run(tiny, "--outfile", path, "--resume")
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed after +4,\d{3},\d{3} bytes", done.stdout)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["whole.gguf", "x.gguf"]


def test_split(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, "--outfile", tmp_path / "x.gguf", "--split-max-size", "3M", "-v")
    assert done.returncode == 0, done.stderr
    names = [f"x-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]
    assert sorted(os.listdir(tmp_path)) == names
    assert f"wrote {tmp_path / names[0]} and 3 more files" in done.stdout
    for name in names:
        assert f"{name}, {(tmp_path / name).stat().st_size:,} bytes:" in done.stdout
    assert len(check_header(tmp_path / names[0]).header.shards) == 4


@pytest.mark.parametrize("size", ["0", "-5", "3.5G", "2T", "G", "3 M", "9" * 16])
def test_sizes_that_are_none(tiny: Path, tmp_path: Path, size: str) -> None:
    done = run(tiny, "--outfile", tmp_path / "x.gguf", f"--split-max-size={size}")
    assert done.returncode == 2
    assert "is not a size such as 50G" in done.stderr


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_progress_bar_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    main_fd, terminal = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        command("convert", tiny, "--outfile", tmp_path / "x.gguf"),
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=env,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main_fd, 65536)
        except OSError:  # the other side was closed
            break
        if not piece:
            break
        shown += piece
    os.close(main_fd)
    assert process.wait(timeout=60) == 0
    assert "\u2501".encode() in shown
    assert b"9.9/9.9 MB" in shown


def test_recipe_and_restore(tiny: Path, tmp_path: Path) -> None:
    path, recipe, out = tmp_path / "x.gguf", tmp_path / "x.recipe", tmp_path / "again"
    done = run(tiny, "--outfile", path, "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert f"wrote {recipe}\n  recipe          {recipe.stat().st_size:,} bytes, 1 shards" in done.stdout
    done = restore(path, "--recipe", recipe, out)
    assert done.returncode == 0, done.stderr
    assert f"rebuilt 1 of 1 shards in {out}" in done.stdout
    assert "100.0 %" in done.stderr
    assert (out / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_restore_names_what_it_cannot_rebuild(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "x", seed=1, n_shards=4, draft="mtp")
    path, recipe = tmp_path / "x.gguf", tmp_path / "x.recipe"
    done = run(folder, "--outfile", path, "--recipe", recipe, "-q")
    assert (done.returncode, done.stdout) == (0, "")
    done = restore(path, "--recipe", recipe, tmp_path / "out", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    assert "not rebuilt: model-00004-of-00004.safetensors: 87 of its 147 tensors are in no" in done.stderr
    assert run(folder, "--outfile", tmp_path / "d.gguf", "--draft", "-q").returncode == 0
    done = restore(path, "--recipe", recipe, tmp_path / "out", "--draft", tmp_path / "d.gguf")
    assert done.returncode == 0, done.stderr
    assert "rebuilt 4 of 4 shards" in done.stdout


def test_a_recipe_is_not_made_again_when_resuming(tiny: Path, tmp_path: Path) -> None:
    args = (tiny, "--outfile", tmp_path / "x.gguf", "--recipe", tmp_path / "r")
    assert "recipe  " in run(*args).stdout
    assert "recipe  " not in run(*args, "--resume").stdout
    assert "recipe  " in run(*args).stdout


def test_restore_refuses(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert run(tiny, "--outfile", path, "-q").returncode == 0
    done = restore(path, tmp_path / "out")
    assert (done.returncode, "--recipe" in done.stderr) == (2, True)
    done = restore(path, "--recipe", path, tmp_path / "out")
    assert done.returncode == 3
    assert "malformed recipe" in done.stderr
    assert not (tmp_path / "out").exists()


def restore(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("restore", *args), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_one_tensor(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, "--tensor", "layers.3.ffn.experts.2.w1.scale")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blk.3.ffn_gate_exps.weight\n")
    assert "16 tensors, identical when converted back" in done.stdout
    path = tmp_path / "x.gguf"
    assert run(tiny, "--outfile", path, "-q").returncode == 0
    done = run(tiny, "--tensor", "output_norm.weight", "--outfile", path)
    assert done.returncode == 0
    assert re.search(r"^  file +identical$", done.stdout, re.MULTILINE)
    with open(path, "r+b") as f:
        f.seek(-4, os.SEEK_END)
        f.write(b"\xff")
    done = run(tiny, "--tensor", "output_norm.weight", "--outfile", path)
    assert done.returncode == 1
    assert "file            byte 1,020 of output_norm.weight: 0xff, expected 0x00" in done.stdout


def test_draft(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "Tiny-V4", seed=1, draft="dspark")
    path = tmp_path / "d.gguf"
    done = run(folder, "--outfile", path, "--draft", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--spec-type draft-dspark" in done.stderr
    done = run(folder, "--outfile", path, "--draft")
    assert done.returncode == 0, done.stderr
    assert parse_gguf(path).kv["general.architecture"].value == "dflash"
    done = run(folder, "--outfile", tmp_path / "x.gguf")
    assert "note: left out 241 DSpark tensors (mtp.*" in done.stderr
    assert "--draft" in done.stderr
