"""The miniature: a small closed world in the official file formats of the paper's data sets, drawn and written by seed.

`ensure()` is what everything else calls: it writes the sets that are missing or stale and returns their folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_core import runtime
from llava_core.runtime import ConfigError, DataError, atomic_write, fingerprint, read_json, sha256_file, write_json


@dataclass(frozen=True)
class Sizes:
    """How much of each set is written: lines, images or problems."""

    cc3m_lines: int = 4000
    coco_train: int = 1600
    coco_val: int = 300
    science_train: int = 1200
    science_val: int = 200
    science_test: int = 400
    bench_coco_images: int = 30
    bench_wild_images: int = 24


TINY = Sizes(12, 8, 4, 24, 8, 8, 2, 6)
"""A second's worth, for tests and dry runs."""


@dataclass(frozen=True)
class _Set:
    """What a set stands for, the modules that decide its files (the last has the writer), the writer's arguments."""

    about: str
    modules: tuple[str, ...]
    writer: str
    arguments: Callable[[Sizes], dict[str, Any]]


SETS = {
    "mini-cc3m": _Set(
        "Web captions and images in the layout of Conceptual Captions 3M: `Train_GCC-training.tsv` (caption, URL) and "
        "`images/GCC_train_<9 digits>.jpg`, numbered by line from 0. Dead URLs have no image, a few images are cut.",
        ("coco", "cc3m"),
        "write_cc3m",
        lambda s: {"lines": s.cc3m_lines},
    ),
    "mini-coco": _Set(
        "Drawn scenes with five captions and exact boxes in the format of COCO 2014, and factual questions.",
        ("coco",),
        "write_coco",
        lambda s: {"train": s.coco_train, "val": s.coco_val},
    ),
    "mini-scienceqa": _Set(
        "Multiple-choice science questions with lecture and solution, some with an image, in the format of ScienceQA.",
        ("../data_tools/scienceqa", "scienceqa"),
        "write_scienceqa",
        lambda s: {"sizes": {"train": s.science_train, "val": s.science_val, "test": s.science_test}},
    ),
    "bench-coco": _Set(
        "Val scenes of mini-coco, three questions each (conversation, detail, reasoning), as in LLaVA-Bench (COCO).",
        ("coco", "benches"),
        "write_bench_coco",
        lambda s: {"images": s.bench_coco_images, "train": s.coco_train, "val": s.coco_val},
    ),
    "bench-wild": _Set(
        "Scenes with pairings of color and category that no training image shows, as in LLaVA-Bench (In-the-Wild).",
        ("coco", "benches"),
        "write_bench_wild",
        lambda s: {"images": s.bench_wild_images},
    ),
}


def default_root() -> Path:
    """Where the scale `mini` expects the sets."""
    return runtime.ROOT / "data" / "mini"


def generator_version(name: str) -> str:
    """Fingerprint of the modules that a set depends on and of their YAML tables."""
    here = Path(__file__).parent
    modules = ("display_list", "sprites", "backgrounds", "world", "language", *SETS[name].modules)
    files = [here / f"{module}{suffix}" for module in modules for suffix in (".py", ".yaml")]
    return fingerprint({file.name: sha256_file(file) for file in files if file.exists()})


def write(
    root: Path | None = None, seed: int = 0, only: Collection[str] | None = None, sizes: Sizes | None = None
) -> dict[str, dict[str, Any]]:
    """Write the sets, each as a folder of `root` with `card.json` and `card.md`, replacing what is there.

    Args:
        root: folder of the sets, made if missing; `data/mini` of the repository when None.
        seed: decides every file; equal arguments give equal bytes.
        only: names of the sets to write; all of `SETS` when None.
        sizes: how much; the sizes that the book uses when None.

    Returns:
        The card of each set written.

    Raises:
        ConfigError: `only` names an unknown set.
    """
    names, root = _checked(only), root or default_root()
    with _locked(root):
        return {name: _write_set(root, name, seed, sizes or Sizes()) for name in names}


def ensure(
    root: Path | None = None, seed: int = 0, only: Collection[str] | None = None, sizes: Sizes | None = None
) -> Path:
    """Write the sets that are missing, damaged or of another version, seed or size; quick when there is nothing to do.

    Any number of processes may call it at once: one writes, the others wait for it.

    Args:
        root: folder of the sets, made if missing; `data/mini` of the repository when None.
        seed: of the sets.
        only: names of the sets that are needed; all of `SETS` when None.
        sizes: how much; the sizes that the book uses when None.

    Returns:
        The folder of the sets.

    Raises:
        ConfigError: `only` names an unknown set.
    """
    names, root, sizes = _checked(only), root or default_root(), sizes or Sizes()
    if any(stale(root, name, seed, sizes) for name in names):
        with _locked(root):
            for name in names:
                if stale(root, name, seed, sizes):  # asked again: another process may have written it meanwhile
                    _write_set(root, name, seed, sizes)
    return root


