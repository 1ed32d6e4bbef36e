"""Compile the attention kernels for GPUs that are not present: `compile_kernels.py DTYPE HEAD_DIM CAPABILITY ...`.

Prints one JSON object: per capability and kernel the bytes of shared memory. Not a test: it runs in its own process,
because triton chooses between compiler and interpreter when it is imported.
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

POINTERS = {"lse": "*fp32", "delta": "*fp32", "ends": "*i32", "table": "*i32", "scale": "fp32", "factor": "fp32"}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compiled(function: Any, sizes: kernel.Blocks, capability: int, dtype: torch.dtype, head_dim: int) -> Any:
    """Compile a kernel as `triton_attention` launches it: pointers and strides are multiples of 16."""
    constants = kernel._constants(torch.empty(0, head_dim, dtype=dtype)) | {"block_q": sizes.q, "block_k": sizes.k}
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
            continue
        matrix = name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
        signature[name] = f"*{SHORT[dtype]}" if matrix else POINTERS.get(name, "i32")
        strides = name.startswith("stride_") and name not in ("stride_ends", "stride_table")
        if strides or signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    """Compile all kernels with the default block sizes."""
    dtype, head_dim = getattr(torch, sys.argv[1]), int(sys.argv[2])
    sizes = [*kernel.blocks(head_dim, dtype), kernel.Blocks(64, 64, 4, 3)]
    functions = [kernel._fwd, kernel._bwd_dq, kernel._bwd_dkdv, kernel._bwd_preprocess]
    actual: dict[str, dict[str, int]] = {}
    for capability in sys.argv[3:]:
        for function, size in zip(functions, sizes, strict=True):
            binary = compiled(function, size, int(capability), dtype, head_dim)
            actual.setdefault(capability, {})[function.__name__] = binary.metadata.shared
    sys.stdout.write(json.dumps(actual))


if __name__ == "__main__":
    main()
