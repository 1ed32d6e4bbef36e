"""Chat about an image: a conversation object, the widget around it, and the terminal's loop."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Turn
from llava_core.data.image_processor import load_image
from llava_core.evaluate.answer import prompt_ids
from llava_core.models.generation import Finish, GenerationSettings, PrefixCache, stream
from llava_core.runtime import DataError
from llava_core.weights.checkpoint import Loaded, load

SUGGESTIONS = ("What do you see?", "Describe this in detail.", "Give a short caption.")


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
        self.image, self.turns = self.loaded.processor.visible(image.convert("RGB")), []
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
        if not question:
            raise DataError("the question is empty; fix: write one")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = prompt_ids(self.loaded, [*self.turns, (question, None)], self.image is not None)
        stop = TEMPLATES.get(self.loaded.manifest.get("template", "v0")).stop
        settings = GenerationSettings(max_new_tokens, temperature, stop=stop)
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


def chat_widget(model: str | Path | Loaded, images: list[Path], question: str = "What do you see?") -> Any:
    """The demo: choose or upload an image, ask, read the answer as it is written.

    Args:
        model: checkpoint directory, or a loaded model.
        images: files offered in the list.
        question: text in the box at first.

    Returns:
        An ipywidgets box; its `conversation` is the live `Conversation`.
    """
    import ipywidgets as widgets

    loaded = model if isinstance(model, Loaded) else load(model)
    conversation = Conversation(loaded)
    choice = widgets.Dropdown(options=[(p.stem, p) for p in images], description="Image", layout={"width": "340px"})
    upload = widgets.FileUpload(accept="image/*", multiple=False, description="Own image")
    shown = widgets.Image(format="png", width=224, height=224)
    box = widgets.Text(value=question, placeholder="Ask about the image", layout={"width": "340px"})
    ask = widgets.Button(description="Ask", button_style="primary", icon="comment")
    suggestions = [widgets.Button(description=s, layout={"width": "auto"}) for s in SUGGESTIONS]
    log = widgets.HTML()

    def show(answer: str = "") -> None:
        rows = [(q, a or "") for q, a in conversation.turns]
        if answer:
            rows.append((box.value, answer))
        log.value = "".join(f"<p><b>You:</b> {html.escape(q)}<br><b>LLaVA:</b> {html.escape(a)}</p>" for q, a in rows)

    def take(image: Image.Image) -> None:
        buffer = io.BytesIO()
        conversation.look(image).resize((224, 224), Image.Resampling.BICUBIC).save(buffer, "PNG")
        shown.value = buffer.getvalue()
        show()

    def on_upload(change: dict[str, Any]) -> None:
        if change["new"]:
            try:
                take(ImageOps.exif_transpose(Image.open(io.BytesIO(bytes(change["new"][0]["content"])))))
            except OSError:
                log.value = f"<p>{html.escape(change['new'][0]['name'])} is not an image that can be read.</p>"

    def on_ask(_: Any) -> None:
        ask.disabled = True
        try:
            answer = ""
            for answer in conversation.stream(box.value):
                show(answer)
            show()
        except DataError as error:
            log.value += f"<p>{html.escape(str(error))}</p>"
        finally:
            ask.disabled = False

    def suggest(button: Any) -> None:
        box.value = button.description
        on_ask(button)

    choice.observe(lambda change: take(load_image(change["new"])), "value")
    upload.observe(on_upload, "value")
    ask.on_click(on_ask)
    for button in suggestions:
        button.on_click(suggest)
    if images:
        take(load_image(images[0]))
    left = widgets.VBox([choice, upload, shown])
    right = widgets.VBox([widgets.HBox([box, ask]), widgets.HBox(suggestions), log])
    app = widgets.HBox([left, right], layout={"align_items": "flex-start"})
    app.conversation, app.ask_button, app.question = conversation, ask, box
    return app


def chat_in_terminal(model: str | Path, image: str | Path) -> None:
    """Chat in the terminal until an empty line or the end of input; each answer appears as it is written."""
    conversation = Conversation(load(model), load_image(image))
    while True:
        try:
            question = input("You: ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        sys.stdout.write("LLaVA: ")
        written = 0
        for text in conversation.stream(question):
            sys.stdout.write(text[written:])
            sys.stdout.flush()
            written = len(text)
        sys.stdout.write("\n")
