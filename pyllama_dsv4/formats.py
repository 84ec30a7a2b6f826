"""The forms in which DeepSeek-V4 exists as GGUF, by name, and which engines open a given file.

It owns what is known about files of other producers, whether this package runs them or not; names and keys of the two
dialects it runs are ``tensors``', their checks ``header``'s. Nothing is read beyond the header.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .gguf_file import ValueType
from .gguf_types import F8_E4M3_B128, Q2_0, TYPE_42
from .header import Header, HeaderReport, Tensor

__all__ = ["FORMS", "GENERATION_KEY", "Engine", "Form", "engines", "form_of", "generation_of_file"]

GENERATION_KEY: Final = "pyllama_dsv4.generation"
"""Which release the weights are of, ``preview`` or ``0731``; absent means the preview."""


class Form(NamedTuple):
    """One form of file.

    Attributes:
        name: Short, stable.
        description: One clause for people.
        is_runnable: Whether this package runs files of it.
    """

    name: str
    description: str
    is_runnable: bool


NATIVE: Final = Form("native", "names of the fork that wrote the first FP4/FP8 files", True)
UPSTREAM: Final = Form("upstream", "names of llama.cpp since its pull request 24162", True)
DS4: Final = Form(
    "ds4", "made for antirez/ds4: upstream's names, F16 compressors, own quantisation mix", True
)
MTP: Final = Form("upstream-mtp", "upstream's names with multi-token prediction layers", False)
DENSE_ONLY: Final = Form(
    "native-dense",
    "native names without routed experts: one half of a package that streams them from a disk",
    False,
)
DRAFT: Final = Form(
    "upstream-draft", "a DSpark draft model (architecture dflash), for speculative decoding", False
)
EARLY: Final = Form("upstream-early", "a draft of upstream's support, architecture deepseek-v4-flash", False)
V4_1: Final = Form(
    "v4.1", "DeepSeek-V4.1 (architecture deepseek41): other layers, tensors and FP8 tiles", False
)
MMPROJ: Final = Form("vision", "the image encoder of V4-Flash-Vision", False)

FORMS: Final = (NATIVE, UPSTREAM, DS4, MTP, DENSE_ONLY, DRAFT, EARLY, V4_1, MMPROJ)
"""Every form that is recognised. Native, upstream, ds4, the early draft and V4.1 are dialects: they name tensors or
keys of a whole model in their own way. The others are parts or extensions in one of these."""

_BY_ARCHITECTURE: Final = {
    "dflash": DRAFT,
    "deepseek-v4-flash": EARLY,
    "deepseek41": V4_1,
}


def form_of(header: Header) -> Form | None:
    """Recognise the form of a file; None if it is none of DeepSeek-V4."""
    architecture = header.architecture or ""
    if architecture in _BY_ARCHITECTURE:
        return _BY_ARCHITECTURE[architecture]
    if architecture == "clip":
        projector = header.kv.get("clip.vision.projector_type") or header.kv.get("clip.projector_type")
        return MMPROJ if projector is not None and projector.value == "deepseek4v" else None
    if header.dialect == "native":
        return NATIVE if _has(header, ".ffn_gate_exps.weight") else DENSE_ONLY
    if header.dialect == "upstream":
        if _has(header, ".nextn.eh_proj.weight") or _has(header, ".nextn.e_proj.weight"):
            return MTP
        return DS4 if _is_ds4(header) else UPSTREAM
    return None


def _has(header: Header, suffix: str) -> bool:
    return any(tensor.name.endswith(suffix) for tensor in header.tensors)


def _is_ds4(header: Header) -> bool:
    """ds4's loader wants positional tables in F16, which no other writer makes."""
    tables = [t for t in header.tensors if t.name.endswith(".attn_compressor_ape.weight")]
    return bool(tables) and all(t.type.name == "F16" for t in tables)


def generation_of_file(header: Header) -> str | None:
    """Return the release of a DeepSeek-V4 file's weights; None for other models.

    The key is ours: files of other writers have none, and count as the preview they mostly are.
    """
    if header.dialect == "other":
        return None
    entry = header.kv.get(GENERATION_KEY)
    return str(entry.value) if entry is not None and entry.type is ValueType.STR else "preview"


