"""Times, eager and replayed from a CUDA graph, what surrounds the layers of a training step: proximal
operators on 16 M weights beside a copy of them, the step of a budget, and that of a ResNet-18, dense and
gated, with the number of torch's operations in forward and backward. It prints a line each; without a GPU
the eager times on the CPU."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cli
import nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import l0kernels as l0

BLOCKS, WARM = 7, 5
VIEWS = {"view", "_unsafe_view", "detach", "slice", "expand", "split", "split_with_sizes", "t", "transpose"}
VIEWS |= {"unsqueeze", "select", "alias", "unbind"}


class Operations(TorchDispatchMode):
    """Counts those that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def timed(call: Callable[[], object], device: str, reps: int) -> float:
    """Median of the blocks, ms a call."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    for _ in range(BLOCKS):
        sync()
        start = time.perf_counter()
        for _ in range(reps):
            call()
        sync()
        found.append((time.perf_counter() - start) * 1e3 / reps)
    return statistics.median(found)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def line(name: str, call: Callable[[], object], device: str, reps: int, more: str = "") -> None:
    for _ in range(WARM):
        call()
    eager = f"{timed(call, device, reps):9.4f} ms eager"
    try:
        graph = f"{timed(captured(call), device, reps):9.4f} ms in a CUDA graph" if device == "cuda" else ""
    except RuntimeError as error:
        graph = f"cannot be captured: {str(error).splitlines()[0]}"
    print(name.ljust(44), eager, graph, more, flush=True)


def train(model: nn.Module, x: Tensor, device: str, gated: bool) -> tuple[Callable[[], object], str]:
    """A step of training, and how many operations forward and backward are."""
    if gated:
        l0.nn.gate_(model, x[:1])
    model, x, target = model.to(device).train(), x.to(device), torch.arange(len(x), device=device)
    parameters: Any = l0.nn.parameter_groups(model) if gated else model.parameters()
    optimizer = torch.optim.Adam(parameters, fused=True, capturable=device == "cuda")

    def loss() -> Tensor:
        return F.cross_entropy(model(x), target)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step()
    with Operations() as count:
        loss().backward()
    return step, f"{count.n} operations"


def budget(sizes: list[int], n: int, device: str) -> Callable[[], object]:
    """The step of a budget for n MLPs side by side, whose gates the gradients would open."""
    model = nn.ModuleList(l0.nn.L0MLP(sizes) for _ in range(n)).to(device)
    found = l0.nn.Budget(model, 0.5, steps=1000)
    gates: list[Tensor] = [gate.log_alpha for gate in l0.nn.gate_modules(model)]
    for gate in gates:
        gate.grad = torch.randn_like(gate)

    def step() -> None:
        with torch.no_grad():
            torch._foreach_add_(gates, 0.02)
        found.step()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "gpu_steps.py --quick")
    parser.add_argument("--quick", action="store_true", help="small cases, to see that it runs")
    quick = parser.parse_args(argv).quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", "torch", torch.__version__)
    line("budget, MLP 784-300-100-10", budget([784, 300, 100, 10], 1, device), device, 20)
    if not quick:
        line("budget, 24 MLPs 768-3072-768", budget([768, 3072, 768], 24, device), device, 20)
    n = 64 if quick else 4096
    weights = torch.randn(n, n, device=device)
    out = torch.empty_like(weights)
    line(f"copy of {n} x {n}", lambda: out.copy_(weights), device, 10)
    penalties: dict[str, l0.prox.Regulariser] = {
        "l1": l0.prox.L1(0.1),
        "group lasso, rows": l0.prox.GroupLasso(1.0),
        "group lasso, columns": l0.prox.GroupLasso(1.0, dim=1),
        "transformed l1 and group, rows": l0.prox.TransformedL1Group(0.1),
        "top k, a tenth": l0.prox.TopK(weights.numel() // 10),
    }
    for name, penalty in penalties.items():
        line(f"prox, {name}", partial(penalty.prox, weights, out=out), device, 3)
    x = torch.randn(4, 3, 32, 32) if quick else torch.randn(64, 3, 64, 64)
    dense = nets.resnet18(64, stages=2 if quick else 4)
    for gated in (False, True):
        step, operations = train(copy.deepcopy(dense), x, device, gated)
        line(
            f"ResNet-18, {'gated' if gated else 'dense'}, batch {len(x)}",
            step,
            device,
            1 if quick else 10,
            operations,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
