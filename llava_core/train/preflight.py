"""The check of every sample before step 0: rank 0 does it once and remembers it in `data/checks`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import distributed as dist

from llava_core import runtime
from llava_core.checkpoints.load import Loaded
from llava_core.config import RunConfig
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.images import ImageError, check_image
from llava_core.data.instruct import Sample
from llava_core.runtime import DataError, display_path, rank
from llava_core.train.dataset import TrainingSet, load_samples
from llava_core.train.identity import code_fingerprint

CHECKS = "data/checks"
SHOWN, LOGGED = 5, 100  # bad samples that an error names, and those that a record names
CHUNK, THREADS = 256, 8
SAVED = 64  # chunks
NO_FILE = [0, 0]


class Outcome(NamedTuple):
    """Of a checked sample: numbers of tokens and turns, size and time of its image file, and why it is bad, or None."""

    tokens: int
    supervised: int
    dropped: int
    stamp: list[int]
    fault: str | None


@dataclass
class Preflight:
    """What the check of a run's samples gives.

    Attributes:
        lengths, supervised: (samples,) tokens, and supervised tokens, of each training sample.
        skipped: file, line, id and reason of each sample that is left out, held-out ones included.
    """

    lengths: np.ndarray
    supervised: np.ndarray
    skipped: list[str]

    def row(self) -> dict[str, Any]:
        """The facts for the record; of the samples that are left out, the first 100 are named."""
        return {"skipped_samples": len(self.skipped), "skipped": self.skipped[:LOGGED]}


def checked_samples(config: RunConfig, loaded: Loaded) -> tuple[TrainingSet, TrainingSet, Preflight]:
    """Training and held-out set of a run, without the samples that cannot be trained on, and what the check found.

    All ranks must call it. An image is needed even if its features are cached.

    Raises:
        DataError: a sample is bad and `data.on_bad_sample` is "stop", or no sample is left.
    """
    train, skipped, files = config.experiment.train, list[str](), config.training_files
    usage = {name: loaded.manifest.get(name) for name in ("system", "image_delimiters")}
    n, cache = loaded.model.n_image_tokens, config.scale.cache_pixels
    train_set, held_out = (
        TrainingSet(samples, loaded.tokenizer, loaded.processor, config, n, cache, **usage)
        for samples in load_samples(config, skipped)
    )
    facts = {"code": code_fingerprint(), "rows": loaded.model.language_model.get_input_embeddings().num_embeddings}
    if rank() > 0 and dist.is_initialized():
        dist.barrier()
    checked = [(data, file, _check(data, file, facts)) for data, file in ((train_set, files[0]), (held_out, files[-1]))]
    if rank() == 0 and dist.is_initialized():
        dist.barrier()

    total, bad = len(train_set) + len(held_out), []
    for data, file, outcomes in checked:
        good = [k for k, outcome in enumerate(outcomes) if outcome.fault is None]
        for sample, outcome in zip(data.samples, outcomes, strict=True):
            if outcome.fault is not None:
                bad.append(f"{display_path(file)}, line {sample.line}: sample {sample.id}: {outcome.fault}")
        data.samples = [data.samples[k] for k in good]
        data.dropped = {new: outcomes[k].dropped for new, k in enumerate(good) if outcomes[k].dropped}
    if bad and config.experiment.data.on_bad_sample == "stop":
        fix = "fix: correct them, or leave them out with data.on_bad_sample=skip"
        raise DataError(f"{len(bad)} of {total} samples cannot be trained on:", *bad[:SHOWN], fix)
    skipped += bad
    if skipped and rank() == 0:
        sys.stderr.write(f"data.on_bad_sample: {len(skipped)} samples are left out, the first is {skipped[0]}\n")
    if not any(sample.image or "language_model" in train.trainable for sample in train_set.samples):
        raise DataError(
            f"{display_path(files[0])}: no sample is left that {' and '.join(train.trainable)} could learn from (the "
            "projector needs images); fix: correct the records, or name another data.file"
        )
    kept = np.array([outcome[:2] for outcome in checked[0][2] if outcome.fault is None])
    return train_set, held_out, Preflight(kept[:, 0], kept[:, 1], skipped)


def _check(data: TrainingSet, file: Path, facts: dict[str, Any]) -> list[Outcome]:
    """The outcome of every sample; those that an earlier start has checked are not checked again."""
    remembered = runtime.resolve(CHECKS) / f"{runtime.fingerprint({**facts, **_facts(data, file)})}.json"
    known: dict[int, Outcome] = {}
    with suppress(DataError, AttributeError, TypeError, ValueError):  # no such file, or a damaged one
        known = {int(position): Outcome(*outcome) for position, outcome in runtime.read_json(remembered).items()}
    stamp, fault = lru_cache(maxsize=None)(_stamp), lru_cache(maxsize=None)(_image_fault)

    def is_known(sample: Sample) -> bool:
        outcome = known.get(sample.position)
        if outcome is None or sample.image is None or rank() > 0:  # rank 0 has just looked at the images
            return outcome is not None
        return outcome.stamp == stamp(sample.image) != NO_FILE

    def check(k: int) -> Outcome:
        image = data.samples[k].image
        tokens, supervised, dropped, reason = _check_text(data, k, facts["rows"])
        reason = reason or (fault(image) if image else None)
        return Outcome(tokens, supervised, dropped, stamp(image) if image else NO_FILE, reason)

    todo = [k for k, sample in enumerate(data.samples) if not is_known(sample)]
    parts = [todo[begin : begin + CHUNK] for begin in range(0, len(todo), CHUNK)]
    bar = runtime.progress(len(todo), f"checking {file.name}", leave=False, disable=not todo)
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
        checked = zip(parts, pool.map(lambda part: [*map(check, part)], parts), strict=True)
        for done, (part, outcomes) in enumerate(checked, start=1):
            known |= {data.samples[k].position: outcome for k, outcome in zip(part, outcomes, strict=True)}
            bar.update(len(part))
            if done % SAVED == 0 or done == len(parts):  # a start that is stopped keeps what was checked
                _remember(known, remembered)
    bar.close()
    return [known[sample.position] for sample in data.samples]


def _remember(known: dict[int, Outcome], file: Path) -> None:
    try:
        runtime.atomic_write(file, json.dumps(known, separators=(",", ":")))
    except OSError as error:
        sys.stderr.write(f"{display_path(file)}: not written ({error}); the next start checks again\n")


def _check_text(data: TrainingSet, k: int, rows: int) -> tuple[int, int, int, str | None]:
    """Tokens, supervised tokens and dropped turns of a sample, and why it cannot be trained on."""
    try:
        item = data.encoded(k)
    except DataError as error:
        return 0, 0, 0, str(error).removeprefix(f"sample {data.samples[k].id}: ")
    ids, labels, fault = np.asarray(item.input_ids), np.asarray(item.labels), None
    words = ids[ids != IMAGE_TOKEN_ID]
    outside = words[(words < 0) | (words >= rows)]
    if len(outside):
        fault = f"token id {outside[0]} is none of the model's {rows} word embeddings; fix: use the model's tokenizer"
    elif len(ids) - len(words) != data.n_image_tokens * (data.samples[k].image is not None):
        fault = f"{len(ids) - len(words)} image tokens; fix: write <image> once where the record has an image"
    return len(ids), int((labels[1:] != IGNORE_INDEX).sum()), item.dropped_turns, fault


def _image_fault(image: Path) -> str | None:
    """Why an image cannot be used, or None; it is decoded, because a cut file has a good header."""
    try:
        check_image(image)
    except ImageError as error:
        return str(error)
    return None


def _facts(data: TrainingSet, file: Path) -> dict[str, Any]:
    """All that an outcome depends on, apart from the image files."""
    experiment, tokenizer = data.config.experiment, data.tokenizer
    return {
        "data": runtime.sha256_file(file), "images": display_path(data.config.images_path),
        "template": experiment.template, "system": data.system, "image_position": experiment.image_position,
        "max_length": experiment.train.max_length, "image_tokens": data.n_image_tokens,
        "delimiters": data.image_delimiters, "special": repr(tokenizer.special_tokens_map),
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab(),
    }  # fmt: skip


def _stamp(image: Path) -> list[int]:
    with suppress(OSError):
        status = os.stat(image)
        return [status.st_size, status.st_mtime_ns]
    return NO_FILE
