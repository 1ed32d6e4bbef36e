"""The trainer of both stages: packed rows, token-normalised loss, AdamW, exact resume."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from llava_core.checkpoints.load import Kind, Loaded, save_checkpoint
from llava_core.checkpoints.tensors import LazyTensor
from llava_core.models.llava import Llava
from llava_core.ops.transformers_backend import packed_attention
from llava_core.record import RunRecord, final_loss
from llava_core.runtime import CompanionError, display_path, progress
from llava_core.train.alarms import Alarms, find_non_finite
from llava_core.train.dataset import Normalise, TrainingSet, build_model
from llava_core.train.engine import Engine, make_engine, model_flops
from llava_core.train.loader import CACHED_LAYERS, Loader, RowInputs, StepBatch, open_features
from llava_core.train.optimizer import learning_rate
from llava_core.train.order import BatchOrder
from llava_core.train.preflight import Preflight, checked_samples
from llava_core.train.signals import Interrupted, stop_on_signal
from llava_core.train.state import States, all_ranks
from llava_core.train.trackers import Trackers


class TrainingError(CompanionError):
    """Training failed in a way that more steps cannot repair."""


class Step(NamedTuple):
    """An optimizer step: loss per supervised token, gradient norm, learning rate; tokens and samples of all ranks."""

    loss: float
    norm: float
    rate: float
    tokens: float
    samples: float
    stop: bool
    """A rank was asked to stop."""
    save: bool


class PackedRowLoss(nn.Module):
    """Loss of a packed row, summed over its supervised tokens; must run inside `packed_attention`.

    It is what an engine wraps: whatever the loss reads is gathered in its forward.
    """

    def __init__(self, model: Llava, normalise: Normalise, device: torch.device) -> None:
        super().__init__()
        self.model, self.normalise, self.device = model, normalise, device

    def forward(self, row: RowInputs) -> torch.Tensor:
        features = row.images
        if features is not None:
            if features.dtype == torch.uint8:  # pixels (N, H, W, 3): no feature cache
                pixels = torch.from_numpy(self.normalise(features.numpy()))
                features = self.model.tower_features(pixels.to(self.device, self.model.vision_tower.dtype))
            features = features.to(self.device)
            if len(row.image_index) != len(features):  # an image has several blocks
                features = features.index_select(0, row.image_index.to(self.device))
        return self.model.packed_loss(
            row.input_ids.to(self.device), row.position_ids.to(self.device), row.packed_mask.to(self.device),
            row.logit_positions.to(self.device), row.targets.to(self.device), features,
        )  # fmt: skip


class Trainer:
    """Trains the run of a record from its first or, with `resume`, its last saved step to its end."""

    def __init__(
        self,
        record: RunRecord,
        loaded: Loaded,
        train_set: TrainingSet,
        held_out: TrainingSet,
        engine: Engine,
        preflight: Preflight,
        resume: bool = True,
    ) -> None:
        self.record, self.loaded, self.train_set, self.held_out = record, loaded, train_set, held_out
        self.engine, self.preflight, self.resume = engine, preflight, resume
        self.config, self.scale = record.config.experiment.train, record.config.scale
        self.model = loaded.model
        tower = self.model.vision_tower.to(engine.device)
        features = open_features(loaded, record.config, train_set, held_out, engine.device)
        if features is not None:
            tower.cpu()  # not needed again
        layer = CACHED_LAYERS.index(self.model.feature_layer) if features is not None else 0
        self.loader, self.held_out_loader = (
            Loader(data, self.scale.row_tokens, features, layer) for data in (train_set, held_out)
        )
        engine.prepare(PackedRowLoss(self.model, loaded.processor.normalise, engine.device))
        self.order = BatchOrder(train_set.samples, self.config, engine.rank, engine.world)
        self.steps = self.order.steps
        self.step, self.seconds = 0, 0.0
        self.trackers = Trackers(record.config, record)
        self.saved = time.monotonic()
        self.states = States(record.path / "states", self.scale.states.keep)

    def run(self) -> dict[str, Any]:
        """Train to the end, save the checkpoint, finish the record and return its summary."""
        if self._checkpoints_from_the_start():
            self._enable_activation_checkpointing()
        try:
            with packed_attention(self.model.language_model), stop_on_signal() as self.stop:
                self._restore()
                self._log_start()
                self._train()
                return self._finish()
        finally:
            self.trackers.close()

    def _train(self) -> None:
        began, earlier_seconds = time.monotonic(), self.seconds
        tokens, samples, waited = 0.0, 0.0, 0.0
        self.saved = began
        evaluate_at = {round(self.steps * q) for q in (0.25, 0.5, 0.75)} | {self.steps}
        snapshot_at = set(snapshot_steps(self.steps, self.config.snapshots))
        name = self.record.config.experiment.name
        bar = progress(self.steps, name, initial=self.step, disable=self.engine.rank > 0)
        if self.step == 0 and len(self.held_out):
            self._log(0, heldout_loss=self.heldout_loss())
        for batch, seconds in self.loader.prefetch(self.order.after(self.step)):
            step = self._train_step(batch)
            self.step += 1

            tokens, samples, waited = tokens + step.tokens, samples + step.samples, waited + seconds
            passed = time.monotonic() - began
            self.seconds = earlier_seconds + passed
            row: dict[str, Any] = {
                "loss": step.loss, "lr": step.rate, "grad_norm": step.norm, "tokens_per_s": tokens / passed,
                "samples_per_s": samples / passed, "data_wait": waited / passed, "seconds": self.seconds,
                **model_flops(self.engine, tokens / passed),
            }  # fmt: skip
            if self.step in evaluate_at and len(self.held_out):
                row["heldout_loss"] = self.heldout_loss()
            self._log(self.step, **row)
            self._alert(self.alarms.check(self.step, row, batch))
            bar.update(1)
            mfu = {"mfu": f"{row['mfu']:.0%}"} if "mfu" in row else {}
            bar.set_postfix(
                loss=f"{step.loss:.3f}", tok_s=f"{row['tokens_per_s']:.0f}", wait=f"{row['data_wait']:.0%}", **mfu
            )

            if self.step in snapshot_at:
                self._save_weights(self.record.path / "snapshots" / str(self.step))
            if self.step < self.steps and (step.stop or step.save):
                state = self.states.save(self.step, self.seconds, self.engine.state)
                self.saved = time.monotonic()
                if step.stop:
                    bar.close()
                    raise Interrupted(self._stopped(state))
        bar.close()

    def _stopped(self, state: bool) -> str:
        name = display_path(self.record.path)
        if state:
            return f"{name}: stopped after step {self.step} of {self.steps}; start it again to resume"
        return f"{name}: stopped after step {self.step} without a saved state; it resumes from the one before, if any"

    def _train_step(self, batch: StepBatch) -> Step:
        """One optimizer step."""
        # 1. Forward and backward. The loss is divided by the supervised tokens of the global batch.
        self.model.train()
        torch.manual_seed(self.order.seed(self.step))
        own = [batch.supervised, batch.tokens, batch.samples, len(batch.rows)]
        counts = self.engine.all_gather(own)  # (ranks, 4)
        supervised, tokens, samples, _ = counts.sum(0).tolist()
        rows = self.engine.rows(batch.rows, int(counts[:, 3].max()))
        loss = None
        while loss is None:
            try:
                loss = self._accumulate_gradients(rows, supervised)
            except torch.OutOfMemoryError as error:
                self._enable_activation_checkpointing(error)  # raises if it is already enabled
        overdue = time.monotonic() - self.saved > self.scale.states.every_s
        outcomes = self.engine.all_gather([loss, self.stop.requested, overdue])  # (ranks, 3)
        loss = float(outcomes[:, 0].sum())
        # 2. Clip, and update.
        rate = learning_rate(self.step, self.steps, self.config)
        norm = self.engine.step(rate) if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            raise TrainingError(self._non_finite(loss, norm))
        stop, save = bool(outcomes[:, 1].any()), bool(outcomes[0, 2])  # rank 0's clock decides
        return Step(loss, norm, rate, tokens, samples, stop, save)

    def _non_finite(self, loss: float, norm: float) -> str:
        """The message that names the samples whose own loss or gradient is not finite."""
        indices = self.order.indices(self.step)
        if math.isfinite(loss) and not self.engine.knows_norm_first:
            return (
                f"step {self.step}: gradient norm {norm}; DeepSpeed has already updated the weights, so the sample "
                "cannot be found; fix: start again with parallel.kind fsdp2, which names it"
            )

        def loss_of(index: int) -> torch.Tensor:
            return self._row_loss(self.loader.batch([index]).rows[0])

        def gradient_norm(loss: torch.Tensor) -> float:
            self.engine.backward(loss, last=True)
            return self.engine.step(0.0)

        self.engine.discard_gradients()
        count = int(self.engine.all_gather([len(indices)]).max())
        found = all_ranks(find_non_finite(loss_of, gradient_norm, indices, count))
        samples = [self.train_set.samples[k] for part in found for k in part]
        names = ", ".join(f"{sample.id} (line {sample.line})" for sample in samples[:4])
        cause = f"not finite by itself: sample {names}" if names else "each of its samples alone is finite"
        return (
            f"step {self.step}: loss {loss}, gradient norm {norm}; {cause}; fix: look at the samples, "
            "lower train.learning_rate, or train in float32"
        )

    def _accumulate_gradients(self, rows: Sequence[RowInputs], supervised: float) -> float:
        total = 0.0
        for k, row in enumerate(rows):
            loss = self._row_loss(row) / supervised
            self.engine.backward(loss, last=k == len(rows) - 1)
            total += float(loss.detach())
        return total

    def _row_loss(self, row: RowInputs) -> torch.Tensor:
        return self.engine.module(row)

    def _checkpoints_from_the_start(self) -> bool:
        # such an engine cannot repeat a step in which the memory ran out
        setting, retry = self.scale.activation_checkpointing, self.engine.can_retry and self.engine.world == 1
        return setting == "always" or (setting == "auto" and not retry)

    def _enable_activation_checkpointing(self, error: torch.OutOfMemoryError | None = None) -> None:
        """Switch to activation checkpointing, which needs less memory and more time."""
        language_model = self.model.language_model
        if error is not None and (
            self.scale.activation_checkpointing != "auto" or language_model.is_gradient_checkpointing
        ):
            raise TrainingError(
                f"step {self.step}: no memory for a row of up to {self.scale.row_tokens} tokens and its images; fix: "
                "lower row_tokens in the scale or train.max_length, or set activation_checkpointing: always"
            ) from error
        if error is not None:
            sys.stderr.write(f"step {self.step}: out of memory; activation checkpointing is enabled from here on\n")
            self._log(self.step, activation_checkpointing=True)
            self.engine.discard_gradients()  # of the failed pass
        # the name since transformers 5.23, and the one before
        enable = getattr(language_model, "activation_checkpointing_enable", None)
        enable = enable or language_model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Loss per supervised token of the held-out samples, each on one rank; must run inside `packed_attention`."""
        self.model.eval()
        batch = self.held_out_loader.batch(range(self.engine.rank, len(self.held_out), self.engine.world))
        counts = self.engine.all_gather([batch.supervised, len(batch.rows)])
        rows = self.engine.rows(batch.rows, int(counts[:, 1].max()))
        loss = sum(float(self._row_loss(row)) for row in rows)
        return float(self.engine.all_gather([loss]).sum()) / max(1.0, float(counts[:, 0].sum()))

    def _log(self, step: int, **row: Any) -> None:
        if self.engine.rank == 0:
            self.record.log({"step": step, "epoch": step / self.order.steps_per_epoch, **row})
            self.trackers.log(step, row)

    def _alert(self, messages: Sequence[str]) -> None:
        for message in messages if self.engine.rank == 0 else ():
            sys.stderr.write(f"alarm: {message}\n")
            self._log(self.step, alarm=message)

    def _log_start(self) -> None:
        self.alarms = Alarms(self.record.config, self.engine.local_weights, self.preflight, self.steps, self.step)
        if self.step == 0 and self.engine.rank == 0:
            world, share = self.engine.world, self.config.global_batch // self.engine.world
            self._log(
                0, samples=len(self.train_set), steps=self.steps,
                supervised_share=float(self.preflight.supervised.sum() / self.preflight.lengths.sum()),
                global_batch=f"{self.config.global_batch} = {world} ranks x {share}"
                f" (packed rows of up to {self.scale.row_tokens} tokens)",
                trainable=sorted({n.split(".")[0] for n in self.engine.trainable}), **self.preflight.row(),
            )  # fmt: skip

    def _finish(self) -> dict[str, Any]:
        """Write the weights first: nothing after them can lose the run."""
        try:
            self._save_weights(self.record.checkpoint)
        except (OSError, SafetensorError) as error:
            # with several ranks the others are in the middle of their reads: an earlier state must do
            saved = self.engine.world == 1 and self.states.save(self.step, self.seconds, self.engine.state)
            raise TrainingError(
                f"{display_path(self.record.checkpoint)}: the weights were not written ({error}); "
                f"{'the state of the last step was saved; ' if saved else ''}fix: free space and start again"
            ) from error
        if self.engine.rank > 0:
            return {}  # only rank 0 writes the record
        rows = [r for r in self.record.metrics() if "loss" in r]
        summary = {
            "run": self.record.run_id, "steps": self.steps, "samples": len(self.train_set),
            "final_loss": final_loss(rows),
            **{name: rows[-1].get(name) for name in ("heldout_loss", "samples_per_s", "tokens_per_s", "mfu")},
            "seconds": self.seconds,
            "trainable_parameters": sum(math.prod(self.engine.shapes[name]) for name in self.engine.trainable),
            "shortened_samples": len(self.train_set.dropped),
            "skipped_samples": len(self.preflight.skipped), "checkpoint": display_path(self.record.checkpoint),
        }  # fmt: skip
        self.record.finish(summary)
        self.states.remove()
        return summary

    def _save_weights(self, folder: Path) -> None:
        experiment, engine = self.record.config.experiment, self.engine
        if self.config.adapters is not None:
            kind: Kind = "adapter"
        else:
            kind = "full" if "language_model" in self.config.trainable else "projector"
        tensors = {
            name: LazyTensor(shape, engine.parameters[name].dtype, partial(engine.whole, name))
            for name, shape in engine.shapes.items()
        }
        save_checkpoint(
            folder, self.loaded, kind, tensors, engine.dtype, template=experiment.template,
            image_position=experiment.image_position, prompt_format=experiment.data.prompt_format,
            run_id=self.record.run_id,
        )  # fmt: skip

    def _restore(self) -> None:
        """Continue from the newest saved state; without one, forget what an earlier start has logged."""
        state = self.states.newest() if self.resume else None
        if state is not None:
            self.step, self.seconds = state.step, state.seconds
            self.engine.load_state(state.read, self.step)
        else:
            self.states.remove()
        if self.engine.rank == 0:
            self.record.rewind(self.step if state is not None else None)
            if state is not None:
                name = self.record.config.experiment.name
                sys.stderr.write(f"resuming {name} at step {self.step} of {self.steps}\n")


def snapshot_steps(steps: int, snapshots: int) -> list[int]:
    """Return the steps before the last one whose weights `train.snapshots` keeps."""
    return sorted({round(steps * k / snapshots) for k in range(1, snapshots)} - {0, steps})


def train_record(
    record: RunRecord, initial: Path | None = None, resume: bool = True, engine: Engine | None = None
) -> dict[str, Any]:
    """Train a record's run as this rank, from the projector of the checkpoint `initial`; returns the summary."""
    config = record.config
    if config.scale.threads:
        torch.set_num_threads(config.scale.threads)
    engine = engine or make_engine(config)
    loaded = build_model(config, initial, engine.maps_weights)
    train_set, held_out, preflight = checked_samples(config, loaded)
    return Trainer(record, loaded, train_set, held_out, engine, preflight, resume).run()
