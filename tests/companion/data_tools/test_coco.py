"""COCO annotations: the official layout and the contexts of LLaVA-Bench give the same symbolic images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from companion.data_tools.coco import AnnotatedImage, load_annotations
from companion.teacher.prompts import context_text
from llava_core.runtime import DataError


def coco(folder: Path, split: str = "val2014", **changes: Any) -> Path:
    """Two images in COCO's own layout; `changes` replace tables of the instances' file."""
    images = [{"id": 9, "file_name": "COCO_9.jpg", "width": 200, "height": 100}]
    images.append({"id": 12, "file_name": "COCO_12.jpg", "width": 10, "height": 10})
    captions = [(9, "A dog.\n"), (12, "A cup."), (9, "One dog runs.")]
    boxes = [(9, 18, [20.0, 10, 100, 50], 0), (9, 44, [0, 0, 200, 101], 0), (9, 18, [0, 0, 9, 9], 1)]
    instances: dict[str, Any] = {
        "images": images,
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd}
            for k, (i, c, b, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 44, "name": "sports ball"}],
    }
    spoken = [{"id": k, "image_id": i, "caption": text} for k, (i, text) in enumerate(captions)]
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": spoken}))
    (folder / f"instances_{split}.json").write_text(json.dumps(instances | changes))
    return folder


def test_official_files_become_normalised_corners(tmp_path: Path) -> None:
    folder = coco(tmp_path / "annotations")
    dog, cup = load_annotations(folder)
    assert (dog.id, dog.image, dog.captions) == ("000000000009", "COCO_9.jpg", ["A dog.\n", "One dog runs."])
    assert dog.boxes == [("dog", (0.1, 0.1, 0.6, 0.6)), ("sports ball", (0.0, 0.0, 1.0, 1.0))]  # clipped to the image
    assert cup.boxes == []
    assert load_annotations(tmp_path) == load_annotations(folder / "captions_val2014.json") == [dog, cup]
    assert load_annotations(folder / "instances_val2014.json") == [dog, cup]


def test_context_has_captions_and_boxes_of_three_decimals() -> None:
    image = AnnotatedImage("1", "1.jpg", ["A dog.\n", "One\ndog runs."], [("sports ball", (0, 0.12345, 0.6999, 1))])
    assert context_text(image.captions, image.boxes) == "A dog.\nOne dog runs.\n\nsports ball: [0.0, 0.123, 0.7, 1.0]"
    assert context_text(image.captions) == "A dog.\nOne dog runs."


def test_several_splits_must_be_named(tmp_path: Path) -> None:
    coco(tmp_path, "val2014")
    coco(tmp_path, "train2014")
    assert len(load_annotations(tmp_path, "train2014")) == 2
    with pytest.raises(DataError, match=r"several splits \(train2014, val2014\)"):
        load_annotations(tmp_path)
    with pytest.raises(DataError, match="did you mean 'train2014'"):
        load_annotations(tmp_path, "train2015")
    (tmp_path / "instances_val2014.json").unlink()
    with pytest.raises(DataError, match=r"instances_val2014\.json: no such file"):
        load_annotations(tmp_path, "val2014")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": []}, "annotation 0: its image or category is not listed"),
        (
            {"annotations": [{"id": 5, "image_id": 9, "category_id": 18, "bbox": [1, 2, 3]}]},
            r"annotation 5: bbox \[1, 2, 3\]",
        ),
        ({"annotations": [{"id": 5, "image_id": 9, "bbox": [1, 2, 3, 4]}]}, "annotation 5: category_id is missing"),
        ({"images": {}}, "no list 'images'"),
    ],
)
def test_malformed_official_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_annotations(coco(tmp_path, **changes))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "1", "image": "1.jpg", "captions": ["A."]}, "record 0: instances is missing"),
        ({"id": "1", "image": "1.jpg", "captions": [], "instances": []}, "at least one"),
        (
            {
                "id": "1",
                "image": "1.jpg",
                "captions": ["A."],
                "instances": [{"category": "dog", "bbox": [10, 20, 30, 40]}],
            },
            "divide by the image's size",
        ),
        ({"type": "something else"}, "record 0: id is missing"),
    ],
)
def test_malformed_records_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        load_annotations(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="neither COCO annotations"):
        load_annotations(tmp_path / "a.json")


def test_real_contexts_of_the_bench(reference: Path) -> None:
    images = load_annotations(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl")
    assert len(images) == 80
    assert {len(image.captions) for image in images} == {5, 6}
    assert all(len(context_text(image.captions).split("\n")) == len(image.captions) for image in images)
    donuts = context_text(images[0].captions, images[0].boxes)
    assert donuts.startswith("A donut shop is full of different flavors of donuts.\n")
    assert "\n\ndonut: [0.37, 0.584, 0.504, 0.709]\n" in donuts


def test_context_reproduces_the_released_prompts_to_the_letter(reference: Path) -> None:
    files = sorted((reference / "coco" / "prompts").glob("*/*_caps.txt"))
    for file in files:
        text = file.read_text()
        captions, _, lines = text.partition("\n\n")
        boxes = [
            (name, json.loads(box)) for name, _, box in (line.partition(": ") for line in lines.split("\n") if line)
        ]
        image = AnnotatedImage("1", "1.jpg", captions.split("\n"), boxes)
        assert context_text(image.captions, image.boxes) == text
    assert len(files) == 8
