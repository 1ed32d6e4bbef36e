"""Image availability: every fault is counted, unchanged images are checked once, and the filter continues."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from companion.data_tools import image_availability as module
from companion.data_tools.image_availability import image_availability
from llava_core.runtime import DataError


def test_filter_continues_after_broken_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "folder.jpg").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(images / "good.jpg")
    full = (images / "good.jpg").read_bytes()
    for name, content in {"cut.jpg": full[:-300], "empty.jpg": b"", "page.jpg": b"<html>404</html>"}.items():
        (images / name).write_bytes(content)
    names = ["good.jpg", "cut.jpg", "empty.jpg", "page.jpg", "folder.jpg", "none.jpg", "a\0b.jpg", "x" * 300, "/etc/x"]
    available, counts = image_availability(names, images)
    assert (counts.available, counts.missing + counts.unreadable) == (
        int(available.sum()),
        len(names) - 1 - int(available[1]),
    )
    assert available[0]
    assert not available[2:].any()
    assert [example["line"] for example in counts.examples][-7:] == list(range(3, 10))


def folder_of(path: Path, count: int) -> list[str]:
    path.mkdir()
    names = [f"{k}.jpg" for k in range(count)]
    for name in names[:-1]:
        Image.new("RGB", (16, 16)).save(path / name)
    (path / names[1]).write_bytes(b"<html>404</html>")
    return names  # the last one is missing, the second is no image


@pytest.mark.parametrize("processes", [1, 2])
def test_unchanged_images_are_not_rechecked(tmp_path: Path, processes: int) -> None:
    names, images, cache = folder_of(tmp_path / "images", 11), tmp_path / "images", tmp_path / "cache"
    with mock.patch.object(module, "SHARD", 4):
        first = image_availability(names, images, cache=cache, processes=processes)
        assert first[0].tolist() == [k not in (1, 10) for k in range(11)]
        assert (first[1].missing, first[1].unreadable) == (1, 1)
        assert [(e["line"], e["image"]) for e in first[1].examples] == [(2, "1.jpg"), (11, "10.jpg")]
        assert len(list(cache.glob("*/*.json"))) == 3
        looked: list[str] = []

        def look(path: Path) -> tuple[str, str] | None:
            looked.append(path.name)
            return None if path.exists() else ("missing_image", "there is no such image")

        with mock.patch.object(module, "image_fault", look):
            second = image_availability(names, images, cache=cache)
            assert looked == ["10.jpg"]  # a missing one may have come
            assert (second[0].tolist(), second[1]) == (first[0].tolist(), first[1])
            for name in ("1.jpg", "10.jpg", "3.jpg"):
                Image.new("RGB", (17, 17)).save(images / name)
            os.utime(images / "5.jpg", (1, 1))
            looked.clear()
            assert image_availability(names, images, cache=cache)[0].all()
            assert looked == ["1.jpg", "3.jpg", "5.jpg", "10.jpg"]
            next(cache.glob("*/*.json")).write_bytes(b"cut off")
            looked.clear()
            image_availability(names, images, cache=cache)
            assert 3 <= len(looked) <= 4, "a damaged shard only"


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; give the folder of the images, or none"):
        image_availability(["a.jpg"], tmp_path / "none")


def test_empty_input_is_valid(tmp_path: Path) -> None:
    available, counts = image_availability([], tmp_path)
    assert (len(available), counts.available, counts.examples) == (0, 0, [])
