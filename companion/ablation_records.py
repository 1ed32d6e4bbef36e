"""Records of ablations in results/ablations, and what follows from them: differences, verdicts, freshness.

A record holds for each arm and seed whether each question was answered correctly, so every interval and verdict is
computed from it and from the plan; none is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from companion import miniature
from companion.comparisons import Scores, beats, compare, compare_speed, holm, single
from companion.data_tools.scienceqa import load_problems
from companion.evaluation.baselines import lookup_table_scores
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.statistics import seeds_interval
from companion.figures import check, markdown_safe
from companion.paper.claims import claim
from companion.paper.verdict import Verdict, verdict_of_difference
from companion.protocol import SPEED, AblationPlan, Protocol, SpeedPlan, Subset, load_protocol
from llava_core import runtime
from llava_core.checkpoints.base_models import base_hash
from llava_core.config import RunConfig
from llava_core.runtime import DataError, display_path, environment, fingerprint, read_json, sha256_file, write_json
from llava_core.train.identity import code_fingerprint, run_inputs, source_fingerprint

SEPARATOR = " "
NO_RECORD = "no record"
CODE_ROOT = Path(__file__).resolve().parents[1]
ANSWERING = (
    "llava_core/inference.py", "llava_core/models/generation.py", "llava_core/models/kv_cache.py",
    "companion/data_tools/scienceqa.py", "companion/evaluation/science_qa.py", "companion/evaluation/predict.py",
)  # fmt: skip
JUDGING = (
    "companion/evaluation/llava_bench.py", "companion/evaluation/bench_steps.py", "companion/miniature/offline_chat.py"
)  # fmt: skip
"""The code behind the answers and scores of a record, besides that of the training."""


def folder() -> Path:
    return runtime.ROOT / "results" / "ablations"


def record_path(name: str) -> Path:
    return folder() / f"{name}.json"


def read_record(name: str) -> dict[str, Any] | None:
    """Return the stored record of an ablation, or None."""
    path = record_path(name)
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    missing = {"ablation", "protocol", "seeds", "questions", "arms", "made_with"} - record.keys()
    if missing or record["ablation"] != name:
        raise DataError(f"{display_path(path)}: no record of {name}; write it again with `llava ablate {name}`")
    return record


def write_record(record: Mapping[str, Any]) -> bool:
    """Store a record unless the stored one follows the same plan with more seeds; return whether it was stored.

    A stored record that stays takes over the present code if the new one has the same answers, base models and data: a
    change of the code that changes no number needs one seed again, not all.
    """
    stored = read_record(record["ablation"])
    if stored and stored["protocol"] == record["protocol"] and len(stored["seeds"]) > len(record["seeds"]):
        if confirms(record, stored):
            code = {key: record["made_with"][key] for key in ("training_code", "evaluation_code")}
            confirmed = {"seeds": record["seeds"], "environment": record["made_with"]["environment"]}
            write_json(
                record_path(record["ablation"]),
                {**stored, "made_with": {**stored["made_with"], **code, "confirmed": confirmed}},
            )
        return False
    write_json(record_path(record["ablation"]), record)
    return True


PER_SEED = ("runs", "seconds", "right", "candidate", "reference")
ANSWERS = ("right", "candidate", "reference", "curve")


def at_seeds(record: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Return a record as if only its seeds at these places had been run."""
    arms = {}
    for label, arm in record["arms"].items():
        arms[label] = {key: [value[k] for k in places] if key in PER_SEED else value for key, value in arm.items()}
        if "curve" in arm:
            arms[label]["curve"] = {**arm["curve"], "right": [arm["curve"]["right"][k] for k in places]}
    shortened = {key: [record[key][k] for k in places] for key in ("seeds", "base_models")}
    return {**record, **shortened, "arms": arms}


