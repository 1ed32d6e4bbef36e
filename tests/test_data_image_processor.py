from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_core.data.image_processor import ImageProcessor, load_image
from llava_core.runtime import DataError


def test_crop_equals_transformers(reference: Path) -> None:
    """Golden pixels: CLIPImageProcessor's PIL backend on real images."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ours = ImageProcessor(224)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    for path in sorted((reference / "scienceqa" / "images").glob("*/image.png"))[:6]:
        image = load_image(path)
        expected = np.asarray(theirs(image)["pixel_values"][0])
        assert np.abs(ours(image) - expected).max() < 1e-5, path


def test_modes_and_settings_round_trip() -> None:
    image = Image.new("RGB", (60, 30), (255, 0, 0))
    for mode in ("crop", "pad", "resize"):
        processor = ImageProcessor.from_dict(ImageProcessor(16, mode).to_dict())
        assert processor(image).shape == (3, 16, 16)
    padded = np.asarray(ImageProcessor(16, "pad").visible(image))
    assert tuple(padded[0, 0]) == (122, 116, 104)
    assert tuple(padded[8, 8]) == (255, 0, 0)


def test_bad_images_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 50).save(good)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:900])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for path in (cut, text, tmp_path / "absent.jpg"):
        with pytest.raises(DataError, match=path.name):
            load_image(path)


def test_exif_and_palette(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 20)
    image.convert("P").save(tmp_path / "palette.png")
    assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == (0, 0, 255)
