"""LLaVA-Bench: a judge scores reference and candidate answers from 1 to 10, reading captions instead of the image.

The relative score is the ratio of the mean scores, candidate to reference, in percent. Source: paper Section 5.1;
llava/eval/{eval_gpt_review_bench,summarize_gpt_review}.py@181a2f8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.evaluation.prompts import PROMPTS
from companion.evaluation.statistics import ratio, seeds_interval
from companion.teacher.asking import ask_all
from companion.teacher.chat import ChatRequest
from companion.teacher.parse import NotWhole, ReplyError
from companion.teacher.reasoning import without_reasoning
from llava_core.runtime import DataError, display_path, fingerprint, read_jsonl

if TYPE_CHECKING:
    import numpy as np

    from companion.teacher.chat import ChatClient, ChatReply

Answers = Mapping[Any, str] | Iterable[Mapping[str, Any]]
Reviews = str | Path | Iterable[Mapping[str, Any]]  # a JSONL file or rows

CATEGORY_PREFIX = "llava_bench_"
ORDERS = ("reference_first", "candidate_first")
LOWEST, HIGHEST = 1.0, 10.0  # the judge's scale
FAILED = -1.0, -1.0  # the released script's scores of a review that it cannot read
JUDGE_MODEL, JUDGE_TEMPERATURE, JUDGE_MAX_TOKENS = "gpt-4-0314", 0.2, 1024


def judge_messages(
    question: str, context: str, first: str, second: str, rule: str = PROMPTS["judge_rule"]
) -> list[dict[str, str]]:
    """Return the chat messages that ask for two scores; the sections are those of the released prompt."""
    sections = [
        f"[Context]\n{context}",
        f"[Question]\n{question}",
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]",
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]",
        f"[System]\n{rule}",
    ]
    return [{"role": "system", "content": PROMPTS["judge_system"]}, {"role": "user", "content": "\n\n".join(sections)}]


def judge(
    questions: Iterable[Mapping[str, Any]],
    context: Mapping[str, str],
    reference_answers: Answers,
    candidate_answers: Answers,
    client: ChatClient,
    *,
    model: str = JUDGE_MODEL,
    temperature: float = JUDGE_TEMPERATURE,
    max_tokens: int = JUDGE_MAX_TOKENS,
    swap: bool = False,
    rules: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Review every candidate answer against the reference answer.

    A review without two scores is requested once more; the row has the first one under `first`.

    Args:
        questions: rows with question_id, image, text and category.
        context: image -> its description: captions, for COCO also boxes.
        swap: ask a second time with the candidate first, against position bias.
        rules: category -> the text that tells the judge what to do (default: ours for all).

    Returns:
        Review rows as released (question_id, answer1_id of the reference, answer2_id of the candidate, category,
        content, tuple), with `order` and `Asked.source`. `tuple` is [reference, candidate] in either order, None for a
        failed review. Then the tally of `teacher.asking.ask_all`; questions beyond the budget have no row.

    Raises:
        DataError: a question has no context, reference or candidate answer.
        ServerError: no request can succeed; earlier replies are in the cassette of a recording client.
    """
    references, candidates = _by_id(reference_answers, "reference"), _by_id(candidate_answers, "candidate")
    jobs: list[tuple[dict[str, Any], ChatRequest]] = []
    for row in questions:
        key = str(row["question_id"])
        if row["image"] not in context:
            raise DataError(f"question {key}: no context for image {row['image']!r}; the files do not belong together")
        for name, answers in (("reference", references), ("candidate", candidates)):
            if key not in answers:
                raise DataError(f"question {key}: no {name} answer; give answers to all questions of the bench")
        (first, first_id), (second, second_id) = references[key], candidates[key]
        named = {"question_id": row["question_id"], "answer1_id": first_id, "answer2_id": second_id}
        for order in ORDERS[: 1 + swap]:
            pair = (first, second) if order == ORDERS[0] else (second, first)
            rule = PROMPTS["judge_rule"] if rules is None else rules[row["category"]]
            messages = judge_messages(row["text"], context[row["image"]], *pair, rule)
            request = ChatRequest(messages, model, temperature, max_tokens)
            jobs.append((named | {"category": row["category"], "order": order}, request))
    asked, tally = ask_all(client, [request for _, request in jobs], _check_scores, "judge")
    reviews = []
    for number, ((row, _), result) in enumerate(zip(jobs, asked, strict=True), start=1):
        if not result.unasked:
            # the scores of a review that was cut off do not count, nor when its row is scored again
            whole = not (result.replies and isinstance(result.replies[-1][2], NotWhole))
            review = {"id": number, **row, "content": result.text if whole else None}
            scores = review_scores(review)
            reviews.append(review | {"tuple": list(scores) if scores else None} | result.source())
    return reviews, tally


