"""Launches every CUDA kernel once and names each call: with `small` at small sizes, edges included, for
the sanitizers; with `target` at the sizes of the target table, for a profiler (micro.py times them).
Needs a GPU and the extension l0kernels._CUDA."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import cli
import torch
from torch import Tensor

from l0kernels._calls import Gate, GateGrads, L0LinearCall, LinearCall, MlpCall, Wanted
from l0kernels._gates import DEFAULT_DIST, compact, round_up
from l0kernels.gates import split
from l0kernels.impl import cuda


class Call(NamedTuple):
    name: str
    run: Callable[[], object]


def gate(n: int, keep: float, device: str) -> list[Tensor]:
    """A gate whose open share is ``keep``, half of it fractional."""
    u = torch.rand(n)
    z = torch.where(u < keep, (2 * u / keep).clamp(max=1.0), torch.zeros(n))
    index, count = compact(z)
    if count[0] > cuda.TAU * n:
        count[1] = round_up(n)
    return [t.to(device) for t in (z, index, count)]


def small_calls(device: str) -> Iterator[Call]:
    """Everything once, edges included; inputs are made on the host, so that only our kernels run."""
    seed = torch.tensor([5]).to(device)
    for dtype in (torch.float32, torch.float64):
        log_alphas = [torch.randn(n, dtype=dtype).to(device) for n in (1, 300, 4500)]
        expected = torch.empty(3, dtype=dtype).to(device)
        yield Call("sample", partial(cuda.sample, log_alphas, seed, 0, DEFAULT_DIST, expected))
        yield Call("penalty", partial(cuda.l0_penalty, log_alphas, [1.0] * 3, DEFAULT_DIST))
        z = torch.rand(1000, dtype=dtype).to(device)
        yield Call("gate_grad", partial(cuda.gate_grad, z, z, DEFAULT_DIST))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        z_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (70, 300)
        full = torch.randn(shape, dtype=dtype).to(device)
        packed = torch.randn(128, 384, dtype=dtype).to(device)
        rows, cols, plain = (gate(n, k, device) for n, k in ((70, 0.5), (300, 0.3), (300, 1.0)))
        for g in (rows, cols, plain):
            g[0] = g[0].to(z_dtype)
        for r, c in itertools.product((None, rows), (None, cols, plain)):
            scale: dict[str, Any] = {"scale_rows": True, "scale_cols": True}
            yield Call("pack", partial(cuda.pack, full, r, c, dtype, **scale))
            grads = GateGrads(full, rows=True, cols=True)
            yield Call("unpack", partial(cuda.unpack, packed, shape, r, c, dtype, **scale, grads=grads))
        gates = [torch.randn(n, dtype=z_dtype).to(device) for n in shape]
        terms = [(full, 0, 1, 1)]
        yield Call("coupled", partial(cuda.coupled_penalty, terms, gates, [1.0] * 2, 0.1, DEFAULT_DIST))
        one = torch.ones((), dtype=z_dtype).to(device)
        gradient = partial(cuda.coupled_penalty_grad, terms, gates, one, 0.1, DEFAULT_DIST)
        yield Call("coupled, gradient", gradient)
        x, dy = torch.randn(33, 300, dtype=dtype).to(device), torch.randn(33, 70, dtype=dtype).to(device)
        bias = torch.randn(70, dtype=dtype).to(device)
        a_in, a_out = (torch.randn(n, dtype=z_dtype).to(device) for n in (300, 70))
        yield Call("small linear", partial(layer, x, full, bias, a_in, a_out, seed, dy))
        yield Call("small mlp", chain(33, (300, 70, 40, 10), dtype, 0.5, device))


def layer(
    x: Tensor, w: Tensor, b: Tensor, a_in: Tensor, a_out: Tensor, seed: Tensor, dy: Tensor
) -> list[Tensor | None]:
    """Forward and backward of a layer that draws its gates."""
    drawing = L0LinearCall(x, w, b, a_in, a_out, seed, DEFAULT_DIST, x.dtype)
    _, *drawn = cuda.l0_linear_forward(drawing)
    in_gate, out_gate = (list(gate[:3]) for gate in split([a_in, a_out], *drawn))
    call = LinearCall(x, w, b, in_gate, out_gate, True, x.dtype)
    return cuda.linear_backward(call, dy, [], Wanted([False] * 2, [True] * 5, DEFAULT_DIST))


def chain(
    m: int, sizes: tuple[int, ...], dtype: torch.dtype, keep: float, device: str
) -> Callable[[], object]:
    """Forward and backward of a gated chain."""
    x = torch.randn(m, sizes[0]).to(dtype).to(device)
    weights = [torch.randn(b, a).div(a**0.5).to(dtype).to(device) for a, b in itertools.pairwise(sizes)]
    biases: list[Tensor | None] = [torch.randn(n).to(dtype).to(device) for n in sizes[1:]]
    gates: list[Gate | None] = [gate(n, keep, device) for n in sizes[:-1]]
    if dtype == torch.float64:
        for g in gates:
            assert g is not None
            g[0] = g[0].double()
    dy = torch.randn(m, sizes[-1]).to(dtype).to(device)
    depth = len(weights)
    call = MlpCall(x, weights, biases, gates, "relu", dtype, False)
    wanted = Wanted([False] * depth, [False, *[True] * (3 * depth)], DEFAULT_DIST)

    def run() -> object:
        _, saved = cuda.mlp_forward(call)
        return cuda.mlp_backward(call, dy, saved, wanted)

    return run


def target_calls(device: str) -> Iterator[Call]:
    """The shapes of the target table: 14336 gates of a linear layer's rows, and of the next one's columns."""
    seed = torch.tensor([5]).to(device)
    large = [torch.randn(14336).to(device) for _ in range(32)]
    lenet = [torch.randn(n).to(device) for n in (784, 300, 100)]
    for name, vectors in (("32 x 14336", large), ("784 300 100", lenet)):
        yield Call(f"sample {name}", partial(cuda.sample, vectors, seed, 0, DEFAULT_DIST))
        yield Call(f"penalty {name}", partial(cuda.l0_penalty, vectors, [1.0] * len(vectors), DEFAULT_DIST))
    rows, cols = 14336, 4096
    weight = torch.randn(rows, cols, device=device).to(torch.bfloat16)
    out = torch.empty_like(weight)
    for keep in (1.0, 0.5, 0.1):
        g = gate(rows, keep, device)
        gated: list[tuple[str, Tensor, Any, Any]] = [
            ("rows", weight, g, None),
            ("columns", weight.view(cols, rows), None, g),
        ]
        for what, full, gr, gc in gated:
            buffer = cuda.pack(full, gr, gc, full.dtype, skip_plain=False)
            pack = partial(cuda.pack, full, gr, gc, full.dtype, skip_plain=False, out=buffer)
            yield Call(f"pack {what} keep {keep}", pack)
            into: dict[str, Any] = {"scale_rows": True, "scale_cols": True, "out": out.view(full.shape)}
            unpack = partial(cuda.unpack, buffer, (full.shape[0], full.shape[1]), gr, gc, full.dtype, **into)
            yield Call(f"unpack {what} keep {keep}", unpack)
            unpack = partial(unpack, grads=GateGrads(full, rows=True, cols=True))
            yield Call(f"unpack {what} dz keep {keep}", unpack)
    terms, gates = [(weight, 0, 1, 1)], [torch.randn(n, device=device) for n in (rows, cols)]
    yield Call("l2 penalty", partial(cuda.coupled_penalty, terms, gates, [0.0] * 2, 0.1, DEFAULT_DIST))
    one = torch.ones((), device=device)
    gradient = partial(cuda.coupled_penalty_grad, terms, gates, one, 0.1, DEFAULT_DIST)
    yield Call("l2 penalty, gradient of the weight", gradient)
    for keep in (1.0, 0.9, 0.5, 0.25, 0.1):
        yield Call(
            f"784-300-100-10 forward and backward keep {keep}",
            chain(100, (784, 300, 100, 10), torch.float32, keep, device),
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "cuda_cases.py target --only pack")
    parser.add_argument("which", choices=("small", "target"), help="for the sanitizers, or for a profiler")
    parser.add_argument("--only", default="", help="calls whose name contains this")
    args = parser.parse_args(argv)
    reason = cuda.why_not()
    if reason is not None:
        raise SystemExit(f"the CUDA kernels cannot run: {reason}")
    torch.manual_seed(0)
    for call in (small_calls if args.which == "small" else target_calls)("cuda"):
        if args.only in call.name:
            call.run()
            torch.cuda.synchronize()
            print(f"{call.name}: launched", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
