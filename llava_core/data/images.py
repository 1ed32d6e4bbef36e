"""Image reading and preprocessing for training, evaluation, demo and export."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_core.registry import unknown
from llava_core.runtime import DataError, display_path

MAX_PIXELS = 89_478_485
"""Larger images are refused by their header. At this number Pillow warns of a decompression bomb. Decoded it takes 341
MiB, and while a decoder works at most 1.5 GiB (WebP; JPEG 0.9, PNG 0.7); JPEG 2000 may have half as many pixels."""

MAX_BYTES = 2**28 + 2**20
"""Larger files are refused unread: the pixels of the largest image, uncompressed, and its metadata."""

MAX_SCANS = 100
"""Most scans of a JPEG; a large one has fewer, so that scans times pixels are at most `25 * MAX_PIXELS` (2 s)."""

MAX_DECODED_VALUES = 2**23
"""Most values of a PPM that Pillow decodes in Python, at about 1 us each: one written as text or of odd brightness."""

MAX_SECONDS = 5.0
"""CPU time after which a file of many small parts, such as chunks of 0 bytes, is not read on."""

MAX_ASPECT = 200
"""Maximum aspect ratio, as in Qwen2-VL: resized by its short side, a 30,000 x 1 image would take 6 GB."""

MAX_SIZE = 4096
"""Largest `ImageProcessor.size`."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Accepted formats, identified by content. Pillow knows more, but some of those start a program (EPS)."""

