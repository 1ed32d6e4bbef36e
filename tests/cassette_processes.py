"""Annotations without pixels, and processes that record with a cassette, for the tests of paid clients."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from companion.data_tools.coco import AnnotatedImage
from companion.teacher.chat import MAX_TOKENS, ChatClient
from companion.teacher.generate import MODEL, ask, requests_for, write
from llava_core.runtime import ROOT, write_jsonl

PROGRAM = """
import json, signal, sys
from pathlib import Path
from cassette_processes import annotated_images, generate
from companion.teacher.client import client_from_name
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with SIGINT ignored
name, folder, count, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
client = client_from_name(name, cassette=folder / "tape.sqlite", **options)
print(json.dumps(generate(annotated_images(count), ["detail"], client, folder / "out")))
"""


def generate(
    images: Sequence[AnnotatedImage],
    kinds: Sequence[str],
    client: ChatClient,
    out: Path,
    prompts: Any = None,
    model: str = MODEL,
    max_tokens: int = MAX_TOKENS,
    **choices: Any,
) -> dict[str, Any]:
    """Ask for instruction data and write it, as `llava generate` does; `choices` are those of `write`."""
    jobs = list(requests_for(images, kinds, prompts, model, max_tokens))
    return write(ask(jobs, client), kinds, out, prompts=prompts, **choices)


def annotated_images(count: int) -> list[AnnotatedImage]:
    return [AnnotatedImage(f"{k:06d}", f"{k:06d}.jpg", [f"Car number {k}"], []) for k in range(count)]


def write_annotations(folder: Path, count: int) -> str:
    """Write a file of these images and return its path, as the command line takes it."""
    rows = [{"id": i.id, "image": i.image, "captions": i.captions, "instances": []} for i in annotated_images(count)]
    return str(write_jsonl(folder / "a.jsonl", rows))


def start_recording(client: str, folder: Path, count: int, **options: Any) -> subprocess.Popen[str]:
    """A process that generates descriptions of `count` images with the named client and options."""
    words = [client, str(folder), str(count), json.dumps(options)]
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    # a process group of its own: the test kills whatever the process has started
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        process_group=0,
        **pipes,
    )


@contextlib.contextmanager
def locked_cassette(cassette: Path) -> Iterator[None]:
    """Keep a cassette locked by another process."""
    program = (
        "import sys; from pathlib import Path; from companion.teacher.cassette import WriterLock\n"
        "try:\n lock = WriterLock(Path(sys.argv[1]), 0.1)\n"
        "except Exception as error:\n print(error, flush=True)\n"
        "else:\n print('locked', flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", program, str(cassette)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, **pipes) as process:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        assert answer == "locked", answer
        yield
        assert process.stdin is not None
        process.stdin.close()
