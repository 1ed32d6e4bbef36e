"""Code broken on purpose: a comparison that does not see these sees nothing."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from llava_core.runtime import ROOT, DataError

_numbers = itertools.count()


class Mutant(NamedTuple):
    """One place of a file and what stands there instead."""

    file: str
    old: str
    new: str


_KERNEL, _VISITS = "llava_core/ops/triton_attention.py", "llava_core/ops/block_mask.py"
_LOOP = "queries, k, k_token, v, v_token, ends, visit,"
ATTENTION: Mapping[str, Mutant] = {
    "a sample's end is seen by the next one": Mutant(_KERNEL, "(queries < ends)", "(queries <= ends)"),
    "a sample ends one token early": Mutant(_KERNEL, "(queries < ends)", "(queries < ends - 1)"),
    "the token after is seen": Mutant(_KERNEL, "(keys <= queries)", "(keys <= queries + 1)"),
    "the weighted sum is not rescaled": Mutant(_KERNEL, "        acc = acc * shrink[:, None]\n", ""),
    "the sum of exponentials is not rescaled": Mutant(_KERNEL, "total * shrink + tl", "total + tl"),
    "a row has the segments of the first": Mutant(_KERNEL, "return ends.stride(0), visit", "return 0, visit"),
    "forward skips a block that needs no mask": Mutant(_KERNEL, f"acc, mine, {_LOOP} 2,", f"acc, mine, {_LOOP} 3,"),
    "forward skips a block that needs a mask": Mutant(
        _KERNEL, f"acc, mine, {_LOOP} free, stop,", f"acc, mine, {_LOOP} free, stop - 1,"
    ),
    "the gradient of queries skips a block": Mutant(_KERNEL, f"own_delta, {_LOOP} 2,", f"own_delta, {_LOOP} 3,"),
    "the gradients of keys skip a block": Mutant(_KERNEL, "    visit, 2, free, length,", "    visit, 3, free, length,"),
    "the gradients of keys are of one query head": Mutant(_KERNEL, "in range(groups)", "in range(1)"),
    "the output's overlap is not subtracted": Mutant(_KERNEL, "(of_p - own_delta[None, :])", "of_p"),
    "a scale is missing": Mutant(_KERNEL, "length, sum_k * factor,", "length, sum_k,"),
    "one visit too few": Mutant(_VISITS, "(highest > first_q)", "(highest > first_q + 1)"),
    "a mask too few": Mutant(_VISITS, "(lowest > last_q)", "(lowest >= last_q)"),
}
"""Ways in which an attention kernel for packed rows goes wrong, in ours."""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="broken-")


def broken_module(mutant: Mutant) -> ModuleType:
    """A module with one place changed, beside the right one.

    Raises:
        DataError: the place is not in the file exactly once, so that something else, or nothing, would be broken.
    """
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise DataError(
            f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times; fix: the mutant in {__name__}"
        )
    name = f"broken{next(_numbers)}"
    # PyTorch knows an operator by its name, once
    text = text.replace(mutant.old, mutant.new).replace('custom_op("llava_core::', f'custom_op("{name}::')
    # triton reads a kernel's source again when it first runs, so the file stays until the process ends
    path = Path(_folder().name) / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
