"""Answers of a checkpoint in a file that tells how they came about: a call goes on with it, or refuses it.

A row has the fields of the released answer files: question_id, prompt, text, answer_id, model_id, metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.evaluate.answer import answer_questions
from llava_core.runtime import DataError, fingerprint, read_jsonl, shown, write_jsonl

if TYPE_CHECKING:
    from llava_core.weights.checkpoint import Loaded

FACTS = ("template", "system", "image_position", "image_delimiters", "prompt_format", "run_id")


def weights_hash(loaded: Loaded) -> str:
    """Return 12 hex digits of a model's weights as they lie in memory: the same for every layout of a checkpoint."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def conditions(loaded: Loaded, **generation: Any) -> dict[str, Any]:
    """Return what decides an answer besides the question: weights, precision, prompt, image and generation settings."""
    model = loaded.model.language_model
    found = {
        "weights": weights_hash(loaded),
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: loaded.manifest.get(name) for name in FACTS},
        "feature_layer": loaded.model.feature_layer,
        "image": loaded.processor.to_dict(),
        **generation,
    }
    copied: dict[str, Any] = json.loads(json.dumps(found))  # as a file gives it back: lists, no tuples
    return copied


def write_predictions(
    loaded: Loaded,
    rows: Sequence[Mapping[str, Any]],
    images: Path | None,
    out: str | Path,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 64,
    desc: str = "answers",
) -> dict[str, Any]:
    """Answer questions into a JSONL file, written anew after each batch; answers that it holds already are kept.

    Args:
        loaded: model, tokenizer, image settings, manifest.
        rows: `{question_id, text, image}` as `answer_questions` takes them.
        images: folder of the images.
        out: the file.
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        seed: of sampled answers; another one gives another run.
        batch: rows generated together (no answer depends on it).
        desc: of the progress bar.

    Returns:
        answers, new (of them, written now), conditions, file.

    Raises:
        DataError: the file holds answers to other questions, or given under other conditions.
    """
    out = Path(out)
    told = conditions(loaded, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    wanted = {str(row["question_id"]): row for row in rows}
    if len(wanted) != len(rows):
        raise DataError(f"{shown(out)}: two questions have the same question_id; every one needs its own")
    done: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(out) if out.exists() else [], start=1):
        why = _not_ours(row, wanted, told)
        if why:
            raise DataError(f"{shown(out)}, record {number}: {why}; fix: write to another file, or remove this one")
        done[str(row["question_id"])] = row
    left = [row for key, row in wanted.items() if key not in done]
    for k in range(0, len(left), batch):
        part = left[k : k + batch]
        texts = answer_questions(
            loaded, part, images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch=batch,
            desc=desc,
        )  # fmt: skip
        for row in part:
            made = {"question_id": row["question_id"], "prompt": row["text"], "text": texts[str(row["question_id"])]}
            named = {"answer_id": fingerprint([*made.values(), told]), "model_id": told["run_id"] or told["weights"]}
            done[str(row["question_id"])] = made | named | {"metadata": told}
        write_jsonl(out, [done[key] for key in wanted if key in done])
    return {"answers": len(done), "new": len(left), "conditions": told, "file": shown(out)}


def _not_ours(row: Any, wanted: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any]) -> str | None:
    """Why a row of the file cannot be an earlier answer of this very call."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("metadata"), dict):
        return "not an answer that says in `metadata` how it was given"
    key, metadata = str(row.get("question_id")), row["metadata"]
    if key not in wanted:
        return f"question {key} is not asked now"
    if row.get("prompt") != wanted[key]["text"]:
        return f"question {key} was {row.get('prompt')!r} and is now {wanted[key]['text']!r}"
    for name in [*told, *metadata]:
        if metadata.get(name) != told.get(name):
            return f"question {key} was answered with {name} {metadata.get(name)!r}, now it is {told.get(name)!r}"
    return None
