"""KV caches for generation: preallocated layers, and a prefix cache for the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with spare columns, so that a decode step copies no earlier column."""

    spare = 32
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, T, head_dim) and return all keys and values, as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers: list[torch.Tensor] = []
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        # selecting or reordering rows replaces keys and values by copies: the buffers then belong to another batch
        stale = not self.buffers or self.buffers[0].data_ptr() != self.keys.data_ptr()
        if stale or self.buffers[0].shape[-2] < end:
            size = end + (self.spare if begin else 0)  # none at prefill, where memory is short
            new_states = (key_states, value_states)
            self.buffers = [new.new_empty(*new.shape[:-2], size, new.shape[-1]) for new in new_states]
            if begin:
                for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                    buffer[..., :begin, :] = old
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows; the buffers are freed at once, before the next layer is copied."""
        super().batch_select_indices(indices)
        self.buffers = []


def preallocated_cache(language_model: Any) -> Cache:
    """An empty cache for a language model; its layers with full attention are `PreallocatedLayer`s."""
    cache = DynamicCache(config=language_model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class PrefixCache:
    """The KV cache of one row between turns, with its ids, which identify no images: a new image needs a new one."""

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def take(self, prompt: Sequence[int], language_model: Any) -> tuple[Cache, int]:
        """Move out the cache, cropped to the prefix that its ids share with the prompt, and the prefix length."""
        cache, self.cache = self.cache, None
        limit = min(len(self.ids), len(prompt) - 1)  # the last token is always fed, for its logits
        shared = next((k for k in range(limit) if self.ids[k] != prompt[k]), limit)
        if cache is None or not all(isinstance(layer, PreallocatedLayer) for layer in cache.layers):
            return preallocated_cache(language_model), 0  # a sliding window cannot be cropped
        cache.crop(shared - len(self.ids))
        return cache, shared
