"""A file in three shards, written by the gguf package's own writer: what splits of others look like."""

from __future__ import annotations

from pathlib import Path

import gguf

from pyllama_dsv4.gguf_types import register


def split_in_three(path: Path, folder: Path) -> Path:
    """Write the tiny native model in three shards into `folder`, and return the first."""
    f8 = register()
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(folder / "s.gguf", "deepseek4", split_max_tensors=70)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=f8 if t.tensor_type == f8 else t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "s-00001-of-00003.gguf"
