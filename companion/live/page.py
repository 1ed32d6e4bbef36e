"""The live page: a checkpoint, its images and the module that runs it, in one output; nothing is fetched."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from companion.figures import image_uri
from companion.live.host import html_output, joined, widget
from companion.live.state import live_state
from companion.miniature.backgrounds import BACKGROUNDS, draw_background
from companion.miniature.display_list import load_table
from companion.miniature.sprites import ASPECT, COLORS, ZONE, Sprite
from llava_core.checkpoints.load import Loaded

if TYPE_CHECKING:
    from anywidget import AnyWidget
    from IPython.display import HTML

SPRITE_HEIGHT = 96  # pixels; the stage has 224
QUESTIONS = (
    "What do you see?",
    "What color is it?",
    "What place does the image show?",
    "Describe this image in detail.",
)


def module() -> str:
    """Return engine.mjs and chat.mjs as one ES module."""
    return joined("engine.mjs", "chat.mjs")


def scene_state() -> dict[str, Any]:
    """Return the pictures of which a reader composes a scene: every thing in every color, and the places."""
    drawings, sprites = load_table("sprites")["categories"], dict[str, Any]()
    for category, aspect in ASPECT.items():
        colors = {}
        for color in COLORS:
            thing = Sprite(round(SPRITE_HEIGHT * aspect), SPRITE_HEIGHT, color, random.Random(0))
            thing.run(drawings[category]["draw"])
            colors[color] = image_uri(thing.finish(flip=False).quantize(64), "png")
        sprites[category] = {"aspect": aspect, "zone": ZONE[category], "colors": colors}
    places = {
        name: image_uri(draw_background(name, 224, random.Random(3)).convert("RGB"), "png") for name in BACKGROUNDS
    }
    return {"sprites": sprites, "backgrounds": places}


def live_content(
    loaded: Loaded, gallery: Mapping[str, Image.Image], checkpoint: str, questions: Sequence[str] = QUESTIONS
) -> dict[str, Any]:
    """Return `state` and `weights` that the module reads, for `host.widget` and `host.write_myst`, too.

    Args:
        loaded: a checkpoint of the miniature's kind.
        gallery: images by name, of any sizes.
        checkpoint: a sentence about the checkpoint, shown below the chat.
        questions: suggested ones; the first stands in the box.

    Raises:
        DataError: the checkpoint is not one that engine.mjs runs.
    """
    content = live_state(loaded)
    shown = [{"name": name, "src": image_uri(image.convert("RGB"), "png")} for name, image in gallery.items()]
    more = {"gallery": shown, "questions": list(questions), "checkpoint": checkpoint, "scene": scene_state()}
    return {"state": content["state"] | more, "weights": content["weights"]}


def live_html(content: Mapping[str, Any]) -> HTML:
    """Return an output in which readers chat with a checkpoint, in JupyterLab and in static pages, also from a file."""
    return html_output(module(), content, "<p>This page runs the model in your browser; it needs JavaScript.</p>")


def live_widget(content: Mapping[str, Any]) -> AnyWidget:
    """Return the same chat as an anywidget; its `turns` are the dialogue: `{question, answer}` each."""
    return widget(module(), content, turns=[])