_OTHER_CONTENT = {
    b"<!doctype html": ("a web page", "the link answered with a page; download the image again"),
    b"<html": ("a web page", "the link answered with a page; download the image again"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
}
_WHITE = (255, 255, 255, 255)
_STRIP = 2**22  # pixels that are converted at once
_PILLOW_LIMIT = threading.Lock()

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO


class ImageError(DataError):
    """An image that cannot be used; `reason` is without the file's name, `missing` says that there is no such file."""

    reason: str = ""
    missing: bool = False


def _error(name: str, reason: str, fix: str = "download or write it again", missing: bool = False) -> ImageError:
    error = ImageError(f"{name}: {reason}; fix: {fix}")  # one argument, so that a worker process can hand it over
    error.reason, error.missing = reason, missing
    return error


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Decode an image: first frame, EXIF orientation applied, 8-bit RGB.

    Transparency becomes white, as in CLIPImageProcessor since transformers 5.21. 16-bit grey keeps its high byte. CMYK
    is converted without its color profile. A decoder does not notice every damage, such as a flipped bit in a JPEG.

    Raises:
        ImageError: the file is missing, has none of `FORMATS`, is cut off or damaged, exceeds `MAX_PIXELS` or
            `MAX_ASPECT`, would take too much memory or time, or its values have no defined brightness.
    """
    with _opened(source, name) as (image, name):
        _check_work(image, name)
        return _rgb(_upright(image), name)


def check_image(source: ImageSource, name: str | None = None, decode: bool = True) -> None:
    """Raise what `load_image` would raise; without `decode` only existence and header are checked."""
    with _opened(source, name) as (image, name):
        if decode:
            _check_work(image, name)
            image.draft("RGB", (1, 1))  # reads a JPEG to its end without computing all pixels
            _rgb(_upright(image), name)


@contextmanager
def _opened(source: ImageSource, name: str | None) -> Iterator[tuple[Image.Image, str]]:
    """The image with a checked header, not decoded, and its name; all errors become `ImageError`."""
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    name = name or ("the image" if path is None else display_path(path))
    too_large = _error(name, f"has more than {MAX_PIXELS:,} pixels", "make it smaller")
    try:
        if path is not None and not path.is_file():  # reading a pipe would block
            reason = "is a folder or a device, not a file" if path.exists() else "there is no such image"
            raise _error(name, reason, "check the image folder of the data set", missing=True)
        with _binary(source) as file:
            if file.seek(0, os.SEEK_END) > MAX_BYTES:
                raise _error(name, f"the file has more than {MAX_BYTES:,} bytes", "make it smaller")
            file.seek(0)
            head = file.read(512)
            if not head:
                raise _error(name, "the file is empty")
            try:
                image = _identified(_Reader(file, name))
            except UnidentifiedImageError:
                start = head.lstrip().lower()
                found = (other for prefix, other in _OTHER_CONTENT.items() if start.startswith(prefix))
                what, fix = next(found, ("no image", f"download it again or convert it to one of {', '.join(FORMATS)}"))
                raise _error(name, f"the file is {what}", fix) from None
            if image.width * image.height > MAX_PIXELS:
                raise too_large
            _check_shape(image, name)
            yield image, name
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise too_large from None
    except PermissionError:
        raise _error(name, "may not be read", "change the permissions of the file") from None
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, ...
        raise _error(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _binary(source: ImageSource) -> BinaryIO:
    if isinstance(source, str | os.PathLike):
        return Path(source).open("rb")
    return BytesIO(source if isinstance(source, bytes | bytearray | memoryview) else source.read(MAX_BYTES + 1))


class _Reader:
    """What Pillow reads a file through; after `MAX_SECONDS` it refuses to read on."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.reads, self.end = file, name, 0, time.thread_time() + MAX_SECONDS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        is_checked = size < 0 or size > 4096 or self.reads % 256 == 0  # the clock is slow for reads of one byte
        if is_checked and time.thread_time() > self.end:
            raise _error(self.name, f"takes more than {MAX_SECONDS:g} s to decode", "write it again")
        return self.file.read(size)


def _identified(file: Any) -> Image.Image:
    """`Image.open` with our limit of pixels, whatever limit this process set for Pillow."""
    Image.init()  # registers all formats
    formats = [name for name in FORMATS if name in Image.OPEN]  # older Pillows have no AVIF
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_shape(image: Image.Image, name: str) -> None:
    short, long = sorted(image.size)
    if short < 1:
        raise _error(name, f"has no pixels ({image.width} x {image.height})")
    if long > MAX_ASPECT * short:
        reason = f"{image.width} x {image.height} is longer than {MAX_ASPECT} times its other side"
        raise _error(name, reason, "cut out the part that matters or remove it")


def _check_work(image: Image.Image, name: str) -> None:
    """Refuse what would take long to decode although its header is small."""
    pixels, fix = image.width * image.height, "write it again as PNG or JPEG"
    if image.format in ("JPEG", "MPO") and "progressive" in image.info:  # other scans have some bits for each block
        scans = _content(image).count(b"\xff\xda")  # inside of a scan 0xff is followed by 0 or a restart marker
        if scans > MAX_SCANS or scans * pixels > 25 * MAX_PIXELS:
            raise _error(name, f"a JPEG of {scans:,} scans", fix)
    elif image.format == "PPM" and image.tile[0][0] != "raw":  # type: ignore[attr-defined]
        values = pixels * len(image.getbands())
        if values > MAX_DECODED_VALUES:
            raise _error(name, f"a PPM of {values:,} values as text or of odd brightness", fix)
        if _content(image).count(b"#") > 1000:  # Pillow copies a block for each comment
            raise _error(name, "a PPM of more than 1,000 comments", fix)
    elif image.format == "JPEG2000" and pixels > MAX_PIXELS // 2:  # its decoder takes 24 bytes per pixel
        raise _error(name, f"has more than {MAX_PIXELS // 2:,} pixels", "make it smaller, or " + fix)
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if math.prod(tags.get(tag, 1) for tag in (322, 323)) > MAX_PIXELS:  # width and height of a tile
            raise _error(name, f"has tiles of more than {MAX_PIXELS:,} pixels", fix)


def _content(image: Any) -> bytes:
    image.fp.seek(0)
    return bytes(image.fp.read())


def _upright(image: Image.Image) -> Image.Image:
    """Decode the image and apply its EXIF orientation, if it is readable."""
    image.load()
    with suppress(Exception):  # Pillow's readers of metadata raise many kinds of errors
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB as `load_image` documents it."""
    # Pillow would clip at 255; of 16-bit colors it keeps the high byte, too
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_16_bit:
        raise _error(name, f"{image.mode} values do not say how bright white is", "convert it to 8 bits per channel")
    if not is_16_bit and not image.has_transparency_data:
        return image.convert("RGB")
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return _strip_as_rgb(image, is_16_bit)
    result = Image.new("RGB", image.size)  # strip by strip: each step would take as much memory as the image
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_strip_as_rgb(strip, is_16_bit), (0, top))
    return result


def _strip_as_rgb(image: Image.Image, is_16_bit: bool) -> Image.Image:
    if is_16_bit:
        grey = np.asarray(image, dtype=np.int32) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocessing of CLIPImageProcessor: bicubic resize, center crop, rescale, normalise.

    Pixels equal those of transformers' PIL backend bitwise with the same Pillow, whose versions resize some shapes
    differently. Its torchvision backend resizes differently: about 0.2 % of the values differ, nearly all by 1 of 255.

    Attributes:
        mode: "crop" (the paper: shortest side to `size`, center crop), "pad" (square canvas of the mean color) or
            "resize".
        mean, std: per channel, on the 0-1 scale.
    """

    size: int
    mode: Literal["crop", "pad", "resize"] = "crop"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 0 < self.size <= MAX_SIZE:
            raise DataError(f"image settings: size is {self.size!r}; give a whole number from 1 to {MAX_SIZE}")
        if self.mode not in ("crop", "pad", "resize"):
            raise DataError(f"image settings: {unknown('mode', self.mode, ('crop', 'pad', 'resize'))}")
        object.__setattr__(self, "mean", _channels("mean", self.mean))
        object.__setattr__(self, "std", _channels("std", self.std))
        if min(self.mean) < 0 or max(self.mean) > 1:  # the padded canvas has this color
            raise DataError(f"image settings: mean is {self.mean}; give numbers from 0 to 1")
        if min(self.std) <= 0:
            raise DataError(f"image settings: std is {self.std}; give numbers above 0")

    def visible(self, image: Image.Image) -> Image.Image:
        """The (size, size) RGB image before rescaling and normalisation."""
        _check_shape(image, "the image")
        image = image if image.mode == "RGB" else _rgb(image, "the image")
        if self.mode == "pad":
            return self._padded(image)
        if self.mode == "resize":
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        short, long = sorted(image.size)
        scaled = (self.size, int(self.size * long / short))  # truncated, as in transformers
        width, height = scaled if image.width <= image.height else scaled[::-1]
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def _padded(self, image: Image.Image) -> Image.Image:
        """The resized square canvas, in strips of rows: for 30,000 x 3,000 pixels it would take 3.4 GiB."""
        fill = tuple(int(value * 255) for value in self.mean)
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        narrow = Image.new("RGB", (self.size, side), fill)
        rows = max(1, 2**22 // side)
        for y in range(0, image.height, rows):
            strip = Image.new("RGB", (side, min(rows, image.height - y)), fill)
            strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
            narrow.paste(strip.resize((self.size, strip.height), Image.Resampling.BICUBIC), (0, top + y))
        return narrow.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (..., H, W, 3) to float32 (..., 3, H, W)."""
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)
        scaled = (pixels.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Pixel values float32 (3, size, size) of one RGB image."""
        return self.normalise(np.asarray(self.visible(image)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageProcessor:
        """Inverse of `to_dict`; all fields are required."""
        if not isinstance(settings, Mapping):
            raise DataError(f"image settings: expected an object with fields, not {settings!r}")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise DataError(f"image settings: {unknown('field', name, known)}; remove it")
        for name in known:
            if name not in settings:
                raise DataError(f"image settings: {name} is missing; write the manifest again")
        return cls(**settings)

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> ImageProcessor:
        """Settings from a `preprocessor_config.json`; absent or null fields have CLIPImageProcessor's defaults.

        Raises:
            DataError: a setting that would change the pixels or whose effect is unknown.
        """
        if not isinstance(settings, Mapping):
            raise DataError(f"preprocessor config: expected an object with fields, not {settings!r}")
        given = {key: value for key, value in settings.items() if value is not None and key not in _HF_WITHOUT_EFFECT}
        old_kind = given.pop("feature_extractor_type", None)
        kind = given.pop("image_processor_type", old_kind)
        if kind not in _HF_TYPES:
            raise _unsupported("image_processor_type", kind, f"one of {', '.join(_HF_TYPES)}")
        side, is_edge = _hf_side("size", given.pop("size", 224))
        crop, _ = _hf_side("crop_size", given.pop("crop_size", 224))
        center, pad = given.pop("do_center_crop", True), given.pop("do_pad", False)
        mean, std = given.pop("image_mean", cls.mean), given.pop("image_std", cls.std)
        scale = given.pop("rescale_factor", 1 / 255)
        for name, value in given.items():
            if name not in _HF_FIXED:
                raise _unsupported(name, value, "a file without it, if it changes no pixels")
            if value != _HF_FIXED[name]:
                raise _unsupported(name, value, repr(_HF_FIXED[name]))
        if not isinstance(scale, float) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
            raise _unsupported("rescale_factor", scale, "1/255")
        if not isinstance(pad, bool) or (pad and not kind.startswith("Llava")):
            raise _unsupported("do_pad", pad, "true only for a LlavaImageProcessor, which pads to a square")
        if not isinstance(center, bool) or (is_edge and not center and not pad):
            raise _unsupported("do_center_crop", center, "true, or a size with height and width")
        if center and crop != side:
            raise _unsupported("crop_size", crop, f"that of size, {side}")
        return cls(side, "pad" if pad else "crop" if is_edge else "resize", mean, std)


_HF_TYPES = tuple(
    f"{model}{suffix}"
    for model in ("CLIP", "Llava")
    for suffix in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
)
_HF_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "default_to_square": False,
    "use_square_size": False,
    "data_format": "channels_first",
}
_HF_WITHOUT_EFFECT = frozenset(
    {
        *("processor_class", "_valid_processor_keys", "use_fast", "backend", "device", "disable_grouping"),
        *("return_tensors", "input_data_format", "image_seq_length"),
    }
)


def _unsupported(name: str, value: Any, expected: str) -> DataError:
    return DataError(f"preprocessor config: {name} is {value!r}, which is not reproduced here; give {expected}")


def _hf_side(name: str, value: Any) -> tuple[int, bool]:
    """Side of a size in one of transformers' notations, and whether it is that of the shortest edge."""
    keys = set(value) if isinstance(value, Mapping) else None
    if keys == {"shortest_edge"}:
        side, is_edge = value["shortest_edge"], True
    elif keys == {"height", "width"} and value["height"] == value["width"]:
        side, is_edge = value["height"], False
    else:
        side, is_edge = value, True
    if type(side) is not int or side < 1:
        raise _unsupported(name, value, "a whole number, {shortest_edge} or an equal {height, width}")
    return side, is_edge


def _channels(name: str, values: Any) -> tuple[float, float, float]:
    good = isinstance(values, Sequence) and len(values) == 3 and all(type(v) in (int, float) for v in values)
    if not good or not all(map(math.isfinite, values)):
        raise DataError(f"image settings: {name} is {values!r}; give three finite numbers, one per channel")
    return (float(values[0]), float(values[1]), float(values[2]))
