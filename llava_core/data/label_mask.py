"""The label mask: token ids and labels of segments that are supervised or not.

`Template.render` in conversation.py decides which text is supervised (for `v0_exact`, released_v0.py). Ids and labels
are concatenated segment by segment. No text is tokenised again to find boundaries, so a tokenizer cannot shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.tokenization import (
    PROMPT_FIX,
    Encoded,
    bos_ids,
    continues_text,
    image_block,
    restart_ids,
    token_ids,
    too_long,
)
from llava_core.runtime import DataError


@dataclass(frozen=True)
class Segment:
    """A part of a sequence: text or an image (`image`), supervised or not; `eos` appends the tokenizer's EOS."""

    text: str
    supervised: bool = False
    image: bool = False
    eos: bool = False


def encode(
    segments: Sequence[Segment],
    tokenizer: Any,
    n_image_tokens: int,
    max_length: int | None = None,
    name: str = "sample",
    delimiters: Sequence[str] | None = None,
) -> Encoded:
    """Concatenate ids and labels of the segments of `Template.render`; arguments and errors as in `Template.encode`."""
    block = image_block(tokenizer, n_image_tokens, delimiters)
    ids = bos_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    ends: list[int] = []  # ends of the supervised segments, which are ends of turns
    restart = restart_ids(tokenizer)
    for segment in segments:
        piece = block if segment.image else token_ids(tokenizer, segment.text, continues_text(ids, restart))
        if segment.eos:
            if tokenizer.eos_token_id is None:
                raise DataError(f"{name}: its answers end with EOS, but the tokenizer has none; fix: set eos_token")
            piece = [*piece, tokenizer.eos_token_id]
        ids += piece
        labels += piece if segment.supervised else [IGNORE_INDEX] * len(piece)
        if segment.supervised:
            ends.append(len(ids))
    if max_length is None or len(ids) <= max_length:
        return Encoded(ids, labels)
    if not segments[-1].supervised:
        raise too_long(name, "it is a prompt that", max_length, PROMPT_FIX)
    kept = [end for end in ends if end <= max_length]
    if not kept:
        raise too_long(name, "its first turn", max_length)
    if IMAGE_TOKEN_ID in ids[kept[-1] :]:
        raise too_long(name, "what comes before the end of its last image's turn", max_length)
    return Encoded(ids[: kept[-1]], labels[: kept[-1]], len(ends) - len(kept))


def supervised_text(encoded: Encoded, tokenizer: Any) -> str:
    """The decoded supervised tokens, which must equal the answers with their terminators.

    SentencePiece drops the dummy prefix's space, so a span that continues a text is decoded after another token.
    """
    restart, before = restart_ids(tokenizer), token_ids(tokenizer, "a")
    skip = len(_decoded(tokenizer, before))
    text = ""
    span: list[int] = []
    for k, label in enumerate([*encoded.labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX:
            span.append(label)
        elif span:
            continues = continues_text(encoded.input_ids[: k - len(span)], restart)
            text += _decoded(tokenizer, [*before, *span])[skip:] if continues else _decoded(tokenizer, span)
            span = []
    return text


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
