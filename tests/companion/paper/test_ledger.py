"""Measured values are read from saved numbers; verdicts follow from their intervals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from companion.cli import main
from companion.paper import ledger
from companion.paper.claims import all_claims, claim
from llava_core.runtime import ConfigError


def save(out: Path, chapter: str, numbers: Any = None, checks: Any = (), fast: bool = False) -> None:
    saved = {"scale": "mini", "fast": fast, "numbers": numbers or {}, "checks": list(checks)}
    (out / f"{chapter}.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("interval", "fast", "verdict"),
    [
        ([-3.0, -1.0], False, "agrees"),
        ([1.0, 3.0], False, "disagrees"),
        ([-1.0, 3.0], False, "not resolved"),
        ([-1.0, 0.0], False, "not resolved"),
        ([-3.0, -1.0], True, "not resolved"),
    ],
)
def test_direction_verdict_needs_interval_and_full_run(
    interval: list[float], fast: bool, verdict: str, tmp_path: Path
) -> None:
    check = {"id": "ablation-7b", "measured": interval}
    save(tmp_path, "43_ablation_model_size", {"effect": -2.0}, [check], fast)
    result = ledger.measured(claim("ablation-7b"), tmp_path)
    assert (result.value, result.interval, result.verdict) == (-2.0, interval, verdict)
    assert ("shortened" in result.note) is fast


def test_recorded_verdict_of_a_plan_is_stricter_than_an_interval(tmp_path: Path) -> None:
    check = {"id": "ablation-7b", "measured": [-3.0, -1.0], "verdict": "cannot be tested"}
    save(tmp_path, "43_ablation_model_size", {"effect": -2.0}, [check])
    assert ledger.measured(claim("ablation-7b"), tmp_path).verdict == "cannot be tested"
    save(tmp_path, "43_ablation_model_size", {"effect": -2.0}, [check], fast=True)
    assert ledger.measured(claim("ablation-7b"), tmp_path).verdict == "not resolved"


def test_one_seed_has_no_interval_and_no_verdict(tmp_path: Path) -> None:
    save(tmp_path, "43_ablation_model_size", {"effect": -2.0}, [{"id": "ablation-7b", "measured": -2.0}])
    assert ledger.measured(claim("ablation-7b"), tmp_path).verdict == "not resolved"


def test_table_cell_is_read_from_the_rows_of_its_chapter(tmp_path: Path) -> None:
    rows = [
        {"training data": mix, "questions": kind, "relative score (%)": score, "95 % interval": [score - 1, score + 1],
         "difference": score - 50, "difference interval": [score - 51, score - 49]}
        for mix, kind, score in (("full", "conv", 50.0), ("none", "conv", 20.0), ("none", "all", 30.0))
    ]  # fmt: skip
    save(tmp_path, "44_ablation_instruction_data", {"scores": rows})
    result = {
        i: ledger.measured(claim(i), tmp_path) for i in ("bench-coco-none-conv", "bench-coco-none", "change-none")
    }
    assert result["bench-coco-none-conv"].value == 20
    assert result["bench-coco-none"].value == 30
    assert result["bench-coco-none"].verdict == "shown only"
    assert (result["change-none"].value, result["change-none"].verdict) == (-20, "agrees")
    missing = ledger.measured(claim("bench-coco-full-detail"), tmp_path)
    assert missing.value is None
    assert "no such number" in missing.note


def test_no_record_shows_no_value(tmp_path: Path) -> None:
    result = ledger.measured(claim("ablation-7b"), tmp_path)
    assert (result.value, result.interval, result.verdict) == (None, None, "not resolved")
    assert "43_ablation_model_size has not run" in result.note


def test_seeds_are_averaged(tmp_path: Path) -> None:
    save(tmp_path, "43_ablation_model_size", {"smaller model": [40.0, 44.0]})
    assert ledger.measured(claim("ablation-7b-accuracy"), tmp_path).value == 42


def test_released_answers_are_scored(reference: Path, tmp_path: Path) -> None:
    released = ledger.released_result(reference)
    ids = [c.id for c in all_claims().values() if c.against.test]
    columns = {"nat", "soc", "lan", "g1-6", "g7-12"}
    assert set(ids) == {"sqa-accuracy", "sqa-txt", "sqa-img", "sqa-no", *(f"sqa-{name}" for name in columns)}
    for name in columns:  # the questions of LLaVA-1.5 have no subjects and no grades
        here = ledger.measured(claim(f"sqa-{name}"), tmp_path, released)
        assert (here.value, here.verdict) == (None, "not resolved")
        assert "ScienceQA's problems.json" in here.note
    ids = [i for i in ids if i.removeprefix("sqa-") not in columns]
    result = {i: ledger.measured(claim(i), tmp_path, released) for i in ids}
    assert {f.verdict for f in result.values()} == {"agrees"}
    assert result["sqa-no"].value == pytest.approx(100 * 1300 / 1435)
    worse = {**(released or {}), "accuracy": 90.0}
    assert ledger.measured(claim("sqa-accuracy"), tmp_path, worse).verdict == "disagrees"
    assert ledger.released_result(tmp_path) is None


def test_problems_give_the_columns_of_subjects_and_grades(reference: Path, tmp_path: Path) -> None:
    for name, folder in (("test_sqa_llava_13b_v0.json", "outputs"), ("problems_test_part.json", None)):
        content = json.loads((reference / "scienceqa" / name).read_text())
        problems = json.loads((reference / "scienceqa" / "problems_test_part.json").read_text())
        if folder:
            content = {"outputs": {key: content[folder][key] for key in problems}}
        (tmp_path / ("problems.json" if folder is None else name)).write_text(json.dumps(content))
    (tmp_path / "llava_test_CQM-A.json").write_text("[]")  # problems.json comes first
    here = ledger.measured(claim("sqa-soc"), tmp_path, ledger.released_result(tmp_path))
    assert here.value is not None


@pytest.mark.parametrize("without", ["neither", "questions"])
def test_missing_released_files_say_where_they_go(without: str, tmp_path: Path) -> None:
    if without == "questions":
        (tmp_path / "test_sqa_llava_13b_v0.json").write_text("{}")
    here = ledger.measured(claim("sqa-img"), tmp_path, ledger.released_result(tmp_path))
    assert "set LLAVA_REFERENCE to a folder with test_sqa_llava_13b_v0.json and llava_test_CQM-A.json" in here.note


def test_what_was_not_attempted_never_agrees(tmp_path: Path) -> None:
    rows = ledger.claim_rows(out=tmp_path)
    assert {row["verdict"] for row in rows if row["evidence"] == "not_attempted"} == {"shown only"}
    compared = [row for row in rows if row["evidence"] == "configured"]
    assert {row["verdict"] for row in compared} == {"agrees"}
    assert len(compared) >= 12


def test_rows_qualify_their_numbers(tmp_path: Path) -> None:
    row, hours = ledger.claim_rows(["bench-wild-all", "stage1-hours"], out=tmp_path)
    assert (row["spread"], row["runs"], row["relation"], row["also"]) == (2.0, 3, "equals", "§5.1")
    assert (hours["relation"], hours["spread"], hours["runs"]) == ("at most", None, None)
    counted, change = ledger.claim_rows(["sqa-accuracy", "ablation-7b"], out=tmp_path)
    assert (counted["correct"], counted["n"], change["direction"]) == (3856, 4241, "below 0")


def test_settings_and_sums_are_compared(tmp_path: Path) -> None:
    batch = claim("stage2-batch")
    assert ledger.measured(batch, tmp_path).verdict == "agrees"
    assert ledger.measured(batch.model_copy(update={"value": 128.0}), tmp_path).verdict == "disagrees"
    assert (ledger.measured(claim("whole-cost"), tmp_path).value, claim("whole-cost").value) == (144, 144)


def test_papers_differences_have_their_standard_errors() -> None:
    ablations, benches = ledger.significance_rows()
    assert [abs(row["z"]) >= 1.96 for row in ablations] == [False, False, False, True]
    unsure = [row for row in benches if row["95 % interval"][0] < 0]
    assert [(row["LLaVA above"], row["questions"]) for row in unsure] == [("BLIP-2", "conversation")]
    above = {(row["LLaVA above"], row["questions"]): row["points"] for row in benches}
    assert above["BLIP-2", "all questions"] == pytest.approx(29.2)


def test_command_line_prints_them(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LLAVA_OUT", str(tmp_path))
    save(tmp_path, "43_ablation_model_size", {"effect": -2.0}, [{"id": "ablation-7b", "measured": [-3.0, -1.0]}])
    assert main(["claims", "ablation-7b", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["claims"]
    report = {key: row[key] for key in ("id", "value", "evidence", "measured", "interval", "verdict")}
    assert report == {
        "id": "ablation-7b", "value": -1.08, "evidence": "measured", "measured": -2.0, "interval": [-3.0, -1.0],
        "verdict": "agrees",
    }  # fmt: skip
    assert main(["claims", "--kind", "impossible"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    monkeypatch.delenv("LLAVA_REFERENCE", raising=False)
    assert main(["claims", "sqa-img", "sqa-soc"]) == 0
    assert (
        "2 claims are recomputed from released files that are not here: set LLAVA_REFERENCE" in capsys.readouterr().out
    )
    assert len(lines) == sum(c.evidence == "impossible" for c in all_claims().values())
    assert main(["claims", "ablation-7"]) == 1
    assert "did you mean 'ablation-7b'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean 'measured'"):
        ledger.claim_rows(kind="mesured")


def test_reader_of_the_list_may_stop() -> None:
    code = "from companion.cli import main; import sys; sys.exit(main(['claims', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()  # as `| head` after its lines
    assert process.stderr.read() == b""
    assert process.wait() == 141
