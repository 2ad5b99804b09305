"""Structured pruning and quantization: plans first, then small functions that apply them."""
