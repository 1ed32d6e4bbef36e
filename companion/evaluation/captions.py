"""Caption scores in Python: corpus BLEU-1 to 4 and CIDEr-D, as the COCO caption scorer defines them.

Source: Papineni et al. 2002 (BLEU), Vedantam et al. 2015 (CIDEr-D), Chen et al. 2015 (the COCO server's choices:
closest reference length, sigma 6, tf-idf over the evaluated images, factor 10).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.data.instruct import file_fault
from llava_core.runtime import DataError, display_path, read_json, read_jsonl, shortened, write_json

if TYPE_CHECKING:
    from llava_core.checkpoints.load import Loaded

Tokens = Sequence[str]
MAX_N = 4
SIGMA = 6.0
PERCENT = 100.0
"""Papers print BLEU (0 to 1 here) and CIDEr (0 to 10 here) times this."""
REQUEST = "Give this image a caption."

_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_TOKEN = re.compile(
    r"(?:mr|mrs|ms|dr|st|mt|ave|vs|etc)\.|n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)+|(?:[^\W\d_]\.){2,}|\w+(?:[-/']\w+)*|[^\w\s]"
)
_PUNCTUATION = set("'`\".?!,:-;…–—“”‘’")
# The COCO scorer removes `-LRB-` and the like in capitals only, but its tokenizer writes them in lower case: they stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(caption: str) -> list[str]:
    """Split a caption nearly as the Penn Treebank tokenizer does, in lower case and without punctuation.

    Web addresses, markup, currencies except the dollar and rare abbreviations differ from the scorer's tokenizer;
    `benchmarks/results/captions.csv` has the measured effect.
    """
    text = _CONTRACTION.sub(r" \1", caption.lower().replace("’", "'"))
    text = _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in _PUNCTUATION]


def _ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(tokens) - n + 1))


def bleu(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4 (0 to 1) from tokenized references and a tokenized candidate per image."""
    counts = [_bleu_counts(refs, candidate) for refs, candidate in zip(references, candidates, strict=True)]
    return _bleu_of([sum(column) for column in zip(*counts, strict=True)] or [0] * (2 * MAX_N + 2))


def _bleu_counts(references: Sequence[Tokens], candidate: Tokens) -> list[int]:
    """Counts of an image: matched and proposed 1- to 4-grams, lengths of candidate and closest reference."""
    matched, proposed = [0] * MAX_N, [0] * MAX_N
    most: Counter[tuple[str, ...]] = Counter()
    for ref in references:
        most |= _ngrams(ref)
    for ngram, count in _ngrams(candidate).items():
        proposed[len(ngram) - 1] += count
        matched[len(ngram) - 1] += min(count, most[ngram])
    return [
        *matched, *proposed, len(candidate), min((abs(len(ref) - len(candidate)), len(ref)) for ref in references)[1]
    ]  # fmt: skip


