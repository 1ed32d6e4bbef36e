"""Pretraining text of the miniature: documents, context texts, patch phrases and told problems."""

from __future__ import annotations

import random
import re

from companion.miniature import contrastive, pretraining_text, world
from companion.miniature.language import PLACE_PHRASE, POSITION_PHRASE, noun_phrase, plural


def test_documents_depend_only_on_the_seed() -> None:
    with_patches = 0
    for seed in range(160):
        segments, patches = pretraining_text.document(random.Random(seed))
        assert (segments, patches) == pretraining_text.document(random.Random(seed))
        assert any(s.supervised and s.text.strip() for s in segments)
        assert sum(s.image for s in segments) == bool(patches)
        assert len(patches) in (0, pretraining_text.GRID**2)
        with_patches += bool(patches)
    assert 20 < with_patches < 90
    assert pretraining_text.document(random.Random(1)) != pretraining_text.document(random.Random(2))


def test_context_text_states_every_fact() -> None:
    for k in range(60):
        scene, rng = world.sample_scene(k, 5), random.Random(k)
        for text in (
            pretraining_text.context_text(scene, rng),
            pretraining_text.dense_caption(scene.groups, "by a lake", rng),
        ):
            for group in scene.groups:
                phrase, place = noun_phrase(group), POSITION_PHRASE[group.position or ""]
                assert f"{place} {phrase}" in text.lower() or f"{phrase} {place}" in text.lower()
        assert PLACE_PHRASE[scene.background] in pretraining_text.context_text(scene, rng).lower()


def test_patch_words_are_row_by_row() -> None:
    dog = world.Item("dog", "red", "large", (0.0, 0.5, 0.5, 1.0))
    cat = world.Item("cat", "blue", "large", (0.25, 0.5, 0.5, 1.0))  # nearer: it hides half of the dog
    lamp = world.Item("lamp", "white", "small", (0.86, 0.0, 0.9, 0.2))  # too narrow for any center
    groups = tuple(
        world.Group(i.category, i.color, 1, at)
        for i, at in zip((dog, cat, lamp), ("left", "middle", "right"), strict=True)
    )
    patches = pretraining_text.patch_words(world.Scene(0, "beach", (dog, cat, lamp), groups, 0))
    rows = [patches[7 * k : 7 * k + 7] for k in range(7)]
    assert rows[0] == ["beach"] * 6 + ["right one white lamp"]
    assert rows[3] == rows[6] == ["left one red dog"] * 2 + ["middle one blue cat"] * 2 + ["beach"] * 3


def test_patch_phrases_match_the_scene() -> None:
    for index in range(12):
        example, scene = contrastive._clip_example(index, 3), world.sample_scene(index, 1003, 1 if index % 3 else None)
        nouns = {g.category if g.count == 1 else plural(g.category) for g in scene.groups}
        assert set(re.findall(r"\w+", example.captions[5].lower())) - {"and"} == nouns
        for patch, words in enumerate(pretraining_text.patch_words(scene)):
            full, named = (example.region_text(patch, named, mirrored=False) for named in (False, True))
            if words == scene.background:
                assert full == named == PLACE_PHRASE[words]
                continue
            position, number, color, noun = words.split()
            assert full == f"{'a' if number == 'one' else number} {color} {noun} {POSITION_PHRASE[position]}".replace(
                "a orange", "an orange"
            )
            assert named == f"{noun} {POSITION_PHRASE[position]}"
            other = {"left": "right", "right": "left"}.get(position, position)
            assert example.region_text(patch, True, mirrored=True) == f"{noun} {POSITION_PHRASE[other]}"


def test_told_problems_are_of_the_train_split_in_both_orders() -> None:
    orders, told = [], 0
    for k in range(300):
        segments, patches = pretraining_text.told_problem(random.Random(k))
        prompt, reply = "".join(s.text for s in segments if not s.supervised), segments[-1].text
        orders.append("BECAUSE:" in reply)
        assert orders[-1] or reply.strip().startswith("LECTURE:")
        told += "thing" in prompt and not patches
        assert not patches or len(patches) == pretraining_text.GRID**2
    assert 120 < sum(orders) < 180
    assert told > 10