def _check_scores(reply: ChatReply) -> None:
    if parse_scores(reply.text) is None:
        raise ReplyError("its first line does not hold two scores from 1 to 10 and nothing else")


def _by_id(answers: Answers, what: str) -> dict[str, tuple[str, str]]:
    """Question id -> answer and its id, a hash of the text where a row has none."""
    if isinstance(answers, Mapping):
        answers = [{"question_id": key, "text": text} for key, text in answers.items()]
    result: dict[str, tuple[str, str]] = {}
    for row in answers:
        key = str(row["question_id"])
        if key in result:
            raise DataError(f"question {key} has two {what} answers; remove one")
        result[key] = row["text"], str(row.get("answer_id") or fingerprint(row["text"]))
    return result


# Text that may surround two scores; any other text on their line makes the review fail.
# A colon or dash is accepted only after a word: in "1: 8" the 1 would be a list number, not a score.
_LABEL = re.compile(r"assistant\s*([12])\b(?:'s)?", re.IGNORECASE)
_FILLER = re.compile(
    r"(?:(?:assistant\s*[12]\b(?:'s)?|\b(?:overall|final|scores?|ratings?|the|of|for|is|and|vs)\b)[\s*_]*)+[:=-]?"
    r"|(?<=\d)\s*(?:/|out of)\s*10(?:\.0+)?(?![\w.])|[\s,;|*_]",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.-])(?:10|\d)(?:\.\d+)?(?![\w/.])")


def parse_scores(review: str) -> tuple[float, float] | None:
    """Return the two scores that a review opens with, or None where they are ambiguous.

    Accepted: `8 7.5`, `8, 9`, `8/10 9/10`, `Scores: 8 and 9`, `Assistant 1: 8` and `Assistant 2: 9` on one line or on
    two, and lines without digits before them. A line with digits and other words is rejected. Reasoning is left out.
    """
    review = without_reasoning(review) or ""
    scores: list[float] = []
    labels: list[str] = []
    for line in review.splitlines():
        if not any(c.isdigit() for c in line):
            continue
        labels += _LABEL.findall(line)
        bare = _FILLER.sub(" ", line.strip(" \t*_`()[]."))
        if _NUMBER.sub("", bare).strip():
            return None
        scores += [float(number) for number in _NUMBER.findall(bare)]
        if len(scores) >= 2:
            break
    if len(scores) != 2 or not all(map(_on_scale, scores)) or labels not in ([], ["1", "2"]):
        return None
    return scores[0], scores[1]


def _on_scale(score: float) -> bool:
    return LOWEST <= score <= HIGHEST


