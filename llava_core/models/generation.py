"""Batched generation with a KV cache: greedy or sampled, left-padded, with settings and end per row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_core.models.kv_cache import PrefixCache, preallocated_cache
from llava_core.models.llava import Llava
from llava_core.runtime import ConfigError, DataError

Finish = Literal["stop", "length"]
REPLACEMENT = "\ufffd"
"""What tokenizers decode an incomplete character to."""


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one row.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample from the fewest tokens whose probabilities sum to this; at least one.
        stop: a string or several; the first to appear ends the row and is removed.
        seed: of the row's random numbers, which do not depend on the batch. Rows with one seed draw the same.
        top_k: sample from the k most probable tokens; 0 for all.
        stop_ids: tokens that end the row, besides the tokenizer's EOS and those of the model's generation config.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | Sequence[str] | None = None
    seed: int = 0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wrong = {
            f"max_new_tokens = {self.max_new_tokens}; at least 1": self.max_new_tokens < 1,
            f"temperature = {self.temperature}; 0 (greedy) or more": not self.temperature >= 0,
            f"top_p = {self.top_p}; between 0 and 1": not 0 <= self.top_p <= 1,
            f"top_k = {self.top_k}; 0 (all) or more": self.top_k < 0,
            f"stop = {self.stop!r}; an empty string would end every row at once, use None": "" in self.stops,
        }
        for message in (m for m, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"generation: {message}")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(frozen=True)
class Generated:
    """A row's continuation.

    Attributes:
        text: complete characters, stripped, without the stop; an unfinished row omits what may become a stop.
        token_ids: all new ids, including those of the stop or the end token.
        finish: "stop" at a stop string or an end token; "length" at `max_new_tokens`; None while unfinished.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None


def _sample(
    logits: torch.Tensor, settings: Sequence[GenerationSettings], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """The next ids (B,) from logits (B, V), with settings and generator per row."""
    greedy = logits.argmax(-1)
    if not any(s.temperature for s in settings):
        return greedy

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    p = torch.softmax(logits.double() / column([s.temperature or 1.0 for s in settings]), -1)
    if any(s.top_k or s.top_p < 1 for s in settings):
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        rank = torch.arange(p.shape[-1], device=p.device)
        kept = before < column([s.top_p for s in settings])
        kept &= rank < column([s.top_k or torch.inf for s in settings])
        kept[:, 0] = True
        p = p * torch.zeros_like(kept).scatter(-1, order, kept)
    # one uniform number per row, drawn on the CPU: the same on every device and in every batch
    u = column([float(torch.rand((), generator=g, dtype=torch.float64)) for g in generators])
    cumulative = p.cumsum(-1)
    sampled = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(-1)
    return torch.where(column([s.temperature for s in settings])[:, 0] > 0, sampled, greedy)


Prompts = Sequence[Sequence[int]]
Settings = GenerationSettings | Sequence[GenerationSettings] | None


class _RowText:
    """Incremental detokenisation of a row: no incomplete character, no start of a stop string, nothing retracted."""

    window = 16  # tokens decoded at once; decoding the complete answer each time would be quadratic

    def __init__(self, tokenizer: Any, settings: GenerationSettings, end_ids: frozenset[int]) -> None:
        self.tokenizer, self.settings, self.stops = tokenizer, settings, settings.stops
        self.end_ids = end_ids | frozenset(settings.stop_ids)
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.text = ""  # complete characters
        self._begin = self._middle = self._end = 0  # start of the window; start and end of its last complete piece
        self._decoded = ""  # text of the window up to `_end`

    def add(self, token: int) -> None:
        """Append the next id; the row may end here."""
        self.ids.append(token)
        if token in self.end_ids:
            self.finish = "stop"
            # text that an incomplete character delayed, without that character
            self.text += self._decode(self.ids[self._begin : -1])[len(self._decoded) :].rstrip(REPLACEMENT)
            return
        window = self._decode(self.ids[self._begin :])
        piece = window[len(self._decoded) :]
        text = self.text + piece.rstrip(REPLACEMENT)
        # a stop may have several tokens and begin inside one: search the text, not the ids
        searched = len(self.text) - max(map(len, self.stops), default=0)
        starts = [start for stop in self.stops if (start := text.find(stop, max(0, searched))) >= 0]
        if starts:
            self.text, self.finish = text[: min(starts)], "stop"
        elif len(self.ids) == self.settings.max_new_tokens:
            self.text, self.finish = text, "length"
        elif not piece.endswith(REPLACEMENT):
            self.text, self._decoded = text, window
            self._middle, self._end = self._end, len(self.ids)
            if self._end - self._begin > self.window:
                self._begin = self._middle  # between two characters, like every start of a complete piece
                self._decoded = self._decode(self.ids[self._begin :])

    def _decode(self, ids: Sequence[int]) -> str:
        # cleaning up would retract a space before a full stop
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""

    def generated(self) -> Generated:
        text = self.text
        if self.finish is None:
            partial = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(partial, default=0)]
        return Generated(text.strip(), tuple(self.ids), self.finish)


