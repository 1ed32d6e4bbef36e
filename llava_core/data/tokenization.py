"""Token ids of text pieces and images.

A sequence is tokenised piece by piece. A SentencePiece tokenizer adds a dummy prefix (`▁`, a space) to every text it is
given. That is right at the start of a text, and wrong for a piece that continues a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.runtime import DataError

T = TypeVar("T")
Turn = tuple[str, str | None]
"""(question, answer); the answer of a turn that is to be generated is None."""


@dataclass
class Encoded:
    """Token ids and labels of one sample: two lists of T ints.

    Image positions are `IMAGE_TOKEN_ID`, ignored labels -100; `dropped_turns` exceeded the maximum length.
    """

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0


def bos_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def image_block(tokenizer: Any, n_image_tokens: int, delimiters: Sequence[str] | None = None) -> list[int]:
    """Token ids of one image, with a begin and an end token around it if there are `delimiters`."""
    block = [IMAGE_TOKEN_ID] * n_image_tokens
    if delimiters is None:
        return block
    if isinstance(delimiters, str) or len(delimiters) != 2:
        raise DataError(f"image_delimiters is {delimiters!r}; fix: name two tokens, begin and end, or leave it out")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in delimiters]
    for token, number in zip(delimiters, ids, strict=True):
        if number is None or (number == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise DataError(
                f"image delimiter '{token}' is no token of the vocabulary; fix: use the tokenizer that came with the "
                "checkpoint, or correct image_delimiters in its manifest"
            )
    return [ids[0], *block, ids[1]]


def _remembered(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Call a function once per tokenizer, and again after tokens were added to it."""
    known: WeakKeyDictionary[Any, tuple[int, T]] = WeakKeyDictionary()

    @wraps(function)
    def remembered(tokenizer: Any) -> T:
        size = len(tokenizer)
        if tokenizer not in known or known[tokenizer][0] != size:
            known[tokenizer] = (size, function(tokenizer))
        return known[tokenizer][1]

    return remembered


@_remembered
def restart_ids(tokenizer: Any) -> set[int]:
    """Ids after which a text is a new text, with a dummy prefix: BOS, images, and, by tokenizer, other special tokens.

    LLaMA's tokenizer begins anew after EOS and added tokens if it is a `legacy` one, else only at the start.
    """
    special = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}
    after, alone = (tokenizer(f"{s}a", add_special_tokens=False)["input_ids"] for s in (tokenizer.eos_token or "", ""))
    return {IMAGE_TOKEN_ID, tokenizer.bos_token_id} | (special if after[-len(alone) :] == alone else set())


def continues_text(ids: Sequence[int], restart: set[int]) -> bool:
    """Whether a text after `ids` continues another text."""
    return bool(ids) and ids[-1] not in restart


def token_ids(tokenizer: Any, text: str, continues: bool = False) -> list[int]:
    """Token ids of a text, without special tokens; if it `continues` another text, without the dummy prefix.

    The prefix would be a space that is not in the data. A tokenizer that cannot leave it out is a DataError.
    """
    backend = _without_dummy_prefix(tokenizer) if continues else None
    ids: list[int] = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        if backend is None
        else backend.encode(text, add_special_tokens=False).ids
    )
    return ids


@_remembered
def _without_dummy_prefix(tokenizer: Any) -> Any:
    """The tokenizer's backend without the steps that add a dummy prefix; None if it has no such step."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        first = tokenizer.convert_ids_to_tokens(tokenizer("#", add_special_tokens=False)["input_ids"])[0]
        if first.startswith("▁"):
            raise DataError(
                f"{type(tokenizer).__name__} adds a dummy prefix to every text; fix: load the fast tokenizer"
            )
        return None
    from tokenizers import Tokenizer

    described = json.loads(backend.to_str())
    steps = {part: described[part] for part in ("normalizer", "pre_tokenizer")}
    prefix_free = {part: _without_prefix(step) for part, step in steps.items()}
    if prefix_free == steps:
        return None
    return Tokenizer.from_str(json.dumps({**described, **prefix_free, "truncation": None, "padding": None}))


def _without_prefix(step: Any) -> Any:
    """A step of the `tokenizers` format that adds no prefix; None if nothing of it is left."""
    if step is None or step["type"] in ("Prepend", "Strip"):  # a text that continues another may begin with a space
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [left for part in step[key] if (left := _without_prefix(part)) is not None]}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never.get(key, value) for key, value in step.items()}


def too_long(name: str, what: str, max_length: int | None, fix: str = "") -> DataError:
    """The error for a sample that exceeds the maximum length."""
    fix = fix or "shorten it or raise train.max_length"
    return DataError(f"{name}: {what} needs more than max_length = {max_length} tokens; fix: {fix}")


PROMPT_FIX = "leave out earlier turns or shorten the question"
