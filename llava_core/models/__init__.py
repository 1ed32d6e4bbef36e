"""The boxes of the paper's Figure 1: vision tower, projector, language model, and the whole."""

from llava_core.models.generation import generate
from llava_core.models.llava import Llava
from llava_core.models.projector import PROJECTORS
from llava_core.models.vision_tower import image_features, image_token_count

__all__ = ["PROJECTORS", "Llava", "generate", "image_features", "image_token_count"]
