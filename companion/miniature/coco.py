"""mini-coco: scenes with five captions and exact boxes in COCO 2014's formats, questions; `render` draws all sets."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from companion.miniature import language
from companion.miniature.world import CATEGORIES, Item, Scene, draw_scene, sample_scene
from llava_core.runtime import CompanionError, progress, write_json, write_jsonl

IMAGE_SIZE = 224
QUALITY = 92
QUESTIONS_PER_VAL_IMAGE = 2
_JOBS_PER_WORKER = 48  # fewer are drawn faster in this process
_INFO = {"description": "llava-core miniature of COCO 2014", "version": "1.0", "year": 2014}
_LICENSES = [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}]


def scenes(seed: int, train: int, val: int) -> dict[str, list[Scene]]:
    """The scenes of mini-coco by split, with random image ids in rising order as in COCO."""
    rng = random.Random(f"coco-ids-{seed}")
    ids = rng.sample(range(1, 600_000), train + val)
    return {
        split: [sample_scene(i, seed) for i in sorted(part)]
        for split, part in (("train", ids[:train]), ("val", ids[train:]))
    }


def file_name(split: str, image_id: int) -> str:
    return f"COCO_{split}2014_{image_id:012d}.jpg"


def captions_of(scene: Scene, seed: int) -> list[str]:
    return language.captions(scene, random.Random(f"coco-captions-{seed}-{scene.id}"))


def visible_box(item: Item) -> tuple[float, ...]:
    return tuple(min(max(v, 0.0), 1.0) for v in item.box)


def write_coco(root: Path, *, seed: int, train: int, val: int) -> dict[str, int]:
    """Write mini-coco with that many images of train2014 and val2014; returns counts."""
    counts: Counter[str] = Counter()
    jobs = []
    for split, members in scenes(seed, train, val).items():
        folder = root / f"{split}2014"
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [(scene, folder / file_name(split, scene.id)) for scene in members]
        captions, instances = _captions(members, seed), _instances(members)
        shared = {"info": _INFO, "licenses": _LICENSES, "images": [_image(split, s) for s in members]}
        kinds = [{"id": k, "name": n, "supercategory": s} for k, (n, s) in enumerate(CATEGORIES.items(), start=1)]
        annotations = root / "annotations"
        write_json(annotations / f"captions_{split}2014.json", shared | {"annotations": captions})
        write_json(
            annotations / f"instances_{split}2014.json", shared | {"annotations": instances, "categories": kinds}
        )
        asked = _questions(split, members, seed)
        write_jsonl(root / f"questions_{split}.jsonl", asked)
        counts += Counter(
            {f"{split}_images": len(members), f"{split}_captions": len(captions), f"{split}_boxes": len(instances)}
        )
        counts[f"{split}_questions"] = len(asked)
    render(jobs, "drawing mini-coco")
    return dict(counts)


def _image(split: str, scene: Scene) -> dict[str, Any]:
    name = file_name(split, scene.id)
    return {"id": scene.id, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE, "license": 1}


def _captions(members: Sequence[Scene], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for scene in members:
        for text in captions_of(scene, seed):
            rows.append({"id": 10 * scene.id + len(rows) % 5, "image_id": scene.id, "caption": text})
    return rows


def _instances(members: Sequence[Scene]) -> list[dict[str, Any]]:
    ids = {name: k for k, name in enumerate(CATEGORIES, start=1)}
    rows = []
    for scene in members:
        for k, item in enumerate(scene.items):
            x1, y1, x2, y2 = (round(v * IMAGE_SIZE, 2) for v in visible_box(item))
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            rows.append(
                {
                    "id": 10 * scene.id + k,
                    "image_id": scene.id,
                    "category_id": ids[item.category],
                    "bbox": [x1, y1, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],  # the box: COCO's tools require one
                }
            )
    return rows


def _questions(split: str, members: Sequence[Scene], seed: int) -> list[dict[str, Any]]:
    """All questions of train images; two per val image, of the rarest kinds so far, so that the kinds are balanced."""
    rows: list[dict[str, Any]] = []
    asked: Counter[str] = Counter()
    for scene in members:
        pool = language.questions(language.facts_of_scene(scene), random.Random(f"coco-questions-{seed}-{scene.id}"))
        if split == "val":
            chosen: list[language.QA] = []
            while pool and len(chosen) < QUESTIONS_PER_VAL_IMAGE:
                chosen.append(min(pool, key=lambda qa: asked[qa.kind]))
                asked[chosen[-1].kind] += 1
                pool = [qa for qa in pool if qa.kind != chosen[-1].kind]
            pool = chosen
        for qa in pool:
            row = {"question_id": len(rows), "image": file_name(split, scene.id), "text": qa.question}
            rows.append(row | {"answer": qa.answer, "kind": qa.kind})
    return rows


def render(jobs: Sequence[tuple[Scene, Path]], desc: str) -> None:
    """Write images of scenes, on all cores if there are many; their folders exist.

    Raises:
        CompanionError: a worker process failed.
    """
    n = min(os.cpu_count() or 1, len(jobs) // _JOBS_PER_WORKER)
    if n < 2:
        for scene, path in progress(jobs, desc, disable=len(jobs) < _JOBS_PER_WORKER):
            draw_scene(scene, IMAGE_SIZE).save(path, quality=QUALITY)
        return
    # no multiprocessing: a spawned child runs the caller's script again, and without a __main__ guard the script would
    # wait for its own lock forever
    reader, writer = os.pipe()
    command = [sys.executable, "-c", "from companion.miniature.coco import _worker; _worker()"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writer, env=paths) for _ in range(n)]
    os.close(writer)
    try:
        for k, worker in enumerate(workers):
            with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:  # type: ignore[union-attr]
                pipe.write(pickle.dumps(jobs[k::n]))
        with open(reader, "rb", buffering=0) as done, progress(len(jobs), desc) as bar:
            while drawn := done.read(4096):
                bar.update(len(drawn))
        if any(worker.wait() for worker in workers):
            raise CompanionError(f"{desc}: a worker process failed; its message is above")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _worker() -> None:
    """Draw the pickled jobs of stdin; write a byte to stdout after each."""
    for scene, path in pickle.load(sys.stdin.buffer):
        draw_scene(scene, IMAGE_SIZE).save(path, quality=QUALITY)
        os.write(1, b".")


__all__ = ["IMAGE_SIZE", "QUALITY", "captions_of", "file_name", "render", "scenes", "visible_box", "write_coco"]
