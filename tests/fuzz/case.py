"""One case of the fuzzer: a damaged copy of a sound input is read by the command line in a child with limits."""

from __future__ import annotations

import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from companion.cli import main
from llava_core.runtime import printable

SECONDS, BYTES = 10, 2 << 30
"""What reading one input may take."""
_CRASH = 70  # exit code of a child whose command raised


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        prepare: writes sound inputs, files or folders, into a new folder and returns their paths.
        mutate: damages a copy of an input in place and returns what it did, in a few words. A damage with code creates
            the file `executed` beside the input if it is run.
        commands: arguments of the `llava` commands that read an input; they may write below the path `out`.
        reports: whether a command may exit with 1 after a list of problems on stdout instead of an error.
        agree: whether the commands must all accept or all refuse an input.
    """

    prepare: Callable[[Path], list[Path]]
    mutate: Callable[[Path, random.Random], str]
    commands: Callable[[Path, Path], list[list[str]]]
    agree: bool = False
    reports: bool = False


def run_case(target: Target, sound: Sequence[Path], seed: int, folder: Path, keep: Path | None = None) -> str | None:
    """Damage a copy of one of the sound inputs and read it; return what is wrong with how it was read, or None."""
    draw = random.Random(seed)
    source = draw.choice(sound)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / source.name
    shutil.copytree(source, path, symlinks=True) if source.is_dir() else shutil.copyfile(source, path)
    damage = "; ".join(target.mutate(path, draw) for _ in range(draw.choice((1, 1, 1, 2))))
    codes = []
    for words in target.commands(path, folder / "out"):
        code, seconds, text = _run(words, folder / "text")
        codes.append(code)
        fault = _fault(code, seconds, text, path, words, target.reports)
        if (folder / "executed").exists():
            fault = "its code was executed"
        if fault is None and target.agree and len({code == 0 for code in codes}) > 1:
            fault = f"exits with {code}, the command before with {codes[0]}"
        if fault is not None:
            if keep is not None:
                shutil.copytree(folder, keep / str(seed), symlinks=True, dirs_exist_ok=True)
            return f"{source.name}: {damage}\n  llava {' '.join(words)}\n  {fault}"
    return None


def _run(words: list[str], output: Path) -> tuple[int, float, str]:
    """Run a command in a forked child; return exit code (negative: signal), seconds and what it printed."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, output)
    waiting = os.pidfd_open(child)
    if not select.select([waiting], [], [], 3 * SECONDS)[0]:
        os.killpg(child, signal.SIGKILL)
    os.close(waiting)
    _, status, usage = os.wait4(child, 0)
    wall = time.monotonic() - begin
    seconds = wall if wall > 2 * SECONDS else usage.ru_utime + usage.ru_stime  # the machine may be busy
    return os.waitstatus_to_exitcode(status), seconds, output.read_bytes().decode(errors="backslashreplace")


def _child(words: list[str], output: Path) -> None:
    code = _CRASH
    try:
        os.setpgid(0, 0)
        streams = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        question, end = os.pipe()
        os.write(end, b"what color is it?\n")
        os.close(end)
        os.dup2(question, 0)
        os.dup2(streams, 1)
        os.dup2(streams, 2)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(k, mode) for k, mode in ((0, "r"), (1, "w"), (2, "w")))
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # without files that are mapped to be read
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = main(words)
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fault(code: int, seconds: float, text: str, path: Path, words: list[str], reports: bool) -> str | None:
    """Return what is wrong with the result of a command: none but 0, or one line that names the file, is right."""
    if seconds > SECONDS:
        return f"takes {seconds:.0f} s"
    if code < 0:
        return f"ends by {signal.Signals(-code).name}"
    if "Traceback" in text or code == _CRASH:
        return f"a traceback:\n{text[-1500:]}"
    if printable(text, keep="\n\r\t") != text:
        return f"prints control characters: {text[-300:]!r}"
    errors = [line for line in text.splitlines() if re.match(r"(llava.*: )?error: ", line)]
    if code == 0:
        answered = not errors or words[0] == "chat"  # which goes on after a question that cannot be answered
        return None if answered else f"exits with 0 after: {errors[0][:300]}"
    if reports and code == 1 and not errors and re.search(r"[1-9]\d* problems", text):
        return None
    if len(errors) != 1:
        return f"exits with {code} and {len(errors)} lines of errors: {text[-300:]}"
    return None if path.name in errors[0] else f"a message that does not name {path.name}: {errors[0][:300]}"
