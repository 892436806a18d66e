"""Gates one net of each family of torchvision's classifiers and prints a table: with random weights, half
of its gates closed, each takes a training step and is exported. With --steps it times whole training steps
instead, dense ones and gated ones by turns, and puts rows into bench/results/zoo/steps.csv. Needs torchvision
(tested: torch 2.14.1, torchvision 0.29.1)."""

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median

import cli
import torch
from documents import header, line
from ops import ALL_OPEN, adam, trained_log_alpha
from rows import RESULTS, Row, append, common_fields, machine, read
from torch import Tensor, nn
from torch.nn import functional as F

import l0kernels as l0

STEPS = RESULTS / "zoo" / "steps.csv"
COMMON = ("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment")
FIELDS = (*COMMON, "net", "batch", "size", "keep", "ms", "dense_ms")
KEEPS = (1.0, 0.5, 0.25, 0.1)
SECONDS = 3.0
"""For the steps of each provider, at each share of open gates."""

SIZES = {"inception_v3": 299, "vit_b_16": 224, "swin_t": 224, "swin_v2_t": 224, "maxvit_t": 224}
"""Of the images where it is not 96."""

NAMES = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnet50 resnext50_32x4d
    shufflenet_v2_x1_0 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2
"""
HEADER = ("net", "groups", "units", "pinned", "largest difference of export / eval()", "parameters left")


def logits(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What the losses are of: inception and googlenet have more than one head in train()."""
    return [out] if isinstance(out, Tensor) else [value for value in out if isinstance(value, Tensor)]


def build(name: str) -> tuple[nn.Module, int]:
    """A net with random weights, and the size of its images."""
    from torchvision import models  # type: ignore[import-not-found]

    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(models, name)(num_classes=10, **extra), SIZES.get(name, 96)


def row(name: str) -> tuple[str, ...]:
    """The cells of a net."""
    net, size = build(name)
    with torch.no_grad():  # heads of zeros and scales of 1e-6 would hide every difference
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:
                nn.init.normal_(parameter, std=0.1)
    graph = l0.nn.gate_(net, torch.randn(2, 3, size, size))
    for gate in l0.nn.gate_modules(net):
        with torch.no_grad():
            gate.log_alpha.copy_(torch.where(torch.rand(len(gate.log_alpha)) < 0.5, 9.0, -9.0))
    x, target = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    loss = sum(F.cross_entropy(out, target) for out in logits(net.train()(x)))
    (loss + l0.nn.penalty(net) / 1e6).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    if missing:
        raise RuntimeError(f"no gradient in {missing}")
    sizes = len(graph.groups), sum(g.units for g in graph.groups), sum(pin.units for pin in graph.pinned)
    cells = (name, *map(str, sizes))
    before = sum(p.numel() for p in net.parameters())
    try:
        small = l0.nn.export(net.eval())
    except ValueError as error:
        return (*cells, f"refused: {str(error).partition(':')[0]}", "-")
    with torch.no_grad():
        (right,), (mine,) = logits(net(x)), logits(small(x))
    difference = (mine - right).abs().max().item() / right.abs().max().item()
    return (*cells, f"{difference:.0e}", f"{sum(p.numel() for p in small.parameters()) / before:.2f}")


def steps(name: str) -> list[Row]:
    """Times of whole steps with Adam, those of the dense net and of the gated one by turns.

    One unit of each group is always open. A draw that closes a layer whole leaves constants to the batch
    norms behind it: each multiplies the gradient by 1 / sqrt(eps), until it overflows, whatever computes it.
    """
    net, size = build(name)
    batch = 8 if size < 200 else 4
    x, target = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    model = copy.deepcopy(net)
    l0.nn.gate_(model, x[:2])
    gates = [gate.log_alpha for gate in l0.nn.gate_modules(model)]
    weights = [p for p in model.parameters() if not any(p is gate for gate in gates)]

    def step(model: nn.Module, finish: Callable[[], None]) -> float:
        start = time.perf_counter()
        for parameter in model.parameters():
            parameter.grad = None
        loss = torch.stack([F.cross_entropy(out, target) for out in logits(model(x))]).sum()
        (loss + l0.nn.penalty(model) / 1e6 if model is not net else loss).backward()
        finish()
        return 1e3 * (time.perf_counter() - start)

    both = (net.train(), adam([*net.parameters()], ())), (model.train(), adam(weights, gates))
    found = []
    for keep in KEEPS:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for gate in gates:
                gate.copy_(trained_log_alpha(gate.numel(), keep, generator))
                gate[0] = ALL_OPEN
        for one in both:  # a net's first steps are longer
            step(*one), step(*one)
        times: tuple[list[float], ...] = [], []
        while sum(map(sum, times)) < 2e3 * SECONDS:
            for one, own in zip(both, times, strict=True):
                own.append(step(*one))
        dense, gated = map(median, times)
        cells = {"net": name, "batch": str(batch), "size": str(size), "keep": f"{keep:g}"}
        found.append(cells | {"ms": f"{gated:.1f}", "dense_ms": f"{dense:.1f}"})
    return found


def _classifiers() -> str:
    """What was printed, the table alone."""
    return "\n".join(text for text in (RESULTS / "zoo.md").read_text().splitlines() if text.startswith("|"))


def _times() -> str:
    """Of a dense step, for each net and share of open gates."""
    if not STEPS.exists():
        return ""
    rows = read(STEPS)
    lines = header("step of dense at keep", "dense, ms", *(f"{keep:g}" for keep in KEEPS))
    for name in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == name]
        ratios = [f"{float(row['ms']) / float(row['dense_ms']):.2f}" for row in own]
        lines.append(line(name, f"{median(float(row['dense_ms']) for row in own):.0f}", *ratios))
    return "\n".join([*lines, "", f"{machine(rows)}, {rows[0]['threads']} threads."])


def tables() -> dict[str, str]:
    """By the names that the markers of the guide give them."""
    return {"zoo": _classifiers(), "zoo-steps": _times()}


def timed(names: Sequence[str]) -> None:
    """Rows of each net take the place of earlier ones."""
    warnings.filterwarnings("ignore", module="torchvision")
    order = NAMES.split()
    STEPS.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows = [row for row in (read(STEPS) if STEPS.exists() else []) if row["net"] != name]
        rows += [common_fields("cpu") | found for found in steps(name)]
        print({key: rows[-1][key] for key in ("net", "dense_ms", "ms")}, flush=True)
        rows.sort(key=lambda row: order.index(row["net"]))
        STEPS.unlink(missing_ok=True)
        append(STEPS, rows, FIELDS)
    print(_times())


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "zoo.py resnet18 vit_b_16")
    parser.add_argument(
        "names", nargs="*", default=NAMES.split(), help="of torchvision.models; default: all below"
    )
    parser.add_argument("--steps", action="store_true", help="time training steps")
    args = parser.parse_args(argv)
    if args.steps:
        timed(args.names)
        return 0
    print(f"torch {torch.__version__}\n\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    start = time.monotonic()
    for name in args.names:
        print(f"| {' | '.join(row(name))} |", flush=True)
    print(f"\n{len(args.names)} nets in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main)
