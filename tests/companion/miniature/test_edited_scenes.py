"""Scenes with one fact edited: only the group's pixels change, and the new color is the answer."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from companion import miniature
from companion.miniature import language
from companion.miniature.coco import file_name
from companion.miniature.edited_scenes import color_edits, draw_edits, edited_rows
from companion.miniature.world import draw_scene, held_out_pair
from llava_core.data.images import load_image
from llava_core.runtime import read_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    sizes = miniature.Sizes(12, 4, 40, 24, 8, 8, 2, 6)
    return miniature.ensure(root, only=["mini-coco"], sizes=sizes) / "mini-coco"


def test_edit_changes_one_group(folder: Path) -> None:
    edits = color_edits(folder)
    assert len(edits) == 40
    for edit in edits:
        pairs = list(zip(edit.scene.groups, edit.edited.groups, strict=True))
        ((old, new),) = [(a, b) for a, b in pairs if a != b]
        assert (old.category, old.count, old.position, old.size) == (new.category, new.count, new.position, new.size)
        assert not held_out_pair(new.category, str(new.color))
        assert new.color not in {g.color for g in edit.scene.groups}
        for scene, answer in ((edit.scene, edit.answer), (edit.edited, edit.edited_answer)):
            facts = language.facts_of_scene(scene)
            asked = {(qa.question, qa.answer) for qa in language.questions(facts, random.Random(0))}
            assert (edit.question, answer) in asked
    assert color_edits(folder, 5) == edits[:5]


def test_scene_is_that_of_the_file(folder: Path) -> None:
    """The question file has a color question about some images, with the answer of the scene as it is."""
    filed = {(q["image"], q["text"]): q["answer"] for q in read_jsonl(folder / "questions_val.jsonl")}
    edits = color_edits(folder)
    both = [(filed[key], e.answer) for e in edits if (key := (file_name("val", e.scene.id), e.question)) in filed]
    assert both
    assert all(one == other for one, other in both)


def test_pixels_outside_the_group_stay(folder: Path, tmp_path: Path) -> None:
    edits = color_edits(folder, 6)
    draw_edits(edits, tmp_path)
    for edit, row in zip(edits, edited_rows(edits), strict=True):
        before, after = (np.asarray(draw_scene(s)).astype(int) for s in (edit.scene, edit.edited))
        changed = np.abs(before - after).max(-1) > 0
        group = {a.category for a, b in zip(edit.scene.items, edit.edited.items, strict=True) if a != b}
        boxes = [item.box for item in edit.scene.items if item.category in group]
        inside = np.zeros_like(changed)
        for box in boxes:
            x1, y1, x2, y2 = (round(v * len(changed)) for v in box)
            inside[max(0, y1 - 3) : y2 + 4, max(0, x1 - 3) : x2 + 4] = True
        assert changed.any()
        assert not (changed & ~inside).any()
        drawn = np.asarray(load_image(tmp_path / row["image"])).astype(int)
        assert np.abs(drawn - after).mean() < np.abs(drawn - before).mean()  # JPEG
