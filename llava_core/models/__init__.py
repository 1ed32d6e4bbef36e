"""The model: vision tower, projector, LLaVA, KV cache and generation."""

from llava_core.models.generation import generate
from llava_core.models.llava import Llava
from llava_core.models.projector import PROJECTORS

__all__ = ["PROJECTORS", "Llava", "generate"]
