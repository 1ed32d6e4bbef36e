"""COCO captions and boxes: the symbolic representation of an image for a text-only teacher (paper, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.data.instruct import leaves_folder
from llava_core.registry import unknown
from llava_core.runtime import DataError, display_path, read_json, read_jsonl, shortened

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedImage:
    """Captions and boxes of an image.

    Attributes:
        id: COCO's image id, 12 digits.
        image: file name, relative to the folder of images.
        boxes: (category, (x1, y1, x2, y2)) per object; corners, from 0 to 1.
    """

    id: str
    image: str
    captions: list[str]
    boxes: list[tuple[str, Box]]


def load_annotations(path: str | Path, split: str | None = None) -> list[AnnotatedImage]:
    """Load the annotated images that have a caption, in the order of the file; the content decides the format.

    Boxes that COCO marks as a crowd of objects are left out.

    Args:
        path: a folder with `captions_<split>.json` and `instances_<split>.json` (or with a folder `annotations` that
            holds them), one of these two files, or a file of `{id, image, captions, instances}` records.
        split: split of a folder that has several, e.g. `train2014`.

    Raises DataError if a file is missing or a record has another format.
    """
    path = Path(path)
    if path.is_dir():
        return _from_coco(*_pair(path, split))
    if path.suffix == ".jsonl":
        return [_from_record(record, f"{display_path(path)}, record {k}") for k, record in enumerate(read_jsonl(path))]
    content = read_json(path)
    if isinstance(content, list):
        return [_from_record(record, f"{display_path(path)}, record {k}") for k, record in enumerate(content)]
    kind, _, name = path.stem.partition("_")
    if kind not in ("captions", "instances") or not isinstance(content, dict) or "annotations" not in content:
        raise DataError(
            f"{display_path(path)}: neither COCO annotations (captions_<split>.json, instances_<split>.json) nor a "
            "list of {id, image, captions, instances}; name one of these"
        )
    return _from_coco(*_pair(path.parent, name))


def _pair(folder: Path, split: str | None) -> tuple[Path, Path]:
    if not list(folder.glob("captions_*.json")) and (folder / "annotations").is_dir():
        folder = folder / "annotations"
    splits = sorted(file.stem.removeprefix("captions_") for file in folder.glob("captions_*.json"))
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        wanted = (
            f"several splits ({', '.join(splits)})"
            if split is None and splits
            else unknown("split", str(split), splits)
        )
        raise DataError(f"{display_path(folder)}: {wanted}; name a split that has a captions_<split>.json there")
    pair = folder / f"captions_{split}.json", folder / f"instances_{split}.json"
    if not pair[1].is_file():
        raise DataError(f"{display_path(pair[1])}: no such file; put COCO's instances next to its captions")
    return pair


def _from_coco(captions_file: Path, instances_file: Path) -> list[AnnotatedImage]:
    captions = _tables(captions_file, "images", "annotations")
    instances = _tables(instances_file, "images", "annotations", "categories")
    where = f"{display_path(captions_file)}, image"
    texts: dict[int, list[str]] = {}
    for entry in captions["annotations"]:
        _require(entry, {"image_id": int, "caption": str}, f"{display_path(captions_file)}, annotation {_id(entry)}")
        texts.setdefault(entry["image_id"], []).append(entry["caption"])
    names: dict[int, str] = {}
    for entry in instances["categories"]:
        _require(entry, {"id": int, "name": str}, f"{display_path(instances_file)}, category {_id(entry)}")
        names[entry["id"]] = entry["name"]
    sizes: dict[int, dict[str, Any]] = {}
    for entry in instances["images"]:
        _require(entry, {"id": int}, f"{display_path(instances_file)}, image {_id(entry)}")
        sizes[entry["id"]] = entry
    boxes: dict[int, list[tuple[str, Box]]] = {}
    for entry in instances["annotations"]:
        place = f"{display_path(instances_file)}, annotation {_id(entry)}"
        _require(entry, {"image_id": int, "category_id": int, "bbox": list}, place)
        if entry.get("iscrowd"):
            continue
        image, category = sizes.get(entry["image_id"]), names.get(entry["category_id"])
        if image is None or category is None:
            raise DataError(f"{place}: its image or category is not listed in the file; write the file again")
        boxes.setdefault(entry["image_id"], []).append((category, _corners(entry["bbox"], image, place)))
    result = []
    for entry in captions["images"]:
        _require(entry, {"id": int, "file_name": str}, f"{where} {_id(entry)}")
        _check_name(entry["file_name"], f"{where} {_id(entry)}")
        if entry["id"] in texts:
            image_id = entry["id"]
            result.append(
                AnnotatedImage(f"{image_id:012d}", entry["file_name"], texts[image_id], boxes.get(image_id, []))
            )
    return result


def _tables(path: Path, *keys: str) -> dict[str, list[Any]]:
    content = read_json(path)
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{display_path(path)}: no list '{key}'; is it the official COCO file?")
    return dict(content)


def _id(entry: Any) -> str:
    return shortened(entry.get("id", "without an id") if isinstance(entry, dict) else repr(entry))


def _check_name(name: str, place: str) -> None:
    if leaves_folder(name):
        raise DataError(f"{place}: the file {shortened(name)} leaves the folder of images; give a path relative to it")


def _require(entry: Any, fields: dict[str, type], place: str) -> None:
    for field, kind in fields.items():
        value = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > 2**63):
            raise DataError(
                f"{place}: {field} is missing or no {kind.__name__}; correct the entry or take the official file"
            )


def _is_box(box: list[Any]) -> bool:
    return len(box) == 4 and all(isinstance(x, int | float) and abs(x) < 1e9 for x in box)  # NaN is not below it


def _corners(box: list[Any], image: dict[str, Any], place: str) -> Box:
    """COCO's [left, top, width, height] in pixels as corners from 0 to 1."""
    _require(image, {"width": int, "height": int}, f"{place}, image {_id(image)}")
    if not _is_box(box) or min(image["width"], image["height"]) < 1:
        raise DataError(
            f"{place}: bbox {shortened(box)} is not [left, top, width, height] in an image of positive size; correct it"
        )
    left, top, width, height = box
    across, down = image["width"], image["height"]
    corners = (left / across, top / down, (left + width) / across, (top + height) / down)
    x1, y1, x2, y2 = (min(1.0, max(0.0, x)) for x in corners)
    return x1, y1, x2, y2


def _from_record(record: Any, place: str) -> AnnotatedImage:
    """One `{id, image, captions, instances: [{category, bbox}]}`, boxes normalised: a context of LLaVA-Bench."""
    _require(record, {"id": str, "image": str, "captions": list, "instances": list}, place)
    if not record["captions"] or not all(isinstance(caption, str) for caption in record["captions"]):
        raise DataError(f"{place}: captions is not a list of at least one string; correct it")
    _check_name(record["image"], place)
    boxes: list[tuple[str, Box]] = []
    for instance in record["instances"]:
        _require(instance, {"category": str, "bbox": list}, place)
        box = instance["bbox"]
        good = _is_box(box) and all(0 <= x <= 1 for x in box)
        if not good or box[0] > box[2] or box[1] > box[3]:
            raise DataError(
                f"{place}: bbox {shortened(box)} is not [x1, y1, x2, y2] with 0 <= x1 <= x2 <= 1; divide by "
                "the image's size"
            )
        boxes.append((instance["category"], (box[0], box[1], box[2], box[3])))
    return AnnotatedImage(record["id"], record["image"], list(record["captions"]), boxes)
