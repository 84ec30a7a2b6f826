"""Random DeepSeek-V4 models: the one generator behind tests, benchmarks and the demo.

It writes checkpoints in hub form (official names, dtypes and tiles), the same weights as an upstream-dialect F32
file, and the demo model. The same seed gives the same bytes. Converting is left to ``convert``.
"""

from __future__ import annotations

from .checkpoints import write_checkpoint
from .configs import dspark_config, flash_config, pro_config, tiny_config
from .demo import demo_model
from .files import write_sparse_native, write_upstream_f32
from .shards import write_safetensors
from .tokenizers import Tokenizer, find_deepseek_tokenizer
from .weights import Draft

__all__ = [
    "Draft",
    "Tokenizer",
    "demo_model",
    "dspark_config",
    "find_deepseek_tokenizer",
    "flash_config",
    "pro_config",
    "tiny_config",
    "write_checkpoint",
    "write_safetensors",
    "write_sparse_native",
    "write_upstream_f32",
]
