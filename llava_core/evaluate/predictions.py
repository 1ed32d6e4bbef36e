"""Files of answers that say how they were made, and the refusal to mix or score what was made otherwise.

Ours are JSONL: first a line `{"made_with": {...}}` with the settings, then a line `{question_id, text, made_with}` per
answer, where `made_with` is the settings' fingerprint. The layouts of the released code, which say nothing of the kind,
are read too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.runtime import DataError, fingerprint, read_json, read_jsonl, shown, write_jsonl

MADE_WITH = "made_with"
_LAYOUTS = "{outputs: {id: text}} or JSONL of question_id and text"


@dataclass(frozen=True)
class Predictions:
    """Answers of a file.

    Attributes:
        answers: question id -> the model's whole output.
        made_with: the settings they were made with, or None where the file does not tell.
        released: the other fields of a released result file (acc, correct, count, results), else empty.
    """

    answers: dict[str, str]
    made_with: dict[str, Any] | None = None
    released: dict[str, Any] = field(default_factory=dict)


def read_predictions(path: str | Path) -> Predictions:
    """Read a file of ours, the released result file `{outputs: {id: text}}`, or rows `{question_id, text}`.

    Raises:
        DataError: the file is missing, empty, of another layout, answers a question twice, or mixes answers that were
            made with several settings or by several models.
    """
    found = _read(Path(path))
    if not found.answers:
        raise DataError(f"{shown(path)}: holds no prediction; was the run that writes it interrupted?")
    return found


def _read(path: Path) -> Predictions:
    content = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if isinstance(content, dict) and isinstance(content.get("outputs"), dict):
        rows = [{"question_id": key, "text": text} for key, text in content["outputs"].items()]
        return Predictions(_texts(path, rows, None), None, {k: v for k, v in content.items() if k != "outputs"})
    if not isinstance(content, list):
        raise DataError(f"{shown(path)}: not a prediction file; give {_LAYOUTS}")
    settings = [row[MADE_WITH] for row in content if _is_header(row)]
    if any(other != settings[0] for other in settings):
        names = ", ".join(differences(settings[0], next(s for s in settings if s != settings[0])))
        raise DataError(f"{shown(path)}: mixes answers made with different settings ({names}); score them one by one")
    made_with = settings[0] if settings else None
    return Predictions(_texts(path, [row for row in content if not _is_header(row)], made_with), made_with)


def _is_header(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get(MADE_WITH), dict) and "question_id" not in row


def _texts(path: Path, rows: list[Any], made_with: Mapping[str, Any] | None) -> dict[str, str]:
    mark = None if made_with is None else fingerprint(made_with)
    answers: dict[str, str] = {}
    models = set()
    for number, row in enumerate(rows, start=1):
        where = f"{shown(path)}, record {number}"
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(f"{where}: needs `question_id` and a string `text`, has {str(row)[:80]}")
        if row.get(MADE_WITH) != mark:
            raise DataError(
                f"{where}: made with the settings {row.get(MADE_WITH)}, the file's first line says {mark}; answers of "
                "several runs cannot be scored as one, give each its file with its own first line"
            )
        models.add(str(row.get("model_id")))
        if len(models) > 1:
            raise DataError(f"{where}: answers of several models ({', '.join(sorted(models))}); give each its own file")
        identifier = str(row["question_id"])
        if identifier in answers:
            raise DataError(f"{where}: question {identifier} is answered twice; keep one answer")
        answers[identifier] = row["text"]
    return answers


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return in words where two runs' settings are not the same."""
    names = sorted(first.keys() | second.keys())
    return [f"{n}: {first.get(n)!r} and {second.get(n)!r}" for n in names if first.get(n) != second.get(n)]


# ------------------------------------------------------------------------------------------------ settings


def checkpoint_id(path: str | Path) -> str:
    """What identifies a checkpoint: of ours the hash of its manifest, which holds those of its files; else its files'.

    Raises:
        CheckpointError: there are no weights.
    """
    manifest = Path(path) / "manifest.json"
    if manifest.is_file() and "base_hash" in (content := read_json(manifest)):
        return f"manifest:{fingerprint(content)}"
    from llava_core.weights.checkpoint import base_hash  # brings torch

    return base_hash(str(Path(path).resolve()))


def check_made_with(
    path: str | Path, found: Predictions, prompt_format: str | None = None, checkpoint: str | Path | None = None
) -> None:
    """Make sure that answers were made in the way that is asked for.

    Args:
        path: of the file, for the message.
        found: what it holds.
        prompt_format: the name that it must say; None: any.
        checkpoint: the model that must have made them; None: any.

    Raises:
        DataError: it says something else, or nothing.
    """
    wanted = {"prompt_format": prompt_format, "checkpoint": checkpoint and checkpoint_id(checkpoint)}
    for name, value in wanted.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if found.made_with is None:
            raise DataError(
                f"{shown(path)}: does not say how its answers were made (a foreign layout), so {option} cannot be "
                f"checked; leave {option} away to score it on trust"
            )
        if (said := found.made_with.get(name)) != value:
            raise DataError(
                f"{shown(path)}: its answers were made with {name} {said!r}, not {value!r}; give the file that was, or "
                f"leave {option} away"
            )


def resume(path: str | Path, made_with: Mapping[str, Any]) -> dict[str, str]:
    """Begin a file of answers, or go on with one that was interrupted.

    Args:
        path: JSONL file.
        made_with: the settings of this run; JSON values only.

    Returns:
        The answers that the file holds already.

    Raises:
        DataError: the file was made with other settings or does not say with which; it is left as it is.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise DataError(f"{shown(path)}: answers are written as JSONL; name a file that ends in .jsonl")
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        write_jsonl(path, [{MADE_WITH: dict(made_with)}])
        return {}
    if len(whole) < len(content):
        os.truncate(path, len(whole))  # a killed writer left half a line
    found = _read(path)
    settings = json.loads(json.dumps(made_with))
    if found.made_with != settings:
        said = "; ".join(differences(found.made_with or {}, settings)) if found.made_with else "it does not say which"
        raise DataError(
            f"{shown(path)}: begun with other settings ({said}); name another file, or remove this one to start anew"
        )
    return found.answers


def append(path: str | Path, answers: Mapping[str, str], made_with: Mapping[str, Any]) -> None:
    """Add answers to a file that `resume` opened; they are on disk when this returns."""
    mark = fingerprint(json.loads(json.dumps(made_with)))
    rows = ({"question_id": key, "text": text, MADE_WITH: mark} for key, text in answers.items())
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
