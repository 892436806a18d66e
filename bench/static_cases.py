"""What is compiled without a GPU: the launches of calls of the package's launchers on meta tensors."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from l0kernels._calls import (
    AttentionCall,
    Conv2dCall,
    GateGrads,
    L0LinearCall,
    LinearCall,
    MlpCall,
    ProxCall,
    Wanted,
)
from l0kernels._gates import DEFAULT_DIST, HardConcrete, round_up
from l0kernels.budget import State
from l0kernels.triton_kernels import (
    attention,
    batch_norm,
    budget,
    conv2d,
    conv2d_channels,
    gather,
    linear,
    masked_linear,
    mlp,
    pack,
    penalty,
    prox,
    sample,
)
from l0kernels.triton_kernels._launch import recording

ARCHS = (80, 90, 100)
"""Compute capabilities that every kernel is compiled for: A100, H100 and H200, B200."""
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
"""Triton's names of the dtypes."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.empty(1, dtype=torch.int64, device="meta")


class Variant(NamedTuple):
    """One kernel with one configuration, as triton.compile takes it.

    Attributes:
        name: unique, "matmul/_matmul mlp gelu".
        kernel: the JIT function.
        signature: argument -> Triton type ("*bf16", "i32", "fp32"); ":16" appended where 16 divides it.
        constexprs: argument -> value.
        num_warps, num_stages: launch options.
        expects: out of "tensor_core" (wgmma on Hopper), "mma" (any instruction of the tensor cores),
            "wide_copy" (TMA or 16-byte cp.async), "wide_load" (16-byte loads).
        archs: the compute capabilities out of ARCHS that launch it.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    expects: frozenset[str] = frozenset()
    archs: tuple[int, ...] = ARCHS


class Case(NamedTuple):
    """A call to record.

    Attributes:
        archs: on which GPUs.
        precision: torch.set_float32_matmul_precision.
        only: constexprs of the launches that count, or "kernel", or "stem", how its module's name begins.
    """

    name: str
    call: Callable[[], object]
    archs: tuple[int, ...] = ARCHS
    precision: str = "high"
    only: Mapping[str, Any] = MappingProxyType({})


def new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gates(*sizes: int) -> list[list[Tensor]]:
    """[z, index, count] of each size, one behind the other as ``sample`` makes them; no count is aligned."""
    z = new(sum(sizes)).split(list(sizes))
    capacities = [round_up(n) for n in sizes]
    index = new(sum(capacities), dtype=torch.int32).split(capacities)
    counts = [count[2:] for count in new(4 * len(sizes), dtype=torch.int32).split(4)]
    return [list(gate) for gate in zip(z, index, counts, strict=True)]


def sample_cases() -> Iterator[Case]:
    for n in (100, 200, 400, 1000, 2000, 4000, 5000):
        for vectors in (1, 2):
            for name, expected in (("", None), (" expected", new(vectors))):
                call = partial(sample.sample, [new(n)] * vectors, SEED, 0, DEFAULT_DIST, expected)
                yield Case(f"{n} {'single' if vectors == 1 else 'table'}{name}", call)
    for n in (1000, 1024):
        yield Case(f"{n}", partial(sample.gate_grad, new(n), new(n), DEFAULT_DIST))


def penalty_cases() -> Iterator[Case]:
    single = [[100], [4000], [8000], [10000], [1 << 22]]
    for sizes in (*single, [100, 0], [200] * 4, [1000] * 4, [1000] * 8, [1000] * 9, [1 << 21] * 2):
        call = partial(penalty.l0_penalty, [new(n) for n in sizes], [1.0] * len(sizes), DEFAULT_DIST)
        yield Case(f"{len(sizes)}x{sizes[0]}", call)


def budget_cases() -> Iterator[Case]:
    double, integer = torch.float64, torch.int64
    for name, sizes, dists in (("small", [20, 7], 1), ("mlp", [784, 300, 100], 1), ("dists", [784], 2)):
        n, row, log_alphas = sum(sizes), budget.row_of(sizes), [new(size) for size in sizes]
        numbers = new(1, 4, dtype=double), new(n, dtype=torch.int32), new(n, dtype=double)
        of_dists = new(dists, 3), new(n, dtype=torch.int32)
        plan = budget.Plan(new(1, 32, dtype=integer), *numbers, *of_dists, row, row, n + 2, n)
        scalars = [new(1, dtype=dtype) for dtype in (double, double, integer, integer)]
        call = partial(budget.step, plan, log_alphas, [*log_alphas], State(new(n), *scalars), 100.0, 4.6)
        yield Case(name, call)


def prox_cases() -> Iterator[Case]:
    shrink, ridge, transformed, lasso, hard = (
        [1.0, 0.1, 0.1],
        [2.0, 0.1, 0.1],
        [3.0, 0.1, 1.0],
        [1.0, 0.1],
        [2.0, 0.1],
    )
    elements, rows, columns = [1, 1, 1 << 24], [1, 4096, 4096], [4096, 4096, 1]
    none: list[float] = []
    for name, dtype, stages, layout, by_element in (
        ("l1", FP32, (shrink, none, none), elements, False),
        ("l1 metric", FP32, (shrink, none, none), elements, True),
        ("l0 l2", BF16, (ridge, none, none), elements, False),
        ("l0 l2 metric", BF16, (ridge, none, none), elements, True),
        ("tl1", FP32, (transformed, none, none), elements, False),
        ("tl1 metric", FP16, (transformed, none, none), elements, True),
        ("lasso rows", FP32, (none, lasso, none), rows, False),
        ("lasso rows metric", BF16, (none, lasso, none), rows, True),
        ("lasso short rows", FP32, (none, lasso, none), [1, 4096, 9], False),
        ("lasso single", FP32, (none, lasso, none), [1, 4096, 1], False),
        ("sparse group rows", FP32, (shrink, lasso, none), [1, 512, 16384], False),
        ("tl1 rows metric", FP32, (none, lasso, transformed), [1, 4096, 4096], True),
        ("sparse group long rows metric", FP32, (shrink, lasso, none), [1, 16, 1 << 20], True),
        ("l0 columns", FP32, (none, hard, none), columns, False),
        ("sparse group columns", FP32, (shrink, lasso, none), columns, False),
        ("sparse group columns metric", FP32, (shrink, lasso, none), columns, True),
        ("tl1 group", BF16, (none, lasso, transformed), rows, False),
        ("odd", FP32, (none, lasso, transformed), [5, 7, 9], False),
    ):  # fmt: skip
        x = new(layout[0] * layout[1] * layout[2], dtype=dtype)
        step = new(x.numel()) if by_element and (stages[0] or stages[2]) else None
        group_step = new(layout[1], dtype=torch.float64) if by_element and stages[1] else None
        call = ProxCall(x, step, group_step, *stages, layout)
        yield Case(name, partial(prox.prox, [call], [x]))


def masked_linear_cases() -> Iterator[Case]:
    for dtype, shape in ((FP32, (64, 64)), (FP32, (63, 65)), (BF16, (64, 64)), (BF16, (1 << 16, 1 << 15))):
        weight, log_alpha = new(*shape, dtype=dtype), new(*shape)
        name = f"{TYPES[dtype]} {shape[0]}x{shape[1]}"
        yield Case(name, partial(masked_linear.masked_weight, weight, log_alpha, SEED, DEFAULT_DIST))
        grad = partial(masked_linear.masked_weight_grad, weight, weight, log_alpha, SEED, DEFAULT_DIST)
        yield Case(name, partial(grad, True, True))
    for precision, param, dtype, m, block, parts in (
        *(("high", BF16, BF16, 8192, block, "y d") for block in (7, 16, 32, 64, 128)),
        ("high", FP32, BF16, 8192, 16, "lists"),
        ("high", FP16, FP16, 8192, 64, "y dw"),
        ("high", FP16, FP16, 8192, 7, "lists"),
        ("high", BF16, BF16, 64, 32, "y"),
        ("high", BF16, BF16, 16, 32, "y"),
        ("high", FP32, FP32, 8192, 16, "y dw"),
        ("high", FP32, FP32, 8192, 128, "y dx dw"),
        ("high", FP32, FP32, 16, 64, "y"),
        ("highest", FP32, FP32, 8192, 64, "y dw lists"),
        ("highest", FP32, FP32, 8192, 7, "dx"),
        ("highest", FP32, FP32, 16, 64, "y"),
    ):
        yield from block_linear(precision, param, dtype, m, block, (4352, 1024), parts)
    yield from block_linear("high", BF16, BF16, 8192, 128, (128, 1024), "dw")


def block_linear(
    precision: str,
    param: torch.dtype,
    dtype: torch.dtype,
    m: int,
    block: int,
    shape: tuple[int, int],
    parts: str,
) -> Iterator[Case]:
    n_out, n_in = shape
    x, weight, dy = new(m, n_in, dtype=dtype), new(n_out, n_in, dtype=param), new(m, n_out, dtype=dtype)
    z = new(-(-n_out // block), -(-n_in // block))
    bias = new(n_out, dtype=param)
    forward = partial(masked_linear.block_linear_forward, x, weight, bias, z, block, block, dtype)
    backward = partial(masked_linear.block_linear_backward, dy, x, weight, z, block, block, False)
    only = {
        "y": ("HAS_BIAS", True),
        "dx": ("HAS_BIAS", False),
        "dw": ("NEED_W", True),
        "lists": ("ROWS", True),
    }
    for part in parts.split():
        name = f"{part} {precision} {TYPES[param]} {TYPES[dtype]} {m} {block}"
        call: Callable[[], object] = forward if part == "y" else partial(backward, dtype, [True] * 4)
        yield Case(name, call, ARCHS, precision, dict([only[part]] if part in only else []))


def batch_norm_cases() -> Iterator[Case]:
    for dtype, gated, training in (
        (BF16, True, True),
        (FP32, False, True),
        (FP32, False, False),
        (BF16, True, False),
    ):
        x = torch.empty(2, 320, 16, 16, dtype=dtype, device="meta", memory_format=torch.channels_last)
        p, gate = new(320), gates(320)[0] if gated else None
        name = f"{TYPES[dtype]}{'' if training else ' eval'}"
        yield Case(name, partial(batch_norm.batch_norm_forward, x, gate, p, p, p, p, training, 0.1, 1e-5))
        backward = partial(batch_norm.batch_norm_backward, x, x, gate, p, p, p, training, [True] * 3)
        yield Case(f"{name} backward", backward)


def pack_cases() -> Iterator[Case]:
    """Sizes that 8 divides and 16 does not, unless ``odd``."""
    R, C = 1000, 520

    def matrix(dtype: torch.dtype, rows: int = R, cols: int = C) -> Tensor:
        return new(rows, cols, dtype=dtype)

    def packed(name: str, full: Tensor, dtype: torch.dtype, rows: bool, cols: bool, **options: Any) -> Case:
        row, col = gates(*full.shape)
        return Case(
            f"{TYPES[full.dtype]} {TYPES[dtype]}{name}",
            partial(pack.pack, full, row if rows else None, col if cols else None, dtype, **options),
        )

    yield packed("", matrix(BF16), BF16, True, False)
    yield packed("", matrix(FP32), FP32, True, False)
    yield packed(" scaled", matrix(FP32), BF16, True, False, scale_rows=True)
    yield packed(" odd", matrix(BF16, cols=C + 1), BF16, True, False, scale_rows=True)
    yield packed("", matrix(BF16), BF16, False, True)
    yield packed(" scaled", matrix(BF16), BF16, False, True, scale_cols=True)
    yield packed(" rows", matrix(BF16), BF16, True, True)
    yield packed("", matrix(FP32), FP32, False, True)
    yield packed(" rows scaled", matrix(FP32), BF16, True, True, scale_rows=True, scale_cols=True)
    yield packed(" odd", matrix(BF16, cols=C + 1), BF16, False, True, scale_cols=True)
    yield packed(" bias", matrix(BF16, rows=1), BF16, False, True, skip_plain=False)
    yield packed(" strided", matrix(BF16, C, R).t(), BF16, False, True, skip_plain=False)

    def unpacked(
        name: str,
        dtype: torch.dtype,
        full: Tensor,
        rows: bool,
        cols: bool,
        dz: bool,
        full_rows: bool = False,
        **options: Any,
    ) -> Case:
        row, col = gates(*full.shape)
        given = [round_up(n) if gated else n for n, gated in zip(full.shape, (rows, cols), strict=True)]
        theta = {"grads": GateGrads(full, rows and "cols" not in name, cols, full_rows)} if dz else {}
        call = partial(
            pack.unpack,
            new(*given, dtype=dtype),
            (full.shape[0], full.shape[1]),
            row if rows else None,
            col if cols else None,
            full.dtype,
            **{"scale_rows": cols is False, "scale_cols": cols, **theta, **options},
        )
        return Case(f"{TYPES[dtype]} {TYPES[full.dtype]}{name}", call)

    few = matrix(BF16, 4, 4104)
    yield unpacked(" skip", BF16, few, True, False, False, skip_plain=True)
    yield unpacked(" dz", FP32, few, True, False, True)
    yield unpacked(" dz", FP32, matrix(FP32, 4, 4104), True, False, True, full_rows=True)
    yield unpacked(" odd", BF16, matrix(BF16, 4, 4105), True, False, False)
    yield unpacked("", BF16, matrix(BF16), False, True, False)
    yield unpacked(" skip", BF16, matrix(BF16, cols=16392), False, True, False, skip_plain=True)
    yield unpacked(" rows", BF16, matrix(BF16), True, True, False, scale_rows=True)
    yield unpacked(" dz", BF16, matrix(BF16), False, True, True)
    yield unpacked(" dz", FP32, matrix(BF16), False, True, True)
    yield unpacked(" rows, dz of cols", FP32, matrix(BF16), True, True, True)
    yield unpacked(" rows dz", FP32, matrix(FP32), True, True, True, scale_rows=True)
    yield unpacked(" rows dz", FP32, matrix(BF16), True, True, True, scale_rows=True)
    yield unpacked(" odd", BF16, matrix(BF16, cols=C + 1), False, True, False)
    yield unpacked(" bias", FP32, matrix(FP32, rows=1), False, True, True)
    # An odd row count leaves z unaligned; with an aligned one sm_90 spills 8 bytes.
    strided = GateGrads(matrix(BF16, R + 1, 2 * C)[:, ::2], cols=True)
    yield unpacked(" strided", BF16, matrix(BF16, R + 1), False, True, False, grads=strided)

    (gate,) = gates(C)
    for parts in (10, 100):
        reduce = partial(
            pack.reduce_partials, new(parts, 640), gate, C, dz=True, over_z=True, dist=DEFAULT_DIST
        )
        yield Case(f"{parts}", reduce)
    both = partial(pack.reduce_partials2, new(100, 640), new(100, 640), gate, C)
    yield Case("two", partial(both, over_z=True, dist=DEFAULT_DIST, dtype=BF16))
    yield Case("bf16", partial(pack.column_sums, matrix(BF16), BF16))


def layer(
    name: str,
    sizes: tuple[int, int, int],
    param: torch.dtype,
    dtype: torch.dtype,
    gated: str,
    archs: tuple[int, ...],
    precision: str = "high",
    needs: str = "x w b in out",
    dist: HardConcrete | None = DEFAULT_DIST,
    **only: Any,
) -> Iterator[Case]:
    """A linear layer (rows, inputs, outputs) with gates ``gated`` out of "in out", forward and backward."""
    M, K, N = sizes
    ins, outs = gates(K, N)
    in_gate, out_gate = (ins if "in" in gated else None), (outs if "out" in gated else None)
    x, dy, weight = new(M, K, dtype=dtype), new(M, N, dtype=dtype), new(N, K, dtype=param)
    bias = new(N, dtype=param) if gated or "b" in needs else None
    head = f"{name}{gated} {TYPES[param]} {TYPES[dtype]} {precision}"
    call = LinearCall(x, weight, bias, in_gate, out_gate, True, dtype)
    forward = partial(linear.linear_forward, call)
    if not needs:
        yield Case(head, forward, archs, precision, only)
        return
    wanted = [part in needs.split() for part in ("x", "w", "b", "in", "out")]
    wanted[3] &= in_gate is not None
    wanted[4] &= out_gate is not None
    yield Case(
        f"{head} backward",
        lambda: linear.linear_backward(call, dy, forward()[1], Wanted([False] * 2, wanted, dist)),
        archs,
        precision,
        only,
    )


def chain(
    sizes: tuple[int, int, int],
    param: torch.dtype,
    dtype: torch.dtype,
    activation: str,
    archs: tuple[int, ...],
    precision: str = "high",
    gated: str = "hidden",
    parts: str = "y d",
    depth: int = 2,
    **only: Any,
) -> Iterator[Case]:
    """Layers (tokens, width, hidden), gates before all or before all but the first."""
    T, D, H = sizes
    widths = [D, *[H] * (depth - 1)]
    glu = 2 if activation == "swiglu" else 1
    weights = [new(H * glu, width, dtype=param) for width in widths[:-1]] + [new(D, H, dtype=param)]
    biases: list[Tensor | None] = [new(w.shape[0], dtype=param) for w in weights]
    first, *rest = gates(*widths)
    layers = new(T, D, dtype=param), weights, biases, [first if gated == "all" else None, *rest]
    call = MlpCall(*layers, activation, dtype, False)
    needs = [*[True] * (1 + 2 * depth), gated == "all", *[True] * (depth - 1)]
    wanted, forward = Wanted([False] * depth, needs, DEFAULT_DIST), partial(mlp.mlp_forward, call)
    backward = lambda: mlp.mlp_backward(call, new(T, D, dtype=dtype), forward()[1], wanted)  # noqa: E731
    name = f"{activation} {gated} {T} {TYPES[param]} {TYPES[dtype]} {precision}"
    for part in parts.split():
        yield Case(f"{part} {name}", forward if part == "y" else backward, archs, precision, only)


def product_cases() -> Iterator[Case]:
    """Wide layers: every use of the product on sm_90, elsewhere those with most registers and masks."""
    large, others = (8192, 4096, 16384), (80, 100)
    for activation in ("gelu", "relu", "swiglu"):
        yield from chain(large, BF16, BF16, activation, (90,))
    yield from chain(large, BF16, BF16, "gelu", (90,), gated="all", parts="d", LAYOUT="nn")
    yield from layer("", large, BF16, BF16, "in", (90,))
    yield from layer("", large, BF16, BF16, "in out", (90,), needs="")
    yield from layer("", large, BF16, BF16, "out", ARCHS, needs="")
    yield from layer("", large, BF16, BF16, "out", (90,), needs="w", LAYOUT="tn")
    yield from layer("", large, BF16, BF16, "in", (80, 90), needs="w", LAYOUT="tn")
    yield from chain(large, BF16, BF16, "gelu", others, parts="y", EPILOGUE="act")
    yield from chain(large, BF16, BF16, "gelu", (100,), parts="d", EPILOGUE="grad")
    yield from chain(large, BF16, BF16, "gelu", others, parts="d", SCATTER=True)
    yield from chain(large, BF16, BF16, "gelu", (80,), parts="d", LAYOUT="tn")
    yield from chain(large, BF16, BF16, "relu", others, parts="d", EPILOGUE="grad")
    yield from chain(large, BF16, BF16, "swiglu", others, parts="y", EPILOGUE="glu")
    yield from chain(large, BF16, BF16, "swiglu", others, parts="d", EPILOGUE="glu_grad")
    yield from chain(large, FP16, FP16, "gelu", (90,), parts="y", EPILOGUE="act")
    yield from layer("unaligned ", (8192, 4096, 16388), BF16, BF16, "out", (90,), needs="", LAYOUT="nt")
    yield from chain((1024, 512, 1024), BF16, BF16, "gelu", (90, 100), parts="d", EPILOGUE="grad")
    with patch.dict(os.environ, {"L0KERNELS_TRITON_GATHER": "0"}):
        yield from chain((64, 512, 1024), BF16, BF16, "gelu", (90, 100), parts="y", EPILOGUE="act")
    yield from layer("autocast ", large, FP32, BF16, "in", (90, 100), needs="w", LAYOUT="tn")
    yield from chain(large, FP32, FP32, "gelu", (90, 100), "highest", parts="y", EPILOGUE="act")
    yield from chain(large, FP32, FP32, "relu", (80,), "highest", parts="d", EPILOGUE="grad")
    yield from chain(large, FP32, FP32, "swiglu", (90, 100), "highest", parts="d", EPILOGUE="glu_grad")
    yield from chain(large, FP32, FP32, "gelu", (80, 90), parts="y", EPILOGUE="act")
    yield from chain(large, FP32, FP32, "gelu", (90,), parts="d", LAYOUT="tn", SCATTER=False)
    yield from chain(large, FP32, FP32, "swiglu", (90, 100), parts="y", EPILOGUE="glu")
    yield from layer("", large, FP32, FP32, "out", (100,), needs="", LAYOUT="nt")


def gather_cases() -> Iterator[Case]:
    """Small layers, every tile: rows, inputs and outputs that 16 does not divide."""
    for precision, dtype in (("highest", FP32), ("high", FP32), ("high", BF16)):
        small = partial(layer, param=dtype, dtype=dtype, archs=ARCHS, precision=precision)
        forward = ((1020, 102, 1020), (510, 102, 510), (250, 102, 510), (120, 102, 510), (16, 102, 100))
        for sizes in forward[:: 2 if dtype == FP32 and precision == "high" else 1]:
            yield from small("", sizes, gated="in out", needs="")
        inner = partial(chain, param=dtype, dtype=dtype, activation="gelu", archs=ARCHS, precision=precision)
        yield from inner((16, 102, 100), depth=3, parts="y", X_PACKED=True, Y_PACKED=True)
        for M, K, N in ((20, 3900, 100), (16, 102, 100), (60, 102, 100), (100, 102, 100)):
            only: dict[str, Any] = {} if dtype == BF16 and M == 20 else {"NEED_W": True}
            yield from small("", (M, K, N), gated="in out", **only)
            if precision == "highest" or dtype == BF16:
                yield from inner((M, N, K), depth=3, parts="d", X_PACKED=True, DY_PACKED=True)
        log_alpha = new(4002)
        for M in (128, 20, 16) if precision == "highest" or dtype == BF16 else ():
            x, weight = new(M, 4002, dtype=dtype), new(4002, 4002, dtype=dtype)
            bias = new(4002, dtype=dtype)
            call = L0LinearCall(x, weight, bias, log_alpha, log_alpha, SEED, DEFAULT_DIST, dtype)
            yield Case(f"drawn {M} {TYPES[dtype]}", partial(gather.l0_linear_forward, call), ARCHS, precision)
    for result in ("x", "w", "b", "in", "out"):
        gated = "in out" if result in ("in", "out") else ""
        yield from small(f"only {result}", (100, 102, 100), gated=gated, needs=result, dist=None, DLOG=False)


def conv2d_cases() -> Iterator[Case]:
    """A wide layer, gated and packed, in every dtype; narrow ones, strided ones, odd channels, groups."""
    for name, dtype, n_in, n_out, stride, sides, archs, precision in (
        ("wide", BF16, 640, 640, 1, "packed packed", ARCHS, "high"),
        ("mid", BF16, 320, 320, 1, "dense dense", (90,), "high"),
        ("plain", BF16, 320, 160, 2, "", (90,), "high"),
        ("narrow", FP16, 64, 64, 1, "", (90, 100), "high"),
        ("odd", BF16, 24, 20, 1, "dense dense", (80, 90), "high"),
        ("tf32", FP32, 320, 320, 1, "packed packed", (90,), "high"),
        ("ieee", FP32, 320, 320, 1, "dense dense", (90,), "highest"),
    ):
        yield from convolution(name, dtype, (n_in, n_out, 1), stride, sides, archs, precision, stem="conv2d")
    for sides in ("packed dense", "dense packed"):
        yield from convolution("mid", BF16, (320, 320, 1), 1, sides, (90,), kernel="_conv_dw")
    yield from convolution("pointwise", BF16, (640, 640, 1), 1, "packed dense", (90,), LAYOUT="nt")
    yield from convolution("groups", FP32, (320, 640, 16), 1, "", ARCHS)
    yield from convolution("groups", FP32, (320, 640, 16), 1, "packed dense", ARCHS)
    yield from convolution("groups", FP32, (320, 640, 16), 1, "packed packed", ARCHS, NATURAL=False)
    for groups, n_out in ((320, 320), (16, 640)):
        for sides in ("dense dense", "dense packed", "packed dense", "packed packed"):
            yield from convolution(f"groups {groups}", BF16, (320, n_out, groups), 1, sides, ARCHS)
    x = torch.empty(2, 320, 16, 16, dtype=BF16, device="meta", memory_format=torch.channels_last)
    yield Case("bf16", partial(conv2d_channels.pack_channels, x, gates(320)[0], BF16))


def attention_cases() -> Iterator[Case]:
    """Every tile; then masks, dropout, keys that heads share, odd sizes, and few rows, at one head size."""
    for D in (32, 64, 128, 256):
        yield from attended("half", BF16, (1024, 1024, D))
        if D < 256:  # there dq spills 224 bytes: both operands of its products stay in registers
            yield from attended("ieee", FP32, (1024, 1024, D), "highest")
        yield from attended("tf32", FP32, (1024, 1024, D))
    even, odd = (1024, 1024, 64), (517, 389, 80)
    for D in (64, 256):
        yield from attended("causal", BF16, (1024, 1024, D), is_causal=True)
    padding, by_row = torch.bool, torch.float32
    yield from attended("padding", BF16, even, mask=new(2, 1, 1, 1024, dtype=padding))
    yield from attended("bias", FP16, even, mask=new(4, 1024, 1024, dtype=by_row))
    yield from attended("odd", FP16, odd, is_causal=True)
    yield from attended("decoding", BF16, (1, 1024, 128))
    yield from attended("dropout ungated", BF16, even, gated=False, seed=SEED, dropout=0.1)
    yield from attended("shared", BF16, even, shared=4)


def attended(
    name: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    precision: str = "high",
    *,
    gated: bool = True,
    shared: int = 1,
    mask: Tensor | None = None,
    **options: Any,
) -> Iterator[Case]:
    """2 x 4 heads of q of (rows, keys, head size), as projections leave them, ``shared`` to a head of k."""
    L, S, D = sizes
    q, k = (new(2, n, h, D, dtype=dtype).transpose(1, 2) for n, h in ((L, 4), (S, 4 // shared)))
    z = new(4) if gated else None
    options = {"seed": None, "is_causal": False, "dropout": 0.0} | options
    call = AttentionCall(q, k, k, z, mask, scale=0.125, **options)
    name = f"{name} {TYPES[dtype]} {D}"
    yield Case(name, partial(attention.attention_forward, call), ARCHS, precision)

    def backward() -> None:
        y, saved = attention.attention_forward(call)
        attention.attention_backward(call, y, [y, *saved], Wanted([False], [True] * 3 + [gated], None))

    yield Case(f"{name} backward", backward, ARCHS, precision)


def convolution(
    name: str,
    dtype: torch.dtype,
    channels: tuple[int, int, int],
    stride: int,
    sides: str,
    archs: tuple[int, ...],
    precision: str = "high",
    **only: Any,
) -> Iterator[Case]:
    """3x3 (1x1 if ``pointwise``) over (inputs, outputs, groups); ``sides``: how those lie that have gates."""
    n_in, n_out, groups = channels
    ins, outs = gates(n_in, n_out) if sides else (None, None)
    in_packed, out_packed = (side == "packed" for side in (sides or "dense dense").split())
    x, dy = (
        torch.empty(2, n, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for n, size in ((n_in, 16), (n_out, 16 // stride))
    )
    size, padding = (1, 0) if name == "pointwise" else (3, 1)
    weight, bias = new(n_out, n_in // groups, size, size, dtype=dtype), new(n_out, dtype=dtype)
    call = Conv2dCall(
        x, weight, bias, ins, outs, True, True, in_packed, out_packed,
        [stride] * 2, [padding] * 2, [1, 1], groups, dtype,
    )  # fmt: skip
    forward = partial(conv2d.conv2d_forward, call)
    name = f"{name} {TYPES[dtype]} {sides or 'ungated'}"
    yield Case(name, forward, archs, precision, only)
    wanted = Wanted([False] * 2, [True] * 3 + [bool(sides)] * 2, DEFAULT_DIST)
    backward = lambda: conv2d.conv2d_backward(call, dy, forward()[1], wanted)  # noqa: E731
    yield Case(f"{name} backward", backward, archs, precision, only)


ALL_CASES = (
    sample_cases,
    penalty_cases,
    budget_cases,
    prox_cases,
    masked_linear_cases,
    batch_norm_cases,
    pack_cases,
    product_cases,
    gather_cases,
    conv2d_cases,
    attention_cases,
)


def expectations(kernel: str, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> frozenset[str]:
    """Instructions without which such a variant would be slow."""
    tensors = () if constexprs.get("PRECISION") == "ieee" else ("tensor_core",)
    match kernel:
        case "_matmul" | "_conv":
            return frozenset({*tensors, "wide_copy"})
        case "_conv_dw":  # wgmma turns no 32-bit operand around: they are copied in pieces of 4 bytes
            turned = "*fp32:16" in (signature.get("x_full_ptr"), signature.get("x_packed_ptr"))
            return frozenset(tensors if turned else {*tensors, "wide_copy"})
        case "_product_kernel" | "_weight_grad_kernel" if tensors:
            # Narrow blocks have no wide copies, nor have TF32 operands, where they are transposed on the way.
            turned = kernel == "_weight_grad_kernel" or constexprs.get("stride_wn") == 1
            of_fp32 = signature.get("a_ptr", signature.get("x_ptr")) == "*fp32:16"
            rows = constexprs["BLOCK_K" if kernel == "_weight_grad_kernel" else "BLOCK_M"]
            copies = ("wide_copy",) if constexprs["B_K"] >= 16 and not (of_fp32 and turned) else ()
            return frozenset({"tensor_core" if rows >= 64 else "mma", *copies})
        case "_attention" | "_attention_dq" | "_attention_dkv" if tensors:
            rows = constexprs["BLOCK_N" if kernel == "_attention_dkv" else "BLOCK_M"]
            of_fp32 = signature["q_ptr"].startswith("*fp32")  # their products turn no operand around
            copies = () if of_fp32 else ("wide_copy",)
            return frozenset({"tensor_core" if rows >= 64 else "mma", *copies})
        case "_moments" | "_normalise" | "_grad_sums" | "_grad":
            wide = True
        case "_pack_rows" | "_pack_cols" | "_unpack_rows" | "_unpack_cols":
            wide = constexprs["VEC"] == 8 and constexprs["UNIT"]
        case "_masked_weight_kernel" | "_masked_weight_grad_kernel" | "_gate_grad_kernel" | "_prox_kernel":
            wide = signature["n"].endswith(":16")
        case _:
            wide = kernel == "_prepare_kernel" and constexprs["B_K"] >= 16
    return frozenset({"wide_load"} if wide else ())


@cache
def variants() -> dict[str, Variant]:
    """All that the cases launch, by name; one for all cases and GPUs that launch the same."""
    found: dict[Any, list[Any]] = {}
    before = torch.get_float32_matmul_precision()
    try:
        for case in (case for cases in ALL_CASES for case in cases()):
            torch.set_float32_matmul_precision(case.precision)
            for arch in case.archs:
                with recording(partial(_record, found, case, arch), (arch, 132)):
                    case.call()
    finally:
        torch.set_float32_matmul_precision(before)
    named: dict[str, list[Variant]] = {}
    for (kernel, signature, constants, warps, stages), (name, archs) in found.items():
        types, constexprs = dict(signature), dict(constants)
        expects = expectations(kernel.__name__, types, constexprs)
        variant = Variant(name, kernel, types, constexprs, warps, stages, expects, tuple(sorted(archs)))
        named.setdefault(name, []).append(variant)
    return {variant.name: variant for alike in named.values() for variant in _told_apart(alike)}


def _record(
    found: dict[Any, list[Any]],
    case: Case,
    arch: int,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    constants: dict[str, Any],
) -> None:
    """Enters what Triton would compile for this launch."""
    module = kernel.__module__.rpartition(".")[2]
    facts = {**constants, "kernel": kernel.__name__, "stem": module.partition("_")[0]}
    if any(facts.get(key) != value for key, value in case.only.items()):
        return
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for param, value in zip(kernel.params, args, strict=False):
        if isinstance(value, Tensor):
            kind, divisible = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, divisible = "fp32", False
        elif value is None or (value == 1 and not param.do_not_specialize):
            constexprs[param.name] = value
            continue
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not param.do_not_specialize
        signature[param.name] = f"{kind}:16" if divisible else kind
    key = kernel, (*signature.items(),), (*(constexprs | constants).items(),), num_warps, num_stages
    name = f"{module}/{kernel.__name__.lstrip('_')} {case.name}".replace(" ", "_")
    found.setdefault(key, [name, set()])[1].add(arch)


def _told_apart(alike: list[Variant]) -> Iterator[Variant]:
    """Variants of one name with what distinguishes them behind it."""
    facts = [
        {**v.signature, **v.constexprs, "warps": v.num_warps, "stages": v.num_stages, "sm": v.archs}
        for v in alike
    ]
    chosen: list[str] = []

    def kinds(keys: list[str]) -> int:
        return len({tuple(str(fact.get(key)) for key in keys) for fact in facts})

    while kinds(chosen) < len(alike):
        chosen.append(max({key: 0 for fact in facts for key in fact}, key=lambda key: kinds([*chosen, key])))
    for variant, fact in zip(alike, facts, strict=True):
        yield variant._replace(name="_".join([variant.name, *(f"{key}:{fact.get(key)}" for key in chosen)]))
