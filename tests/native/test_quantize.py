"""The quantiser: what it writes, in which dialect, and how it ends when it cannot."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf_writer import FLASH, native_v4, string

from pyllama_dsv4 import Llama, _codec, errors
from pyllama_dsv4.convert import convert
from pyllama_dsv4.gguf_file import parse_gguf
from pyllama_dsv4.header import Header, check_header
from pyllama_dsv4.quantize import load_imatrix, quantize, quantize_types

DATA = Path(__file__).parents[1] / "data"
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 320, 48)]
PROMPT = IDS[:24]
IMATRIX_TYPES = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S"}

Array = npt.NDArray[np.float32]


def logits(path: Path) -> Array:
    with Llama(path, n_ctx=256, n_threads=1, warmup=False) as llm:
        return llm.eval(PROMPT, logits="all")


def distance(a: Array, b: Array) -> float:
    """Root mean square of a position's difference, relative to that of the first; the median of all positions."""
    return float(np.median(np.sqrt(np.mean((a - b) ** 2, axis=1) / np.mean(a**2, axis=1))))


def raw(header: Header, name: str) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor, rows of the first dimension."""
    tensor = header.tensor(name)
    assert tensor is not None, name
    with open(header.shards[tensor.shard].path, "rb") as file:
        file.seek(tensor.start)
        data = np.frombuffer(file.read(tensor.n_bytes), np.uint8)
    return data.reshape(-1, tensor.type.n_bytes(tensor.dims[0]))


@pytest.fixture(scope="module")
def llama_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The F32 model of another architecture that the stock Q2_0 fixture was made from."""
    path = tmp_path_factory.mktemp("llama") / "f32.gguf"
    runpy.run_path(str(DATA / "make_stock_q2_0.py"))["main"](str(path))
    return path


# --- what is written ------------------------------------------------------------------------------

# The weights are random, so expert choices flip and errors are larger than in a trained model; the bounds are about
# twice what was measured, and far below the 1.4 of unrelated logits.
BOUNDS = {"F32": 0.04, "F16": 0.04, "Q8_0": 0.1, "Q4_K_M": 0.8, "MXFP4_MOE": 0.1, "moe-f8-e4m3-mxfp4": 0.04}


@pytest.mark.parametrize("type_name", BOUNDS)
@pytest.mark.parametrize("dialect", ["native", "upstream"])
def test_it_opens_in_its_dialect_with_logits_near_the_source(
    tiny_model: Path, tiny_upstream: Path, tmp_path: Path, type_name: str, dialect: str
) -> None:
    source = tiny_model if dialect == "native" else tiny_upstream
    out = tmp_path / "out.gguf"
    result = quantize(source, out, type_name, n_threads=2)
    assert (result.input_dialect, result.dialect) == (dialect, dialect)
    assert out.stat().st_size == result.n_bytes
    header = check_header(out).header
    assert header.dialect == dialect
    assert sorted(t.name for t in header.tensors) == sorted(
        t.name for t in check_header(source).header.tensors
    )
    assert {t.name: t.type.name for t in header.tensors} == {t.name: t.type_out for t in result.tensors}
    error = distance(logits(source), logits(out))
    print(type_name, error)
    assert error < BOUNDS[type_name]


