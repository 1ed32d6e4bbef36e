"""Attention and loss: each has a reference implementation and backends that must equal it."""

from llava_core.ops.attention import BACKENDS, attention
from llava_core.ops.packed_mask import PackedMask

__all__ = ["BACKENDS", "PackedMask", "attention"]
