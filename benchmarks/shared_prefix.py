"""Sharing image prefixes: a training step with each prefix once, against packed rows with one copy per sample.

The bound is the ratio of the token counts. The dense case has the same shared rows and a dense T x T mask, as Molmo's
rows of several texts about an image (arXiv 2409.17146).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from benchmarks.common import Clock, circumstances, ratios, steady_in_turns
from benchmarks.train_step import PackedStep, make_case, tokens
from llava_core.runtime import resolve_device

SAMPLES = 8  # about so many per step


def bench_shared_prefix(
    model: Literal["60m", "135m", "7b"] = "60m",
    image_tokens: Sequence[int] = (49, 196, 256, 576),
    per_image: Sequence[int] = (1, 2, 3, 8),
    rounds: int = 3,
    clock: Clock = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
) -> dict[str, Any]:
    """Time stage 2's step with shared prefixes, without, and with a dense mask, interleaved; features are cached.

    Args:
        model: size; the weights are random.
        image_tokens: square numbers.
        per_image: conversations per image; a step has about 8 samples.
        rounds: timed turns.
        clock: computing time (cpu) or elapsed time (wall).
        dtype: of the weights.
        device: where it runs.

    Returns:
        The numbers of the last case, with `cases`: a row per number of image tokens and of conversations. `ratio`
        (seconds without sharing / with) is bounded by `ideal`; `dense` is the same ratio of the dense mask.

    Raises:
        TooNoisyError: as `steady_in_turns`.
    """
    rows = []
    for count in image_tokens:
        for several in per_image:
            samples = several * max(1, SAMPLES // several)
            case = make_case(model, 2, samples, several, dtype, device, image_tokens=count)
            sides = {
                "packed": PackedStep(case, "packed"),
                "shared": PackedStep(case, "shared"),
                "dense": PackedStep(case, "shared", "sdpa"),
            }
            losses = {name: side.step() for name, side in sides.items()}
            timed = steady_in_turns({name: side.step for name, side in sides.items()}, "packed", rounds, clock)
            packed, shared = (tokens(case, how) for how in ("packed", "shared"))
            found = ratios(timed["shared"], timed["packed"])
            rows.append(
                {
                    "model": model, "dtype": dtype, "clock": clock, "image_tokens": count, "per_image": several,
                    "samples": samples, "tokens": packed, "tokens_shared": shared, "ideal": round(packed / shared, 3),
                    **{name: round(value, 3) for name, value in found.items()},
                    "of_ideal": round(found["ratio"] * shared / packed, 3),
                    "dense": round(ratios(timed["dense"], timed["packed"])["ratio"], 3),
                    "loss_difference": f"{max(abs(x - losses['packed']) for x in losses.values()):.1e}",
                    **circumstances(resolve_device(device)),
                }
            )  # fmt: skip
    return {**{name: rows[-1][name] for name in ("ratio", "ideal", "dense", "device")}, "cases": rows}
