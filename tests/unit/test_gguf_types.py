"""The table of file types, the stride rule for type 42, and what ``register`` teaches the gguf package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_writer import BLOCKS, Gguf, Tensor, padded
from hypothesis import given
from hypothesis import strategies as st

from pyllama_dsv4.errors import Type42Error
from pyllama_dsv4.gguf_types import (
    CLAIMANTS,
    F8_E4M3_B128,
    FILE_TYPES,
    PRISM_Q2_0,
    Q2_0,
    TYPE_42,
    Basis,
    FileType,
    TensorInfo,
    register,
    resolve_type42,
)

F32 = FILE_TYPES[0]


def place(
    tensors: Sequence[tuple[FileType, int, int]], alignment: int = 32, slack: int = 0
) -> tuple[list[TensorInfo], int]:
    """Lay (type, ne0, ne1) out as a writer does; return the infos and the size of the data section."""
    infos, offset = [], 0
    for i, (type_, ne0, ne1) in enumerate(tensors):
        infos.append(TensorInfo(f"t{i}", (ne0, ne1, 1, 1), type_.id, offset))
        offset += padded(type_.n_bytes(ne0 * ne1), alignment)
    return infos, offset + slack


def resolve(
    tensors: Sequence[tuple[FileType, int, int]], alignment: int = 32, slack: int = 0
) -> list[tuple[str, Basis]]:
    infos, size = place(tensors, alignment, slack)
    return [(v.type.name, v.basis) for v in resolve_type42(infos, size, alignment).values()]


# --- the table ------------------------------------------------------------------------------------


def test_file_types_equal_the_gguf_packages() -> None:
    theirs = {int(type_): sizes for type_, sizes in gguf.GGML_QUANT_SIZES.items() if int(type_) < TYPE_42}
    ours = {id_: (t.block, t.block_bytes) for id_, t in FILE_TYPES.items() if id_ in theirs}
    # ggml stores Q8_1's scale and sum as halves (36 bytes); the package counts two floats
    assert theirs.pop(9) == (32, 40)
    assert ours.pop(9) == (32, 36)
    assert ours == theirs
    assert {t.name for t in FILE_TYPES.values() if t.id in theirs} == {
        gguf.GGMLQuantizationType(id_).name for id_ in theirs
    }


def test_removed_types_are_absent() -> None:
    assert set(range(43)) - set(FILE_TYPES) == {4, 5, 31, 32, 33, 36, 37, 38}
    assert all(id_ == t.id for id_, t in FILE_TYPES.items())


def test_claimants_of_type_42() -> None:
    assert [(c.block, c.block_bytes, c.n_bytes(128)) for c in CLAIMANTS] == [
        (128, 129, 129),
        (64, 18, 36),
        (128, 34, 34),
    ]


# --- the stride rule ------------------------------------------------------------------------------


def test_a_single_fit_decides() -> None:
    assert resolve([(F8_E4M3_B128, 4096, 512), (F32, 8, 1)]) == [("F8_E4M3_B128", Basis.FITS)]
    assert resolve([(Q2_0, 4096, 512), (F32, 8, 1)]) == [("Q2_0", Basis.FITS)]
    assert resolve([(PRISM_Q2_0, 4096, 512), (F32, 8, 1)]) == [("PRISM_Q2_0", Basis.FITS)]


def test_the_published_files_first_fp8_tensor() -> None:
    # offsets 1,059,068,... of the real header do not matter, its stride does: 2,113,536 bytes
    infos = [TensorInfo("a", (4096, 512, 1, 1), 42, 64), TensorInfo("b", (8, 1, 1, 1), 0, 64 + 2_113_536)]
    verdict = resolve_type42(infos, 10**9, 32)[0]
    assert verdict.type is F8_E4M3_B128
    assert verdict.avail == 2_113_536
    assert verdict.sizes == {"F8_E4M3_B128": 2_113_536, "Q2_0": 589_824, "PRISM_Q2_0": 557_056}


def test_the_last_tensor_ends_with_the_data_section() -> None:
    assert resolve([(F32, 8, 1), (F8_E4M3_B128, 256, 4)]) == [("F8_E4M3_B128", Basis.FITS)]
    assert resolve([(F32, 8, 1), (Q2_0, 2048, 4)]) == [("Q2_0", Basis.FITS)]


def test_window_edges() -> None:
    # size <= avail < size + alignment, for a tensor of 129 * 8 = 1032 bytes
    for slack, fits in ((-1, False), (0, True), (31, True), (32, False)):
        infos = [TensorInfo("a", (1024, 1, 1, 1), 42, 0), TensorInfo("b", (8, 1, 1, 1), 0, 1032 + slack)]
        verdict = resolve_type42(infos, 10**6, 32)[0]
        assert (verdict.type is F8_E4M3_B128) == fits, slack
        assert (verdict.basis is Basis.UNKNOWN) != fits, slack


def test_two_bit_collision_is_stock_unless_prism_is_proven() -> None:
    # 15 blocks of 128: 510 and 540 bytes are both 512..544 with padding; 16 blocks: 544 and 576 are not
    small = (Q2_0, 128, 1)
    assert resolve([small, (F32, 8, 1)]) == [("Q2_0", Basis.STOCK)]
    assert resolve([small, (PRISM_Q2_0, 4096, 512), (F32, 8, 1)]) == [
        ("PRISM_Q2_0", Basis.BORROWED),
        ("PRISM_Q2_0", Basis.FITS),
    ]
    assert resolve([small, (Q2_0, 4096, 512), (F32, 8, 1)]) == [("Q2_0", Basis.STOCK), ("Q2_0", Basis.FITS)]


def test_meanings_may_coexist_in_one_file() -> None:
    assert resolve([(F8_E4M3_B128, 1024, 8), (Q2_0, 1024, 8), (F8_E4M3_B128, 1024, 8), (F32, 8, 1)]) == [
        ("F8_E4M3_B128", Basis.FITS),
        ("Q2_0", Basis.FITS),
        ("F8_E4M3_B128", Basis.FITS),
    ]


def test_rows_that_are_not_whole_blocks_rule_a_claimant_out() -> None:
    # 192 x 256 elements are 384 blocks of 128 in total, but no row is a whole number of them
    n = 192 * 256
    infos = [TensorInfo("a", (192, 256, 1, 1), 42, 0), TensorInfo("b", (8, 1, 1, 1), 0, n // 128 * 129)]
    verdict = resolve_type42(infos, 10**6, 32)[0]
    assert verdict.basis is Basis.UNKNOWN
    assert verdict.sizes["F8_E4M3_B128"] is None
    assert resolve([(Q2_0, 192, 256), (F32, 8, 1)]) == [("Q2_0", Basis.FITS)]


def test_a_last_tensor_without_a_fit_follows_the_others() -> None:
    trusted = (F8_E4M3_B128, 1024, 8)
    for slack in (-1, -5000, 32, 10**6):
        assert resolve([trusted, (F8_E4M3_B128, 1024, 8)], slack=slack)[1] == ("F8_E4M3_B128", Basis.BORROWED)
    # alone, or among others that disagree, it is what a stock file means
    assert resolve([(F8_E4M3_B128, 1024, 8)], slack=-1) == [("Q2_0", Basis.UNKNOWN)]
    mixed = [trusted, (Q2_0, 1024, 8), (F8_E4M3_B128, 1024, 8)]
    assert resolve(mixed, slack=-1)[2] == ("Q2_0", Basis.UNKNOWN)


def test_a_last_tensor_that_fits_counts_for_itself() -> None:
    assert resolve([(F8_E4M3_B128, 1024, 8), (Q2_0, 1024, 8)])[1] == ("Q2_0", Basis.FITS)


def test_without_a_file_size_the_last_tensor_follows_the_others() -> None:
    infos, _ = place([(F8_E4M3_B128, 1024, 8), (F8_E4M3_B128, 1024, 8)])
    assert [v.type for v in resolve_type42(infos, None, 32).values()] == [F8_E4M3_B128, F8_E4M3_B128]
    verdict = resolve_type42(infos[1:], None, 32)[0]
    assert (verdict.type, verdict.basis, verdict.avail) == (Q2_0, Basis.UNKNOWN, None)
    assert "unknown bytes available" in verdict.evidence()


def test_a_wide_alignment_can_make_fp8_ambiguous() -> None:
    # one block of 128 at alignment 256: all three sizes are below 256
    assert resolve([(F8_E4M3_B128, 128, 1), (F32, 8, 1)], alignment=256) == [("Q2_0", Basis.TOO_SMALL)]
    with_witness = [(F8_E4M3_B128, 128, 1), (F8_E4M3_B128, 1024, 8), (F32, 8, 1)]
    assert resolve(with_witness, alignment=256)[0] == ("F8_E4M3_B128", Basis.BORROWED)
    # n/128 * 93 >= alignment is what separates them
    assert resolve([(F8_E4M3_B128, 128, 3), (F32, 8, 1)], alignment=256) == [("F8_E4M3_B128", Basis.FITS)]


def test_a_witness_decides_only_what_it_fits() -> None:
    # 258, 72 and 68 bytes at alignment 256: 326 bytes fit FP8 and Q2_0, not the neighbour's PrismML format
    infos = [TensorInfo("a", (256, 1, 1, 1), 42, 0), TensorInfo("b", (4096, 512, 1, 1), 42, 326)]
    verdicts = resolve_type42(infos, 326 + PRISM_Q2_0.n_bytes(4096 * 512), 256)
    assert [(v.type, v.basis) for v in verdicts.values()] == [
        (Q2_0, Basis.TOO_SMALL),
        (PRISM_Q2_0, Basis.FITS),
    ]


def test_only_a_last_tensor_borrows_without_a_fit() -> None:
    # in the middle of a file a stride that fits nothing means another format, not missing data
    infos, size = place([(F8_E4M3_B128, 1024, 8), (F8_E4M3_B128, 1024, 8), (F32, 64, 1)])
    infos[2] = infos[2]._replace(offset=infos[2].offset + 32)
    assert [v.basis for v in resolve_type42(infos, size + 32, 32).values()] == [Basis.FITS, Basis.UNKNOWN]


def test_a_last_tensor_borrows_no_verdict_that_its_rows_rule_out() -> None:
    """Rows of 192 are no blocks of 128: the engine's size arithmetic must not see them as FP8."""
    infos, size = place([(F8_E4M3_B128, 1024, 8), (Q2_0, 192, 8)])
    verdict = resolve_type42(infos, size - 100, 32)[1]
    assert (verdict.type, verdict.basis) == (Q2_0, Basis.UNKNOWN)
    rows_that_fit, size = place([(F8_E4M3_B128, 1024, 8), (Q2_0, 256, 8)])
    assert resolve_type42(rows_that_fit, size - 100, 32)[1].type is F8_E4M3_B128


