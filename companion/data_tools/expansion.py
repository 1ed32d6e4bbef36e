"""Naive expansion: a caption becomes a record with a question drawn from several wordings of the same request.

Source: paper, section 3 and appendix F, Tables 11 (brief) and 12 (detailed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from llava_core.constants import IMAGE_MARKER
from llava_core.registry import unknown
from llava_core.runtime import DataError, display_path

T = TypeVar("T")


def _own_list(name: str) -> tuple[str, ...]:
    path = Path(__file__).with_name(f"{name}_instructions.txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


BRIEF_INSTRUCTIONS, DETAIL_INSTRUCTIONS = _own_list("brief"), _own_list("detail")
LISTS = {"brief": BRIEF_INSTRUCTIONS, "detail": DETAIL_INSTRUCTIONS}
"""Wordings of this project, as many as the paper has: 11 for captions, 16 for detailed descriptions."""


def load_instructions(source: str | Path) -> tuple[str, ...]:
    """Instructions `brief` or `detail`, or of a UTF-8 file with one per line, such as the official list.

    Empty lines, bullets and quotation marks around a line are ignored. Raises DataError for an unknown name, and for a
    file without instructions, with one twice or with one that has the marker.
    """
    if str(source) in LISTS:
        return LISTS[str(source)]
    path = Path(source)
    if not path.is_file():
        wrong = unknown("list of instructions", str(source), LISTS)
        raise DataError(f"{wrong}; or name a text file of one instruction per line")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{display_path(path)}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip().removeprefix("- ").removeprefix("• ").strip()
        text = text[1:-1].strip() if len(text) > 1 and text[0] + text[-1] in ('""', "“”") else text
        if IMAGE_MARKER in text:
            raise DataError(
                f"{display_path(path)}, line {number}: {IMAGE_MARKER} is added later; remove it from the line"
            )
        if text in line_of:
            raise DataError(
                f"{display_path(path)}, line {number}: the same instruction as line {line_of[text]}; remove one"
            )
        if text:
            line_of[text] = number
    if not line_of:
        raise DataError(f"{display_path(path)}: no instruction in it; write one per line")
    return tuple(line_of)


def draw(choices: Sequence[T], record: str, seed: int = 0) -> T:
    """Uniform choice for a record, by a hash of the seed and the record's id."""
    digest = hashlib.sha256(f"{seed}:{record}".encode(errors="surrogatepass")).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def expand(
    caption: str, record: str, instructions: Sequence[str], seed: int = 0, image: bool = True
) -> list[dict[str, str]]:
    """The two turns of a caption's record; its id and the seed decide the question and the side of the image.

    With an image the marker is before or after the question, each in half of the records (paper, equation 2).
    """
    question = draw(instructions, record, seed)
    if image:
        parts = [IMAGE_MARKER, question]
        question = "\n".join(draw((parts, parts[::-1]), f"side:{record}", seed))
    return [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
