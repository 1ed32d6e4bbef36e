"""Base models of the scale `mini`, trained from scratch: two language models and a vision tower.

They replace Vicuna 7B / 13B and CLIP ViT-L/14 in the same file formats. `llava base-models` retrains them; those of the
repository were trained with the defaults of `language_model` and `contrastive`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from companion.miniature.acceptance import language_model_checks, vision_tower_checks
from companion.miniature.contrastive import train_clip
from companion.miniature.language_model import SIZES, train_language_model
from companion.miniature.training import write_manifest
from llava_core.runtime import ROOT, write_json

MODELS = ROOT / "models" / "mini"


def measure_acceptance(models: Path = MODELS) -> dict[str, Any]:
    """All acceptance checks of the base models; `passed` has the outcome of each."""
    text = {name: language_model_checks(models / name) for name in SIZES}
    vision = vision_tower_checks(models / "clip")
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
    """Retrain the base models (all when `only` is None) into folders of `out`; returns the acceptance checks."""
    for name in only or [*SIZES, "clip"]:
        part, old = (
            out / f".{name}.part",
            out / f".{name}.old",
        )  # an interrupted training leaves the old model in place
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
        settings = train_clip(part, seed) if name == "clip" else train_language_model(name, part, seed)
        write_manifest(part, settings)
        if (out / name).exists():
            (out / name).rename(old)
        part.rename(out / name)
        shutil.rmtree(old, ignore_errors=True)
    checks = measure_acceptance(out)
    write_json(out / "gates.json", checks)
    return checks
