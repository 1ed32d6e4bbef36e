"""From dialogue turns to token ids and labels: `Template.encode` is the one way in, for training and for prompts alike.

A conversation is rendered to a list of `Segment`s, each marked supervised or not; ids and labels are the concatenation
of the segments' own. Nothing is ever re-tokenised to find a border, so no tokenizer can shift a mask. A later era, data
set or prompt layout is one more `Template` record.

One record, `v0_exact`, does re-tokenise: it repeats the code that was released with the paper, faults included, for
whoever wants that code's numbers or its checkpoints' own prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

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


@dataclass
class Encoded:
    """Token ids and labels of one sample, both lists of T ints; image ids are `IMAGE_TOKEN_ID`, ignored labels -100.

    `dropped_turns` counts the turns at the end that did not fit into the longest length allowed.
    """

    input_ids: list[int]
    labels: list[int]
    n_images: int
    dropped_turns: int = 0


@dataclass(frozen=True)
class Template:
    """How turns become text, and which of its tokens are supervised.

    Attributes:
        name: exact name stored in manifests.
        system: our own default system message (checkpoints of others carry theirs in the manifest).
        opening: text before a question; `{system}` only in the first turn.
        opening_next: text before the questions of later turns.
        bridge: text between question and answer; generation starts after it.
        closing: text that ends an answer and is supervised: where the model learns to stop.
        stop: the string at which generation ends.
        eos: whether the tokenizer's EOS is supervised after `closing`.
        image_side: where the image goes, seen from the first question, if neither the text nor the experiment says it.
        encoder: for an era whose sequences no list of segments can describe: a function that makes them instead of
            `render`; the texts from `opening` to `closing` are then its own affair and stay empty here.
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
    encoder: Callable[..., Encoded] | None = None

    @property
    def instructed(self) -> bool:
        """Whether a question is needed; without one, text goes on right behind the image."""
        return bool(self.bridge) or self.encoder is not None

    def render(self, turns: Sequence[Turn], system: str | None = None) -> list[Segment]:
        """Segments of a conversation; the image markers inside the questions become image segments.

        Raises:
            DataError: no turns, an answer missing before the last one, or a template that has no segments.
        """
        _check_turns(turns)
        if self.encoder is not None:
            raise DataError(f"template '{self.name}' is not made of segments; fix: call its `encode`")
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
        """Ids and labels of a conversation, the same way for training and for a prompt.

        Args:
            turns: (question, answer) each; the last answer is None where it is to be generated.
            tokenizer: a transformers tokenizer; its BOS, if it has one, opens the sequence unsupervised.
            n_image_tokens: visual tokens that one image becomes.
            system: system message instead of the template's own.
            delimiters: two tokens of the vocabulary that enclose each image block, or None.
            max_length: most tokens allowed; later turns are dropped whole to keep it, and counted.
            name: the record's name for errors.

        Returns:
            Ids and labels of equal length; nothing of a turn that is still to be answered is supervised.

        Raises:
            DataError: no turns; a first turn, a prompt or an image beyond `max_length`; an unknown delimiter.
        """
        if self.encoder is None:
            return encode(self.render(turns, system), tokenizer, n_image_tokens, max_length, name, delimiters)
        _check_turns(turns)
        block = image_block(tokenizer, n_image_tokens, delimiters)
        return self.encoder(turns, tokenizer, block, self.system if system is None else system, max_length, name)

    def with_image(self, turns: Sequence[Turn], position: ImagePosition = "data", key: str = "") -> list[Turn]:
        """The turns of a dialogue about an image, with the image marker where it belongs.

        Where no question has a marker, the first one gets it. With "data" the template decides the side, because the
        eras differ: the paper's data has the image on either side, the released v0 evaluation put it behind the
        question, 1.0 before it. All of ours but `v0_exact` put it before.

        Args:
            turns: the dialogue.
            position: the experiment's image position (see `place_image`), as its manifest records it.
            key: the record's id.
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


# ------------------------------------------------------------------------------------------------ segments to ids


def encode(
    segments: Sequence[Segment],
    tokenizer: Any,
    n_image_tokens: int,
    max_length: int | None = None,
    name: str = "sample",
    delimiters: Sequence[str] | None = None,
) -> Encoded:
    """Concatenate the segments' ids and labels.

    Args:
        segments: what `Template.render` gave.
        tokenizer: a transformers tokenizer; its BOS, if it has one, opens the sequence unsupervised.
        n_image_tokens: visual tokens that one image becomes.
        max_length: most tokens allowed; later turns are dropped whole to keep it, an image block is never cut.
        name: the record's name for errors.
        delimiters: two tokens that enclose each image block, or None.

    Returns:
        Ids and labels of equal length.

    Raises:
        DataError: the first turn alone, a turn with an image, or a prompt is too long; an unknown delimiter; or the
            template ends answers with an EOS that the tokenizer does not have.
    """
    block = image_block(tokenizer, n_image_tokens, delimiters)
    ids = _bos(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    ends: list[int] = []  # of the supervised segments: where a turn is complete
    marks = _marks(tokenizer)
    for segment in segments:
        piece = block if segment.image else token_ids(tokenizer, segment.text, _continues(ids, marks))
        if segment.eos:
            if tokenizer.eos_token_id is None:
                raise DataError(f"{name}: its answers end with EOS, but the tokenizer has none; fix: set eos_token")
            piece = [*piece, tokenizer.eos_token_id]
        ids += piece
        labels += piece if segment.supervised else [IGNORE_INDEX] * len(piece)
        if segment.supervised:
            ends.append(len(ids))
    n_images = sum(segment.image for segment in segments)
    if max_length is None or len(ids) <= max_length:
        return Encoded(ids, labels, n_images)
    if not segments[-1].supervised:
        raise _too_long(name, "it is a prompt that", max_length, "leave out earlier turns or shorten the question")
    kept = [end for end in ends if end <= max_length]
    if not kept:
        raise _too_long(name, "its first turn", max_length)
    if IMAGE_TOKEN_ID in ids[kept[-1] :]:
        raise _too_long(name, "what comes before the end of its last image's turn", max_length)
    return Encoded(ids[: kept[-1]], labels[: kept[-1]], n_images, len(ends) - len(kept))


def _too_long(
    name: str, what: str, max_length: int | None, fix: str = "shorten it or raise train.max_length"
) -> DataError:
    return DataError(f"{name}: {what} needs more than max_length = {max_length} tokens; fix: {fix}")


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def image_block(tokenizer: Any, n_image_tokens: int, delimiters: Sequence[str] | None = None) -> list[int]:
    """Ids that stand for one image.

    Args:
        tokenizer: knows the delimiters.
        n_image_tokens: visual tokens of an image.
        delimiters: begin and end token around the image, as checkpoints of the v0 era have them; None: none.

    Raises:
        DataError: not two delimiters, or one that is no token of the vocabulary.
    """
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


def _marks(tokenizer: Any) -> set[int]:
    """Ids behind which a text begins: images and the tokens added to the vocabulary, BOS and EOS among them."""
    return {IMAGE_TOKEN_ID, tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}


def _continues(ids: Sequence[int], marks: set[int]) -> bool:
    """Whether text behind `ids` goes on where other text ended."""
    return bool(ids) and ids[-1] not in marks


def token_ids(tokenizer: Any, text: str, continues: bool = False) -> list[int]:
    """Ids of a text without special tokens added.

    Args:
        tokenizer: a transformers tokenizer.
        text: what to tokenise.
        continues: the text goes on where other text ended. A tokenizer of SentencePiece's kind puts a word mark before
            whatever it is given; at the beginning of a text, and behind an image or an EOS, that is its way (and the
            eras' own code had it so); inside a text it would be a space that nobody wrote.

    Raises:
        DataError: a text continues, and the tokenizer cannot be asked to leave its mark away.
    """
    bare = _without_word_mark(tokenizer) if continues else None
    ids: list[int] = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare is None
        else bare.encode(text, add_special_tokens=False).ids
    )
    return ids


_BARE: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def _without_word_mark(tokenizer: Any) -> Any:
    """The tokenizer's backend without the steps that put a word mark before a text; None where it has no such step."""
    size = len(tokenizer)
    if tokenizer not in _BARE or _BARE[tokenizer][0] != size:  # tokens may have been added since
        _BARE[tokenizer] = (size, _make_bare(tokenizer))
    return _BARE[tokenizer][1]


def _make_bare(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        first = tokenizer.convert_ids_to_tokens(tokenizer("#", add_special_tokens=False)["input_ids"])[0]
        if first.startswith("▁"):
            raise DataError(f"{type(tokenizer).__name__} marks the beginning of every text; fix: load it as a fast one")
        return None
    from tokenizers import Tokenizer

    described = json.loads(backend.to_str())
    steps = {part: described[part] for part in ("normalizer", "pre_tokenizer")}
    bare = {part: _without_prefix(step) for part, step in steps.items()}
    if bare == steps:
        return None
    return Tokenizer.from_str(json.dumps({**described, **bare, "truncation": None, "padding": None}))


def _without_prefix(step: Any) -> Any:
    """A tokenizer's step, as `tokenizers` describes it, that puts nothing before the text; None if nothing is left."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [left for part in step[key] if (left := _without_prefix(part)) is not None]}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never.get(key, value) for key, value in step.items()}


# ------------------------------------------------------------------------------------------------ the released v0 code


def _encode_release_v0(
    turns: Sequence[Turn], tokenizer: Any, block: Sequence[int], system: str, max_length: int | None, name: str
) -> Encoded:
    """Ids and labels as the released v0 code makes them.

    That code tokenises the whole conversation, then measures its parts by tokenising each of them alone, BOS included,
    and masks the questions by these lengths. With LLaMA's tokenizer the BOS of a part makes up for `▁###`, one piece at
    the beginning of a text and two (`##`, `#`) inside. So each question's first two tokens are supervised, and replies
    wholly, with their role and with the marks after them. Where the image ends the first question, the reply's marks
    begin a chunk of text of their own and stay one piece; nothing makes up for its BOS, and the masks of all later
    questions lie one token too far to the right. A tokenizer without such a pair of pieces shifts every later mask.

    One departure: that code cut what was too long anywhere; here whole turns are dropped, as by every template.

    Args:
        turns: the conversation; with a last answer of None, the prompt that the released evaluation made: no spaces or
            line breaks around the marks, unlike in training.
        block: the ids of an image.
        system, max_length, name: as in `Template.encode`.

    Source: llava/train/train.py, llava/conversation.py and llava/eval/model_vqa.py of haotian-liu/LLaVA at 8959d5c.
    """
    if turns[-1][1] is None:
        said = "".join(f"Human: {q}###" + ("Assistant:" if a is None else f"Assistant: {a}###") for q, a in turns)
        ids = _whole_ids(f"{system}###{said}", tokenizer, block)
        if max_length is not None and len(ids) > max_length:
            raise _too_long(name, "it is a prompt that", max_length, "leave out earlier turns or shorten the question")
        return Encoded(ids, [IGNORE_INDEX] * len(ids), said.count(IMAGE_MARKER))
    header = f"{system}\n\n"
    parts = [(f"### Human: {q}\n", f"### Assistant: {a}\n") for q, a in turns]
    n_images = sum(part.count(IMAGE_MARKER) for pair in parts for part in pair)
    for kept in range(len(parts), 0, -1):
        text = header + "".join(map("".join, parts[:kept]))
        ids = _whole_ids(f"{text}### ", tokenizer, block)
        if max_length is None or len(ids) <= max_length:
            break
    else:
        raise _too_long(name, "its first turn", max_length)
    if text.count(IMAGE_MARKER) < n_images:
        raise _too_long(name, "what comes before the end of its last image's turn", max_length)
    place = len(_whole_ids(header, tokenizer, block))
    ignored = set(range(place))
    for question, answer in parts[:kept]:
        length = len(_whole_ids(question, tokenizer, block))
        ignored.update(range(place + 2, place + length))
        place += length + len(_whole_ids(answer, tokenizer, block))
    # a mask that has slipped off an image must not make our image ids, which are no words, a target
    labels = [IGNORE_INDEX if k in ignored or t == IMAGE_TOKEN_ID else t for k, t in enumerate(ids)]
    return Encoded(ids, labels, n_images, len(parts) - kept)


def _whole_ids(text: str, tokenizer: Any, block: Sequence[int]) -> list[int]:
    """BOS and ids of a text at once, as the slow tokenizers of that time saw images, which were added tokens to them.

    White space beside an added token vanished, and what lay between two of them was tokenised as a text of its own.
    """
    ids = _bos(tokenizer)
    chunks = text.split(IMAGE_MARKER)
    for k, chunk in enumerate(chunks):
        if k:
            ids += block
            chunk = chunk.lstrip()
        if k < len(chunks) - 1:
            chunk = chunk.rstrip()
        ids += token_ids(tokenizer, chunk) if chunk else []
    return ids


# ------------------------------------------------------------------------------------------------ what is supervised


def supervised_text(encoded: Encoded, tokenizer: Any) -> str:
    """The decoded supervised tokens: must equal the answers with their terminators.

    Each unbroken row of them is decoded as what it is, the beginning of a text or its continuation: decoders of
    SentencePiece's kind drop a space at the beginning, as its tokenizers have put one there.
    """
    marks, before = _marks(tokenizer), token_ids(tokenizer, "a")
    skip = len(_decoded(tokenizer, before))
    text = ""
    row: list[int] = []
    for k, label in enumerate([*encoded.labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX:
            row.append(label)
        elif row:
            inside = _continues(encoded.input_ids[: k - len(row)], marks)
            text += _decoded(tokenizer, [*before, *row])[skip:] if inside else _decoded(tokenizer, row)
            row = []
    return text


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def coverage(samples: Sequence[Encoded]) -> float:
    """Share of supervised tokens over all samples."""
    return sum(sum(t != IGNORE_INDEX for t in s.labels) for s in samples) / max(1, sum(len(s.labels) for s in samples))


# ------------------------------------------------------------------------------------------------ the templates

_SYSTEM = "A curious human talks with a helpful assistant that can see."  # our own words

TEMPLATES: Registry[Template] = Registry("conversation template")
for _template in (
    # The paper's statement of its era (Table 2): roles Human / Assistant, `###` as stop, answers and stop supervised.
    # Each answer starts right behind "Assistant:", in training as in generation.
    Template("v0", _SYSTEM, "{system}\n\n### Human: ", " Human: ", "\n### Assistant:", "\n###", "###"),
    # What the released code of that era did instead; checkpoints of others bring their system message in the manifest.
    Template("v0_exact", _SYSTEM, stop="###", image_side="last", encoder=_encode_release_v0),
    # Vicuna v1.1: USER / ASSISTANT, the EOS token ends an answer.
    Template("v1", _SYSTEM, "{system} USER: ", "USER: ", " ASSISTANT:", "", None, eos=True),
    # Stage 1 of 1.0: image, caption, newline. A question, if the record has one, stands before the caption and is not
    # supervised, as in the first release of 1.0; later releases left it out.
    Template("plain", "", "", "", "", "\n", "\n"),
):
    TEMPLATES.register(_template.name)(_template)
