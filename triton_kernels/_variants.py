"""What a kernel module can launch, listed so that every configuration is compiled and checked without a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One kernel with one configuration, as triton.compile takes it.

    Attributes:
        name: unique within the package, "matmul/nt_bf16_128x256x64".
        kernel: the JIT function.
        signature: argument -> Triton type ("*bf16", "i32", "fp32"); ":16" appended where the launcher
            guarantees divisibility by 16.
        constexprs: argument -> value.
        num_warps, num_stages: launch options.
        expects: out of "tensor_core", "wide_copy" (TMA or 16-byte cp.async), "wide_load" (16-byte loads).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    expects: frozenset[str] = frozenset()