def test_counts_that_would_overflow_rule_a_claimant_out() -> None:
    """Elements times block bytes beyond 2^63 - 1: the engine multiplies before it divides."""
    largest = (2**63 - 1) // 129 // 128
    for ne1, basis in ((largest, Basis.FITS), (largest + 1, Basis.UNKNOWN)):
        n_bytes = F8_E4M3_B128.n_bytes(128 * ne1)
        infos = [TensorInfo("a", (128, ne1, 1, 1), 42, 0), TensorInfo("b", (8, 1, 1, 1), 0, n_bytes)]
        assert resolve_type42(infos, n_bytes + 32, 32)[0].basis is basis
    trusted = TensorInfo("a", (1024, 8, 1, 1), 42, 0)
    last = TensorInfo("b", (128, largest + 1, 1, 1), 42, 8256)
    assert resolve_type42([trusted, last], 8256 + 10, 32)[1].type is Q2_0


def test_order_in_the_file_does_not_matter() -> None:
    infos, size = place([(F8_E4M3_B128, 1024, 8), (Q2_0, 1024, 8), (F32, 64, 1)])
    backwards = resolve_type42(infos[::-1], size, 32)
    assert [backwards[i].type for i in (2, 1)] == [F8_E4M3_B128, Q2_0]


def test_nothing_to_resolve() -> None:
    assert resolve_type42([], 0, 32) == {}
    assert resolve([(F32, 8, 1)]) == []


