"""Compile the attention kernels for a GPU that need not be here: `compile_kernels.py DTYPE HEAD_DIM CAPABILITY ...`.

Prints one JSON object: per capability and kernel the bytes of shared memory it needs. Not a test: it runs in a process
of its own, because triton decides when it is loaded whether it compiles or interprets.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llava_core.ops import triton_attention as kernel

POINTERS = {"lse": "*fp32", "delta": "*fp32", "ends": "*i32", "visit": "*i32", "scale": "fp32", "factor": "fp32"}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compiled(function: Any, cut: kernel.Blocks, capability: int, dtype: torch.dtype, head_dim: int) -> Any:
    """A kernel as `triton_attention` launches it: pointers and steps are multiples of 16."""
    constants = kernel._constants(torch.empty(0, head_dim, dtype=dtype)) | {"block_q": cut.q, "block_k": cut.k}
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
            continue
        matrix = name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
        signature[name] = f"*{SHORT[dtype]}" if matrix else POINTERS.get(name, "i32")
        steps = name.endswith(("_row", "_head", "_token")) and not name.startswith(("ends", "visit"))
        if steps or signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    """Compile all kernels with the table's blocks."""
    dtype, head_dim = getattr(torch, sys.argv[1]), int(sys.argv[2])
    cuts = [*kernel.blocks(head_dim, dtype), kernel.Blocks(64, 64, 4, 3)]
    functions = [kernel._forward, kernel._backward_q, kernel._backward_kv, kernel._overlap]
    found: dict[str, dict[str, int]] = {}
    for capability in sys.argv[3:]:
        for function, cut in zip(functions, cuts, strict=True):
            made = compiled(function, cut, int(capability), dtype, head_dim)
            found.setdefault(capability, {})[function.__name__] = made.metadata.shared
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
