"""`llava`: the one entry point. Each command imports what it needs when it runs, so `--help` is instant.

Every command shows its progress on stderr and its result on stdout (with `--json`: exactly one JSON object), and exits
with 0, with 1 when the work failed (one line on stderr says why) or with 2 when it was called in a wrong way.

A file of this package holds commands that belong together, first what they do and last, in `add`, how they are called.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence

from companion.cli import bench, data, evaluate, experiments, lab, miniature, weights
from companion.cli.arguments import Parser
from llava_core import __version__
from llava_core.runtime import CompanionError


def _parser(words: Sequence[str] = ()) -> Parser:
    text = "Visual Instruction Tuning, step by step: train, evaluate and reproduce LLaVA"
    parser = Parser(text, "llava reproduce", prog="llava")
    parser.add_argument("--version", action="version", version=f"llava-core {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for file in (experiments, evaluate, data, weights, lab, miniature):
        file.add(commands)
    bench.add(commands, words)
    return parser


@contextlib.contextmanager
def _stdout_is_for_the_result() -> Iterator[None]:
    """Send whatever the work prints, from child processes too, to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `llava`; the process's own when None.

    Returns:
        0, or 1 when the work failed (2, for a wrong call, leaves through argparse's SystemExit).
    """
    words = sys.argv[1:] if argv is None else argv
    args = _parser(words).parse_args(words)
    try:
        if args.interactive:
            args.run(args)
            return 0
        with _stdout_is_for_the_result():
            result = args.run(args)
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str) if args.json else args.show(result))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("llava_core", "companion"):
            raise
        print(f"error: the package '{error.name}' is not installed; `make setup` installs it", file=sys.stderr)
        return 1
    except (CompanionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return int(args.failed(result))
