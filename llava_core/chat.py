"""Ask a checkpoint about images: from Python, turn by turn, and in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Turn
from llava_core.data.images import ImageProcessor, load_image
from llava_core.inference import prompt_ids
from llava_core.models.generation import Finish, GenerationSettings, stream
from llava_core.models.kv_cache import PrefixCache
from llava_core.runtime import CompanionError, DataError, resolve_device, resolve_dtype

Picture = str | Path | Image.Image
CAPTION = "Give a short caption."


class Conversation:
    """One image and the turns about it; a new image starts anew.

    The image is encoded once, at the first question, and the language model reads only what it has not read in an
    earlier turn: features and KV cache are kept. The answers are those of a conversation that keeps nothing.

    Args:
        loaded: a model with its tokenizer, image settings and manifest.
        image: RGB image, any size.

    Attributes:
        turns: the (question, answer) pairs so far.
        image: what the model sees, or None.
        finish: why the last answer ended: "stop", or "length" if `max_new_tokens` cut it.
    """

    def __init__(self, loaded: Loaded, image: Image.Image | None = None) -> None:
        self.loaded = loaded
        self.turns: list[Turn] = []
        self.image: Image.Image | None = None
        self.finish: Finish | None = None
        self._features: torch.Tensor | None = None
        self._prefix = PrefixCache()
        if image is not None:
            self.look(image)

    def look(self, image: Image.Image) -> Image.Image:
        """Take a new image, forget the turns, and return what the model sees of it."""
        self.image, self.turns = self.loaded.processor.visible(image), []
        self._features, self._prefix, self.finish = None, PrefixCache(), None
        return self.image

    def ask(self, question: str, max_new_tokens: int = 96, temperature: float = 0.0) -> str:
        """Answer a question about the image, in the light of the earlier turns."""
        return list(self.stream(question, max_new_tokens, temperature))[-1]

    def stream(self, question: str, max_new_tokens: int = 96, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer so far after each token; the turn is kept when the answer is complete.

        Args:
            question: text; an image marker in it is taken out.
            max_new_tokens: longest answer in tokens.
            temperature: 0 is greedy.

        Raises:
            DataError: the question is empty, or the turns have become too long for the language model.
        """
        question = question.replace(IMAGE_MARKER, "").strip()
        template = TEMPLATES.get(self.loaded.manifest.get("template", "v0"))
        if not question and template.instructed:
            raise DataError("the question is empty; fix: write one")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = prompt_ids(self.loaded, [*self.turns, (question, None)], self.image is not None)
        settings = GenerationSettings(max_new_tokens, temperature, stop=template.stop)
        steps = stream(model, tokenizer, [ids], None, settings, image_features=self._encoded(), prefix=self._prefix)
        for (answer,) in steps:
            if answer.finish:
                self.finish = answer.finish
                self.turns.append((question, answer.text))
            yield answer.text

    @torch.inference_mode()
    def _encoded(self) -> torch.Tensor | None:
        """Projected features (1, P, D) of the image."""
        if self._features is None and self.image is not None:
            pixels = torch.from_numpy(self.loaded.processor(self.image))[None]
            self._features = self.loaded.model.encode_images(pixels.to(self.loaded.model.language_model.device))
        return self._features


