"""Conversion of hub-form DeepSeek-V4 checkpoints to native-dialect GGUF files, without changing one code.

``convert`` is the whole interface. Inside: ``plan`` checks and lays out, ``metadata``, ``tokenizer`` and
``template`` make the keys, ``repack`` makes the tensor bytes, ``writer`` writes the container.
"""

from __future__ import annotations

from .run import OUTTYPES, ConvertResult, convert
from .writer import Progress

__all__ = ["OUTTYPES", "ConvertResult", "Progress", "convert"]
