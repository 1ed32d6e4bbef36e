from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chat_fixtures import images, loaded, prompts  # noqa: F401 - fixtures
from PIL import Image

from companion import demo
from companion.demo import chat_widget
from llava_core.checkpoints.load import Loaded


def _parts(app: Any) -> tuple[Any, Any, Any, Any]:
    """Choice, upload, suggestions and log of the widget."""
    left, right = app.children
    return left.children[0], left.children[1], right.children[1], right.children[2]


def test_ask_button_fills_the_log(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    app = chat_widget(loaded, images, "what <b>color</b>")
    choice, _, suggestions, log = _parts(app)
    assert log.value == ""
    app.ask_button.click()
    assert "what &lt;b&gt;color&lt;/b&gt;" in log.value
    assert log.value.count("red car") == 1
    assert not app.ask_button.disabled
    suggestions.children[0].click()
    assert log.value.count("red car") == len(app.conversation.turns) == 2
    assert app.conversation.turns[1][0] == demo.SUGGESTIONS[0]
    choice.value = images[1]
    assert log.value == ""
    assert app.conversation.turns == []
    app.question.value = " "
    app.ask_button.click()
    assert "question is empty" in log.value
    assert not app.ask_button.disabled


def test_uploads_are_turned_upright_and_text_is_refused(loaded: Loaded, images: list[Path]) -> None:
    app = chat_widget(loaded, images)
    _, upload, _, log = _parts(app)
    buffer, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 3  # orientation: upside down
    picture = Image.new("RGB", (32, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 32, 16))
    picture.save(buffer, "PNG", exif=turned)
    file = {"name": "own.png", "type": "image/png", "size": 1, "last_modified": datetime.now(UTC)}
    upload.set_trait("value", ({**file, "content": buffer.getvalue()},))
    assert app.conversation.image.getpixel((16, 4)) == (255, 255, 255)
    upload.set_trait("value", ({**file, "name": "<own>.txt", "content": b"text"},))
    assert "&lt;own&gt;.txt: not an image" in log.value or "&lt;own&gt;.txt" in log.value
