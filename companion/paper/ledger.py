"""Measured values and verdicts for the claims of the paper, and the significance of its published differences.

A claim names the chapter's saved numbers, the experiment or the test to compare with; no value is written here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from companion import evidence
from companion.evaluation.science_qa import evaluate_files
from companion.evaluation.statistics import p_text, unpaired_difference, welch
from companion.figures import output_folder
from companion.paper.claims import EVIDENCE, Claim, all_claims, claim, computed_value, inconsistent
from companion.paper.verdict import Verdict, verdict_of, verdict_of_interval
from llava_core import runtime
from llava_core.config import published_experiment
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, read_json

INTERNAL = {"against", "computed", "tolerance", "cell", "digits"}  # fields of a claim that say how it is compared
RELEASED = "test_sqa_llava_13b_v0.json"  # the authors' answers
QUESTIONS = ("problems.json", "llava_test_CQM-A.json")  # the first has subjects and grades, so all columns of Table 7
HOW = f"set LLAVA_REFERENCE to a folder with {RELEASED} and {QUESTIONS[1]} or ScienceQA's {QUESTIONS[0]}"


@dataclass(frozen=True)
class Measured:
    """The measured value of a claim; None without a record."""

    value: Any = None
    interval: list[float] | None = None
    verdict: Verdict = Verdict.NOT_RESOLVED
    note: str = ""  # source of the value, or the reason why there is none
    elsewhere: tuple[str, ...] = ()  # values of evidence bundles, each with its scale, hardware and date


def _of_chapter(known: Claim, out: Path) -> Measured:
    against = known.against
    try:
        saved = read_json(out / f"{against.chapter}.json")
    except DataError:
        return Measured(note=f"chapter {against.chapter} has not run")
    if against.rows is None:
        recorded = next((row["measured"] for row in saved["checks"] if row.get("id") == known.id), None)
        value, interval = (None, recorded) if isinstance(recorded, list) else (recorded, None)
        value = saved["numbers"].get(against.value) if against.value else value
    else:
        part = saved["numbers"]
        for key in against.rows.split("."):
            part = part.get(key, []) if isinstance(part, Mapping) else []
        if part and not isinstance(part[0], Mapping):  # one number per seed
            value, interval = sum(part) / len(part), None
        else:
            row: Any = next((r for r in part if all(r.get(k) == v for k, v in against.where.items())), {})
            value, interval = row.get(against.value), row.get(against.interval)
    if value is None and interval is None:
        return Measured(note=f"chapter {against.chapter} has no such number")
    short = bool(saved.get("fast"))
    recorded = next((row.get("verdict") for row in saved["checks"] if row.get("id") == known.id), None)
    verdict = verdict_of_interval(None if short else interval, known.direction)
    if recorded and known.direction and not short:  # by the plan of the ablations, stricter than an interval
        verdict = Verdict(recorded)
    where = f"{against.chapter.partition('_')[0] if against.chapter else ''}, {saved.get('scale')}"
    return Measured(value, interval, verdict, f"chapter {where}{', a shortened run' if short else ''}")


def released_result(folder: str | Path | None = None) -> dict[str, Any] | None:
    """Score the authors' answers to ScienceQA, `RELEASED` in `folder` (default: `LLAVA_REFERENCE`); None without.

    Only questions of ScienceQA's own problems.json have subjects and grades.
    """
    place = folder or os.environ.get("LLAVA_REFERENCE")
    if not place:
        return None
    answers, *questions = (next(Path(place).rglob(name), None) for name in (RELEASED, *QUESTIONS))
    asked = next(filter(None, questions), None)
    return evaluate_files(answers, asked) if answers and asked else None


def _recomputed(known: Claim, released: Mapping[str, Any] | None) -> Measured:
    if known.against.test is None:
        value = computed_value(known.id)
        others = ", ".join(known.computed.ids) if known.computed else ""
        holds = None if known.derived else known.id not in inconsistent()
        return Measured(value, None, verdict_of(holds), f"from {others}")
    test = known.against.test
    if released is None:
        return Measured(note=f"the released files are missing; {HOW}; {test}")
    name = known.against.where["subset"]
    row = released if name == "all" else released["subsets"].get(name)
    if row is None:
        return Measured(note=f"needs subjects and grades; {HOW.replace(QUESTIONS[1] + ' or ', '')}; {test}")
    near = abs(row["accuracy"] - known.value) <= (known.tolerance.within(known.n) or 0) + 0.005
    return Measured(row["accuracy"], row["interval"], verdict_of(near), f"released answers; {test}")


def bundle_rows() -> list[dict[str, Any]]:
    """Return the claims that the evidence bundles in `evidence/` of the repository measure, each with its run.

    A bundle that fails a check has a single row with `failed`, the names of these checks, and no claim.
    """
    rows: list[dict[str, Any]] = []
    for name, result in evidence.bundles(runtime.ROOT / "evidence").items():
        run = {"bundle": name, **{key: result[key] for key in evidence.FACTS}}
        failed = evidence.failures(result)
        rows += [{**run, "failed": failed}] if failed else [{**run, **claim_row} for claim_row in result["claims"]]
    return rows


def measured(
    known: Claim, out: Path, released: Mapping[str, Any] | None = None, bundles: Iterable[Mapping[str, Any]] = ()
) -> Measured:
    """Return the measured value of a claim, from the chapters' numbers in `out` or from `released_result`.

    `bundles` are `bundle_rows`; a claim with the evidence `measured_gpu` has the value of the first.
    """
    own = [row for row in bundles if row.get("id") == known.id]
    text = "{measured:.4g} ({verdict}) at {scale} on {hardware}, {date}, run {run}"
    elsewhere = tuple(text.format(**row) for row in own)
    if known.evidence == "measured_gpu" and own:
        first = own[0]
        here = Measured(first["measured"], first["interval"], Verdict(first["verdict"]), f"evidence/{first['bundle']}")
        return replace(here, elsewhere=elsewhere)
    return replace(_measured_here(known, out, released), elsewhere=elsewhere)


def _measured_here(known: Claim, out: Path, released: Mapping[str, Any] | None) -> Measured:
    if known.evidence == "recomputed":
        return _recomputed(known, released)
    if known.evidence == "measured" and known.against.chapter:
        return _of_chapter(known, out)
    if known.against.experiment and known.against.field:
        value: Any = published_experiment(known.against.experiment).model_dump()
        for part in known.against.field.split("."):
            value = value[part]
        return Measured(value, None, verdict_of(value == known.value), known.against.experiment)
    return Measured(verdict=Verdict.SHOWN_ONLY, note=known.why or "")


def claim_rows(
    names: Iterable[str] | None = None, kind: str | None = None, out: Path | None = None
) -> list[dict[str, Any]]:
    """Return claims (default: all) with their measured values, as `llava claims` prints them.

    Raises:
        ConfigError: there is no such claim or kind of evidence; the message names the nearest.
    """
    if kind is not None and kind not in EVIDENCE:
        raise ConfigError(unknown("kind of evidence", kind, EVIDENCE))
    chosen = [claim(name) for name in names or all_claims()]
    folder, released, bundles = out or output_folder(), released_result(), bundle_rows()
    rows = []
    for known in chosen:
        if kind is None or known.evidence == kind:
            here = measured(known, folder, released, bundles)
            row = known.model_dump(exclude=INTERNAL)
            row |= {"published": known.value_text, "measured": here.value, "interval": here.interval}
            rows.append(row | {"verdict": here.verdict, "note": here.note, "bundles": here.elsewhere})
    return rows


def published_ablation(name: str) -> dict[str, Any]:
    """Return the significance of a row of Table 8 (e.g. `ablation-7b`), from the counts behind its two accuracies in %.

    The two are treated as independent: a paired test would need the ablated models' answers, which are not published.
    """
    best, other = claim("sqa-accuracy"), claim(f"{name}-accuracy")
    test = unpaired_difference(best.correct or 0, best.n or 0, other.correct or 0, other.n or 0)
    statistics = {key: test[key] for key in ("standard_error", "z", "p", "interval")}
    return {"reference": best.value, "other": other.value, "effect": claim(name).value, **statistics, "n": best.n}


def significance_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the significance of the rows of Table 8, and of LLaVA minus each other row of Table 5."""
    ablations = []
    for name in ("ablation-last-layer", "ablation-answer-first", "ablation-7b", "ablation-no-pretraining"):
        result = published_ablation(name)
        row = {"difference": claim(name).text, "points": result["effect"], "standard error": result["standard_error"]}
        row |= {
            "z": result["z"],
            "p": p_text(result["p"]),
            "95 % interval": result["interval"],
            "questions": result["n"],
        }
        ablations.append(row)
    benches = []
    for rival in ("bench-wild-openflamingo", "bench-wild-blip2"):
        for part in ("conv", "detail", "complex", "all"):
            first, second = claim(f"{rival}-{part}"), claim(f"bench-wild-{part}")
            both = ((c.value, c.spread or 0.0, c.runs or 0) for c in (first, second))
            result = welch(*next(both), *next(both))
            kind = second.text.partition(", ")[2] or "all questions"
            row = {"LLaVA above": first.text.partition(" of ")[2].partition(",")[0], "questions": kind}
            row |= {"points": result["difference"]}
            row |= {"standard error": result["standard_error"], "t": result["t"], "p": p_text(result["p"])}
            benches.append(row | {"95 % interval": result["interval"], "runs": first.runs})
    return ablations, benches
