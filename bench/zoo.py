"""Gates one net of each family of torchvision's classifiers and prints a table: with random weights, half
of its gates closed, each takes a training step and is exported. Needs torchvision (tested: torch 2.14.1,
torchvision 0.29.1)."""

import time
from collections.abc import Sequence

import cli
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import l0kernels as l0

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


def row(name: str) -> tuple[str, ...]:
    """The cells of a net."""
    from torchvision import models  # type: ignore[import-not-found]

    torch.manual_seed(0)
    size = SIZES.get(name, 96)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = getattr(models, name)(num_classes=10, **extra)
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "zoo.py resnet18 vit_b_16")
    parser.add_argument(
        "names", nargs="*", default=NAMES.split(), help="of torchvision.models; default: all below"
    )
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}\n\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    start = time.monotonic()
    for name in args.names:
        print(f"| {' | '.join(row(name))} |", flush=True)
    print(f"\n{len(args.names)} nets in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main)
