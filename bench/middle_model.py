"""Write the middle model: random weights in shapes like V4-Flash's, 2.7 billion parameters, larger than any cache.

    python bench/middle_model.py OUT.gguf [--layers 12] [--experts 32]

Made by the package's own generator and converter; the checkpoint that lies between (as large as the file) is removed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from pyllama_dsv4 import synth
from pyllama_dsv4.convert import convert


def middle_config(n_layers: int, n_experts: int) -> dict[str, object]:
    """Return ``config.json``: half of Flash's width, a quarter of its heads' width, a small vocabulary."""
    ratios = [0, 0, *(4 if i % 2 == 0 else 128 for i in range(2, n_layers)), 0]
    return synth.flash_config(
        vocab_size=16384,
        num_hidden_layers=n_layers,
        hidden_size=2048,
        num_attention_heads=32,
        head_dim=256,
        q_lora_rank=512,
        o_groups=4,
        o_lora_rank=512,
        compress_ratios=ratios,
        index_n_heads=32,
        moe_intermediate_size=1024,
        n_routed_experts=n_experts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outfile", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.outfile.absolute().parent) as folder:
        checkpoint = Path(folder) / "checkpoint"
        synth.write_checkpoint(checkpoint, middle_config(args.layers, args.experts), seed=1)
        convert(checkpoint, args.outfile)
    print(f"{args.outfile}: {args.outfile.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