def _bleu_of(counts: Sequence[float]) -> list[float]:
    *_, length, reference_length = counts
    # The small constants are the COCO scorer's: they decide the score of a corpus without a match.
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(MAX_N):
        product *= (counts[n] + 1e-15) / (counts[MAX_N + n] + 1e-9)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def cider(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> list[float]:
    """Return CIDEr-D of every image (0 to 10; the corpus score is the mean), document frequencies from references."""
    counted = [[_ngrams(ref) for ref in refs] for refs in references]
    frequency: Counter[tuple[str, ...]] = Counter(ngram for refs in counted for ngram in set().union(*refs))
    log_images = math.log(len(references)) if references else 0.0

    def vectors(counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            parts[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(value**2 for value in part.values())) for part in parts]
        # the scorer measures length in bigrams
        return parts, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for refs, candidate in zip(counted, candidates, strict=True):
        mine, my_norms, my_length = vectors(_ngrams(candidate))
        total = 0.0
        for ref in refs:
            theirs, norms, their_length = vectors(ref)
            similar = 0.0
            for n in range(MAX_N):
                if my_norms[n] and norms[n]:
                    dot = sum(min(v, theirs[n][g]) * theirs[n][g] for g, v in mine[n].items() if g in theirs[n])
                    similar += dot / (my_norms[n] * norms[n])
            total += similar / MAX_N * math.exp(-((my_length - their_length) ** 2) / (2 * SIGMA**2))
        scores.append(10 * total / len(refs))
    return scores


def score(references: Mapping[Any, Sequence[str]], captions: Mapping[Any, str]) -> dict[str, Any]:
    """Score captions by image id; images without one are counted as missing.

    Returns:
        n (images scored), missing, bleu1 to bleu4 (0 to 1), cider (0 to 10), tokenizer.

    Raises:
        DataError: there is no caption, or one for an image without references.
    """
    unknown = [key for key in captions if not references.get(key)]
    if unknown:
        raise DataError(f"image {unknown[0]!r} has a caption but no reference ({len(unknown)} such images)")
    if not captions:
        raise DataError("no caption to score")
    refs = [[tokenize(ref) for ref in references[key]] for key in captions]
    candidates = [tokenize(caption) for caption in captions.values()]
    bleus = bleu(refs, candidates)
    return {
        "n": len(candidates),
        "missing": len(references) - len(candidates),
        **{f"bleu{n}": value for n, value in enumerate(bleus, start=1)},
        "cider": sum(cider(refs, candidates)) / len(candidates),
        "tokenizer": "ptb-like",
    }


def leave_one_out(references: Mapping[Any, Sequence[str]], captions: Mapping[Any, str] | None = None) -> dict[str, Any]:
    """Score each annotator's captions against those of the other annotators: a ceiling that people reach.

    Args:
        captions: score these instead, against the same references, so that the two can be compared.

    Returns:
        n (images), annotators, bleu4 and cider (means over the annotators that are left out), by_annotator (cider).

    Raises:
        DataError: an image has fewer than two references.
    """
    annotators = min(map(len, references.values()), default=0)
    if annotators < 2:
        raise DataError(f"an image has {annotators} references; one annotator is scored against at least one other")
    scores = []
    for k in range(annotators):
        others = {key: [*texts[:k], *texts[k + 1 :]] for key, texts in references.items()}
        scores.append(score(others, captions or {key: texts[k] for key, texts in references.items()}))
    means = {name: sum(one[name] for one in scores) / annotators for name in ("bleu4", "cider")}
    return {"n": scores[0]["n"], "annotators": annotators, **means, "by_annotator": [one["cider"] for one in scores]}


def of_another_image(captions: Mapping[Any, str]) -> dict[Any, str]:
    """Return the captions with every image given that of another one: what language alone scores.

    Raises:
        DataError: there is only one image.
    """
    keys = list(captions)
    if len(keys) < 2:
        raise DataError(f"{len(keys)} captioned images; at least two are needed to exchange their captions")
    random.Random(0).shuffle(keys)
    return {key: captions[other] for key, other in zip(keys, [*keys[1:], keys[0]], strict=True)}


def score_with_bounds(references: Mapping[Any, Sequence[str]], captions: Mapping[Any, str]) -> dict[str, Any]:
    """Return `score` with `ceiling` (`leave_one_out`) and `floor` (`of_another_image`); None where undefined."""
    result, own = score(references, captions), {key: references[key] for key in captions}
    several = len(captions) > 1
    result["ceiling"] = leave_one_out(own) if min(map(len, own.values())) > 1 else None
    result["floor"] = score(own, of_another_image(captions)) if several else None
    return result


def format_report(result: Mapping[str, Any]) -> str:
    """Return `score_with_bounds` as a text table, in the units of papers."""
    rows = {
        "captions": result, "one annotator": result.get("ceiling"), "another image's caption": result.get("floor")
    }  # fmt: skip
    lines = [f"{'':24}{'BLEU-4':>8}{'CIDEr':>8}"]
    for name, row in rows.items():
        if row:
            lines.append(f"{name:24}{PERCENT * row['bleu4']:8.1f}{PERCENT * row['cider']:8.1f}")
    lines.append(
        f"{result['n']} images, {result['missing']} without a caption; BLEU and CIDEr times {PERCENT:.0f}, as in"
    )
    lines[-1] += " papers; an annotator is scored against the others"
    return "\n".join(lines)


def compare(
    references: Mapping[Any, Sequence[str]], first: Mapping[Any, str], second: Mapping[Any, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Score captions with bootstrap intervals over the images; document frequencies are not resampled.

    Returns:
        For bleu4 and cider: `{value, interval}` of `first`, or with `second` of the difference second - first.
    """
    import numpy as np

    from companion.evaluation.statistics import estimate, item_counts

    if not first or not first.keys() <= references.keys() or (second is not None and first.keys() != second.keys()):
        raise DataError("captions to compare must be of the same images, all of them with references")
    refs, weights = [[tokenize(ref) for ref in references[key]] for key in first], item_counts(len(first))
    scores: list[tuple[Any, Any]] = []
    for captions in filter(None, (first, second)):
        tokens = [tokenize(captions[key]) for key in first]
        counts = weights @ np.array([_bleu_counts(own, caption) for own, caption in zip(refs, tokens, strict=True)])
        scores.append((np.array([_bleu_of(row)[-1] for row in counts]), weights @ cider(refs, tokens) / len(first)))
    values = scores[0] if len(scores) == 1 else [b - a for a, b in zip(*scores, strict=True)]
    return {name: estimate(value) for name, value in zip(("bleu4", "cider"), values, strict=True)}


def read_files(
    references: str | Path, predictions: str | Path, limit: int | None = None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return references and captions by image id, of COCO's `captions_*.json` and a COCO result file.

    `limit`: only of the first images in the order of `images`, or without that list of the annotations.

    Raises:
        DataError: another format, two captions of an image, or a caption of an image without references.
    """
    annotated, rows = read_json(references), read_json(predictions)
    annotations = annotated.get("annotations") if isinstance(annotated, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise DataError(f"{display_path(references)}: no `annotations`; give COCO's captions_*.json")
    if not isinstance(rows, list) or not rows:
        raise DataError(
            f"{display_path(predictions)}: not a list of captions; give COCO's result format [{{image_id, caption}}]"
        )
    refs: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(annotations):
        identifier, caption = _caption_row(row, f"{display_path(references)}, annotation {number}")
        refs[identifier].append(caption)
    captions: dict[str, str] = {}
    for number, row in enumerate(rows):
        identifier, caption = _caption_row(row, f"{display_path(predictions)}, record {number}")
        if identifier in captions:
            raise DataError(
                f"{display_path(predictions)}, record {number}: image {identifier} has two captions; remove one"
            )
        if identifier not in refs:
            raise DataError(
                f"{display_path(predictions)}, record {number}: image {identifier} is not in "
                f"{display_path(references)}; give the caption file of the same images"
            )
        captions[identifier] = caption
    if limit is None:
        return dict(refs), captions
    listed = [str(row["id"]) for row in annotated.get("images") or [] if isinstance(row, dict) and "id" in row]
    chosen = dict.fromkeys((listed or list(refs))[:limit])
    captions = {key: caption for key, caption in captions.items() if key in chosen}
    if not captions:
        raise DataError(f"{display_path(predictions)}: none of the first {limit} images has a caption")
    return {key: refs[key] for key in chosen if key in refs}, captions


def write_captions(
    loaded: Loaded,
    checkpoint: str | Path,
    references: str | Path,
    images: Path,
    out: str | Path,
    *,
    request: str = REQUEST,
    limit: int | None = None,
    max_new_tokens: int = 40,
    batch: int = 64,
) -> dict[str, Any]:
    """Caption the images of COCO's `captions_*.json` with a checkpoint, in COCO's result format.

    Args:
        out: `.json` file for the captions; a `.jsonl` file of the same name has the settings and is resumed.

    Returns:
        As `predict.predict_questions`; file is `out`.

    Raises:
        DataError: the files do not fit, or the `.jsonl` has captions with other settings.
    """
    from companion.evaluation.predict import predict_questions

    if Path(out).suffix != ".json":
        raise DataError(f"{display_path(out)}: give a name that ends in .json")
    content = read_json(references)
    listed = content.get("images") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{display_path(references)}: no `images`; give COCO's captions_*.json")
    rows = []
    for number, row in enumerate(listed[:limit]):
        where = f"{display_path(references)}, image {number}"
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("file_name"), str):
            raise DataError(f"{where}: needs `id` and `file_name`, has {str(row)[:80]}")
        if fault := file_fault(images, row["file_name"], image=True):
            raise DataError(f"{where}: {shortened(row['file_name'])} {fault}")
        if not (images / row["file_name"]).is_file():
            raise DataError(
                f"{where}: {display_path(images / row['file_name'])} does not exist; name the folder of the images"
            )
        rows.append({"question_id": row["id"], "text": request, "image": row["file_name"]})
    answers = Path(out).with_suffix(".jsonl")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch": batch, "desc": "captions"}
    result = predict_questions(loaded, checkpoint, rows, images, answers, **options)
    captions = [{"image_id": row["question_id"], "caption": row["text"]} for row in read_jsonl(answers)]
    return result | {"file": display_path(write_json(out, captions))}


def _caption_row(row: Any, where: str) -> tuple[str, str]:
    if not isinstance(row, dict) or "image_id" not in row or not isinstance(row.get("caption"), str):
        raise DataError(f"{where}: needs `image_id` and a string `caption`, has {str(row)[:80]}")
    return str(row["image_id"]), row["caption"]
