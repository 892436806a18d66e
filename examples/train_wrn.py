"""Wide residual net with L0 gates on the channels between the two convolutions of each block.

WRN-28-10 as Louizos, Welling & Kingma (ICLR 2018, section 4.2) gate it: Nesterov SGD, learning rate .1
falling by 5 at .3, .6 and .8 of the run, weight decay 5e-4, droprate_init .3, lambda .001 for each weight.

    python examples/train_wrn.py --depth 10 --width 2 --epochs 2   # random images: does it run, and how fast
    python examples/train_wrn.py --data DIR                        # CIFAR-10 from its python pickles

Two orders. By default conv -> norm -> ReLU -> z * conv: the gate multiplies the inputs of the second
convolution, the first one computes what it leaves open, and the norm between sees the open channels only.
--gate-before-norm is the paper's: z * conv -> norm -> ReLU -> conv. There the norm divides the gates away,
and they get next to no gradient from the data: only the penalty moves them.

What it leaves behind, and --resume, are as of train_lenet5.py.
"""

import argparse
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
import trainer
from torch import Tensor
from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential

from l0kernels import nn

STEM = 16
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FALLS, FACTOR = (0.3, 0.6, 0.8), 0.2


def block(
    n_in: int, n_out: int, stride: int, order: str, options: dict[str, Any]
) -> Sequence[torch.nn.Module]:
    """The modules of one block; order "dense", "after norm" or "before norm" says where its gates are."""
    norm = BatchNorm2d if order == "dense" else nn.L0BatchNorm2d
    first: torch.nn.Module = Conv2d(n_in, n_out, 3, stride, 1, bias=False)
    second: torch.nn.Module = Conv2d(n_out, n_out, 3, 1, 1, bias=False)
    if order == "before norm":
        first = nn.L0Conv2d(n_in, n_out, 3, stride, 1, bias=False, gate="out", **options)
    elif order == "after norm":
        second = nn.L0Conv2d(n_out, n_out, 3, 1, 1, bias=False, gate="in", **options)
    inner = [first, norm(n_out), ReLU(), second]
    if n_in == n_out and stride == 1:
        return [nn.L0Residual(Sequential(norm(n_in), ReLU(), *inner))]
    return [
        norm(n_in),
        ReLU(),
        nn.L0Residual(Sequential(*inner), Conv2d(n_in, n_out, 1, stride, bias=False)),
    ]


def wide_residual_net(depth: int, width: int, order: str, **options: Any) -> nn.L0Sequential:
    """WRN-depth-width for 3x32x32 images; `options` are those of the gates."""
    modules: list[torch.nn.Module] = [Conv2d(3, STEM, 3, 1, 1, bias=False)]
    n_in = STEM
    with warnings.catch_warnings():  # the order of the paper was asked for
        warnings.simplefilter("ignore", UserWarning)
        for group in range(3):
            n_out = STEM * width * 2**group
            for i in range((depth - 4) // 6):
                modules += block(n_in, n_out, 2 if group and not i else 1, order, options)
                n_in = n_out
        norm = BatchNorm2d if order == "dense" else nn.L0BatchNorm2d
        tail = [norm(n_in), ReLU(), AdaptiveAvgPool2d(1), Flatten(), Linear(n_in, data.CLASSES)]
        net = nn.L0Sequential(*modules, *tail)
    for module in net.modules():
        if isinstance(module, Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return net


def nesterov(groups: Any, lr: float) -> torch.optim.Optimizer:
    """The weights decay; the group of the gates says that it does not."""
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def falling(share: float) -> float:
    return FACTOR ** sum(share >= fall for fall in FALLS)


def normal(x: Tensor) -> Tensor:
    """(N, 3072) in [0, 1] -> (N, 3, 32, 32) of about mean 0 and deviation 1"""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return (x.view(-1, 3, data.CIFAR_SIDE, data.CIFAR_SIDE) - mean) / std


def shifted_and_mirrored(x: Tensor) -> Tensor:
    x = torch.where((torch.rand(len(x), 1, 1, 1) < 0.5).to(x.device), x.flip(3), x)
    top, left = torch.randint(9, (2,)).tolist()  # one shift a batch
    return F.pad(x, (4, 4, 4, 4))[:, :, top : top + data.CIFAR_SIDE, left : left + data.CIFAR_SIDE]


def example(args: argparse.Namespace) -> trainer.Example:
    order = "before norm" if args.gate_before_norm else "after norm"

    def gated(lams: Sequence[float]) -> nn.L0Sequential:
        return wide_residual_net(args.depth, args.width, order, droprate_init=args.droprate, lam=lams[0])

    name = f"wrn-{args.depth}-{args.width}" + ("-before" if args.gate_before_norm else "")
    recipe = trainer.Recipe(200, (0.001,), lr=0.1, gate_lr=0.1, batch_size=128)
    return trainer.Example(
        title=f"WRN-{args.depth}-{args.width}, gates {order},",
        name=name,
        units=("channels",),
        recipes={"random": recipe._replace(epochs=2), "cifar10": recipe},
        gated=gated,
        dense=partial(wide_residual_net, args.depth, args.width, "dense"),
        optimizer=nesterov,
        schedule=falling,
        shaped=normal,
        augmented=shifted_and_mirrored,
        load=load,
    )


def load(folder: Path | None) -> data.Data:
    return data.random_images() if folder is None else data.cifar10(folder)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = trainer.parser(
        "python examples/train_wrn.py --depth 10 --width 2 --epochs 2",
        "wide residual net",
        "the paper's lambda, one for all layers",
    )
    add = parser.add_argument
    add("--depth", type=trainer.whole(10), default=28, help="6 n + 4, default %(default)s")
    add("--width", type=trainer.whole(1), default=10, help="default %(default)s")
    add("--gate-before-norm", action="store_true", help="the paper's order")
    add("--droprate", type=trainer.positive, default=0.3, help="droprate_init, default %(default)s")
    args = parser.parse_args(argv)
    if args.depth % 6 != 4:
        parser.error(f"argument --depth: expected 6 n + 4, got {args.depth}")
    if not args.droprate < 1:
        parser.error(f"argument --droprate: expected a number below 1, got {args.droprate}")
    return args


def main(argv: Sequence[str] | None = None) -> trainer.Run:
    """Returns the finished run."""
    args = parse_args(argv)
    return trainer.main(example(args), args)


if __name__ == "__main__":
    trainer.run_script(main)
