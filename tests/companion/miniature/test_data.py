"""The miniature's data sets: official formats, true answers, phrase frequencies, and rewriting of stale sets."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from companion import miniature
from companion.data_tools import cc3m as cc3m_filter
from companion.data_tools.coco import load_annotations
from companion.miniature import benches, cc3m, coco, language, world
from llava_core.runtime import ConfigError, read_json, read_jsonl

TINY = miniature.TINY
COLOR = "|".join(world.COLORS)
PLURALS = {language.plural(c): c for c in world.CATEGORIES}
NOUN = "|".join([*PLURALS, *world.CATEGORIES])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    miniature.write(root, sizes=TINY)
    return root


def facts_of(card: Path) -> dict[str, object]:
    content = dict(read_json(card))
    return {key: content[key] for key in ("files", "images", "counts")}


def test_equal_seeds_write_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    second = miniature.write(tmp_path / "again", sizes=TINY)
    assert sorted(second) == sorted(miniature.SETS)
    for name in miniature.SETS:
        assert facts_of(tiny / name / "card.json") == facts_of(tmp_path / "again" / name / "card.json")
    other = miniature.write(tmp_path / "other", seed=1, only=["mini-cc3m"], sizes=TINY)["mini-cc3m"]
    assert other["files"] != second["mini-cc3m"]["files"]
    assert other["images"]["sha256"] != second["mini-cc3m"]["images"]["sha256"]


def test_every_data_set_has_a_card(tiny: Path) -> None:
    for name in miniature.SETS:
        card = read_json(tiny / name / "card.json")
        assert card["license"] == "Apache-2.0"
        assert card["sizes"] == asdict(TINY)
        assert card["images"]["count"] == len([p for p in (tiny / name).rglob("*") if p.suffix in (".jpg", ".png")])
        text = (tiny / name / "card.md").read_text()
        assert all(file in text for file in card["files"])


def test_ensure_rewrites_stale_sets_only(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "mini"
    shutil.copytree(tiny, root)
    names = list(miniature.SETS)

    def reasons() -> dict[str, str | None]:
        return {name: miniature.stale(root, name, 0, TINY) for name in names}

    begin = time.perf_counter()
    assert miniature.ensure(root, sizes=TINY) == root
    assert time.perf_counter() - begin < 0.3
    assert set(reasons().values()) == {None}
    (root / "mini-coco" / "questions_val.jsonl").write_text("")
    next((root / "bench-wild" / "images").iterdir()).unlink()
    (root / "bench-coco" / "card.json").write_text("{")
    untouched = (root / "mini-cc3m" / "card.json").stat().st_mtime_ns
    assert sum(reason is not None for reason in reasons().values()) == 3
    miniature.ensure(root, sizes=TINY)
    assert set(reasons().values()) == {None}
    assert (root / "mini-cc3m" / "card.json").stat().st_mtime_ns == untouched
    assert miniature.stale(root, "mini-coco", 1, TINY) == "another seed"
    assert miniature.stale(root, "mini-coco", 0, replace(TINY, coco_val=5)) == "another sizes"
    monkeypatch.setattr(miniature, "generator_version", lambda name: "other")
    assert miniature.stale(root, "mini-coco", 0, TINY) == "another generator"


def test_unknown_set_is_rejected_by_name() -> None:
    with pytest.raises(ConfigError, match="no set named coco; known are mini-cc3m"):
        miniature.ensure(only=["coco"])


def script(body: str) -> subprocess.Popen[bytes]:
    """Python code in a new process that has no __main__ guard around it."""
    return subprocess.Popen([sys.executable, "-c", body], cwd=miniature.runtime.ROOT)


def test_concurrent_and_killed_writers(tmp_path: Path) -> None:
    call = "from companion import miniature; from pathlib import Path; import sys; from dataclasses import replace\n"
    sizes = "replace(miniature.TINY, coco_train={})"
    many = f"miniature.ensure(Path({str(tmp_path)!r}), only=['mini-coco'], sizes={sizes.format(400)})"
    victim = script(call + many)
    while not list(tmp_path.glob(".mini-coco.*.tmp/train2014/*.jpg")):
        assert victim.poll() is None
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "mini-coco").exists()
    few = f"miniature.ensure(Path({str(tmp_path)!r}), only=['mini-coco'], sizes=miniature.TINY)\n"
    light = "assert not {'torch', 'transformers'} & set(sys.modules)"
    pair = [script(call + few + light) for _ in range(2)]
    assert [p.wait() for p in pair] == [0, 0]
    assert miniature.stale(tmp_path, "mini-coco", 0, TINY) is None
    assert sorted(os.listdir(tmp_path)) == [".lock", "mini-coco"]


def test_worker_processes_draw_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [world.sample_scene(k, 3) for k in range(12)]
    for folder, share in (("alone", 100), ("shared", 4)):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(coco, "_JOBS_PER_WORKER", share)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        coco.render([(s, tmp_path / folder / f"{s.id}.jpg") for s in scenes], "test")
    for s in scenes:
        single = (tmp_path / "alone" / f"{s.id}.jpg").read_bytes()
        assert single == (tmp_path / "shared" / f"{s.id}.jpg").read_bytes()
    with pytest.raises(miniature.runtime.CompanionError, match="worker process failed"):
        coco.render([(s, tmp_path / "no folder" / "x.jpg") for s in scenes], "test")


# --- mini-coco --------------------------------------------------------------------------------------------------------


def test_coco_files_have_the_official_format(tiny: Path) -> None:
    root = tiny / "mini-coco"
    for split, n in (("train", TINY.coco_train), ("val", TINY.coco_val)):
        captions = read_json(root / "annotations" / f"captions_{split}2014.json")
        instances = read_json(root / "annotations" / f"instances_{split}2014.json")
        assert captions["images"] == instances["images"]
        assert Counter(a["image_id"] for a in captions["annotations"]) == {i["id"]: 5 for i in captions["images"]}
        assert len({a["id"] for a in captions["annotations"]}) == 5 * n
        for image in captions["images"]:
            assert image["file_name"] == f"COCO_{split}2014_{image['id']:012d}.jpg"
            assert Image.open(root / f"{split}2014" / image["file_name"]).size == (image["width"], image["height"])
        assert [c["name"] for c in instances["categories"]] == list(world.CATEGORIES)
        for box in instances["annotations"]:
            x, y, width, height = box["bbox"]
            assert min(x, y, width, height) >= 0
            assert max(x + width, y + height) <= coco.IMAGE_SIZE
            assert box["area"] == pytest.approx(width * height, abs=0.01)
            assert box["iscrowd"] == 0
        read = load_annotations(root, f"{split}2014")
        assert len(read) == n
        assert all(len(image.captions) == 5 and image.boxes for image in read)


def test_coco_questions_are_true_and_balanced(tiny: Path) -> None:
    scenes = coco.scenes(5, 10, 70)
    assert not {s.id for s in scenes["train"]} & {s.id for s in scenes["val"]}
    asked = coco._questions("val", scenes["val"], 5)
    kinds = Counter(row["kind"] for row in asked)
    assert len(asked) == 140
    assert min(kinds.values()) > 0.8 * max(kinds.values())
    assert all(len({r["kind"] for r in asked if r["image"] == row["image"]}) == 2 for row in asked)
    by_name = {coco.file_name("val", s.id): language.facts_of_scene(s) for s in scenes["val"]}
    for row in asked:
        if row["kind"] == "color":
            name = re.fullmatch(r"What color (?:is|are) the (.+)\?", row["text"])
            assert name is not None
            color = {g.category: g.color for g in by_name[row["image"]].groups}
            assert row["answer"].lower() == f"{color[PLURALS.get(name[1], name[1])]}."
    everything = read_jsonl(tiny / "mini-coco" / "questions_train.jsonl")
    assert sorted(everything[0]) == ["answer", "image", "kind", "question_id", "text"]
    assert len(everything) > 5 * TINY.coco_train


# --- mini-cc3m --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crawl() -> list[tuple[world.Scene, str]]:
    web = cc3m._Web(0)
    result = [web.scene(k) for k in range(miniature.Sizes().cc3m_lines)]
    return [(scene, web.caption(scene, popular)) for scene, popular in result]


def test_cc3m_files_have_the_download_layout(tmp_path: Path) -> None:
    lines = 40
    counts = cc3m.write_cc3m(tmp_path, seed=2, lines=lines)
    rows = list(cc3m_filter.read_captions(tmp_path / "Train_GCC-training.tsv"))
    assert len(rows) == counts["captions"] == lines
    assert counts["images"] == lines - counts["dead_urls"]
    files = [tmp_path / "images" / row.image for row in rows]
    assert sum(file.is_file() for file in files) == counts["images"] == len(list((tmp_path / "images").iterdir()))
    broken = 0
    for file in filter(Path.is_file, files):
        try:
            Image.open(file).load()
        except OSError:
            broken += 1
    assert broken == counts["broken_images"] == 3
    assert all(row.url.startswith("http") and row.url.endswith(".jpg") for row in rows)


def test_cc3m_captions_are_tokenised_and_true(crawl: list[tuple[world.Scene, str]]) -> None:
    named = colored = 0
    for scene, caption in crawl:
        assert caption == caption.lower() == " ".join(caption.split())
        assert not re.search(r"\w[.,:]", caption)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
        groups = {g.category: g for g in scene.groups}
        seen = set()
        for number, color, noun in re.findall(
            rf"(?:\b(one|two|three) )?(?:[a-z]+ ){{0,3}}?\b({COLOR}) ({NOUN})\b", caption
        ):
            group = groups[PLURALS.get(noun, noun)]
            assert color == group.color, caption
            assert not number or language.NUMBERS[group.count] == number, caption
            seen.add(group.category)
        for noun in re.findall(rf"\b({NOUN})\b", caption):
            assert PLURALS.get(noun, noun) in groups, caption
            named += 1
        for place, phrase in language.PLACE_PHRASE.items():
            assert phrase not in caption or scene.background == place, caption
        for group in scene.groups:
            assert not world.held_out_pair(group.category, group.color or "")
        colored += seen == set(groups)
    assert colored > 0.85 * len(crawl)


def test_cc3m_gives_the_filter_rare_and_frequent_phrases(crawl: list[tuple[world.Scene, str]]) -> None:
    settings = cc3m_filter.FilterSettings(phrases="rules")
    table = cc3m_filter.phrase_table((caption for _, caption in crawl), settings)
    available = np.ones(len(crawl), bool)
    available[random.Random(0).sample(range(len(crawl)), round(cc3m.DEAD_SHARE * len(crawl)))] = False
    result = cc3m_filter.select(table, settings, available)
    assert (result.before > settings.cap).sum() >= 10
    assert ((result.before > 0) & (result.before < 3)).sum() > 2 * ((result.before >= 3).sum())
    assert 2500 <= result.pooled.sum() <= 2900
    # The pool is flatter than the crawl, and still shows every pair of color and category.
    displayed = Counter(
        (g.category, g.color) for (s, _), kept in zip(crawl, result.pooled, strict=True) if kept for g in s.groups
    )
    before = Counter((g.category, g.color) for s, _ in crawl for g in s.groups)
    pairs = [(c, k) for c in world.CATEGORIES for k in world.COLORS if not world.held_out_pair(c, k)]
    assert min(displayed[pair] for pair in pairs) >= 1
    assert max(displayed.values()) / sum(displayed.values()) < 0.75 * max(before.values()) / sum(before.values())


# --- benches ----------------------------------------------------------------------------------------------------------


def test_bench_coco_is_ninety_questions_about_val_images(tmp_path: Path) -> None:
    counts = benches.write_bench_coco(tmp_path, seed=0, images=30, train=40, val=60)
    assert counts == {"images": 30, "questions": 90, "complex": 30, "conv": 30, "detail": 30}
    questions, answers = read_jsonl(tmp_path / "questions.jsonl"), read_jsonl(tmp_path / "answers_gpt4.jsonl")
    assert [q["category"] for q in questions] == ["conv", "detail", "complex"] * 30
    assert [q["question_id"] for q in questions] == [a["question_id"] for a in answers] == list(range(90))
    assert [list(q) for q in questions[:1]] == [["question_id", "image", "text", "category"]]
    assert all(a["text"][0].isupper() and len(a["text"].split()) >= 4 for a in answers)
    context = load_annotations(tmp_path / "context.jsonl")
    val = {f"{s.id:012d}": s for s in coco.scenes(0, 40, 60)["val"]}
    assert all(c.captions == coco.captions_of(val[c.id], 0) for c in context)
    assert {q["image"] for q in questions} == {c.image for c in context} == set(os.listdir(tmp_path / "images"))


def test_bench_wild_has_the_official_counts_and_unseen_pairs(tmp_path: Path) -> None:
    counts = benches.write_bench_wild(tmp_path, seed=0, images=24)
    wanted = {"llava_bench_complex": 28, "llava_bench_conv": 17, "llava_bench_detail": 15}
    assert counts == {"images": 24, "questions": 60, **wanted}
    questions = read_jsonl(tmp_path / "questions.jsonl")
    assert len({(q["image"], q["text"]) for q in questions}) == 60
    context = read_jsonl(tmp_path / "context.jsonl")
    assert [c["image"] for c in context] == sorted(os.listdir(tmp_path / "images"))
    pairs = [pair for c in context for pair in re.findall(rf"({COLOR}) ({NOUN})\b", c["caption"].split(".")[0])]
    assert len(pairs) > 48
    assert all(world.held_out_pair(PLURALS.get(noun, noun), color) for color, noun in pairs)


RED_CAR, TWO_CARS = world.Group("car", "red", 1, "left"), world.Group("car", "red", 2, "middle")
DOGS, CAT = world.Group("dog", "white", 2, "left"), world.Group("cat", "blue", 1, "right")
DOG, CATS = world.Group("dog", "white", 1, "left"), world.Group("cat", "blue", 2, "right")
FISH = world.Group("fish", "blue", 2, "left")


@pytest.mark.parametrize(
    ("groups", "question", "short", "statement"),
    [
        ([RED_CAR], "What color is the car?", "Red.", "The car is red."),
        ([TWO_CARS], "What color are the cars?", "Red.", "The cars are red."),
        ([RED_CAR], "How many cars are there?", "One.", "There is one car in the image."),
        ([FISH], "How many fish are there?", "Two.", "There are two fish in the image."),
        (
            [world.Group("umbrella", None, 1, None)],
            "Is there an umbrella?",
            "Yes.",
            "Yes, there is an umbrella in the image.",
        ),
        ([RED_CAR], "Is there a dog?", "No.", "No, there is no dog in the image."),
        ([DOGS], "Where are the dogs?", "On the left.", "The dogs are on the left."),
        ([RED_CAR], "What is on the left?", "A red car.", "There is a red car on the left."),
        ([TWO_CARS], "What is in the middle?", "Two red cars.", "There are two red cars in the middle."),
        ([CAT], "What place does the image show?", "A snow field.", "The image shows a snow field."),
        ([CAT, DOGS], "Is the cat to the left of the dogs?", "No.", "No, the cat is not to the left of the dogs."),
        ([CATS, DOG], "Are the cats to the left of the dog?", "No.", "No, the cats are not to the left of the dog."),
        ([DOG, CATS], "Is the dog to the left of the cats?", "Yes.", "Yes, the dog is to the left of the cats."),
    ],
)
def test_answers_have_a_short_and_a_full_form(
    groups: list[world.Group], question: str, short: str, statement: str
) -> None:
    rng, asked = random.Random(0), {}
    for _ in range(100):  # the absent category and the order of a relation are drawn
        result = language.questions(language.Facts(tuple(groups), "snow"), rng)
        asked |= {qa.question: (qa.answer, qa.statement) for qa in result}
    assert asked[question] == (short, statement)


def test_every_factual_question_has_a_statement() -> None:
    rng = random.Random(0)
    for k in range(60):
        for qa in language.questions(language.facts_of_scene(world.sample_scene(k, 0)), rng):
            assert len(qa.statement) > len(qa.answer), qa


def test_card_has_the_counts(tiny: Path) -> None:
    card = json.loads((tiny / "mini-cc3m" / "card.json").read_text())
    assert card["counts"] == {"captions": 12, "images": 11, "dead_urls": 1, "broken_images": 1}
