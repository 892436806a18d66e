"""Small nets whose forwards share weights, work in place, recompute or branch, for tests of gated units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from unit_examples import Example, Nets, image, into, rows

NETS: Nets = {}
net = into(NETS)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.out(x + self.down(torch.relu(self.up(x))))


@net
def tied() -> Example:
    return Tied(), (torch.randint(7, (3, 4)),)


class TiedConvs(nn.Module):
    """One weight in an encoder and, transposed, in its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(2, 5, 3, bias=False), nn.ConvTranspose2d(5, 2, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.relu(self.encode(x)))


@net
def tied_convs() -> Example:
    return TiedConvs(), (image(2),)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.norm(self.shared(x)))
        return self.last(x)


@net
def twice() -> Example:
    return Twice(), (rows(5, 4),)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y *= self.scale
        y = y.add_(0.5).mul_(2) + self.shift
        y.relu_()
        return self.c(y)


@net
def in_place() -> Example:
    return InPlace(), (rows(3, 4),)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(4, 6),
            nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)),
            nn.Linear(6, 2),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = checkpoint(self.b, x, use_reentrant=self.reentrant) if self.training else self.b(x)
        return self.c(x + y)


@net
def checkpointed() -> Example:
    return Checkpointed(False), (rows(3, 4),)


@net
def checkpointed_reentrant() -> Example:
    return Checkpointed(True), (rows(3, 4),)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * dy


class Cubed(nn.Module):
    """An activation that is a torch.autograd.Function, as Bloom's is."""

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


@net
def custom_activation() -> Example:
    return nn.Sequential(nn.Linear(4, 6), Cubed(), nn.Linear(6, 5), nn.ReLU(), Cubed(), nn.Linear(5, 2)), (
        rows(3, 4),
    )


class Custom(nn.Module):
    def __init__(self, in_eval: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)
        self.in_eval = in_eval

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh())
        x = Cube.apply(x) if self.training or self.in_eval else x**3
        return self.c(x)


@net
def custom() -> Example:
    return Custom(), (rows(3, 4),)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + x.T) / 2


@net
def parametrized() -> Example:
    layers = [
        nn.Linear(4, 5),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(5, 6)),
        nn.ReLU(),
        nn.Linear(6, 6),
    ]
    parametrize.register_parametrization(layers[-1], "weight", Symmetric())
    layers += [nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)]
    return nn.Sequential(*layers), (rows(3, 4),)


@net
def spectral() -> Example:
    layers = [nn.Linear(4, 5), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(5, 6)), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (rows(3, 4),)


class Branches(nn.Module):
    """Control flow, splits, stacks, and reductions over units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 9), nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = torch.split(torch.tanh(self.a(x)), 3, dim=-1)
        y = self.b(p) + self.c(q)
        if y.requires_grad or y.ndim == 2:
            y = y + self.d(torch.cat((r, p), 1))
        both = torch.stack([y, y * y], 0)
        return self.out(both.sum(0)) + both.mean((0, 2)).unsqueeze(1)


@net
def branches() -> Example:
    return Branches(), (rows(3, 4),)
