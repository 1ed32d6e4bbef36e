"""Val scenes of mini-coco with one fact edited: the color of one group, in an otherwise equal image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from companion.miniature import coco, language
from companion.miniature.world import COLORS, Scene, held_out_pair
from llava_core.runtime import read_json


@dataclass(frozen=True)
class ColorEdit:
    """A val scene, the scene with another color of one group, and the question that has a color as its answer."""

    scene: Scene
    edited: Scene
    question: str
    answer: str
    """Of the scene as it is, as `language.questions` writes it."""
    edited_answer: str

    @property
    def image(self) -> str:
        return coco.file_name("val", self.scene.id)


def recolored(scene: Scene, category: str, color: str) -> Scene:
    """Return the scene with another color of its group of a category; all other pixels stay."""
    return replace(
        scene,
        items=tuple(replace(item, color=color) if item.category == category else item for item in scene.items),
        groups=tuple(replace(g, color=color) if g.category == category else g for g in scene.groups),
    )


def color_edits(folder: Path, limit: int | None = None) -> list[ColorEdit]:
    """Return an edit of each val scene of mini-coco: a group and its new color, drawn by the scene's id.

    The new color is none of the scene's and no pair of category and color that training holds out.

    Args:
        folder: mini-coco; its card has the seed and the sizes.
    """
    card, edits = read_json(folder / "card.json"), []
    sizes = card["sizes"]
    for scene in coco.scenes(card["seed"], sizes["coco_train"], sizes["coco_val"])["val"][:limit]:
        rng = random.Random(f"edit-{scene.id}")
        group = rng.choice(scene.groups)
        taken = {g.color for g in scene.groups}
        color = rng.choice([c for c in COLORS if c not in taken and not held_out_pair(group.category, c)])
        question = f"What color {language.be(group)} the {language.noun(group)}?"
        answers = (language.sentence(str(name)) for name in (group.color, color))
        edits.append(ColorEdit(scene, recolored(scene, group.category, color), question, *answers))
    return edits


def edited_rows(edits: Sequence[ColorEdit]) -> list[dict[str, Any]]:
    """Return the questions as rows of `answer_questions`; an image has the file name of the unedited one."""
    return [{"question_id": k, "image": edit.image, "text": edit.question} for k, edit in enumerate(edits)]


def draw_edits(edits: Sequence[ColorEdit], folder: Path) -> None:
    """Write the edited images under the names of the unedited ones, drawn and compressed as these."""
    coco.render([(edit.edited, folder / edit.image) for edit in edits], "drawing edited scenes")
