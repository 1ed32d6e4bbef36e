"""The ledger of claims: its content, its arithmetic, and the detection of wrong entries."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from companion.evaluation.statistics import unpaired_difference
from companion.paper.claims import (
    EVIDENCE,
    LEDGER,
    SOURCES,
    Claim,
    all_claims,
    claim,
    computed_value,
    inconsistent,
    read_ledger,
)
from llava_core.config import load_experiment
from llava_core.runtime import ROOT, ConfigError

MISPRINTS = {
    "change-conv-some-detail": -6.9,
    "change-conv-some": -4.6,
    "change-conversation-detail": -15.5,
    "change-conversation-complex": -11.6,
}
TABLES = {"Table 4": 20, "Table 4, in brackets": 16, "Table 5": 16, "Table 7": 90, "Table 8": 8}


def changed(tmp_path: Path, old: str, new: str) -> dict[str, Claim]:
    """Read the ledger with one text of it replaced."""
    text = LEDGER.read_text()
    assert old in text
    path = tmp_path / "claims.yaml"
    path.write_text(text.replace(old, new, 1))
    return read_ledger(path)


@pytest.mark.parametrize("place", TABLES)
def test_tables_are_complete(place: str) -> None:
    bracketed = "in brackets" in place
    result = [c for c in all_claims().values() if c.place.startswith(place) and ("brackets" in c.place) == bracketed]
    result = [c for c in result if c.unit in ("%", "points")]  # Table 4's shares of the samples are settings
    assert len(result) == TABLES[place]


def test_table_5_cells_have_a_deviation_over_three_runs() -> None:
    cells = [c for c in all_claims().values() if c.place == "Table 5"]
    assert len(cells) == TABLES["Table 5"]
    assert all(c.spread and c.runs == 3 for c in cells)
    assert claim("bench-wild-all").number == "67.3 ± 2.0"


def test_every_claim_has_a_text_and_its_evidence() -> None:
    for known in all_claims().values():
        assert known.text
        assert known.place
        assert known.evidence in EVIDENCE
        assert known.source in SOURCES
        assert known.tolerance.why
        assert (known.why is not None) == (known.evidence in ("not_attempted", "impossible"))


def test_parts_of_the_instruction_data_add_up() -> None:
    parts = [claim(f"instruct-{kind}").value for kind in ("conversation", "detail", "complex")]
    assert parts == [58, 23, 77]
    assert sum(parts) == claim("instruct-total").value == computed_value("instruct-total") == 158


def test_table_7_counts_are_integers_and_add_up() -> None:
    right = {c.id: c.correct for c in all_claims().values() if c.correct is not None}
    assert right["sqa-accuracy"] == 3856
    assert [right[f"sqa-{part}"] for part in ("img", "txt", "no")] == [1775, 1831, 1301]
    rows = [c.id for c in all_claims().values() if c.place.startswith("Table 7") and c.n == 4241 and c.correct]
    assert len(rows) == 9  # the people's row is no count
    assert claim("sqa-human").correct is None
    assert "no count" in (claim("sqa-human").why or "")
    for row in rows:
        name = "sqa" if row == "sqa-accuracy" else row
        assert sum(right[f"{name}-{part}"] for part in ("nat", "soc", "lan")) == right[row]
        assert sum(right[f"{name}-{part}"] for part in ("g1-6", "g7-12")) == right[row]


def test_table_8_accuracies_are_integer_counts() -> None:
    ids = ("last-layer", "answer-first", "no-pretraining", "7b")
    assert [claim(f"ablation-{i}-accuracy").correct for i in ids] == [3815, 3807, 3639, 3810]


def test_computed_claims_agree_except_four_misprints() -> None:
    assert inconsistent() == pytest.approx(MISPRINTS)
    assert claim("whole-cost").value == computed_value("whole-cost") == 144
    assert computed_value("bench-coco-little") == pytest.approx(6.7)
    assert computed_value("bench-coco-gain") == pytest.approx(63.6)
    steps = [claim(f"{run}-steps").value for run in ("stage1", "stage2", "science-qa")]
    assert steps == [4652, 14787, 4776]


def test_errors_in_printed_numbers_are_flagged() -> None:
    flagged = {c.id for c in all_claims().values() if c.flag}
    assert flagged == {*MISPRINTS, "bench-coco-little", "ablation-answer-first"}


def test_three_of_four_ablations_are_below_two_standard_errors() -> None:
    best = claim("sqa-accuracy")
    z = {}
    for name in ("last-layer", "answer-first", "7b", "no-pretraining"):
        other = claim(f"ablation-{name}-accuracy")
        result = unpaired_difference(best.correct or 0, best.n or 0, other.correct or 0, other.n or 0)
        z[name] = result["z"]
        assert result["difference"] == pytest.approx(claim(f"ablation-{name}").value, abs=0.011)
    assert all(-1.96 < z[name] < 0 for name in ("last-layer", "answer-first", "7b"))
    assert z["no-pretraining"] < -7


def test_settings_are_those_of_the_experiments() -> None:
    compared = [c for c in all_claims().values() if c.against.experiment]
    assert len(compared) >= 12
    for known in compared:
        value = load_experiment(known.against.experiment or "", "a100x8").experiment.model_dump()
        for part in (known.against.field or "").split("."):
            value = value[part]
        assert value == known.value, known.id


def test_tests_and_chapters_that_claims_name_exist() -> None:
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    for known in all_claims().values():
        assert known.against.chapter is None or known.against.chapter in chapters
        if known.against.test:
            file, _, name = known.against.test.partition("::")
            tree = ast.parse((ROOT / file).read_text())
            assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_chapters_name_claims_that_exist() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name in json.loads(path.read_text())["metadata"]["companion"]["claims"]:
            claim(name)


def test_unknown_claim_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sqa-accuracy'"):
        claim("sqa-acuracy")
    for name in ("sqa", "zzz", "stage-1-batch"):
        with pytest.raises(ConfigError, match="`llava claims` lists them") as raised:
            claim(name)
        assert len(str(raised.value)) < 300  # not all of them


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("95.95, 88.00", "95.94, 88.00", r"Table 7\), sqa-soc: no count of 889 answers gives 95.94 %"),
        ("[90.36, 95.95", "[90.23, 95.95", r"row 'sqa': nat \+ soc \+ lan are 3853 right answers, 'avg' is 3856"),
        ("values: [83.1, 75.3, 96.5, 85.1]", "values: [83.1, 75.3, 96.5]", "3 values for 4 columns"),
        ("text: of which conversations", "txt: of which conversations", "'txt'; did you mean 'text'"),
        ("{field: train.learning_rate}", "{feild: train.learning_rate}", "'feild'; did you mean 'field'"),
        ("[instruct-conversation, ", "[instruct-conversations, ", "did you mean 'instruct-conversation'"),
        ("within: rounded-2}", "within: rounded}", "did you mean 'rounded-2'"),
        ("why: schedule", "why: shedule", "did you mean 'schedule'"),
        ("evidence: measured\n    against: {chapter: 10", "evidence: mesured\n    against: {chapter: 10", "evidence: "),
        ("against: {chapter: 10_cc3m_filtering}", "against: {}", "evidence 'measured' needs a chapter"),
        ("evidence: recomputed\n    relation", "evidence: impossible\n    relation", "needs `why`"),
        ("instruct-images:", "instruct-total:", "claim 'instruct-total' occurs twice"),
        (
            "against: {field: train.warmup_ratio}",
            "against: {}",
            "evidence 'configured' needs an experiment and its field",
        ),
        ("sqa-img: *released", "sqa-image: *released", "'sqa-image', which is no cell"),
        ("{sum: [instruct", "{share: [a, b], sum: [instruct", "exactly one of"),
    ],
)
def test_wrong_entry_is_named_with_its_record(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(tmp_path, old, new)


PLACES = {
    "checkpoint-size": ("App. D", "25 GB"),
    "supplement-limit": ("App. D", "5 GB"),
    "llm-larger": ("App. A", "65 billion parameters"),
    "instruct-images": ("§5.1", "about 80 thousand images"),
    "instruct-records": ("released file", "157,712 records"),
    "science-qa-learning-rate": ("released command", "2e-05 learning rate"),
    "science-qa-batch": ("released command", "32 samples"),
    "prompt-captions": ("Table 13", "5 sentences"),
    "bench-wild-runs": ("Table 5, caption", "3 runs"),
    "bench-wild-judge-runs": ("Table 5, caption", "3 runs"),
    "stage1-hours": ("App. C", "at most 4 hours on 8 x A100"),
    "stage2-hours": ("App. C", "at most 10 hours on 8 x A100"),
    "science-qa-hours": ("App. C", "at most 4 hours on 8 x A100"),
    "whole-cost": ("follows from App. C", "at most 144 A100-hours"),
}


@pytest.mark.parametrize("name", PLACES)
def test_place_and_value_are_the_papers(name: str) -> None:
    assert (claim(name).place, claim(name).value_text) == PLACES[name]


def test_sources_of_the_experiment_agree_with_the_ledger() -> None:
    for field in ("train.learning_rate", "train.global_batch"):
        assert "paper gives none" in (load_experiment("science_qa", "a100x8").experiment.source_of(field) or "")
    assert "App. C" in (load_experiment("finetune", "a100x8").experiment.source_of("train.learning_rate") or "")


def test_number_of_captions_is_that_of_the_released_prompt(reference: Path) -> None:
    text = (reference / "coco/prompts/conversation/system_message.txt").read_text()
    assert "five sentences" in text


def test_order_of_the_longest_training_is_left_open() -> None:
    assert "does not say with which order" in claim("cot-longer").text


def test_wrong_sum_is_detected(tmp_path: Path) -> None:
    claims = changed(tmp_path, "instruct-detail: {value: 23", "instruct-detail: {value: 24")
    assert inconsistent(claims)["instruct-total"] == 159
    corrected = changed(tmp_path, "values: [-2.1, -7.1, -5.0, -4.4]", "values: [-2.1, -6.9, -5.0, -4.6]")
    assert set(inconsistent(corrected)) == {"change-conversation-detail", "change-conversation-complex"}
