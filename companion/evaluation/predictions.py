"""Prediction files that name their settings, are resumed after an interruption, and are refused for other settings.

The files are JSONL with the fields of the released answer files: question_id, prompt, text, answer_id, model_id,
metadata. The released ones have no `metadata`; here it has all settings of the generation, with the `checkpoint`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.runtime import (
    DataError,
    display_path,
    file_lock,
    fingerprint,
    read_json,
    read_jsonl,
    sha256_file,
    user_path,
)

_LINE_START = b'{"question_id": '  # of files that this module writes
_FORMATS = "{outputs: {id: text}} or JSONL of question_id and text"


@dataclass(frozen=True)
class Predictions:
    """Answers of a file: complete outputs by question id, and the settings (None for a foreign format).

    `released` has the other fields of a released result file (acc, correct, count, results).
    """

    answers: dict[str, str]
    settings: dict[str, Any] | None = None
    released: dict[str, Any] = field(default_factory=dict)


def read_predictions(path: str | Path) -> Predictions:
    """Read a prediction file, a released result file `{outputs: {id: text}}`, or rows `{question_id, text}`.

    Raises:
        DataError: missing, empty, another format, two answers to a question, or answers of several settings or models.
    """
    path, released = Path(path), {}
    content = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if isinstance(content, dict) and isinstance(content.get("outputs"), dict):
        released = {k: v for k, v in content.items() if k != "outputs"}
        content = [{"question_id": key, "text": text} for key, text in content["outputs"].items()]
    if not isinstance(content, list):
        raise DataError(f"{display_path(path)}: not a prediction file; give {_FORMATS}")
    if not content:
        raise DataError(f"{display_path(path)}: holds no prediction; was the run interrupted before its first batch?")
    return Predictions(_texts(path, content), _settings(content[0]), released)


def _settings(row: Mapping[str, Any]) -> dict[str, Any] | None:
    metadata = row.get("metadata")
    return metadata if isinstance(metadata, dict) and "checkpoint" in metadata else None


def _texts(path: Path, rows: Sequence[Any]) -> dict[str, str]:
    answers: dict[str, str] = {}
    models = set()
    for number, row in enumerate(rows, start=1):
        where = f"{display_path(path)}, record {number}"
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(f"{where}: needs `question_id` and a string `text`, has {str(row)[:80]}")
        if (own := _settings(row)) != (first := _settings(rows[0])):
            names = "; ".join(differences(first, own)) if first and own else "one of them names none"
            raise DataError(f"{where}: other settings than record 1 ({names}); give each run a file of its own")
        models.add(str(row.get("model_id")))
        if len(models) > 1:
            raise DataError(f"{where}: answers of several models ({', '.join(sorted(models))}); give each its own file")
        identifier = str(row["question_id"])
        if identifier in answers:
            raise DataError(f"{where}: question {identifier} is answered twice; remove one answer")
        answers[identifier] = row["text"]
    return answers


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, as text."""
    names = sorted(first.keys() | second.keys())
    return [f"{n}: {first.get(n)!r} and {second.get(n)!r}" for n in names if first.get(n) != second.get(n)]


def checkpoint_id(path: str | Path) -> str:
    """Return the hash of a checkpoint: of its manifest, which has those of its files, or of the files themselves."""
    path = user_path(path)
    manifest = path / "manifest.json"
    if manifest.is_file() and "base_hash" in (content := read_json(manifest)):
        return f"manifest:{fingerprint(content)}"
    if path.is_file():
        return f"files:{fingerprint({path.name: sha256_file(path)})}"
    from llava_core.checkpoints.base_models import base_hash  # imports torch

    return base_hash(str(path))


def check_settings(
    path: str | Path, predictions: Predictions, prompt_format: str | None = None, checkpoint: str | Path | None = None
) -> None:
    """Refuse answers of another checkpoint or prompt format than required (None: any), or that do not name theirs.

    Raises:
        DataError: it differs or is not named.
    """
    wanted = {"prompt_format": prompt_format, "checkpoint": checkpoint and checkpoint_id(checkpoint)}
    for name, value in wanted.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if predictions.settings is None:
            raise DataError(
                f"{display_path(path)}: does not name the settings of its answers (a foreign format), so {option} "
                f"cannot be checked; leave out {option} to score it without this check"
            )
        if (own := predictions.settings.get(name)) != value:
            raise DataError(
                f"{display_path(path)}: its answers have {name} {own!r}, not {value!r}; give the matching file, or "
                f"leave out {option}"
            )


def write_predictions(
    out: str | Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    answer: Callable[[Sequence[Mapping[str, Any]]], Iterable[Mapping[str, str]]],
) -> dict[str, str]:
    """Write answers to a JSONL file batch by batch, or resume it; return all by question id, in the order of the rows.

    Args:
        rows: `{question_id, text, ...}` with the question as it is asked.
        settings: all that decides an answer besides the question, JSON-like; `checkpoint`, perhaps `run_id`.
        answer: called with the rows without an answer; yields texts by question id, batch by batch.

    Raises:
        DataError: the file has answers to other questions, with other settings or without settings; it is not changed.
            Or another process writes answers to it.
    """
    out = Path(out)
    asked = {str(row["question_id"]): row for row in rows}
    if len(asked) != len(rows):
        raise DataError(f"{display_path(out)}: two questions have the same question_id")
    if out.suffix != ".jsonl":
        raise DataError(f"{display_path(out)}: answers are written as JSONL; name a file that ends in .jsonl")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(out, wait=False))
        except BlockingIOError:
            raise DataError(
                f"{display_path(out)}: another process writes answers to it; wait for it or name another file"
            ) from None
        return _write_missing(out, asked, settings, answer)


def _write_missing(
    out: Path,
    asked: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    answer: Callable[[Sequence[Mapping[str, Any]]], Iterable[Mapping[str, str]]],
) -> dict[str, str]:
    known = _resume(out, asked, settings)
    model = settings.get("run_id") or settings["checkpoint"]
    for texts in answer([row for key, row in asked.items() if key not in known]):
        with open(out, "a", encoding="utf-8", errors="backslashreplace") as file:
            for key, text in texts.items():
                row = {"question_id": asked[key]["question_id"], "prompt": asked[key]["text"], "text": text}
                row |= {"answer_id": fingerprint([*row.values(), settings]), "model_id": model, "metadata": settings}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        known |= texts
    return {key: known[key] for key in asked}


def _resume(out: Path, asked: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the answers of an interrupted run; refuse a file of any other run."""
    content = out.read_bytes()
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if cut := not _is_json(last) and (last.startswith(_LINE_START) or _LINE_START.startswith(last)):
        os.truncate(out, end)  # a killed writer left an incomplete line
    known: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(out), start=1):
        if why := _refusal(row, known, asked, settings):
            raise DataError(f"{display_path(out)}, record {number}: {why}; name another file, or remove this one")
        known[str(row["question_id"])] = row["text"]
    if last and not cut:
        with open(out, "ab") as file:
            file.write(b"\n")
    return known


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _refusal(
    row: Any, known: Mapping[str, str], asked: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> str | None:
    """Why a row of the file is not an earlier answer of the same run."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or (own := _settings(row)) is None:
        return "not an answer with its settings in `metadata`"
    key = str(row.get("question_id"))
    if own != settings:
        return f"question {key} was answered with other settings than now ({'; '.join(differences(own, settings))})"
    if key not in asked:
        return f"question {key} is not asked now"
    if row.get("prompt") != asked[key]["text"]:
        return f"question {key} was {row.get('prompt')!r} and is now {asked[key]['text']!r}"
    return f"question {key} is answered twice" if key in known else None