# --- engines --------------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """What one engine would say of a file.

    Attributes:
        name: The engine.
        opens: Whether it opens the file; None if that is not known.
        why: Reasons, one clause each; for a refusal the first that it would meet.
    """

    name: str
    opens: bool | None
    why: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {"engine": self.name, "opens": self.opens, "why": list(self.why)}


def engines(report: HeaderReport, refusal: str | None = None) -> list[Engine]:
    """Say which engines open a file, and why others do not.

    The verdict on stock llama.cpp and on the gguf package follows their parsers; those on ds4 and on the fork are
    drawn from their loaders' names and types, and were not tried.

    Args:
        report: The header's check; one without hyper-parameters if the file was refused.
        refusal: Why this package refuses the file.
    """
    judges: tuple[tuple[str, Callable[[HeaderReport], tuple[bool | None, list[str]]]], ...] = (
        ("llama.cpp, stock", _stock),
        ("gguf, Python package", _gguf_package),
        ("ds4", _ds4),
        ("the fork that wrote native files", _fork),
    )
    verdicts = [_own(report, refusal)]
    for name, judge in judges:
        opens, why = judge(report)
        verdicts.append(Engine(name, opens, tuple(why)))
    return verdicts


def _own(report: HeaderReport, refusal: str | None) -> Engine:
    name = "pyllama-dsv4"
    form = form_of(report.header)
    if refusal is not None:
        return Engine(name, False, (refusal,))
    if form is not None and not form.is_runnable:
        return Engine(name, False, ("it does not run this form by itself",))
    if report.hparams is None:
        return Engine(name, None, ("another model: it opens those that the pinned llama.cpp has",))
    return Engine(name, True, ())


def _stock(report: HeaderReport) -> tuple[bool | None, list[str]]:
    header = report.header
    why = []
    if (clash := _first_clash(header)) is not None:
        why.append(clash)
    if header.dialect == "native":
        first = next(t for t in header.tensors if t.upstream_name != t.name)
        why.append(f"it looks for '{first.upstream_name}', here '{first.name}'")
    if report.derived_keys:
        key = next(iter(report.derived_keys))
        why.append(f"{len(report.derived_keys)} keys are absent, such as '{key}'")
    if why:
        if report.hparams is not None:
            dense = " --dense q8_0" if clash is not None else ""
            why.append(f"pyllama-dsv4 translate --to upstream{dense} makes a file that it opens")
        return False, why
    form = form_of(header)
    if form in (UPSTREAM, DS4) and report.hparams is not None:
        return True, []
    return None, ["an architecture or form that this package does not judge"]


def _first_clash(header: Header) -> str | None:
    """Return what stock's parser stops at: it takes type 42 for Q2_0, whose tensors are smaller."""
    for i, shard in enumerate(header.shards):
        offset = 0
        tensors = [tensor for tensor in header.tensors if tensor.shard == i]
        for tensor in tensors:
            if tensor.offset != offset:
                return f"it expects '{tensor.name}' at offset {offset:,} of the data, stored is {tensor.offset:,}"
            is_fp8 = tensor.type == F8_E4M3_B128
            size = (Q2_0 if is_fp8 else tensor.type).n_bytes(tensor.n_elements)
            offset += -(-size // shard.alignment) * shard.alignment
        if tensors and tensors[-1].type == F8_E4M3_B128:
            return f"it reads '{tensors[-1].name}', FP8, as Q2_0: wrong numbers without an error"
    return None


def _gguf_package(report: HeaderReport) -> tuple[bool | None, list[str]]:
    n_fp8 = _n_fp8(report.header)
    if n_fp8 == 0:
        return True, []
    return False, [
        f"type {TYPE_42} is none that it knows, or another one: {n_fp8} tensors",
        "after pyllama_dsv4.gguf_types.register() it reads and writes them",
    ]


def _ds4(report: HeaderReport) -> tuple[bool | None, list[str]]:
    header = report.header
    if form_of(header) is DS4:
        return True, ["by names and types; not tried"]
    if header.dialect == "native":
        return False, ["it looks for upstream's names"]
    if header.dialect == "upstream":
        table = next((t for t in header.tensors if t.name.endswith(".attn_compressor_ape.weight")), None)
        if table is not None:
            return False, [f"it wants '{table.name}' in F16, here {table.type.name}"]
    return None, ["a form that this package does not judge"]


def _fork(report: HeaderReport) -> tuple[bool | None, list[str]]:
    header = report.header
    if header.dialect == "native":
        return True, ["by names and types; not tried"]
    if header.dialect == "upstream":
        first: Tensor | None = next((t for t in header.tensors if t.name.startswith("output_hc_")), None)
        return False, [
            f"it looks for 'hc_head_*', here '{first.name}'" if first else "it looks for native names"
        ]
    return None, ["a form that this package does not judge"]


def _n_fp8(header: Header) -> int:
    return sum(tensor.type == F8_E4M3_B128 for tensor in header.tensors)