def confirms(record: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Return whether a record repeats seeds of a stored one: same models and data, and the same answers of its arms.

    Another processor may round otherwise. There an arm is also confirmed by the stored code: if the run that the stored
    record names was trained on this machine, with equal weights, and another arm has the same answers.
    """
    seeds = [stored["seeds"].index(seed) for seed in record["seeds"] if seed in stored["seeds"]]
    same = ("base_models", "data", "training_data")
    if len(seeds) < len(record["seeds"]) or record["fast"] or record["questions"] != stored["questions"]:
        return False
    if not record["arms"].keys() <= stored["arms"].keys() or any(
        record["made_with"].get(key) != stored["made_with"].get(key) for key in same
    ):
        return False
    kept, arms = at_seeds(stored, seeds)["arms"], record["arms"]
    equal = {
        label: all(arm[key] == kept[label].get(key) for key in ANSWERS if key in arm) for label, arm in arms.items()
    }
    return any(equal.values()) and all(
        equal[label] or all(map(_same_weights, arm["runs"], kept[label]["runs"])) for label, arm in arms.items()
    )


def _same_weights(run: str, other: str) -> bool:
    """Return whether two different runs are on this machine and have equal weights."""
    files = [sorted((runtime.resolve(path) / "checkpoint").glob("*.safetensors")) for path in (run, other)]
    digests = [[(file.name, sha256_file(file)) for file in some] for some in files]
    return run != other and digests[0] == digests[1] != []


def _joined(values: Any) -> str:
    return SEPARATOR.join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(SEPARATOR), dtype=float)


def _bits(text: str) -> np.ndarray:
    """Right answers, 0 or 1 (questions,), from a text of these digits."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(float) - ord("0")


def _science_questions(config: RunConfig, n: int) -> dict[str, Any]:
    problems = load_problems(config.data_path, "test")[:n]
    names = [p.id if p.image is None else sha256_file(p.image) for p in problems]
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return {
        "n": n,
        "ids": fingerprint([p.id for p in problems]),
        "cluster": _joined(number[name] for name in names),
        "image": "".join(str(int(p.image is not None)) for p in problems),
        "choices": "".join(str(len(p.choices)) for p in problems),
        "lookup_table": _joined(
            round(score, 4) for score in lookup_table_scores(load_problems(config.data_path, "train"), problems)
        ),
    }


def _bench_questions(config: RunConfig, bench: str, n: int) -> dict[str, Any]:
    questions = load_bench(runtime.resolve(config.scale.data[bench])).questions[:n]
    number = {image: k for k, image in enumerate(dict.fromkeys(q["image"] for q in questions))}
    return {
        "n": n,
        "ids": fingerprint([str(q["question_id"]) for q in questions]),
        "cluster": _joined(number[q["image"]] for q in questions),
        "category": _joined(q["category"] for q in questions),
    }


def made_with(plan: AblationPlan, configs: Mapping[str, RunConfig]) -> dict[str, Any]:
    """Return what decides the results of arms: base models, data, code of training and of evaluation."""
    sets = ("mini-cc3m", "mini-coco", "bench-coco-all") if plan.bench else ("mini-cc3m", "mini-scienceqa")
    code = (*ANSWERING, *JUDGING) if plan.bench else ANSWERING
    return {
        "training_code": code_fingerprint(),
        "evaluation_code": source_fingerprint(CODE_ROOT / name for name in code),
        "base_models": {name: base_hash(source) for name, source in _base_sources(plan, configs).items()},
        "data": {name: [miniature.generator_version(name), asdict(miniature.Sizes())] for name in sets},
    }


def _base_sources(plan: AblationPlan, configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """The places of all base models of a plan; those of the miniature that are not there are left out."""
    sources = {name: config.model_source(name) for config in configs.values() for name in config.base_models}
    for name, source in list(sources.items()):
        more = {f"{name}-{k}": f"{source}-{k}" for k in range(1, plan.base_models)}
        sources |= {key: place for key, place in more.items() if Path(place).is_dir()}
    return dict(sorted(sources.items()))


def make_record(
    protocol: Protocol,
    name: str,
    seeds: Sequence[int],
    measured: Mapping[tuple[str, int], Mapping[str, Any]],
    configs: Mapping[str, RunConfig],
    fast: bool = False,
) -> dict[str, Any]:
    """Return the record of an ablation.

    Args:
        measured: by arm and seed, as `ablations.measure` returns it.
        configs: of the first seed of each arm.
    """
    plan, arms = protocol.plan(name), dict[str, Any]()
    first = next(iter(measured.values()))
    for label, arm in plan.arms.items():
        if (label, seeds[0]) not in measured:
            continue
        own = [measured[label, seed] for seed in seeds]
        arms[label] = {
            "experiment": arm.experiment, "set": arm.set,
            "learning_rate": configs[label].experiment.train.learning_rate,
            "runs": [result["run"] for result in own], "seconds": [result["seconds"] for result in own],
        }  # fmt: skip
        if plan.bench is None:
            arms[label]["right"] = [result["accuracy"]["right"] for result in own]
        else:
            for key in ("candidate", "reference"):
                arms[label][key] = [_joined(result["bench"][key]) for result in own]
        if plan.speed is not None and "curve" in own[0]:
            arms[label]["curve"] = {
                "steps": own[0]["curve"]["steps"], "right": [result["curve"]["right"] for result in own]
            }  # fmt: skip
    config = configs[plan.reference]
    if plan.bench is None:
        questions = _science_questions(config, len(first["accuracy"]["right"]))
    else:
        questions = _bench_questions(config, plan.bench, len(first["bench"]["candidate"]))
    return {
        "ablation": name,
        "protocol": protocol.protocol_hash(name),
        "scale": config.scale.name,
        "fast": fast,
        "seeds": list(seeds),
        "base_models": [plan.base_model(seed) for seed in seeds],
        "questions": questions,
        "arms": arms,
        "made_with": {
            **made_with(plan, configs),
            "training_data": {k: v for c in configs.values() for k, v in run_inputs(c)["data"].items()},
            "environment": environment(),
        },
    }


# ------------------------------------------------------------------------------------------------ what follows


def scores_of(record: Mapping[str, Any], label: str) -> Scores:
    """Return the scores of an arm (seeds, questions)."""
    arm = record["arms"][label]
    if "right" in arm:
        return Scores.of(np.stack([_bits(text) for text in arm["right"]]))
    return Scores.of(*(np.stack([_numbers(text) for text in arm[key]]) for key in ("candidate", "reference")))


def clusters_of(record: Mapping[str, Any]) -> list[str]:
    return list(record["questions"]["cluster"].split(SEPARATOR))


def chosen_questions(record: Mapping[str, Any], subset: Subset) -> np.ndarray:
    """Return the indices of the questions of a subset."""
    n = record["questions"]["n"]
    if subset == "all":
        return np.arange(n)
    with_image = _bits(record["questions"]["image"]) == 1
    return np.flatnonzero(with_image if subset == "image" else ~with_image)


def _comparison(record: Mapping[str, Any], plan: AblationPlan, label: str, subset: Subset) -> Any:
    chosen = chosen_questions(record, subset)
    clusters = clusters_of(record)
    units = record["base_models"] if plan.unit == "base model" else None
    first, second = (scores_of(record, name).part(chosen) for name in (plan.reference, label))
    return compare(first, second, [clusters[k] for k in chosen], units)


def _speed_plan(record: Mapping[str, Any], plan: AblationPlan) -> SpeedPlan | None:
    """What the plan says about learning speed; None also for a record without checkpoints."""
    return plan.speed if "curve" in record["arms"][plan.reference] else None


def _speed(record: Mapping[str, Any], plan: AblationPlan) -> tuple[Any, dict[str, Any]]:
    """Learning speed of the second arm against the reference: the comparison, and the accuracies at the checkpoints."""
    assert plan.speed is not None
    labels = list(plan.arms)[:2]
    arms = [record["arms"][label]["curve"] for label in labels]
    curves = [np.stack([[_bits(text) for text in run] for run in arm["right"]]) for arm in arms]
    steps = arms[0]["steps"]
    clusters = clusters_of(record)[: curves[0].shape[2]]
    result, reached = compare_speed(steps, curves[0], curves[1], plan.speed.target, clusters)
    accuracies = {label: (100 * curve.mean(2)).tolist() for label, curve in zip(labels, curves, strict=True)}
    needed = dict(zip(labels, (reached["first"], reached["second"]), strict=True))
    return result, {"steps": steps, "accuracies": accuracies, "needed": needed, "target": plan.speed.target}


def _others(record: Mapping[str, Any], plan: AblationPlan) -> list[str]:
    return [label for label in plan.arms if label in record["arms"] and label != plan.reference]


def p_values(record: Mapping[str, Any], protocol: Protocol) -> dict[str, float]:
    """Return the uncorrected p values of a record's comparisons by their names in the family."""
    plan, name = protocol.plan(record["ablation"]), record["ablation"]
    found = {
        f"{name}: {label}": _comparison(record, plan, label, plan.subset).p
        for label in _others(record, plan)
        if not plan.arms[label].control
    }
    if _speed_plan(record, plan) is not None:
        found[f"{name}: {SPEED}"] = _speed(record, plan)[0].p
    return found


def shortfall(record: Mapping[str, Any], protocol: Protocol) -> list[str]:
    """Return in which respects a record is less than the plan asks for; such a record gives no verdict."""
    plan = protocol.plan(record["ablation"])
    seeds, questions = plan.seeds or [], plan.questions or 0
    missing = [seed for seed in seeds if seed not in record["seeds"]]
    found = [f"{len(seeds) - len(missing)} of {len(seeds)} seeds"] if missing else []
    if record["questions"]["n"] < questions:
        found.append(f"{record['questions']['n']} of {questions} questions")
    if record["protocol"] != protocol.protocol_hash(record["ablation"]):
        found.append("another plan")
    if plan.speed is not None and _speed_plan(record, plan) is None:
        found.append("no learning speed")
    if record["fast"]:
        found.append("shortened runs")
    return found


def analyse(record: Mapping[str, Any], protocol: Protocol | None = None) -> dict[str, Any]:
    """Return the differences and verdicts that follow from a record and the plan.

    Holm's correction is over the whole family: the other ablations count with their stored records, and with p = 1
    where there is none.

    Returns:
        `reference`, `arms` (rows: arm, values, mean, interval), `differences` (by arm: `Comparison.summary`, p_holm,
        equivalence_p, verdict, claim, control, and `control_subset` with the same numbers), `speed` (or None),
        `margin`, `shortfall`, `testable`, `above_baselines` (by arm), `chance`, `lookup_table`, `seeds`, `n`.
    """
    protocol = protocol or load_protocol()
    name, plan = record["ablation"], protocol.plan(record["ablation"])
    others = {key: p for other in protocol.ablations if other != name for key, p in _stored_p(other, protocol).items()}
    corrected = holm(dict.fromkeys(protocol.family, 1.0) | others | p_values(record, protocol))
    lacking = shortfall(record, protocol)
    chosen = chosen_questions(record, plan.subset)
    above, baselines = _above_baselines(record, plan, chosen)
    testable = plan.bench is not None or any(above.values()) or len(record["seeds"]) == 1

    differences, margin = {}, plan.margin or protocol.margin
    for label in _others(record, plan):
        arm, result, key = plan.arms[label], _comparison(record, plan, label, plan.subset), f"{name}: {label}"
        direction = claim(arm.claim).direction if arm.claim else None
        verdict = verdict_of_difference(result, direction, p=corrected.get(key, 1.0), margin=margin, testable=testable)
        row = {
            **result.summary(), "subset": plan.subset, "claim": arm.claim, "control": arm.control,
            "p_holm": corrected.get(key), "equivalence_p": result.equivalence_p(margin),
            "verdict": Verdict.NOT_RESOLVED if lacking else Verdict.SHOWN_ONLY if arm.control else verdict,
        }  # fmt: skip
        if plan.control_subset is not None:
            row["control_subset"] = {
                "subset": plan.control_subset, **_comparison(record, plan, label, plan.control_subset).summary()
            }  # fmt: skip
        differences[label] = row
    speed = None
    if (speed_plan := _speed_plan(record, plan)) is not None:
        result, facts = _speed(record, plan)
        key = f"{name}: {SPEED}"
        direction = claim(speed_plan.claim).direction if speed_plan.claim else None
        verdict = verdict_of_difference(result, direction, p=corrected[key], margin=None, testable=testable)
        speed = {
            **result.summary(), **facts, "claim": speed_plan.claim, "p_holm": corrected[key],
            "verdict": Verdict.NOT_RESOLVED if lacking else verdict,
        }  # fmt: skip
    return {
        "reference": plan.reference,
        "arms": [_arm_row(record, label, chosen) for label in record["arms"]],
        "differences": differences,
        "speed": speed,
        "margin": margin,
        "shortfall": lacking,
        "testable": testable,
        "above_baselines": above,
        **baselines,
        "subset": plan.subset,
        "seeds": record["seeds"],
        "n": len(chosen),
    }


def _arm_row(record: Mapping[str, Any], label: str, chosen: np.ndarray) -> dict[str, Any]:
    values = scores_of(record, label).part(chosen).values.tolist()
    interval = seeds_interval(values)["interval"]
    return {"arm": label, "values": values, "mean": float(np.mean(values)), "interval": interval}


def _above_baselines(
    record: Mapping[str, Any], plan: AblationPlan, chosen: np.ndarray
) -> tuple[dict[str, bool], dict[str, float | None]]:
    """Whether each arm is above chance and above the look-up table; the accuracies of these two."""
    if plan.bench is not None:
        return {}, {"chance": None, "lookup_table": None}
    facts = record["questions"]
    chance = 1 / np.array([int(digit) for digit in facts["choices"]], dtype=float)[chosen]
    table = _numbers(facts["lookup_table"])[chosen]
    clusters = clusters_of(record)
    names = [clusters[k] for k in chosen]
    above = {}
    for label in record["arms"]:
        own = scores_of(record, label).part(chosen)
        above[label] = beats(own, chance.tolist(), names) and beats(own, table.tolist(), names)
    return above, {"chance": 100 * float(chance.mean()), "lookup_table": 100 * float(table.mean())}


def _stored_p(name: str, protocol: Protocol) -> dict[str, float]:
    record = read_record(name)
    return {} if record is None or shortfall(record, protocol) else p_values(record, protocol)


def category_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per category of a bench (`all` first) and arm: relative score and difference to the reference.

    Rows: arm, category, n, score, interval, difference, difference_interval; a single seed has the intervals over its
    questions.
    """
    plan = load_protocol().plan(record["ablation"])
    categories, clusters = np.array(record["questions"]["category"].split(SEPARATOR)), clusters_of(record)
    rows = []
    for category in ("all", *dict.fromkeys(categories.tolist())):
        chosen = np.flatnonzero((categories == category) | (category == "all"))
        names = [clusters[k] for k in chosen]
        reference = scores_of(record, plan.reference).part(chosen)
        for label in record["arms"]:
            arm = scores_of(record, label).part(chosen)
            value, change = single(arm, names), compare(reference, arm, names)
            rows.append({
                "arm": label, "category": category, "n": len(chosen), "score": value.effect,
                "interval": value.interval() or value.interval_over("questions"), "difference": change.effect,
                "difference_interval": change.interval() or change.interval_over("questions"),
            })  # fmt: skip
    return rows


def overview(protocol: Protocol) -> list[dict[str, Any]]:
    """Return a row per arm of the plan with its stored difference, interval and verdict; without learning speeds."""
    rows: list[dict[str, Any]] = []
    for name in protocol.ablations:
        record = read_record(name)
        if record is None:
            rows.append({"ablation": name, "verdict": NO_RECORD})
            continue
        result = analyse(record, protocol)
        for label, row in result["differences"].items():
            rows.append({
                "ablation": name, "difference": f"{label} minus {result['reference']}",
                "problems": row["subset"], "seeds": len(result["seeds"]), "effect (points)": row["effect"],
                "95 % interval (points)": row["interval"], "p (Holm)": row["p_holm"],
                "verdict": "control" if row["control"] else str(row["verdict"]),
            })  # fmt: skip
    return rows


_MEANING = {
    Verdict.AGREES: "The difference has the paper's sign and is significant after the correction for the family.",
    Verdict.DISAGREES: "The difference has the opposite sign of the paper's and is significant.",
    Verdict.NO_DIFFERENCE: "The difference is smaller than the margin of equivalence; that is tested.",
    Verdict.NOT_RESOLVED: "Neither a difference nor equivalence is shown.",
    Verdict.CANNOT_BE_TESTED: "No arm is above a blind guess and above the look-up table.",
    Verdict.SHOWN_ONLY: "The paper claims nothing about this difference.",
}


def difference_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a table of the differences of an analysed record, in points."""
    rows = []
    for label, row in result["differences"].items():
        for subset, part, verdict in ((row["subset"], row, row["verdict"]), (None, row.get("control_subset"), None)):
            if part:
                rows.append({
                    f"minus {result['reference']}": label, "questions": f"{part['n']} ({subset or part['subset']})",
                    "effect (points)": part["effect"],
                    "95 % interval (points)": part["interval"], "over seeds (points)": part["over_seeds"],
                    "over questions (points)": part["over_questions"], "p (Holm)": row["p_holm"] if verdict else None,
                    "verdict": None if verdict is None else "control" if row["control"] else str(verdict),
                })  # fmt: skip
    return rows


def explain(result: Mapping[str, Any]) -> str:
    """Return sentences on the verdicts of an analysed record, for a chapter, as Markdown."""
    parts, rows = [], {label: row for label, row in result["differences"].items() if not row["control"]}
    for label, row in rows.items():
        ends = row["interval"]
        interval = f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else ""
        text = (
            f"**{row['verdict'].capitalize()}**: {markdown_safe(label)} minus "
            f"{markdown_safe(result['reference'])}, {row['effect']:+.1f} points"
        )
        parts.append(f"{text}{interval}. {_MEANING[row['verdict']] if not result['shortfall'] else ''}".strip())
    if result["shortfall"]:
        shortfall = markdown_safe(", ".join(result["shortfall"]))
        parts.append(f"This is less than the plan asks for ({shortfall}), so there is no verdict.")
    margin = result["margin"]
    for label, row in rows.items():
        if row["interval"] and (half := (row["interval"][1] - row["interval"][0]) / 2) > margin:
            alone = (row["over_questions"][1] - row["over_questions"][0]) / 2
            text = f"The half-width of {markdown_safe(label)}, {half:.1f} points, is above the margin of {margin:g}"
            parts.append(f"{text}; the questions alone give {alone:.1f}.")
    below = [label for label, above in result["above_baselines"].items() if not above]
    if below and len(result["seeds"]) > 1:
        chance, table = (f"{result[key]:.1f} %" for key in ("chance", "lookup_table"))
        names = markdown_safe(", ".join(below))
        parts.append(f"Not significantly above both a blind guess ({chance}) and the look-up table ({table}): {names}.")
    return " ".join(parts)


def speed_text(speed: Mapping[str, Any]) -> str:
    """Return the steps of the second arm over those of the reference in words; a bound if one misses the target."""
    ratio = f"{2 ** speed['effect']:.2g} times the steps of the reference"
    first, second = missed = [None in steps for steps in speed["needed"].values()]
    if any(missed):
        bound = "" if first == second else "at least " if second else "at most "
        arms = " and ".join(label for label, misses in zip(speed["needed"], missed, strict=True) if misses)
        fails = f"{'do' if all(missed) else 'does'} not reach {speed['target']:g} %"
        return f"{bound}{ratio}: {arms} {fails} within {speed['steps'][-1]} steps"
    ends = " to ".join(f"{2**end:.2g}" for end in speed["interval"] or ())
    return f"{ratio} (95 % interval {ends})" if ends else f"{ratio} (one seed)"


def difference_checks(result: Mapping[str, Any], note: str = "") -> list[dict[str, Any]]:
    """Return the rows of the results table for the claims of an analysed record."""
    rows = []
    for row in [*result["differences"].values(), *([result["speed"]] if result["speed"] else [])]:
        if row["claim"]:
            known = claim(row["claim"])
            if row is result["speed"]:
                own = check(known.text, known.value_text, speed_text(row), None, note)
            else:
                own = check(known.text, known.value_text, row["interval"] or row["effect"], None, f"points; {note}")
            rows.append({**own, "verdict": row["verdict"], "id": known.id, "place": known.place})
    return rows


# ------------------------------------------------------------------------------------------------ freshness


def stale_reasons(name: str, protocol: Protocol, configs: Mapping[str, RunConfig]) -> list[str]:
    """Return why a stored record does not belong to the present plan, code, models and data; empty if it does."""
    record = read_record(name)
    if record is None:
        return [NO_RECORD]
    reasons = shortfall(record, protocol)
    then, now = record["made_with"], made_with(protocol.plan(name), configs)
    for key, words in (("training_code", "training code"), ("evaluation_code", "evaluation code")):
        if then[key] != now[key]:
            reasons.append(f"{words} has changed")
    for key, words in (("base_models", "base model"), ("data", "data set")):
        changed = [part for part in now[key] if then[key].get(part) != now[key][part]]
        reasons += [f"{words} {part} has changed" for part in changed]
    return reasons


# ------------------------------------------------------------------------------------------------ learning rates


def _rates_path() -> Path:
    return folder() / "learning_rates.json"


def _rates_hash(protocol: Protocol) -> str:
    return fingerprint([protocol.scale, protocol.learning_rates, protocol.tuning_seed, protocol.budget])


def write_learning_rates(protocol: Protocol, found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Store the score of each arm at each rate, over those of earlier calls with the same grid; return the file."""
    path = _rates_path()
    earlier: dict[str, Any] = read_json(path) if path.is_file() else {}
    arms = earlier.get("arms", {}) if earlier.get("grid") == _rates_hash(protocol) else {}
    for arm, scores in found.items():
        ordered = dict(sorted(scores.items(), key=lambda pair: float(pair[0])))
        # of equal scores the smallest rate: the runs finish in any order
        arms[arm] = {"scores": ordered, "best": float(max(ordered, key=lambda rate: ordered[rate]))}
    content = {"grid": _rates_hash(protocol), "arms": dict(sorted(arms.items()))}
    write_json(path, content)
    return content


def learning_rates(protocol: Protocol) -> dict[str, float]:
    """Return the chosen rate by arm; empty if none was chosen on the plan's grid."""
    path = _rates_path()
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("grid") != _rates_hash(protocol):
        return {}
    return {arm: row["best"] for arm, row in content["arms"].items()}
