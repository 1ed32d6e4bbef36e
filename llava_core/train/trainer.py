"""The trainer of both stages: packed rows, token-normalised loss, AdamW, exact resume."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_core.checkpoints.load import Kind, Loaded, save_checkpoint
from llava_core.data.label_mask import supervised_fraction
from llava_core.models.llava import Llava
from llava_core.ops.transformers_backend import packed_attention
from llava_core.record import RunRecord
from llava_core.runtime import CompanionError, display_path, progress, rank, resolve_device, world_size
from llava_core.train.dataset import Normalise, TrainingSet, build_model, load_samples
from llava_core.train.engine import sum_gradients, sum_over_ranks
from llava_core.train.loader import CACHED_LAYERS, Loader, RowInputs, StepBatch, open_features
from llava_core.train.optimizer import learning_rate, make_optimizer


class TrainingError(CompanionError):
    """Training failed in a way that more steps cannot repair."""


def packed_row_loss(model: Llava, row: RowInputs, normalise: Normalise, device: torch.device) -> torch.Tensor:
    """Loss of a packed row, summed over its supervised tokens; must run inside `packed_attention`."""
    features = row.images
    if features is not None:
        if features.dtype == torch.uint8:  # pixels (N, H, W, 3): no feature cache
            features = model.tower_features(torch.from_numpy(normalise(features.numpy())).to(device))
        features = features.to(device)
        if len(row.image_index) != len(features):  # an image has several blocks
            features = features.index_select(0, row.image_index.to(device))
    return model.packed_loss(
        row.input_ids.to(device), row.position_ids.to(device), row.packed_mask.to(device),
        row.logit_positions.to(device), row.targets.to(device), features,
    )  # fmt: skip


class Trainer:
    """Trains the run of a record from its first or, with `resume`, its last saved step to its end."""

    def __init__(
        self, record: RunRecord, loaded: Loaded, train_set: TrainingSet, held_out: TrainingSet, resume: bool = True
    ) -> None:
        self.record, self.loaded, self.train_set, self.held_out = record, loaded, train_set, held_out
        self.config, self.scale = record.config.experiment.train, record.config.scale
        self.device = resolve_device(self.scale.device)
        self.model = loaded.model.to(self.device)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.trainable.values()), self.config)
        self.max_tokens = self.scale.row_tokens
        features = open_features(loaded, record.config, train_set, held_out, self.device)
        layer = CACHED_LAYERS.index(self.model.feature_layer) if features is not None else 0
        self.loader, self.held_out_loader = (
            Loader(data, self.max_tokens, features, layer) for data in (train_set, held_out)
        )
        self.steps_per_epoch = math.ceil(len(train_set) / self.config.global_batch)
        self.steps = self.steps_per_epoch * self.config.epochs
        self.step, self.seconds = 0, 0.0
        self.state_file = record.path / "state.pt"
        if resume and self.state_file.exists():
            self._restore()

    def run(self) -> dict[str, Any]:
        """Train to the end, save the checkpoint, finish the record and return its summary."""
        self._log_start()
        with packed_attention(self.model.language_model):
            self._train()
        return self._finish()

    def _train(self) -> None:
        saved = began = time.monotonic()
        earlier_seconds, tokens, samples, waited = self.seconds, 0, 0, 0.0
        evaluate_at = {round(self.steps * q) for q in (0.25, 0.5, 0.75)} | {self.steps}
        bar = progress(self.steps, self.record.config.experiment.name, initial=self.step, disable=rank() > 0)
        if self.step == 0:
            self._log(0, heldout_loss=self.heldout_loss())
        for batch, seconds in self.loader.prefetch(self._indices(step) for step in range(self.step, self.steps)):
            loss, norm, rate = self._train_step(batch)
            self.step += 1

            tokens, samples, waited = tokens + batch.tokens, samples + batch.samples, waited + seconds
            passed = time.monotonic() - began
            self.seconds = earlier_seconds + passed
            row: dict[str, Any] = {
                "loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_s": tokens / passed,
                "samples_per_s": samples / passed, "data_wait": waited / passed, "seconds": self.seconds,
            }  # fmt: skip
            if self.step in evaluate_at:
                row["heldout_loss"] = self.heldout_loss()
            self._log(self.step, **row)
            bar.update(1)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{row['tokens_per_s']:.0f}", wait=f"{row['data_wait']:.0%}")

            if self.step < self.steps and time.monotonic() - saved > self.scale.states.every_s:
                self._save_state()
                saved = time.monotonic()
        bar.close()

    def _train_step(self, batch: StepBatch) -> tuple[float, float, float]:
        """One optimizer step; returns the loss per supervised token, the gradient norm and the learning rate."""
        # 1. Forward and backward. The loss is divided by the supervised tokens of the global batch.
        self.model.train()
        supervised = sum_over_ranks(batch.supervised)
        loss = None
        while loss is None:
            try:
                loss = self._accumulate_gradients(batch, supervised)
            except torch.OutOfMemoryError as error:
                self._enable_activation_checkpointing(error)  # raises if it is already enabled
        # 2. Sum over the processes.
        sum_gradients(self.trainable.values())
        loss = sum_over_ranks(loss)
        # 3. Clip.
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.config.grad_clip))
        if not math.isfinite(loss) or not math.isfinite(norm) or norm == 0:
            names = ", ".join(self.train_set.samples[k].id for k in self._indices(self.step)[:4])
            raise TrainingError(
                f"step {self.step}: loss {loss}, gradient norm {norm} (samples {names}, ...); "
                "fix: look at these samples, or lower train.learning_rate"
            )
        # 4. Update.
        rate = learning_rate(self.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, rate

    def _accumulate_gradients(self, batch: StepBatch, supervised: float) -> float:
        total = 0.0
        for row in batch.rows:
            loss = self._row_loss(row) / supervised
            if loss.requires_grad:  # False if only the projector is trained and the row has no image
                loss.backward()
            total += float(loss.detach())
        return total

    def _row_loss(self, row: RowInputs) -> torch.Tensor:
        return packed_row_loss(self.model, row, self.loaded.processor.normalise, self.device)

    def _enable_activation_checkpointing(self, error: torch.OutOfMemoryError) -> None:
        """Switch to activation checkpointing, which needs less memory and more time."""
        language_model = self.model.language_model
        if language_model.is_gradient_checkpointing:
            raise TrainingError(
                f"step {self.step}: no memory for a row of up to {self.max_tokens} tokens and its images, even with "
                "activation checkpointing; fix: lower row_tokens in the scale or train.max_length"
            ) from error
        sys.stderr.write(f"step {self.step}: out of memory; activation checkpointing is enabled from here on\n")
        # the name since transformers 5.23, and the one before
        enable = getattr(language_model, "activation_checkpointing_enable", None)
        enable = enable or language_model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self._log(self.step, activation_checkpointing=True)
        self.optimizer.zero_grad(set_to_none=True)  # discard the gradients of the failed pass

    @torch.inference_mode()
    def heldout_loss(self) -> float:
        """Loss per supervised token of the held-out samples; must run inside `packed_attention`."""
        self.model.eval()
        batch = self.held_out_loader.batch(range(len(self.held_out)))
        return sum(float(self._row_loss(row)) for row in batch.rows) / max(1, batch.supervised)

    _epoch: tuple[int, np.ndarray] = (-1, np.empty(0))  # the cached epoch and its order

    def _indices(self, step: int) -> list[int]:
        """This rank's samples of an optimizer step. The order depends on seed and epoch only, so a step can resume."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        batch = self._epoch[1][k * self.config.global_batch : (k + 1) * self.config.global_batch]
        return [int(i) for i in np.array_split(batch, world_size())[rank()]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.train_set))
        if self.config.order == "samples":
            return order
        # samples of one image follow the first of them; samples without an image keep their position
        first: dict[Any, int] = {}
        positions = []
        for position, k in enumerate(order):
            image = self.train_set.samples[k].image
            positions.append(position if image is None else first.setdefault(image, position))
        return order[np.argsort(positions, kind="stable")]

    def _log(self, step: int, **row: Any) -> None:
        if rank() == 0:
            self.record.log({"step": step, "epoch": step / self.steps_per_epoch, **row})

    def _log_start(self) -> None:
        if self.step == 0 and rank() == 0:
            sample = [self.train_set.encoded(k) for k in range(min(32, len(self.train_set)))]
            per_rank = self.config.global_batch // world_size()
            self._log(
                0, samples=len(self.train_set), steps=self.steps, supervised_share=supervised_fraction(sample),
                global_batch=f"{self.config.global_batch} = {world_size()} ranks x {per_rank}"
                f" (packed rows of up to {self.max_tokens} tokens)",
                trainable=sorted({n.split(".")[0] for n in self.trainable}),
            )  # fmt: skip

    def _finish(self) -> dict[str, Any]:
        if rank() > 0:
            return {}  # only rank 0 writes the record
        rows = [r for r in self.record.metrics() if "loss" in r]
        tail = rows[-max(1, len(rows) // 20) :]
        experiment = self.record.config.experiment
        summary = {
            "run": self.record.run_id, "steps": self.steps, "samples": len(self.train_set),
            "final_loss": sum(r["loss"] for r in tail) / len(tail), "heldout_loss": rows[-1]["heldout_loss"],
            "samples_per_s": rows[-1]["samples_per_s"], "tokens_per_s": rows[-1]["tokens_per_s"],
            "seconds": self.seconds, "trainable_parameters": sum(p.numel() for p in self.trainable.values()),
            "shortened_samples": len(self.train_set.dropped), "checkpoint": display_path(self.record.checkpoint),
        }  # fmt: skip
        kind: Kind = "full" if "language_model" in self.config.trainable else "projector"
        save_checkpoint(
            self.record.checkpoint, self.loaded, kind if self.config.adapters is None else "adapter",
            template=experiment.template, image_position=experiment.image_position,
            prompt_format=experiment.data.prompt_format, run_id=self.record.run_id,
        )  # fmt: skip
        self.record.finish(summary)
        self.state_file.unlink(missing_ok=True)
        return summary

    def _save_state(self) -> None:
        """Save what an exact resume needs; the file is replaced atomically."""
        if rank() > 0:
            return
        temporary = self.state_file.with_suffix(".writing")
        weights = {n: p.detach().cpu() for n, p in self.trainable.items()}
        torch.save(
            {"step": self.step, "seconds": self.seconds, "weights": weights, "optimizer": self.optimizer.state_dict()},
            temporary,
        )
        temporary.replace(self.state_file)

    def _restore(self) -> None:
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        if rank() == 0:
            self.record.rewind(self.step)
            name = self.record.config.experiment.name
            sys.stderr.write(f"resuming {name} at step {self.step} of {self.steps}\n")


def train_record(record: RunRecord, initial: Path | None = None, resume: bool = True) -> dict[str, Any]:
    """Train a record's run in this process, from the projector of the checkpoint `initial`; returns the summary."""
    config = record.config
    if config.scale.threads:
        torch.set_num_threads(config.scale.threads)
    loaded = build_model(config, initial)
    n = loaded.model.n_image_tokens
    facts = {name: loaded.manifest.get(name) for name in ("system", "image_delimiters")}
    train_set, held_out = (
        TrainingSet(samples, loaded.tokenizer, loaded.processor, config, n, config.scale.cache_pixels, **facts)
        for samples in load_samples(config)
    )
    return Trainer(record, loaded, train_set, held_out, resume).run()
