"""Our model equals LlavaForConditionalGeneration of transformers: logits, loss and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import tiny
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.models.llava import Llava

IMAGE_ID, PAD_ID, VOCABULARY = 95, 0, 96


@dataclass(frozen=True)
class Shape:
    """Odd on purpose: image of `side` x `side` patches, rows of (words, images), padded on one side."""

    projector: str
    feature_layer: int
    side: int
    rows: tuple[tuple[int, int], ...]
    left: bool


SHAPES = [
    Shape("linear", -2, 3, ((7, 1), (11, 1)), left=False),
    Shape("linear", -1, 2, ((5, 2), (9, 0), (3, 1)), left=True),
    Shape("mlp2x_gelu", -2, 5, ((1, 1), (13, 2)), left=True),
    Shape("mlp2x_gelu", -1, 3, ((8, 0), (2, 0)), left=False),
    Shape("linear", -2, 2, ((17, 1),), left=False),
    Shape("mlp2x_gelu", -2, 3, ((6, 0), (4, 2), (9, 1)), left=False),
]


def pair(shape: Shape, seed: int = 0) -> tuple[Llava, LlavaForConditionalGeneration]:
    """Both models, built from one set of random weights."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=28, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        image_size=14 * shape.side, patch_size=14, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=40, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=PAD_ID,
    )  # fmt: skip
    ours = Llava(CLIPVisionModel(vision), LlamaForCausalLM(text), shape.projector, shape.feature_layer).eval()
    for name, p in ours.named_parameters():  # biases and norms start at 0 and 1: a lost one would not be noticed
        torch.nn.init.normal_(p, 1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.15)
    config = LlavaConfig(
        vision_config=copy.deepcopy(vision), text_config=copy.deepcopy(text), image_token_index=IMAGE_ID,
        image_seq_length=shape.side**2, vision_feature_layer=shape.feature_layer, pad_token_id=PAD_ID,
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(ours.vision_tower.state_dict())
    theirs.model.language_model.load_state_dict(ours.language_model.model.state_dict())
    theirs.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    if shape.projector == "linear":  # transformers has only the projector of 1.5
        theirs.model.multi_modal_projector = copy.deepcopy(ours.multi_modal_projector)
    else:
        for their, our in (("linear_1", 0), ("linear_2", 2)):
            state = ours.multi_modal_projector[our].state_dict()
            getattr(theirs.model.multi_modal_projector, their).load_state_dict(state)
    return ours, theirs


def rows(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids with image blocks, mask, labels, pixels of random rows."""
    generator = torch.Generator().manual_seed(len(shape.rows))
    texts: list[list[int]] = []
    for words, images in shape.rows:
        text = torch.randint(1, IMAGE_ID, (words,), generator=generator).tolist()
        for k in range(images):
            text[k:k] = [IMAGE_TOKEN_ID] * shape.side**2 if k == 0 else [7, *[IMAGE_TOKEN_ID] * shape.side**2]
        texts.append(text)
    width = max(map(len, texts))
    ids, mask, labels = (torch.full((len(texts), width), fill) for fill in (PAD_ID, 0, IGNORE_INDEX))
    for k, row in enumerate(texts):
        place = slice(width - len(row), width) if shape.left else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
        labels[k, place] = torch.tensor([t if t >= 0 and n > 1 else IGNORE_INDEX for n, t in enumerate(row)])
    n_images = sum(images for _, images in shape.rows)
    size = 14 * shape.side
    return ids, mask, labels, torch.randn(n_images, 3, size, size, generator=generator) if n_images else None


def results(shape: Shape, models: Sequence[torch.nn.Module]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits at real positions and the summed loss of both models, with the graph."""
    ids, mask, labels, pixels = rows(shape)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = []
    for model, image_id in zip(models, (IMAGE_TOKEN_ID, IMAGE_ID), strict=True):
        theirs = {} if isinstance(model, Llava) else {"use_cache": False}
        logits = model(
            input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, image_id), pixel_values=pixels, attention_mask=mask,
            position_ids=positions, **theirs,
        ).logits  # fmt: skip
        actual.append((logits[mask.bool()], tiny.summed_loss(logits, labels)))
    return actual


_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector": "model.multi_modal_projector",
    "projector.0.": "projector.linear_1.",
    "projector.2.": "projector.linear_2.",
}


def gradients(ours: Llava, theirs: LlavaForConditionalGeneration) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Gradients of projector and language model by our names; each of theirs exactly once."""
    known = {n: p.grad for n, p in theirs.named_parameters() if "vision_tower" not in n}
    actual = []
    for name, p in ours.named_parameters():
        if name.startswith("vision_tower"):
            assert p.grad is None
            continue
        other = name
        for our, their in _NAMES.items():
            other = other.replace(our, their)
        actual.append((name, p.grad, known.pop(other)))
    assert not known
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_loss_and_gradients_equal_transformers(shape: Shape) -> None:
    ours, theirs = pair(shape)
    ours.set_trainable(["projector", "language_model"])
    (logits, loss), (their_logits, their_loss) = results(shape, (ours, theirs))
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    their_loss.backward()
    compared = 0
    for name, mine, other in gradients(ours, theirs):
        if other is None or mine is None:  # no image in the batch: the projector has no part in it
            assert mine is None
            assert other is None or not other.any()
            continue
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max().clamp(min=1)), msg=name)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    "end",
    [
        "encoder.layers.0.mlp.fc1.weight", "multi_modal_projector.bias", "model.layers.1.self_attn.q_proj.weight",
        "layers.0.input_layernorm.weight", "lm_head.weight",
    ],
)  # fmt: skip
def test_one_changed_weight_is_detected(end: str) -> None:
    ours, theirs = pair(SHAPES[0])
    (changed,) = (p for name, p in ours.named_parameters() if name.endswith(end))
    with torch.no_grad():
        changed.view(-1)[3] += 0.05
    (logits, _), (their_logits, _) = results(SHAPES[0], (ours, theirs))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_bf16_error_is_at_most_twice_that_of_transformers(shape: Shape) -> None:
    ours, theirs = pair(shape)
    with torch.no_grad():
        (exact, _), _ = results(shape, (ours, theirs))
        ours.to(torch.bfloat16)
        theirs.to(torch.bfloat16)
        ids, mask, _, pixels = rows(shape)
        low = ours(ids, None if pixels is None else pixels.to(torch.bfloat16), mask).logits[mask.bool()].float()
        other = theirs(
            input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, IMAGE_ID),
            pixel_values=None if pixels is None else pixels.to(torch.bfloat16), attention_mask=mask,
        ).logits[mask.bool()].float()  # fmt: skip
    mine, their = (float((x - exact).abs().max()) for x in (low, other))
    assert mine <= 2 * their
