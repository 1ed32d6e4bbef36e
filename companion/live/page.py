"""The live page: an HTML output with the checkpoint, its images and the module that runs it; nothing is fetched."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from companion.live.state import live_state
from companion.miniature.backgrounds import BACKGROUNDS, draw_background
from companion.miniature.display_list import load_table
from companion.miniature.sprites import ASPECT, COLORS, ZONE, Sprite
from llava_core.checkpoints.load import Loaded

if TYPE_CHECKING:
    from IPython.display import HTML

FOLDER = Path(__file__).parent
SPRITE_HEIGHT = 96  # pixels; the stage has 224
QUESTIONS = (
    "What do you see?",
    "What color is it?",
    "What place does the image show?",
    "Describe this image in detail.",
)


def module() -> str:
    """Return engine.mjs and chat.mjs as one ES module that exports `render`, as anywidget expects it."""
    engine, chat = ((FOLDER / name).read_text(encoding="utf-8") for name in ("engine.mjs", "chat.mjs"))
    return re.sub(r"^export ", "", engine, flags=re.M) + re.sub(
        r"^import .* from \"\./engine\.mjs\";$", "", chat, flags=re.M
    )


def png_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def scene_state() -> dict[str, Any]:
    """Return the pictures of which a reader composes a scene: every thing in every color, and the places."""
    drawings, sprites = load_table("sprites")["categories"], dict[str, Any]()
    for category, aspect in ASPECT.items():
        colors = {}
        for color in COLORS:
            thing = Sprite(round(SPRITE_HEIGHT * aspect), SPRITE_HEIGHT, color, random.Random(0))
            thing.run(drawings[category]["draw"])
            colors[color] = png_uri(thing.finish(flip=False).quantize(64))
        sprites[category] = {"aspect": aspect, "zone": ZONE[category], "colors": colors}
    places = {name: png_uri(draw_background(name, 224, random.Random(3)).convert("RGB")) for name in BACKGROUNDS}
    return {"sprites": sprites, "backgrounds": places}


def page_state(
    loaded: Loaded, gallery: Mapping[str, Image.Image], checkpoint: str, questions: Sequence[str] = QUESTIONS
) -> dict[str, Any]:
    """Return what `render` of the module reads; arguments and errors as in `live_html`."""
    shown = [{"name": name, "src": png_uri(image.convert("RGB"))} for name, image in gallery.items()]
    more = {"gallery": shown, "questions": list(questions), "checkpoint": checkpoint, "scene": scene_state()}
    return {**live_state(loaded), **more}


def live_html(
    loaded: Loaded, gallery: Mapping[str, Image.Image], checkpoint: str, questions: Sequence[str] = QUESTIONS
) -> HTML:
    """Return an output in which readers chat with a checkpoint, in JupyterLab and in a static page, also from a file.

    Args:
        loaded: a checkpoint of the miniature's kind.
        gallery: images by name, of any sizes.
        checkpoint: a sentence about the checkpoint, shown below the chat.
        questions: suggested ones; the first stands in the box.

    Raises:
        DataError: the checkpoint is not one that engine.mjs runs.
    """
    from IPython.display import HTML

    # "<" inside the JSON would end the element that holds it
    content = json.dumps(page_state(loaded, gallery, checkpoint, questions)).replace("<", "\\u003c")
    return HTML(
        '<div class="llava-live-host"><div>This page runs the model in your browser; it needs JavaScript.</div>'
        f'<script type="application/json">{content}</script><script type="module">{module()}\n'
        'for (const host of document.querySelectorAll(".llava-live-host:not([data-ready])")) {\n'
        '  host.dataset.ready = "";\n'
        "  const state = JSON.parse(host.querySelector(\"script[type='application/json']\").textContent);\n"
        "  host.chat = render({ model: { get: () => state }, el: host.firstElementChild });\n"
        "}</script></div>"
    )
