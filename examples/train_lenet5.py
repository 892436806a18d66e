"""LeNet-5-Caffe with hard-concrete gates as the paper has them: its steps get faster as feature maps close.

The recipe of Louizos, Welling & Kingma, "Learning Sparse Neural Networks through L0 Regularization"
(ICLR 2018), section 4.1, with the lambdas of its 9-18-65-25 result: gates on the 20 and 50 feature maps of
the two convolutions and on the 800 and 500 inputs of the two linear layers.

    python examples/train_lenet5.py                        # scikit-learn's 8x8 digits, enlarged to 28x28
    python examples/train_lenet5.py --data DIR             # MNIST from its four idx .gz files

The paper trains for 200 epochs; on MNIST log_alpha here learns at twenty times the rate of the weights and
closes as much within 15.

Everything else is as in train_lenet300.py; the export is lenet5.pt.
"""

from collections.abc import Sequence
from typing import Any

import data
import torch
import torch.nn.functional as F
import trainer
from torch import Tensor
from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential

from l0kernels import nn

KERNEL, POSITIONS = 5, 16
SIZES = (20, 50, 800, 500, data.CLASSES)


def gated_net(sizes: Sequence[int], droprates: Sequence[float], lams: Sequence[float]) -> nn.L0Sequential:
    options: list[dict[str, Any]] = [
        {"droprate_init": droprate, "lam": lam} for droprate, lam in zip(droprates, lams, strict=True)
    ]
    return nn.L0Sequential(
        nn.L0Conv2d(1, sizes[0], KERNEL, gate="out", **options[0]),
        ReLU(),
        MaxPool2d(2),
        nn.L0Conv2d(sizes[0], sizes[1], KERNEL, gate="out", **options[1]),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        nn.L0Linear(sizes[2], sizes[3], gate="in", **options[2]),
        ReLU(),
        nn.L0Linear(sizes[3], sizes[4], gate="in", **options[3]),
    )


def dense_net(sizes: Sequence[int]) -> Sequential:
    return Sequential(
        Conv2d(1, sizes[0], KERNEL),
        ReLU(),
        MaxPool2d(2),
        Conv2d(sizes[0], sizes[1], KERNEL),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(sizes[2], sizes[3]),
        ReLU(),
        Linear(sizes[3], sizes[4]),
    )


def exported_net(_: Sequence[int], state: dict[str, Tensor]) -> torch.nn.Module:
    """The dense net of the open units, features selected behind its convolutions if some are closed."""
    first, second, third, fourth = (value for name, value in state.items() if name.endswith("weight"))
    net = dense_net([len(first), len(second), third.shape[1], len(third), len(fourth)])
    if "7.index" in state:
        net.insert(7, nn.SelectInputs(torch.zeros_like(state["7.index"]), POSITIONS * len(second)))
    net.load_state_dict(state)
    return net


def images(x: Tensor) -> Tensor:
    """(N, pixels) -> (N, 1, 28, 28): the digits' pixels become 3x3 each, with an edge of two."""
    side = round(x.shape[1] ** 0.5)
    x = x.view(-1, 1, side, side)
    if side == data.MNIST_SIDE:
        return x
    factor = data.MNIST_SIDE // side
    edge = (data.MNIST_SIDE - factor * side) // 2
    return F.pad(F.interpolate(x, scale_factor=factor), (edge, edge, edge, edge)).contiguous()


EXAMPLE = trainer.Example(
    title="LeNet-5-Caffe",
    file="lenet5.pt",
    units=("conv 1", "conv 2", "fc 1 inputs", "fc 2 inputs"),
    recipes={
        "digits": trainer.Recipe(epochs=200, lambdas=(1.0, 0.05, 0.02, 0.2), threads=None, gates_lr=1e-2),
        "mnist": trainer.Recipe(epochs=15, lambdas=(10.0, 0.5, 0.1, 10.0), threads=None, gates_lr=2e-2),
    },
    droprates=(0.5, 0.5, 0.5, 0.5),
    sizes=lambda _: SIZES,
    shaped=images,
    gated=gated_net,
    dense=dense_net,
    loaded=exported_net,
)


def main(argv: Sequence[str] | None = None) -> trainer.Run:
    """Returns the finished run."""
    return trainer.main(EXAMPLE, argv)


if __name__ == "__main__":
    trainer.run_script(main)