def _released_scores(review: str) -> tuple[float, float]:
    """Parse as the released script does, where a failure becomes a score of -1; so do NaN and infinity."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return FAILED
    return (first, second) if math.isfinite(first) and math.isfinite(second) else FAILED


def review_scores(row: Mapping[str, Any], released: bool = False) -> tuple[float, float] | None:
    """Return the scores of reference and candidate, or None for a failed review (`released`: -1 and -1)."""
    content, stored = row.get("content"), row.get("tuple", row.get("score"))
    if isinstance(content, str):
        scores = _released_scores(content) if released else parse_scores(content)
        return scores[::-1] if scores and row.get("order") == ORDERS[1] else scores
    # a row without text has its scores in the order of reference and candidate
    complete = isinstance(stored, list | tuple) and len(stored) == 2 and all(type(s) in (int, float) for s in stored)
    if complete and all(map(_on_scale, stored)):
        return float(stored[0]), float(stored[1])
    return FAILED if released else None


def review_rows(reviews: Reviews) -> tuple[str, list[Mapping[str, Any]]]:
    """Return the name of the reviews for error messages, and their rows.

    Raises:
        DataError: no review, another format, or two reviews of a question in the same order of the answers.
    """
    where = display_path(reviews) if isinstance(reviews, str | Path) else "reviews"
    rows = read_jsonl(reviews) if isinstance(reviews, str | Path) else list(reviews)
    if not rows:
        raise DataError(f"{where}: holds no review; give the JSONL that the judge wrote")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not {"content", "tuple", "score"} & row.keys():
            raise DataError(f"{where}, line {number}: not a review; it needs the judge's text in `content`")
    seen: dict[tuple[str, bool], int] = {}
    for number, row in enumerate(rows, start=1):
        if "question_id" not in row:
            continue
        earlier = seen.setdefault((str(row["question_id"]), row.get("order") == ORDERS[1]), number)
        if earlier != number:
            raise DataError(
                f"{where}, line {number}: question {str(row['question_id'])[:80]} has a review in line {earlier} "
                "already; remove one, and give each repeat a file of its own"
            )
    return where, rows


def score_reviews(reviews: Reviews, *, released: bool = False) -> dict[str, Any]:
    """Score reviews: 100 x mean candidate / mean reference, means rounded to three decimals.

    The judge's text `content` counts, `tuple` only without a text. `released`: average failed reviews as -1 and -1, as
    the released script does, instead of leaving them out; `failed` then counts those that this script cannot read.

    Returns:
        n (reviews in the means), failed with failed_ids, all, categories (relative scores in %, None without a score),
        reference and candidate (mean scores x 10), counts per category; mean_of_ratios (in %, the mean over reviews of
        candidate / reference, which is not the bench's number; None where a reference has 0); orders (relative score
        of each order of the answers, if there are both).
    """
    _, rows = review_rows(reviews)
    groups: dict[str, list[tuple[float, float]]] = {"all": []}
    orders: dict[str, list[tuple[float, float]]] = {order: [] for order in ORDERS}
    failed: dict[str, list[Any]] = {"all": []}
    for number, row in enumerate(rows, start=1):
        names = ["all", *([str(row["category"]).removeprefix(CATEGORY_PREFIX)] if "category" in row else [])]
        scores = review_scores(row, released)
        unread = scores is None or scores == FAILED
        if scores is not None:
            orders[ORDERS[row.get("order") == ORDERS[1]]].append(scores)
        for name in names:
            groups.setdefault(name, [])
            failed.setdefault(name, [])
            if unread:
                failed[name].append(row.get("question_id", number))
            if scores is not None:
                groups[name].append(scores)
    relative = {name: _relative(scores) for name, scores in groups.items()}
    reference, candidate = _means(groups["all"]) or (None, None)
    ratios = [second / first if first else None for first, second in groups["all"]]
    return {
        "n": len(groups["all"]),
        "failed": len(failed["all"]),
        "failed_ids": failed["all"],
        "all": relative.pop("all"),
        "categories": {name: relative[name] for name in sorted(relative)},
        "reference": None if reference is None else 10 * reference,
        "candidate": None if candidate is None else 10 * candidate,
        "counts": {name: {"n": len(groups[name]), "failed": len(failed[name])} for name in sorted(relative)},
        "mean_of_ratios": None if None in ratios or not ratios else 100 * math.fsum(ratios) / len(ratios),  # type: ignore[arg-type]
        **({"orders": {order: _relative(scores) for order, scores in orders.items()}} if all(orders.values()) else {}),
    }


def _means(scores: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not scores:
        return None
    reference, candidate = (round(sum(column) / len(scores), 3) for column in zip(*scores, strict=True))
    return reference, candidate


def _relative(scores: Sequence[tuple[float, float]]) -> float | None:
    means = _means(scores)
    return 100 * means[1] / means[0] if means and means[0] else None


def relative_score(counts: np.ndarray, scores: np.ndarray, rounded: bool = True) -> np.ndarray:
    """Relative score in % (resamples,) from counts (resamples, n) and scores (n, 2) of reference and candidate.

    Means are `rounded` to three decimals, as in `score_reviews`, so that the first row of `item_counts` has its score.
    """
    means = counts @ scores / counts.sum(1, keepdims=True)
    means = means.round(3) if rounded else means
    return 100 * ratio(means[:, 1], means[:, 0])


def format_repeats(result: Mapping[str, Any]) -> str:
    """Return the scores of several files as a text table: relative scores in %, mean and sample standard deviation."""
    rows = {row["file"]: {"all": row["all"], **row["categories"]} for row in result["files"]}
    names = ["all", *sorted({name for row in rows.values() for name in row} - {"all"})]
    width = max(len("95 % interval"), *map(len, rows))

    def line(label: str, values: Mapping[str, Any], digits: int, more: str = "") -> str:
        cells = ("-" if values.get(name) is None else f"{values[name]:.{digits}f}" for name in names)
        return f"{label:{width}}" + "".join(f"{cell:>10}" for cell in cells) + more

    lines = [f"{'':{width}}" + "".join(f"{name:>10}" for name in names) + "   reviews, failed"]
    lines += [line(r["file"], rows[r["file"]], 1, f"   {r['n']}, {r['failed']}") for r in result["files"]]
    repeats = result["repeats"]
    lines += [
        line(label, {n: r[key] for n, r in repeats.items()}, 2)
        for label, key in (("mean", "mean"), ("deviation", "std"))
    ]
    for end, label in enumerate(("95 % interval from", "to")):
        ends = {name: row["interval"][end] for name, row in repeats.items() if row["interval"]}
        lines.append(line(label, ends, 2))
    return "\n".join([*lines, *(f"- {note}" for note in result.get("notes", []))])


def summarize_repeats(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation and interval over repeated `score_reviews`, for all and each category."""
    names = sorted({name for result in results for name in result["categories"]})
    columns = {"all": [r["all"] for r in results]} | {n: [r["categories"].get(n) for r in results] for n in names}
    return {name: seeds_interval(values) for name, values in columns.items() if None not in values}
