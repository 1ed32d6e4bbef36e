"""Image grounding: exact-match accuracy of short answers with the right image, another, an edited, a blank, and none.

A row of questions is {question_id, image, text, answer, kind}. A model that ignores the image reaches `text_prior`; the
accuracy of a model that uses it falls to about that value with `shuffle_images` or a blank image.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from companion.evaluation.statistics import proportion
from llava_core.runtime import DataError

Row = Mapping[str, Any]


def normalize(answer: str) -> str:
    """Return an answer in lower case, without punctuation and extra white space, for exact matches."""
    return " ".join(re.sub(r"[^\w\s]", " ", answer.casefold()).split())


def factual_accuracy(questions: Sequence[Row], answers: Mapping[Any, str]) -> dict[str, Any]:
    """Score short answers by exact match after `normalize`; every question needs an answer.

    Returns:
        `{n, correct, accuracy, interval, by_kind}` in percent; by_kind has the first four per kind.

    Raises:
        DataError: ids of questions and answers differ, or an id occurs twice.
    """
    ids = [str(row["question_id"]) for row in questions]
    texts = {str(key): text for key, text in answers.items()}
    if not ids or len(set(ids)) != len(ids):
        raise DataError("questions: none, or two with the same question_id")
    different = set(ids) ^ texts.keys()
    if different:
        raise DataError(
            f"answers do not fit the questions: {len(different)} ids are on one side only, such as {min(different)!r}"
        )
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for identifier, row in zip(ids, questions, strict=True):
        by_kind[str(row["kind"])].append(normalize(texts[identifier]) == normalize(row["answer"]))
    total = proportion(sum(map(sum, by_kind.values())), len(ids))
    return total | {"by_kind": {kind: proportion(sum(hits), len(hits)) for kind, hits in sorted(by_kind.items())}}


def hallucination(named: Mapping[Any, Iterable[str]], present: Mapping[Any, Iterable[str]]) -> dict[str, Any]:
    """Score the objects that descriptions name against those in their images (both by image).

    Returns:
        objects: share of the named objects, each once per description, that are not in the image; descriptions: share
        of the descriptions that name such an object. Each is `{n, share, interval}` in percent, the share of nothing
        is None. Source: CHAIR_i and CHAIR_s of Rohrbach et al. 2018.

    Raises:
        DataError: a description is of an image without objects.
    """
    if unknown := [key for key in named if key not in present]:
        raise DataError(f"image {unknown[0]!r} has a description but no list of its objects")
    absent = {key: set(names) - set(present[key]) for key, names in named.items()}
    counts = {
        "objects": (sum(map(len, absent.values())), sum(len(set(names)) for names in named.values())),
        "descriptions": (sum(map(bool, absent.values())), len(absent)),
    }
    rates = {name: proportion(*count) for name, count in counts.items()}
    return {
        name: {"n": rate["n"], "share": rate["accuracy"], "interval": rate["interval"]} for name, rate in rates.items()
    }


def text_prior(train_questions: Sequence[Row], questions: Sequence[Row]) -> dict[str, Any]:
    """Score the best text-only baseline, the most frequent training answer to the same question text.

    A text without training answers gets the most frequent answer of its kind, and an unknown kind that of all. Ties go
    to the alphabetically first answer.
    """
    if not train_questions:
        raise DataError("text prior: no training question")
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in train_questions:
        for key in _prior_keys(row):
            counts[key][normalize(row["answer"])] += 1
    best = {key: min(answers, key=lambda a: (-answers[a], a)) for key, answers in counts.items()}
    return factual_accuracy(
        questions, {row["question_id"]: next(best[key] for key in _prior_keys(row) if key in best) for row in questions}
    )


def _prior_keys(row: Row) -> tuple[tuple[str, str], ...]:
    return ("text", normalize(row["text"])), ("kind", str(row["kind"])), ("all", "")


def shuffle_images(questions: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """Return the rows with permuted images: none keeps its own, and questions about one image share the new one."""
    images = sorted({row["image"] for row in questions if row.get("image")}, key=str)
    if len(images) < 2 or not all(row.get("image") for row in questions):
        raise DataError("shuffled images: every question needs an image, and there must be at least two different ones")
    random.Random(seed).shuffle(images)
    other = dict(zip(images, images[1:] + images[:1], strict=True))  # one cycle has no fixed point
    return [dict(row) | {"image": other[row["image"]]} for row in questions]


def edited_accuracy(before: Sequence[str], after: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Count the answers about edited images: a model that uses the image follows the edit.

    Args:
        before, after: the exact answers for the image as it was and as it is now.

    Returns:
        `follow`, `keep` (the answer for the image as it was) and `other`, each as `proportion` returns it.
    """
    kinds: Counter[str] = Counter()
    for old, new, answer in zip(before, after, answers, strict=True):
        said = normalize(answer)
        kinds["follow" if said == normalize(new) else "keep" if said == normalize(old) else "other"] += 1
    return {kind: proportion(kinds[kind], len(answers)) for kind in ("follow", "keep", "other")}
