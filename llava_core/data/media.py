"""Media that a record names and training does not read: fields and markers of other data formats.

A record trains on one image, that of its field `image`, at its one `<image>`. An image, video or audio that another
field or another marker names would be lost, and the record would train as text alone.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import shortened

_OTHER_SUFFIXES = frozenset((  # of videos, audio and volumes
    "mp4", "avi", "mov", "mkv", "webm", "flv", "m4v", "wmv", "mpg", "mpeg",
    "wav", "mp3", "flac", "ogg", "m4a", "aac", "opus", "ply", "pcd", "npy", "npz", "dcm", "nii",
))  # fmt: skip
_IMAGE_SUFFIXES = frozenset((
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "ppm", "svg",
))  # fmt: skip
_DATA_URI = re.compile(r"data:(?:image|video|audio)/", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

# ------------------------------------------------------------------------------------------------------------- fields

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
_IMAGE_WORD = re.compile(r"(?:image|img|picture|photo|pic|screenshot|pixel)(?:s|id|ids|url|urls|names?|paths?|files?)?")
_OTHER_WORD = re.compile(r"(?:video|vid|audio)(?:s|id|ids|url|urls|names?|paths?|files?)?")
_WHOLE_NAMES = frozenset((
    "media", "medias", "frames", "clips", "speech", "speeches", "sound", "sounds", "visual", "visuals", "attachments",
))  # fmt: skip
_PARTS_OF_NAMES = frozenset(
    ("media", "frame", "frames", "clip", "speech", "sound", "visual", "movie", "depth", "cloud")
)
_LOCATIONS = frozenset(("path", "paths", "file", "files", "url", "urls", "uri"))
_ABOUT_IT = frozenset((  # `image_caption` states no image
    "type", "kind", "category", "caption", "captions", "description", "prompt", "license", "dataset", "split", "domain",
    "source", "model", "processor", "encoder", "tower", "root", "folder", "dir", "prefix", "token", "tokens", "aspect",
))  # fmt: skip
_SAME_IMAGE = frozenset((
    "id", "ids", "url", "urls", "uri", "link", "original", "orig", "source", "src", "thumbnail", "flickr", "coco",
))  # fmt: skip
_PROVENANCE = frozenset((
    "id", "ids", "name", "key", "title", "duration", "fps", "start", "end", "time", "timestamp", "length", "source",
))  # fmt: skip
_EMPTY_TEXTS = frozenset(("", "none", "null", "nan", "n/a", "na", "no", "false", "text", "-", "-1", "0", "[]", "{}"))


def is_other_file(name: str) -> bool:
    """Whether a file name ends as of a video or audio."""
    return name.rpartition(".")[2].lower() in _OTHER_SUFFIXES


def names_images(field: str) -> bool:
    """Whether a field's name says that it holds an image or several, as `images`, `image_path` or `imgFile`."""
    return any(_IMAGE_WORD.fullmatch(word.lower()) for word in _WORD.findall(field))


def unread_fields(fields: Mapping[str, Any], known: Iterable[str], image: Any = None) -> Iterator[str]:
    """Yield the names of fields outside `known` that name a medium other than the record's `image` (None: no image).

    A nested field is written `metadata.video`. Empty values (null, "", [], 0, false) name nothing.
    """
    for name, value in fields.items():
        if name in known or not isinstance(name, str) or _is_empty(value):
            continue
        if _is_unread(name, value, image):
            yield name
        elif isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in unread_fields(value, (), image))


def _is_unread(name: str, value: Any, image: Any) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    about, whole = frozenset(words), name.lower() in _WHOLE_NAMES
    is_image = any(map(_IMAGE_WORD.fullmatch, words)) or name.lower() in _IMAGE_SUFFIXES
    is_other = any(map(_OTHER_WORD.fullmatch, words)) or name.lower() in _OTHER_SUFFIXES
    is_other |= (whole and not _is_other_text(value)) or bool(about & _PARTS_OF_NAMES and about & _LOCATIONS)
    number = sum(map(is_medium_name, _leaves(value)))
    if image is None:
        return number > 0 or ((is_image or is_other) and not about & _ABOUT_IT)
    if isinstance(value, list) and number > 1 and not is_image:
        return True
    if is_other and isinstance(value, str | list | dict) and not about & (_PROVENANCE | _ABOUT_IT):
        return True
    return is_image and not about & (_SAME_IMAGE | _ABOUT_IT) and _other_images(words, value, image)


