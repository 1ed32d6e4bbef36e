"""Instruction records and folders of images, some of them damaged, for the tests of instruction data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PROBLEM_KINDS = {
    "not_json", "not_parquet", "invalid_utf8", "no_records", "missing_field", "wrong_type", "role_order", "empty_turn",
    "image_marker", "unread_medium", "other_layout", "no_images", "missing_image", "outside_folder", "unreadable_image",
    "too_long", "duplicate_id",
}  # fmt: skip


def record(name: str = "a", image: str | None = "good.jpg", **changes: Any) -> dict[str, Any]:
    """A valid record of one turn, with `changes` to its fields."""
    turns = [("human", "What is it?\n<image>" if image else "What is it?"), ("gpt", "A cat.")]
    base: dict[str, Any] = {"id": name, "conversations": [{"from": role, "value": text} for role, text in turns]}
    return base | ({"image": image} if image else {}) | changes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with valid, truncated, empty and text files."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    for name in ("good.jpg", "good.png"):
        picture.save(folder / name)
    for name in ("good.jpg", "good.png"):
        content = (folder / name).read_bytes()
        (folder / name.replace("good", "cut")).write_bytes(content[: len(content) * 2 // 3])
    (folder / "text.jpg").write_text("no image at all")
    (folder / "empty.jpg").touch()
    return folder


@pytest.fixture
def nested_images(tmp_path: Path) -> Path:
    """A folder with a subfolder, damaged files, and a secret image outside of it."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    for name in ("good.jpg", "good.png", "below/good.jpg"):
        picture.save(folder / name)
    content = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "empty.png").touch()
    (tmp_path / "secret.jpg").write_bytes(content)
    return folder
