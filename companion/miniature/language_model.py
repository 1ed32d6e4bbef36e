"""Base language models, trained from scratch: a text-only Llama in two sizes in place of Vicuna.

The pretraining text has captions, dialogues about scenes (as sentences or as grids of word sums) and school texts. Half
of the first batches read letters of options only, so that the binding of a letter to its option is learned early.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from companion.miniature import language, world
from companion.miniature.pretraining_text import document
from companion.miniature.school_texts import letter_document
from companion.miniature.training import fit, pad, train_tokenizer
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.label_mask import encode
from llava_core.runtime import seed_everything

VOCABULARY = 1024


@dataclass(frozen=True)
class LanguageModelSize:
    """Shape and training budget of one language model."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    batch: int = 32
    rates: tuple[float, float] = (1e-3, 6e-3)


SIZES = {
    "llm-7b": LanguageModelSize(128, 5, 4, 352, steps=3000),
    "llm-13b": LanguageModelSize(160, 5, 5, 432, steps=3000),
}
LETTER_STEPS = 320  # steps, at the beginning, of which half read letters of options only
POOL = 16  # batches that are drawn together and sorted by length


def document_texts(texts: int = 6000, seed: int = 0) -> Iterator[str]:
    """Training texts of the tokenizer: documents as they are and in lower case."""
    rng = random.Random(f"tokenizer-{seed}")
    for _ in range(texts):
        segments, patches = document(rng)
        text = "".join(s.text for s in segments)
        yield from (text, text.lower(), "".join(f" {words}" for words in patches))


