"""Chat with a checkpoint in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from companion.guard import Guard
from llava_core.chat import Assistant, Conversation, plain_question
from llava_core.data.images import ImageProcessor, load_image
from llava_core.runtime import CompanionError, printable


def visible_region(image: Image.Image, processor: ImageProcessor) -> str:
    width, height = image.size
    size, short = processor.size, min(image.size)
    if processor.mode == "resize":
        return f"{width} x {height} pixels, resized to {size} x {size}"
    if processor.mode == "pad":
        return f"{width} x {height} pixels, padded to a square and scaled to {size} x {size}"
    lost = 1 - short / max(image.size)
    sides = "left and right" if width > height else "above and below"
    cut = f"; {lost:.0%} is cut off, half of it each {sides}" if lost >= 0.005 else ""
    return f"{width} x {height} pixels, the middle {short} x {short} scaled to {size} x {size}{cut}"


def chat_in_terminal(assistant: Assistant, image: str | Path, guard: Guard | None = None) -> None:
    """Chat until an empty line or the end of input; answers appear token by token.

    A line `/image FILE` starts a dialogue about another image; after an error the chat continues. The guard checks each
    image and each question.
    """
    guard = guard or Guard()
    conversation = _open_image(assistant, image, guard)
    while True:
        try:
            question = input("You: ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        try:
            if question.startswith("/image "):
                conversation = _open_image(assistant, question.removeprefix("/image ").strip(), guard)
            else:
                guard.check_text(plain_question(question))
                _print_answer(conversation, question)
        except CompanionError as error:
            sys.stdout.write(f"error: {error}\n")


def _open_image(assistant: Assistant, path: str | Path, guard: Guard) -> Conversation:
    image = load_image(path)
    guard.check_image(image)
    conversation = assistant.chat(image)
    sys.stdout.write(f"{printable(Path(path).name)}: {visible_region(image, assistant.loaded.processor)}\n")
    return conversation


def _print_answer(conversation: Conversation, question: str) -> None:
    sys.stdout.write("LLaVA: ")
    written = 0
    for text in conversation.stream(question):
        sys.stdout.write(printable(text[written:], keep="\n").replace("\n", "\n       "))
        sys.stdout.flush()
        written = len(text)
    sys.stdout.write("\n" if conversation.finish != "length" else " ...\n")
