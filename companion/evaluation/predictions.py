"""Files of answers that say how they were made, and the refusal to mix, continue or score what was made otherwise.

Ours are JSONL with the fields of the released answer files: question_id, prompt, text, answer_id, model_id, metadata.
The released ones leave `metadata` empty; in ours it holds all settings of the answer, its `checkpoint` among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.runtime import DataError, fingerprint, located, read_json, read_jsonl, sha256_file, shown

_BEGIN = b'{"question_id": '  # of each line of ours
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
    path, released = Path(path), {}
    content = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if isinstance(content, dict) and isinstance(content.get("outputs"), dict):
        released = {k: v for k, v in content.items() if k != "outputs"}
        content = [{"question_id": key, "text": text} for key, text in content["outputs"].items()]
    if not isinstance(content, list):
        raise DataError(f"{shown(path)}: not a prediction file; give {_LAYOUTS}")
    if not content:
        raise DataError(f"{shown(path)}: holds no prediction; was the run that writes it interrupted?")
    return Predictions(_texts(path, content), _settings(content[0]), released)


def _settings(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """How an answer was made; None for one of a foreign layout."""
    found = row.get("metadata")
    return found if isinstance(found, dict) and "checkpoint" in found else None


def _texts(path: Path, rows: Sequence[Any]) -> dict[str, str]:
    answers: dict[str, str] = {}
    models = set()
    for number, row in enumerate(rows, start=1):
        where = f"{shown(path)}, record {number}"
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(f"{where}: needs `question_id` and a string `text`, has {str(row)[:80]}")
        if (said := _settings(row)) != (first := _settings(rows[0])):
            names = "; ".join(differences(first, said)) if first and said else "one of them does not say which"
            raise DataError(
                f"{where}: made with other settings than record 1 ({names}); give each run a file of its own"
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
    path = located(path)
    manifest = path / "manifest.json"
    if manifest.is_file() and "base_hash" in (content := read_json(manifest)):
        return f"manifest:{fingerprint(content)}"
    if path.is_file():
        return f"files:{fingerprint({path.name: sha256_file(path)})}"
    from llava_core.checkpoints.base_models import base_hash  # brings torch

    return base_hash(str(path))


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


# ------------------------------------------------------------------------------------------------ writing


def write_predictions(
    out: str | Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    answer: Callable[[Sequence[Mapping[str, Any]]], Iterable[Mapping[str, str]]],
) -> dict[str, str]:
    """Answer questions into a file, or go on with one that was interrupted; each batch is on disk before the next.

    Args:
        out: JSONL file.
        rows: `{question_id, text, ...}`, the question as it is asked.
        settings: what decides an answer besides the question, as JSON gives it back; `checkpoint`, perhaps `run_id`.
        answer: given the rows without an answer, yields texts by question id, batch by batch.

    Returns:
        All answers by question id, in the order of the rows.

    Raises:
        DataError: the file holds answers to other questions, made with other settings, or that do not say with which;
            it is left as it is.
    """
    out = Path(out)
    asked = {str(row["question_id"]): row for row in rows}
    if len(asked) != len(rows):
        raise DataError(f"{shown(out)}: two questions have the same question_id; every one needs its own")
    known = _resume(out, asked, settings)
    model = settings.get("run_id") or settings["checkpoint"]
    for texts in answer([row for key, row in asked.items() if key not in known]):
        with open(out, "a", encoding="utf-8") as file:
            for key, text in texts.items():
                row = {"question_id": asked[key]["question_id"], "prompt": asked[key]["text"], "text": text}
                row |= {"answer_id": fingerprint([*row.values(), settings]), "model_id": model, "metadata": settings}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        known |= texts
    return {key: known[key] for key in asked}


def _resume(out: Path, asked: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """The answers that a file holds already, once it is sure that they are of this very run; else it is refused."""
    if out.suffix != ".jsonl":
        raise DataError(f"{shown(out)}: answers are written as JSONL; name a file that ends in .jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
    content = out.read_bytes()
    whole = content.rfind(b"\n") + 1
    last = content[whole:]
    if cut := not _is_json(last) and (last.startswith(_BEGIN) or _BEGIN.startswith(last)):
        os.truncate(out, whole)  # a killed writer left half a line
    known: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(out), start=1):
        if why := _not_ours(row, known, asked, settings):
            raise DataError(
                f"{shown(out)}, record {number}: {why}; name another file, or remove this one to start anew"
            )
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


def _not_ours(
    row: Any, known: Mapping[str, str], asked: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> str | None:
    """Why a row of the file cannot be an earlier answer of this very run."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or (said := _settings(row)) is None:
        return "not an answer that says in `metadata` how it was made"
    key = str(row.get("question_id"))
    if said != settings:
        return f"question {key} was answered with other settings than now ({'; '.join(differences(said, settings))})"
    if key not in asked:
        return f"question {key} is not asked now"
    if row.get("prompt") != asked[key]["text"]:
        return f"question {key} was {row.get('prompt')!r} and is now {asked[key]['text']!r}"
    return f"question {key} is answered twice" if key in known else None
