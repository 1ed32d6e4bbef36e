"""Vision tower, trained from scratch: a CLIPModel on drawn scenes in place of CLIP ViT-L/14.

It is trained on images with captions and on patches with phrases for their content, never on questions.
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

from companion.checkpoints.hf_export import preprocessor_config
from companion.miniature import language, world
from companion.miniature.pretraining_text import GRID, patch_groups
from companion.miniature.training import fit, train_tokenizer
from llava_core.data.images import ImageProcessor
from llava_core.runtime import progress, seed_everything, write_json

IMAGE_SIZE = 112
PATCH_SIZE = IMAGE_SIZE // GRID
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # per channel, those of drawn images

# CLIPTextModel pools at the end token, except where that has id 2: then at the highest id (a rule for old checkpoints),
# i.e. at the rarest word, and the text after it is lost
CAPTION_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


def caption_texts(count: int = 3000, seed: int = 0) -> Iterator[str]:
    """Training texts of the tokenizer: captions only."""
    rng = random.Random(f"captions-{seed}")
    for k in range(count):
        yield from language.captions(world.sample_scene(k, 2000 + seed), rng)


@dataclass(frozen=True)
class ClipExample:
    """A drawn scene, its captions, and the groups of its patches.

    pixels: uint8 (H, W, 3). captions: five, and a sixth with categories only. patches: int8 (GRID**2,), index into
    `groups`, -1 for the background. groups: (noun, noun phrase, position). place: e.g. "on a beach".
    """

    pixels: np.ndarray
    captions: list[str]
    patches: np.ndarray
    groups: list[tuple[str, str, str]]
    place: str

    def region_text(self, patch: int, named: bool, mirrored: bool) -> str:
        """Phrase for a patch: noun and position in the image, and also number and color unless `named`."""
        if self.patches[patch] < 0:
            return self.place
        name, phrase, position = self.groups[self.patches[patch]]
        if mirrored:
            position = {"left": "right", "right": "left"}.get(position, position)
        return f"{name if named else phrase} {language.POSITION_PHRASE[position]}"


def _clip_example(index: int, seed: int) -> ClipExample:
    """One training image; two of three show a single group, so that names are learned first."""
    rng = random.Random(f"clip-{seed}-{index}")
    scene = world.sample_scene(index, 1000 + seed, n_groups=1 if index % 3 else None)
    nouns = language.sentence(language.listing(sorted(language.noun(g) for g in scene.groups)))
    return ClipExample(
        np.asarray(world.draw_scene(scene, IMAGE_SIZE), dtype=np.uint8),
        [*language.captions(scene, rng), nouns],
        np.array([scene.groups.index(g) if g else -1 for g in patch_groups(scene)], dtype=np.int8),
        [(language.noun(g), language.noun_phrase(g), str(g.position)) for g in scene.groups],
        language.PLACE_PHRASE[scene.background],
    )


def _clip_examples(count: int, seed: int) -> list[ClipExample]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        examples = pool.map(_clip_example, range(count), [seed] * count, chunksize=64)
        return list(progress(examples, "drawing", total=count))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise pixels 0..255 of any shape as the image processor does."""
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD


@torch.no_grad()
def unit_features(vision_model: Any, pixels: torch.Tensor) -> float:
    """Scale the residual stream of a tower, in place, to unit deviation of the features before its last layer.

    The layer norms cancel the scale, so the tower computes the same; the projector has no norm, and its learning rate
    is meant for features of this size. `pixels` (N, 3, H, W) are normalised. Returns the factor.
    """
    features = vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    factor = 1 / float(features.std())
    writers = [m for layer in vision_model.encoder.layers for m in (layer.self_attn.out_proj, layer.mlp.fc2)]
    for writer in (vision_model.pre_layrnorm, *writers):
        writer.weight.mul_(factor)
        writer.bias.mul_(factor)
    return factor


