"""Configurations of random models: the released dimensions, and small ones with every kind of layer."""

from __future__ import annotations

from typing import Any

from pyllama_dsv4.convert.plan import TILE
from pyllama_dsv4.tensors import HParams

__all__ = ["dspark_config", "flash_config", "pro_config", "tiny_config"]


def flash_config(**changes: object) -> dict[str, Any]:
    """Return ``config.json`` of DeepSeek-V4-Flash as far as a runtime needs it, with ``changes`` applied.

    Source: spec v4-flash-graph section 1; upstream ``conversion/deepseek.py:DeepseekV4Model``.
    """
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": 129280,
        "max_position_embeddings": 1048576,
        "num_hidden_layers": 43,
        "num_nextn_predict_layers": 1,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "compress_ratios": [0, 0] + [4 if il % 2 == 0 else 128 for il in range(2, 43)] + [0],
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
        },
        "tie_word_embeddings": False,
        **changes,
    }


def pro_config(**changes: object) -> dict[str, Any]:
    """Return ``config.json`` of DeepSeek-V4-Pro as far as a runtime needs it, with ``changes`` applied.

    Source: spec native-gguf section 8.
    """
    pro = {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": [128, 128] + [4 if il % 2 == 0 else 128 for il in range(2, 61)] + [0],
        "index_topk": 1024,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
    }
    return flash_config(**(pro | changes))


def tiny_config(**changes: object) -> dict[str, Any]:
    """Return a small configuration with every kind of layer and routing, with ``changes`` applied.

    Layers of ratio 0, 0, 4, 128, 4, 128; the first three are routed by hash, the others by bias. The clamp
    is low enough for random activations to reach it. Source: spec v4-flash-graph section 1, column "tiny
    test model".
    """
    tiny = {
        "vocab_size": 320,
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
        "index_topk": 16,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "swiglu_limit": 3.0,
    }
    return flash_config(**(tiny | changes))


def dspark_config(hp: HParams) -> dict[str, Any]:
    """Return what a checkpoint with DSpark has in ``config.json`` besides."""
    return {
        "dspark_block_size": 5,
        "dspark_noise_token_id": hp.n_vocab - 1,
        "dspark_target_layer_ids": list(range(hp.n_layer))[-3:],
    }
