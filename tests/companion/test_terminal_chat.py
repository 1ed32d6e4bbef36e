from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from chat_fixtures import images, loaded, prompts  # noqa: F401 - fixtures
from PIL import Image

from companion.guard import Guard
from companion.terminal_chat import _print_answer, chat_in_terminal, visible_region
from llava_core.chat import Assistant, Conversation
from llava_core.checkpoints.load import Loaded
from llava_core.data.images import ImageProcessor


def test_terminal_chat_continues_after_errors(
    loaded: Loaded, images: list[Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    lines = iter(["what color", "/image nowhere.png", f"/image {images[1]}", "is it a dog", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    chat_in_terminal(Assistant(loaded), images[0])
    output = capsys.readouterr().out.splitlines()
    cut = "20% is cut off, half of it each left and right"
    assert output[0] == f"red.png: 40 x 32 pixels, the middle 32 x 32 scaled to 32 x 32; {cut}"
    assert output[1] == "LLaVA: red car"
    assert output[2].startswith("error: nowhere.png")
    assert output[3].startswith("blue.png: 40 x 32")
    assert output[4] == "LLaVA: red car"
    assert len(prompts) == 2
    assert "\x1b" not in "".join(output)  # no colors where no terminal shows them


def test_the_filter_reads_the_question_that_the_model_reads(
    loaded: Loaded, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    lines, guard, checked = iter(["is it a d<image>og", ""]), Guard(), []
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    monkeypatch.setattr(guard, "check_text", checked.append)
    chat_in_terminal(Assistant(loaded), images[0], guard)
    assert checked == ["is it a dog"]


def test_answer_cannot_move_the_cursor_or_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    answer = "a dog\nerror: b\nYou: c\x1b[2J\u202e"
    conversation = SimpleNamespace(stream=lambda _: (answer[:n] for n in range(len(answer) + 1)), finish="stop")
    _print_answer(cast(Conversation, conversation), "q")
    output = capsys.readouterr().out
    assert output == "LLaVA: a dog\n       error: b\n       You: c\\u001b[2J\\u202e\n"


@pytest.mark.parametrize(
    ("mode", "size", "words"),
    [
        ("crop", (30, 60), "50% is cut off, half of it each above and below"),
        ("crop", (50, 50), "the middle 50 x 50 scaled to 16 x 16"),
        ("pad", (30, 60), "padded to a square and scaled to 16 x 16"),
        ("resize", (30, 60), "resized to 16 x 16"),
    ],
)
def test_visible_region(mode, size, words) -> None:
    assert visible_region(Image.new("RGB", size), ImageProcessor(16, mode)).endswith(words)
