"""What the tests of paying teachers share: images without pixels, and a process of its own that asks about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from companion.data_tools.coco import AnnotatedImage
from llava_core.runtime import ROOT, write_jsonl

PROGRAM = """
import json, signal, sys
from pathlib import Path
from paid import images
from companion.teacher.client import client_from_name
from companion.teacher.generate import generate
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with SIGINT ignored
name, folder, count, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
client = client_from_name(name, cassette=folder / "tape.sqlite", **options)
print(json.dumps(generate(images(count), ["detail"], client, folder / "out")))
"""


def images(count: int) -> list[AnnotatedImage]:
    return [AnnotatedImage(f"{k:06d}", f"{k:06d}.jpg", [f"Car number {k}"], []) for k in range(count)]


def annotations(folder: Path, count: int) -> str:
    """A file of these images, as the command line takes it."""
    rows = [{"id": i.id, "image": i.image, "captions": i.captions, "instances": []} for i in images(count)]
    return str(write_jsonl(folder / "a.jsonl", rows))


def start(client: str, folder: Path, count: int, **options: Any) -> subprocess.Popen[str]:
    words = [client, str(folder), str(count), json.dumps(options)]
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    # a group of its own, so that the kill meets whatever the process started and did not set free
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        process_group=0,
        **pipes,
    )
