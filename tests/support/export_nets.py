"""Nets whose forwards call functions and views, gated, for tests of exports, counts and copies."""

import torch
from torch import nn
from torch.nn import functional as F

import l0kernels as l0
from l0kernels.nn.units.place import GatedUnits, groups_of


class BasicBlock(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.project = None
        if n_in != n_out:
            self.project = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.project is None else self.project(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1)
        return self.fc(torch.flatten(x, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.down, self.up = nn.Conv2d(n, hidden, 1), nn.Conv2d(hidden, n, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            SqueezeExcite(hidden, 4),
            nn.Conv2d(hidden, n, 1, bias=False),
            nn.BatchNorm2d(n),
        )

    def forward(self, x):
        return x + self.body(x)


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks = nn.ModuleList([InvertedResidual(6, 10), InvertedResidual(6, 9)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Mixer(nn.Module):
    """Layer norms over a residual stream, a scale of each branch, an embedding that is tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.up = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])
        self.down = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
        self.scale = nn.Parameter(torch.randn(8))
        self.last = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words) + self.places
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x)))) * self.scale
        return self.head(self.last(x))


class Dense(nn.Module):
    """Concatenations, of which the last is flattened."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.GroupNorm(11, 11)])
        self.layers = nn.ModuleList([nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(11, 4, 3, padding=1)])
        self.act = nn.PReLU(11)
        self.fc = nn.Linear(15 * 4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.layers[0](F.relu(self.norms[0](x)))], 1)
        x = torch.cat([x, self.layers[1](self.act(self.norms[1](x)))], 1)
        return self.fc(F.adaptive_max_pool2d(x, 2).flatten(1))


class Hourglass(nn.Module):
    """Transposed, grouped and 1-d convolutions, group and instance norms, halves of one layer."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(2, 8, 4, 2, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose1d(12, 6, 4, 2, 1)
        self.bare = nn.InstanceNorm1d(6)
        self.both = nn.Conv1d(6, 8, 1)
        self.ends = nn.ModuleList([nn.Conv1d(4, 2, 1), nn.Conv1d(4, 2, 1)])

    def forward(self, x):
        x = self.grouped(F.relu(self.norm(self.down(x))))
        a, b = self.both(self.bare(self.up(x))).chunk(2, 1)
        return self.ends[0](F.relu(a)) + self.ends[1](F.silu(b))


class Loop(nn.Module):
    """A convolution whose rows and columns are the same units, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (
            nn.Conv2d(2, 6, 3),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = x + F.relu(self.again(x))
        return self.last(x)


class Tagger(nn.Module):
    """A stack of both directions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(14, 3)
        self.lstm = nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.last(F.relu(self.lstm(self.first(x))[0]))


class Reader(nn.Module):
    """A cell in a loop, its first state learned; what it has read is read again."""

    def __init__(self):
        super().__init__()
        self.cell, self.start = nn.GRUCell(4, 8), nn.Parameter(torch.randn(8))
        self.rnn, self.last = nn.RNN(8, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        states = [self.start.expand(len(x), -1)]
        for t in range(x.shape[1]):
            states.append(self.cell(x[:, t], states[-1]))
        return self.last(self.rnn(torch.stack(states))[1][-1])


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


IMAGES = torch.Size((2, 3, 8, 8))
NETS = {
    "mlp": (mlp, torch.Size((4, 6))),
    "resnet": (ResNet, IMAGES),
    "mobile": (Mobile, IMAGES),
    "mixer": (Mixer, None),
    "dense": (Dense, IMAGES),
    "hourglass": (Hourglass, torch.Size((2, 2, 12))),
    "loop": (Loop, torch.Size((2, 2, 6, 6))),
    "tagger": (Tagger, torch.Size((3, 5, 4))),
    "reader": (Reader, torch.Size((3, 5, 4))),
}


def example(name):
    shape = NETS[name][1]
    return torch.randint(0, 11, (3, 5)) if shape is None else torch.randn(shape)


def set_gates(model, seed=0, closed=0.4):
    """Open, closed and fractional gates, one at least open of each group."""
    generator = torch.Generator().manual_seed(seed)
    for gate in groups_of(model).gates:
        n = gate.log_alpha.shape
        kind = torch.rand(n, generator=generator)
        fractional = torch.rand(n, generator=generator) * 3 - 1.5
        value = torch.where(kind < closed, -10.0, torch.where(kind < 0.7, 10.0, fractional))
        value[0] = 1.0
        gate.log_alpha.data.copy_(value)


def liven(model):
    """Statistics and norms that are not those of a new model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if getattr(module, "weight", None) is not None and module.weight.ndim == 1:
            nn.init.normal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)


def gated(name, seed=0, closed=0.4, **options):
    torch.manual_seed(seed)
    model, x = NETS[name][0](), example(name)
    liven(model)
    l0.nn.gate_(model, x, **options)
    set_gates(model, seed, closed)
    return model.eval(), x


def assert_same(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def is_plain(model):
    return not any(isinstance(m, GatedUnits | l0.nn.HardConcreteGate) for m in model.modules())
