"""The vision tower of the miniature, trained from scratch: a CLIPModel on drawn scenes, in place of ViT-L/14.

It sees images with captions, and patches with phrases for what stands there; never a question.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from companion.miniature import language, world
from companion.miniature.reading import GRID, noun, patch_groups
from companion.miniature.training import fit, train_tokenizer
from llava_core.runtime import progress, seed_everything, write_json

IMAGE_SIZE = 112
PATCH_SIZE = IMAGE_SIZE // GRID

# CLIPTextModel reads the sentence at the end token, but where that has the number 2 it takes the token with the highest
# number for it (a rule for old checkpoints): the rarest word would stand for the caption, blind to all that follows
CAPTION_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


def caption_texts(count: int = 3000, seed: int = 0) -> Iterator[str]:
    """Texts that the contrastive model's tokenizer is trained on: captions alone."""
    rng = random.Random(f"captions-{seed}")
    for k in range(count):
        yield from language.captions(world.sample_scene(k, 2000 + seed), rng)


@dataclass(frozen=True)
class ClipExample:
    """A drawn scene, its captions, and the groups that its patches show.

    pixels: uint8 (H, W, 3). captions: five, and a sixth that names categories alone. patches: int8 (GRID**2,), index
    into `groups`, -1 for the place. groups: what there is as (noun, noun phrase, position). place: "on a beach".
    """

    pixels: np.ndarray
    captions: list[str]
    patches: np.ndarray
    groups: list[tuple[str, str, str]]
    place: str

    def region_text(self, patch: int, named: bool, mirrored: bool) -> str:
        """What a patch shows, in words: noun and place in the image, number and color, too, unless `named`."""
        if self.patches[patch] < 0:
            return self.place
        name, phrase, position = self.groups[self.patches[patch]]
        if mirrored:
            position = {"left": "right", "right": "left"}.get(position, position)
        return f"{name if named else phrase} {language.POSITION_PHRASE[position]}"


def _clip_example(index: int, seed: int) -> ClipExample:
    """One image of the tower's pretraining: most show one group, so names are learned first."""
    rng = random.Random(f"clip-{seed}-{index}")
    scene = world.sample_scene(index, 1000 + seed, n_groups=1 if index % 3 else None)
    nouns = language.sentence(language.listing(sorted(noun(g) for g in scene.groups)))
    return ClipExample(
        np.asarray(world.draw_scene(scene, IMAGE_SIZE), dtype=np.uint8),
        [*language.captions(scene, rng), nouns],
        np.array([scene.groups.index(g) if g else -1 for g in patch_groups(scene)], dtype=np.int8),
        [(noun(g), language.noun_phrase(g), str(g.position)) for g in scene.groups],
        language.PLACE_PHRASE[scene.background],
    )