def _is_empty(value: Any) -> bool:
    """Whether a value names nothing: null, NaN, zero, false, or nothing but such values."""
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS if len(value) < 20 else not value.strip()
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return not value or value != value  # NaN differs from itself


def _is_other_text(value: Any) -> bool:
    """Whether a field such as `sound` holds a sentence or a number, and so no medium."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and not is_medium_name(value))


def _leaves(value: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(value, dict) and depth:
        for inner in value.values():
            yield from _leaves(inner, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for inner in value:
            yield from _leaves(inner, depth - 1)
    else:
        yield value


def is_medium_name(value: Any) -> bool:
    """Whether a value is the name of a media file, a data URI or bytes."""
    if isinstance(value, str):
        _, dot, suffix = value.rpartition(".")
        if dot and suffix.lower() in _IMAGE_SUFFIXES | _OTHER_SUFFIXES:
            return "\n" not in value and len(value) < 4096
        return _DATA_URI.match(value) is not None
    return isinstance(value, bytes | bytearray | memoryview) and len(value) > 0


def _other_images(words: list[str], value: Any, image: Any) -> bool:
    """Whether an image field beside `image` names another one: several files, another file, a second field."""
    leaves = [leaf for leaf in _leaves(value) if isinstance(leaf, str | bytes) and not _is_empty(leaf)]
    if not leaves:
        return False  # sizes, boxes, flags
    if isinstance(value, list) and len(value) > 1 and all(isinstance(leaf, str) for leaf in value):
        return any(not _same_file(leaf, image) for leaf in value)
    if words[-1] in map(str, range(2, 20)):  # image_2
        return True
    return any(is_medium_name(leaf) and not (isinstance(leaf, str) and _same_file(leaf, image)) for leaf in leaves)


def _same_file(name: str, image: Any) -> bool:
    """Whether two names may be of the same file: one base name ends in the other, or one is an address."""
    if _URL.match(name):
        return True
    one, other = (os.path.splitext(os.path.basename(str(n).replace("\\", "/")))[0] for n in (name, image))
    return one == other or one.endswith(f"_{other}") or other.endswith(f"_{one}")  # COCO_val2014_0042 is 0042


# ------------------------------------------------------------------------------------------------------------ markers

_NOUN = (
    "image|img|picture|photo|pic|screenshot|video|vid|audio|speech|sound|voice|media|visual|clip|frame|depth|"
    "point[_ ]?cloud"
)
_PART = (
    "here|content|context|placeholder|tokens?|pads?|patch|plh|features?|embeds?|embedding|start|end|begin|bos|eos|"
    "break|newline|soft|sep"
)
_STRONG = re.compile(
    "|".join((
        # <|image_pad|>, <|vision_start|>, <|AUDIO|>, <|media_begin|>, with full-width bars too
        r"<[|｜][^<>|｜\s]{0,99}?(?:image|img|video|vid(?![a-z])|audio|vision|speech|media|mm_)[^<>|｜\s]{0,99}[|｜]>",
        rf"<(?:{_NOUN})s?[\s_:#-]*\d+>",  # <image_1>, <image 1>, <img_00012>
        rf"(?<!\w)</?(?:{_NOUN}|vision|vis)s?[\s_-]?(?:{_PART})[a-z_]*\d*>",  # <ImageHere>, <IMG_CONTEXT>, <vid_patch>
        r"<(?:start|end|begin|bos|eos)_of_(?:image|img|video|audio|speech)>",  # <start_of_image>
        r"<(?:fake_token_around_image|global-img|(?:low_)?im_(?:start|end|patch|col|row|content)|ph_image|unk_img)>",
        r"<\w+/(?:image|video|audio|sound|speech)>",  # <vila/image>
        r"<(img|image|video|audio|speech)>[^<>\s]+</\1>",  # <img>a.jpg</img>, <image>./</image>
        r"\[/?(?-i:IMG)(?:_(?-i:[A-Z]+)|[ _]?\d+)?\]",  # [IMG], [IMG_BREAK]
    )),
    re.IGNORECASE,
)  # fmt: skip
_TAG = rf"(?<!\w)[<＜〈]\s*(?:/\s*)?(?:{_NOUN})s?\s*(?:/\s*)?\\?[>＞〉]"
_WEAK = re.compile(_TAG, re.IGNORECASE)
_ALONE = re.compile(  # at the start of a line, or at the end of a text
    rf"(?:\A|\n)[ \t]*((?:\{{\{{|[\[{{<]<?|__)\s*(?:{_NOUN})s?[ _]?\d*\s*(?:\}}\}}|[\]}}>]>?|__)"
    r"|<(?P<tag>img|image|video|audio)\s(?![^<>]*https?:)[^<>=]*=[^<>]*>(?:\s*</(?P=tag)>)?"
    r"|!\[[^\[\]\n]*\]\((?!https?:)[^()\n]+\)|data:(?:image|video|audio)/[\w.+-]+)|(!\[[^\[\]\n]*\]\((?!https?:)[^()\s]+\))\s*\Z",
    re.IGNORECASE,
)
_HIDDEN = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")  # characters without width
_CLOSING = re.compile(r"</([^<>]*)>")
MAX_TAGS = 100  # in a text; each is looked at with the text around it
_ANSWERS = ("gpt", "assistant", "model", "bot")
_MARKUP = re.compile(
    r"</(?!(?:image|img|video|audio)>)|```|<[a-z]+\s+[a-z-]+(?:=|>|\s+[a-z-]+[=>])|\b(?:x?html5?|css|svg|xml|jsx|javascript|react|dom)\b",
    re.IGNORECASE,
)
_SPOKEN_OF = re.compile(r"[`'\"]|\s*(?:\w+\s+)?(?:tags?|elements?|attributes?|nodes?|components?)\b", re.IGNORECASE)


def may_hold_markers(text: str, number: int) -> bool:
    """Whether a text with `number` image markers has a character that others begin with; a cheap test of many texts."""
    return (
        text.count("<") != number
        or "&" in text or "[" in text or "{" in text or "__" in text or "data:" in text
        or (not text.isascii() and ("＜" in text or "〈" in text))
    )  # fmt: skip


def foreign_markers(turns: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, str]]:
    """Yield (turn, marker) of the markers of other formats, e.g. `<video>` or `<|image_pad|>`, in (role, text) pairs.

    A text that only speaks of an HTML tag has no marker: `<video>` inside a sentence about HTML, in code or quoted.
    """
    turns = list(turns)
    about_markup: bool | None = None
    for k, (role, text) in enumerate(turns):
        if not isinstance(text, str) or not may_hold_markers(text, text.count(IMAGE_MARKER)):
            continue
        plain = html.unescape(html.unescape(text)) if "&" in text else text
        plain = plain if plain.isascii() else _HIDDEN.sub("", plain)
        if plain.count(IMAGE_MARKER) > text.count(IMAGE_MARKER):
            yield k, html.escape(IMAGE_MARKER)
        closed = set(_CLOSING.findall(plain)) if "</" in plain else ()
        for match in islice(_STRONG.finditer(plain), MAX_TAGS):
            in_code = plain.endswith("`", 0, match.start()) and plain.startswith("`", match.end())
            if not in_code and match[0].strip("<>") not in closed:  # an element of XML
                yield k, match[0]
        rest = _STRONG.sub("", plain)
        for match in islice(_WEAK.finditer(rest), MAX_TAGS):
            if match[0] == IMAGE_MARKER:
                continue
            if about_markup is None:
                texts = [text for _, text in turns if isinstance(text, str)]
                about_markup = any(map(_MARKUP.search, texts))
            in_question = role not in _ANSWERS and not about_markup and not _quoted(rest, match)
            if in_question or _stands_alone(rest, match, role):
                yield k, match[0]
        if role not in _ANSWERS and "```" not in rest and "<" not in _ALONE.sub("", rest).replace(IMAGE_MARKER, ""):
            found = (match[1] or match[match.lastindex or 0] for match in _ALONE.finditer(rest))
            yield from ((k, marker) for marker in found if not _WEAK.fullmatch(marker))


def _quoted(text: str, match: re.Match[str]) -> bool:
    before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 40]
    return before in ("`", "'", '"') or _SPOKEN_OF.match(after) is not None


def _stands_alone(text: str, match: re.Match[str], role: Any) -> bool:
    """Whether a tag is where a marker stands: the start of a question, a line of its own, the end after a sentence."""
    if "```" in text or "</" in text.replace(match[0], "") or _quoted(text, match):
        return False
    before, after = text[: match.start()].rstrip(" \t"), text[match.end() :].lstrip(" \t")
    starts, ends = not before or before.endswith("\n"), not after or after.startswith("\n")
    if role in _ANSWERS:
        return not before.strip() and ends
    return (starts and (ends or after[:1].isupper() or not after[:1].isascii())) or (
        ends and before[-1:] in (".", "?", "!", ":", "\n")
    )


def first_of(names: Iterable[str], most: int = 3) -> str:
    """Names for a message, at most `most` of them."""
    listed = [shortened(name, 40) for name in dict.fromkeys(names)]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