def test_f32_to_the_native_mix_equals_the_codecs(
    tiny_model: Path, tiny_upstream: Path, tmp_path: Path
) -> None:
    """Types as in the converted native file, and the codec's bytes for the same values."""
    out = tmp_path / "out.gguf"
    quantize(tiny_upstream, out, "moe-f8-e4m3-mxfp4", n_threads=2)
    source, made, native = (check_header(path).header for path in (tiny_upstream, out, tiny_model))
    encoders: dict[str, Callable[[Array], npt.NDArray[Any]]] = {
        "F8_E4M3_B128": _codec.f8_e4m3_b128_encode,
        "MXFP4": _codec.mxfp4_encode,
        "BF16": lambda x: (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(
            np.uint16
        ),  # exact in the source
    }
    n_encoded = 0
    for tensor in made.tensors:
        wanted = native.tensor(tensor.name)
        assert wanted is not None
        if wanted.type.name != "BF16" or len(tensor.dims) > 1:
            assert tensor.type == wanted.type, tensor.name
        before, after = raw(source, tensor.name), raw(made, tensor.name)
        encode = encoders.get(tensor.type.name)
        if encode is not None:
            before = encode(np.ascontiguousarray(before).view(np.float32)).view(np.uint8)
            n_encoded += 1
        np.testing.assert_array_equal(after, before, err_msg=tensor.name)
    assert n_encoded == 84
    assert made.metadata["general.file_type"] == 41


def test_a_native_file_in_its_own_type_stays_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize(tiny_model, out, "F8_E4M3_MXFP4")
    before, after = check_header(tiny_model).header, check_header(out).header
    for tensor in before.tensors:
        np.testing.assert_array_equal(raw(after, tensor.name), raw(before, tensor.name), err_msg=tensor.name)
    assert plain(after) == plain(before) | {"general.quantization_version": 2}


def plain(header: Header) -> dict[str, Any]:
    """The metadata with its arrays read."""
    return {k: list(v) if hasattr(v, "item_type") else v for k, v in header.metadata.items()}


def test_the_published_keys_of_a_native_file_are_kept(tmp_path: Path) -> None:
    """Keys that the loader derives, and V4's own chat template, do not appear in a file that lacked them."""
    source = native_v4(n_tokens=None).set("tokenizer.chat_template", "str", "a short template")
    source.write(tmp_path / "in.gguf")
    kept = quantize(tmp_path / "in.gguf", tmp_path / "native.gguf", "Q8_0")
    moved = quantize(tmp_path / "in.gguf", tmp_path / "upstream.gguf", "Q8_0", dialect="upstream")
    assert (kept.dialect, moved.dialect) == ("native", "upstream")
    keys = set(check_header(tmp_path / "in.gguf").header.kv)
    native, upstream = (check_header(tmp_path / f"{d}.gguf") for d in ("native", "upstream"))
    assert set(native.header.kv) - keys <= {"general.quantization_version", "general.file_type"}
    assert native.header.metadata["tokenizer.chat_template"] == "a short template"
    assert native.derived_keys
    assert not upstream.derived_keys
    assert "dsml_token" in upstream.header.metadata["tokenizer.chat_template"]


def test_an_upstream_file_becomes_native(tiny_upstream: Path, tmp_path: Path) -> None:
    result = quantize(tiny_upstream, tmp_path / "out.gguf", "F8_E4M3_MXFP4", dialect="native")
    assert (result.input_dialect, result.dialect) == ("upstream", "native")
    assert check_header(tmp_path / "out.gguf").dialect == "native"
    assert distance(logits(tiny_upstream), logits(tmp_path / "out.gguf")) < 0.02


def test_q2_0_is_what_the_stock_quantiser_writes(llama_f32: Path, tmp_path: Path) -> None:
    """The same bytes: id 42 in the file, although the type is 43 in memory; file type 41."""
    out = tmp_path / "q2_0.gguf"
    result = quantize(llama_f32, out, "Q2_0")
    assert (result.input_dialect, result.dialect) == (None, None)
    assert out.read_bytes() == (DATA / "stock-q2_0.gguf").read_bytes()
    assert [t.type_id for t in parse_gguf(out).tensors].count(42) == 7


def test_the_native_mix_of_another_architecture(llama_f32: Path, tmp_path: Path) -> None:
    """Rows of 128 values become FP8; embedding and head BF16."""
    out = tmp_path / "out.gguf"
    result = quantize(llama_f32, out, "F8_E4M3_MXFP4")
    assert result.n_tensors_by_type == {"F32": 3, "F8_E4M3_B128": 7, "BF16": 2}
    prompt = [i % 96 for i in PROMPT]
    values = []
    for path in (llama_f32, out):
        with Llama(path, n_ctx=64, n_threads=1, warmup=False) as llm:
            values.append(llm.eval(prompt, logits="all"))
    assert distance(*values) < 0.1


def test_a_split_model_is_joined(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "in.gguf", max_file_bytes=4_000_000)
    first = next(tmp_path.glob("in-00001-of-*.gguf"))
    out = tmp_path / "out.gguf"
    result = quantize(first, out, "Q8_0")
    header = check_header(out).header
    assert result.n_bytes_in > first.stat().st_size
    assert len(header.shards) == 1
    assert len(header.tensors) == len(check_header(first).header.tensors)
    assert not any(key.startswith("split.") for key in header.kv)


def test_an_input_of_another_alignment(llama_f32: Path, tmp_path: Path) -> None:
    """The quantiser pads to 32 bytes, whatever the key says; the key must not survive."""
    source = tmp_path / "in.gguf"
    reader = gguf.GGUFReader(llama_f32)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_custom_alignment(256)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_header(source, any_architecture=True).header.alignment == 256
    quantize(source, tmp_path / "out.gguf", "Q8_0")
    quantize(llama_f32, tmp_path / "plain.gguf", "Q8_0")
    header, expected = (
        check_header(tmp_path / f"{n}.gguf", any_architecture=True).header for n in ("out", "plain")
    )
    assert header.alignment == 32
    for tensor in expected.tensors:
        np.testing.assert_array_equal(raw(header, tensor.name), raw(expected, tensor.name))


# --- importance, all types ------------------------------------------------------------------------


def imatrix_of(path: Path) -> dict[str, Array]:
    rng = np.random.default_rng(6)
    header = check_header(path, any_architecture=True).header
    return {
        t.name: rng.random(t.dims[0] * (t.dims[2] if len(t.dims) > 2 else 1), np.float32) + np.float32(0.1)
        for t in header.tensors
        if len(t.dims) > 1
    }


@pytest.mark.slow
def test_every_type(llama_f32: Path, tmp_path: Path) -> None:
    """Rows of 128 and 256 values: the second have all types, the first what the quantiser falls back to."""
    prompt = [i % 96 for i in PROMPT]
    types = quantize_types()
    assert set(types) > IMATRIX_TYPES
    for name in types:
        result = quantize(llama_f32, tmp_path / "out.gguf", name, imatrix=imatrix_of(llama_f32), n_threads=2)
        assert result.type == name
        with Llama(tmp_path / "out.gguf", n_ctx=64, n_threads=1, warmup=False) as llm:
            assert np.isfinite(llm.eval(prompt, logits="all")).all(), name


@pytest.mark.parametrize("zeros", ["all", "half"])
@pytest.mark.parametrize("type_name", ["IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q4_K_M"])
def test_columns_without_importance_stop_nothing(
    llama_f32: Path, tmp_path: Path, zeros: str, type_name: str
) -> None:
    imatrix = imatrix_of(llama_f32)
    for values in imatrix.values():
        values[: values.size if zeros == "all" else values.size // 2] = 0
    quantize(llama_f32, tmp_path / "out.gguf", type_name, imatrix=imatrix)


def test_types_below_three_bits_need_an_importance_matrix(llama_f32: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(errors.ArgumentError) as error:
        quantize(llama_f32, out, "IQ2_XXS")
    assert error.value.key == "imatrix"
    assert quantize(llama_f32, out, "IQ2_XXS", dry_run=True).needs_imatrix
    assert not quantize(llama_f32, out, "IQ3_S", dry_run=True).needs_imatrix
    assert not list(tmp_path.iterdir())


def test_an_importance_matrix_from_a_file(llama_f32: Path, tmp_path: Path) -> None:
    """Sums of squares by expert and how often each was used, as llama-imatrix writes them."""
    given = imatrix_of(llama_f32)
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, values in given.items():
        writer.add_tensor(f"{name}.in_sum2", values[None] * 8)
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 8, np.float32))
    writer.add_tensor("blk.9.ffn_up_exps.weight.in_sum2", np.array([[2, 4], [7, 7]], np.float32))
    writer.add_tensor("blk.9.ffn_up_exps.weight.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_imatrix(path)
    assert loaded["blk.9.ffn_up_exps.weight"].tolist() == [1, 2, 1, 1]
    for name, values in given.items():
        np.testing.assert_array_equal(loaded[name], values)
    quantize(llama_f32, tmp_path / "a.gguf", "IQ2_S", imatrix=path)
    quantize(llama_f32, tmp_path / "b.gguf", "IQ2_S", imatrix=given)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(errors.FormatError, match="no importance matrix"):
        load_imatrix(llama_f32)


def test_importance_goes_by_the_names_of_either_dialect(tiny_model: Path, tmp_path: Path) -> None:
    """Without it for these tensors, the outputs would be those of no importance at all."""
    native = {k: v for k, v in imatrix_of(tiny_model).items() if "attn_kv_latent" in k}
    upstream = {name.replace("attn_kv_latent", "attn_kv"): values for name, values in native.items()}
    data = []
    for i, imatrix in enumerate((None, native, upstream)):
        quantize(tiny_model, tmp_path / f"{i}.gguf", "Q4_K_M", imatrix=imatrix)
        data.append((tmp_path / f"{i}.gguf").read_bytes())
    assert data[0] != data[1] == data[2]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.ones(5, np.float32), "5 values"),
        (np.full(128, np.nan, np.float32), "non-finite"),
        (-np.ones(128), "negative"),
    ],
)
def test_importance_that_does_not_fit(llama_f32: Path, tmp_path: Path, values: Array, found: str) -> None:
    with pytest.raises(errors.ArgumentError, match=found) as error:
        quantize(llama_f32, tmp_path / "out.gguf", "IQ2_S", imatrix={"blk.0.attn_q.weight": values})
    assert (error.value.key, error.value.tensor) == ("imatrix", "blk.0.attn_q.weight")