def caption_ids(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) of texts with their end token, padded on the right."""
    batch = tokenizer([t + "</s>" for t in texts], padding=True, return_tensors="pt", add_special_tokens=False)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def sine_grid(grid: int, width: int) -> torch.Tensor:
    """Sine-cosine position embedding of rows and columns (grid ** 2, width), of unit deviation."""
    angles = torch.arange(grid)[:, None] * torch.pi / grid * 2.0 ** torch.linspace(-1, 2, width // 4)
    line = torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5  # (grid, width / 2)
    return torch.cat([line.repeat_interleave(grid, 0), line.repeat(grid, 1)], 1)


@dataclass(frozen=True)
class ClipBatch:
    """Normalised pixels (B, 3, H, W), captions; sampled patches as indices (P,) into B x patches, and their phrases."""

    pixels: torch.Tensor
    captions: list[str]
    places: torch.Tensor
    phrases: list[str]


def train_clip(
    out: Path, seed: int = 0, steps: int = 4000, images: int = 24000, batch: int = 80, names: float = 0.7
) -> dict[str, Any]:
    """Train a CLIPModel contrastively on drawn scenes and save it in bf16; returns the settings for the manifest.

    The class token is contrasted with captions as in CLIP; patches of layer -3 are contrasted with phrases for their
    content (cf. RegionCLIP, Zhong et al. 2022), as far fewer drawings than CLIP's 400M pairs do not localise from
    captions only. The last two layers, which the ablation of the feature layer compares, have no loss of their own
    except that their features get one scale: a projector's learning rate suits both alike.

    Args:
        images: number of scenes; each batch is shifted by up to 4 pixels.
        names: share of batches whose captions have categories only and, drawn separately, of those whose patch phrases
            have category and position only. Color separates the pairs of a batch long before shape does; without it
            shapes are learned. Half of the batches with such captions are mirrored.
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
    head = nn.Linear(128, 128, bias=False)  # used in training only, not saved
    rng = np.random.default_rng(seed)
    coin = random.Random(f"regions-{seed}")

    def regions(rows: np.ndarray, mirrored: bool) -> tuple[torch.Tensor, list[str]]:
        """Three patches per image, uniform over its groups, as (3 B,) indices and phrases."""
        named, places, phrases = coin.random() < names, [], []
        for k, row in enumerate(rows):
            example = examples[row]
            owners = np.unique(example.patches).tolist()  # hidden objects have no patch
            for owner in coin.choices(owners, [0.4 if o < 0 else 1.0 for o in owners], k=3):
                patch = int(coin.choice(np.flatnonzero(example.patches == owner)))
                phrases.append(example.region_text(patch, named, mirrored))
                places.append(k * GRID**2 + (patch // GRID * GRID + GRID - 1 - patch % GRID if mirrored else patch))
        return torch.tensor(places), phrases

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
        texts = sorted({*item.captions, *item.phrases})
        known = {t: k for k, t in enumerate(texts)}
        text_features = F.normalize(
            model.text_projection(model.text_model(**caption_ids(tokenizer, texts)).pooler_output)
        )
        scale = model.logit_scale.exp()

        def contrast(features: torch.Tensor, targets: list[str]) -> torch.Tensor:
            index = torch.tensor([known[t] for t in targets])
            same = (index[:, None] == index).float()  # equal texts in a batch are all positives
            target = same / same.sum(1, keepdim=True)
            logits = scale * F.normalize(features) @ text_features[index].T
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        loss = contrast(model.visual_projection(output.pooler_output), item.captions)
        *_, third, second, last = output.hidden_states
        patches = third[:, 1:].flatten(0, 1)[item.places]
        loss = loss + contrast(head(F.layer_norm(patches, patches.shape[-1:])), item.phrases)
        return loss + (last[:, 1:].std() / second[:, 1:].std()).log().square()

    loss = fit(nn.ModuleList([model, head]), batches(), loss_of, steps, "clip", (5e-3, 1.5e-3), muon=True)
    factor = unit_features(model.eval().vision_model, normalise(pixels[:64]))
    model.to(torch.bfloat16).save_pretrained(out)
    write_preprocessor(out)
    settings = {"size": IMAGE_SIZE, "mode": "crop", "mean": [PIXEL_MEAN] * 3, "std": [PIXEL_STD] * 3}
    return {
        "shape": vision, "seed": seed, "steps": steps, "names": names, "images": images,
        "final_loss": loss, "image": settings, "feature_factor": factor, "minutes": (time.time() - begin) / 60,
    }  # fmt: skip


def write_preprocessor(folder: Path) -> None:
    image = ImageProcessor(IMAGE_SIZE, "crop", (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)
    write_json(folder / "preprocessor_config.json", preprocessor_config(image))
