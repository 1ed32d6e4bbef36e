"""The pixels of transformers on files of every kind, and refusals that name the file before any memory is spent."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image, ImageFile

from companion.checkpoints.hf_export import preprocessor_config
from llava_core.data.images import MAX_PIXELS, ImageError, ImageProcessor, check_image, load_image
from llava_core.runtime import DataError

MODES = ("crop", "pad", "resize")
SHAPES = [(224, 224), (225, 224), (224, 225), (223, 223), (447, 224), (300, 201), (201, 300), (640, 480), (97, 131)]
SHAPES += [(1, 1), (40, 1), (1, 40), (2, 3), (90, 3)]


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def smooth(width: int, height: int) -> Image.Image:
    """A picture that survives lossy formats."""
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy())


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, color: int, data: bytes = b"") -> bytes:
    """A PNG that claims any size."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


# ------------------------------------------------------------------------------------------------ pixels


def peer(ours: ImageProcessor, tmp_path: Path, backend: str = "pil") -> Any:
    """The processor that transformers reads from the file we export."""
    model = "llava" if ours.mode == "pad" else "clip"
    suffix, name = ("_pil", "Pil") if backend == "pil" else ("", "")
    module = pytest.importorskip(f"transformers.models.{model}.image_processing{suffix}_{model}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(ours)))
    return getattr(module, f"{model.title() if model == 'llava' else 'CLIP'}ImageProcessor{name}").from_pretrained(
        tmp_path
    )


def assert_same_pixels(ours: ImageProcessor, theirs: Any, image: Image.Image, place: object) -> None:
    seen = theirs(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(np.asarray(ours.visible(image)), np.moveaxis(seen, 0, -1)), place
    assert np.array_equal(ours(image), theirs(image)["pixel_values"][0]), place


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [224, 33])
def test_pixels_equal_transformers_for_every_shape(mode: Any, size: int, tmp_path: Path) -> None:
    """Odd differences round the crop's corner down; a side of one pixel, the exact size and one off are in the list."""
    ours = ImageProcessor(size, mode)
    theirs = peer(ours, tmp_path)
    for shape in SHAPES:
        assert_same_pixels(ours, theirs, noise(*shape), shape)


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_real_images_equal_transformers(mode: Any, reference: Path, tmp_path: Path) -> None:
    ours = ImageProcessor(224, mode)
    theirs = peer(ours, tmp_path)
    paths = sorted((reference / "scienceqa" / "images").glob("*/image.png"))
    assert paths
    for path in paths:
        assert_same_pixels(ours, theirs, load_image(path), path)
        if Version(version("transformers")) >= Version("5.21"):  # before, it dropped the alpha channel
            assert np.array_equal(ours(load_image(path)), theirs(Image.open(path))["pixel_values"][0]), path


def test_crop_settings_equal_the_openai_file(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shipped = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    shipped |= {"size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    shipped |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(shipped))
    ours = ImageProcessor.from_hf(shipped)
    assert ours == ImageProcessor(224)
    assert_same_pixels(ours, CLIPImageProcessorPil.from_pretrained(tmp_path), noise(300, 201), "shipped")


PILLOW_11 = {  # every fourth pixel of the middle row, made with Pillow 11.3; 13 differs in some of them
    "crop": "bb7290 297abd 207aeb aa7d15 f28042 89816e 11819b 4380c7 d57ffa",
    "resize": "ab7396 7d7bc3 527ced 6c7e12 a47f48 a27f74 6b7fa1 527fcd 817fb4",
    "pad": "7a7468 7a7468 81786c 687fef 977f48 8d7fa9 78756b 7a7468 7a7468",
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_another_pillow_differ_by_one(mode: Any) -> None:
    y, x = np.mgrid[:803, :367]
    waves = [127.5 + 127 * np.sin(x / 9 + y / 7), 127.5 + 127 * np.cos(x * y / 900), (x + y) % 256]
    pixels = np.asarray(ImageProcessor(33, mode).visible(Image.fromarray(np.stack(waves, -1).astype(np.uint8))))
    stored = np.array([list(bytes.fromhex(pixel)) for pixel in PILLOW_11[mode].split()])
    assert np.abs(pixels[16, ::4].astype(int) - stored).max() <= 1


@pytest.mark.parametrize("mode", MODES)
def test_torchvision_backend_differs_by_little(mode: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    ours = ImageProcessor(224, mode)
    theirs = peer(ours, tmp_path, "torchvision")
    for shape in ((640, 480), (201, 300), (225, 224)):
        seen = theirs(noise(*shape), do_rescale=False, do_normalize=False)["pixel_values"][0]
        apart = np.abs(np.asarray(ours.visible(noise(*shape))).astype(int) - np.moveaxis(np.asarray(seen), 0, -1))
        assert apart.mean() < 0.5, shape  # of noise, with one side enlarged and one reduced: the largest difference


def test_strip_padding_equals_full_padding() -> None:
    for shape in ((2300, 2100), (2000, 2400), (4300, 40), (40, 4300)):
        image = noise(*shape)
        canvas = Image.new("RGB", (max(shape),) * 2, (122, 116, 104))
        canvas.paste(image, ((max(shape) - shape[0]) // 2, (max(shape) - shape[1]) // 2))
        full = canvas.resize((56, 56), Image.Resampling.BICUBIC)
        assert np.array_equal(ImageProcessor(56, "pad").visible(image), full), shape
    padded = np.asarray(ImageProcessor(16, "pad").visible(Image.new("RGB", (60, 30), (255, 0, 0))))
    assert tuple(padded[0, 0]) == (122, 116, 104)
    assert tuple(padded[8, 8]) == (255, 0, 0)


def test_images_from_memory_are_treated_alike() -> None:
    for mode in MODES:
        processor = ImageProcessor(16, mode)
        clear = Image.new("RGBA", (20, 30), (255, 0, 0, 0))
        assert np.array_equal(processor(clear), processor(Image.new("RGB", (20, 30), "white")))
        for shape in ((30_000, 1), (1, 30_000), (0, 5)):  # the strip would become 16 x 480,000 or a square of 3.6 GB
            with pytest.raises(ImageError, match=f"{shape[0]} x {shape[1]}"):
                processor(Image.new("RGB", shape))


# ------------------------------------------------------------------------------------------------ files


def test_exif_turns_the_image_once() -> None:
    image = noise(24, 16)
    pixels = np.asarray(image)
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    turned |= {5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].swapaxes(0, 1)}
    turned |= {8: np.rot90(pixels)}
    for tag, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        for kind in ("PNG", "TIFF", "WEBP"):  # Pillow itself turns TIFF, which must not be turned back
            data = encoded(image, kind, exif=exif, lossless=True) if kind == "WEBP" else encoded(image, kind, exif=exif)
            assert np.array_equal(load_image(data), expected), (tag, kind)
    exif[0x0112], exif[0x011A] = 6, 1.5
    wrong_type = exif.tobytes().replace(b"\x01\x1a\0\x05", b"\x01\x1a\0\x07")  # another tag that Pillow fails to copy
    assert np.array_equal(load_image(encoded(image, "PNG", exif=wrong_type)), turned[6])
    for damaged in (b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"Exif\0\0no exif at all"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load_image(encoded(image, "JPEG", exif=damaged)).size == (24, 16)


def test_transparency_shows_white() -> None:
    clear, red = (0, 0, 255, 0), (255, 0, 0, 255)
    image = Image.new("RGBA", (4, 2), clear)
    image.paste(red, (0, 0, 2, 2))
    grey = Image.new("LA", (4, 2), (0, 0))
    grey.paste((9, 255), (0, 0, 2, 2))
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 2, 2))
    files = [encoded(image, "PNG"), encoded(image, "WEBP", lossless=True), encoded(image, "TIFF")]
    files += [encoded(palette, kind, transparency=1) for kind in ("PNG", "GIF")]
    files += [
        encoded(palette, "PNG", transparency=b"\xff\x00"),
        encoded(image.convert("RGB"), "PNG", transparency=clear[:3]),
    ]
    for data in files:
        assert [load_image(data).getpixel(place) for place in ((0, 0), (3, 1))] == [red[:3], (255, 255, 255)]
    assert load_image(encoded(grey, "PNG")).getpixel((0, 0)) == (9, 9, 9)
    assert load_image(encoded(grey, "PNG")).getpixel((3, 1)) == (255, 255, 255)
    half = load_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert half.getpixel((0, 0)) == (127, 127, 127)
    assert load_image(encoded(palette, "PNG")).getpixel((3, 1)) == clear[:3]  # no transparency declared


def test_sixteen_bit_grey_stays_a_gradient() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(2, axis=0)
    little, big = Image.fromarray(values), values.astype(">u2").tobytes()
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    colored = b"".join(b"\0" + np.repeat(line, 3).astype(">u2").tobytes() for line in values)
    pgm = b"P5 64 2 65535\n" + big
    for data in (
        encoded(little, "PNG"),
        encoded(little, "TIFF"),
        png(64, 2, 16, 0, lines),
        png(64, 2, 16, 2, colored),
        pgm,
    ):
        image = load_image(data)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[:, :, 1], values >> 8)
    for mode in ("I", "F"):
        for check in (load_image, check_image):
            with pytest.raises(ImageError, match=rf"scan.tif: {mode} values .* fix: convert it to 8 bits"):
                check(encoded(Image.new(mode, (4, 4), 7), "TIFF"), "scan.tif")


def test_cmyk_is_not_inverted() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    jpeg = encoded(red, "JPEG", quality=95)
    assert b"Adobe" in jpeg  # stored inverted, as Photoshop does
    for data in (jpeg, encoded(red, "TIFF")):
        assert np.allclose(load_image(data).getpixel((8, 8)), (255, 0, 0), atol=4)


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.allclose(load_image(data).getpixel((4, 4)), (255, 0, 0), atol=4), kind


def test_other_modes_and_wrong_extensions(tmp_path: Path) -> None:
    grey = noise(9, 7, 1)
    assert np.array_equal(np.asarray(load_image(encoded(grey, "PNG")))[:, :, 2], grey)
    bits = grey.point(lambda value: 255 * (value > 127)).convert("1")
    assert np.array_equal(np.asarray(load_image(encoded(bits, "PNG")))[:, :, 0], np.asarray(bits) * np.uint8(255))
    assert load_image(encoded(noise(1, 1), "PNG")).size == (1, 1)
    for kind, extension in (("PNG", "jpg"), ("GIF", "png"), ("JPEG", "webp"), ("BMP", "")):
        path = tmp_path / f"odd.{extension}"
        path.write_bytes(encoded(smooth(9, 7), kind))
        assert load_image(path).size == (9, 7)


def test_uploads_and_open_files(tmp_path: Path) -> None:
    data = encoded(noise(9, 7), "PNG")
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert np.array_equal(load_image(source), noise(9, 7))
    for source in (b"", b"no image", data[:-40]):
        with pytest.raises(ImageError, match=r"^cat\.png: "):
            load_image(source, "cat.png")
    path = tmp_path / "in memory.png"
    path.write_bytes(data)
    image = load_image(path)
    path.unlink()
    assert np.array_equal(image, noise(9, 7))


# a frame that fills 65,535 x 65,535 and is to be wiped afterwards, for which Pillow takes memory in Image.open
GIF_BOMB = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"!\xf9\x04\x08\0\0\0\0"
GIF_BOMB += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\0;"
REFUSED = {
    "absent.jpg": (None, "there is no such image"),
    "empty.jpg": (b"", "the file is empty"),
    "text.png": (b"no image at all", "the file is no image"),
    "page.jpg": (b"\n <!DOCTYPE html><html>404</html>", "a web page"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "the file is no image"),
    "strip.png": (png(30_000, 1, 8, 0, b"\0" * 30_001), "30000 x 1 is longer than 200 times"),
    "bomb.png": (png(30_000, 30_000, 1, 0), "more than 89,478,485 pixels"),
    "bomb.gif": (GIF_BOMB, "more than 89,478,485 pixels"),
    "large.bmp": (b"BM" + struct.pack("<IIIIIIHHI", 0, 0, 54, 40, 10_000, 9000, 1, 24, 0) + bytes(20), "89,478,485"),
}
for _kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
    _data = encoded(noise(64, 64), _kind)
    REFUSED[f"cut.{_kind.lower()}"] = (_data[: len(_data) * 2 // 3], "cannot be decoded|no image")
_data = encoded(noise(64, 64), "PNG")
REFUSED["damaged.png"] = (_data[:5000] + bytes(64) + _data[5064:], "cannot be decoded")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # of large.bmp, which is refused anyway
@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_named_with_reason_and_fix(name: str, tmp_path: Path) -> None:
    data, reason = REFUSED[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    for check in (load_image, check_image):
        with pytest.raises(ImageError, match=f"{name}: .*({reason}).*; fix: |; fix: .*{reason}") as caught:
            check(tmp_path / name)
        assert isinstance(caught.value, DataError)
        assert caught.value.missing == (data is None)
        assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason  # as worker processes do


def test_folders_and_forbidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(4, 4), "PNG"))

    def forbid(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbid)  # a test run by root could read whatever it forbids
    with pytest.raises(ImageError, match=r"secret.png: .*fix: change the permissions"):
        load_image(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [None, 10, MAX_PIXELS, 10**12])
def test_pixel_limit_is_checked_before_decoding(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = encoded(noise(9, 7), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert load_image(small).size == (9, 7)

    def decode(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(Image.core, "fill", decode)
    with pytest.raises(ImageError, match="more than 89,478,485 pixels"):
        load_image(GIF_BOMB)
    for size in ((30_000, 30_000), (9460, 9459), (65_000, 13_000)):
        with pytest.raises(ImageError, match="more than 89,478,485 pixels"):
            load_image(png(*size, 1, 0))
    with pytest.raises(ImageError, match="AssertionError: decoded"):  # the largest that is let through
        load_image(png(9459, 9459, 1, 0))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_header_check_does_not_decode(tmp_path: Path) -> None:
    for name in ("cut.jpeg", "damaged.png"):
        check_image(REFUSED[name][0], decode=False)
    for name in ("text.png", "bomb.png", "strip.png", "empty.jpg"):
        with pytest.raises(ImageError):
            check_image(REFUSED[name][0], decode=False)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive grey JPEG: one scan of the means, then scans whose end-of-band runs skip all blocks."""
    blocks = (side // 8) ** 2
    codes = segment(0xC4, b"\0\1" + bytes(16)) + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    frame = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    means = segment(0xDA, b"\1\1" + bytes(4)) + bytes(-(-blocks // 8))
    skipping = segment(0xDA, b"\1\1\0\1\x3f\1") + bytes(-(-blocks // 2**14) * 2)
    return b"\xff\xd8" + frame + codes + means + skipping * (scans - 1) + b"\xff\xd9"


def sparse(content: bytes, path: Path) -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(20 * 2**30)
    return path


def tiff(**tags: int) -> bytes:
    """A grey TIFF of 16 x 16 pixels, compressed by deflate, with tags `t<number>`."""
    entries = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1} | {int(tag[1:]): value for tag, value in tags.items()}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + bytes(4)


PNG_OF_CHUNKS = png(9, 9, 8, 0)[:33] + (bytes(4) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))) * 200_000
JPEG_2000 = encoded(noise(16, 16), "JPEG2000")  # with the width and height of its box and of its codestream changed
JPEG_2000 = JPEG_2000.replace(struct.pack(">II", 16, 16), struct.pack(">II", 7000, 7000))
SLOW = {
    "scans": (lambda path: jpeg_of_scans(64, 101), "a JPEG of 101 scans"),
    "scans-of-large": (lambda path: jpeg_of_scans(9456, 27), "a JPEG of 27 scans"),
    "text": (lambda path: b"P3 2000 2000 255\n" + b"1 2 3\n" * 9, "12,000,000 values as text"),
    "text-bits": (lambda path: b"P1 3000 3000\n01", "9,000,000 values as text"),
    "brightness": (lambda path: b"P6 2000 2000 100\n" + bytes(99), "12,000,000 values"),
    "comments": (lambda path: b"P2 9 9 255\n" + b"#\n" * 1001 + b"1 " * 81, "more than 1,000 comments"),
    "sparse.webp": (lambda path: sparse(encoded(noise(9, 9), "WEBP"), path), "more than 269,484,032 bytes"),
    "sparse.avif": (lambda path: sparse(encoded(noise(9, 9), "PNG"), path), "more than 269,484,032 bytes"),
    "tile": (lambda path: tiff(t322=40_000, t323=40_000, t324=0, t325=9), "tiles of more than"),
    "large.jp2": (lambda path: JPEG_2000, "more than 44,739,242 pixels"),
    "chunks": (lambda path: PNG_OF_CHUNKS, "takes more than 0.01 s"),
}


@pytest.mark.parametrize("name", SLOW)
def test_files_that_take_long_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = SLOW[name]
    source = make(tmp_path / name)
    if name == "chunks":
        monkeypatch.setattr("llava_core.data.images.MAX_SECONDS", 0.01)
    for check in (load_image, check_image):
        with pytest.raises(ImageError, match=f"{name}: .*{reason}.*; fix: "):
            check(source, name)


def test_files_below_the_limits_are_read() -> None:
    for data in (jpeg_of_scans(64, 100), jpeg_of_scans(2048, 90), encoded(noise(64, 64), "JPEG", progressive=True)):
        check_image(data)
        load_image(data)
    assert load_image(b"P2 3 1 255 # a comment\n0 7 255").getpixel((1, 0)) == (7, 7, 7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_strips_have_the_pixels_of_the_whole_image(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(40, 30, 1)
    wide = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = encoded(wide if mode == "I;16" else Image.merge(mode, [image] * len(mode)), "PNG")
    whole = np.asarray(load_image(data))
    monkeypatch.setattr("llava_core.data.images._STRIP", 40 * 7)
    assert np.array_equal(load_image(data), whole)


# ------------------------------------------------------------------------------------------------ settings


def test_settings_round_trip() -> None:
    for mode in MODES:
        ours = ImageProcessor(64, mode, (0.5, 0.25, 1.0), (0.25, 0.5, 1.0))
        assert ImageProcessor.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
        assert ImageProcessor.from_hf(json.loads(json.dumps(preprocessor_config(ours)))) == ours


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("size", value) for value in (0, -1, 224.0, "224", True, None, [224], 10**9)),
        *(("mode", value) for value in ("square", "", None, 3, ["crop"])),
        *(
            ("mean", value)
            for value in (None, 0.5, [0.5] * 2, [0.5] * 4, ["a"] * 3, [float("nan"), 0, 0], "abc", [2, 2, 2])
        ),
        *(("std", value) for value in ([1, 1, 0], [1, 1, -1], [1, 1], {"r": 1}, [True] * 3, [float("inf")] * 3)),
        ("crop_size", 224),
    ],
)
def test_wrong_settings_are_named(field: str, value: Any) -> None:
    settings = json.loads(json.dumps(ImageProcessor(224).to_dict()))
    with pytest.raises(DataError, match=rf"image settings: .*{field}"):
        ImageProcessor.from_dict(settings | {field: value})


def test_missing_settings_are_named() -> None:
    settings = ImageProcessor(224).to_dict()
    for field in settings:
        with pytest.raises(DataError, match=f"{field} is missing"):
            ImageProcessor.from_dict({key: value for key, value in settings.items() if key != field})
    for wrong in (None, [], "crop"):
        for read in (ImageProcessor.from_dict, ImageProcessor.from_hf):
            with pytest.raises(DataError, match="expected an object"):
                read(wrong)  # type: ignore[arg-type]


def test_notations_of_transformers() -> None:
    clip, llava = {"image_processor_type": "CLIPImageProcessor"}, {"image_processor_type": "LlavaImageProcessorFast"}
    square = {"height": 56, "width": 56}
    assert ImageProcessor.from_hf(clip) == ImageProcessor(224)
    assert ImageProcessor.from_hf(clip | {"size": {"shortest_edge": 56}, "crop_size": square}) == ImageProcessor(56)
    resize = clip | {"size": square, "do_center_crop": False, "do_pad": None, "processor_class": "CLIPProcessor"}
    assert ImageProcessor.from_hf(resize) == ImageProcessor(56, "resize")
    assert ImageProcessor.from_hf(llava | {"size": 56, "crop_size": 56, "do_pad": True}) == ImageProcessor(56, "pad")
    assert ImageProcessor.from_hf(llava | {"size": 56, "do_center_crop": False, "do_pad": True}).mode == "pad"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_processor_type", "SiglipImageProcessor"),
        ("image_processor_type", None),
        *(("size", value) for value in (0, "224", {"height": 224, "width": 336}, {"longest_edge": 224}, {})),
        *(("crop_size", value) for value in (256, {"height": 224}, [224, 224])),
        *((f"do_{step}", False) for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")),
        *(("do_pad", value) for value in (True, "false")),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("data_format", "channels_last"),
        ("image_grid_pinpoints", [[336, 672]]),
        ("mean", [0.5, 0.5, 0.5]),
    ],
)
def test_unsupported_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"preprocessor config: {field}"):
        ImageProcessor.from_hf(preprocessor_config(ImageProcessor(224)) | {field: value})