# --- dry run, progress, interruptions -------------------------------------------------------------


def test_a_dry_run_knows_the_size_and_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    planned = quantize(tiny_model, out, "Q4_K_M", dry_run=True)
    assert planned.is_dry_run
    assert not list(tmp_path.iterdir())
    written = quantize(tiny_model, out, "Q4_K_M")
    assert planned.n_bytes == written.n_bytes == out.stat().st_size
    assert planned.tensors == written.tensors
    assert sum(planned.n_bytes_by_type.values()) < planned.n_bytes


def test_a_file_larger_than_memory_can_be_planned(tmp_path: Path) -> None:
    """Flash in full size without data: 156 GB of FP8 and MXFP4 to 4 bits."""
    native_v4(FLASH, n_tokens=None).write(tmp_path / "flash.gguf")
    result = quantize(tmp_path / "flash.gguf", tmp_path / "out.gguf", "Q4_K_M", dry_run=True)
    assert len(result.tensors) == 1328
    assert 155e9 < result.n_bytes < 180e9  # MXFP4 has 4.25 bits a weight, Q4_K 4.5
    assert quantize(tmp_path / "flash.gguf", tmp_path / "out.gguf", "Q2_K", dry_run=True).n_bytes < 110e9


def test_progress_until_the_end(tiny_upstream: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    seen: list[tuple[int, int, str]] = []
    partial_starts = set()

    def progress(n_done: int, n_total: int, name: str) -> None:
        seen.append((n_done, n_total, name))
        partial = tmp_path / "out.gguf.partial"
        if partial.exists() and n_done < n_total:
            partial_starts.add(partial.read_bytes()[:64])
            assert not out.exists()

    result = quantize(tiny_upstream, out, "Q4_K_M", n_threads=1, progress=progress)
    done = [n for n, _, _ in seen]
    assert done == sorted(done)
    assert done[-1] == result.n_bytes
    assert {total for _, total, _ in seen} == {result.n_bytes}
    # until the end the file has no header, so nothing takes it for a model
    assert {start.strip(b"\0") for start in partial_starts} <= {b""}
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_cancelling_leaves_nothing_new(tiny_upstream: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"an older file")
    with pytest.raises(errors.CancelledError):
        quantize(tiny_upstream, out, "Q4_K_M", n_threads=1, progress=lambda done, total, name: False)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"an older file"


def test_a_full_disk_is_noticed(tiny_upstream: Path, tmp_path: Path) -> None:
    """Upstream's quantiser goes on to the end before it notices."""
    script = (
        "import resource, sys; from pyllama_dsv4 import errors; from pyllama_dsv4.quantize import quantize;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))\n"
        "try: quantize(sys.argv[1], sys.argv[2], 'Q8_0')\n"
        "except errors.DiskFullError as error: print('full:', error)"
    )
    for limit in (3_000_000, 11_000_000):  # in the middle, and near the end
        out = tmp_path / "out.gguf"
        run = subprocess.run(
            [sys.executable, "-c", script, str(tiny_upstream), str(out), str(limit)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.startswith("full:"), run.stdout + run.stderr
        assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_one_file(tiny_upstream: Path, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "out.gguf.partial", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(errors.ConvertError, match="another process"):
            quantize(tiny_upstream, tmp_path / "out.gguf", "Q8_0")


# --- refusals -------------------------------------------------------------------------------------


def test_quantised_tensors_are_not_quantised_again_unless_allowed(
    llama_f32: Path, tiny_model: Path, tmp_path: Path
) -> None:
    q4, out = tmp_path / "q4.gguf", tmp_path / "out.gguf"
    quantize(llama_f32, q4, "Q4_0")
    with pytest.raises(errors.ArgumentError) as error:
        quantize(q4, out, "Q8_0")
    assert error.value.key == "allow_requantize"
    assert error.value.tensor is not None
    quantize(q4, out, "Q8_0", allow_requantize=True)
    quantize(tiny_model, out, "Q8_0")  # FP8 and MXFP4 are the original
    with pytest.raises(errors.ArgumentError, match="loses"):
        quantize(tiny_model, out, "Q8_0", allow_requantize=False)
    with pytest.raises(errors.ArgumentError, match="loses"):
        quantize(DATA / "stock-q2_0.gguf", out, "Q8_0")


def test_values_that_are_no_numbers(llama_f32: Path, tmp_path: Path) -> None:
    data = bytearray(llama_f32.read_bytes())
    tensor = check_header(llama_f32, any_architecture=True).header.tensor("blk.0.ffn_up.weight")
    assert tensor is not None
    data[tensor.start + 400 : tensor.start + 404] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(errors.FormatError) as error:
        quantize(tmp_path / "nan.gguf", tmp_path / "out.gguf", "Q4_K_M")
    assert error.value.tensor == "blk.0.ffn_up.weight"
    assert [p.name for p in tmp_path.iterdir()] == ["nan.gguf"]


@pytest.mark.parametrize(
    ("options", "error", "key"),
    [
        ({"type": "Q9_Z"}, errors.ArgumentError, "type"),
        ({"type": "NVFP4"}, errors.ArgumentError, "type"),
        ({"n_threads": 0}, errors.ArgumentError, "n_threads"),
        ({"dialect": "french"}, errors.ArgumentError, "dialect"),
        ({"dialect": "native"}, errors.DialectError, None),
        ({"outfile": "in.gguf"}, errors.ArgumentError, "outfile"),
        ({"outfile": "folder"}, errors.ArgumentError, None),
        ({"outfile": "missing/out.gguf"}, errors.ModelNotFoundError, None),
        ({"infile": "missing.gguf"}, errors.ModelNotFoundError, None),
        ({"infile": "text.gguf"}, errors.NotGGUFError, None),
        ({"infile": "cut.gguf"}, errors.TruncatedFileError, None),
        ({"infile": "odd.gguf"}, errors.UnsupportedModelError, "general.architecture"),
        ({"infile": "keyless.gguf"}, errors.ConvertError, None),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else None,
)
def test_refusals(
    llama_f32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[errors.PyllamaError],
    key: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = llama_f32.read_bytes()
    Path("in.gguf").write_bytes(data)
    Path("text.gguf").write_text("not a model, but longer than a GGUF header is\n" * 4, encoding="utf-8")
    Path("cut.gguf").write_bytes(data[:-100])
    Path("odd.gguf").write_bytes(data.replace(string("llama"), string("lamma")))
    Path("keyless.gguf").write_bytes(data.replace(string("llama.block_count"), string("llama.black_count")))
    Path("folder").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments = {"infile": "in.gguf", "outfile": "out.gguf", "type": "Q8_0", **options}
    with pytest.raises(error) as caught:
        quantize(**arguments)
    assert caught.value.key == key
    assert sorted(p.name for p in tmp_path.iterdir()) == before
