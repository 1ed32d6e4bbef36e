"""Batched generation with a KV cache: greedy or sampled, left-padded, each row with its own stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_core.models.llava import Llava


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue: at most `max_new_tokens`; temperature 0 is greedy; `stop` ends a row (and is cut off)."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | None = None
    seed: int = 0


def _next_tokens(logits: torch.Tensor, settings: GenerationSettings, generator: torch.Generator) -> torch.Tensor:
    """Next ids (B,) from logits (B, V)."""
    if settings.temperature <= 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / settings.temperature, -1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > settings.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate_tokens(
    model: Llava,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    settings: GenerationSettings,
) -> Iterator[torch.Tensor]:
    """Yield the next ids (B,) of all rows until the caller stops.

    Args:
        model: in eval mode.
        prompts: B lists of ids, image blocks included; padded on the left here, positions count from the first real
            token.
        pixel_values: (N, 3, H, W) images in row order, or None.
        settings: sampling; the stop is the caller's.
    """
    device = model.language_model.device
    rows = [torch.tensor(list(p)).flip(0) for p in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=0).flip(1).to(device)
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).flip(1).to(device)
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    embeds = model.embed(ids, pixel_values)
    past = None
    for _ in range(settings.max_new_tokens):
        output = model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = output.past_key_values
        tokens = _next_tokens(output.logits[:, -1], settings, generator)
        yield tokens
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
        embeds = model.language_model.get_input_embeddings()(tokens[:, None])


def generate(
    model: Llava,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None = None,
    settings: GenerationSettings | None = None,
) -> list[str]:
    """Continue each prompt and return the texts.

    Args:
        model, prompts, pixel_values: as in `generate_tokens`.
        tokenizer: decodes; its EOS ends a row, too.
        settings: greedy, 64 new tokens when None.

    Returns:
        B texts, stripped, without the stop.
    """
    settings = settings or GenerationSettings()
    model.eval()
    made: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for tokens in generate_tokens(model, prompts, pixel_values, settings):
        for k, token in enumerate(tokens.tolist()):
            if done[k]:
                continue
            if token == tokenizer.eos_token_id:
                done[k] = True
                continue
            made[k].append(token)
            # The stop may be made of several tokens: look at a decoded tail, never at ids.
            done[k] = bool(settings.stop) and settings.stop in tokenizer.decode(made[k][-8:])
        if all(done):
            break
    return [cut(tokenizer.decode(ids), settings.stop) for ids in made]


def cut(text: str, stop: str | None) -> str:
    """The text up to the first stop string, stripped."""
    return (text.split(stop)[0] if stop else text).strip()
