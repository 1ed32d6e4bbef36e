"""Acceptance checks of the base models: question answering and linear probes on held-out scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from companion.miniature import language, world
from companion.miniature.contrastive import IMAGE_SIZE, caption_ids, normalise
from companion.miniature.pretraining_text import GRID, context_text, dialogue, patch_groups
from companion.miniature.school_texts import REASON_FIRST, SUMS, draw_problem, look_up, problem_turn, with_letter
from companion.miniature.training import pad
from llava_core.checkpoints.base_models import load_language_model
from llava_core.checkpoints.configs import quiet_transformers
from llava_core.constants import IGNORE_INDEX
from llava_core.data.label_mask import Segment, encode

HELD_OUT_SEED = 999_331


def held_out_scenes(count: int) -> list[world.Scene]:
    """Scenes of a seed that no training uses."""
    return [world.sample_scene(10_000_000 + k, HELD_OUT_SEED) for k in range(count)]


@torch.inference_mode()
def exact_answers(model: Any, tokenizer: Any, documents: Sequence[Sequence[Segment]], batch: int = 64) -> list[bool]:
    """Whether greedy decoding gives the supervised text of each document exactly, terminator included.

    One forward pass suffices: greedy text equals the answer if and only if every answer token is the argmax after the
    right tokens before it.
    """
    right: list[bool] = []
    for k in range(0, len(documents), batch):
        rows = [encode(document, tokenizer, 0) for document in documents[k : k + batch]]
        ids = pad((e.input_ids for e in rows), tokenizer.pad_token_id)
        labels = pad((e.labels for e in rows), IGNORE_INDEX)
        guess = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right += ((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORE_INDEX)).all(1).tolist()
    return right


def language_model_checks(folder: Path, scenes: int = 400) -> dict[str, Any]:
    """Accuracy of exact answers of a language model on held-out questions and problems.

    `told` and `blind`: questions about scenes with and without the scene as text, `told_by_kind` by kind of question;
    `blind_prior`: of the best constant answer per kind. `letter`: the letter of val problems after the right reason;
    `sums`: every sum, product and quotient; `look_up`: an entry of a list by its
    key, as hints are used; `look_up_by_value`: by its value; `n`: how many of each.
    """
    model, tokenizer = load_language_model(str(folder), torch.float32)
    model.eval()
    rng = random.Random(HELD_OUT_SEED)
    questions: list[tuple[str, language.QA]] = []
    for scene in held_out_scenes(scenes):
        drawn = language.questions(language.facts_of_scene(scene), rng)[:4]
        questions += [(context_text(scene, rng), q) for q in drawn]
    problems = [draw_problem(rng, "val")[0] for _ in range(scenes)]
    asked = {
        "told": [dialogue([(f"{context}\n{q.question}", q.answer)]) for context, q in questions],
        "blind": [dialogue([(q.question, q.answer)]) for _, q in questions],
        "letter": [with_letter(problem_turn(p, REASON_FIRST), p.letter) for p in problems],
        "sums": [dialogue([(f"What is {fact.split(' is ')[0]}?", language.sentence(fact))]) for fact in SUMS],
        "look_up": [dialogue([look_up(rng, by_value=False)]) for _ in range(scenes)],
        "look_up_by_value": [dialogue([look_up(rng, by_value=True)]) for _ in range(scenes)],
    }
    right = {name: exact_answers(model, tokenizer, documents) for name, documents in asked.items()}
    by_kind: dict[str, list[bool]] = {}
    answers: dict[str, list[str]] = {}
    for (_, q), ok in zip(questions, right["told"], strict=True):
        by_kind.setdefault(q.kind, []).append(ok)
        answers.setdefault(q.kind, []).append(q.answer)
    return {
        "n": {name: len(oks) for name, oks in right.items()},
        **{name: sum(oks) / len(oks) for name, oks in right.items()},
        "blind_prior": sum(max(map(a.count, set(a))) for a in answers.values()) / len(questions),
        "told_by_kind": {kind: sum(oks) / len(oks) for kind, oks in sorted(by_kind.items())},
    }


def _linear_probe(x: torch.Tensor, y: torch.Tensor, train: int, classes: int) -> float:
    """Held-out accuracy of a linear probe on features x (N, D), targets y (N,), fitted on the first `train` rows."""
    mean, std = x[:train].mean(0), x[:train].std(0) + 1e-6
    x = (x - mean) / std
    probe = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02, weight_decay=0.05)
    for _ in range(400):
        loss = F.cross_entropy(probe(x[:train]), y[:train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((probe(x[train:]).argmax(1) == y[train:]).float().mean())


def patch_weights(box: tuple[float, float, float, float], grid: int) -> np.ndarray:
    """Share of each patch (grid * grid,) that a box covers, normalised to sum 1."""
    edges = np.arange(grid + 1) / grid
    x = np.clip(np.minimum(edges[1:], box[2]) - np.maximum(edges[:-1], box[0]), 0, None)
    y = np.clip(np.minimum(edges[1:], box[3]) - np.maximum(edges[:-1], box[1]), 0, None)
    weights = np.outer(y, x).ravel()
    return weights / weights.sum()


def clearest_patch(scene: world.Scene, item: world.Item) -> int | None:
    """The patch that an object covers most among those where no nearer object hides it; None if there is none."""
    weights = patch_weights(item.box, GRID)
    owners = enumerate(patch_groups(scene))
    own = [k for k, group in owners if group and group.category == item.category and weights[k] > 0]
    return max(own, key=lambda k: weights[k], default=None)


def _pixel_values(scenes: Sequence[world.Scene]) -> torch.Tensor:
    """Normalised images (N, 3, H, W) of scenes."""
    drawn = np.stack([np.asarray(world.draw_scene(s, IMAGE_SIZE)) for s in scenes])
    return normalise(torch.from_numpy(drawn).permute(0, 3, 1, 2))


def vision_tower_checks(folder: Path, scenes: int = 6000, candidates: int = 100) -> dict[str, Any]:
    """Linear probes on patch features and image-to-caption retrieval of the vision tower, on held-out scenes.

    `category`, `color`, `position`: accuracy of a linear probe on layer -2 at an object's clearest patch, fitted on
    four fifths of the scenes (`*_last`: layer -1); `retrieval`: R@1 among `candidates` pairs; `n`: objects tested.
    """
    from transformers import AutoTokenizer, CLIPModel

    with quiet_transformers():
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = held_out_scenes(scenes)
    features: dict[str, list[torch.Tensor]] = {"": [], "_last": []}
    labels: list[tuple[str, str, str]] = []
    train = 0
    for start in range(0, scenes, 200):
        part = drawn[start : start + 200]
        image, patch = [], []
        for k, scene in enumerate(part):
            zones = {g.category: str(g.position) for g in scene.groups}
            for item in scene.items:
                if (clearest := clearest_patch(scene, item)) is not None:
                    image.append(k)
                    patch.append(1 + clearest)
                    labels.append((item.category, item.color, zones[item.category]))
            train = len(labels) if start + k < scenes * 4 // 5 else train
        with torch.inference_mode():
            output = model.vision_model(_pixel_values(part), output_hidden_states=True)
            for suffix, states in zip(features, output.hidden_states[-2:], strict=True):
                features[suffix].append(states[image, patch])
    result: dict[str, Any] = {"n": len(labels) - train}
    names: Sequence[Sequence[str]] = (list(world.CATEGORIES), list(world.COLORS), world.POSITIONS)
    for k, (kind, known) in enumerate(zip(("category", "color", "position"), names, strict=True)):
        y = torch.tensor([known.index(label[k]) for label in labels])
        for suffix, parts in features.items():
            result[kind + suffix] = _linear_probe(torch.cat(parts).clone(), y, train, len(known))
    rng = random.Random(HELD_OUT_SEED)
    texts = [language.captions(s, rng)[1] for s in drawn[:candidates]]
    with torch.inference_mode():
        images = _pixel_values(drawn[:candidates])
        scores = model(pixel_values=images, **caption_ids(tokenizer, texts)).logits_per_image
    best = scores.argmax(1).tolist()
    result["retrieval"] = sum(texts[b] == texts[k] for k, b in enumerate(best)) / candidates
    return result
