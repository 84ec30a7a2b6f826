"""Interrupted conversions: whatever ends one, going on gives the same file, and nothing incomplete has its name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyllama_dsv4 import synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert import ConvertResult, convert, output, repack, writer
from pyllama_dsv4.convert.journal import Journal
from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    CheckpointError,
    ConvertError,
    PyllamaError,
)
from pyllama_dsv4.header import check_header

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")

SPLIT_BYTES = 3_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V4", seed=3, n_shards=3)


@pytest.fixture(scope="module")
def digests(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, dict[str, str]]:
    """SHA-256 of the files of conversions that nothing interrupted, unsplit and split."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        split: sums(convert(tiny, folder / f"{split}" / "x.gguf", max_file_bytes=split).paths)
        for split in (None, SPLIT_BYTES)
        if not (folder / f"{split}").mkdir()
    }


def sums(paths: Any) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def interrupted(checkpoint: Path, path: Path, n_bytes: int = 5_000_000, **options: Any) -> None:
    """Cancel a conversion after so many bytes, with small steps between claims."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "SYNC_BYTES", 100_000)
        with pytest.raises(CancelledError):
            convert(checkpoint, path, progress=lambda done, *_: done < n_bytes, **options)


# --- kill -9 ---------------------------------------------------------------------------------------------

# Ends itself by SIGKILL at the n-th system call that changes files: before it, half way through a write, or after
# it. What another process finds on the disk changes at those calls only, so that these are all the moments.
KILLED = """
    import os, signal, sys
    from pyllama_dsv4.convert import convert, output, repack

    folder, path, at, where, split, resume = sys.argv[1:]
    at, n = int(at), 0
    output.SYNC_BYTES = 200_000
    repack.PIECE_BYTES = 60_000

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def hooked(name):
        whole = getattr(os, name)

        def call(*args, **options):
            global n
            n += 1
            if n == at and where == "before":
                die()
            if n == at and where == "within" and name == "write":
                whole(args[0], args[1][: len(args[1]) // 2])
                die()
            result = whole(*args, **options)
            if n == at:
                die()
            return result

        return call

    for name in ("write", "ftruncate", "fsync", "fdatasync", "replace", "unlink", "open"):
        if hasattr(os, name):
            setattr(os, name, hooked(name))
    convert(folder, path, n_threads=1, resume=resume == "resume", max_file_bytes=int(split) or None)
    print(n)
"""


def run_killed(tiny: Path, path: Path, at: int, where: str, split: int | None, resume: bool) -> int | None:
    """Convert in a process that kills itself; return None, or the number of calls if it came to the end."""
    args = [tiny, path, at, where, split or 0, "resume" if resume else "anew"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, args)], capture_output=True, text=True
    )
    if done.returncode == 0:
        return int(done.stdout)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return None


def assert_nothing_looks_complete(folder: Path, whole: dict[str, str]) -> None:
    """Under a final name there is the final content; of a split model the first file comes last."""
    for path in folder.iterdir():
        if path.suffix == ".gguf":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == whole[path.name]
    first = next(iter(whole))
    if (folder / first).exists():
        assert {path.name for path in folder.glob("*.gguf")} == set(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("split", "n_kills"), [(None, 20), (SPLIT_BYTES, 10)], ids=["one file", "split"])
def test_killed_at_random_moments(
    tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]], split: int | None, n_kills: int
) -> None:
    n_calls = run_killed(tiny, tmp_path / "x.gguf", -1, "never", split, resume=False)
    assert n_calls is not None
    assert n_calls > 200
    assert sums(tmp_path.iterdir()) == digests[split]
    rng = random.Random(20)
    n_killed = n_resumed = 0
    while n_killed < n_kills:
        # half of them anywhere, half of them in the last steps, where files get their headers and names
        last = n_calls - rng.randrange(8 * len(digests[split]))
        at = last if n_killed % 2 else rng.randint(1, n_calls)
        path = tmp_path / f"{n_killed}" / "x.gguf"
        path.parent.mkdir()
        where = rng.choice(("before", "within", "after"))
        # the number of calls varies by a few: flushes wait for each other
        if run_killed(tiny, path, at, where, split, resume=False) is None:
            n_killed += 1
            assert_nothing_looks_complete(path.parent, digests[split])
            if n_killed % 4 == 0:  # killed again while going on
                run_killed(tiny, path, rng.randint(1, max(n_calls - at, 1)), where, split, resume=True)
                assert_nothing_looks_complete(path.parent, digests[split])
            result = convert(tiny, path, resume=True, max_file_bytes=split)
            n_resumed += result.n_bytes_resumed > 0
            assert sums(path.parent.iterdir()) == digests[split]  # and nothing else lies there
        shutil.rmtree(path.parent)
    assert n_resumed > n_kills // 2


# --- other ends ------------------------------------------------------------------------------------------


def test_cancelled_and_resumed(tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]]) -> None:
    path = tmp_path / "x.gguf"
    interrupted(tiny, path)
    assert sorted(os.listdir(tmp_path)) == ["x.gguf.partial", "x.gguf.partial.journal"]
    done: list[int] = []
    result = convert(tiny, path, resume=True, progress=lambda n, *_: done.append(n))
    # everything up to the last complete tensor is used, and counts in the progress
    assert 4_000_000 < result.n_bytes_resumed < 5_100_000
    assert result.n_bytes_resumed < done[0] < result.n_bytes_resumed + 500_000
    assert done[-1] == result.n_bytes_payload
    assert sums(tmp_path.iterdir()) == digests[None]


def test_resumed_bytes_are_not_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    interrupted(tiny, path)
    made: list[str] = []
    jobs = repack.tensor_jobs
    monkeypatch.setattr(repack, "tensor_jobs", lambda c, s, pool: made.append(s.native) or jobs(c, s, pool))
    result = convert(tiny, path, resume=True)
    names = [info.name for info in result.plan.infos]
    assert 10 < len(made) < len(names) - 10
    assert made == names[-len(made) :]


def test_without_resume_a_conversion_starts_over(
    tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]]
) -> None:
    path = tmp_path / "x.gguf"
    interrupted(tiny, path)
    assert convert(tiny, path).n_bytes_resumed == 0
    assert sums(tmp_path.iterdir()) == digests[None]


def test_resume_with_nothing_to_resume(
    tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]]
) -> None:
    assert convert(tiny, tmp_path / "x.gguf", resume=True).n_bytes_resumed == 0
    assert sums(tmp_path.iterdir()) == digests[None]


def test_a_fault_of_the_checkpoint_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on would meet it again."""
    folder = tmp_path / "c"
    shutil.copytree(tiny, folder)
    name = "layers.5.ffn.experts.7.w3.scale"
    with Checkpoint(folder) as checkpoint:
        scale = checkpoint.tensors[name]
    rewrite(scale.path, scale.offset, b"\xff")
    monkeypatch.setattr(output, "SYNC_BYTES", 100_000)
    left: list[str] = []
    with pytest.raises(CheckpointError, match="is NaN") as caught:
        convert(folder, tmp_path / "x.gguf", progress=lambda *_: left.append(",".join(os.listdir(tmp_path))))
    assert caught.value.tensor == name
    assert "x.gguf.partial.journal" in left[-1]
    assert os.listdir(tmp_path) == ["c"]


def test_claims_follow_the_flushes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail at any moment: what the journal says must be on the disk already."""
    monkeypatch.setattr(output, "SYNC_BYTES", 100_000)
    plan = convert(tiny, tmp_path / "x.gguf", dry_run=True).plan
    ends = [plan.n_bytes_header + info.offset + info.n_bytes for info in plan.infos]
    flushed, claims = [0], []
    flush, claim = writer.OutputFile.sync, Journal.claim

    def sync(file: writer.OutputFile) -> None:
        position = file.position  # of this moment: more may be written while it works
        flush(file)
        flushed.append(position)

    def note(journal: Journal, n_done: int) -> None:
        claims.append((ends[n_done - 1], flushed[-1]))
        claim(journal, n_done)

    monkeypatch.setattr(writer.OutputFile, "sync", sync)
    monkeypatch.setattr(Journal, "claim", note)
    convert(tiny, tmp_path / "x.gguf")
    assert len(claims) > 1
    assert all(end <= position for end, position in claims)
    assert claims[-1][0] == ends[-1]


def test_a_checkpoint_that_changes_meanwhile(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(tiny, folder)
    shard = folder / "model-00001-of-00003.safetensors"
    with pytest.raises(CheckpointError, match="changed while it was converted") as caught:
        convert(folder, tmp_path / "x.gguf", progress=lambda *_: os.utime(shard, (1, 1)))
    assert caught.value.path == str(shard)
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("resume", [False, True])
def test_two_conversions_at_once(
    tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]], resume: bool
) -> None:
    """The second is refused, whichever files the first has open just then, and disturbs nothing."""

    def second(done: int, *_: object) -> None:
        if done in tries:
            return
        tries.add(done)
        if len(tries) % 20 == 1:
            with pytest.raises(ConvertError, match="another process is writing"):
                convert(tiny, tmp_path / "x.gguf", resume=resume, max_file_bytes=SPLIT_BYTES)

    tries: set[int] = set()
    convert(tiny, tmp_path / "x.gguf", progress=second, max_file_bytes=SPLIT_BYTES)
    assert len(tries) > 100
    assert sums(tmp_path.iterdir()) == digests[SPLIT_BYTES]


# --- what may not change between the steps ---------------------------------------------------------------


def rewrite(path: Path, at: int, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


def add_shard(folder: Path) -> None:
    """Move the last tensor to a shard of its own: the same tensors, other files."""
    with Checkpoint(folder) as c:
        last = folder / "model-00003-of-00003.safetensors"
        tensors = {n: (t.dtype, c.read(n)) for n, t in c.tensors.items() if t.path == last}
    name = list(tensors)[-1]
    synth.write_safetensors(folder / "model-x.safetensors", {name: tensors.pop(name)})
    stat = last.stat()
    synth.write_safetensors(last, tensors)
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SHARD = "model-00002-of-00003.safetensors"
CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], type[PyllamaError], str, str]] = {
    # change of the folder, options, error, its path or key, part of the message
    "data": (lambda f: rewrite(f / SHARD, -9, b"\0"), {}, CheckpointError, SHARD, "written later"),
    "header": (
        lambda f: rewrite(f / SHARD, (f / SHARD).read_bytes().index(b'"pt"'), b'"np"'),
        {},
        CheckpointError,
        SHARD,
        "another header",
    ),
    "shards": (add_shard, {}, CheckpointError, "model-00003-of-00003.safetensors", "before"),
    "README": (
        lambda f: (f / "README.md").write_text("---\nlicense: x\n---"),
        {},
        CheckpointError,
        "README.md",
        "another content",
    ),
    "generation_config": (
        lambda f: (f / "generation_config.json").unlink(),
        {},
        CheckpointError,
        "generation_config.json",
        "another content",
    ),
    "name": (lambda _: None, {"name": "Other"}, ArgumentError, "model-name", "found Other"),
    "split": (
        lambda _: None,
        {"max_file_bytes": SPLIT_BYTES},
        ArgumentError,
        "split-max-size",
        "expected None|same options",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_between_the_steps(tiny: Path, tmp_path: Path, case: str) -> None:
    change, options, error, place, message = CHANGES[case]
    folder = tmp_path / "Tiny-V4"
    shutil.copytree(tiny, folder)
    path = tmp_path / "x.gguf"
    interrupted(folder, path)
    before = sums(tmp_path.glob("x.*"))
    change(folder)
    with pytest.raises(error, match=message) as caught:
        convert(folder, path, resume=True, **options)
    assert (caught.value.key or Path(str(caught.value.path)).name) == place
    assert sums(tmp_path.glob("x.*")) == before  # nothing is lost by trying
    convert(folder, path, **options)
    assert not list(tmp_path.glob("*.partial*"))


def test_files_of_an_earlier_split_are_removed(tiny: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "x.gguf", n_bytes=8_000_000, max_file_bytes=SPLIT_BYTES)
    assert len(list(tmp_path.glob("x-*.partial"))) > 1
    (tmp_path / "other.gguf.partial").write_bytes(b"mine")
    convert(tiny, tmp_path / "x.gguf")
    assert sorted(os.listdir(tmp_path)) == ["other.gguf.partial", "x.gguf"]


def test_another_version(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tiny, tmp_path / "x.gguf")
    monkeypatch.setattr("pyllama_dsv4.__version__", "99.0", raising=False)
    with pytest.raises(ConvertError, match=r"that another version began; found version .*, expected 99\.0"):
        convert(tiny, tmp_path / "x.gguf", resume=True)


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_partial_file_that_is_not_what_was_left(tiny: Path, tmp_path: Path, change: str) -> None:
    interrupted(tiny, tmp_path / "x.gguf")
    partial = tmp_path / "x.gguf.partial"
    if change == "gone":
        partial.unlink()
    else:
        os.truncate(partial, 1_000_000)
    with pytest.raises(ConvertError, match=r"x\.gguf\.partial: the partial file is not what"):
        convert(tiny, tmp_path / "x.gguf", resume=True)
    assert "x.gguf" not in os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("raw", "is_refused"),
    [(b"", False), (b'{"format": 1, "ver', False), (b'{"format": 2}\n', True), (b"\0\0\0\n", True)],
)
def test_journal_that_says_nothing_or_nonsense(
    tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]], raw: bytes, is_refused: bool
) -> None:
    (tmp_path / "x.gguf.partial.journal").write_bytes(raw)
    (tmp_path / "x.gguf.partial").write_bytes(b"left by something else")
    if is_refused:
        with pytest.raises(ConvertError, match="to start over"):
            convert(tiny, tmp_path / "x.gguf", resume=True)
    convert(tiny, tmp_path / "x.gguf", resume=not is_refused)
    assert sums(tmp_path.iterdir()) == digests[None]


def test_a_claim_cut_short_does_not_count(
    tiny: Path, tmp_path: Path, digests: dict[int | None, dict[str, str]]
) -> None:
    interrupted(tiny, tmp_path / "x.gguf")
    journal = tmp_path / "x.gguf.partial.journal"
    journal.write_bytes(journal.read_bytes() + b'{"n_done": 1')
    convert(tiny, tmp_path / "x.gguf", resume=True)
    assert sums(tmp_path.iterdir()) == digests[None]


# --- split output ----------------------------------------------------------------------------------------


def split_result(tiny: Path, folder: Path, n_bytes: int) -> ConvertResult:
    folder.mkdir()
    return convert(tiny, folder / "x.gguf", max_file_bytes=n_bytes)


def test_split_files(tiny: Path, tmp_path: Path) -> None:
    result = split_result(tiny, tmp_path / "s", SPLIT_BYTES)
    n = len(result.paths)
    assert n > 3
    assert [p.name for p in result.paths] == [f"x-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]
    assert sorted(os.listdir(tmp_path / "s")) == [p.name for p in result.paths]
    assert all(p.stat().st_size <= SPLIT_BYTES for p in result.paths)
    # as full as they may be
    for path, follower in zip(result.plan.files[:-1], result.plan.files[1:], strict=True):
        assert path.n_bytes + follower.infos[0].n_bytes > SPLIT_BYTES - 1000
    assert sum(p.stat().st_size for p in result.paths) == result.n_bytes
    header = check_header(result.path).header
    whole = check_header(convert(tiny, tmp_path / "whole.gguf").path).header
    assert [t.name for t in header.tensors] == [t.name for t in whole.tensors]
    kv = {key: entry.value for key, entry in header.kv.items()}
    assert list(kv)[:-3] == list(whole.kv)
    assert list(kv.items())[-3:] == [
        ("split.no", 0),
        ("split.count", n),
        ("split.tensors.count", len(header.tensors)),
    ]
    assert [header.kv[k].type_name for k in list(kv)[-3:]] == ["u16", "u16", "i32"]
    for i, shard in enumerate(header.shards[1:], 1):
        assert {k: e.value for k, e in shard.kv.items()} == {
            "split.no": i,
            "split.count": n,
            "split.tensors.count": len(header.tensors),
        }
    for a, b in zip(header.tensors, whole.tensors, strict=True):
        with open(header.shards[a.shard].path, "rb") as f, open(whole.path, "rb") as g:
            f.seek(a.start), g.seek(b.start)
            assert f.read(a.n_bytes) == g.read(b.n_bytes)


def test_a_tensor_larger_than_the_limit_gets_a_file_to_itself(tiny: Path, tmp_path: Path) -> None:
    result = split_result(tiny, tmp_path / "s", 150_000)
    alone = [f for f in result.plan.files if f.n_bytes > 150_000]
    assert alone
    assert all(len(f.infos) == 1 for f in alone)
    assert check_header(result.path).dialect == "native"


def test_a_limit_that_nothing_exceeds(tiny: Path, tmp_path: Path) -> None:
    result = split_result(tiny, tmp_path / "s", 10**12)
    assert [p.name for p in result.paths] == ["x.gguf"]
    assert "split.count" not in check_header(result.path).header.kv


@pytest.mark.parametrize("n_bytes", [0, -1])
def test_impossible_limit(tiny: Path, tmp_path: Path, n_bytes: int) -> None:
    with pytest.raises(ArgumentError) as caught:
        convert(tiny, tmp_path / "x.gguf", max_file_bytes=n_bytes)
    assert caught.value.key == "max_file_bytes"
