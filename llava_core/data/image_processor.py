"""One image path for training, evaluation, demo and export: read, orient, crop, normalise.

The settings are stored in every checkpoint's manifest; nothing else decides what the model sees.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from llava_core.runtime import DataError


def load_image(path: str | Path) -> Image.Image:
    """Read an image file completely, upright and in RGB.

    Raises:
        DataError: the file is missing, is no image or is cut off; the message names it.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: image not found; fix: check the image folder of the data set") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); fix: download or write it again") from error


@dataclass(frozen=True)
class ImageProcessor:
    """Image to pixel values, as CLIPImageProcessor does it (resize by bicubic, crop the center, scale, normalise).

    Attributes:
        size: width and height of the result in pixels.
        mode: "crop" (the paper: shortest side to `size`, center crop), "pad" (square canvas of the mean color) or
            "resize".
        mean, std: per channel, on the 0-1 scale.
    """

    size: int
    mode: Literal["crop", "pad", "resize"] = "crop"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def visible(self, image: Image.Image) -> Image.Image:
        """The (size, size) RGB image that the model sees."""
        if self.mode == "pad":
            fill = tuple(int(m * 255) for m in self.mean)
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), fill)
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        if self.mode != "crop":
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        short, long = sorted(image.size)
        scaled = (self.size, int(self.size * long / short))
        width, height = scaled if image.width <= image.height else scaled[::-1]
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (..., H, W, 3) to float32 (..., 3, H, W)."""
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)
        scaled = (pixels.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Pixel values float32 (3, size, size) of one RGB image."""
        return self.normalise(np.asarray(self.visible(image)))

    def to_dict(self) -> dict[str, Any]:
        """Settings for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ImageProcessor:
        """Inverse of `to_dict`."""
        return cls(settings["size"], settings["mode"], tuple(settings["mean"]), tuple(settings["std"]))
