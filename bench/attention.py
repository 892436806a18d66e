"""Times attention whose heads are gated on a GPU: Triton's kernels, which skip the closed ones, beside
torch's attention of all heads, and that times z. Each call is replayed from a CUDA graph, forward alone and
with its backward, q, k and v as projections leave them. Prints microseconds and the ratio to torch's."""

import statistics
from collections.abc import Callable, Sequence

import cli
import torch
from torch.nn.functional import scaled_dot_product_attention

import l0kernels as l0
from l0kernels._gates import Gates
from l0kernels.triton_kernels import attention as kernels

SHAPES = ((8, 12, 128, 64), (8, 12, 512, 64), (8, 12, 2048, 64), (2, 32, 4096, 128))
"""B, heads, L, D."""
KEEPS = (1.0, 0.5, 0.25, 0.1)
CALLS, REPLAYS = 5, 20


def replayed_us(call: Callable[[], object]) -> float:
    """Median microseconds of a call, CALLS of which are one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def gates_of(heads: int, keep: float) -> Gates:
    """So many gates open, spread over the heads, every other one fractional; their z requires a gradient."""
    n = max(1, round(heads * keep))
    z = torch.zeros(heads, device="cuda")
    z[torch.linspace(0, heads - 1, n).round().long()] = torch.tensor([0.5, 1.0] * n)[:n].cuda()
    return Gates.from_z(z.requires_grad_(), full_grad=False)


def rows(
    shape: Sequence[int], keeps: Sequence[float], causal: bool, shared: int
) -> list[tuple[str, float, float]]:
    """(what, us forward, us of forward and backward) of every provider, torch's own first."""
    B, heads, L, D = shape
    counts = heads, heads // shared, heads // shared
    q, k, v = (
        torch.randn(B, L, n, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for n in counts
    )
    dy = torch.randn_like(q)

    def dense(_: Gates | None) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared > 1)

    def gated(gates: Gates | None) -> torch.Tensor:
        return l0.gated_attention(q, k, v, gates=gates, is_causal=causal)

    def times(what: str, call: Callable[[Gates | None], torch.Tensor], gates: Gates | None) -> None:
        def forward() -> object:
            with torch.no_grad():
                return call(gates)

        leaves = [q, k, v] if gates is None else [q, k, v, gates.z]
        both = replayed_us(lambda: torch.autograd.grad(call(gates), leaves, dy))
        found.append((what, replayed_us(forward), both))

    found: list[tuple[str, float, float]] = []
    times("torch", dense, None)
    times("torch times z", gated, gates_of(heads, 0.5))
    with l0.use_backend("triton"):
        times("triton, no gates", gated, None)
        for keep in keeps:
            gates = gates_of(heads, keep)
            times(f"triton, {int((gates.z != 0).sum())} of {heads} open", gated, gates)
    return found


def tile(text: str) -> tuple[str, int, kernels._Tile]:
    """KERNEL:D:ROWS,KEYS,WARPS,STAGES."""
    kernel, size, numbers = text.split(":")
    return kernel, int(size), kernels._Tile(*map(int, numbers.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "attention.py --causal --shape 2,32,4096,128")
    parser.add_argument("--shape", action="append", help="B,heads,L,D; those of the list unless given")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS), help="open shares of the heads")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--shared", type=int, default=1, help="heads of q per head of k")
    parser.add_argument(
        "--tile", action="append", type=tile, default=[], help="as dkv:128:64,64,8,2: another tile of 16 bits"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    for kernel, size, choice in args.tile:
        kernels._HALF[kernel][size] = kernels._HOPPER[kernel, size] = choice
    shapes = [tuple(map(int, text.split(","))) for text in args.shape] if args.shape else SHAPES
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, causal={args.causal}")
    for shape in shapes:
        print(
            f"\nB, heads, L, D = {shape}, {args.shared} of q per head of k".ljust(60),
            "forward us      / torch",
        )
        first: tuple[float, float] | None = None
        for what, *figures in rows(shape, args.keep, args.causal, args.shared):
            first = first or (figures[0], figures[1])
            pairs = (f"{us:10.1f} {us / dense:6.2f}" for us, dense in zip(figures, first, strict=True))
            print(f"  {what:30s}", *pairs, flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
