"""Small nets whose rows go by an index or weights: messages in graphs, tokens to experts and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unit_examples import Example, Nets, into, rows

NETS: Nets = {}
net = into(NETS)


class Message(nn.Module):
    """Of the edges of a graph, each with features, in sums and means by node."""

    def __init__(self, nin: int, nout: int) -> None:
        super().__init__()
        self.message, self.own, self.edge = nn.Linear(nin, nout), nn.Linear(nin, nout), nn.Linear(2, nout)
        self.norm = nn.BatchNorm1d(nout)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        m = torch.relu(self.message(x)[edges[0]] + self.edge(features))
        total = torch.zeros(len(x), m.shape[1], dtype=m.dtype).index_add_(0, edges[1], m)
        degree = torch.zeros(len(x), dtype=m.dtype).index_add(0, edges[1], torch.ones(len(m), dtype=m.dtype))
        return torch.relu(self.norm(self.own(x) + total / degree.clamp(min=1)[:, None]))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Message(3, 6), Message(6, 6)
        self.third, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        x = self.first(x, edges, features)
        x = torch.relu(self.third(x + self.second(x, edges, features)))
        graph = (torch.arange(len(x)) % 2)[:, None].expand_as(x)
        pooled = x.new_zeros(2, x.shape[1]).scatter_add_(0, graph, x)
        largest = torch.zeros_like(x)[:2].scatter_reduce(0, graph, x, "amax", include_self=False)
        return self.out(pooled + largest)


@net
def graph() -> Example:
    return Graph(), (rows(7, 3), torch.randint(7, (2, 12)), rows(12, 2))


class Adjacency(nn.Module):
    """Of dense and sparse matrices, by function, operator and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((3, 6), (6, 5), (5, 6), (6, 4), (4, 5)))
        self.mix = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        first, second, third, fourth, fifth = self.layers
        x = torch.relu(torch.mm(a, first(x)))
        x = torch.relu(torch.sparse.mm(a.detach().to_sparse(), second(x)))
        x = torch.relu(a @ third(x).t().contiguous().t())
        x = torch.relu(torch.einsum("ts,sd->td", a, fourth(x)))
        x = torch.relu(torch.matmul(fifth(x).t(), a).t())
        return self.out(torch.einsum("gn,nd->gd", self.mix, x))


@net
def adjacency() -> Example:
    return Adjacency(), (rows(5, 3), rows(5, 5))


class Experts(nn.Module):
    """The best two of three, by tokens or by weights of all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.out = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(6, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, p = torch.relu(self.stem(x)), self.router(x).softmax(-1)
        best, index = p.topk(2, -1)
        y = torch.zeros_like(h)
        for at, expert in enumerate(self.experts):
            token, place = torch.where(index == at)
            y.index_add_(0, token, expert(h.index_select(0, token)) * best[token, place, None])
        all_of_them = torch.stack([expert(h) for expert in self.experts], 1)
        z = torch.einsum("te,ted->td", p, all_of_them) + (p[:, None] @ all_of_them)[:, 0]
        return self.out(h + y), self.out(h + z)


@net
def experts() -> Example:
    return Experts(), (rows(12, 4),)


class Pooled(nn.Module):
    """Attention by a sum: its weights have one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.score = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(5, 1)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(torch.tanh(self.key(x))).softmax(1)
        return self.out(torch.bmm(weights.transpose(1, 2), self.value(x)).squeeze(1))


@net
def pooled() -> Example:
    return Pooled(), (rows(3, 5, 4),)


class Sorted(nn.Module):
    """Rows in another order for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        h = self.up(x)
        h = torch.cat([h.sort(1).values, h.topk(2, 1)[0], torch.cummax(h, dim=1)[0]], 1)
        h = self.mid(h)
        h = h.take_along_dim(h.argsort(dim=1, descending=True), 1) + h.gather(
            1, order[..., None].expand_as(h)
        )
        first = torch.tensor([0, 2])
        h = h.index_copy(1, first, h[:, 3:5])
        return self.out(h.scatter(1, order[:, :2, None].expand(len(h), 2, h.shape[2]), h[:, 3:5]))


@net
def sorted_rows() -> Example:
    return Sorted(), (rows(3, 5, 4), torch.stack([torch.randperm(12) for _ in range(3)]))


class Halves(nn.Module):
    """The convolutions of a Conformer, and a GLU of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.glu = nn.Conv1d(4, 12, 1), nn.GLU(dim=1)
        self.depthwise, self.norm = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.BatchNorm1d(6)
        self.down, self.out = nn.Linear(6, 10), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.depthwise(self.glu(self.up(x)))))
        return self.out(F.glu(self.down(y.transpose(1, 2))))


@net
def halves() -> Example:
    return Halves(), (rows(3, 4, 5),)
