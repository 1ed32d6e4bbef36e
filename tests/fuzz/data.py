"""Damaged data: records, tables, folders of images, COCO and ScienceQA files, captions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .case import Target
from .checkpoints import damage_bytes, damage_file, damage_json

IMAGES = {"a.png": {}, "b.jpg": {"progressive": True}, "c.gif": {}, "d.webp": {}, "e.tif": {}, "f.bmp": {}, "g.ppm": {}}
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
PROBLEM = {
    "question": "Why?", "choices": ["a", "b"], "answer": 0, "subject": "natural science", "grade": "grade2",
    "split": "train", "image": "image.png", "hint": "", "lecture": "", "solution": "",
}  # fmt: skip


def prepare(folder: Path) -> list[Path]:
    """Write a folder for each kind of data."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for name, options in IMAGES.items():
        Image.effect_noise((64, 48), 60).convert("RGB").save(pictures / name, **options)
        (pictures / name).with_suffix(".txt").write_text("A cat on a mat.")
    records = [{"id": str(k), "image": name, "conversations": TURNS} for k, name in enumerate(IMAGES)] * 3
    files = {"list": "chat.json", "lines": "chat.jsonl", "table": "chat.parquet", "csv": "rows.csv", "tsv": "web.tsv"}
    for kind in (*files, "stream", "coco", "scienceqa"):
        (folder / kind).mkdir()
    (folder / "list" / "chat.json").write_text(json.dumps(records))
    (folder / "lines" / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), folder / "table" / "chat.parquet")
    rows = [f'{k},"Why, {k}?",So.,"{json.dumps(TURNS[1:]).replace(chr(34), chr(34) * 2)}"' for k in range(20)]
    (folder / "csv" / "rows.csv").write_text("\n".join(["id,question,answer,extra", *rows]))
    (folder / "tsv" / "web.tsv").write_text("".join(f"a cat on mat {k}\thttp://a/{k}.jpg\n" for k in range(40)))
    table = pa.Table.from_pylist([{"question": f"Why {k}?", "answer": "So."} for k in range(40)])
    with (
        pa.OSFile(str(folder / "stream" / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (folder / "stream" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 9, "height": 9} for k in range(4)]
    captions = {"images": images, "annotations": [{"image_id": k, "caption": "A cat."} for k in range(4)]}
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [0, 0, 3, 3]} for k in range(4)]
    instances = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "coco" / "captions_a.json").write_text(json.dumps(captions))
    (folder / "coco" / "instances_a.json").write_text(json.dumps(instances))
    problems = {str(k): PROBLEM for k in range(4)}
    (folder / "scienceqa" / "problems.json").write_text(json.dumps(problems))
    (folder / "scienceqa" / "pid_splits.json").write_text(json.dumps({"train": ["0", "1"], "val": ["2"]}))
    for name in problems:
        image = folder / "scienceqa" / "images" / "train" / name / "image.png"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(image)
    return sorted(path for path in folder.iterdir() if path.is_dir())


def commands(path: Path, out: Path) -> list[list[str]]:
    """Return the commands that read a folder of data."""
    file = next((str(file) for file in path.iterdir() if file.name.startswith(("chat.", "rows.", "web."))), str(path))
    skipping = ["data", "convert", file, "--to", f"{out}.json", "--skip"]
    if path.name == "pictures":
        records = [{"id": name, "image": name, "conversations": TURNS} for name in IMAGES]
        chat = path.parent / "pictures.json"
        chat.write_text(json.dumps(records))
        return [skipping, ["data", "check", str(chat), "--images", file]]
    return {
        "tsv": [["filter", "--captions", file, "--out", str(out), "--set", "phrases=rules", "--processes", "1"]],
        "coco": [["generate", "--annotations", file, "--out", str(out)]],
        "scienceqa": [["data", "scienceqa", file]],
        "csv": [skipping],
        "stream": [skipping],
    }.get(
        path.name,
        [["data", "check", file, "--fix", f"{out}.jsonl"], ["data", "audit", file, "--out", f"{out}.audit"], skipping],
    )


def mutate(path: Path, draw: random.Random) -> str:
    """Damage one file of a folder of data."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.is_symlink()]
    files = [file for file in files if file.stat().st_size < 10**7]
    if not files:
        return "nothing"
    file = draw.choice(files)
    kinds: list[Callable[[Path, random.Random], str]] = [damage_file, damage_bytes, damage_bytes]
    if file.suffix == ".json":
        kinds += [damage_json] * 6
    if file.suffix in (".jsonl", ".csv", ".tsv", ".txt"):
        kinds += [_damage_line] * 4
    return f"{file.relative_to(path)}: {draw.choice(kinds)(file, draw)}"


_LINES: list[Any] = [
    "[" * 500 + "]" * 500, "\ud800\udfff", "\x1b[31m", "\0", "<image>" * 9, "<img>" * 10**4, '"', "x" * 10**6, '{"id":',
    " " * 10**6, "NaN", "1e999", "-1", "../../etc/passwd", "\u2028", "![" * 10**4, "\t", ",",
]  # fmt: skip


def _damage_line(file: Path, draw: random.Random) -> str:
    lines = file.read_bytes().split(b"\n")
    k, text = draw.randrange(len(lines)), draw.choice(_LINES)
    at = draw.randrange(len(lines[k]) + 1)
    lines[k] = lines[k][:at] + text.encode(errors="surrogatepass") + lines[k][at:]
    if draw.random() < 0.1:
        lines += [lines[k]] * min(10**5, 10**7 // (1 + len(lines[k])))
    file.write_bytes(b"\n".join(lines))
    return f"{text[:20]!r} in line {k + 1}"


TARGET = Target(prepare, mutate, commands, reports=True)
