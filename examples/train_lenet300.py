"""LeNet-300-100 with hard-concrete gates on the inputs of every layer: its steps get faster as gates close.

The recipe of Louizos, Welling & Kingma, "Learning Sparse Neural Networks through L0 Regularization"
(ICLR 2018), section 4.1: Adam 1e-3, batches of 100, loss = cross-entropy + sum_l lambda_l / N * sum_g |g|
P(z_g > 0) with N training examples, log_alpha clamped to +-log(100) after each step, and for evaluation a
bias-corrected moving average (.999) of the parameters.

    python examples/train_lenet300.py                      # scikit-learn's 8x8 digits: 64-300-100-10
    python examples/train_lenet300.py --data DIR           # MNIST from its four idx .gz files: 784-300-100-10

--out gets metrics.csv and checkpoint.pt after every epoch, and at the end curves.png and lenet300.pt, the
open part of the net in plain torch. --resume goes on from checkpoint.pt as if the run had never stopped, to
the last bit on the same machine, backend and number of threads. Between its own blocks of steps each epoch
times the same net dense: torch.nn, fused Adam and the same averaging, on the same batches.
"""

from collections.abc import Sequence
from itertools import pairwise

import data
import torch
import trainer
from torch import Tensor

from l0kernels import nn

HIDDEN = (300, 100)


def gated_net(sizes: Sequence[int], droprates: Sequence[float], lams: Sequence[float]) -> nn.L0MLP:
    return nn.L0MLP(sizes, droprate_init=droprates, lam=lams)


def dense_net(sizes: Sequence[int]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [torch.nn.Linear(size_in, size_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def exported_net(sizes: Sequence[int], state: dict[str, Tensor]) -> torch.nn.Module:
    """Linear and ReLU, behind a selection of pixels if some are closed."""
    weights = [value for name, value in state.items() if name.endswith("weight")]
    net = dense_net([weights[0].shape[1], *(len(weight) for weight in weights)])
    if "0.index" in state:
        net.insert(0, nn.SelectInputs(torch.zeros_like(state["0.index"]), sizes[0]))
    net.load_state_dict(state)
    return net


EXAMPLE = trainer.Example(
    title="LeNet-300-100",
    file="lenet300.pt",
    units=("pixels", "hidden 1", "hidden 2"),
    recipes={
        # A second thread gains so small a net nothing, and waits whenever another program has its core.
        "digits": trainer.Recipe(epochs=1000, lambdas=(0.3, 0.03, 0.1), threads=1),
        # The paper's 0.1 wants the paper's 200 epochs; at 0.3 a tenth of them halves the FLOPs.
        "mnist": trainer.Recipe(epochs=20, lambdas=(0.3, 0.3, 0.3), threads=None),
    },
    droprates=(0.2, 0.5, 0.5),  # as AMLab's code: pixels start more open than hidden units
    sizes=lambda pixels: (pixels, *HIDDEN, data.CLASSES),
    shaped=lambda x: x,
    gated=gated_net,
    dense=dense_net,
    loaded=exported_net,
)


def main(argv: Sequence[str] | None = None) -> trainer.Run:
    """Returns the finished run."""
    return trainer.main(EXAMPLE, argv)


if __name__ == "__main__":
    trainer.run_script(main)
