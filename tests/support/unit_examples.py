"""Tables of nets with examples of their inputs, which the files of nets fill, and such inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...]]
Make = Callable[[], Example]
Nets = dict[str, Make]
"""By name: makes a net, in float64, and an example of its inputs."""


def into(nets: Nets) -> Callable[[Make], Make]:
    """Decorates a function that makes a net and an example: enters it into `nets` by its name."""

    def net(make: Make) -> Make:
        def made() -> Example:
            module, args = make()
            for part in module.modules():
                # Behind norms of what is constant, biases of 0 are where relu has its kink.
                if type(part).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d")):
                    for parameter in part.parameters():
                        nn.init.uniform_(parameter, 0.1, 1.0)
            return module.double(), args

        nets[make.__name__] = made
        return made

    return net


def image(channels: int = 3, size: int = 8, batch: int = 2, dims: int = 2) -> Tensor:
    return torch.randn(batch, channels, *[size] * dims, dtype=torch.float64)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