class Assistant:
    """A checkpoint of any layout, ready to be asked.

    Args:
        loaded: model, tokenizer, image settings, and how it wants to be asked.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def chat(self, image: Picture | None = None) -> Conversation:
        """A conversation, about an image (file or PIL image) or about none."""
        return Conversation(self.loaded, None if image is None else _picture(image))

    def ask(self, image: Picture | None, question: str, max_new_tokens: int = 96, temperature: float = 0.0) -> str:
        """Answer one question about an image."""
        return self.chat(image).ask(question, max_new_tokens, temperature)

    def caption(self, image: Picture, question: str | None = None, max_new_tokens: int = 64) -> str:
        """Say in a sentence what an image shows.

        Args:
            image: file or PIL image.
            question: what is asked for; when None a short caption, or nothing where the template takes no question.
            max_new_tokens: longest caption in tokens.
        """
        if question is None:
            question = CAPTION if TEMPLATES.get(self.loaded.manifest.get("template", "v0")).instructed else ""
        return self.chat(image).ask(question, max_new_tokens)


def open_assistant(path: str | Path, device: str = "auto", dtype: str = "", **options: Any) -> Assistant:
    """Load a checkpoint of any layout: what `llava_core.load` does.

    Args:
        path: folder, or file where the layout is one.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        dtype: of the weights in memory: "float32", "bfloat16" or "float16"; empty: float32 on a CPU, else bfloat16.
        options: `base`, `vision_tower` where the files do not hold them; usage as in `describe.USAGE_FIELDS`.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one; the message names file and fix.
    """
    place = resolve_device(device)
    bases = Options(**{name: options.pop(name) for name in ("base", "vision_tower") if name in options})
    chosen = resolve_dtype(dtype or ("float32" if place.type == "cpu" else "bfloat16"))
    return Assistant(load(path, chosen, place, bases, **options))


def _picture(image: Picture) -> Image.Image:
    return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else load_image(image)


# ------------------------------------------------------------------------------------------------ in the terminal


def seen(image: Image.Image, processor: ImageProcessor) -> str:
    """What of an image the model sees, in words."""
    width, height = image.size
    size, short = processor.size, min(image.size)
    if processor.mode == "resize":
        return f"{width} x {height} pixels, squeezed into {size} x {size}"
    if processor.mode == "pad":
        return f"{width} x {height} pixels, whole, on a square of {size} x {size}"
    lost = 1 - short / max(image.size)
    sides = "left and right" if width > height else "above and below"
    cut = f"; {lost:.0%} is cut off, half of it each {sides}" if lost >= 0.005 else ""
    return f"{width} x {height} pixels, the middle {short} x {short} scaled to {size} x {size}{cut}"


def preview(image: Image.Image, columns: int = 40) -> str:
    """A picture for terminals with colors: two pixels per character."""
    pixels = image.convert("RGB").resize((columns, columns)).load()
    assert pixels is not None

    def cell(x: int, y: int) -> str:
        upper, lower = (";".join(map(str, pixels[x, y + k])) for k in (0, 1))  # type: ignore[arg-type]
        return f"\x1b[38;2;{upper}m\x1b[48;2;{lower}m\N{UPPER HALF BLOCK}"

    lines = ("".join(cell(x, y) for x in range(columns)) for y in range(0, columns - 1, 2))
    return "\n".join(line + "\x1b[0m" for line in lines)


def chat_in_terminal(assistant: Assistant, image: str | Path) -> None:
    """Chat until an empty line or the end of input; each answer appears as it is written.

    A line `/image FILE` takes another image; a question that fails says why, and the chat goes on.
    """
    conversation = _look(assistant, image)
    while True:
        try:
            question = input("You: ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        try:
            if question.startswith("/image "):
                conversation = _look(assistant, question.removeprefix("/image ").strip())
            else:
                _answer(conversation, question)
        except CompanionError as error:
            sys.stdout.write(f"error: {error}\n")


def _look(assistant: Assistant, image: str | Path) -> Conversation:
    picture = load_image(image)
    conversation = assistant.chat(picture)
    sys.stdout.write(f"{Path(image).name}: {seen(picture, assistant.loaded.processor)}\n")
    if sys.stdout.isatty() and conversation.image is not None:
        sys.stdout.write(preview(conversation.image) + "\n")
    return conversation


def _answer(conversation: Conversation, question: str) -> None:
    sys.stdout.write("LLaVA: ")
    written = 0
    for text in conversation.stream(question):
        sys.stdout.write(text[written:])
        sys.stdout.flush()
        written = len(text)
    sys.stdout.write("\n" if conversation.finish != "length" else " ...\n")
