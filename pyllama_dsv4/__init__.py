"""pyllama-dsv4: DeepSeek-V4 from its native FP4/FP8 GGUF."""
