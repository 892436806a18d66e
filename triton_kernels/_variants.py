"""What a kernel module can launch, listed so that all of it is compiled and checked without a GPU."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
"""Triton's names of the dtypes."""


def recorder(
    found: list[Variant],
    name: str,
    expects: Mapping[str, frozenset[str]] | None = None,
    archs: tuple[int, ...] = ARCHS,
) -> Callable[..., None]:
    """A stand-in for ``launch`` that appends to ``found`` what would have been launched.

    Args:
        name: of the variant; the kernel's name goes before it, "stem/_kernel name".
        expects: by the kernel's name.
        archs: of the variants.
    """

    def run(
        kernel: Any,
        grid: tuple[int, ...],
        *given: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        signature: dict[str, str] = {}
        constexprs = dict(constants)
        for param, value in zip(kernel.params, given, strict=False):
            key = param.name
            if isinstance(value, Tensor):
                signature[key] = f"*{TYPES[value.dtype]}:16"
            elif isinstance(value, float):
                signature[key] = "fp32"
            elif value is None:
                constexprs[key] = None
            elif param.do_not_specialize:
                signature[key] = "i32"
            elif value == 1:  # as Triton itself, which makes a constant of a 1
                constexprs[key] = 1
            else:
                signature[key] = "i32:16" if value % 16 == 0 else "i32"
        of_kernel = (expects or {}).get(kernel.__name__, frozenset())
        title = name.replace("/", f"/{kernel.__name__.lstrip('_')}_", 1)
        found.append(Variant(title, kernel, signature, constexprs, num_warps, num_stages, of_kernel, archs))

    return run
