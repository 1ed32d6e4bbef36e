"""Shared parts of the commands: declaration, common arguments, and the objects that arguments name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from llava_core.runtime import printable

Result = dict[str, Any]
Commands = Any  # what argparse's `add_subparsers` gives


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = names(text)
        if not chosen or not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"'{text}': choose from {', '.join(known)}, with commas between")
        return chosen

    return parse


def _assignment(text: str) -> tuple[str, Any]:
    from llava_core.config_files import parse_yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"'{text}': write KEY=VALUE, e.g. train.learning_rate=0.001")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': the value is not valid YAML") from None


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}': give a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': give a whole number above 0")
    return int(text)


def _price(text: str) -> tuple[float, float]:
    prompt, reply = (float(part) for part in text.split(","))
    return prompt, reply


class Parser(argparse.ArgumentParser):
    def __init__(self, text: str, example: str, **more: Any) -> None:
        super().__init__(
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def option(self, name: str, metavar: str, text: str, **more: Any) -> None:
        self.add_argument(name, metavar=metavar, help=text, **more)

    def path(self, name: str, metavar: str, text: str, **more: Any) -> None:
        self.option(name, metavar, text, type=Path, **more)

    def number(self, name: str, default: int, text: str) -> None:
        self.option(name, "N", f"{text} (default: {default})", type=int, default=default)

    def switch(self, name: str, text: str) -> None:
        self.add_argument(name, action="store_true", help=text)

    def choice(self, name: str, known: Sequence[str], default: str, text: str = "") -> None:
        self.add_argument(name, choices=known, default=default, help=text or f"default: {default}")

    def assignments(self, text: str, *names: str, metavar: str = "KEY=VALUE") -> None:
        options = names or ("--set",)
        self.add_argument(*options, action="append", default=[], type=_assignment, metavar=metavar, help=text)

    def images(self, more: str) -> None:
        self.path("--images", "DIR", f"folder of the images{more}")

    def limit(self, what: str = "") -> None:
        self.option("--limit", "N", f"only the first N{what}", type=_count)

    def scale(self) -> None:
        self.add_argument(
            "--scale",
            default="mini",
            help="hardware and data: a file of configs/scales, without its extension (default: mini)",
        )

    # a checkpoint; `options` and `loaded` read these

    def checkpoint(self, either: Any = None) -> None:
        text = "a checkpoint of any format but a delta"
        (either or self).add_argument("--model", type=Path, required=either is None, metavar="DIR", help=text)

    def bases(self) -> None:
        self.option("--base", "DIR", "language model of a projector, a LoRA or a .pth")
        self.option("--vision-tower", "DIR", "tower, instead of the one that the files name")

    def assumptions(self) -> None:
        self.add_argument(
            "--assume", "--set", dest="set", action="append", default=[], type=_assignment, metavar="KEY=VALUE",
            help="a value that the files do not specify, e.g. template=v0_exact or image_position=last; once for each",
        )  # fmt: skip

    # a chat model; `chat_client` reads these

    def client(self, *more: str) -> None:
        self.choice("--client", ["offline", "replay", "record", *more, "live"], "offline", "source of the replies")

    def chat_model(self, text: str, name: str = "--model") -> None:
        self.add_argument(name, default="gpt-4-0314", help=f"the {text}, by its name on the server")

    def cassette(self, more: str) -> None:
        self.path("--cassette", "FILE", f"recorded replies{more}")

    def server(self, recording: str = "record") -> None:
        self.option("--base-url", "URL", "an OpenAI-compatible server (default: OpenAI's)")
        self.option("--budget-usd", "USD", f"stop before more is spent ({recording}: in all runs)", type=float)

    def pace(self) -> None:
        self.option("--price", "PROMPT,REPLY", "USD per million tokens, for an unlisted model", type=_price)
        self.option(
            "--concurrency", "N", "concurrent requests; record repeats these after kill -9", type=int, default=8
        )

    def reply_tokens(self, default: int) -> None:
        self.number("--max-tokens", default, "longest reply, a model's reasoning included")

    def timeout(self) -> None:
        self.option("--timeout", "SECONDS", "without data from the server", type=positive, default=120.0)

    def seed(self) -> None:
        self.add_argument("--seed", type=int, default=0, help="for random draws per record")

    def teacher(self, tape: str, name: str = "--model", max_tokens: int = 1024) -> None:
        self.client()
        self.reply_tokens(max_tokens)
        self.cassette(f"; {tape} if not given")
        self.chat_model("chat model", name)
        self.server()
        self.pace()
        self.timeout()
        self.seed()


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def options(args: argparse.Namespace) -> Any:
    from llava_core.checkpoints.describe import Options

    return Options(base=args.base, vision_tower=args.vision_tower)


def loaded(args: argparse.Namespace, device: str = "auto", dtype: str | None = None) -> Any:
    """Load the model of --model; the default dtype depends on the device."""
    from llava_core.checkpoints.load import load
    from llava_core.runtime import resolve_device, resolve_dtype

    place = resolve_device(device)
    number_type = resolve_dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    return load(args.model, number_type, place, options(args), **dict(args.set))


def chat_client(args: argparse.Namespace, tape: Path) -> Any:
    from companion.miniature.offline_chat import respond
    from companion.teacher.client import PAID_CLIENTS, client_from_name

    live: dict[str, Any] = {}
    if args.client in PAID_CLIENTS:
        waiting = "poll" if args.client == "batch" else "concurrency"
        live = given(args, "base_url", "budget_usd", "price", "timeout", waiting)
    responder = partial(respond, error=getattr(args, "teacher_error", 0.0))
    return client_from_name(args.client, responder=responder, cassette=tape, **live)


def group(into: Commands, name: str, text: str, example: str) -> Commands:
    return into.add_parser(name, help=text, text=text, example=example).add_subparsers(metavar="COMMAND", required=True)


def table(result: Result) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, str):
            return value
        shortened = json.loads(json.dumps(value, default=str), parse_float=lambda digits: float(f"{float(digits):.4g}"))
        return json.dumps(shortened, ensure_ascii=False)

    return "\n".join(f"{key:16} {text(value)}" for key, value in result.items())


def command(
    into: Commands,
    name: str,
    text: str,
    example: str,
    run: Callable[[argparse.Namespace], Result | None],
    show: Callable[[Result], str] = table,
    failed: Callable[[Result], bool] = lambda result: False,
    interactive: bool = False,
) -> Parser:
    """Add a command: `show` prints the result of `run`; the exit code is 1 where `failed` is true of it."""
    new: Parser = into.add_parser(name, help=text, text=text, example=example)
    if not interactive:
        new.switch("--json", "print one JSON object on stdout and nothing else")
    new.set_defaults(run=run, show=show, failed=failed, interactive=interactive)
    return new
