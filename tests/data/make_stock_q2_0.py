"""Write the float32 model behind ``stock-q2_0.gguf``: a one-layer llama with random weights and no vocabulary.

Made into the fixture once, with programs built from the *unpatched* pin, which neither know type 42 as FP8 nor
number Q2_0 as 43::

    python tests/data/make_stock_q2_0.py f32.gguf
    llama-quantize f32.gguf tests/data/stock-q2_0.gguf Q2_0
    test-stock-q2_0 --record tests/data/stock-q2_0.gguf > tests/data/stock-q2_0.logits

``native/tests/test-stock-q2_0.cpp`` is the last of these programs, compiled against the unpatched pin with
``-DLLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4=LLAMA_FTYPE_MOSTLY_Q2_0``, and the test that reads both files with the patched one.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

N_VOCAB, N_EMBD, N_FF, N_HEAD = 96, 128, 256, 4


def main(path: str) -> None:
    """Write the model to ``path``."""
    rng = np.random.Generator(np.random.PCG64(42))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    writer.add_file_type(0)

    def add(name: str, *shape: int) -> None:
        n_inputs = shape[-1]
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32) / np.float32(n_inputs**0.5))

    add("token_embd.weight", N_VOCAB, N_EMBD)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", N_EMBD, N_EMBD)
    add("blk.0.ffn_gate.weight", N_FF, N_EMBD)
    add("blk.0.ffn_up.weight", N_FF, N_EMBD)
    add("blk.0.ffn_down.weight", N_EMBD, N_FF)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))
    add("output.weight", N_VOCAB, N_EMBD)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
