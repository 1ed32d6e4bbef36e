"""LLaVA-Bench: a judge that reads captions instead of the image scores a reference and a candidate, 1 to 10 each.

The relative score is the ratio of mean scores, candidate to reference, in percent. Source: paper Section 5.1;
llava/eval/{eval_gpt_review_bench,summarize_gpt_review}.py@181a2f8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.evaluate.statistics import seeds_interval
from llava_core.runtime import DataError, read_jsonl, shown
from llava_core.teacher.chat import ChatRequest

if TYPE_CHECKING:
    from llava_core.teacher.chat import ChatClient

CATEGORIES = ("complex", "conv", "detail")
CATEGORY_PREFIX = "llava_bench_"
JUDGE_MODEL, JUDGE_TEMPERATURE, JUDGE_MAX_TOKENS = "gpt-4-0314", 0.2, 1024

JUDGE_SYSTEM = "You are a fair and exact judge of the quality of answers to questions about an image."
JUDGE_RULE = (
    "Above are a description of an image, a question about it, and what two AI assistants answered. You cannot see the "
    "image; rely on the description. Judge how helpful, relevant, accurate and detailed each answer is, and give each "
    "assistant one overall score from 1 (poor) to 10 (excellent). The order of the assistants must not matter. "
    "On the first line write only the two scores, Assistant 1's and then Assistant 2's, separated by a space. "
    "From the second line on explain both scores."
)

# ------------------------------------------------------------------------------------------------ asking


def judge_messages(
    question: str, context: str, first: str, second: str, rule: str = JUDGE_RULE
) -> list[dict[str, str]]:
    """Return the chat messages that ask a judge to score two answers; the sections are those of the released prompt."""
    sections = [
        f"[Context]\n{context}",
        f"[Question]\n{question}",
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]",
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]",
        f"[System]\n{rule}",
    ]
    return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": "\n\n".join(sections)}]


def judge(
    questions: Iterable[Mapping[str, Any]],
    context: Mapping[str, str],
    reference_answers: Mapping[Any, str] | Iterable[Mapping[str, Any]],
    candidate_answers: Mapping[Any, str] | Iterable[Mapping[str, Any]],
    client: ChatClient,
    *,
    model: str = JUDGE_MODEL,
    temperature: float = JUDGE_TEMPERATURE,
    max_tokens: int = JUDGE_MAX_TOKENS,
    swap: bool = False,
) -> list[dict[str, Any]]:
    """Have every candidate answer judged beside the reference answer.

    Args:
        questions: rows with question_id, image, text and category.
        context: image (the question's field) -> its description: captions, for COCO also boxes.
        reference_answers: question id -> text, or rows with question_id and text.
        candidate_answers: likewise.
        client: any chat client of `llava_core.teacher`.
        model: the judge's name, handed to the client.
        temperature: of the judge.
        max_tokens: of one review.
        swap: ask a second time with the candidate first, to cancel a judge's taste for a position.

    Returns:
        Review rows as released (question_id, category, content, tuple), with `order` and `model`. `tuple` is always
        [reference, candidate], and None where the review names no two scores.

    Raises:
        DataError: a question lacks a context, a reference or a candidate answer.
    """
    references, candidates = _by_id(reference_answers, "reference"), _by_id(candidate_answers, "candidate")
    reviews: list[dict[str, Any]] = []
    for row in questions:
        key = str(row["question_id"])
        if row["image"] not in context:
            raise DataError(f"question {key}: no context for image {row['image']!r}; the files do not belong together")
        for name, answers in (("reference", references), ("candidate", candidates)):
            if key not in answers:
                raise DataError(f"question {key}: no {name} answer; give answers to all questions of the bench")
        pair = (references[key], candidates[key])
        for order in ("reference_first", "candidate_first")[: 1 + swap]:
            first, second = pair if order == "reference_first" else pair[::-1]
            messages = judge_messages(row["text"], context[row["image"]], first, second)
            reply = client.complete(ChatRequest(messages, model, temperature, max_tokens))
            review = {"id": len(reviews) + 1, "question_id": row["question_id"], "category": row["category"]}
            review |= {"content": reply.text, "order": order, "model": model}
            scores = _review_scores(review)
            reviews.append(review | {"tuple": list(scores) if scores else None})
    return reviews


def _by_id(answers: Mapping[Any, str] | Iterable[Mapping[str, Any]], what: str) -> dict[str, str]:
    if isinstance(answers, Mapping):
        return {str(key): text for key, text in answers.items()}
    texts: dict[str, str] = {}
    for row in answers:
        key = str(row["question_id"])
        if key in texts:
            raise DataError(f"question {key} has two {what} answers; keep one")
        texts[key] = row["text"]
    return texts


# ------------------------------------------------------------------------------------------------ scoring

# What may stand around two scores without making them doubtful; anything else on their line makes the review fail.
# A colon or dash counts only after a word: in "1: 8" the 1 would be a number of a list, not a score.
_LABEL = re.compile(r"assistant\s*([12])\b(?:'s)?", re.IGNORECASE)
_FILLER = re.compile(
    r"(?:(?:assistant\s*[12]\b(?:'s)?|\b(?:overall|final|scores?|ratings?|the|of|for|is|and|vs)\b)[\s*_]*)+[:=-]?"
    r"|(?<=\d)\s*(?:/|out of)\s*10(?:\.0+)?(?![\w.])|[\s,;|*_]",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.-])(?:10|\d)(?:\.\d+)?(?![\w/.])")


def parse_scores(review: str) -> tuple[float, float] | None:
    """Return the two scores that a review opens with, or None where they are not beyond doubt.

    Accepted: `8 7.5`, `8, 9`, `8/10 9/10`, `Scores: 8 and 9`, `Assistant 1: 8` and `Assistant 2: 9` on one line or on
    two, and lines without any digit before them. A line that mixes other words with digits is not read.
    """
    found: list[float] = []
    labels: list[str] = []
    for line in review.splitlines():
        if not any(c.isdigit() for c in line):
            continue
        labels += _LABEL.findall(line)
        bare = _FILLER.sub(" ", line.strip(" \t*_`()[]."))
        if _NUMBER.sub("", bare).strip():
            return None
        found += [float(number) for number in _NUMBER.findall(bare)]
        if len(found) >= 2:
            break
    if len(found) != 2 or max(found) > 10 or labels not in ([], ["1", "2"]):
        return None
    return found[0], found[1]


def _released_scores(review: str) -> tuple[float, float]:
    """Parse as the released script does, where a failure becomes a score of -1."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return -1.0, -1.0
    return first, second


def _review_scores(row: Mapping[str, Any], released: bool = False) -> tuple[float, float] | None:
    content, stored = row.get("content"), row.get("tuple", row.get("score"))
    if isinstance(content, str):
        scores = _released_scores(content) if released else parse_scores(content)
        return scores[::-1] if scores and row.get("order") == "candidate_first" else scores
    try:  # a row that kept the scores only has them in the order of reference and candidate
        first, second = (float(score) for score in stored or ())
    except (TypeError, ValueError):
        first = second = -1.0
    return (first, second) if released or min(first, second) >= 0 else None


def score_reviews(reviews: str | Path | Iterable[Mapping[str, Any]], *, released: bool = False) -> dict[str, Any]:
    """Score a file, or rows, of reviews: 100 x mean candidate / mean reference, means rounded to three decimals.

    Args:
        reviews: JSONL path or rows; `content` (the judge's text) counts, `tuple` only where there is no text.
        released: average failed reviews as -1 and -1, as the released script does, instead of leaving them out.

    Returns:
        n (reviews in the means), failed with failed_ids, all, categories (relative scores in %, None where nothing
        could be scored), reference and candidate (mean scores x 10), counts per category.

    Raises:
        DataError: the file is missing, empty or holds something else than reviews.
    """
    where = shown(reviews) if isinstance(reviews, str | Path) else "reviews"
    rows = read_jsonl(reviews) if isinstance(reviews, str | Path) else list(reviews)
    if not rows:
        raise DataError(f"{where}: holds no review; give the JSONL that the judge wrote")
    groups: dict[str, list[tuple[float, float]]] = {"all": []}
    failed: dict[str, list[Any]] = {"all": []}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not {"content", "tuple", "score"} & row.keys():
            raise DataError(f"{where}, line {number}: not a review; it needs the judge's text in `content`")
        names = ["all", *([str(row["category"]).removeprefix(CATEGORY_PREFIX)] if "category" in row else [])]
        scores = _review_scores(row, released)
        for name in names:
            groups.setdefault(name, [])
            failed.setdefault(name, [])
            if scores is None:
                failed[name].append(row.get("question_id", number))
            else:
                groups[name].append(scores)
    relative = {name: _relative(scores) for name, scores in groups.items()}
    reference, candidate = _means(groups["all"]) or (None, None)
    return {
        "n": len(groups["all"]),
        "failed": len(failed["all"]),
        "failed_ids": failed["all"],
        "all": relative.pop("all"),
        "categories": {name: relative[name] for name in sorted(relative)},
        "reference": None if reference is None else 10 * reference,
        "candidate": None if candidate is None else 10 * candidate,
        "counts": {name: {"n": len(groups[name]), "failed": len(failed[name])} for name in sorted(relative)},
    }


def _means(scores: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not scores:
        return None
    reference, candidate = (round(sum(column) / len(scores), 3) for column in zip(*scores, strict=True))
    return reference, candidate


def _relative(scores: Sequence[tuple[float, float]]) -> float | None:
    means = _means(scores)
    return 100 * means[1] / means[0] if means and means[0] else None


def summarize_repeats(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation and interval over repeated `score_reviews`, for all and each category."""
    names = sorted({name for result in results for name in result["categories"]})
    columns = {"all": [r["all"] for r in results]} | {n: [r["categories"].get(n) for r in results] for n in names}
    return {name: seeds_interval(values) for name, values in columns.items() if None not in values}