def test_evidence_names_all_numbers() -> None:
    infos, size = place([(F8_E4M3_B128, 1024, 8), (F32, 64, 1)])
    text = resolve_type42(infos, size, 32)[0].evidence()
    for part in (
        "8,192 elements",
        "8,256 bytes available",
        "F8_E4M3_B128 8,256",
        "Q2_0 2,304",
        "PRISM_Q2_0 2,176",
    ):
        assert part in text


meanings = st.sampled_from([F8_E4M3_B128, Q2_0, F32])
rows = st.integers(1, 64)
blocks = st.integers(1, 32)


@given(st.lists(st.tuples(meanings, blocks, rows), min_size=1, max_size=12))
def test_files_of_supported_meanings_come_back_right(tensors: list[tuple[FileType, int, int]]) -> None:
    """At the default alignment FP8 and stock Q2_0 are told apart whatever their size and neighbours."""
    infos, size = place([(type_, 128 * n, ne1) for type_, n, ne1 in tensors])
    verdicts = resolve_type42(infos, size, 32)
    assert set(verdicts) == {i for i, (type_, _, _) in enumerate(tensors) if type_.id == TYPE_42}
    for i, verdict in verdicts.items():
        assert verdict.type == tensors[i][0]
        assert verdict.basis in (Basis.FITS, Basis.STOCK)


