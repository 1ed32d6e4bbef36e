"""From a resolved run to what the trainer needs: the model with the right parts trainable, and its samples."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_core.checkpoints.load import Loaded, build, load_into
from llava_core.config import RunConfig, TrainConfig
from llava_core.data.conversation import TEMPLATES
from llava_core.data.images import ImageProcessor, load_image
from llava_core.data.instruct import Problem, Sample, load_instruct
from llava_core.data.tokenization import Encoded, Turn
from llava_core.runtime import CheckpointError, ConfigError, DataError, display_path, resolve_dtype, seed_everything
from llava_core.train.adapters import add_adapters

Item = tuple[Encoded, "np.ndarray | None"]
Normalise = Callable[[np.ndarray], np.ndarray]  # pixels uint8 (N, H, W, 3) -> pixel values (N, 3, H, W)
_TOKENIZER = threading.Lock()  # a fast tokenizer is not to be called from two threads at a time


@dataclass
class TrainingSet:
    """Samples with their template applied; item k is (ids and labels, visible pixels uint8 (H, W, 3) or None).

    `cache` keeps decoded pixels in memory: right for thousands of small images, not for 595K. `system` and
    `image_delimiters` are what a checkpoint's manifest says under these names; None: the template's own, and none.
    `dropped` tells how many turns were too long, by the number of each sample looked at so far that had any.
    """

    samples: Sequence[Sample]
    tokenizer: Any
    processor: ImageProcessor
    config: RunConfig
    n_image_tokens: int
    cache: bool = False
    system: str | None = None
    image_delimiters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._pixels: dict[Path, np.ndarray] = {}
        self.dropped: dict[int, int] = {}
        if not TEMPLATES.get(name := self.config.experiment.template).trainable:
            raise ConfigError(f"template {name} has no end of an answer, so none would be learned; fix: template: v1")

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, k: int) -> Encoded:
        """Ids and labels of sample k; a DataError if no token would be supervised or its first turn is too long."""
        sample, experiment = self.samples[k], self.config.experiment
        template, longest = TEMPLATES.get(experiment.template), experiment.train.max_length
        turns: Sequence[Turn] = sample.turns
        if sample.image is not None:
            turns = template.with_image(turns, experiment.image_position, sample.id)
        with _TOKENIZER:
            item = template.encode(
                turns, self.tokenizer, self.n_image_tokens, system=self.system, delimiters=self.image_delimiters,
                max_length=longest, name=f"sample {sample.id}",
            )  # fmt: skip
        if all(label < 0 for label in item.labels):
            raise DataError(f"sample {sample.id}: no token is supervised; fix: give its record a non-empty answer")
        if item.dropped_turns:
            if not self.dropped:
                sys.stderr.write(
                    f"sample {sample.id}: max_length = {longest} has no room for the last {item.dropped_turns} of its "
                    f"{len(turns)} turns, they are left out; further samples of this kind are counted, not printed\n"
                )
            self.dropped[k] = item.dropped_turns
        return item

    def pixels(self, path: Path) -> np.ndarray:
        """What the tower sees of an image: uint8 (H, W, 3)."""
        pixels = self._pixels.get(path)
        if pixels is None:
            pixels = np.asarray(self.processor.visible(load_image(path)))
            if self.cache:
                self._pixels[path] = pixels
        return pixels

    def __getitem__(self, k: int) -> Item:
        path = self.samples[k].image
        return self.encoded(k), None if path is None else self.pixels(path)


def build_model(config: RunConfig, init_from: Path | None, mapped: bool = False) -> Loaded:
    """Base models with a fresh projector (seeded), or with the projector of the run that this one starts from."""
    experiment = config.experiment
    adapters = experiment.train.adapters
    seed_everything(experiment.train.seed)
    loaded = build(
        config.model_source(experiment.model.language_model), config.model_source(experiment.model.vision_tower),
        resolve_dtype(config.dtype), experiment.model.projector, experiment.model.feature_layer,
        bits=adapters.bits if adapters is not None else None, mapped=mapped,
    )  # fmt: skip
    if experiment.init_from is not None:
        if init_from is None:
            raise CheckpointError(f"{experiment.name} starts from {experiment.init_from}; fix: train that one first")
        load_into(loaded.model, init_from, ("multi_modal_projector.",), loaded.manifest["base_hash"])
    loaded.model.set_trainable(experiment.train.trainable)
    if adapters is not None:
        dtype = torch.bfloat16 if experiment.train.precision == "pure_bf16" else torch.float32
        add_adapters(loaded.model, adapters, experiment.train.seed, dtype)
    return loaded


def load_samples(config: RunConfig, skipped: list[str] | None = None) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Training and held-out samples; for a missing file a DataError names the command that writes it.

    With `on_bad_sample: skip` wrong records are left out and described in `skipped`. No image is opened: see preflight.
    """
    data, files = config.experiment.data, config.training_files
    for path in files:
        if not path.is_file():
            raise DataError(f"{display_path(path)}: not found; fix: run {data.written_by}, which writes it")
    seed = config.experiment.train.seed
    problems: list[list[Problem] | None] = [[] if data.on_bad_sample == "skip" else None for _ in files]
    loaded = [
        load_instruct(path, config.images_path, data.subset or None, seed, open_images=False, skipped=wrong)
        for path, wrong in zip(files, problems, strict=True)
    ]
    if skipped is not None:
        skipped += [f"{display_path(f)}, {p}" for f, wrong in zip(files, problems, strict=True) for p in wrong or ()]
    if data.validation_file:
        train, held_out = loaded
    else:
        (samples,) = loaded
        kept = held_out_indices(len(samples), data.held_out)
        train = [sample for k, sample in enumerate(samples) if k not in kept]
        held_out = [samples[k] for k in sorted(kept)]
    most = config.scale.eval_samples
    if len(held_out) > most:  # evenly over the file, as many files are sorted
        held_out = [held_out[k * len(held_out) // most] for k in range(most)]
    return train[: data.limit], held_out


def held_out_indices(samples: int, held_out: float) -> set[int]:
    """Evenly spaced indices of the samples that are held out: a share (every 25th for 0.04), or exactly a number."""
    if held_out == 0:
        return set()
    if held_out < 1:
        indices = (int(k / held_out + 1e-6) for k in range(samples))
        return {k for k in indices if k < samples}
    if held_out >= samples:
        raise DataError(f"data.held_out is {held_out:.0f} of {samples} samples; fix: hold out fewer")
    return {k * samples // int(held_out) for k in range(int(held_out))}


def steps_of(samples: int, config: TrainConfig) -> int:
    """Optimizer steps of a run: the last batch of an epoch may be smaller."""
    return math.ceil(samples / config.global_batch) * config.epochs
