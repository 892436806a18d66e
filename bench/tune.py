"""Prints TFLOP/s of the product's tiles beside torch's product, on this GPU: what decides `choose` in
triton_kernels/matmul.py. Every use of the product is timed at full extent, where nothing is skipped: the
share of the dense library's rate is the price of all that the kernel can do."""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import cli
import torch
import triton
from triton.testing import do_bench

from l0kernels.triton_kernels.matmul import Config, Epilogue, Halves, Operand, matmul

SHAPE = (8192, 14336, 4096)  # tokens, hidden, model
CANDIDATES = {
    "linear": [
        Config(128, 256, 64, 8, 3, 1),
        Config(128, 256, 64, 8, 3, 2),
        Config(128, 256, 64, 8, 3, 4),
        Config(128, 256, 64, 8, 4, 4),
        Config(128, 256, 64, 8, 3, 2, False),
        Config(256, 128, 64, 8, 3, 2),
        Config(128, 128, 64, 8, 4, 2),
        Config(128, 128, 64, 4, 3, 2),
        Config(128, 128, 128, 8, 3, 2),
        Config(128, 256, 64, 8, 4, 2, False),
        Config(128, 128, 64, 4, 3, 2, True, 2),
        Config(128, 128, 64, 4, 3, 4, False, 2),
        Config(64, 256, 64, 4, 2, 4, True, 2),
    ],
    "act": [
        Config(128, 128, 64, 4, 3, 2, True, 2),
        Config(128, 128, 64, 4, 3, 4, True, 2),
        Config(128, 128, 64, 4, 3, 8, True, 2),
        Config(128, 128, 64, 4, 3, 4, False, 2),
        Config(64, 256, 64, 4, 2, 8, True, 2),
        Config(128, 256, 64, 8, 3, 2),
        Config(128, 256, 64, 8, 3, 4),
        Config(128, 256, 64, 8, 3, 8),
        Config(128, 256, 64, 8, 3, 8, False),
        Config(256, 128, 64, 8, 3, 4),
        Config(256, 128, 64, 8, 3, 8),
        Config(128, 128, 64, 8, 4, 4),
        Config(128, 128, 64, 8, 3, 4, False),
    ],
    "glu": [
        Config(128, 128, 64, 8, 3, 4),
        Config(128, 128, 64, 8, 4, 4),
        Config(128, 64, 64, 4, 3, 2, True, 2),
        Config(128, 64, 64, 4, 3, 1, False, 2),
    ],
}


