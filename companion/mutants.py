"""Mutation testing of the attention kernel: a parity check must fail if one line of the kernel is changed."""

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
    file: str
    old: str
    new: str


_KERNEL, _BLOCKS = "llava_core/ops/triton_attention.py", "llava_core/ops/block_mask.py"
_RANGE = "range(full_end if masked else 2, partial_end if masked else full_end)"
_LOOP = f"""
    full_end, partial_end = tl.load(table), tl.load(table + 1)
    for masked in tl.static_range(2):  # full blocks, then partial blocks
        for j in {_RANGE}"""
_FWD = f"# running weighted sum of the values{_LOOP}"
_DQ = f"other=0.0)\n    acc = tl.zeros((block_q, block_d), tl.float32){_LOOP}"
_DKDV = f"for i in {_RANGE}"
ATTENTION: Mapping[str, Mutant] = {
    "the end of a sample is off by one": Mutant(_KERNEL, "(queries < ends)", "(queries <= ends)"),
    "a sample ends one token early": Mutant(_KERNEL, "(queries < ends)", "(queries < ends - 1)"),
    "a query attends to the next token": Mutant(_KERNEL, "(keys <= queries)", "(keys <= queries + 1)"),
    "the weighted sum is not rescaled": Mutant(_KERNEL, "            acc = acc * alpha[:, None]\n", ""),
    "the sum of exponentials is not rescaled": Mutant(_KERNEL, "l_i * alpha + tl", "l_i + tl"),
    "every row has the mask of the first": Mutant(_KERNEL, "return ends.stride(0), table", "return 0, table"),
    "forward skips a full block": Mutant(_KERNEL, _FWD, _FWD.replace("else 2", "else 3")),
    "forward skips a partial block": Mutant(_KERNEL, _FWD, _FWD.replace("partial_end if", "partial_end - 1 if")),
    "dq skips a block": Mutant(_KERNEL, _DQ, _DQ.replace("else 2", "else 3")),
    "dk and dv skip a block": Mutant(_KERNEL, _DKDV, _DKDV.replace("else 2", "else 3")),
    "dk and dv come from one query head": Mutant(_KERNEL, "in range(groups)", "in range(1)"),
    "delta is not subtracted": Mutant(_KERNEL, "(dp - delta_i[None, :])", "dp"),
    "dk lacks the scale": Mutant(_KERNEL, "length, dk_acc * factor,", "length, dk_acc,"),
    "a partial block counts as empty": Mutant(_BLOCKS, "(highest > first_q)", "(highest > first_q + 1)"),
    "a partial block counts as full": Mutant(_BLOCKS, "(lowest > last_q)", "(lowest >= last_q)"),
}
"""Typical faults of an attention kernel for packed rows."""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mutants-")


def mutated_module(mutant: Mutant) -> ModuleType:
    """Import a copy of a module with one place changed; DataError if the file does not have the text exactly once."""
    text = (ROOT / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise DataError(f"{mutant.file}: {mutant.old!r} occurs {count} times, not once; fix: the mutant in {__name__}")
    name = f"mutant{next(_numbers)}"
    # PyTorch registers an operator under its name only once
    text = text.replace(mutant.old, mutant.new).replace('custom_op("llava_core::', f'custom_op("{name}::')
    # triton reads the source again when a kernel first runs, so the file stays until the process ends
    path = Path(_folder().name) / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
