"""What is measured: works (op, shape, targets), cases (a work at one density), providers (who computes it).

A new op is a function `(shape, keep, dtype) -> Case` in ops.py, its name in OPS there and its rows in WORKS
here; a new provider is one more entry in `Case.providers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEEPS = (1.0, 0.9, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Work:
    """A row of the target table: the ratios of times to reach at KEEPS, `stock` to torch.nn as installed and
    `fair` to the ungated op on the engine that the gated one uses."""

    op: str
    shape: tuple[int, ...]
    device: str
    stock: tuple[float, ...]
    fair: tuple[float, ...]

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))


WORKS = (
    Work("linear", (512, 4096, 4096), "cpu", (0.56, 0.49, 0.27, 0.14, 0.08), (1.03, 0.97, 0.54, 0.29, 0.15)),
    Work("linear", (256, 1024, 1024), "cpu", (0.55, 0.48, 0.30, 0.19, 0.10), (1.05, 1.00, 0.60, 0.35, 0.19)),
    Work("linear", (100, 784, 300), "cpu", (0.58, 0.55, 0.36, 0.25, 0.17), (1.10, 1.05, 0.70, 0.48, 0.33)),
    Work(
        "chain",
        (100, 784, 300, 100, 10),
        "cpu",
        (0.70, 0.65, 0.45, 0.37, 0.33),
        (1.05, 1.00, 0.65, 0.52, 0.45),
    ),
    Work("ffn", (512, 1024, 4096), "cpu", (0.56, 0.49, 0.27, 0.15, 0.075), (1.05, 0.98, 0.53, 0.29, 0.14)),
)

# The step is compared in a CUDA graph, the others eager; `fair` is against the fastest dense provider.
GPU_WORKS = (
    Work(
        "ffn",
        (8192, 4096, 14336),
        "nvidia-h200",
        (1.00, 0.94, 0.53, 0.28, 0.13),
        (1.02, 0.97, 0.55, 0.29, 0.14),
    ),
    Work("linear", (8192, 4096, 4096), "nvidia-h200", (1.03, 1.02, 0.57, 0.31, 0.18), ()),
    Work("step", (100, 784, 300, 100, 10), "nvidia-h200", (1.2, 1.2, 1.1, 1.0, 1.0), ()),
)


@dataclass
class Provider:
    """One way to compute a case; `finish` is the rest of a training step (optimiser, clamp)."""

    forward: Callable[[Tensor], Tensor]
    leaves: Sequence[Tensor]
    truth: str  # the provider of the same case in fp64 that this one must agree with
    backend: str | None = None  # for l0.use_backend
    finish: Callable[[], None] | None = None
    timed: bool = True


@dataclass
class Case:
    batches: Sequence[Tensor]  # rotated
    grad: Tensor | None  # what backward starts from; None where the output is a loss
    flops: float  # of the open part, forward and backward; for a dense provider `dense_flops`
    dense_flops: float
    providers: dict[str, Provider]

    def step(self, provider: Provider, i: int) -> None:
        """What is timed: one training step on batch i, the gradients released at its end."""
        x = self.batches[i % len(self.batches)]
        provider.forward(x).backward(self.grad)
        if provider.finish is not None:
            provider.finish()
        x.grad = None
        for leaf in provider.leaves:
            leaf.grad = None

    def values(self, provider: Provider, seed: int) -> list[Tensor]:
        """Output and every gradient of one step whose gates come from `seed`."""
        torch.manual_seed(seed)
        x = self.batches[0]
        y = provider.forward(x)
        y.backward(self.grad)
        leaves = [x, *provider.leaves] if x.requires_grad else list(provider.leaves)
        values = [y.detach()]
        for leaf in leaves:
            values.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            leaf.grad = None
        return values
