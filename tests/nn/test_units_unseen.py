"""Parts of a model that the example of gate_ does not show, or shows nothing of."""

import copy

import pytest
import torch
import unit_oracle
from torch import nn
from torch.nn import functional as F
from unit_cases import check
from unit_examples import image, rows

import l0kernels as l0

KINDS = {
    "linear": (lambda: nn.Linear(6, 4), lambda layer, h: layer(h.mean((2, 3)))),
    "by_name": (
        lambda: nn.Linear(6, 4),
        lambda layer, h: F.linear(input=h.mean((2, 3)), weight=layer.weight, bias=layer.bias),
    ),
    "conv": (lambda: nn.Conv2d(6, 4, 3), lambda layer, h: layer(h)),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, groups=3), lambda layer, h: layer(h)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2), lambda layer, h: layer(h)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), lambda layer, h: layer(h.flatten(2))),
    "positions": (lambda: nn.Linear(16, 4), lambda layer, h: layer(h.flatten(2))),
}


class Auxiliary(nn.Module):
    """As GoogLeNet: a head in train() alone, which gate_ does not see."""

    def __init__(self, kind):
        super().__init__()
        make, self.call = KINDS[kind]
        self.stem, self.body = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.aux, self.head = make(), nn.Linear(6, 2)
        self.reads = None

    def forward(self, x):
        h = torch.relu(self.stem(x))
        y = self.head(torch.relu(self.body(h)).mean((2, 3)))
        h = h if self.reads is None else h * self.reads[:, None, None]
        return (y, self.call(self.aux, h)) if self.training else y


@pytest.mark.parametrize("pattern", ["half", "mixed", "closed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_was_not_run_reads_z(kind, pattern, seeded):
    model, x = Auxiliary(kind).double(), image(size=4)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    assert [group.name for group in graph.groups] == ["stem", "body"]
    unit_oracle.set_gates(graph, model.train(), pattern)
    _, aux = model(x)
    drawn = model.l0_units._recent[-1].z
    z = drawn[:6].detach().requires_grad_()
    support = (z.detach() != 0).double()
    plain.reads = support if kind == "positions" else support * z  # over positions: who reads the units has z
    expected = plain.train()(x)[1]
    torch.testing.assert_close(aux, expected)
    if kind == "positions":
        return
    wanted = torch.autograd.grad(expected.square().sum(), [plain.stem.weight, plain.aux.weight, z])
    mine = torch.autograd.grad(aux.square().sum(), [model.stem.weight, model.aux.weight, drawn])
    torch.testing.assert_close(mine[0], wanted[0])
    torch.testing.assert_close(mine[1], wanted[1])
    torch.testing.assert_close(mine[2][:6], wanted[2])


class Routed(nn.Module):
    """Each row goes to one of two experts."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in "ab")

    def forward(self, x):
        h, first = torch.relu(self.stem(x)), x[:, 0] > 0
        if not self.writes:
            return self.head(torch.cat([expert(h[first == way]) for way, expert in enumerate(self.experts)]))
        y = torch.empty_like(h)
        for way, expert in enumerate(self.experts):
            y[first == way] = expert(h[first == way])
        return self.head(y)


@pytest.mark.parametrize("writes", [False, True], ids=["cat", "setitem"])
@pytest.mark.parametrize("goes", ["both", "one"])
def test_an_expert_without_rows(writes, goes, seeded):
    """What it would meet does not show, so that is whole; shapes of an export would not fit else."""
    model, both = Routed(writes).double(), rows(6, 4)
    both[::2, 0] *= both[::2, 0].sign()
    both[1::2, 0] *= -both[1::2, 0].sign()
    x = both if goes == "both" else torch.cat([both[:, :1].abs(), both[:, 1:]], 1)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    names = {group.name for group in graph.groups}
    made = set() if writes else {"experts.0.2"}  # empty_like is of the same units
    assert names == ({"stem", "experts.0.0", "experts.1.0"} | made if goes == "both" else {"experts.1.0"})
    for pattern in ("half", "mixed", "closed"):
        check((model, plain, graph, (both,)), pattern, True)
        model.eval()
        torch.testing.assert_close(l0.nn.export(model)(both), model(both))