def _clip_examples(count: int, seed: int) -> list[ClipExample]:
    """Draw `count` examples on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(_clip_example, range(count), [seed] * count, chunksize=64)
        return list(progress(made, "drawing", total=count))


def pixel_statistics() -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that the miniature's image processor uses (0.5, 0.25: drawn images)."""
    return [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of any shape from 0..255 to what the tower reads, by `pixel_statistics`."""
    return (pixels.float() / 255 - 0.5) / 0.25


@torch.no_grad()
def unit_features(vision_model: Any, pixels: torch.Tensor) -> float:
    """Scale a tower's residual stream until the features before its last layer have unit deviation.

    Each layer reads the stream through a layer norm, so what the tower computes stays the same; but the projector reads
    it as it is, and its learning rate is meant for features of this size.

    Args:
        vision_model: transformers' CLIP vision transformer, changed in place.
        pixels: (N, 3, H, W) normalised images to measure on.

    Returns:
        The factor.
    """
    features = vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    factor = 1 / float(features.std())
    writers = [m for layer in vision_model.encoder.layers for m in (layer.self_attn.out_proj, layer.mlp.fc2)]
    for writer in (vision_model.pre_layrnorm, *writers):
        writer.weight.mul_(factor)
        writer.bias.mul_(factor)
    return factor


def caption_ids(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) of texts, each closed by the end token, padded on the right."""
    batch = tokenizer([t + "</s>" for t in texts], padding=True, return_tensors="pt", add_special_tokens=False)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def sine_grid(grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column (grid ** 2, width), of unit deviation: a start for a position embedding."""
    angles = torch.arange(grid)[:, None] * torch.pi / grid * 2.0 ** torch.linspace(-1, 2, width // 4)
    line = torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5  # (grid, width / 2)
    return torch.cat([line.repeat_interleave(grid, 0), line.repeat(grid, 1)], 1)


@dataclass(frozen=True)
class ClipBatch:
    """Normalised pixels (B, 3, H, W) with captions; places are indices (P,) into B x patches, `shown` their words."""

    pixels: torch.Tensor
    captions: list[str]
    places: torch.Tensor
    shown: list[str]


def train_clip(
    out: Path,
    seed: int = 0,
    steps: int = 4000,
    images: int = 24000,
    batch: int = 80,
    names: float = 0.7,
) -> dict[str, Any]:
    """Train a CLIPModel contrastively on drawn scenes and save it in bf16.

    The class token is contrasted with captions, as in CLIP. So are single patches of the last two layers, with a phrase
    for what stands there (cf. RegionCLIP, Zhong et al. 2022): ViT-L/14 came by patches that tell what they show from
    400M pairs; with far fewer drawings captions are not left alone with it. Both layers have the same part in it, so
    that the choice between them stays open to the ablation.

    Args:
        out: folder to write: transformers' CLIPModel (its vision half is the tower), tokenizer, image settings.
        seed: of initialisation, scenes and order.
        steps: optimizer steps.
        images: how many scenes are drawn; each step sees them shifted by up to 4 pixels.
        batch: image-caption pairs contrasted at once.
        names: share of batches whose captions name categories alone, and, drawn apart, of those whose phrases for
            patches name category and place alone: colors tell the pairs of a batch apart long before shapes do, so
            shapes are learned where nothing else helps. Half of the batches with such captions are mirrored.

    Returns:
        The training facts that go into the manifest.
    """
    from transformers import CLIPConfig, CLIPModel

    seed_everything(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(out, caption_texts(), 640, CAPTION_SPECIAL)
    begin = time.time()
    examples = _clip_examples(images, seed)
    pixels = torch.from_numpy(np.stack([e.pixels for e in examples])).permute(0, 3, 1, 2).contiguous()
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 128,
    }  # fmt: skip
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": len(tokenizer), "max_position_embeddings": 48, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "projection_dim": 128,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    with torch.no_grad():
        embeddings = model.vision_model.embeddings
        patches = embeddings.patch_embedding(normalise(pixels[:64]))
        embeddings.position_embedding.weight[1:] = sine_grid(GRID, 128) * patches.std()
    model.train()
    heads = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(2))  # for training alone: not saved
    rng = np.random.default_rng(seed)
    coin = random.Random(f"regions-{seed}")

    def regions(rows: np.ndarray, mirrored: bool) -> tuple[torch.Tensor, list[str]]:
        """Three patches of each image, each thing as likely as another, as (3 B,) indices and what they show."""
        named, places, shown = coin.random() < names, [], []
        for k, row in enumerate(rows):
            example = examples[row]
            owners = np.unique(example.patches).tolist()  # what is hidden by others has no patch
            for owner in coin.choices(owners, [0.4 if o < 0 else 1.0 for o in owners], k=3):
                patch = int(coin.choice(np.flatnonzero(example.patches == owner)))
                shown.append(example.region_text(patch, named, mirrored))
                places.append(k * GRID**2 + (patch // GRID * GRID + GRID - 1 - patch % GRID if mirrored else patch))
        return torch.tensor(places), shown

    def batches() -> Iterator[ClipBatch]:
        while True:
            for rows in rng.permutation(images)[: images // batch * batch].reshape(-1, batch):
                dx, dy = rng.integers(-4, 5, size=2)
                window = torch.roll(pixels[rows], (int(dy), int(dx)), (2, 3))
                named = rng.random() < names
                mirrored = bool(named and rng.random() < 0.5)
                if mirrored:
                    window = window.flip(3)
                captions = [examples[r].captions[5 if named else rng.integers(5)] for r in rows]
                yield ClipBatch(normalise(window), captions, *regions(rows, mirrored))

    def loss_of(item: ClipBatch) -> torch.Tensor:
        output = model.vision_model(item.pixels, output_hidden_states=True)
        texts = sorted({*item.captions, *item.shown})
        known = {t: k for k, t in enumerate(texts)}
        said = F.normalize(model.text_projection(model.text_model(**caption_ids(tokenizer, texts)).pooler_output))
        scale = model.logit_scale.exp()

        def contrast(seen: torch.Tensor, wanted: list[str]) -> torch.Tensor:
            index = torch.tensor([known[t] for t in wanted])
            same = (index[:, None] == index).float()  # equal texts in a batch are all right answers
            target = same / same.sum(1, keepdim=True)
            logits = scale * F.normalize(seen) @ said[index].T
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        loss = contrast(model.visual_projection(output.pooler_output), item.captions)
        for head, states in zip(heads, output.hidden_states[-2:], strict=True):
            patches = states[:, 1:].flatten(0, 1)[item.places]
            loss = loss + contrast(head(F.layer_norm(patches, patches.shape[-1:])), item.shown) / 2
        return loss

    loss = fit(nn.ModuleList([model, heads]), batches(), loss_of, steps, "clip", (5e-3, 1.5e-3), muon=True)
    factor = unit_features(model.eval().vision_model, normalise(pixels[:64]))
    model.to(torch.bfloat16).save_pretrained(out)
    write_preprocessor(out)
    mean, std = pixel_statistics()
    settings = {"size": IMAGE_SIZE, "mode": "crop", "mean": mean, "std": std}
    return {
        "shape": vision, "seed": seed, "steps": steps, "names": names, "images": images,
        "final_loss": loss, "image": settings, "feature_factor": factor, "minutes": (time.time() - begin) / 60,
    }  # fmt: skip


def write_preprocessor(folder: Path) -> None:
    """The image settings in transformers' file format."""
    mean, std = pixel_statistics()
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": IMAGE_SIZE},
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "do_resize": True, "do_center_crop": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
            "rescale_factor": 1 / 255, "image_mean": mean, "image_std": std,
        },
    )  # fmt: skip
