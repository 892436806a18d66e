"""What an operation on packed activations costs beside torch's own: ``python bench/wrapper.py``.
Between two layers of a model under `l0kernels.nn.gate_` a CPU's activations are of a subclass of Tensor that
holds the units that exist. Each operation is timed on it and on the plain tensor that it holds, by turns,
with gradients, on so few numbers that the host is all that takes time.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import cli
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.nn.units.narrow import Narrow

TARGET_US = 5.0
Operation = Callable[[Tensor], object]

OPERATIONS: dict[str, Operation] = {
    "relu": F.relu,
    "relu_": lambda x: F.relu(x, inplace=True),
    "relu6_": lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "dropout": lambda x: F.dropout(x, 0.1, True),
    "add": lambda x: x + x,
    "multiply": lambda x: x * x,
    "by a number": lambda x: x * 0.5,
    "cat": lambda x: torch.cat([x, x], 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "slice": lambda x: x[:, :, :2],
    "shape": lambda x: x.shape,
    "ndim, dtype, device": lambda x: (x.ndim, x.dtype, x.device),
}


def packed() -> Narrow:
    """Activations of a gated convolution, not all of whose channels exist."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 3, 1))
    l0.nn.gate_(net, torch.zeros(1, 3, 4, 4), droprate_init=0.8)
    found: list[Narrow] = []

    def keep(_: nn.Module, __: object, out: Tensor) -> None:
        assert isinstance(out, Narrow), "many gates are closed at first"
        found.append(out)

    net[0].register_forward_hook(keep)
    net(torch.randn(2, 3, 4, 4))
    return found[0]


def microseconds(call: Callable[[], object], calls: int) -> float:
    start = time.process_time_ns()
    for _ in range(calls):
        call()
    return (time.process_time_ns() - start) / calls / 1e3


def cost(operation: Operation, x: Narrow, rounds: int, calls: int) -> tuple[float, float]:
    """us on the plain tensor and on the packed one: the least of all rounds, for others only add."""
    plain = x._data
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for value, found in zip((plain, x), times, strict=True):
            found.append(microseconds(partial(operation, value), calls))
    return min(times[0]), min(times[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "wrapper.py --quick")
    parser.add_argument("--quick", action="store_true", help="few calls: does it run?")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds, calls = (2, 5) if args.quick else (60, 50)
    print(f"{'operation':22}{'plain us':>10}{'packed us':>10}{'wrapper us':>11}")
    worst = 0.0
    for name, operation in OPERATIONS.items():
        plain, narrow = cost(operation, packed(), rounds, calls)
        worst = max(worst, narrow - plain)
        print(f"{name:22}{plain:10.2f}{narrow:10.2f}{narrow - plain:11.2f}", flush=True)
    print(f"the wrapper costs {worst:.2f} us at most, the target is {TARGET_US:g} us")
    return 0


if __name__ == "__main__":
    cli.run(main)
