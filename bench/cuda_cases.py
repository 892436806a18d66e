"""Calls every CUDA launcher: with `small` once, at small sizes, for the sanitizers; with `target` at
those of the target table, timed in CUDA graphs, a line of JSON each. Needs a GPU and the extension
l0kernels._CUDA."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cli
import torch
from torch import Tensor

from l0kernels._calls import Gate, GateGrads, L0LinearCall, LinearCall, MlpCall, Wanted
from l0kernels._gates import DEFAULT_DIST, compact, round_up
from l0kernels.gates import split
from l0kernels.impl import cuda

IN_GRAPH, REPLAYS = 20, 15


@dataclass
class Call:
    name: str
    run: Callable[[], object]
    moved: int = 0  # bytes that have to be read and written at least
    target_us: float | None = None


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
    """What the issue sets figures for, at the sizes it names."""
    seed = torch.tensor([5]).to(device)
    large = [torch.randn(14336).to(device) for _ in range(32)]
    lenet = [torch.randn(n).to(device) for n in (784, 300, 100)]
    for name, vectors, target in (("32 x 14336", large, 4.0), ("784 300 100", lenet, None)):
        yield Call(f"sample {name}", partial(cuda.sample, vectors, seed, 0, DEFAULT_DIST), 0, target)
        yield Call(f"penalty {name}", partial(cuda.l0_penalty, vectors, [1.0] * len(vectors), DEFAULT_DIST))
    rows, cols = 14336, 4096
    weight = torch.randn(rows, cols, device=device).to(torch.bfloat16)
    size = weight.element_size()
    out = torch.empty_like(weight)
    yield Call("copy", partial(out.copy_, weight), 2 * weight.nbytes)
    # The shapes of the Triton rows: 14336 gates of a linear layer's rows, and of the next one's columns.
    for keep in (1.0, 0.5, 0.1):
        g = gate(rows, keep, device)
        part = int(g[2][0]) * cols
        gated: list[tuple[str, Tensor, Any, Any]] = [
            ("rows", weight, g, None),
            ("columns", weight.view(cols, rows), None, g),
        ]
        for what, full, gr, gc in gated:
            # Of a row that is open every sector is read, unless few columns are.
            read = part if what == "rows" else min(rows * cols, 16 * part)
            buffer = cuda.pack(full, gr, gc, full.dtype, skip_plain=False)
            pack = partial(cuda.pack, full, gr, gc, full.dtype, skip_plain=False, out=buffer)
            yield Call(f"pack {what} keep {keep}", pack, (read + part) * size)
            into: dict[str, Any] = {"scale_rows": True, "scale_cols": True, "out": out.view(full.shape)}
            unpack = partial(cuda.unpack, buffer, (full.shape[0], full.shape[1]), gr, gc, full.dtype, **into)
            yield Call(f"unpack {what} keep {keep}", unpack, (part + rows * cols) * size)
            unpack = partial(unpack, grads=GateGrads(full, rows=True, cols=True))
            # Of theta, the fractional rows, half of the open ones; of gated columns every sector.
            theta = part // 2 if what == "rows" else read
            yield Call(f"unpack {what} dz keep {keep}", unpack, (part + theta + rows * cols) * size)
    terms, gates = [(weight, 0, 1, 1)], [torch.randn(n, device=device) for n in (rows, cols)]
    coupled = partial(cuda.coupled_penalty, terms, gates, [0.0] * 2, 0.1, DEFAULT_DIST)
    yield Call("l2 penalty", coupled, weight.nbytes)
    one = torch.ones((), device=device)
    gradient = partial(cuda.coupled_penalty_grad, terms, gates, one, 0.1, DEFAULT_DIST)
    yield Call("l2 penalty, gradient of the weight", gradient, 2 * weight.nbytes)
    for keep in (1.0, 0.9, 0.5, 0.25, 0.1):
        yield Call(
            f"784-300-100-10 forward and backward keep {keep}",
            chain(100, (784, 300, 100, 10), torch.float32, keep, device),
        )


def time_us(run: Callable[[], object]) -> list[float]:
    """Microseconds per call in a CUDA graph of IN_GRAPH calls: p20, median, p80 of REPLAYS."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            run()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / IN_GRAPH * 1e3)
    p20, _, median, p80 = (statistics.quantiles(times[3:], n=10)[i] for i in (1, 3, 4, 7))
    return [p20, median, p80]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "cuda_cases.py target --only pack")
    parser.add_argument("which", choices=("small", "target"), help="for the sanitizers, or for timing")
    parser.add_argument("--once", action="store_true", help="only launch")
    parser.add_argument("--only", default="", help="calls whose name contains this")
    args = parser.parse_args(argv)
    reason = cuda.why_not()
    if reason is not None:
        raise SystemExit(f"the CUDA kernels cannot run: {reason}")
    torch.manual_seed(0)
    copy_gbs = None
    for call in (small_calls if args.which == "small" else target_calls)("cuda"):
        if args.only not in call.name and call.name != "copy":
            continue
        if args.which == "small" or args.once:
            call.run()
            torch.cuda.synchronize()
            print(f"{call.name}: launched", flush=True)
            continue
        p20, median, p80 = time_us(call.run)
        row: dict[str, object] = {
            "name": call.name,
            "us": round(median, 2),
            "p20": round(p20, 2),
            "p80": round(p80, 2),
        }
        if call.moved:
            gbs = call.moved / median / 1e3
            copy_gbs = gbs if call.name == "copy" else copy_gbs
            row |= {"gb_s": round(gbs), "of_copy": round(gbs / copy_gbs, 3) if copy_gbs else None}
        if call.target_us:
            row["target_us"] = call.target_us
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