@given(
    st.lists(st.tuples(st.sampled_from([*CLAIMANTS, F32]), blocks, rows), min_size=1, max_size=12),
    st.sampled_from([1, 8, 32, 64, 512, 4096, 65536]),
    st.integers(-200, 200),
)
def test_a_single_fit_is_always_the_verdict(
    tensors: list[tuple[FileType, int, int]], alignment: int, slack: int
) -> None:
    """Whatever the file: one fit decides, a verdict has a fit or borrows it, and a stock parser's guess remains."""
    infos, size = place([(type_, 128 * n, ne1) for type_, n, ne1 in tensors], alignment, slack)
    for i, verdict in resolve_type42(infos, size, alignment).items():
        start = infos[i].offset
        end = infos[i + 1].offset if i + 1 < len(infos) else size
        assert verdict.avail == max(end - start, 0)  # a data section may end before a tensor starts
        fits = [c for c in CLAIMANTS if 0 <= end - start - c.n_bytes(infos[i].n_elements) < alignment]
        if len(fits) == 1:
            assert verdict.type == fits[0]
            assert verdict.basis is Basis.FITS
        elif fits:
            assert verdict.type in fits
            assert verdict.basis is not Basis.FITS
        else:
            assert i == len(infos) - 1
            assert verdict.basis in (Basis.BORROWED, Basis.UNKNOWN)
        if verdict.basis in (Basis.STOCK, Basis.TOO_SMALL, Basis.UNKNOWN):
            assert verdict.type is Q2_0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 42]), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 2**64 - 1)
        ),
        max_size=8,
    ),
    st.integers(-(2**64), 2**64),
)
def test_no_input_breaks_the_rule(tensors: list[tuple[int, int, int, int]], size: int) -> None:
    infos = [TensorInfo("t", (ne0, ne1, 1, 1), type_, offset) for type_, ne0, ne1, offset in tensors]
    verdicts = resolve_type42(infos, size, 32)
    assert set(verdicts) == {i for i, info in enumerate(infos) if info.type_id == 42}


# --- the gguf package -----------------------------------------------------------------------------


def blocks_of(kind: int | str, n_blocks: int, seed: int) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 120, (n_blocks, BLOCKS[kind][1]), dtype=np.uint8)
    data[:, 0] = 127 if kind == 42 else data[:, 0]
    return data


def test_register_is_idempotent() -> None:
    member = register()
    assert register() is member
    assert (member.name, int(member), gguf.GGMLQuantizationType(42)) == ("F8_E4M3_B128", 42, member)
    assert gguf.GGMLQuantizationType["F8_E4M3_B128"] is member
    assert gguf.GGMLQuantizationType.F8_E4M3_B128 is member
    assert gguf.GGML_QUANT_SIZES[member] == (128, 129)
    assert [t.name for t in gguf.GGMLQuantizationType].count("F8_E4M3_B128") == 1
    assert member != gguf.GGMLQuantizationType.Q2_0


