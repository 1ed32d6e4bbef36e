"""`llava`: the command line. Each command imports its code when it runs, so `--help` is fast.

Every command shows progress on stderr and its result on stdout (with `--json`: exactly one JSON object). Exit codes: 0;
1 when the work failed (one line on stderr says why); 2 for wrong usage; 75 when training was stopped and can resume;
141 when the reader of the output stopped (`llava inspect DIR | head -1`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from companion.cli import ablations, bench, data, evaluate, experiments, lab, miniature, plan, weights
from companion.cli.arguments import Parser
from llava_core import __version__
from llava_core.runtime import ROOT, CompanionError, printable, printable_stderr


def _parser(words: Sequence[str] = ()) -> Parser:
    text = "Visual Instruction Tuning, step by step: train, evaluate and reproduce LLaVA"
    parser = Parser(text, "llava reproduce", prog="llava")
    parser.add_argument("--version", action="version", version=f"llava-core {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for file in (experiments, ablations, evaluate, data, plan, weights, lab, miniature):
        file.add(commands)
    bench.add(commands, words)
    return parser


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect the work's output, also of child processes, to stderr."""
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
    """Run one command; return 0, or 1 when the work failed (wrong usage raises argparse's SystemExit(2))."""
    try:
        try:
            with printable_stderr():
                return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return 141  # as of a process that SIGPIPE ends


def _message(error: OSError) -> str:
    """The error in a sentence; the system's own names no fix where a file or a folder is not ours to read or write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: not written: {error.strerror}; free the disk, or give another place"
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return str(error)
    path = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else ROOT
    if path.is_file() and not os.access(path, os.R_OK):
        return f"{path}: may not be read; change its permissions (chmod u+r)"
    folder = next((parent for parent in path.parents if parent.is_dir()), path)
    inside = path.is_relative_to(ROOT) and "copy the project to a folder of yours and run it there"
    fix = inside or "give another place for the output"
    return f"{folder}: may not be written ({error.strerror or 'no permission'}); {fix}, or change its permissions"


def _printable(value: Any) -> Any:
    """A result whose texts have no line breaks, so that each line of its table is ours; a `script` is ours."""
    if isinstance(value, dict):
        return {_printable(key): part if key == "script" else _printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return printable(value) if isinstance(value, str | Path) else value


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = _parser(words).parse_args(words)
    try:
        if args.interactive:
            args.run(args)
            return 0
        with _stdout_to_stderr():
            result = args.run(args)
        if args.json:
            text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=str)
        else:
            text = args.show(_printable(result))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("llava_core", "companion"):
            raise
        print(f"error: the package '{error.name}' is not installed; `make setup` installs it", file=sys.stderr)
        return 1
    except (CompanionError, OSError) as error:
        if args.interactive and isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error if isinstance(error, CompanionError) else printable(_message(error))}", file=sys.stderr)
        if "WORLD_SIZE" in os.environ:  # one rank of several: exit handlers of a process group wait for the others
            sys.stderr.flush()
            os._exit(getattr(error, "exit_code", 1))
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    print(printable(text, keep="\n\t"))
    return int(args.failed(result))
