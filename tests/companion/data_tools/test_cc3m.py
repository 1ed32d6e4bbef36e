"""CC3M filtering: the TSV, the chunker, and a selection equal to a slow reference implementation of the recipe."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from companion.data_tools import cc3m
from companion.data_tools.cc3m import filter_captions, filter_file, phrase_table, select
from companion.data_tools.check import check_file
from companion.data_tools.expansion import BRIEF_INSTRUCTIONS
from companion.data_tools.filter_settings import FilterSettings
from companion.data_tools.phrases import Phrases, extractor_named
from llava_core.runtime import DataError

RULES = FilterSettings(phrases="rules")


def test_normalisation_follows_the_settings() -> None:
    captions = ["The Dog and a dog", "dog , it", "the big old brown dog"]
    assert phrase_table(captions, RULES).phrases == ["dog", "big old brown dog"]
    raw = FilterSettings(phrases="rules", lowercase=False, strip_determiners=False, max_words=2)
    assert phrase_table(captions, raw).phrases == ["The Dog", "a dog", "dog"]
    assert cc3m.normalize("It", RULES) == cc3m.normalize("-", RULES) == ""
    assert cc3m.normalize("It", FilterSettings(drop_pronouns=False)) == "it"


WORDS = (
    "dog",
    "a dog",
    "The dog",
    "the Dog",
    "Dog",
    "big dog",
    "a big old dog",
    "it",
    "It",
    "some",
    "a",
    "--",
    "cat",
    "sun",
)


def reference_filter(
    captions: list[list[str]], settings: FilterSettings, alive: list[bool]
) -> tuple[set[int], Counter[str], Counter[str]]:
    """The recipe, slowly: sets of captions, and a full search for the next phrase at every step."""

    def form(phrase: str) -> str | None:
        words = (phrase.lower() if settings.lowercase else phrase).split()
        if settings.drop_pronouns and phrase.lower() in ("it", "some"):
            return None
        while settings.strip_determiners and words and words[0].lower() in ("a", "the", "some"):
            words = words[1:]
        fits = settings.max_words is None or len(words) <= settings.max_words
        return " ".join(words) if fits and words and words != ["--"] else None

    forms = [[f for phrase in phrases if (f := form(phrase))] for phrases in captions]
    counted = [k for k in range(len(forms)) if alive[k] or settings.unavailable == "after"]
    where = {p: [k for k in counted if p in forms[k]] for phrases in forms for p in phrases}
    counts = {p: sum(forms[k].count(p) if settings.count == "occurrences" else 1 for k in where[p]) for p in where}
    kept = [p for p in where if where[p] and counts[p] >= settings.min_frequency]
    waiting, pool = list(kept), set[int]()
    while waiting:
        left = {p: counts[p] if settings.order == "static" else len(set(where[p]) - pool) for p in waiting}
        phrase = min(waiting, key=lambda p: left[p])
        waiting.remove(phrase)
        fresh = [row for row in where[phrase] if row not in pool]
        candidates, size = (fresh if settings.draw == "unpooled" else where[phrase]), settings.cap
        if settings.draw == "top_up" and len(candidates) > size:
            candidates, size = fresh, max(0, size - (len(where[phrase]) - len(fresh)))
        if len(candidates) > size:
            generator = np.random.default_rng([settings.seed, zlib.crc32(phrase.encode())])
            candidates = generator.choice(candidates, size, replace=False).tolist()
        pool.update(candidates)
    pool = {row for row in pool if alive[row]}
    times = [p for row in pool for p in (forms[row] if settings.count == "occurrences" else set(forms[row]))]
    return pool, Counter({p: n for p, n in counts.items() if n}), Counter(p for p in times if p in kept)


filter_settings = st.builds(
    FilterSettings,
    phrases=st.just("rules"),
    lowercase=st.booleans(),
    strip_determiners=st.booleans(),
    drop_pronouns=st.booleans(),
    max_words=st.sampled_from([None, 1, 2]),
    count=st.sampled_from(["captions", "occurrences"]),
    min_frequency=st.integers(0, 4),
    cap=st.integers(1, 8),
    order=st.sampled_from(["static", "remaining"]),
    draw=st.sampled_from(["all", "unpooled", "top_up"]),
    unavailable=st.sampled_from(["before", "after"]),
    seed=st.integers(0, 3),
)


@given(settings=filter_settings, seed=st.integers(0, 10**6), rows=st.integers(0, 60), dead=st.sampled_from([0, 0.3]))
@hypothesis.settings(max_examples=200, deadline=None)
def test_filter_equals_the_reference_implementation(
    settings: FilterSettings, seed: int, rows: int, dead: float
) -> None:
    rng = random.Random(seed)
    names = [*WORDS, *(f"thing{k}" for k in range(rng.randint(0, 12)))]
    weights = rng.sample([1 / (k + 1) for k in range(len(names))], len(names))
    drawn = [rng.choices(names, weights, k=rng.randint(0, 4)) for _ in range(rows)]
    corpus = [[p for p in phrases for _ in range(rng.choice((1, 1, 6)))] for phrases in drawn]  # some stutter
    alive = [rng.random() >= dead for _ in corpus]
    cuts = sorted(rng.choices(range(rows + 1), k=3))
    shards = [corpus[a:b] for a, b in pairwise([0, *cuts, rows])]
    table = phrase_table(Phrases(extractor_named("rules"), shards), settings)
    with mock.patch.object(cc3m, "BLOCK", 3):
        selection = select(table, settings, np.array(alive, bool))
    pool, before, after = reference_filter(corpus, settings, alive)
    assert set(np.flatnonzero(selection.pooled).tolist()) == pool
    assert selection.frequencies_before == before
    assert {p: n for p, n in selection.frequencies_after.items() if n} == after
    kept = sum(n >= settings.min_frequency for n in before.values())
    assert selection.counts() == {
        "captions": rows, "phrases": len(before), "phrases_kept": kept, "pairs_kept": len(pool)
    }  # fmt: skip


def test_literal_settings_cover_and_balance_phrases() -> None:
    captions = [f"a dog , a rare{k // 3}" for k in range(600)] + ["a dog , the sun"] * 500 + ["a single"] * 2
    selection = select(phrase_table(captions, RULES), RULES)
    after, counts = selection.frequencies_after, selection.counts()
    assert (counts["captions"], counts["phrases"], counts["phrases_kept"]) == (1102, 203, 202)
    # every caption of a rare thing, 100 of the sun's, and those of the dog's 100 that are neither
    assert 700 <= counts["pairs_kept"] <= 800
    assert after["sun"] == counts["pairs_kept"] - 600
    assert after["dog"] == counts["pairs_kept"]
    assert all(count == 3 for phrase, count in after.items() if phrase.startswith("rare"))
    assert next(iter(selection.frequencies_before.items())) == ("dog", 1100)
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
    assert {q.replace("<image>", "").strip() for q in questions} <= set(BRIEF_INSTRUCTIONS)
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
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [(row["id"], row["question"]) for row in table] == [
        (record["id"], record["conversations"][0]["value"]) for record in chat
    ]
    assert [(row["caption"], row["url"]) for row in table] == [(row["caption"], row["url"]) for row in metadata]
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []


def test_no_pairs_give_an_empty_list(tmp_path: Path) -> None:
    report = filter_file(corpus(tmp_path, 2), tmp_path / "out", None, RULES)
    assert report["pairs_kept"] == 0
    assert json.loads((tmp_path / "out" / "chat.json").read_text()) == []


def test_third_column_names_an_image_inside_the_folder(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "one.png")
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"a dog\thttp://u\t{name}\n" for name in ("one.png", "one.png", "../one.png", "one.png")))
    filtered = filter_captions(path, images, RULES)
    assert filtered.selection.pooled.tolist() == [True, True, False, True]
    assert filtered.report()["coverage"]["missing"] == 1
    assert filter_captions(path, None, RULES).availability is None
    with pytest.raises(DataError, match="no such folder"):
        filter_captions(path, tmp_path / "nowhere", RULES)


@pytest.mark.parametrize("line", [b"no tab at all", b"a\tb\tc\td", b"\thttp://x", b"caf\xe9\thttp://x", b""])
def test_malformed_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a dog\thttp://x\n" + line + b"\na cat\thttp://y\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: .*correct or remove"):
        filter_captions(path, None, RULES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption\turl\na red bus\thttp://e.org/1.jpg\n", "line 1: a header .*remove it"),
        ("\ufeffTEXT\tURL\na red bus\thttp://e.org/1.jpg\n", "line 1: a header"),
        ("url\tcaption\nhttp://e.org/1.jpg\ta red bus\n", "line 1: a header"),
        ("caption\turl\timage\na red bus\thttp://e.org/1.jpg\tone.jpg\n", "line 1: a header"),
        ("http://e.org/1.jpg\tA red bus\n", "line 1: the columns are url, caption, as in CC12M"),
        ("//e.org/1.jpg\tA red bus\n", "line 1: the columns are url, caption"),
        ("a red bus\thttp://e.org/1.jpg\ncaption\turl\n", "line 2: the second column is no URL but 'url'"),
        ("1\ta red bus\thttp://e.org/1.jpg\n", "line 1: the second column is no URL"),
        ("one.jpg\thttp://e.org/1.jpg\ta red bus\n", "line 1: the first column names an image file"),
        ("http://e.org/1.jpg\ta red bus\t1.jpg\n", "line 1: the columns are url"),
        ("a red bus\tone.jpg\thttp://e.org/1.jpg\n", "line 1: the second column is no URL but 'one.jpg'"),
        ("a red bus\thttp://e.org/1.jpg\t0.31\n", "line 1: the third column is no image file but '0.31'"),
        ("http://e.org/1.jpg\thttp://e.org/1.jpg\n", "line 1: two URLs and no caption"),
        ('"a ""red"" bus"\thttp://e.org/1.jpg\n', "line 1: the cells are quoted"),
        ('a red bus\t"http://e.org/1.jpg"\n', "line 1: the cells are quoted"),
        ("a red bus,http://e.org/1.jpg\n", "line 1: 1 tab-separated"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        filter_captions(path, None, RULES)


def test_captions_keep_their_text_and_the_image_of_their_line(tmp_path: Path) -> None:
    captions = ['" hello , "', "a // b", 'the "red" bus', "a bus from http://e.org"]
    path = tmp_path / "a.tsv"
    path.write_text("\ufeff" + "".join(f"{caption}\tHTTPS://e.org/a b.jpg\r\n" for caption in captions))
    rows = list(cc3m.read_captions(path))
    assert [row.caption for row in rows] == captions
    assert [row.image for row in rows] == [f"GCC_train_{k:09d}.jpg" for k in range(4)]


def test_instruction_list_is_a_setting(tmp_path: Path) -> None:
    asks = tmp_path / "asks.txt"
    asks.write_text("What is it?\nTell me about this.\n")
    settings = replace(RULES, instructions=str(asks))
    filter_file(corpus(tmp_path), tmp_path / "out", None, settings)
    chat = json.loads((tmp_path / "out" / "chat.json").read_text())
    asked = {record["conversations"][0]["value"].replace("<image>", "").strip() for record in chat}
    assert asked == {"What is it?", "Tell me about this."}
    with pytest.raises(DataError, match=r"list of instructions 'breif'.*'brief'"):
        filter_captions(tmp_path / "none.tsv", None, replace(RULES, instructions="breif"))


def test_default_list_has_eleven_instructions() -> None:
    assert len(set(BRIEF_INSTRUCTIONS)) == 11