def test_both_meanings_are_written_as_42_and_read_back(tmp_path: Path) -> None:
    f8 = register()
    q2_0 = gguf.GGMLQuantizationType.Q2_0
    path = tmp_path / "both.gguf"
    f8_data, q2_0_data = blocks_of(42, 8, 1).reshape(4, -1), blocks_of("q2_0", 8, 2).reshape(4, -1)
    writer = gguf.GGUFWriter(path, "deepseek4")
    writer.add_tensor("a", f8_data, raw_dtype=f8)
    writer.add_tensor("b", np.arange(8, dtype=np.float32))
    writer.add_tensor("c", q2_0_data, raw_dtype=q2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    a, b, c = gguf.GGUFReader(path).tensors
    assert [t.tensor_type for t in (a, b, c)] == [f8, gguf.GGMLQuantizationType.F32, q2_0]
    assert [t.shape.tolist() for t in (a, b, c)] == [[256, 4], [8], [128, 4]]
    assert (a.data == f8_data).all()
    assert (c.data == q2_0_data).all()
    # the file itself, and the field as the package's users see it, say 42
    assert [int(t.field.parts[4][0]) for t in (a, b, c)] == [42, 0, 42]
    assert path.read_bytes().count((42).to_bytes(4, "little")) >= 2


def test_stock_files_are_read_as_before(tmp_path: Path) -> None:
    """A file without type 42, read by an unpatched package in another process and by the patched one here."""
    register()
    path = Gguf(
        [("general.architecture", "str", "llama"), ("x", "arr[str]", ["a", "b"])],
        [Tensor("a", (64, 2), 8), Tensor("b", (7,), 0), Tensor("c", (32,), 39)],
    ).write(tmp_path / "stock.gguf")
    code = (
        "import gguf, sys\n"
        "r = gguf.GGUFReader(sys.argv[1])\n"
        "assert 'F8_E4M3_B128' not in gguf.GGMLQuantizationType.__members__\n"
        "print([(t.name, int(t.tensor_type), t.shape.tolist(), t.n_bytes, t.data_offset, t.data.shape, "
        "t.data.dtype.str) for t in r.tensors])"
    )
    stock = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    ours = [
        (
            t.name,
            int(t.tensor_type),
            t.shape.tolist(),
            t.n_bytes,
            t.data_offset,
            t.data.shape,
            t.data.dtype.str,
        )
        for t in gguf.GGUFReader(path).tensors
    ]
    assert stock.stdout.strip() == str(ours)


@pytest.mark.parametrize(
    ("kind", "words"), [("prism", "PrismML"), (12, "unknown block size")], ids=["prism", "unknown"]
)
def test_the_reader_refuses_what_it_cannot_interpret(tmp_path: Path, kind: int | str, words: str) -> None:
    register()
    path = Gguf([], [Tensor("a", (512, 8), kind, type_id=42), Tensor("b", (8,), 0)]).write(
        tmp_path / "bad.gguf"
    )
    with pytest.raises(Type42Error, match=words) as error:
        gguf.GGUFReader(path)
    assert error.value.tensor == "a"
    assert error.value.path == str(path)


def test_a_later_package_that_has_q2_0_keeps_its_number(tmp_path: Path) -> None:
    """A package with 42 = Q2_0 of its own: F8_E4M3_B128 gets another number in memory, and 42 in files."""
    code = """
import sys
import numpy as np
import gguf
from pyllama_dsv4 import gguf_types as g
theirs = g._add_enum_member(gguf.GGMLQuantizationType, "Q2_0", 42)
gguf.GGML_QUANT_SIZES[theirs] = (64, 18)
f8 = g.register()
assert gguf.GGMLQuantizationType(42) is theirs and int(f8) == 43, int(f8)
w = gguf.GGUFWriter(sys.argv[1], "x")
w.add_tensor("a", np.zeros((4, 258), np.uint8), raw_dtype=f8)
w.add_tensor("b", np.zeros((4, 36), np.uint8), raw_dtype=theirs)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
a, b = gguf.GGUFReader(sys.argv[1]).tensors
assert (a.tensor_type, b.tensor_type) == (f8, theirs)
assert [int(t.field.parts[4][0]) for t in (a, b)] == [42, 42]
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "later.gguf")], check=True)
