"""Loss and gradients in chunks against all logits at once."""

from __future__ import annotations

from typing import Any, Literal

import torch

from benchmarks.common import Clock, circumstances, headline, in_own_process, in_turns, peak_mib
from llava_core.ops.linear_cross_entropy import linear_cross_entropy, reference

Device = Literal["cpu", "cuda"]
LOSSES = {"chunked": linear_cross_entropy, "reference": reference}


def _loss_step(loss: str, rows: int, width: int, words: int, device: str, train_head: bool) -> Any:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    weight = torch.randn(words, width, device=device, requires_grad=train_head)
    targets = torch.randint(0, words, (rows,), device=device)

    def step() -> None:
        hidden.grad = weight.grad = None
        LOSSES[loss](hidden, weight, targets).backward()

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
        steps = {name: _loss_step(name, **sizes, train_head=train_head) for name in LOSSES}
        for step in steps.values():
            step()
        turns = in_turns(steps["chunked"], steps["reference"], rounds, clock)
        peaks = [
            in_own_process("benchmarks.loss:loss_peak", loss=name, train_head=train_head, **sizes) for name in steps
        ]
        case = f"loss, head {'trained' if train_head else 'frozen'}, {clock} time"
        row: dict[str, Any] = {"case": case, "size": f"{rows} x {width} x {words}"}
        row |= {name: round(value, 4) for name, value in turns.items()}
        row |= {"peak_mib": round(peaks[0]), "peer_peak_mib": round(peaks[1])}
        cases.append(row | circumstances(torch.device(device)))
    return headline(cases)
