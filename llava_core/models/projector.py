"""Projectors from patch features to visual tokens; register a builder to add one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from llava_core.registry import Registry

PROJECTORS: Registry[Callable[[int, int], nn.Module]] = Registry("projector")


@PROJECTORS.register("linear")
def linear(d_vision: int, d_model: int) -> nn.Module:
    """The paper's projection: one matrix and, in the released code, a bias (4,198,400 parameters for 7B)."""
    return nn.Linear(d_vision, d_model, bias=True)


@PROJECTORS.register("mlp2x_gelu")
def mlp2x_gelu(d_vision: int, d_model: int) -> nn.Module:
    """Two layers with GELU between them: the projector of LLaVA-1.5."""
    return nn.Sequential(nn.Linear(d_vision, d_model), nn.GELU(), nn.Linear(d_model, d_model))
