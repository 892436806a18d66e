"""Sets what a work must compute and move against what was measured, and names what limits it. Bytes are
those of a step that reads each operand of a product and writes each result once (nothing stays in a cache
between products; gradients of closed units are written, as zeros). The processor's rate is the best of
any large dense row of that dtype in the file (of another one, where there is none), its bandwidth that of
the row `copy`. What takes longest at these rates limits a work; where both together explain less than
half of the time, fixed costs do (launches, autograd)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cli
import torch
from found import Found, device_files, load
from nets import NETS
from registry import DENSE, WORKS, Work, keep_name
from rows import Row, machine
from table import PASS_NAMES, header, line

ITEMSIZE = {"float32": 4, "tf32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes; they add up."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Cost()
LARGE = 1.0  # GFLOP
Share = Callable[[int], float]  # the open share of a gate vector
Parts = tuple[Cost, Cost, float]  # forward, backward, number of parameters
Formula = Callable[[tuple[int, ...], Share, int], Parts]


def product(m: float, n: float, k: float, itemsize: int, written: float | None = None) -> Cost:
    """(m, k) times (k, n); `written` elements instead of m * n where closed ones are filled with zeros."""
    return Cost(2 * m * n * k, itemsize * (m * k + k * n + (m * n if written is None else written)))


def layer(
    M: int, K: int, N: int, open_in: float, open_out: float, size: int, backward: bool, need_dx: bool = True
) -> Cost:
    """A linear layer between packed activations: forward, or backward with zero-filled dW."""
    m, k, n = M, open_in * K, open_out * N
    if not backward:
        return product(m, n, k, size)
    dw = product(n, k, m, size, written=N * K)
    return dw + product(m, k, n, size) if need_dx else dw


def adam(parameters: float) -> Cost:
    """Reads parameter, gradient and two moments, writes all but the gradient; fp32."""
    return Cost(12 * parameters, 7 * 4 * parameters)


def cost(op: str, shape: Sequence[int], share: float | Sequence[float], name: str, dtype: str) -> Cost:
    """FLOPs and bytes of pass `name` of an op with the open share given, of all gates or of each vector.

    Raises:
        KeyError: an op without a formula.
    """
    size = ITEMSIZE[dtype]
    shares = [float(s) for s in share] if isinstance(share, Sequence) else None

    def at(i: int) -> float:
        return shares[i] if shares is not None else float(share)  # type: ignore[arg-type]

    forward, backward, parameters = _FORMULAS[op](tuple(shape), at, size)
    total = NOTHING
    if name != "bwd":
        total += forward
    if name != "fwd":
        total += backward
    if name == "step":
        total += adam(parameters)
    return total


def _linear(shape: tuple[int, ...], at: Share, size: int) -> Parts:
    M, K, N = shape
    forward = layer(M, K, N, at(0), 1.0, size, False)
    closed_dx = Cost(0, size * (1 - at(0)) * M * K)  # zeros
    return forward, layer(M, K, N, at(0), 1.0, size, True) + closed_dx, N * K + N


def _ffn(rows: int) -> Formula:
    def parts(shape: tuple[int, ...], at: Share, size: int) -> Parts:
        M, D, H = shape
        keep = at(0)
        units = Cost(0, size * keep * M * H * (rows + 1))  # the activation reads a and writes h
        forward = (
            layer(M, D, rows * H, 1.0, keep, size, False) + units + layer(M, H, D, keep, 1.0, size, False)
        )
        backward = layer(M, H, D, keep, 1.0, size, True) + layer(M, D, rows * H, 1.0, keep, size, True)
        return forward, backward + units + units, D * H * (rows + 1) + D + rows * H

    return parts


def _chain(shape: tuple[int, ...], at: Share, size: int) -> Parts:
    M, *sizes = shape
    forward = backward = NOTHING
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        out = at(i + 1) if i + 2 < len(sizes) else 1.0
        forward += layer(M, n_in, n_out, at(i), out, size, False)
        backward += layer(M, n_in, n_out, at(i), out, size, True, need_dx=i > 0)
    return forward, backward, sum(a * b + b for a, b in pairwise(sizes))


def _conv_layer(
    N: int, C: int, W: int, O: int, k: int, open_in: float, open_out: float, size: int, need_dx: bool = True
) -> tuple[Cost, Cost]:
    """Forward and backward of a convolution with W output places per image; x counts as W places, too."""
    m, c, o = N * W, open_in * C, open_out * O
    x, w, y = size * m * c, size * c * o * k * k, size * m * o
    flops = 2 * m * c * o * k * k
    backward = Cost(flops, x + y + size * C * O * k * k)
    return Cost(flops, x + w + y), backward + (Cost(flops, y + w + size * m * C) if need_dx else NOTHING)


def _conv(shape: tuple[int, ...], at: Share, size: int) -> Parts:
    N, C, H, W, O, k = shape
    places = H * W if k == 3 else (H - k + 1) * (W - k + 1)
    forward, backward = _conv_layer(N, C, places, O, k, 1.0, at(0), size)
    return forward + Cost(0, size * (1 - at(0)) * N * places * O), backward, C * O * k * k + O


def _lenet5(shape: tuple[int, ...], at: Share, size: int) -> Parts:
    N, C, H, W = shape
    h1, w1 = H - 4, W - 4
    h2, w2 = h1 // 2 - 4, w1 // 2 - 4
    flat = 50 * (h2 // 2) * (w2 // 2)
    parts = [
        _conv_layer(N, C, h1 * w1, 20, 5, 1.0, at(0), size, need_dx=False),
        _conv_layer(N, 20, h2 * w2, 50, 5, at(0), at(1), size),
    ]
    # Columns of channels that do not exist, and of the others the closed ones, are skipped.
    for n_in, n_out, open_in, open_out in ((flat, 500, at(1) * at(2), at(3)), (500, 10, at(3), 1.0)):
        one, two = (layer(N, n_in, n_out, open_in, open_out, size, backward) for backward in (False, True))
        parts.append((one, two))
    forward, backward = (sum((part[i] for part in parts), NOTHING) for i in (0, 1))
    return forward, backward, 25 * (20 * C + 50 * 20) + flat * 500 + 500 * 10 + 580


def _block(shape: tuple[int, ...], at: Share, size: int) -> Parts:
    N, C, H, W = shape
    pairs = [_conv_layer(N, C, H * W, C, 3, *sides, size) for sides in ((1.0, at(0)), (at(0), 1.0))]
    forward, backward = (pairs[0][i] + pairs[1][i] for i in (0, 1))
    # A norm reads its input for the statistics and again for its output; the gradient likewise.
    norms = Cost(0, size * N * C * H * W * (1 + at(0)) * 3)
    return forward + norms, backward + norms + norms, 18 * C * C + 4 * C


@cache
def _layers(name: str, shape: tuple[int, ...]) -> list[tuple[Any, int, int]]:
    """The layers of a net that have weights, as they are called, elements of their inputs and outputs."""
    found: list[tuple[Any, int, int]] = []
    with torch.device("meta"):
        net = NETS[name](1000, *shape[4:])
        for module in net.modules():
            if getattr(module, "weight", None) is not None:
                module.register_forward_hook(lambda m, args, y: found.append((m, args[0].numel(), y.numel())))
        net(torch.empty(shape[:4]))
    return found


def _net(name: str, shape: tuple[int, ...], at: Share, size: int) -> Parts:
    forward = backward = NOTHING
    layers = _layers(name, shape)
    for layer, n_in, n_out in layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            moved = Cost(0, 3 * size * at(0) * n_in)  # reads twice, writes
            forward, backward = forward + moved, backward + moved + moved
            continue
        groups, weight = getattr(layer, "groups", 1), layer.weight.numel()
        first, last = layer is layers[0][0], layer is layers[-1][0]
        x, y = (n * (1.0 if end else at(0)) for n, end in ((n_in, first), (n_out, last)))
        share = at(0) if groups > 1 else (x / n_in) * (y / n_out)
        flops = 2 * share * n_out * layer.weight[0].numel()
        forward += Cost(flops, size * (x + share * weight + y))
        backward += Cost(flops, size * (x + y + weight))
        backward += NOTHING if first else Cost(flops, size * (x + y + share * weight))
    return forward, backward, sum(p.numel() for layer, *_ in layers for p in layer.parameters())


def _encoder(shape: tuple[int, ...], at: Share, size: int) -> Parts:
    n, length, width, units = shape
    rows, heads, hidden = n * length, at(0), at(1)
    sides = [(width, width, 1.0, heads)] * 3 + [(width, width, heads, 1.0)]
    sides += [(width, units, 1.0, hidden), (units, width, hidden, 1.0)]
    forward, backward = (
        sum((layer(rows, *side, size, back) for side in sides), NOTHING) for back in (False, True)
    )
    # Scores and what they weigh; backward computes the scores anew.
    products, moved = 4 * rows * length * width * heads, 4 * size * rows * width * heads
    forward += Cost(products, moved)
    backward += Cost(2.5 * products, 2 * moved)
    return forward, backward, 4 * width * width + 2 * width * units + 9 * width + units


_FORMULAS: dict[str, Formula] = {"linear": _linear, "ffn": _ffn(1), "swiglu": _ffn(2), "chain": _chain}
_FORMULAS |= {"encoder": _encoder, "conv": _conv, "lenet5": _lenet5, "block": _block}
_FORMULAS |= {name: partial(_net, name) for name in ("resnet18", "mobilenet_v2")}


@dataclass(frozen=True)
class Rates:
    """What a machine was seen to do, per ms."""

    flops: dict[str, float]  # by dtype
    bytes: float | None

    @classmethod
    def seen(cls, rows: Sequence[Row]) -> "Rates":
        flops: dict[str, float] = {}
        for row in rows:
            # A small net shows what launches cost, not what the processor can do.
            if row["provider"] in DENSE and float(row["tflops"] or 0) * float(row["ms"]) > LARGE:
                flops[row["dtype"]] = max(flops.get(row["dtype"], 0.0), 1e9 * float(row["tflops"]))
        copies = [1e6 * float(row["gbps"]) for row in rows if row["op"] == "copy" and row["gbps"]]
        return cls(flops, max(copies, default=None))

    def times(self, need: Cost, dtype: str) -> tuple[float | None, float | None]:
        """ms for the FLOPs, ms for the bytes, None where the rate is not known."""
        rate = self.flops.get(dtype) or max(self.flops.values(), default=None)
        return need.flops / rate if rate else None, need.bytes / self.bytes if self.bytes else None


def limit(compute: float | None, memory: float | None, measured: float) -> str:
    """The resource that limits a step of `measured` ms; "" where a rate is not known."""
    if compute is None or memory is None:
        return ""
    if compute + memory < measured / 2:
        return "fixed costs"
    return "compute" if compute >= memory else "memory"


def report(works: Sequence[Work], found: Found) -> str:
    """For each work, pass, mode and density: what must be done, how long that takes, what was measured."""
    rates = Rates.seen(found.rows)
    head = ("op, pass, mode", "keep", "backend", "GFLOP", "MB", "ms for FLOPs", "ms for bytes", "measured ms")
    lines = header(*head, "explained", "limited by")
    figure = lambda value: "?" if value is None else f"{value:.3g}"  # noqa: E731
    for work in works:
        for row in found.of(work):
            if row["provider"] != work.provider:
                continue
            share = open_share(work, row["keep"])
            need = cost(work.op, work.shape, share, row["pass"], work.dtype)
            compute, memory = rates.times(need, work.dtype)
            measured = float(row["ms"])
            known = None if compute is None or memory is None else max(compute, memory) / measured
            lines.append(
                line(
                    f"{work.label}, {PASS_NAMES[row['pass']]}, {row['mode']}",
                    row["keep"],
                    row["provider"],
                    *(figure(value) for value in (need.flops / 1e9, need.bytes / 1e6, compute, memory)),
                    row["ms"],
                    "?" if known is None else f"{known:.0%}",
                    limit(compute, memory, measured) or "?",
                )
            )
    return "\n".join(lines)


def open_share(work: Work, name: str) -> float | list[float]:
    """The open share that a keep of the rows stands for."""
    for keep in work.own_keeps:
        if keep_name(keep) == name and isinstance(keep, tuple):
            return [n / size for n, size in zip(keep, work.gate_sizes, strict=True)]
    return float(name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "cost.py --op ffn bench/results/nvidia-h200.csv")
    parser.add_argument("paths", nargs="*", type=Path, help="default: every device's in bench/results")
    parser.add_argument("--op", help="only this op")
    args = parser.parse_args(argv)
    try:
        sources = load(args.paths or device_files())
    except ValueError as error:
        parser.error(str(error))
    for found in sources:
        rates = Rates.seen(found.rows)
        works = [w for w in WORKS if w.device == found.kind and args.op in (None, w.op)]
        seen = [f"{name} {rate / 1e9:.3g} TFLOP/s" for name, rate in rates.flops.items()]
        seen += [f"copy {rates.bytes / 1e6:.3g} GB/s" if rates.bytes else "copy not measured"]
        print(machine(found.rows), ", ".join(seen), report(works, found), sep="\n\n", end="\n\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
