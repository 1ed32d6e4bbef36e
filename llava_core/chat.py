"""Chat with a checkpoint about images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES
from llava_core.data.images import load_image
from llava_core.data.tokenization import Turn
from llava_core.inference import prompt_ids
from llava_core.models.generation import Finish, GenerationSettings, stream
from llava_core.models.kv_cache import PrefixCache
from llava_core.runtime import DataError, resolve_device, resolve_dtype

ImageInput = str | Path | Image.Image
CAPTION = "Give a short caption."


def plain_question(text: str) -> str:
    """A question without image markers, also without those that appear when one is removed."""
    while IMAGE_MARKER in text:
        text = text.replace(IMAGE_MARKER, "")
    return text.strip()


class Conversation:
    """A dialogue about one image, which is encoded once; a KV cache lets each turn feed only new tokens.

    Attributes:
        turns: the (question, answer) pairs so far.
        image: what the model sees, or None.
        finish: finish reason of the last answer: "stop", or "length" at `max_new_tokens`.
    """

    def __init__(self, loaded: Loaded, image: Image.Image | None = None) -> None:
        self.loaded = loaded
        self.image: Image.Image | None = None
        self._reset()
        if image is not None:
            self.set_image(image)

    def _reset(self) -> None:
        self.turns: list[Turn] = []
        self.finish: Finish | None = None
        self._features: torch.Tensor | None = None
        self._prefix = PrefixCache()

    def set_image(self, image: Image.Image) -> Image.Image:
        """Start a new dialogue about an image; returns what the model sees of it."""
        self._reset()
        self.image = self.loaded.processor.visible(image)
        return self.image

    def ask(self, question: str, max_new_tokens: int = 96, temperature: float = 0.0) -> str:
        """Answer a question; earlier turns are part of the prompt."""
        return list(self.stream(question, max_new_tokens, temperature))[-1]

    def stream(self, question: str, max_new_tokens: int = 96, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer so far after each token; a complete answer becomes a turn. Temperature 0 is greedy.

        Raises:
            DataError: the question is empty, or the turns are too long for the language model.
        """
        question = plain_question(question)
        template = TEMPLATES.get(self.loaded.manifest.get("template", "v0"))
        if not question and template.instructed:
            raise DataError("the question is empty; fix: write one")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = prompt_ids(self.loaded, [*self.turns, (question, None)], self.image is not None)
        settings = GenerationSettings(max_new_tokens, temperature, stop=template.stop)
        features = self._image_features()
        steps = stream(model, tokenizer, [ids], None, settings, image_features=features, prefix=self._prefix)
        for (answer,) in steps:
            if answer.finish:
                self.finish = answer.finish
                self.turns.append((question, answer.text))
            yield answer.text

    @torch.inference_mode()
    def _image_features(self) -> torch.Tensor | None:
        """Visual tokens (1, P, D) of the image, computed at the first question."""
        if self._features is None and self.image is not None:
            pixels = torch.from_numpy(self.loaded.processor(self.image))[None]
            self._features = self.loaded.model.encode_images(pixels.to(self.loaded.model.language_model.device))
        return self._features


class Assistant:
    """A loaded checkpoint that answers questions about images."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def chat(self, image: ImageInput | None = None) -> Conversation:
        """A conversation about an image (file or PIL image), or without an image."""
        return Conversation(self.loaded, None if image is None else _rgb(image))

    def ask(self, image: ImageInput | None, question: str, max_new_tokens: int = 96, temperature: float = 0.0) -> str:
        """Answer one question about an image."""
        return self.chat(image).ask(question, max_new_tokens, temperature)

    def caption(self, image: ImageInput, question: str | None = None, max_new_tokens: int = 64) -> str:
        """A short caption; the question is by default `CAPTION`, or none if the template takes no instruction."""
        if question is None:
            question = CAPTION if TEMPLATES.get(self.loaded.manifest.get("template", "v0")).instructed else ""
        return self.chat(image).ask(question, max_new_tokens)


def open_assistant(
    path: str | Path, device: str = "auto", dtype: str = "", base: str | None = None, vision_tower: str | None = None,
    **usage: Any,
) -> Assistant:  # fmt: skip
    """Load a checkpoint of any format; `llava_core.load` calls this.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        dtype: of the weights in memory: "float32", "bfloat16" or "float16"; by default float32 on a CPU, else bfloat16.
        base, vision_tower: folders or hub ids of these models, if the files do not contain them.
        usage: fields of `describe.USAGE_FIELDS`, such as `template="v1"`.

    Raises:
        ConfigError: an unknown device or dtype.
        CheckpointError: not a checkpoint, or a damaged one; the message names file and fix.
    """
    target = resolve_device(device)
    chosen = resolve_dtype(dtype or ("float32" if target.type == "cpu" else "bfloat16"))
    return Assistant(load(path, chosen, target, Options(base, vision_tower), **usage))


def _rgb(image: ImageInput) -> Image.Image:
    return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else load_image(image)
