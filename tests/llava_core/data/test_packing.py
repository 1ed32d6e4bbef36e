"""Packed rows: every sample once, shared prefixes once, and the loss and gradients of separate samples."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.packing import MIN_SHARED, PackedRow, pack
from llava_core.data.tokenization import Encoded
from llava_core.ops import PackedMask
from llava_core.ops.transformers_backend import packed_attention

SYSTEM = list(range(10, 10 + MIN_SHARED))
BLOCK = [IMAGE_TOKEN_ID] * 4


def sample(rng: random.Random, image: bool, first: bool = True, turns: int = 2) -> Encoded:
    ids, labels = [*SYSTEM], [IGNORE_INDEX] * len(SYSTEM)
    for turn in range(turns):
        question = [rng.randrange(30, 60) for _ in range(rng.randrange(1, 6))]
        if image and turn == 0:
            question = [*BLOCK, *question] if first else [*question, *BLOCK]
        answer = [rng.randrange(30, 60) for _ in range(rng.randrange(1, 8))]
        ids += question + answer
        labels += [IGNORE_INDEX] * len(question) + answer
    tail = rng.randrange(3)  # tokens after the last supervised one
    return Encoded(ids + [5] * tail, labels + [IGNORE_INDEX] * tail, int(image))


def batch(seed: int, count: int = 9) -> tuple[list[Encoded], list[str | None]]:
    rng = random.Random(seed)
    images = [rng.choice(["a", "b", "c", None]) for _ in range(count)]
    return [sample(rng, image is not None, rng.random() < 0.7) for image in images], images


def tokens_of(row: PackedRow, rows: list[PackedRow]) -> dict[int, list[tuple[int, int]]]:
    """Sample -> its (token, position), read back from the row's packed_mask."""
    result = {}
    paths = PackedMask(torch.tensor(row.ends)[None]).samples[0]
    assert len(paths) == len(row.samples)
    for k, path in zip(row.samples, paths, strict=True):
        where = np.concatenate([np.arange(*ends) for ends in path])
        result[k] = list(zip(row.input_ids[where].tolist(), row.position_ids[where].tolist(), strict=True))
    return result


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [40, 90, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_packing_keeps_every_sample_once_unchanged(seed: int, max_tokens: int, share: bool) -> None:
    items, images = batch(seed)
    rows = pack(items, images, max_tokens, share)
    result = {k: tokens for row in rows for k, tokens in tokens_of(row, rows).items()}
    assert sorted(result) == list(range(len(items)))
    for k, item in enumerate(items):
        last = max(p for p, label in enumerate(item.labels) if label != IGNORE_INDEX)
        assert [token for token, _ in result[k]] == item.input_ids[:last]
        assert [position for _, position in result[k]] == list(range(last))
    targets = Counter(label for item in items for label in item.labels if label != IGNORE_INDEX)
    assert Counter(t for row in rows for t in row.targets.tolist()) == targets
    assert all(len(row.input_ids) <= max_tokens or len(row.samples) == 1 for row in rows)
    assert sum(len(row.images) for row in rows) >= len({image for image in images if image})


def test_packing_fills_rows_and_depends_only_on_the_batch() -> None:
    items, images = batch(0, 200)
    rows = pack(items, images, 2000, share=False)
    assert sum(len(row.input_ids) for row in rows[:-1]) >= 0.98 * 2000 * (len(rows) - 1)
    second = pack(items, images, 2000, share=False)
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(rows, second, strict=True))


def test_shared_prefixes_are_stored_once() -> None:
    rng = random.Random(1)
    items = [sample(rng, True) for _ in range(4)]
    lengths = [max(p for p, label in enumerate(i.labels) if label != IGNORE_INDEX) for i in items]
    (row,) = pack(items, ["a", "b", "a", "a"], 10_000)
    shared = len(SYSTEM) * 3 + len(BLOCK) * 2  # the system text of all, the image of three
    assert len(row.input_ids) >= sum(lengths) - shared - 2 * 3
    assert len(row.input_ids) <= sum(lengths) - len(SYSTEM) * 3
    # an image block is shorter than what is worth a node, unless it follows the system text in one node
    (both,) = pack([items[0], items[2]], ["a", "a"], 10_000)
    assert both.images == ["a"]
    assert len(both.input_ids) <= lengths[0] + lengths[2] - len(SYSTEM) - len(BLOCK)


def test_image_after_the_question_is_not_shared() -> None:
    rng = random.Random(2)
    items = [sample(rng, True, first=False) for _ in range(2)]
    (row,) = pack(items, ["a", "a"], 10_000)
    assert row.images == ["a", "a"]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_those_of_single_samples(seed: int, share: bool) -> None:
    items, images = batch(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip
    features = {key: torch.randn(len(BLOCK), 32) for key in "abc"}

    def embed(ids: np.ndarray, keys: list) -> torch.Tensor:
        ids = torch.as_tensor(ids)
        embeds = model.get_input_embeddings()(ids.clamp(min=0))
        blocks = [features[key] for key in keys]
        return embeds.masked_scatter((ids < 0)[:, None], torch.cat(blocks)) if blocks else embeds

    single = torch.zeros(())
    for item, image in zip(items, images, strict=True):
        logits = model(inputs_embeds=embed(np.array(item.input_ids), [image] if image else [])[None]).logits[0]
        labels = torch.tensor(item.labels)
        single = single + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    expected = torch.autograd.grad(single, list(model.parameters()))
    packed = torch.zeros(())
    with packed_attention(model):
        for row in pack(items, images, 120, share):
            hidden = model.model(
                inputs_embeds=embed(row.input_ids, row.images)[None],
                position_ids=torch.tensor(row.position_ids)[None],
                packed_mask=PackedMask(torch.tensor(row.ends, dtype=torch.int32)[None]),
            ).last_hidden_state[0]
            logits = model.lm_head(hidden[row.logit_positions])
            packed = packed + torch.nn.functional.cross_entropy(logits, torch.tensor(row.targets), reduction="sum")
    torch.testing.assert_close(packed, single, rtol=1e-6, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(packed, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
