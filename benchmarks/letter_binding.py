"""Letter binding emerges: the letter phase of a base language model from two initialisations.

The model reads only documents in which the letter of an option is the one supervised token; half of the first batches
of the base models are of these (`companion.miniature.language_model`). The schedule is that of a short run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from benchmarks.common import circumstances
from companion.miniature.acceptance import HELD_OUT_SEED, exact_answers
from companion.miniature.language_model import SIZES, lookup_init, mean_loss, new_language_model
from companion.miniature.school_texts import REASON_FIRST, draw_problem, letter_document, problem_turn, with_letter
from companion.miniature.training import fit, pad
from llava_core.checkpoints.base_models import load_language_model
from llava_core.constants import IGNORE_INDEX
from llava_core.data.label_mask import Segment, encode
from llava_core.runtime import resolve, seed_everything

INITIALISATIONS = ("look-up", "plain")


def letter_documents(problems: int) -> tuple[list[list[Segment]], float]:
    """Problems of the val split with the right reason and the letter as supervised token, and chance in percent."""
    rng = random.Random(HELD_OUT_SEED)
    drawn = [draw_problem(rng, "val")[0] for _ in range(problems)]
    documents = [with_letter(problem_turn(p, REASON_FIRST), p.letter) for p in drawn]
    return documents, 100 * sum(1 / len(p.choices) for p in drawn) / problems


def letters_right(
    initialisation: str, seed: int, documents: Sequence[Sequence[Segment]], steps: int, every: int, batch: int | None
) -> list[tuple[int, float]]:
    """Train the letter phase and return (step, letters right in percent), before the first step and at the end too."""
    size = SIZES["llm-7b"]
    _, tokenizer = load_language_model(str(resolve("models/mini/llm-7b")), torch.float32)
    seed_everything(seed)
    model = new_language_model(size, tokenizer)
    if initialisation == "look-up":
        lookup_init(model, tokenizer, seed)
    points: list[tuple[int, float]] = []

    def measure(step: int) -> None:
        model.eval()
        right = exact_answers(model, tokenizer, documents)
        points.append((step, 100 * sum(right) / len(right)))
        model.train()

    def batches() -> Iterator[Any]:
        rng = random.Random(f"text-{seed}")
        for step in range(steps):
            if step % every == 0:  # a batch is drawn before the update of its step
                measure(step)
            read = [encode(letter_document(rng), tokenizer, 0) for _ in range(batch or size.batch)]
            ids = pad((e.input_ids for e in read), tokenizer.pad_token_id)  # (batch, T)
            yield ids, pad((e.labels for e in read), IGNORE_INDEX), torch.empty((0, 4), dtype=torch.long)

    fit(model, batches(), lambda part: mean_loss(model, part), steps, f"letters, {initialisation}", size.rates)
    measure(steps)
    return points


def bench_letter_binding(
    steps: int = 400,
    every: int = 50,
    seeds: int = 2,
    problems: int = 400,
    batch: int | None = None,
    start: Literal["look-up", "plain", "both"] = "both",
) -> dict[str, Any]:
    """Train the letter phase of the small language model and count letters right after the right reason.

    Args:
        steps: optimizer steps, all on documents with a letter as the only supervised token.
        every: steps between two measurements.
        seeds: runs per initialisation.
        problems: problems of the validation split.
        batch: documents per step; that of the base model by default.
        start: initialisation of the attention: the look-up circuit, plain random weights, or both in turn.

    Returns:
        Letters right (%) at the end by initialisation, as the mean over the seeds, `chance`, and `cases`: a row for
        each initialisation, seed and step.
    """
    documents, chance = letter_documents(problems)
    facts, cases = circumstances(torch.device("cpu")), []
    chosen = INITIALISATIONS if start == "both" else (start,)
    for initialisation in chosen:
        for seed in range(seeds):
            for step, right in letters_right(initialisation, seed, documents, steps, every, batch):
                row = {"initialisation": initialisation, "seed": seed, "step": step, "problems": problems}
                cases.append({**row, "right": round(right, 2), "chance": round(chance, 2), **facts})
    ends = {
        name: sum(row["right"] for row in cases if row["initialisation"] == name and row["step"] == steps) / seeds
        for name in chosen
    }
    return {**ends, "chance": chance, "cases": cases}
