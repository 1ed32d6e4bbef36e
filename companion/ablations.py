"""Ablations: arms that differ in one field, several seeds each, one metric, the difference with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from companion.data_tools.scienceqa import load_problems
from companion.evaluation import llava_bench, science_qa
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.grounding import factual_accuracy, shuffle_images, text_prior
from companion.evaluation.predict import predict_science_qa
from companion.evaluation.relative_score import compare_systems
from companion.evaluation.statistics import paired_bootstrap, seeds_and_items, seeds_interval, wilson
from companion.paper.claims import all_claims, claim
from companion.paper.ledger import published_ablation
from companion.paper.verdict import Verdict, verdict_of_interval
from companion.plots.figures import BLUE, ORANGE, _axes, _styled, check
from llava_core.checkpoints.load import Loaded, load
from llava_core.config import META, RunConfig, experiments, load_experiment, load_scale
from llava_core.inference import answer_questions
from llava_core.record import RunRecord
from llava_core.registry import unknown
from llava_core.runtime import (
    ConfigError,
    fingerprint,
    read_json,
    read_jsonl,
    resolve,
    resolve_device,
    resolve_dtype,
    sha256_file,
    shown,
    write_json,
)
from llava_core.train.launch import launch, resolve_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Arm:
    """One variant: its values per seed (in points) and the runs behind them."""

    name: str
    experiment: str
    values: list[float] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    records: list[RunRecord] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> list[float] | None:
        """95 % t interval of the mean over seeds, cut to what a percentage can be; None for one seed."""
        found = seeds_interval(self.values)["interval"]
        return found and [max(0.0, found[0]), min(100.0, found[1])]


CODE_ROOT = Path(__file__).resolve().parents[1]
EVALUATION_CODE = (
    "llava_core/data", "llava_core/models", "llava_core/checkpoints",
    "companion/data_tools", "companion/evaluation", "companion/teacher", "companion/miniature",
)  # fmt: skip


def cached_result(record: RunRecord, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return an evaluation result that is stored in the folder of its run.

    It is computed once, and again when the evaluation code or the data of the miniature have changed.
    """
    path = record.path / f"{name}.json"
    files = [file for folder in EVALUATION_CODE for file in sorted((CODE_ROOT / folder).rglob("*.py"))]
    cards = {resolve(folder) / "card.json" for folder in record.config.scale.data.values()}
    files += sorted(card for card in cards if card.is_file())
    measured_with = fingerprint([sha256_file(file) for file in [Path(__file__), *files]])
    if path.is_file():
        found: dict[str, Any] = read_json(path)
        if found["measured_with"] == measured_with:
            return found
    result = {**compute(), "measured_with": measured_with}
    write_json(path, result)
    return result


def load_run(record: RunRecord) -> Loaded:
    """The model of a finished run, on the device and in the dtype of its scale."""
    scale = record.config.scale
    return load(record.checkpoint, resolve_dtype(scale.dtype), resolve_device(scale.device))


SHUFFLE_SEED = 0  # of every exchange of images


def science_result(record: RunRecord, limit: int | None = None, look: bool = True) -> dict[str, Any]:
    """ScienceQA test accuracy of a finished run, with its subsets and its answers.

    Args:
        record: the run; its folder gets the file of answers too.
        limit: ask at most so many problems.
        look: hand out the images; without them the same questions are asked as text.
        batch: problems answered together (no answer depends on it).
    """
    name = "science_qa" if look else "science_qa_blind"

    def compute() -> dict[str, Any]:
        folder, out = record.config.data_path, record.path / f"{name}_answers.jsonl"
        first, second = load_scale(record.config.scale.name).answer_tokens
        out.unlink(missing_ok=True)  # of other code or data; `llava predict` goes on with its files
        answers = predict_science_qa(
            load_run(record), record.checkpoint, folder, out,
            limit=limit, images=look, max_new_tokens=first, answer_tokens=second,
        )  # fmt: skip
        return {**science_qa.score(load_problems(folder, "test")[:limit], answers), "answers": answers}

    return cached_result(record, name, compute)


