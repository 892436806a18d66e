"""Step time of WRN-28-10 (Louizos, Welling & Kingma, ICLR 2018, section 4.2) on the way of its training: from
droprate_init = .3 on its gates close, here all alike, on random images of CIFAR-10's size. A whole step, with
forward, backward, penalty and Nesterov SGD, gates drawn anew each time, by turns with one of the dense net.
One row a point in bench/results/wrn/steps.csv. Says nothing of accuracy: examples/train_wrn.py does, with
CIFAR-10 at hand."""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import cli
import torch
import torch.nn.functional as F
from documents import header, line
from rows import RESULTS, Row, append, common_fields, machine, read
from torch import nn

import l0kernels as l0

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import data  # noqa: E402
import train_wrn  # noqa: E402

PATH = RESULTS / "wrn" / "steps.csv"
COMMON = ("date", "commit", "device", "cores", "torch", "environment", "python")
FIELDS = (
    *(*COMMON, "order", "depth", "width", "batch", "threads", "p_open", "expected_flops"),
    *("gated_ms", "dense_ms"),
)
"""p_open: the odds of every gate to be open; expected_flops: as a share of the dense net's."""
DROPRATE = 0.3
ORDERS = ("after norm", "before norm")
POINTS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class Net:
    """A net and its step."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.model, self._x, self._y = model, x, y
        gates = l0.nn.gate_modules(model)
        groups = l0.nn.parameter_groups(model, gate_lr=None) if gates else model.parameters()
        # Nothing is to move: the points are those that were asked for.
        self._optimizer = train_wrn.nesterov(groups, 0.0)
        self._gated = bool(gates)

    def step(self) -> None:
        loss = F.cross_entropy(self.model(self._x), self._y)
        if self._gated:
            loss = loss + l0.nn.penalty(self.model)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def at(model: nn.Module, p: float | None) -> float:
    """Gives each gate these odds to be open; None: those that it starts with. Returns what they are."""
    for gate in l0.nn.gate_modules(model):
        with torch.no_grad():
            if p is not None:
                gate.log_alpha.copy_(gate.dist.log_alpha_of(torch.full_like(gate.log_alpha, p)))
        p_open = gate.dist.p_open(gate.log_alpha.detach())
    return p_open.mean().item()


def curve(order: str, depth: int, width: int, batch: int, rounds: int, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, data.CIFAR_SIDE, data.CIFAR_SIDE, device=device)
    y = torch.randint(data.CLASSES, (batch,), device=device)
    options = {"droprate_init": DROPRATE, "lam": 0.001}
    model = train_wrn.wide_residual_net(depth, width, order, **options).to(device)
    plain = train_wrn.wide_residual_net(depth, width, "dense").to(device)
    nets = Net(model, x, y), Net(plain, x, y)
    shape = (1, *x.shape[1:])
    dense_flops = l0.nn.eval_flops(plain, shape)
    rows = []
    for p in (None, *POINTS):
        odds = at(model, p)
        times: tuple[list[float], list[float]] = [], []
        for i in range(rounds + 1):
            for net, found in zip(nets, times, strict=True):
                ms = milliseconds(net.step, device)
                if i:  # the first of a point allocates
                    found.append(ms)
        rows.append(
            {
                "order": order,
                "depth": str(depth),
                "width": str(width),
                "batch": str(batch),
                "threads": str(torch.get_num_threads()),
                "p_open": f"{odds:.4f}",
                "expected_flops": f"{l0.nn.expected_flops(model, shape).item() / dense_flops:.4f}",
                "gated_ms": f"{median(times[0]):.1f}",
                "dense_ms": f"{median(times[1]):.1f}",
            }
        )
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line a point."""
    lines = header("gates", "open", "expected FLOPs", "ms gated", "ms dense", "gated / dense")
    for row in rows:
        gated, dense = float(row["gated_ms"]), float(row["dense_ms"])
        shares = (f"{100 * float(row[name]):.0f} %" for name in ("p_open", "expected_flops"))
        lines.append(line(row["order"], *shares, f"{gated:.0f}", f"{dense:.0f}", f"{gated / dense:.2f}"))
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Of the rows in bench/results, with where they come from."""
    if not PATH.is_file():
        return {}
    rows = read(PATH)
    first = rows[0]
    origin = (
        f"WRN-{first['depth']}-{first['width']}, batches of {first['batch']}, {machine(rows, brief=True)}."
    )
    return {"wrn": f"{table(rows)}\n\n{origin} Measured by `python bench/wrn.py`."}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "wrn.py --batch 32")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--csv", type=Path, default=PATH, help="default bench/results/wrn/steps.csv; written anew"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    common = {name: common_fields(args.device)[name] for name in COMMON}
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the order of the paper, and gates that close
        for order in ORDERS:
            found = curve(order, args.depth, args.width, args.batch, args.rounds, device)
            rows += [common | row for row in found]
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    args.csv.unlink(missing_ok=True)
    append(args.csv, rows, FIELDS)
    print(table(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
