"""The training loop of both stages: packed rows, AdamW, token-normalised loss, resume."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_core.checkpoints.checkpoint import Loaded, save_checkpoint
from llava_core.data.conversation import coverage
from llava_core.ops.fused_layers import fused_layers
from llava_core.ops.transformers_backend import packed_attention
from llava_core.record import RunRecord
from llava_core.runtime import CompanionError, progress, rank, resolve_device, shown, world_size
from llava_core.train.dataset import TrainingSet, build_model, load_samples
from llava_core.train.engine import sum_gradients, sum_over_ranks
from llava_core.train.loader import LAYERS, Batch, Batches, RowBatch, open_features, row_loss
from llava_core.train.optimizer import learning_rate, make_optimizer


class TrainingError(CompanionError):
    """Training went wrong in a way that more steps cannot mend."""


class Trainer:
    """Trains one run from its first or its last saved step to its end.

    Args:
        record: where metrics, state and the final checkpoint go; its config decides everything else.
        loaded: the model, trainable parts already set.
        train_set, held_out: samples.
        resume: continue from the record's saved state if there is one, otherwise begin anew.
    """

    def __init__(
        self, record: RunRecord, loaded: Loaded, train_set: TrainingSet, held_out: TrainingSet, resume: bool = True
    ) -> None:
        self.record, self.loaded, self.train_set, self.held_out = record, loaded, train_set, held_out
        self.config, self.scale = record.config.experiment.train, record.config.scale
        self.device = resolve_device(self.scale.device)
        self.model = loaded.model.to(self.device)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.trainable.values()), self.config)
        capacity = self.scale.micro_batch * self.config.max_length
        cache = open_features(loaded, record.config, train_set, held_out, self.device)
        layer = LAYERS.index(self.model.feature_layer) if cache is not None else 0
        self.batches, self.held_out_batches = (Batches(data, capacity, cache, layer) for data in (train_set, held_out))
        self.steps_per_epoch = math.ceil(len(train_set) / self.config.global_batch)
        self.steps = self.steps_per_epoch * self.config.epochs
        self.step, self.seconds = 0, 0.0
        self.state_file = record.path / "state.pt"
        if resume and self.state_file.exists():
            self._restore()

    _epoch: tuple[int, np.ndarray] = (-1, np.empty(0))  # a number and its order

    # --- one run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end, save the checkpoint, finish the record and return its summary."""
        self._announce()
        with packed_attention(self.model.language_model), fused_layers(self.model.language_model):
            self._run()
        return self._finish()

    def _run(self) -> None:
        saved, began = time.monotonic(), time.monotonic()
        start_seconds, tokens_seen, samples_seen, waited = self.seconds, 0, 0, 0.0
        evaluate_at = {round(self.steps * q) for q in (0.25, 0.5, 0.75)} | {self.steps}
        bar = progress(self.steps, self.record.config.experiment.name, initial=self.step, disable=rank() > 0)
        if self.step == 0:
            self._log(0, heldout_loss=self.heldout_loss())
        for batch, seconds in self.batches.ahead(self._indices(step) for step in range(self.step, self.steps)):
            waited += seconds
            loss, norm, rate = self._train_step(batch)
            self.step += 1
            tokens_seen += batch.tokens
            samples_seen += batch.samples
            passed = time.monotonic() - began
            self.seconds = start_seconds + passed
            row: dict[str, Any] = {
                "loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_s": tokens_seen / passed,
                "samples_per_s": samples_seen / passed, "data_wait": waited / passed, "seconds": self.seconds,
            }  # fmt: skip
            if self.step in evaluate_at:
                row["heldout_loss"] = self.heldout_loss()
            self._log(self.step, **row)
            bar.update(1)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{row['tokens_per_s']:.0f}", wait=f"{row['data_wait']:.0%}")
            if self.step < self.steps and time.monotonic() - saved > self.scale.checkpoint_every_s:
                self._save_state()
                saved = time.monotonic()
        bar.close()

    def _finish(self) -> dict[str, Any]:
        if rank() > 0:
            return {}  # rank 0 writes the record and, while it writes, nobody else can read it
        rows = [r for r in self.record.metrics() if "loss" in r]
        tail = rows[-max(1, len(rows) // 20) :]
        experiment = self.record.config.experiment
        summary = {
            "run": self.record.run_id, "steps": self.steps, "samples": len(self.train_set),
            "final_loss": sum(r["loss"] for r in tail) / len(tail), "heldout_loss": rows[-1]["heldout_loss"],
            "samples_per_s": rows[-1]["samples_per_s"], "tokens_per_s": rows[-1]["tokens_per_s"],
            "seconds": self.seconds, "trainable_parameters": sum(p.numel() for p in self.trainable.values()),
            "shortened_samples": len(self.train_set.dropped), "checkpoint": shown(self.record.checkpoint),
        }  # fmt: skip
        trained = experiment.train.trainable
        save_checkpoint(
            self.record.checkpoint, self.loaded, "full" if "language_model" in trained else "projector",
            template=experiment.template, image_position=experiment.image_position,
            prompt_format=experiment.data.prompt_format, run_id=self.record.run_id,
        )  # fmt: skip
        self.record.finish(summary)
        self.state_file.unlink(missing_ok=True)
        return summary

    def _announce(self) -> None:
        if self.step == 0 and rank() == 0:
            sample = [self.train_set.encoded(k) for k in range(min(32, len(self.train_set)))]
            per_rank = self.config.global_batch // world_size()
            self._log(
                0, samples=len(self.train_set), steps=self.steps, supervised_share=coverage(sample),
                global_batch=f"{self.config.global_batch} = {world_size()} ranks x {per_rank}"
                f" (packed rows of up to {self.scale.micro_batch * self.config.max_length} tokens)",
                trainable=sorted({n.split(".")[0] for n in self.trainable}),
            )  # fmt: skip

    def _log(self, step: int, **row: Any) -> None:
        if rank() == 0:
            self.record.log({"step": step, "epoch": step / self.steps_per_epoch, **row})

    # --- one step ---------------------------------------------------------------------------------------------------

    def _indices(self, step: int) -> list[int]:
        """This rank's share of the samples of an optimizer step: a seeded shuffle per epoch, so position = step."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        batch = self._epoch[1][k * self.config.global_batch : (k + 1) * self.config.global_batch]
        return [int(i) for i in np.array_split(batch, world_size())[rank()]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.train_set))
        if self.config.order == "samples":
            return order
        # every sample moves up behind the first one of its image; those without an image stay by themselves
        images = [self.train_set.samples[k].image for k in order]
        first: dict[Any, int] = {}
        places = [
            position if image is None else first.setdefault(image, position) for position, image in enumerate(images)
        ]
        return order[np.argsort(places, kind="stable")]

    def _train_step(self, batch: Batch) -> tuple[float, float, float]:
        """One optimizer step; returns loss per supervised token, gradient norm and learning rate."""
        self.model.train()
        total = sum_over_ranks(batch.supervised)
        loss_sum = None
        while loss_sum is None:
            try:
                loss_sum = self._add_gradients(batch, total)
            except torch.OutOfMemoryError as error:
                self._recompute_activations(error)  # or, where it does that already, ends the run
        sum_gradients(self.trainable.values())
        loss_sum = sum_over_ranks(loss_sum)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.config.grad_clip))
        if not math.isfinite(loss_sum) or not math.isfinite(norm) or norm == 0:
            names = ", ".join(self.train_set.samples[k].id for k in self._indices(self.step)[:4])
            raise TrainingError(
                f"step {self.step}: loss {loss_sum}, gradient norm {norm} (samples {names}, ...); "
                "fix: look at these samples, or lower train.learning_rate"
            )
        rate = learning_rate(self.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum, norm, rate

    def _add_gradients(self, batch: Batch, total: float) -> float:
        loss_sum = 0.0
        for row in batch.rows:
            loss = self._loss(row) / total
            if loss.requires_grad:  # not where only the projector trains and the row has no image
                loss.backward()
            loss_sum += float(loss.detach())
        return loss_sum

    def _recompute_activations(self, error: torch.OutOfMemoryError) -> None:
        """Activations that a GPU has no room for are computed again in the backward pass, which takes longer."""
        decoder = self.model.language_model
        if decoder.is_gradient_checkpointing:
            longest = self.scale.micro_batch * self.config.max_length
            raise TrainingError(
                f"step {self.step}: no memory for a row of up to {longest} tokens and its images, even with "
                "activations computed again; fix: lower micro_batch in the scale or, where that is 1, train.max_length"
            ) from error
        sys.stderr.write(f"step {self.step}: out of memory; from here on activations are computed again when needed\n")
        # the name of transformers 5.23, and the one before
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self._log(self.step, activation_checkpointing=True)
        self.optimizer.zero_grad(set_to_none=True)  # what the failed pass had already added

    def _loss(self, row: RowBatch) -> torch.Tensor:
        return row_loss(self.model, row, self.loaded.processor.normalise, self.device)

    @torch.inference_mode()
    def heldout_loss(self) -> float:
        """Loss per supervised token on the held-out samples; in `packed_attention`, as the training steps."""
        self.model.eval()
        batch = self.held_out_batches.make(range(len(self.held_out)))
        return sum(float(self._loss(row)) for row in batch.rows) / max(1, batch.supervised)

    # --- resume -----------------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        """Everything needed to go on exactly here; the file is replaced whole, so a kill leaves the last good one."""
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
    """Train a record's run in this process.

    Args:
        record: opened by `RunRecord.open`; its config says everything.
        initial: checkpoint whose projector this run starts from.
        resume: go on from the saved state if there is one.

    Returns:
        The run's summary.
    """
    config = record.config
    if config.scale.threads:
        torch.set_num_threads(config.scale.threads)
    loaded = build_model(config, initial)
    n = loaded.model.n_image_tokens
    facts = {name: loaded.manifest.get(name) for name in ("system", "image_delimiters")}
    train_set, held_out = (
        TrainingSet(samples, loaded.tokenizer, loaded.processor, config, n, config.scale.name == "mini", **facts)
        for samples in load_samples(config)
    )
    return Trainer(record, loaded, train_set, held_out, resume).run()