def bench_result(record: RunRecord, client: Any, bench: str = "bench-coco", limit: int | None = None) -> dict[str, Any]:
    """LLaVA-Bench scores of a finished run: its answers, the judge's reviews, relative scores in %."""

    def compute() -> dict[str, Any]:
        folder, images = bench_folders(record, bench)
        asked = load_bench(folder, limit)
        rows, images = asked.rows(images)
        max_new_tokens, _ = load_scale(record.config.scale.name).answer_tokens
        answers = answer_questions(load_run(record), rows, images, max_new_tokens=max_new_tokens, desc=bench)
        reviews, _ = llava_bench.judge(asked.questions, asked.context, asked.reference or {}, answers, client)
        return {**llava_bench.score_reviews(reviews), "answers": answers, "reviews": reviews}

    return cached_result(record, bench, compute)


def bench_folders(record: RunRecord, bench: str) -> tuple[Path, Path]:
    """Folder of a bench and folder of its images."""
    folder = resolve(record.config.scale.data[bench])
    return folder, resolve(record.config.scale.data.get(f"{bench}_images", str(folder / "images")))


def factual_folder(config: RunConfig) -> Path:
    """Return the folder of factual questions: COCO of the scale if it has them, otherwise that of the miniature."""
    from companion import miniature

    folder = resolve(config.scale.data["coco"])
    return folder if (folder / "questions_val.jsonl").is_file() else miniature.ensure(only=["mini-coco"]) / "mini-coco"


def grounding_result(record: RunRecord, limit: int | None = None) -> dict[str, Any]:
    """Answer factual questions about held-out images, with the right image and with another one.

    Args:
        record: a finished run.
        limit: maximum number of questions; the first call of a run decides, since its result is stored with the run.

    Returns:
        `right`, `shuffled` (images exchanged) and `prior` (the best answers from the text alone), each as
        `factual_accuracy` returns it, and the `answers` with the right image.
    """

    def compute() -> dict[str, Any]:
        folder, loaded = factual_folder(record.config), load_run(record)
        rows = read_jsonl(folder / "questions_val.jsonl")[:limit]
        answers, mixed = (
            answer_questions(loaded, asked, folder / "val2014", max_new_tokens=16, desc=desc)
            for asked, desc in ((rows, "right image"), (shuffle_images(rows, SHUFFLE_SEED), "another image"))
        )
        prior = text_prior(read_jsonl(folder / "questions_train.jsonl"), rows)
        right, shuffled = factual_accuracy(rows, answers), factual_accuracy(rows, mixed)
        return {"right": right, "shuffled": shuffled, "prior": prior, "answers": answers}

    return cached_result(record, "grounding", compute)


