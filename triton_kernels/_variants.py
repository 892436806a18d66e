"""What a kernel module can launch, listed so that all of it is compiled and checked without a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ARCHS = (80, 90, 100)
"""Compute capabilities that every kernel is compiled for: A100, H100 and H200, B200."""


class Variant(NamedTuple):
    """One kernel with one configuration, as triton.compile takes it.

    Attributes:
        name: unique within the package, "matmul/nt_bf16_128x256x64".
        kernel: the JIT function.
        signature: argument -> Triton type ("*bf16", "i32", "fp32"); ":16" appended where the launcher
            guarantees divisibility by 16.
        constexprs: argument -> value.
        num_warps, num_stages: launch options.
        expects: out of "tensor_core" (wgmma on Hopper), "mma" (any instruction of the tensor cores),
            "wide_copy" (TMA or 16-byte cp.async), "wide_load" (16-byte loads).
        archs: the compute capabilities out of ARCHS that it is meant for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    expects: frozenset[str] = frozenset()
    archs: tuple[int, ...] = ARCHS
