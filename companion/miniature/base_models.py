"""Base models of the scale `mini`, trained from scratch: language models of two sizes, three seeds each, and a tower.

They replace Vicuna 7B / 13B and CLIP ViT-L/14 in the same file formats. `llava base-models` retrains them; those of the
repository, of which `present` has the names, were trained with the defaults of `language_model` and `contrastive`. The
names of seeds 1 and 2 end in the seed: one model per size cannot tell size from luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.miniature.acceptance import language_model_checks, vision_tower_checks
from companion.miniature.contrastive import train_clip
from companion.miniature.language_model import SIZES, train_language_model
from companion.miniature.training import write_manifest
from llava_core.checkpoints.files import atomic_folder
from llava_core.registry import unknown
from llava_core.runtime import ROOT, ConfigError, write_json

MODELS = ROOT / "models" / "mini"
SWEEP = Path(__file__).with_name("scienceqa_sweep.csv")
"""What was tried on the validation split before mini-scienceqa and the reading were fixed."""
LANGUAGE_MODELS = {f"{size}-{seed}".removesuffix("-0"): (size, seed) for seed in range(3) for size in SIZES}


def present(models: Path = MODELS) -> list[str]:
    """The names of the language models that a folder has."""
    return [name for name in LANGUAGE_MODELS if (models / name).is_dir()]


def measure_acceptance(models: Path = MODELS, only: Sequence[str] | None = None) -> dict[str, Any]:
    """The acceptance checks of a folder's base models, the tower "clip" among them; `passed` has the outcome of each.

    Raises:
        ConfigError: `only` names a model that is not in the folder.
    """
    for name in only or ():
        if name not in (known := [*present(models), "clip"]):
            raise ConfigError(unknown("base model", name, known))
    chosen = [name for name in present(models) if only is None or name in only]
    text = {name: language_model_checks(models / name) for name in chosen}
    vision, passed = {}, {}
    if only is None or "clip" in only:
        vision = vision_tower_checks(models / "clip")
        passed = _vision_gates(vision)
    for name, measured in text.items():
        passed |= {f"{name} {check}": ok for check, ok in _text_gates(measured).items()}
    return {"vision": vision, "text": text, "passed": passed}


def _vision_gates(measured: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a vision tower passes each of its acceptance checks."""
    return {
        "probe category >= 90 %": measured["category"] >= 0.9,
        "probe color >= 90 %": measured["color"] >= 0.9,
        "probe position >= 90 %": measured["position"] >= 0.9,
        "retrieval R@1 of 100 >= 60 %": measured["retrieval"] >= 0.6,
    }


def _text_gates(measured: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a language model passes each of its acceptance checks."""
    return {
        "answers questions on a text >= 95 %": measured["told"] >= 0.95,
        "answers every kind of them >= 85 %": min(measured["told_by_kind"].values()) >= 0.85,
        "blind <= prior + 5 points": measured["blind"] <= measured["blind_prior"] + 0.05,
        "letter after the right reason >= 95 %": measured["letter"] >= 0.95,
        "sums >= 95 %": measured["sums"] >= 0.95,
        "look-up by key >= 95 %": measured["look_up"] >= 0.95,
    }


def _train_language_model(size: str, out: Path, seed: int) -> dict[str, Any]:
    """Train a language model, and once more with half as many steps again if it misses an acceptance check."""
    steps = SIZES[size].steps
    settings = train_language_model(size, out, seed, steps)
    if not all(_text_gates(language_model_checks(out)).values()):
        settings = train_language_model(size, out, seed, steps * 3 // 2)
    return settings


def train_base_models(out: Path = MODELS, only: list[str] | None = None) -> dict[str, Any]:
    """Retrain the base models (all when `only` is None) into folders of `out`; returns the acceptance checks."""
    for name in only or [*LANGUAGE_MODELS, "clip"]:
        size, seed = LANGUAGE_MODELS.get(name, (name, 0))
        with atomic_folder(out / name, overwrite=True) as folder:  # an interrupted training leaves the old model
            settings = train_clip(folder, seed) if name == "clip" else _train_language_model(size, folder, seed)
            write_manifest(folder, settings)
    checks = measure_acceptance(out)
    write_json(out / "gates.json", checks)
    return checks
