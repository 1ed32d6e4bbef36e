"""Chat widget for notebooks: an image, a question box, and the streamed answer."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from companion.terminal_chat import visible_region
from llava_core.chat import CAPTION, Conversation
from llava_core.checkpoints.load import Loaded, load
from llava_core.data.images import load_image
from llava_core.runtime import DataError

SUGGESTIONS = ("What do you see?", "Describe this in detail.", CAPTION)


def chat_widget(model: str | Path | Loaded, images: list[Path], question: str = "What do you see?") -> Any:
    """Return image list and upload, question box and streamed answer; the box's `conversation` is the live one."""
    import ipywidgets as widgets

    loaded = model if isinstance(model, Loaded) else load(model)
    conversation = Conversation(loaded)
    choice = widgets.Dropdown(options=[(p.stem, p) for p in images], description="Image", layout={"width": "340px"})
    upload = widgets.FileUpload(accept="image/*", multiple=False, description="Own image")
    preview = widgets.Image(format="png", width=224, height=224)
    cropped = widgets.HTML()
    box = widgets.Text(value=question, placeholder="Ask about the image", layout={"width": "340px"})
    ask = widgets.Button(description="Ask", button_style="primary", icon="comment")
    suggestions = [widgets.Button(description=s, layout={"width": "auto"}) for s in SUGGESTIONS]
    log = widgets.HTML()

    def show(answer: str = "") -> None:
        rows = [(q, a or "") for q, a in conversation.turns]
        if answer:
            rows.append((box.value, answer))
        log.value = "".join(f"<p><b>You:</b> {html.escape(q)}<br><b>LLaVA:</b> {html.escape(a)}</p>" for q, a in rows)

    def set_image(image: Image.Image) -> None:
        buffer = io.BytesIO()
        conversation.set_image(image).resize((224, 224), Image.Resampling.BICUBIC).save(buffer, "PNG")
        preview.value = buffer.getvalue()
        cropped.value = f"<small>{visible_region(image, loaded.processor)}</small>"
        show()

    def on_upload(change: dict[str, Any]) -> None:
        if change["new"]:
            file = change["new"][0]
            try:
                set_image(load_image(file["content"], file["name"]))
            except DataError as error:
                log.value = f"<p>{html.escape(str(error))}</p>"

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

    choice.observe(lambda change: set_image(load_image(change["new"])), "value")
    upload.observe(on_upload, "value")
    ask.on_click(on_ask)
    for button in suggestions:
        button.on_click(suggest)
    if images:
        set_image(load_image(images[0]))
    left = widgets.VBox([choice, upload, preview, cropped])
    right = widgets.VBox([widgets.HBox([box, ask]), widgets.HBox(suggestions), log])
    app = widgets.HBox([left, right], layout={"align_items": "flex-start"})
    app.conversation, app.ask_button, app.question = conversation, ask, box
    return app
