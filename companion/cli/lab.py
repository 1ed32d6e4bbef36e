"""`llava chat`, `demo` and `bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from companion.cli.arguments import Commands, Parser, Result, command, group, options, table
from llava_core.runtime import ROOT, CompanionError


def _chat(args: argparse.Namespace) -> None:
    from llava_core.chat import chat_in_terminal, open_assistant

    given = {name: value for name, value in vars(options(args)).items() if value}
    chat_in_terminal(open_assistant(args.model, **given, **dict(args.set)), args.image)


def _demo(args: argparse.Namespace) -> None:
    notebook = ROOT / "notebooks" / "60_chat_demo.ipynb"
    words = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--notebook-dir={ROOT}", str(notebook)]
    if subprocess.run(words, check=False).returncode:
        raise CompanionError("JupyterLab ended with an error; its lines above say why")


def _bench_generate(args: argparse.Namespace) -> Result:
    from benchmarks.lib.bench_generate import bench_generate

    return bench_generate(args.model, args.batches, rounds=args.rounds, device=args.device)


def _bench_attention(args: argparse.Namespace) -> Result:
    from benchmarks.lib.bench_attention import bench_attention

    return bench_attention(args.shapes, args.length, args.rows, args.rounds, args.device)


def _bench_train_step(args: argparse.Namespace) -> Result:
    from benchmarks.lib.bench import headline
    from benchmarks.lib.bench_train_step import bench_step

    sizes = args.model, args.stage, args.samples, args.per_image
    return headline(bench_step(*sizes, rounds=args.rounds, dtype=args.dtype, **_place(args)))


def _bench_loss(args: argparse.Namespace) -> Result:
    from benchmarks.lib.bench import headline
    from benchmarks.lib.bench_parts import bench_loss

    return headline(bench_loss(args.rows, rounds=args.rounds, **_place(args)))


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """Device and clock: computing time on a CPU, where other programs run too."""
    from llava_core.runtime import resolve_device

    device = resolve_device(args.device).type
    return {"device": device, "clock": "cpu" if device == "cpu" else "wall"}


def _without_cases(result: Result) -> str:
    return table({key: value for key, value in result.items() if key != "cases"})


def _repeating(parser: Parser, rounds: int = 7) -> None:
    parser.number("--rounds", rounds, "repetitions")
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
    new = command(into, "attention", text, example, _bench_attention, _without_cases)
    known, text = ["vicuna-7b", "llama-3.2-1b", "128", "64", "tiny"], "heads and their size (default: 128 64)"
    new.add_argument("--shapes", nargs="+", choices=known, default=["128", "64"], help=text)
    new.number("--length", 2048, "tokens of a row")
    new.number("--rows", 1, "rows of the batch")
    _repeating(new)
    example = "llava bench train-step --model 135m --stage 2 --peer transformers"
    text = "an optimizer step beside transformers' own model in a plain padded loop"
    new = command(into, "train-step", text, example, _bench_train_step, _without_cases)
    new.choice("--model", ["mini", "135m", "7b"], "mini", "size (default: mini); other weights than mini's are random")
    new.add_argument("--stage", type=int, choices=[1, 2], default=2, help="of the training (default: 2)")
    new.choice("--peer", ["transformers"], "transformers")
    new.option("--samples", "N", "of the step (default: 16 at mini, 8 elsewhere)", type=int)
    new.number("--per-image", 1, "samples of one image")
    new.choice("--dtype", ["float32", "bfloat16"], "float32")
    _repeating(new, 3)
    example, text = "llava bench loss --rows 512", "loss and gradients in chunks beside all logits at once"
    new = command(into, "loss", text, example, _bench_loss, _without_cases)
    new.number("--rows", 1024, "supervised positions")
    _repeating(new, 5)
