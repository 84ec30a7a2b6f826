"""The forms of DeepSeek-V4 files, and what engines would say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_writer import FLASH, TINY, Gguf, Tensor, flash_file, native_v4, upstream_v4

from pyllama_dsv4.errors import DialectError, MissingTensorError
from pyllama_dsv4.formats import FORMS, Engine, engines, form_of, generation_of_file
from pyllama_dsv4.header import HeaderReport, check_header, read_header
from pyllama_dsv4.inspect import inspect_file

P = "deepseek4."


def of_architecture(name: str, *keys: tuple[str, str, Any]) -> Gguf:
    return Gguf([("general.architecture", "str", name), *keys], [Tensor("a", (8,), 0)])


def dense_only() -> Gguf:
    model = native_v4()
    model.tensors = [t for t in model.tensors if "_exps." not in str(t.name)]
    return model


def with_mtp() -> Gguf:
    model = upstream_v4()
    model.tensors.append(Tensor("blk.6.nextn.eh_proj.weight", (256, 256), 0))
    return model.set(P + "nextn_predict_layers", "u32", 1).set(P + "block_count", "u32", 7)


def ds4() -> Gguf:
    model = upstream_v4()
    for tensor in list(model.tensors):
        if str(tensor.name).endswith("attn_compressor_ape.weight"):
            model.change(str(tensor.name), kind=1)
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (native_v4(), "native"),
        (upstream_v4(), "upstream"),
        (ds4(), "ds4"),
        (of_architecture("deepseek-v4-flash"), "upstream-early"),
        (of_architecture("deepseek41"), "v4.1"),
        (with_mtp(), "upstream-mtp"),
        (dense_only(), "native-dense"),
        (of_architecture("dflash"), "upstream-draft"),
        (of_architecture("clip", ("clip.vision.projector_type", "str", "deepseek4v")), "vision"),
        (of_architecture("clip", ("clip.vision.projector_type", "str", "llava")), None),
        (of_architecture("llama"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forms(tmp_path: Path, model: Gguf, name: str | None) -> None:
    path = model.write(tmp_path / "x.gguf")
    form = form_of(read_header(path))
    assert (None if form is None else form.name) == name
    info = inspect_file(path)  # whether it runs or not
    assert info["form"] == (None if form is None else form._asdict())
    if form is not None and form.is_runnable:
        assert info["engines"][0]["opens"] is True
        assert check_header(path).hparams is not None
    elif form is not None:
        assert info["engines"][0]["opens"] is False
        assert info["engines"][0]["why"]
    else:
        assert info["engines"][0]["opens"] is None  # another model


def test_every_form_is_tested() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS) == 9


def test_damage_to_a_form_that_runs_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError):
        inspect_file(native_v4().remove("output.weight").write(tmp_path / "x.gguf"))
    mixed = native_v4().rename("hc_head_fn", "output_hc_fn.weight").write(tmp_path / "x.gguf")
    with pytest.raises(DialectError):
        inspect_file(mixed)


def test_generation(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert generation_of_file(read_header(native_v4().write(path))) == "preview"
    later = native_v4().set("pyllama_dsv4.generation", "str", "0731")
    assert generation_of_file(read_header(later.write(path))) == "0731"
    assert inspect_file(path)["generation"] == "0731"
    wrong_type = native_v4().set("pyllama_dsv4.generation", "u32", 731)
    assert generation_of_file(read_header(wrong_type.write(path))) == "preview"
    assert generation_of_file(read_header(of_architecture("llama").write(path))) is None


# --- engines --------------------------------------------------------------------------------------


def verdicts(path: Path) -> dict[str, Engine]:
    return {engine.name: engine for engine in engines(check_header(path, any_architecture=True))}


def test_the_published_file(tmp_path: Path) -> None:
    """The first error of stock llama.cpp, to the byte: the format specification's section 3.3 has these numbers."""
    found = verdicts(flash_file(tmp_path / "x.gguf"))
    assert found["pyllama-dsv4"] == ("pyllama-dsv4", True, ())
    stock = found["llama.cpp, stock"]
    assert stock.opens is False
    assert stock.why[0] == (
        "it expects 'blk.0.attn_output_a.weight' at offset 1,059,657,984 of the data, stored is 1,061,181,696"
    )
    assert stock.why[-1].startswith("pyllama-dsv4 translate --to upstream --dense q8_0")
    assert found["gguf, Python package"].opens is False
    assert "365 tensors" in found["gguf, Python package"].why[0]
    assert found["ds4"].opens is False
    assert found["the fork that wrote native files"].opens is True


def test_native_names_without_fp8(tmp_path: Path) -> None:
    """A requant in the native dialect: names and keys alone keep stock engines out."""
    model = native_v4()
    for spec in list(model.tensors):
        if spec.kind == 42:
            model.change(str(spec.name), kind=8)
    stock = verdicts(model.write(tmp_path / "x.gguf"))["llama.cpp, stock"]
    assert stock.opens is False
    assert stock.why[0] == "it looks for 'blk.0.attn_sinks.weight', here 'blk.0.attn_sinks'"
    assert stock.why[1].startswith("10 keys are absent")
    assert stock.why[2] == "pyllama-dsv4 translate --to upstream makes a file that it opens"


def test_an_upstream_file(tmp_path: Path) -> None:
    found = verdicts(upstream_v4().write(tmp_path / "x.gguf"))
    assert found["llama.cpp, stock"] == ("llama.cpp, stock", True, ())
    assert found["gguf, Python package"].opens is True
    assert found["ds4"].opens is False
    assert found["the fork that wrote native files"].opens is False
    assert verdicts(ds4().write(tmp_path / "x.gguf"))["ds4"].opens is True


def test_fp8_as_the_last_tensor_only(tmp_path: Path) -> None:
    """Offsets are right then, and stock reads wrong numbers without a word."""
    model = Gguf(
        [("general.architecture", "str", "llama")], [Tensor("a", (8,), 0), Tensor("b", (1024, 8), 42)]
    )
    stock = verdicts(model.write(tmp_path / "x.gguf"))["llama.cpp, stock"]
    assert stock.opens is False
    assert "wrong numbers without an error" in stock.why[0]


def test_other_models_are_not_judged(tmp_path: Path) -> None:
    found = verdicts(of_architecture("llama").write(tmp_path / "x.gguf"))
    assert [found[name].opens for name in ("pyllama-dsv4", "llama.cpp, stock", "ds4")] == [None] * 3


def test_what_cannot_be_translated_is_not_promised(tmp_path: Path) -> None:
    """FP8 in a form that does not run: stock refuses it, and translate would too."""
    model = with_mtp()
    model.change("blk.0.attn_q_a.weight", kind=42)
    info = inspect_file(model.write(tmp_path / "x.gguf"))
    stock = next(engine for engine in info["engines"] if engine["engine"] == "llama.cpp, stock")
    assert stock["opens"] is False
    assert not any("translate" in reason for reason in stock["why"])


def test_a_refusal_is_the_reason(tmp_path: Path) -> None:
    header = read_header(dense_only().write(tmp_path / "x.gguf"))
    first = engines(HeaderReport(header, None, {}), "it is cold")[0]
    assert first == ("pyllama-dsv4", False, ("it is cold",))


def test_dimensions_used_here_are_those_of_the_tables() -> None:
    assert FLASH.n_layer == 43
    assert TINY.n_layer == 6
