"""Batched generation with a KV cache: greedy or sampled, left-padded, each row with its own settings and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from llava_core.models.llava import Llava
from llava_core.runtime import ConfigError, DataError

Finish = Literal["stop", "length"]
UNFINISHED = "\ufffd"
"""What tokenizers decode half a character to."""


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a row.

    Attributes:
        max_new_tokens: most tokens to add, at least 1.
        temperature: 0 is greedy.
        top_p: sample from the fewest tokens that together have this probability; one at least.
        stop: a string, or several, of which the first to appear ends the row and is cut off.
        seed: of the row's own draws: they are the same alone and in any batch. Rows that shall differ need other seeds.
        top_k: sample from the k most probable tokens; 0 for all.
        stop_ids: tokens that end the row, beside the tokenizer's EOS and those of the model's generation config.
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
        """The stop strings, none to many."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(frozen=True)
class Generated:
    """A row's continuation.

    Attributes:
        text: whole characters without the stop, stripped; of an unfinished row nothing that could still become a stop.
        token_ids: all new ids, those of the stop or the end token included.
        finish: "stop" at a stop string or an end token; "length" if `max_new_tokens` cut the row; None while it grows.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None


# ------------------------------------------------------------------------------------------------ cache


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room to grow: a step writes its own column and copies none of the earlier."""

    room = 32
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, T, head_dim) and return all keys and values, as views of what is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.held: list[torch.Tensor] = []
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        # what selects or reorders rows replaces keys and values by copies of their own: `held` is of another batch then
        if not self.held or self.held[0].shape[-2] < end or self.held[0].data_ptr() != self.keys.data_ptr():
            size = end + (self.room if begin else 0)  # a prompt is where memory is short: room comes after it
            self.held = [new.new_empty(*new.shape[:-2], size, new.shape[-1]) for new in (key_states, value_states)]
            if begin:
                for held, old in zip(self.held, (self.keys, self.values), strict=True):
                    held[..., :begin, :] = old
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[..., begin:end, :] = new
        self.keys, self.values = (held[..., :end, :] for held in self.held)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows; the others are freed at once, before the next layer is copied."""
        super().batch_select_indices(indices)
        self.held = []


def roomy_cache(language_model: Any) -> Cache:
    """An empty cache of the language model's layers; those that keep all positions are `RoomyLayer`s."""
    cache = DynamicCache(config=language_model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class PrefixCache:
    """What a conversation keeps between its turns: the KV cache of one row and the ids that it stands for.

    The ids do not tell images apart: begin a new one where the image changes.
    """

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def take(self, prompt: Sequence[int], language_model: Any) -> tuple[Cache, int]:
        """The cache, cropped to what its ids and the prompt share, and how many tokens that is; here remains none."""
        cache, self.cache = self.cache, None
        # the last token is fed in any case: its logits are wanted
        limit = min(len(self.ids), len(prompt) - 1)
        shared = next((k for k in range(limit) if self.ids[k] != prompt[k]), limit)
        if cache is None or not all(isinstance(layer, RoomyLayer) for layer in cache.layers):
            return roomy_cache(language_model), 0  # a window that has slid on cannot be taken back
        cache.crop(shared - len(self.ids))
        return cache, shared


# ------------------------------------------------------------------------------------------------ tokens


def _draw(
    logits: torch.Tensor, settings: Sequence[GenerationSettings], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Next ids (B,) from logits (B, V), each row by its own settings and generator."""
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
    # One uniform number per row, drawn on the CPU: the same on every device and in every batch.
    u = column([float(torch.rand((), generator=g, dtype=torch.float64)) for g in generators])
    summed = p.cumsum(-1)
    drawn = torch.searchsorted(summed, u * summed[:, -1:], right=True).squeeze(-1)
    return torch.where(column([s.temperature for s in settings])[:, 0] > 0, drawn, greedy)


class _Batch:
    """The rows that still grow: their cache or embeddings, mask and draws; arguments as in `stream`."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Llava,
        prompts: Sequence[Sequence[int]],
        pixel_values: torch.Tensor | None,
        settings: Sequence[GenerationSettings],
        image_features: torch.Tensor | None,
        prefix: PrefixCache | None,
        use_cache: bool,
    ) -> None:
        self.model, self.settings = model.eval(), list(settings)
        self.generators = [torch.Generator().manual_seed(s.seed) for s in settings]
        device = model.language_model.device
        rows = [torch.tensor(list(p)).flip(0) for p in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=0).flip(1).to(device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        padding = ids.shape[1] - lengths
        # Where nothing is padded the language model needs no mask and counts positions itself.
        self.padding = padding if bool(padding.any()) else None
        self.prefix, self.cache, self.length, known = prefix, None, ids.shape[1], 0
        if prefix is not None:
            self.cache, known = prefix.take(prompts[0], model.language_model)
            prefix.ids = list(prompts[0])
        elif use_cache:
            self.cache = roomy_cache(model.language_model)
        self.embeds = model.embed(ids, pixel_values, image_features)[:, known:]
        self.tokens: list[int] = []  # drawn last, not fed yet

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Feed what was not fed yet and return the next id of each row."""
        language_model, mask, positions = self.model.language_model, None, None
        if self.padding is not None:
            places = torch.arange(self.length, device=self.padding.device) - self.padding[:, None]
            mask, positions = (places >= 0).long(), places.clamp(min=0)[:, -self.embeds.shape[1] :]
        if self.prefix is not None:
            self.prefix.cache = None  # an interrupted step would leave layers of different lengths there
        output = language_model(
            inputs_embeds=self.embeds, attention_mask=mask, position_ids=positions, past_key_values=self.cache,
            use_cache=self.cache is not None, logits_to_keep=1,
        )  # fmt: skip
        if self.prefix is not None:
            self.prefix.cache = self.cache
            self.prefix.ids += self.tokens
        tokens = _draw(output.logits[:, -1], self.settings, self.generators)
        fresh = language_model.get_input_embeddings()(tokens[:, None])
        self.embeds = fresh if self.cache is not None else torch.cat([self.embeds, fresh], 1)
        self.length += 1
        self.tokens = tokens.tolist()
        return self.tokens

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone: a finished one costs nothing more."""
        index = torch.tensor(rows, device=self.embeds.device)
        self.embeds = self.embeds[index]
        self.padding = self.padding[index] if self.padding is not None else None
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        self.settings = [self.settings[k] for k in rows]
        self.generators = [self.generators[k] for k in rows]


# ------------------------------------------------------------------------------------------------ text


class _Row:
    """A row's text as its tokens arrive: never half a character or the beginning of a stop, nothing taken back."""

    window = 16  # tokens decoded together at most; a whole answer each time would cost its square

    def __init__(self, tokenizer: Any, settings: GenerationSettings, end_ids: frozenset[int]) -> None:
        self.tokenizer, self.settings, self.stops = tokenizer, settings, settings.stops
        self.end_ids = end_ids | frozenset(settings.stop_ids)
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.text = ""  # of whole characters
        self._begin = self._middle = self._end = 0  # the window, and where its last whole piece begins and ends
        self._decoded = ""  # the window up to `_end`

    def add(self, token: int) -> None:
        """Take the next id and finish the row if it ends here."""
        self.ids.append(token)
        if token in self.end_ids:
            self.finish = "stop"
            # what an unfinished character had to hold back comes now, without that character
            self.text += self._decode(self.ids[self._begin : -1])[len(self._decoded) :].rstrip(UNFINISHED)
            return
        window = self._decode(self.ids[self._begin :])
        piece = window[len(self._decoded) :]
        text = self.text + piece.rstrip(UNFINISHED)
        # a stop may be made of several tokens and begin inside one: look at the text, never at ids
        searched = len(self.text) - max(map(len, self.stops), default=0)
        found = [place for stop in self.stops if (place := text.find(stop, max(0, searched))) >= 0]
        if found:
            self.text, self.finish = text[: min(found)], "stop"
        elif len(self.ids) == self.settings.max_new_tokens:
            self.text, self.finish = text, "length"
        elif not piece.endswith(UNFINISHED):
            self.text, self._decoded = text, window
            self._middle, self._end = self._end, len(self.ids)
            if self._end - self._begin > self.window:
                self._begin = self._middle  # the border of two characters, as any place where a whole piece began
                self._decoded = self._decode(self.ids[self._begin :])

    def _decode(self, ids: Sequence[int]) -> str:
        # cleaning up would take back a space once a full stop follows it
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""

    def generated(self) -> Generated:
        """The row as it may be shown."""
        text = self.text
        if self.finish is None:
            begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        return Generated(text.strip(), tuple(self.ids), self.finish)


def end_ids(model: Llava, tokenizer: Any) -> frozenset[int]:
    """Ids that end every row: the tokenizer's EOS and those of the language model's generation config."""
    listed = getattr(getattr(model.language_model, "generation_config", None), "eos_token_id", None)
    several = listed if isinstance(listed, list | tuple) else [listed]
    return frozenset(int(i) for i in (tokenizer.eos_token_id, *several) if i is not None)


# ------------------------------------------------------------------------------------------------ generation


def _per_row(
    model: Llava,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | Sequence[GenerationSettings] | None,
    prefix: PrefixCache | None = None,
) -> list[GenerationSettings]:
    """The settings of each row, once it is clear that the rows can be continued."""
    if not prompts:
        raise DataError("generation: no prompts; fix: give at least one list of ids")
    if prefix is not None and len(prompts) > 1:
        raise DataError(f"generation: a prefix cache is of one row, but there are {len(prompts)} prompts")
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


def generate_tokens(
    model: Llava,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    *,
    use_cache: bool = True,
) -> Iterator[list[int]]:
    """Yield the next id of each row, at most `max_new_tokens` times; where a row ends is the caller's.

    Args, Raises:
        As in `stream`; stops are not looked for.
    """
    rows = _per_row(model, prompts, settings)
    batch = _Batch(model, prompts, pixel_values, rows, None, None, use_cache)
    return (batch.step() for _ in range(max(s.max_new_tokens for s in rows)))


def _grow(rows: list[_Row], batch: _Batch) -> Iterator[list[_Row]]:
    """Continue rows until all are finished; yields them after each step."""
    growing = list(range(len(rows)))
    while growing:
        for k, token in zip(growing, batch.step(), strict=True):
            rows[k].add(token)
        yield rows
        left = [n for n, k in enumerate(growing) if rows[k].finish is None]
        if 0 < len(left) < len(growing):
            batch.keep(left)
        growing = [growing[n] for n in left]


def _begin(
    model: Llava,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    settings: GenerationSettings | Sequence[GenerationSettings] | None,
    image_features: torch.Tensor | None,
    prefix: PrefixCache | None,
    use_cache: bool,
) -> Iterator[list[_Row]]:
    per_row, ends = _per_row(model, prompts, settings, prefix), end_ids(model, tokenizer)
    batch = _Batch(model, prompts, pixel_values, per_row, image_features, prefix, use_cache)
    return _grow([_Row(tokenizer, s, ends) for s in per_row], batch)


def stream(
    model: Llava,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None = None,
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    *,
    image_features: torch.Tensor | None = None,
    prefix: PrefixCache | None = None,
    use_cache: bool = True,
) -> Iterator[list[Generated]]:
    """Continue each prompt and yield all rows after each token: a row's text only ever grows.

    Args:
        model: switched to eval mode.
        tokenizer: decodes; its EOS ends a row.
        prompts: B lists of ids, image blocks included, of any lengths and numbers of images; padded on the left here,
            positions count from the first real token.
        pixel_values: (N, 3, H, W) images in row order, or None.
        settings: for all rows, or one per row; greedy, 64 new tokens when None.
        image_features: (N, P, D) of `Llava.encode_images` in place of `pixel_values`: for images that are asked again.
        prefix: keeps the KV cache of a single prompt, and reuses what this one shares with the prompt before.
        use_cache: False feeds the whole row at each step: slow, for comparison.

    Returns:
        An iterator of B `Generated` per step; in the last one every row is finished.

    Raises:
        DataError: no prompts, an empty one, not as many settings, or more tokens than the language model has positions.
        ValueError: the number of image tokens is not the number of image features.
    """
    steps = _begin(model, tokenizer, prompts, pixel_values, settings, image_features, prefix, use_cache)
    return ([row.generated() for row in rows] for rows in steps)


def generate_rows(
    model: Llava,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None = None,
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    *,
    image_features: torch.Tensor | None = None,
    prefix: PrefixCache | None = None,
    use_cache: bool = True,
) -> list[Generated]:
    """Continue each prompt; text, ids and the reason of the end per row.

    Args, Raises:
        As in `stream`.
    """
    steps = _begin(model, tokenizer, prompts, pixel_values, settings, image_features, prefix, use_cache)
    (rows,) = deque(steps, maxlen=1)
    return [row.generated() for row in rows]


def generate(
    model: Llava,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None = None,
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
) -> list[str]:
    """Continue each prompt and return the texts, stripped, without the stop.

    Args, Raises:
        As in `stream`. `generate_rows` also tells which rows were cut by `max_new_tokens`.
    """
    return [row.text for row in generate_rows(model, tokenizer, prompts, pixel_values, settings)]
