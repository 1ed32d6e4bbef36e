"""Conversation templates: dialogue turns -> segments of text, each supervised or not, for training and for prompts.

A new template is one more `Template` record at the end of this file. `label_mask.py` makes token ids of segments;
`v0_exact` repeats the code released with the paper instead (`released_v0.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from llava_core.constants import IMAGE_MARKER
from llava_core.data.label_mask import Segment, encode
from llava_core.data.released_v0 import encode_released_v0
from llava_core.data.tokenization import Encoded, Turn, image_block
from llava_core.registry import Registry
from llava_core.runtime import DataError

ImagePosition = Literal["data", "first", "last", "random"]


@dataclass(frozen=True)
class Template:
    """The text around questions and answers, and which tokens are supervised.

    Attributes:
        system: default system message; a manifest may have another one.
        opening: text before the first question; may contain `{system}`.
        opening_next: text before the questions of later turns.
        bridge: text between question and answer; generation starts after it.
        closing: text after an answer, supervised: the model learns to stop there.
        eos: the tokenizer's EOS follows `closing` and is supervised.
        image_side: side of the first question that gets the image, if neither the text nor the experiment says it.
        tight_images: white space around images is left out.
        encoder: used instead of `render`, for sequences that segments cannot describe.
    """

    name: str
    system: str
    opening: str = ""
    opening_next: str = ""
    bridge: str = ""
    closing: str = ""
    stop: str | None = None
    eos: bool = False
    image_side: Literal["first", "last"] = "first"
    tight_images: bool = False
    encoder: Callable[..., Encoded] | None = None

    @property
    def instructed(self) -> bool:
        """Whether a prompt needs a question; without one, the text continues after the image."""
        return bool(self.bridge) or self.encoder is not None

    @property
    def trainable(self) -> bool:
        """Whether training teaches where an answer ends; else the template is for prompts only."""
        return bool(self.closing) or self.eos or self.encoder is not None

    def render(self, turns: Sequence[Turn], system: str | None = None) -> list[Segment]:
        """Segments of a conversation; image markers in the questions become image segments."""
        _check_turns(turns)
        if self.encoder is not None:
            raise DataError(f"template '{self.name}' has no segments; fix: call its `encode`")
        segments: list[Segment] = []
        for k, (question, answer) in enumerate(turns):
            opening = (
                self.opening.format(system=self.system if system is None else system) if k == 0 else self.opening_next
            )
            pieces = (opening + question + self.bridge).split(IMAGE_MARKER)
            for n, piece in enumerate(pieces):
                if n:
                    segments.append(Segment("", image=True))
                if self.tight_images:
                    piece = piece.lstrip() if n else piece
                    piece = piece.rstrip() if n < len(pieces) - 1 else piece
                if piece:
                    segments.append(Segment(piece))
            if answer is not None:
                text = f" {answer}{self.closing}" if self.bridge else answer + self.closing
                segments.append(Segment(text, supervised=True, eos=self.eos))
        return segments

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: Any,
        n_image_tokens: int,
        *,
        system: str | None = None,
        delimiters: Sequence[str] | None = None,
        max_length: int | None = None,
        name: str = "sample",
    ) -> Encoded:
        """Token ids and labels of a conversation, or of a prompt, whose last answer is None.

        Args:
            system: system message instead of the template's.
            delimiters: two tokens of the vocabulary around each image, or None.
            max_length: maximum number of tokens; later turns that exceed it are dropped and counted.
            name: the record's name for errors.

        Raises:
            DataError: no turns; a first turn, a prompt or an image beyond `max_length`; an unknown delimiter; no EOS.
        """
        if self.encoder is None:
            return encode(self.render(turns, system), tokenizer, n_image_tokens, max_length, name, delimiters)
        _check_turns(turns)
        block = image_block(tokenizer, n_image_tokens, delimiters)
        return self.encoder(turns, tokenizer, block, self.system if system is None else system, max_length, name)

    def with_image(self, turns: Sequence[Turn], position: ImagePosition = "data", key: str = "") -> list[Turn]:
        """The turns of a dialogue about an image, with the image marker in the first question (see `place_image`).

        If no question has a marker, the first one gets it on the template's side: the released v0 evaluation put the
        image after the question, 1.0 before it.
        """
        (first, answer), *later = turns
        if not any(IMAGE_MARKER in question for question, _ in turns):
            first = f"{IMAGE_MARKER}\n{first}" if self.image_side == "first" else f"{first}\n{IMAGE_MARKER}"
        return [(place_image(first, position, key), answer), *later]


def _check_turns(turns: Sequence[Turn]) -> None:
    if not turns:
        raise DataError("a conversation without turns cannot be rendered; fix: give at least one (question, answer)")
    if any(answer is None for _, answer in turns[:-1]):
        raise DataError("an answer is missing before the last turn; fix: give it, only the last one can be generated")


def place_image(question: str, position: ImagePosition, key: str) -> str:
    """Move the image marker of a question, if it has one; "random" draws a side by `key`, the record's id."""
    if position == "data" or question.count(IMAGE_MARKER) != 1:
        return question
    text = question.replace(IMAGE_MARKER, "").strip("\n")
    if position == "random":
        position = "first" if random.Random(f"image-position-{key}").random() < 0.5 else "last"
    return f"{IMAGE_MARKER}\n{text}" if position == "first" else f"{text}\n{IMAGE_MARKER}"


_SYSTEM = "A curious human talks with a helpful assistant that can see."  # written for this project

TEMPLATES: Registry[Template] = Registry("conversation template")
for _template in (
    # As the paper states it (Table 2): roles Human / Assistant, `###` as stop, answers and stop supervised.
    # An answer follows "Assistant:" directly, in training and in generation.
    Template(
        "v0",
        _SYSTEM,
        opening="{system}\n\n### Human: ",
        opening_next=" Human: ",
        bridge="\n### Assistant:",
        closing="\n###",
        stop="###",
    ),
    # As the code released with the paper computes it, with its demo's or its evaluation's prompt; and as the code
    # of 1.0 does, to which images are no tokens.
    Template("v0_exact", _SYSTEM, stop="###", image_side="last", encoder=encode_released_v0),
    Template("v0_exact_eval", _SYSTEM, stop="###", image_side="last", encoder=partial(encode_released_v0, role=False)),
    Template("v0_exact_1_0", _SYSTEM, stop="###", encoder=partial(encode_released_v0, strip=False)),
    # Vicuna v1.1: USER / ASSISTANT, the EOS token ends an answer.
    _v1 := Template("v1", _SYSTEM, opening="{system} USER: ", opening_next="USER: ", bridge=" ASSISTANT:", eos=True),
    # The same before transformers 4.35, whose slow tokenizers lost white space around the image delimiters.
    replace(_v1, name="v1_tight", tight_images=True),
    # The chat template of llava-hf on the hub, for prompts only: no system message, no EOS after earlier answers.
    Template("v1_hf", "", opening="{system}USER: ", opening_next=" USER: ", bridge=" ASSISTANT:"),
    # Stage 1 of 1.0: image, caption, newline. A record's question precedes the caption and is not supervised, as in the
    # first release of 1.0; later releases left it out.
    Template("plain", "", closing="\n", stop="\n"),
):
    TEMPLATES.register(_template.name)(_template)
