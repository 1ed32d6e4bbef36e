"""A bundle of a real run passes its checks, and each way of tampering with it fails one."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_root import make_training_root

from companion import evidence
from companion.book import generated
from companion.cli import main
from companion.data_tools.scienceqa import load_problems
from companion.evaluation import science_qa
from companion.evaluation.llava_bench import score_reviews
from companion.evaluation.predictions import checkpoint_id, write_predictions
from companion.paper import ledger
from companion.paper.claims import all_claims, claim
from llava_core import config, runtime
from llava_core.record import RunRecord
from llava_core.runtime import DataError, fingerprint, read_json, sha256_file, write_json
from llava_core.train import launch as launching

RUN = {"train.epochs": 2, "train.global_batch": 8, "train.max_length": 96, "train.learning_rate": 1e-3}


def _questions(folder: Path) -> None:
    """Eight questions with two choices, and the records of `make_training_root` under ScienceQA's names."""
    problem = {"question": "q", "choices": ["a", "b"], "hint": "", "image": None, "subject": "natural science"}
    problem |= {"grade": "grade3", "split": "test", "lecture": "", "solution": ""}
    folder.mkdir()
    write_json(folder / "problems.json", {str(k): {**problem, "answer": k % 2} for k in range(8)})
    write_json(folder / "pid_splits.json", {"test": [str(k) for k in range(8)]})
    for split in ("train", "val"):
        shutil.copy(folder.parent / "cc" / "chat.json", folder / f"llava_{split}_QCM-LEPA.json")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRecord]:
    """A tiny run of ScienceQA with the stored score of six right answers of eight."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        (root / "configs").symlink_to(runtime.ROOT / "configs")
        patch.setattr(runtime, "ROOT", root)
        make_training_root(root)
        (root / "data" / "images").rename(root / "kept")
        _questions(root / "data" / "sqa")
        (root / "kept").rename(root / "data" / "sqa" / "images")
        run = launching.launch(config.load_experiment("no_pretraining", "mini", RUN))
        rows = [{"question_id": str(k), "text": "q"} for k in range(8)]
        settings = {"checkpoint": checkpoint_id(run.checkpoint), "run_id": run.run_id}
        texts = {str(k): f"The answer is {'AB'[k % 2 if k < 6 else 1 - k % 2]}." for k in range(8)}
        answers = write_predictions(run.path / "science_qa_answers.jsonl", rows, settings, lambda left: [texts])
        result = science_qa.score(load_problems(root / "data" / "sqa", "test"), answers)
        write_json(run.path / "science_qa.json", {**result, "answers": answers, "measured_with": "x"})
        yield run


@pytest.fixture
def bundle(record: RunRecord, tmp_path: Path) -> Path:
    result = evidence.pack(record, tmp_path / "bundle")
    assert evidence.failures(result) == []
    return tmp_path / "bundle"


def _edit(file: str, change: Callable[[Any], Any], hashes: bool = True) -> Callable[[Path], None]:
    """A change to the JSON content (of JSONL: the rows) of a file; with `hashes` the index is adapted to it."""

    def apply(bundle: Path) -> None:
        path = bundle / file
        lines = path.suffix == ".jsonl"
        content = [json.loads(line) for line in path.read_text().splitlines()] if lines else read_json(path)
        content = change(content) or content
        path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))
        if hashes:
            index = read_json(bundle / "evidence.json")
            write_json(bundle / "evidence.json", {**index, "files": index["files"] | {file: sha256_file(path)}})

    return apply


def _set(*keys: Any) -> Callable[[Any], None]:
    """Set a nested value; the last of the arguments is the value."""

    def change(content: Any) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-2]] = keys[-1]

    return change


def _config(old: str, new: str) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        path = bundle / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        _edit("evidence.json", _set("files", "config.yaml", sha256_file(path)), hashes=False)(bundle)

    return apply


METRICS, ANSWERS = "metrics.jsonl", "science_qa_answers.jsonl"
TAMPERED = [
    ("files", "metrics.jsonl: SHA-256 is", _edit(METRICS, _set(4, "loss", 1.0), hashes=False)),
    ("files", "expected 00", _edit("evidence.json", _set("files", "summary.json", "00"), hashes=False)),
    ("files", "extra.json: evidence.json does not list it", lambda b: (b / "extra.json").write_text("{}")),
    ("files", "summary.json: missing", lambda b: (b / "summary.json").unlink()),
    ("run", "environment.json: the run is", _edit("environment.json", _set("inputs", "code", "0"))),
    ("run", "of config.yaml and environment.json's inputs", _config("epochs: 2", "epochs: 3")),
    ("run", "base_hash.language_model", _edit("checkpoint/manifest.json", _set("base_hash", "language_model", "x"))),
    ("run", "hardware is 'H'", _edit("evidence.json", _set("hardware", "H"), hashes=False)),
    ("departures", "departures leave out train.epochs", _config("field: train.epochs", "field: train.seed")),
    ("departures", "train.epochs ([paper, here])[1]", _config("here: 2\n", "here: 1\n")),
    ("metrics", "a row of step 5, expected step 4", _edit(METRICS, lambda rows: rows[:5] + rows[6:])),
    ("metrics", "a row of step 4, expected step 5", _edit(METRICS, lambda rows: rows[:6] + rows[5:])),
    ("metrics", "7 steps, expected 8", _edit(METRICS, lambda rows: rows[:-1])),
    ("metrics", "loss is not finite", _edit(METRICS, _set(4, "loss", float("nan")))),
    ("learning rate", "metrics.jsonl, step 3: lr is 0.1, expected 0.000", _edit(METRICS, _set(4, "lr", 0.1))),
    ("summary", "summary.json: final_loss is", _edit(METRICS, _set(-1, "loss", 1.0))),
    ("summary", "summary.json: heldout_loss is 9", _edit("summary.json", _set("heldout_loss", 9.0))),
    ("throughput", "step 3: samples_per_s is", _edit(METRICS, _set(4, "samples_per_s", 1e6))),
    ("throughput", "step 3: tokens_per_s x seconds is", _edit(METRICS, _set(4, "tokens_per_s", 1e-3))),
    ("throughput", "step 4: seconds is", _edit(METRICS, _set(5, "seconds", 0.0))),
    ("scores", "line 3 (question 2): answer_id", _edit(ANSWERS, _set(2, "text", "The answer is B."))),
    ("scores", "answers.2 is 'The answer is B.'", _edit("science_qa.json", _set("answers", "2", "The answer is B."))),
    ("scores", "science_qa.json: accuracy is 80, expected 75.0", _edit("science_qa.json", _set("accuracy", 80))),
    ("scores", "subsets.NO.accuracy is 75.0", _edit("science_qa.json", _set("subsets", "NO", "correct", 7))),
    ("scores", "against data/sqa/problems.json: 6.answer", _edit("questions.json", _set(6, "answer", 1))),
    ("claims", "ablation-no-pretraining-accuracy.verdict is 'agrees'",
     _edit("evidence.json", _set("claims", 0, "verdict", "agrees"), hashes=False)),
]  # fmt: skip


@pytest.mark.parametrize(("check", "message", "tamper"), TAMPERED, ids=[f"{t[0]}-{k}" for k, t in enumerate(TAMPERED)])
def test_tampered_bundle_fails(bundle: Path, check: str, message: str, tamper: Callable[[Path], None]) -> None:
    tamper(bundle)
    result = evidence.check(bundle)
    assert check in evidence.failures(result)
    assert message in next(row["message"] for row in result["checks"] if row["name"] == check)


def test_bundle_has_no_weights_and_names_the_claims(bundle: Path, record: RunRecord) -> None:
    files = {path.name for path in bundle.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".safetensors", ".pt"))]
    (claim,) = read_json(bundle / "evidence.json")["claims"]
    assert claim["id"] == "ablation-no-pretraining-accuracy"
    assert (claim["measured"], claim["verdict"]) == (75.0, "shown only")
    assert read_json(bundle / "evidence.json")["run"] == record.run_id


def test_reviews_are_scored_again(record: RunRecord, tmp_path: Path) -> None:
    copy = RunRecord(Path(shutil.copytree(record.path, tmp_path / "copy")))
    answers = {"1": "red", "2": "blue"}
    reviews = [
        {"question_id": int(key), "answer2_id": fingerprint(text), "category": "llava_bench_conv", "content": "8 6"}
        for key, text in answers.items()
    ]
    stored = {**score_reviews(reviews), "answers": answers, "reviews": reviews, "measured_with": "x"}
    assert stored["all"] == 75
    cases = {
        "": {},
        "all is 80, expected 75": {"all": 80},
        "review of question 2: answer2_id": {"answers": {**answers, "2": "green"}},
        "all is 75.0, expected 80.0": {"reviews": [{**reviews[0], "content": "7 6"}, reviews[1]]},
    }
    for k, (message, change) in enumerate(cases.items()):
        write_json(copy.path / "bench-coco.json", {**stored, **change})
        result = evidence.pack(copy, tmp_path / f"bundle{k}")
        assert evidence.failures(result) == (["scores"] if message else [])
        assert message in next(row["message"] for row in result["checks"] if row["name"] == "scores")


def test_throughput_counts_from_a_resumed_step(bundle: Path) -> None:
    def resume(rows: list[dict[str, Any]]) -> None:
        steps = [row for row in rows if "loss" in row]
        first = steps[3]["seconds"]
        for row in steps[4:]:  # the process that logged them began after step 4 of 8, the end of an epoch
            earlier = row["seconds"]
            samples = row["samples_per_s"] * earlier - 26
            tokens = row["tokens_per_s"] * earlier - steps[3]["tokens_per_s"] * first
            row["samples_per_s"], row["tokens_per_s"] = samples / (earlier - first), tokens / (earlier - first)

    _edit(METRICS, resume)(bundle)
    result = evidence.check(bundle)
    assert "throughput" not in evidence.failures(result), result


def test_command_line_packs_and_checks_a_zip(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.zip"
    assert main(["evidence", "pack", str(record.path), "--out", str(out), "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert main(["evidence", "check", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"id", "value", "evidence", "measured", "verdict"} <= result["claims"][0].keys()
    assert [set(row) for row in result["checks"]] == [{"name", "ok", "message"}] * len(evidence.CHECKS)
    assert {key: packed[key] for key in result} == result
    assert main(["evidence", "pack", str(record.path), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    with zipfile.ZipFile(out, "a") as file:
        file.writestr("more.txt", "")
    assert main(["evidence", "check", str(out)]) == 1
    assert "FAILED   files          more.txt" in capsys.readouterr().out


def test_pack_refuses_unfinished_runs_and_other_weights(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record of a run"):
        evidence.pack(RunRecord(tmp_path), tmp_path / "out")
    copy = RunRecord(Path(shutil.copytree(record.path, tmp_path / "copy")))
    (copy.checkpoint / "model.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match=r"model\.safetensors: SHA-256 is not the manifest's"):
        evidence.pack(copy, tmp_path / "out")
    (copy.path / "summary.json").unlink()
    with pytest.raises(DataError, match="has not finished"):
        evidence.pack(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_size_limit_does_not_count_answers(record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"fix: move config\.yaml out"):
        evidence.pack(record, tmp_path / "out")
    others = [
        f for f in record.path.rglob("*") if f.suffix in (".json", ".jsonl", ".yaml") and "science_qa" not in f.name
    ]
    monkeypatch.setattr(evidence, "MAX_BYTES", sum(f.stat().st_size for f in others) + 2000)  # questions.json
    evidence.pack(record, tmp_path / "out")


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt"])
def test_zip_with_a_path_out_of_it_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr(zipfile.ZipInfo(name), "x")
    with pytest.raises(DataError, match="leads out of it; refused"):
        evidence.check(tmp_path / "b.zip")
    assert not (tmp_path.parent / "outside.txt").exists()


def test_links_are_refused(bundle: Path, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("metrics.jsonl")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr(link, "/etc/hostname")
    with pytest.raises(DataError, match=r"'metrics\.jsonl' is a link"):
        evidence.check(tmp_path / "b.zip")
    os.replace(bundle / METRICS, tmp_path / METRICS)
    (bundle / METRICS).symlink_to(tmp_path / METRICS)
    with pytest.raises(DataError, match=r"metrics\.jsonl: a link"):
        evidence.check(bundle)


@pytest.mark.parametrize("content", ["text", "[]", '{"format_version": 9}'])
def test_other_files_are_no_bundles(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.zip").write_text(content)
    with pytest.raises(DataError, match="no bundle"):
        evidence.check(tmp_path / "b.zip")
    (tmp_path / "evidence.json").write_text(content)
    with pytest.raises(DataError):
        evidence.check(tmp_path)


def test_ledger_and_book_show_bundles_that_pass(record: RunRecord, tmp_path: Path) -> None:
    folder = runtime.ROOT / "evidence"
    try:
        evidence.pack(record, folder / "run.zip")
        shutil.copytree(record.path, folder / "other")  # no index: not a bundle
        name, value = "ablation-no-pretraining-accuracy", "75 (shown only) at mini on "
        (row,) = ledger.claim_rows([name], out=tmp_path)
        assert row["measured"] is None
        assert [line.startswith(value) for line in row["bundles"]] == [True]
        assert f"bundle: {value}" in generated.claims_page(generated.all_measured(tmp_path))
        assert record.run_id in (page := generated.results_page(tmp_path, [], [], "mini"))
        assert "not shown" not in page
        with zipfile.ZipFile(folder / "run.zip", "a") as file:
            file.writestr("more.txt", "")
        (folder / "text.zip").write_text("text")
        assert ledger.claim_rows([name], out=tmp_path)[0]["bundles"] == ()
        page = generated.results_page(tmp_path, [], [], "mini")
        assert "not shown: it fails the checks files" in page
        assert "not shown: it fails the checks open" in page
    finally:
        shutil.rmtree(folder)


def test_measured_gpu_claim_has_the_value_of_a_bundle(tmp_path: Path) -> None:
    known = claim("sqa-accuracy").model_copy(update={"evidence": "measured_gpu"})
    run = {"bundle": "r.zip", "run": "r", "scale": "a100x8", "hardware": "8 x A100", "date": "2026-12-01"}
    row = {**run, "id": "sqa-accuracy", "measured": 90.5, "interval": [89.6, 91.3], "verdict": "agrees"}
    result = ledger.measured(known, tmp_path, bundles=[row])
    assert (result.value, result.interval, result.verdict) == (90.5, [89.6, 91.3], "agrees")
    assert result.elsewhere == ("90.5 (agrees) at a100x8 on 8 x A100, 2026-12-01, run r",)


def test_verdict_on_a_value_needs_a_run_without_departures(bundle: Path) -> None:
    loaded = evidence.Bundle(bundle)
    known = next(c for c in all_claims().values() if c.id == loaded.claims()[0]["id"])
    correct = round(known.value * known.n / 100)
    loaded.results["science_qa"] |= science_qa.proportion(correct, known.n)
    assert [row["verdict"] for row in loaded.claims()] == ["shown only"]
    loaded.config.departures.clear()
    assert [row["verdict"] for row in loaded.claims()] == ["agrees"]
    loaded.results["science_qa"] |= science_qa.proportion(correct - 200, known.n)
    assert [row["verdict"] for row in loaded.claims()] == ["disagrees"]