def end_ids(model: Llava, tokenizer: Any) -> frozenset[int]:
    """Ids that end every row: the tokenizer's EOS and those of the language model's generation config."""
    listed = getattr(getattr(model.language_model, "generation_config", None), "eos_token_id", None)
    several = listed if isinstance(listed, list | tuple) else [listed]
    return frozenset(int(i) for i in (tokenizer.eos_token_id, *several) if i is not None)


class DecodeLoop:
    """The decode loop of a batch: prefill, then one new token per row and step; arguments and errors as in `stream`."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Llava,
        prompts: Prompts,
        pixel_values: torch.Tensor | None = None,
        settings: Settings = None,
        image_features: torch.Tensor | None = None,
        prefix: PrefixCache | None = None,
    ) -> None:
        self.settings = _checked_settings(model, prompts, settings)
        if prefix is not None and len(prompts) > 1:
            raise DataError(f"generation: a prefix cache holds one row, but there are {len(prompts)} prompts")
        self.model, self.prefix = model.eval(), prefix
        self.generators = [torch.Generator().manual_seed(s.seed) for s in self.settings]
        device = model.language_model.device
        reversed_rows = [torch.tensor(list(p)).flip(0) for p in prompts]
        ids = pad_sequence(reversed_rows, batch_first=True, padding_value=0).flip(1).to(device)  # (B, T), left-padded
        self.length, cached = ids.shape[1], 0
        padding = self.length - torch.tensor([len(p) for p in prompts], device=device)
        # without padding the language model needs no mask and counts the positions itself
        self.padding = padding if bool(padding.any()) else None
        if prefix is None:
            self.cache = preallocated_cache(model.language_model)
        else:
            self.cache, cached = prefix.take(prompts[0], model.language_model)
            prefix.ids = list(prompts[0])
        self.embeds = model.embed(ids, pixel_values, image_features)[:, cached:]  # what the next step feeds
        self.tokens: list[int] = []  # the last ids, not fed yet

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Run the language model once and return the next id of each row."""
        language_model, mask, positions = self.model.language_model, None, None
        if self.padding is not None:
            positions = torch.arange(self.length, device=self.padding.device) - self.padding[:, None]  # (B, T)
            mask, positions = (positions >= 0).long(), positions.clamp(min=0)[:, -self.embeds.shape[1] :]
        if self.prefix is not None:
            self.prefix.cache = None  # an interrupted step would leave layers of different lengths
        output = language_model(
            inputs_embeds=self.embeds, attention_mask=mask, position_ids=positions, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        if self.prefix is not None:
            self.prefix.cache = self.cache
            self.prefix.ids += self.tokens
        tokens = _sample(output.logits[:, -1], self.settings, self.generators)
        self.embeds = language_model.get_input_embeddings()(tokens[:, None])
        self.length += 1
        self.tokens = tokens.tolist()
        return self.tokens

    @torch.inference_mode()
    def drop_finished(self, unfinished: Sequence[int]) -> None:
        """Continue with these rows only: a finished row costs nothing more."""
        index = torch.tensor(unfinished, device=self.embeds.device)
        self.embeds = self.embeds[index]
        self.padding = self.padding[index] if self.padding is not None else None
        self.cache.batch_select_indices(index)
        self.settings = [self.settings[k] for k in unfinished]
        self.generators = [self.generators[k] for k in unfinished]

    def decode(self, tokenizer: Any) -> Iterator[list[_RowText]]:
        """Step until all rows are finished; yields all rows after each step."""
        ends = end_ids(self.model, tokenizer)
        rows = [_RowText(tokenizer, s, ends) for s in self.settings]
        active = list(range(len(rows)))
        while active:
            for k, token in zip(active, self.step(), strict=True):
                rows[k].add(token)
            yield rows
            unfinished = [n for n, k in enumerate(active) if rows[k].finish is None]
            if 0 < len(unfinished) < len(active):
                self.drop_finished(unfinished)
            active = [active[n] for n in unfinished]


def _checked_settings(model: Llava, prompts: Prompts, settings: Settings) -> list[GenerationSettings]:
    if not prompts:
        raise DataError("generation: no prompts; fix: give at least one list of ids")
    if settings is None or isinstance(settings, GenerationSettings):
        settings = [settings or GenerationSettings()] * len(prompts)
    if len(settings) != len(prompts):
        raise DataError(
            f"generation: {len(settings)} settings for {len(prompts)} prompts; fix: one for all or one each"
        )
    limit = getattr(model.language_model.config.get_text_config(), "max_position_embeddings", None)
    for k, (prompt, row) in enumerate(zip(prompts, settings, strict=True), start=1):
        if not len(prompt):
            raise DataError(f"generation: prompt {k} of {len(prompts)} is empty; fix: begin with BOS or some text")
        if limit is not None and len(prompt) + row.max_new_tokens > limit:
            raise DataError(
                f"generation: prompt {k} of {len(prompts)} has {len(prompt)} tokens; with max_new_tokens = "
                f"{row.max_new_tokens} they pass the language model's {limit} positions; fix: shorten the prompt "
                f"(fewer turns), or set max_new_tokens to at most {max(0, limit - len(prompt))}"
            )
    return list(settings)


def stream(
    model: Llava,
    tokenizer: Any,
    prompts: Prompts,
    pixel_values: torch.Tensor | None = None,
    settings: Settings = None,
    *,
    image_features: torch.Tensor | None = None,
    prefix: PrefixCache | None = None,
) -> Iterator[list[Generated]]:
    """Continue each prompt and yield all rows after each token; the text of a row only grows.

    Args:
        prompts: B lists of ids with image blocks, of any lengths and numbers of images.
        pixel_values: (N, 3, H, W) images in row order.
        settings: for all rows, or one per row.
        image_features: (N, P, D) from `Llava.encode_images`, instead of `pixel_values`.
        prefix: holds the KV cache of a single prompt, and reuses what this prompt shares with the previous one.

    Raises:
        DataError: no prompts, an empty one, a wrong number of settings, or more tokens than the model has positions.
        ValueError: the number of image tokens differs from the number of image features.
    """
    loop = DecodeLoop(model, prompts, pixel_values, settings, image_features, prefix)
    return ([row.generated() for row in rows] for rows in loop.decode(tokenizer))


def generate_rows(
    model: Llava, tokenizer: Any, prompts: Prompts, pixel_values: torch.Tensor | None = None, settings: Settings = None,
    **options: Any,
) -> list[Generated]:  # fmt: skip
    """Continue each prompt; text, ids and finish reason per row. Arguments and errors as in `stream`."""
    loop = DecodeLoop(model, prompts, pixel_values, settings, **options)
    (rows,) = deque(loop.decode(tokenizer), maxlen=1)
    return [row.generated() for row in rows]


def generate(
    model: Llava, tokenizer: Any, prompts: Prompts, pixel_values: torch.Tensor | None = None, settings: Settings = None
) -> list[str]:
    """Continue each prompt and return the texts; arguments and errors as in `stream`."""
    return [row.text for row in generate_rows(model, tokenizer, prompts, pixel_values, settings)]


def generate_tokens(
    model: Llava, prompts: Prompts, pixel_values: torch.Tensor | None, settings: Settings = None
) -> Iterator[list[int]]:
    """Yield the next id of each row, `max_new_tokens` times: no row is ended. Arguments and errors as in `stream`."""
    loop = DecodeLoop(model, prompts, pixel_values, settings)
    return (loop.step() for _ in range(max(s.max_new_tokens for s in loop.settings)))