def run_arms(
    arms: Sequence[tuple[str, str]],
    metric: Callable[[RunRecord], float],
    scale: str = "mini",
    fast: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[Arm]:
    """Train and measure every arm with every seed.

    Args:
        arms: (name shown, experiment) pairs; the first is the reference.
        metric: value in points of a finished run.
        scale: scale of the runs.
        fast: one seed and the `--fast` budget.
        seeds: the scale's seeds when None.

    Returns:
        The arms with their values.
    """
    chosen = list(seeds if seeds is not None else load_scale(scale).seeds)[: 1 if fast else None]
    made = [Arm(name, experiment) for name, experiment in arms]
    for seed in chosen:  # seed by seed, so that an interrupted chapter has complete comparisons first
        for arm in made:
            record = launch(resolve_run(arm.experiment, scale, fast, train__seed=seed))
            arm.values.append(metric(record))
            arm.runs.append(record.run_id)
            arm.records.append(record)
    return made


def difference(reference: Arm, other: Arm) -> dict[str, Any]:
    """Mean difference over seeds (other minus reference, same seeds paired) with its 95 % t interval, in points."""
    found = seeds_interval([b - a for a, b in zip(reference.values, other.values, strict=True)])
    return {"effect": found["mean"], "interval": found["interval"], "n_seeds": found["n"]}


# ------------------------------------------------------------------------------------------------ the paper's ablations


@dataclass(frozen=True)
class Ablation:
    """Two arms, each as (label, experiment), and the paper's claim about their difference in ScienceQA accuracy."""

    reference: tuple[str, str]
    other: tuple[str, str]
    claim: str | None = None


def ablations() -> dict[str, Ablation]:
    """Return the ablations by name: every experiment whose file has an `ablation` section.

    Raises:
        ConfigError: two ablations have one name, a reference or a claim does not exist, or an arm is not evaluated on
            ScienceQA.
    """
    files, found = experiments(), dict[str, Ablation]()
    for experiment, path in files.items():
        config = load_experiment(experiment).experiment
        if (section := config.ablation) is None:
            continue
        name, reference = section.name or experiment, section.reference or config.base
        where = f"{shown(path)}, ablation"
        if reference is None or reference not in files:
            raise ConfigError(f"{where}: {unknown('reference experiment', str(reference), files)}")
        if name in found:
            raise ConfigError(f"{where}: another ablation has the name '{name}'; choose another one")
        if section.claim is not None and section.claim not in all_claims():
            raise ConfigError(f"{where}: {unknown('claim', section.claim, all_claims())}")
        if config.data.name != "scienceqa":
            raise ConfigError(f"{where}: arms are compared by ScienceQA accuracy; set `base: science_qa`")
        labels = section.labels or (reference, experiment)
        found[name] = Ablation((labels[0], reference), (labels[1], experiment), section.claim)
    return found


def ablation(name: str) -> Ablation:
    """Return one ablation.

    Raises:
        ConfigError: it does not exist, or as in `ablations`.
    """
    known = ablations()
    if name not in known:
        raise ConfigError(unknown("ablation", name, known))
    return known[name]


NORMAL_95 = 1.96  # standard errors of a normal distribution to either side that hold 95 %
FAST_PROBLEMS = 48  # test problems of a `--fast` run


def published_difference(name: str) -> dict[str, Any] | None:
    """Return the paper's difference of an ablation with its standard error, as `ledger.published_ablation`.

    A |z| of at least 1.96 is significant at 5 %. None for an ablation that is not in the paper.
    """
    known = ablation(name).claim
    return published_ablation(known) if known else None


def difference_check(what: str, published: Any, found: Mapping[str, Any], note: str = "") -> dict[str, Any]:
    """The row of the table of results for a difference; `found` has `effect`, `interval` or `widest`, and `verdict`."""
    row = check(what, published, found.get("widest") or found["interval"] or found["effect"], None, note)
    return {**row, "verdict": Verdict(found["verdict"])}


def verdict_check(name: str, found: Mapping[str, Any], note: str = "") -> dict[str, Any]:
    """The row for a difference that is a claim of the ledger."""
    known = claim(name)
    return {**difference_check(known.text, known.shown, found, note), "id": name, "place": known.place}


def ablate(name: str, scale: str = "mini", fast: bool = False, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Train and measure both arms of an ablation.

    Args:
        name: in `ablations`.
        scale, fast, seeds: as in `run_arms`.

    Returns:
        `arms` (the reference first), `effect`, `interval` over seeds (None for one), `n_seeds`, `question_interval`
        (same seeds, other questions), `both_interval` (other seeds and questions), `widest` (from the lowest to the
        highest end of all three, None for one seed), `published` (as `published_difference`), `verdict`: of the widest,
        since two seeds may agree by chance.

    Raises:
        ConfigError: there is no such ablation.
    """
    chosen, limit = ablation(name), FAST_PROBLEMS if fast else None
    arms = run_arms(
        (chosen.reference, chosen.other), lambda run: float(science_result(run, limit)["accuracy"]), scale, fast, seeds
    )
    found = difference(*arms)
    first, second = (question_scores(arm, limit) for arm in arms)
    over_questions, over_both = (
        [100 * end for end in result["interval"]]
        for result in (paired_bootstrap(*(np.mean(s, 0) for s in (first, second))), seeds_and_items(first, second))
    )
    ends = [*over_questions, *over_both, *(found["interval"] or ())]
    widest = [min(ends), max(ends)] if found["interval"] else None
    return {
        "arms": arms,
        **found,
        "question_interval": over_questions,
        "both_interval": over_both,
        "published": published_difference(name),
        "widest": widest,
        "verdict": verdict_of_interval(widest, claim(chosen.claim).direction if chosen.claim else None),
    }


_MEANING = {
    "agrees": "The measured difference has the paper's sign, and its interval leaves out zero.",
    "disagrees": "The measured difference has the other sign than the paper's, and its interval leaves out zero.",
    "not resolved": "Over seeds or over questions the interval of the difference contains zero.",
}


def explain(result: Mapping[str, Any], fast: bool = False) -> str:
    """What `ablate` found, in words, and whether its arms have learned enough for a comparison."""
    n, arms = result["n_seeds"], result["arms"]
    problems = load_problems(arms[0].records[0].config.data_path, "test")[: FAST_PROBLEMS if fast else None]
    chance = 100 * sum(1 / len(p.choices) for p in problems) / len(problems)
    meaning = "There is one seed only." if n == 1 else _MEANING[result["verdict"]]
    text = f"**{result['verdict'].capitalize()}.** {meaning} ({n} {'seed' if n == 1 else 'seeds'} per arm)"
    right = [round(arm.mean * len(problems) / 100) for arm in arms]
    blind = [arm.name for arm, k in zip(arms, right, strict=True) if 100 * wilson(k, len(problems))[0] <= chance]
    if len(blind) == len(arms):
        return f"{text} No arm is above a blind guess ({chance:.1f} %): at this scale the claim cannot be tested."
    return f"{text} Not above a blind guess ({chance:.1f} %): {blind[0]}." if blind else text


def question_scores(arm: Arm, limit: int | None = None) -> list[list[float]]:
    """For each of an arm's seeds, which of the test problems it answered right: a row of 0 and 1 (seeds, problems)."""
    problems = load_problems(arm.records[0].config.data_path, "test")[:limit]
    answers = [science_result(record, limit)["answers"] for record in arm.records]
    return [[float(science_qa.parse_answer(a[p.id], len(p.choices)) == p.answer) for p in problems] for a in answers]


def arm_settings(arms: Sequence[tuple[str, str]], scale: str = "mini") -> list[dict[str, Any]]:
    """The settings in which the arms' resolved runs, and the runs that they start from, are not alike."""
    runs = {name: load_experiment(experiment, scale) for name, experiment in arms}
    rows = []
    starts = {name: first for name, run in runs.items() if (first := run.upstream()) is not None}
    for stage, configs in (("this run", runs), ("the run it starts from", starts)):
        if len(configs) < len(runs):
            continue  # one arm starts from nothing, which `starts from stage 1` says
        flat = {name: _settings(config) for name, config in configs.items()}
        for setting in sorted({key for found in flat.values() for key in found}):
            values = {name: found.get(setting) for name, found in flat.items()}
            if len({repr(value) for value in values.values()}) > 1:
                rows.append({"in": stage, "setting": setting, **{n: str(v) for n, v in values.items()}})
    return rows


def _settings(config: RunConfig) -> dict[str, Any]:
    """Dotted settings of a run; that it starts from another run is one of them, that run's name is not."""
    content = config.experiment.model_dump(exclude={*META, "init_from"})
    flat = {f"{s}.{f}" if f else s: v for s, part in content.items()
            for f, v in (part.items() if isinstance(part, dict) else [("", part)])}  # fmt: skip
    return {**flat, "starts from stage 1": config.experiment.init_from is not None}


def _reach(value: float, interval: Sequence[float] | None) -> list[list[float]] | None:
    """An interval as Matplotlib's error bars want it."""
    return None if interval is None else [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


# ------------------------------------------------------------------------------------------------ the mix of data kinds

MIXES = {
    "full": ("instruct_full", "bench-coco-full"),
    "detail + complex": ("instruct_detail_complex", "bench-coco-detail-complex"),
    "conversation + some": ("instruct_conv_some", "bench-coco-conv-some"),
    "conversation": ("instruct_conversation_only", "bench-coco-conversation"),
    "none": ("pretrain", "bench-coco-none"),
}
"""Rows of the paper's Table 4: name -> experiment, claim id."""


def run_mixes(scale: str = "mini", fast: bool = False, n_seeds: int = 2) -> dict[str, list[RunRecord]]:
    """Train every mix of instruction data; the first seed is the experiment's own, so its full mix is chapter 21's run.

    Returns:
        Mix -> its finished runs, one per seed; `none` has one, stage 1 as all the others start from it.
    """
    first = load_experiment("finetune", scale).experiment.train.seed
    seeds = [first, *(s for s in load_scale(scale).seeds if s != first)][: 1 if fast else n_seeds]
    records: dict[str, list[RunRecord]] = {mix: [] for mix in MIXES}
    for seed in seeds:
        for mix, (experiment, _) in MIXES.items():
            if mix != "none":
                records[mix].append(launch(resolve_run(experiment, scale, fast, train__seed=seed)))
    records["none"] = [launch(resolve_run("pretrain", scale, fast))]
    return records


def mix_rows(
    reviews: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], published: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the table of the training mixes: relative scores and differences to the first mix, in %.

    Args:
        reviews: as for `relative_score.compare_systems`, with a mix as a system.
        published: mix -> claim id of its score over all questions.
    """
    rows = []
    for row in compare_systems(reviews):
        mix, kind = row["system"], row["category"]
        known = all_claims().get(published[mix] if kind == "all" else f"{published[mix]}-{kind}")
        rows.append({
            "training data": mix, "questions": kind, "n": row["n"], "relative score (%)": row["score"],
            "95 % interval": row["interval"], "difference": row["difference"],
            "difference interval": row["difference_interval"], "published (%)": known.value if known else None,
        })  # fmt: skip
    return rows


@_styled
def mix_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Relative scores by kind of question, one line per training mix, the paper's as open diamonds."""
    mixes = list(dict.fromkeys(row["training data"] for row in rows))
    kinds = list(dict.fromkeys(row["questions"] for row in rows))
    figure, axes = _axes(8.2, 1.2 + 0.36 * len(mixes), 1, len(kinds), grid="x")
    for ax, kind in zip(axes, kinds, strict=True):
        for row in (r for r in rows if r["questions"] == kind):
            y, value = mixes.index(row["training data"]), row["relative score (%)"]
            ax.errorbar(value, y, xerr=_reach(value, row["95 % interval"]), fmt="o", color=BLUE, capsize=3,
                        label="here" if y == 0 else None)  # fmt: skip
            if row["published (%)"] is not None:
                ax.plot(row["published (%)"], y, "D", color=ORANGE, fillstyle="none", markersize=8, markeredgewidth=1.6,
                        label="published" if y == 0 else None)  # fmt: skip
        ax.set(
            title=kind,
            xlim=(0, 1.05 * max(100.0, *(r["95 % interval"][1] for r in rows))),
            ylim=(len(mixes) - 0.5, -0.5),
        )
        ax.set_yticks(range(len(mixes)), mixes if ax is axes[0] else [""] * len(mixes))
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("score relative to the reference (%)", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    return figure