def works(tokens: int, hidden: int, model: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """(name, kind of candidates, flops, dense product, gated product of a config)."""
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    x, w1, w2, dy = (
        new(tokens, model),
        new(hidden, model) * 0.02,
        new(model, hidden) * 0.02,
        new(tokens, model),
    )
    h, a, bias = new(tokens, hidden), new(tokens, hidden), new(hidden)
    up, down = torch.empty_like(h), torch.empty_like(x)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    z = torch.ones(hidden, device="cuda")
    gate = [
        z,
        torch.arange(hidden, device="cuda", dtype=torch.int32),
        torch.full((2,), hidden, device="cuda", dtype=torch.int32),
    ]
    partial = torch.empty(3, triton.cdiv(tokens, 64), hidden, device="cuda")
    flops = 2.0 * tokens * hidden * model
    both = lambda t: Operand(t, t)  # noqa: E731
    size = (tokens, hidden, model)
    yield (
        "up nt",
        "linear",
        flops,
        lambda: torch.mm(x, w1.t(), out=up),
        lambda c: matmul("nt", Operand(x), Operand(w1), Operand(up), size, config=c),
    )
    gelu, gelu_backward = torch.nn.functional.gelu, torch.ops.aten.gelu_backward
    yield "up nt gelu", "act", flops, lambda: gelu(torch.addmm(bias, x, w1.t(), out=up)), lambda c: matmul(
        "nt", Operand(x), both(w1), Operand(None, up), size, n_gate=gate,
        epilogue=Epilogue("act", "gelu", bias, scale_n=True, saved=a), config=c
    )  # fmt: skip
    yield (
        "down nt",
        "linear",
        flops,
        lambda: torch.mm(h, w2.t(), out=down),
        lambda c: matmul(
            "nt", Operand(None, h), both(w2), Operand(down), (tokens, model, hidden), k_gate=gate, config=c
        ),
    )
    yield (
        "dh nn",
        "linear",
        flops,
        lambda: torch.mm(dy, w2, out=up),
        lambda c: matmul("nn", Operand(dy), Operand(w2), Operand(up), size, config=c),
    )
    yield "dh nn gelu'", "act", flops, lambda: gelu_backward(torch.mm(dy, w2, out=up), a), lambda c: matmul(
        "nn", Operand(dy), both(w2), Operand(None, up), size, n_gate=gate,
        epilogue=Epilogue("grad", "gelu", scale_n=True, saved=a, hidden=Operand(None, h), partial=partial,
                          dz=True, db=True),
        config=c
    )  # fmt: skip
    yield (
        "dx nn",
        "linear",
        flops,
        lambda: torch.mm(h, w1, out=down),
        lambda c: matmul(
            "nn", Operand(None, h), both(w1), Operand(down), (tokens, model, hidden), k_gate=gate, config=c
        ),
    )
    yield (
        "dw2 tn",
        "linear",
        flops,
        lambda: torch.mm(dy.t(), h, out=dw2),
        lambda c: matmul(
            "tn", Operand(dy), Operand(None, h), both(dw2), (model, hidden, tokens), n_gate=gate, config=c
        ),
    )
    yield (
        "dw1 tn scatter",
        "linear",
        flops,
        lambda: torch.mm(h.t(), x, out=dw1),
        lambda c: matmul(
            "tn",
            Operand(None, h),
            Operand(x),
            Operand(dw1),
            (hidden, model, tokens),
            m_gate=gate,
            epilogue=Epilogue(scatter=True),
            config=c,
        ),
    )
    w13 = new(2 * hidden, model) * 0.02
    wide = new(tokens, 2 * hidden)
    dwide = torch.empty_like(wide)
    yield "up nt swiglu", "glu", 2 * flops, lambda: torch.mm(x, w13.t()), lambda c: matmul(
        "nt", Operand(x), both(w13), Operand(None, up), size, n_gate=gate,
        epilogue=Epilogue("glu", "silu", scale_n=True, saved=wide),
        halves=Halves(b=(hidden, hidden), saved=hidden), config=c
    )  # fmt: skip
    yield "dh nn swiglu'", "glu", flops, lambda: torch.mm(dy, w2, out=up), lambda c: matmul(
        "nn", Operand(dy), both(w2), Operand(None, dwide), size, n_gate=gate,
        epilogue=Epilogue("glu_grad", "silu", scale_n=True, saved=wide, hidden=Operand(None, h),
                          partial=partial, dz=True),
        halves=Halves(c=hidden, saved=hidden), config=c
    )  # fmt: skip


def compile_only(task: tuple[int, int]) -> str:
    """In a process of its own, so that the timing process finds every kernel compiled."""
    number, candidate = task
    name, kind, _, _, ours = next(itertools.islice(works(256, 512, 256, torch.bfloat16), number, None))
    try:
        ours(CANDIDATES[kind][candidate])
        torch.cuda.synchronize()
        return ""
    except Exception as error:
        return f"{name} {tuple(CANDIDATES[kind][candidate])}: {type(error).__name__} {str(error)[:200]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "tune.py --quick")
    parser.add_argument("--quick", action="store_true", help="the first two candidates of each use")
    arguments = parser.parse_args(argv)
    tasks = [
        (i, j)
        for i, (_, kind, *_) in enumerate(works(256, 512, 256, torch.bfloat16))
        for j in range(len(CANDIDATES[kind][: 2 if arguments.quick else None]))
    ]
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        failures = [line for line in pool.map(compile_only, tasks, chunksize=1) if line]
    print("\n".join(failures) or "all compiled", flush=True)
    for i, (name, kind, flops, dense, ours) in enumerate(works(*SHAPE, torch.bfloat16)):
        rate = lambda f, flops=flops: flops / do_bench(f, warmup=20, rep=80, return_mode="median") / 1e9  # noqa: E731
        base = rate(dense)
        print(f"{name:16} torch {base:6.0f} TFLOP/s", flush=True)
        for j, config in enumerate(CANDIDATES[kind]):
            if (i, j) not in tasks or any(line.startswith(f"{name} {tuple(config)}:") for line in failures):
                continue
            try:
                ours_rate = rate(lambda config=config, ours=ours: ours(config))
                print(f"    {ours_rate:6.0f}  {ours_rate / base:5.3f}  {tuple(config)}", flush=True)
            except Exception as error:
                print(f"    {tuple(config)} {type(error).__name__} {str(error)[:100]}", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
