"""`llava chat`, `demo` and `bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from llava_core.cli.arguments import Commands, Parser, Result, command, group, options, table
from llava_core.runtime import ROOT, CompanionError


def _chat(args: argparse.Namespace) -> None:
    from llava_core.lab.chat import chat_in_terminal, open_assistant

    given = {name: value for name, value in vars(options(args)).items() if value}
    chat_in_terminal(open_assistant(args.model, **given, **dict(args.set)), args.image)


def _demo(args: argparse.Namespace) -> None:
    notebook = ROOT / "notebooks" / "60_chat_demo.ipynb"
    words = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--notebook-dir={ROOT}", str(notebook)]
    if subprocess.run(words, check=False).returncode:
        raise CompanionError("JupyterLab ended with an error; its lines above say why")


def _bench_generate(args: argparse.Namespace) -> Result:
    from llava_core.lab.bench_generate import bench_generate

    return bench_generate(args.model, args.batches, rounds=args.rounds, device=args.device)


def _bench_attention(args: argparse.Namespace) -> Result:
    from llava_core.lab.bench_attention import bench_attention

    return bench_attention(args.shapes, args.length, args.rows, args.rounds, args.device)


def _show_attention(result: Result) -> str:
    return table({key: value for key, value in result.items() if key != "cases"})


def _repeating(parser: Parser) -> None:
    parser.number("--rounds", 7, "repetitions")
    parser.choice("--device", ["cpu", "cuda", "auto"], "cpu")


def add(commands: Commands) -> None:
    example = "llava chat --model runs/finetune/mini/ID/checkpoint --image photo.jpg"
    new = command(commands, "chat", "chat about an image in the terminal", example, _chat, interactive=True)
    new.checkpoint()
    new.path("--image", "FILE", "the image; a line `/image FILE` takes another, an empty line ends", required=True)
    new.bases()
    new.facts()
    command(commands, "demo", "open the chat notebook in JupyterLab", "llava demo", _demo, interactive=True)

    into = group(commands, "bench", "measure speed beside a peer", "llava bench generate")
    example, text = "llava bench generate --model small", "greedy generation beside transformers' own"
    new = command(into, "generate", text, example, _bench_generate, failed=lambda result: not result["same_tokens"])
    new.choice("--model", ["tiny", "small", "smollm2-135m"], "small", "size; the weights are random")
    new.option("--batches", "N", "rows at once (default: 1 8)", type=int, nargs="+", default=[1, 8])
    _repeating(new)
    example, text = "llava bench attention --shapes 64", "attention over packed rows beside a padded batch"
    new = command(into, "attention", text, example, _bench_attention, _show_attention)
    known, text = ["vicuna-7b", "llama-3.2-1b", "128", "64", "tiny"], "heads and their size (default: 128 64)"
    new.add_argument("--shapes", nargs="+", choices=known, default=["128", "64"], help=text)
    new.number("--length", 2048, "tokens of a row")
    new.number("--rows", 1, "rows of the batch")
    _repeating(new)
