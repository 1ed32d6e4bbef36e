"""From dialogue turns to token ids and labels, segment by segment.

A conversation is rendered to a list of `Segment`s, each marked supervised or not; ids and labels are the concatenation
of the segments' own. Nothing is ever re-tokenised to find a border, so no tokenizer can shift a mask. A later era, data
set or prompt layout is one more `Template` record.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava_core.constants import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID
from llava_core.registry import Registry
from llava_core.runtime import DataError

ImagePosition = Literal["data", "first", "last", "random"]
Turn = tuple[str, str | None]  # (question, answer); the answer of a turn still to be generated is None


@dataclass(frozen=True)
class Segment:
    """A piece of a sequence: text or an image block (`image`), supervised or not; `eos` appends the tokenizer's EOS."""

    text: str
    supervised: bool = False
    image: bool = False
    eos: bool = False


@dataclass(frozen=True)
class Template:
    """How turns become text.

    Attributes:
        name: exact name stored in manifests.
        system: our own default system message (checkpoints of others carry theirs in the manifest).
        opening: text before a question; `{system}` only in the first turn.
        opening_next: text before the questions of later turns.
        bridge: text between question and answer; generation starts after it.
        closing: text that ends an answer and is supervised: where the model learns to stop.
        stop: the string at which generation ends.
        eos: whether the tokenizer's EOS is supervised after `closing`.
    """

    name: str
    system: str
    opening: str
    opening_next: str
    bridge: str
    closing: str
    stop: str | None
    eos: bool = False

    def render(self, turns: Sequence[Turn], system: str | None = None) -> list[Segment]:
        """Segments of a conversation; the image markers inside the questions become image segments."""
        if not turns:
            raise DataError(
                "a conversation without turns cannot be rendered; fix: give at least one (question, answer)"
            )
        segments: list[Segment] = []
        for k, (question, answer) in enumerate(turns):
            opening = (
                self.opening.format(system=self.system if system is None else system) if k == 0 else self.opening_next
            )
            pieces = (opening + question + self.bridge).split(IMAGE_MARKER)
            for n, piece in enumerate(pieces):
                if n:
                    segments.append(Segment("", image=True))
                if piece:
                    segments.append(Segment(piece))
            if answer is not None:
                segments.append(
                    Segment(f" {answer}{self.closing}" if self.bridge else answer + self.closing, True, eos=self.eos)
                )
        return segments


TEMPLATES: Registry[Template] = Registry("conversation template")
for _template in (
    # The paper's statement of its era (Table 2): roles Human / Assistant, `###` as stop, answers and stop supervised.
    # Each answer starts right behind "Assistant:", in training as in generation.
    Template(
        "v0",
        "A curious human talks with a helpful assistant that can see.",
        "{system}\n\n### Human: ",
        " Human: ",
        "\n### Assistant:",
        "\n###",
        "###",
    ),
    # Vicuna v1.1: USER / ASSISTANT, the EOS token ends an answer.
    Template(
        "v1",
        "A curious human talks with a helpful assistant that can see.",
        "{system} USER: ",
        "USER: ",
        " ASSISTANT:",
        "",
        None,
        eos=True,
    ),
    # Era 1.0 stage 1: image, caption, newline; no instruction.
    Template("plain", "", "", "", "", "\n", "\n"),
):
    TEMPLATES.register(_template.name)(_template)


def place_image(question: str, position: ImagePosition, key: str) -> str:
    """Move the image marker of a first question.

    Args:
        question: text with at most one `<image>` on its own line.
        position: "data" keeps the file's place, "first" / "last" put it there, "random" draws one of both per record.
        key: the record's id: the draw of "random" depends on it alone.

    Returns:
        The question with the marker moved; unchanged where there is none.
    """
    if position == "data" or question.count(IMAGE_MARKER) != 1:
        return question
    text = question.replace(IMAGE_MARKER, "").strip("\n")
    if position == "random":
        position = "first" if random.Random(f"image-position-{key}").random() < 0.5 else "last"
    return f"{IMAGE_MARKER}\n{text}" if position == "first" else f"{text}\n{IMAGE_MARKER}"


@dataclass
class Encoded:
    """Token ids and labels of one sample, both lists of T ints; image ids are `IMAGE_TOKEN_ID`, ignored labels -100."""

    input_ids: list[int]
    labels: list[int]
    n_images: int


def encode(
    segments: Sequence[Segment],
    tokenizer: Any,
    n_image_tokens: int,
    max_length: int | None = None,
    name: str = "sample",
) -> Encoded:
    """Concatenate the segments' ids and labels.

    Args:
        segments: what `Template.render` gave.
        tokenizer: a transformers tokenizer; its BOS, if it has one, opens the sequence unsupervised.
        n_image_tokens: visual tokens that one image becomes.
        max_length: most tokens allowed; later turns are dropped whole to keep it, an image block is never cut.
        name: the record's name for errors.

    Returns:
        Ids and labels of equal length.

    Raises:
        DataError: the first turn alone is too long.
    """
    ids: list[int] = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    labels: list[int] = [IGNORE_INDEX] * len(ids)
    n_images, complete = 0, None
    for segment in segments:
        piece = [IMAGE_TOKEN_ID] * n_image_tokens if segment.image else token_ids(tokenizer, segment.text)
        if segment.eos:
            piece = [*piece, tokenizer.eos_token_id]
        if max_length is not None and len(ids) + len(piece) > max_length:
            if complete is None:
                raise DataError(
                    f"{name}: its first turn needs more than max_length = {max_length} tokens; "
                    "fix: shorten it or raise train.max_length"
                )
            ids, labels, n_images = ids[: complete[0]], labels[: complete[0]], complete[1]
            break
        ids += piece
        labels += piece if segment.supervised else [IGNORE_INDEX] * len(piece)
        n_images += segment.image
        if segment.supervised:
            complete = (len(ids), n_images)
    return Encoded(ids, labels, n_images)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def supervised_text(encoded: Encoded, tokenizer: Any) -> str:
    """The decoded supervised tokens: must equal the answers with their terminators."""
    return str(tokenizer.decode([t for t in encoded.labels if t != IGNORE_INDEX]))


def coverage(samples: Sequence[Encoded]) -> float:
    """Share of supervised tokens over all samples."""
    return sum(sum(t != IGNORE_INDEX for t in s.labels) for s in samples) / max(1, sum(len(s.labels) for s in samples))
