"""The base models of the miniature, trained from scratch: two language models and a vision tower.

They play Vicuna 7B / 13B and CLIP ViT-L/14 and have their file formats. `llava base-models` retrains all of them; the
shipped ones were made with the defaults of `language_model` and `contrastive`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from companion.miniature.contrastive import train_clip
from companion.miniature.gates import text_gates, vision_gates
from companion.miniature.language_model import SIZES, train_language_model
from companion.miniature.training import write_manifest
from llava_core.runtime import ROOT, write_json

MODELS = ROOT / "models" / "mini"


def measure_gates(models: Path = MODELS) -> dict[str, Any]:
    """All gates of the shipped base models and whether each one is passed."""
    text = {name: text_gates(models / name) for name in SIZES}
    vision = vision_gates(models / "clip")
    passed = {
        "probe category >= 90 %": vision["category"] >= 0.9,
        "probe color >= 90 %": vision["color"] >= 0.9,
        "probe position >= 90 %": vision["position"] >= 0.9,
        "retrieval R@1 of 100 >= 60 %": vision["retrieval"] >= 0.6,
        **{f"{n} answers text questions >= 90 %": t["told"] >= 0.9 for n, t in text.items()},
        **{f"{n} blind <= prior + 5 points": t["blind"] <= t["blind_prior"] + 0.05 for n, t in text.items()},
    }
    return {"vision": vision, "text": text, "passed": passed}


def train_base_models(out: Path = MODELS, only: list[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """Retrain the base models from scratch, one after the other; each manifest says how many minutes it took.

    Args:
        out: folder of `llm-7b`, `llm-13b`, `clip`.
        only: names to train; all when None.
        seed: of everything.

    Returns:
        The gates, as stored in `gates.json` beside the models.
    """
    for name in only or [*SIZES, "clip"]:
        part, old = out / f".{name}.part", out / f".{name}.old"  # what is broken off leaves the old model as it was
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
        facts = train_clip(part, seed) if name == "clip" else train_language_model(name, part, seed)
        write_manifest(part, facts)
        if (out / name).exists():
            (out / name).rename(old)
        part.rename(out / name)
        shutil.rmtree(old, ignore_errors=True)
    gates = measure_gates(out)
    write_json(out / "gates.json", gates)
    return gates