def stale(root: Path, name: str, seed: int, sizes: Sizes) -> str | None:
    """Say why a set has to be written (again), or None.

    Every text file is compared by checksum, the images by their number and total size.
    """
    folder = root / name
    try:
        card = read_json(folder / "card.json")
    except DataError:
        return "no readable card.json"
    wanted = {"seed": seed, "sizes": asdict(sizes), "generator": generator_version(name)}
    for key, value in wanted.items():
        if card.get(key) != value:
            return f"another {key}"
    files, images = _content(folder)
    if {k: v for k, v in card["images"].items() if k != "sha256"} != _extent(images):
        return "images are missing or changed"
    known = card["files"]
    if sorted(known) != sorted(files) or any(sha256_file(files[k]) != known[k] for k in known):
        return "a file is missing or changed"
    return None


def _checked(only: Collection[str] | None) -> list[str]:
    unknown = sorted(set(only or ()) - set(SETS))
    if unknown:
        raise ConfigError(f"miniature: no set named {', '.join(unknown)}; known are {', '.join(SETS)}")
    return [name for name in SETS if only is None or name in only]


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lock the folder against other writers, and remove what a killed one left."""
    with runtime.file_lock(root / ".lock"):
        for left in root.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _write_set(root: Path, name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Write one set beside its place, then move it there, so that a folder under its name is always whole."""
    folder, fresh, old = root / name, root / f".{name}.{os.getpid()}.tmp", root / f".{name}.{os.getpid()}.old.tmp"
    fresh.mkdir()
    members = SETS[name]
    version = generator_version(name)  # asked first: an edit of the sources while it is written makes the set stale
    writer = getattr(importlib.import_module(f"{__name__}.{members.modules[-1]}"), members.writer)
    counts = writer(fresh, seed=seed, **members.arguments(sizes))
    files, images = _content(fresh)
    card = {
        "name": name,
        "about": members.about,
        "license": "Apache-2.0",
        "seed": seed,
        "generator": version,
        "sizes": asdict(sizes),
        "counts": counts,
        "files": {key: sha256_file(path) for key, path in files.items()},
        "images": _extent(images) | {"sha256": _combined(images)},
    }
    write_json(fresh / "card.json", card)
    atomic_write(fresh / "card.md", _card_text(card))
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
    return card


def _content(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The text files and the images of a set by relative path, cards left out."""
    every: dict[str, Path] = {}
    for at, _, names in os.walk(folder):
        prefix = at[len(str(folder)) :].strip(os.sep).replace(os.sep, "/")
        every |= {f"{prefix}/{name}".lstrip("/"): Path(at, name) for name in names}
    images = {key: every[key] for key in sorted(every) if key.endswith((".jpg", ".png"))}
    return {key: every[key] for key in sorted(every.keys() - images.keys() - {"card.json", "card.md"})}, images


def _extent(images: dict[str, Path]) -> dict[str, int]:
    return {"count": len(images), "bytes": sum(path.stat().st_size for path in images.values())}


def _combined(images: dict[str, Path]) -> str:
    whole = hashlib.sha256()
    for key, path in images.items():
        whole.update(f"{key} {sha256_file(path)}\n".encode())
    return whole.hexdigest()


def _card_text(card: dict[str, Any]) -> str:
    images = card["images"]
    rows = [
        ("license", card["license"]),
        ("seed", card["seed"]),
        ("generator", f"`{card['generator']}`"),
        *((key.replace("_", " "), value) for key, value in card["counts"].items()),
        (
            "images",
            f"{images['count']} files, {images['bytes'] / 1e6:.1f} MB, SHA-256 over all `{images['sha256'][:16]}`",
        ),
        *((f"`{key}`", f"SHA-256 `{value[:16]}`") for key, value in card["files"].items()),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    made = "Made by `companion.miniature` without any outside data; the full checksums are in `card.json`."
    return f"# {card['name']}\n\n{card['about']}\n\n{made}\n\n| | |\n|---|---|\n{table}\n"


__all__ = ["SETS", "TINY", "Sizes", "default_root", "ensure", "generator_version", "stale", "write"]
