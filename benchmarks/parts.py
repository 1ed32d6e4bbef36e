"""Parts of a training step: the loss without logits, and the loader."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import Clock, circumstances, headline, in_own_process, in_turns, peak_mib
from benchmarks.train_step import PackedStep, make_case
from llava_core.ops.linear_cross_entropy import linear_cross_entropy
from llava_core.train.dataset import TrainingSet, build_model, load_samples
from llava_core.train.launch import resolve_run
from llava_core.train.loader import Loader, open_features

Device = Literal["cpu", "cuda"]
COLUMNS = ("case", "size", "ours", "peer", "ratio", "ratio_low", "ratio_high", "peak_mib", "peer_peak_mib")


def _row(device: torch.device, **values: Any) -> dict[str, Any]:
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    return {**dict.fromkeys(COLUMNS), **rounded, **circumstances(device)}


# ------------------------------------------------------------------------------------------------ the loss


def _loss_step(backend: str, rows: int, width: int, words: int, device: str, train_head: bool) -> Any:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    weight = torch.randn(words, width, device=device, requires_grad=train_head)
    targets = torch.randint(0, words, (rows,), device=device)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets, backend=backend).backward()

    return step


def loss_peak(**arguments: Any) -> float:
    """Peak memory in MiB of loss and gradients, inputs included; in a process of its own."""
    step = _loss_step(**arguments)
    return peak_mib(step, torch.device(arguments["device"]))


def bench_loss(
    rows: int = 1024,
    width: int = 576,
    words: int = 49_152,
    rounds: int = 5,
    clock: Clock = "cpu",
    device: Device = "cpu",
) -> dict[str, Any]:
    """Time loss and gradients in chunks against all logits at once, with a frozen and with a trained head.

    Args:
        rows: supervised positions.
        width: of the hidden states.
        words: of the vocabulary.
        rounds: timed turns.
        clock: computing time (cpu) or elapsed time (wall).
        device: where it runs.
    """
    cases = []
    for train_head in (False, True):
        sizes: dict[str, Any] = {"rows": rows, "width": width, "words": words, "device": device}
        steps = {name: _loss_step(name, **sizes, train_head=train_head) for name in ("chunked", "reference")}
        for step in steps.values():
            step()
        turns = in_turns(steps["chunked"], steps["reference"], rounds, clock)
        peaks = {
            name: in_own_process("benchmarks.parts:loss_peak", backend=name, train_head=train_head, **sizes)
            for name in steps
        }
        cases.append(
            _row(
                torch.device(device), case=f"loss, head {'trained' if train_head else 'frozen'}, {clock} time",
                size=f"{rows} x {width} x {words}", peak_mib=round(peaks["chunked"]),
                peer_peak_mib=round(peaks["reference"]), **turns,
            )
        )  # fmt: skip
    return headline(cases)


# ------------------------------------------------------------------------------------------------ the loader


def bench_loader(steps: int = 20) -> dict[str, Any]:
    """Time making a batch (`ours`) against computing the step meanwhile (`peer`), at mini.

    With a ratio above 1 a step never waits for its batch.

    Args:
        steps: timed steps.
    """
    cases = []
    for name, stage in (("pretrain", 1), ("finetune", 2)):
        config = resolve_run(name, "mini", init_from=None) if stage == 2 else resolve_run(name, "mini")
        loaded = build_model(config, None)
        train, held = (
            TrainingSet(samples, loaded.tokenizer, loaded.processor, config, loaded.model.n_image_tokens, cache=True)
            for samples in load_samples(config)
        )
        cache = open_features(loaded, config, train, held, torch.device("cpu"))
        size = config.experiment.train.global_batch
        loader = Loader(train, config.scale.micro_batch * config.experiment.train.max_length, cache)
        order = np.random.default_rng(0).permutation(len(train))
        step = PackedStep(make_case("mini", stage, size)).step
        step()
        seconds: dict[str, list[float]] = {"batch": [], "step": []}
        for k in range(steps):
            begin = time.perf_counter()
            loader.batch([int(n) for n in order[k * size : (k + 1) * size]])
            ready = time.perf_counter()
            step()
            seconds["batch"].append(ready - begin)
            seconds["step"].append(time.perf_counter() - ready)
        ratios = np.divide(seconds["step"], seconds["batch"])
        cases.append(
            _row(
                torch.device("cpu"), case=f"loader, mini, stage {stage}, wall time", size=f"{size} samples",
                ours=float(np.median(seconds["batch"])), peer=float(np.median(seconds["step"])),
                ratio=float(np.median(ratios)), ratio_low=float(ratios.min()), ratio_high=float(ratios.max()),
            )
        )  # fmt: skip
    return headline(cases)
