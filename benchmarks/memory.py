"""Planned memory of a training run against the measured peak of its process."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.common import circumstances, in_own_process, peak_mib
from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ROOT

LAYERS, VOCABULARY = 8, 8192
SAMPLES = 48
WORDS = "a red car and a blue dog are in the picture and the small bird is on the left of the house"


def make_run(folder: Path, hidden: int, row_tokens: int, stage: int, recompute: bool) -> RunConfig:
    """Write a random Llama of a width with samples for two steps; returns the run that trains it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64, max_position_embeddings=2048,
    )  # fmt: skip
    shutil.copytree(ROOT / "models/mini/llm-7b", folder / "llm", ignore=shutil.ignore_patterns("model*", "manifest*"))
    LlamaForCausalLM(text).save_pretrained(folder / "llm")
    rng, records, words = np.random.default_rng(0), [], WORDS.split()
    for k in range(SAMPLES):
        Image.fromarray(rng.integers(0, 255, (112, 112, 3), np.uint8)).save(folder / f"{k}.png")
        question, answer = (" ".join(rng.choice(words, n)) for n in (10, int(rng.integers(40, 160))))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(k), "image": f"{k}.png", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    values = {
        "init_from": None, "data.file": "records.json", "train.global_batch": SAMPLES // 2, "data.held_out": 0,
        "scale.row_tokens": row_tokens, "scale.activation_checkpointing": "always" if recompute else "never",
    }  # fmt: skip
    config = load_experiment("finetune" if stage == 2 else "pretrain", "mini", values)
    name = config.experiment.data.name
    places = {
        "data": {name: str(folder), f"{name}_images": str(folder)},
        "models": {**config.scale.models, "vicuna-7b": str(folder / "llm")},
        "seeds": [0],
    }
    return config.model_copy(update={"scale": config.scale.model_copy(update=places)})


def measured(config: dict[str, Any], folder: str) -> dict[str, float]:
    """MiB of this process before and at the peak of a run."""
    from llava_core.train.trainer import train_record

    record, device = RunRecord(Path(folder)), torch.device("cpu")
    RunConfig.model_validate(config).write(record.path / "config.yaml")
    before = peak_mib(lambda: None, device)
    return {"before": before, "peak": peak_mib(lambda: train_record(record), device)}


def bench_memory(
    widths: Sequence[int] = (256, 512, 768), row_tokens: int = 2048, stage: Literal[1, 2] = 2, recompute: bool = False
) -> dict[str, Any]:
    """Train two steps of random Llamas on the CPU, each in its own process, and compare with `llava plan train`.

    Args:
        widths: hidden sizes; 8 layers, a vocabulary of 8,192.
        row_tokens: tokens of a packed row.
        stage: 1 trains the projector, 2 the language model as well.
        recompute: activations are recomputed in the backward pass.
    """
    from companion.planner import plan_train

    cases = []
    for width in widths:
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(Path(folder), width, row_tokens, stage, recompute)
            planned = plan_train(config)["memory_gib"] * 1024
            run = Path(folder) / "run"
            run.mkdir()
            found = in_own_process("benchmarks.memory:measured", config=config.model_dump(mode="json"), folder=str(run))
        cases.append({
            "case": f"stage {stage}" + ", recomputed" * recompute, "width": width, "row_tokens": row_tokens,
            "planned_mib": round(planned), "peak_mib": round(found["peak"]), "before_mib": round(found["before"]),
            "ratio": round(planned / found["peak"], 3), **circumstances(torch.device("cpu")),
        })  # fmt: skip
    return {"ratio": cases[-1]["ratio"], "cases": cases}
