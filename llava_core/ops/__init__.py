"""Numerical building blocks: each has a reference that defines it and backends that must equal it."""

from llava_core.ops.attention import BACKENDS, attention
from llava_core.ops.packed_mask import Segments

__all__ = ["BACKENDS", "Segments", "attention"]