def _text_batches(
    tokenizer: Any, batch: int, rng: random.Random, seed: int, letter_steps: int = LETTER_STEPS
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches (ids, labels, words) of documents of similar length, padded on the right, so that no mask is needed.

    ids and labels are (batch, T); words is (patches, 4): the word ids of each patch in batch order, padded with -1.
    Whole batches are of letters only, half of them in the first `letter_steps` steps and one of eight later: among
    other texts one supervised token of thirty would be too faint to learn from.
    """
    order = random.Random(f"order-{seed}")
    known: dict[str, list[int]] = {}

    def word_ids(patch: str) -> list[int]:
        if patch not in known:
            known[patch] = (tokenizer(f" {patch}", add_special_tokens=False)["input_ids"][-4:] + [-1] * 4)[:4]
        return known[patch]

    for step in count(0, POOL):
        letters = POOL // 2 if step < letter_steps else POOL // 8
        rows = []
        for n, make in ((letters, lambda: (letter_document(rng), [])), (POOL - letters, lambda: document(rng))):
            drawn = (make() for _ in range(batch * n))
            pool = sorted(((encode(s, tokenizer, len(p)), p) for s, p in drawn), key=lambda e: len(e[0].input_ids))
            rows += [pool[i : i + batch] for i in range(0, len(pool), batch)]
        order.shuffle(rows)
        for row in rows:
            ids = pad((e.input_ids for e, _ in row), tokenizer.pad_token_id)
            labels = pad((e.labels for e, _ in row), IGNORE_INDEX)
            words = [word_ids(patch) for _, patches in row for patch in patches]
            yield ids, labels, torch.tensor(words, dtype=torch.long).reshape(-1, 4)


def embed_with_patches(embedding: nn.Module, ids: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, T, D) of ids (B, T); that of a patch, `IMAGE_TOKEN_ID`, is a randomly weighted sum over its words.

    `words`: (patches, 4) word ids in batch order, padded with -1.
    """
    embeds = embedding(ids.clamp(min=0))
    weights = (0.4 + 1.2 * torch.rand(words.shape)) * (words >= 0)
    patches = (embedding(words.clamp(min=0)) * weights[..., None]).sum(1)
    return embeds.masked_scatter((ids == IMAGE_TOKEN_ID)[..., None], patches)


@torch.no_grad()
def lookup_init(model: Any, tokenizer: Any, seed: int = 0) -> None:
    """Initialise induction circuits: a tiny model needs thousands of steps to learn attention by content.

    The residual stream has a constant (dimension 0), the word embedding A, the embeddings B, C, D of the words one, two
    and three tokens before, and the retrieved content S. Layer 0 writes B, C, D. Heads of layer 1 attend to an earlier
    token of the same word and copy it and the words before it to S: for "dogs" that is "two red dogs"; a patch
    embedding holds all three words as well. Heads of layer 2 attend to the token three after the same word and copy its
    word: "left" retrieves the object on the left. Without a match they attend to the first token. Layer 3 copies S five
    tokens ahead: from the last word of a question to the start of its answer. All weights stay trainable.

    Source: induction circuits (Olsson et al. 2022) as an initialisation (cf. Trockman and Kolter 2023).
    """
    config = model.config
    d, width = config.hidden_size // config.num_attention_heads, 20
    half = d // 2
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half).float() / half)
    a, b, c, before3 = (slice(1 + k * width, 1 + (k + 1) * width) for k in range(4))
    s = slice(1 + 4 * width, 128)
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(rows: int, columns: int) -> torch.Tensor:
        n = max(rows, columns)
        return torch.linalg.qr(torch.randn(n, n, generator=generator))[0][:rows, :columns]

    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * 0.1)
    singular = {language.plural(name): name for name in world.CATEGORIES}
    codes: dict[str, torch.Tensor] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        word = token.lstrip("Ġ").lower()  # "dog", " dogs" and " Dog" are one word
        code = codes.setdefault(singular.get(word, word), torch.randn(width, generator=generator))
        embedding[index, a] = code * width**0.5 / code.norm()
    embedding[:, 0] = 2.0
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in model.model.layers:  # random weights would drown the circuits
        layer.self_attn.o_proj.weight.mul_(0.2)
        layer.mlp.down_proj.weight.mul_(0.2)

    def previous(layer: Any, head: int, offset: int, sharpness: float) -> None:
        """Attend `offset` tokens back: the constant, rotated by the rotary angles of that distance."""
        rows, n = slice(head * d, (head + 1) * d), 6
        query, key = torch.zeros(d), torch.zeros(d)
        query[:n], query[half : half + n] = torch.cos(angles[:n] * offset), -torch.sin(angles[:n] * offset)
        key[:n] = 1.0
        for weight, values in ((layer.q_proj.weight, query), (layer.k_proj.weight, key)):
            weight[rows] = 0
            weight[rows, 0] = values * sharpness

    def match(layer: Any, head: int, source: slice, sharpness: float, rest: float = 0.3, distance: float = 1.2) -> None:
        """Attend where `source` holds this word, far tokens first (a faster rotary pair), else to the first token."""
        rows, n = slice(head * d, (head + 1) * d), 9
        places = [head * d + p for p in (*range(half - n, half), *range(d - n, d))]
        projection = orthogonal(2 * n, width) * sharpness
        for weight, part in ((layer.q_proj.weight, a), (layer.k_proj.weight, source)):
            weight[rows] = 0
            weight[places, part] = projection
        layer.q_proj.weight[places, 0] = projection @ embedding[config.bos_token_id, a] * rest
        layer.q_proj.weight[head * d + 4, 0], layer.k_proj.weight[head * d + 4, 0] = distance, -distance

    def carry(layer: Any, head: int, source: slice, target: slice, gain: float, rotate: bool = True) -> None:
        """Copy part `source` of the attended token to part `target`, rotated so that it does not match any word."""
        rows = slice(head * d, (head + 1) * d)
        layer.v_proj.weight[rows] = 0
        layer.o_proj.weight[:, rows] = 0
        n, size = source.stop - source.start, target.stop - target.start
        layer.v_proj.weight[head * d : head * d + n, source] = torch.eye(n) * gain
        layer.o_proj.weight[target, head * d : head * d + n] = (orthogonal(size, n) if rotate else torch.eye(n)) * gain

    for head, (offset, target) in enumerate(((1, b), (2, c), (3, before3))):
        previous(layers[0], head, offset, 1.6)
        carry(layers[0], head, a, target, 0.66, rotate=False)
    for head, source in enumerate((b, c, before3, a)):
        match(layers[1], head, a, 1.3)
        carry(layers[1], head, source, s, 0.9)
    for head, source in enumerate((a, b, c)):
        match(layers[2], head, before3, 1.7)
        carry(layers[2], head, source, s, 0.9)
    middle = (s.start + s.stop) // 2
    for head, half_s in enumerate((slice(s.start, middle), slice(middle, s.stop))):
        previous(layers[3], head, 5, 1.6)
        carry(layers[3], head, half_s, half_s, 1.2, rotate=False)


def new_language_model(size: LanguageModelSize, tokenizer: Any) -> Any:
    """A Llama of a size with random weights, for the vocabulary of a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            initializer_range=0.06,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )
    )


def mean_loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the supervised tokens of a batch of texts."""
    ids, labels, words = batch
    embeds = embed_with_patches(model.get_input_embeddings(), ids, words)
    hidden = model.model(inputs_embeds=embeds[:, :-1], use_cache=False).last_hidden_state
    supervised = labels[:, 1:] != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[supervised]), labels[:, 1:][supervised])


def train_language_model(name: str, out: Path, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Train one text-only Llama of `SIZES` and save it in bf16; returns the settings for the manifest."""
    size = SIZES[name]
    steps = steps or size.steps
    seed_everything(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(out, document_texts(), VOCABULARY)
    model = new_language_model(size, tokenizer)
    lookup_init(model, tokenizer, seed)
    model.train()
    rng = random.Random(f"text-{seed}")
    begin = time.time()
    batches = _text_batches(tokenizer, size.batch, rng, seed)
    loss = fit(model, batches, lambda batch: mean_loss(model, batch), steps, name, size.rates)
    model.to(torch.bfloat16).save_pretrained(out)
    return {
        "shape": {k: v for k, v in asdict(size).items() if k in ("hidden", "layers", "heads", "intermediate")},
        "batch": size.batch,
        "rates": size.rates,
        "seed": seed,
        "steps": steps,
        "final_loss": loss,
        "minutes": (time.time() - begin) / 60,
    }
