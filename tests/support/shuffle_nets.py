"""Ways to shuffle channels that forwards of people have, and nets with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def viewed(x: Tensor, groups: int) -> Tensor:
    """As torchvision's nets do."""
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, c, h, w)


def of_rows(x: Tensor, groups: int) -> Tensor:
    """Channels last."""
    y = x.permute(0, 2, 3, 1)
    return y.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)


def three(x: Tensor, groups: int) -> Tensor:
    """The units are seen in three dimensions; the first two change places."""
    n, c, *image = x.shape
    factor = next((f for f in (2, 3) if c % (groups * f) == 0), 1)
    y = x.view(n, groups, factor, c // groups // factor, *image)
    return y.permute(0, 2, 1, 3, *range(4, y.ndim)).reshape(n, c, *image)


def images_moved(x: Tensor, groups: int) -> Tensor:
    """Other dimensions change places, too."""
    y = x.reshape(len(x), groups, -1, *x.shape[2:]).permute(3, 4, 0, 2, 1)
    return y.flatten(3, 4).permute(2, 3, 0, 1)


SHUFFLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "view": viewed,
    "reshape": lambda x, g: x.view(len(x), g, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "permute": lambda x, g: (
        torch.reshape(x, (len(x), g, -1, *x.shape[2:])).permute(0, 2, 1, 3, 4).reshape(x.shape)
    ),
    "flatten": lambda x, g: torch.swapaxes(x.unflatten(1, (g, -1)), 1, 2).flatten(1, 2),
    "moved": lambda x, g: x.unflatten(1, (g, -1)).movedim(1, 2).flatten(1, 2),
    "images in one": lambda x, g: (
        x.reshape(len(x), g, x.shape[1] // g, -1).transpose(1, 2).contiguous().view(x.shape)
    ),
    "flattened": lambda x, g: (
        x.view(len(x), g, -1, *x.shape[2:]).transpose(1, 2).contiguous().flatten(1).view(x.shape)
    ),
    "function": F.channel_shuffle,
    "module": lambda x, g: nn.ChannelShuffle(g)(x),
    "rows": of_rows,
    "three": three,
    "images moved": images_moved,
    "twice": lambda x, g: viewed(viewed(x, g), x.shape[1] // g),
    "channels last": lambda x, g: viewed(x.contiguous(memory_format=torch.channels_last), g),
    "not moved": lambda x, g: x.view(len(x), g, -1, *x.shape[2:]).contiguous().view(x.shape),
    # No rule knows these: they get the dense tensor.
    "activation between": lambda x, g: (
        x.view(len(x), g, -1, *x.shape[2:]).transpose(1, 2).sigmoid().reshape(x.shape) + x
    ),
    "clone": lambda x, g: x.view(len(x), g, -1, *x.shape[2:]).transpose(1, 2).clone().reshape(x.shape),
    "images between": lambda x, g: (
        x.unflatten(1, (g, -1)).transpose(2, 3).contiguous().transpose(2, 3).reshape(x.shape)
    ),
    "one group": lambda x, g: torch.cat([x.unflatten(1, (g, -1))[:, 0], x], 1)[:, : x.shape[1]],
    "written into": lambda x, g: written(x, g),
    "written into a part": lambda x, g: written_part(x, g),
    "source written into": lambda x, g: source_written(x, g),
}
UNKNOWN = [*SHUFFLES][[*SHUFFLES].index("activation between") :]


def written(x: Tensor, groups: int) -> Tensor:
    """In place: who has the tensor that it is a view of sees it."""
    x = x.clone()
    x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2).mul_(2)
    return x.sin()


def written_part(x: Tensor, groups: int) -> Tensor:
    x = x.clone()
    x.view(len(x), groups, -1, *x.shape[2:])[:, 0].mul_(2)
    return x.sin()


def source_written(x: Tensor, groups: int) -> Tensor:
    """What is written into a tensor before a view of it is copied is seen there; later on it is not."""
    x = x.clone()
    view = x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2)
    x.mul_(2)
    copy = view.contiguous()
    x.relu_()
    return copy.view(x.shape)


class Shuffled(nn.Module):
    """Two layers with a norm between, whose channels are shuffled; one reads half of them.

    written: what is shuffled is changed in place.
    """

    def __init__(self, how: str, groups: int, width: int = 12, written: bool = False) -> None:
        super().__init__()
        self.written = written
        self.change, self.groups = SHUFFLES[how], groups
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width // 2, 6, 1), nn.Conv2d(6 + width // 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = (
            self.change(x, self.groups).mul_(2.0).relu_()
            if self.written
            else self.change(x.relu(), self.groups)
        )
        a, b = x.chunk(2, dim=1)
        return self.last(torch.cat((a, self.second(b)), dim=1))


def branch(cin: int, out: int, stride: int, first: bool) -> nn.Sequential:
    """Depthwise between products with kernels of one."""
    up = [nn.Conv2d(cin, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)] if first else []
    mid = out if first else cin
    return nn.Sequential(
        *up,
        nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False),
        nn.BatchNorm2d(mid),
        nn.Conv2d(mid, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Of ShuffleNetV2 (https://arxiv.org/abs/1807.11164)."""

    def __init__(self, cin: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        half = out // 2
        self.groups = groups
        self.branch1 = branch(cin, half, stride, False) if stride > 1 else None
        self.branch2 = branch(cin if stride > 1 else half, half, stride, True)

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            a, b = x.chunk(2, dim=1)
            out = torch.cat((a, self.branch2(b)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return viewed(out, self.groups)


class ShuffleNet(nn.Module):
    """A small ShuffleNetV2."""

    def __init__(self, groups: int = 2, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(
            InvertedResidual(6, width, 2, groups),
            InvertedResidual(width, width, 1, groups),
            InvertedResidual(width, width, 1, groups),
            InvertedResidual(width, 2 * width, 2, groups),
        )
        self.last = nn.Sequential(nn.Conv2d(2 * width, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.blocks(self.stem(x))).mean([2, 3]))
