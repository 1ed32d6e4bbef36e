"""Labels exactly as the code released with the paper computes them, by re-tokenising: template `v0_exact`.

That code tokenises the conversation, then each question and answer again, BOS included, and masks the questions by
these lengths. With LLaMA's tokenizer the BOS of a part replaces `▁###`, which is one token at the start of a text and
two (`##`, `#`) inside. So the first two tokens of each question are supervised, and each answer with its role and the
separator after it. Where the image ends the first question, the separator after it starts a new text and stays one
token; the masks of all later questions are then one token too far to the right. With a tokenizer that has no such pair
of tokens every later mask is shifted. That code cut long samples anywhere; here the last turns are dropped.

Source: llava/train/train.py, llava/conversation.py and llava/eval/model_vqa.py of haotian-liu/LLaVA at 8959d5c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_core.constants import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID
from llava_core.data.tokenization import PROMPT_FIX, Encoded, Turn, bos_ids, token_ids, too_long


def encode_released_v0(
    turns: Sequence[Turn],
    tokenizer: Any,
    block: Sequence[int],
    system: str,
    max_length: int | None,
    name: str,
    role: bool = True,
    strip: bool = True,
) -> Encoded:
    """Ids and labels of a conversation; `block` has the ids of an image, the others are as in `Template.encode`.

    If the last answer is None, the result is a prompt, which has no spaces or line breaks around the separators, unlike
    training: the released demo's, which ends with `Assistant:`, or without `role` that of the released evaluation
    (`simple`), which ends with `###`. The evaluation also had a greeting and its reply as a first turn.

    Without `strip`, as the code of 1.0 encodes this template: white space around images stays.
    """
    if turns[-1][1] is None:
        last = "Assistant:" if role else ""
        said = "".join(f"Human: {q}###" + (last if a is None else f"Assistant: {a}###") for q, a in turns)
        ids = _ids(f"{system}###{said}", tokenizer, block, strip)
        if max_length is not None and len(ids) > max_length:
            raise too_long(name, "it is a prompt that", max_length, PROMPT_FIX)
        return Encoded(ids, [IGNORE_INDEX] * len(ids))
    header = f"{system}\n\n"
    parts = [(f"### Human: {q}\n", f"### Assistant: {a}\n") for q, a in turns]
    n_images = sum(part.count(IMAGE_MARKER) for pair in parts for part in pair)
    for kept in range(len(parts), 0, -1):
        text = header + "".join(map("".join, parts[:kept]))
        ids = _ids(f"{text}### ", tokenizer, block, strip)
        if max_length is None or len(ids) <= max_length:
            break
    else:
        raise too_long(name, "its first turn", max_length)
    if text.count(IMAGE_MARKER) < n_images:
        raise too_long(name, "what comes before the end of its last image's turn", max_length)
    position = len(_ids(header, tokenizer, block, strip))
    ignored = set(range(position))
    for question, answer in parts[:kept]:
        length = len(_ids(question, tokenizer, block, strip))
        ignored.update(range(position + 2, position + length))
        position += length + len(_ids(answer, tokenizer, block, strip))
    # a shifted mask may not cover the image: image ids are no tokens of the vocabulary and cannot be targets
    labels = [IGNORE_INDEX if k in ignored or t == IMAGE_TOKEN_ID else t for k, t in enumerate(ids)]
    return Encoded(ids, labels, len(parts) - kept)


def _ids(text: str, tokenizer: Any, block: Sequence[int], strip: bool) -> list[int]:
    """BOS and ids of a text, with the text between two images tokenised as a text of its own.

    To the slow tokenizers of that time images were added tokens, and white space next to an added token vanished.
    """
    ids = bos_ids(tokenizer)
    chunks = text.split(IMAGE_MARKER)
    for k, chunk in enumerate(chunks):
        if k:
            ids += block
            chunk = chunk.lstrip() if strip else chunk
        if k < len(chunks) - 1:
            chunk = chunk.rstrip() if strip else chunk
        ids += token_ids(tokenizer, chunk) if chunk else []
    return ids
