"""torch.einsum as a product of matrices, which the unit graph and packed activations know."""

import copy

import pytest
import torch
import unit_oracle
from torch import nn

import l0kernels as l0
from l0kernels.nn.units.einsum import as_product

PRODUCTS = [
    ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("b i h d, b j h d -> b h i j", (2, 4, 3, 5), (2, 6, 3, 5)),
    ("bhij,bjhd->bihd", (2, 3, 4, 6), (2, 6, 3, 5)),
    ("...id,...jd->...ij", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("h...id,dh...j->h...ji", (3, 2, 7, 4, 5), (5, 3, 2, 7, 6)),
    ("bik,bkj->bij", (2, 4, 5), (2, 5, 6)),
]
OTHERS = [
    ("bhid,bjd->bhij", (2, 3, 4, 5), (2, 6, 5)),  # two dimensions of one operand alone
    ("ik,kj->ij", (4, 5), (5, 6)),  # none of both
    ("bik,bkj", (2, 4, 5), (2, 5, 6)),
    ("bik,bkj->b", (2, 4, 5), (2, 5, 6)),
    ("bii,bij->bj", (2, 4, 4), (2, 4, 6)),
    ("bi,bj->bij", (2, 4), (2, 6)),
    ("...id,jd->...ij", (2, 3, 4, 5), (6, 5)),
    ("bid,bjd->bij", (2, 4, 1), (2, 6, 5)),  # one that meets all of the other
]


@pytest.mark.parametrize(("equation", "a", "b"), PRODUCTS)
def test_products(equation, a, b):
    a, b = torch.randn(a, dtype=torch.float64), torch.randn(b, dtype=torch.float64)
    for operands in ((a, b), ([a, b],)):
        product = as_product(torch.einsum, (equation, *operands), {})
        torch.testing.assert_close(product(), torch.einsum(equation, a, b))


@pytest.mark.parametrize(("equation", "a", "b"), OTHERS)
def test_what_is_no_product(equation, a, b):
    a, b = torch.randn(a), torch.randn(b)
    torch.einsum(equation, a, b)  # it is valid
    assert as_product(torch.einsum, (equation, a, b), {}) is None


def test_other_calls():
    a = torch.randn(2, 4, 4)
    assert as_product(torch.einsum, ("bij->bji", a), {}) is None
    assert as_product(torch.einsum, ("bij,bjk,bkl->bil", a, a, a), {}) is None
    assert as_product(torch.einsum, (a, [0, 1, 2], a, [0, 2, 3], [0, 1, 3]), {}) is None
    assert as_product(torch.bmm, (a, a), {}) is None


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 4
        self.first, self.qkv, self.out = nn.Linear(5, 12), nn.Linear(12, 36, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], self.heads, -1) for t in self.qkv(self.first(x).relu()).chunk(3, -1))
        scores = torch.einsum("blhd,bshd->bhls", q, k) / 2
        return self.out(torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2))


def test_heads_are_found_run_and_exported():
    model, x = Attention().double(), torch.randn(2, 6, 5, dtype=torch.float64)
    graph = l0.nn.gate_(model, x)
    assert {group.name: (group.kind, group.units) for group in graph.groups} == {
        "first": ("units", 12),
        "qkv": ("heads", 4),
    }
    heads = model.l0_units.gates[1].log_alpha
    with torch.no_grad():
        heads.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    model.eval()
    small = l0.nn.export(model)
    assert small.heads == 2
    assert small.qkv.out_features == 18
    torch.testing.assert_close(small(x), model(x))


class Relative(Attention):
    """With a learned bias of each head, as MaxViT has it: rows of a table, named by a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, self.heads))
        self.register_buffer("apart", torch.arange(6)[:, None] - torch.arange(6) + 5)

    def bias(self):
        return self.table[self.apart.view(-1)].view(6, 6, -1).permute(2, 0, 1).contiguous()[None]

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], self.heads, -1) for t in self.qkv(self.first(x).relu()).chunk(3, -1))
        scores = torch.einsum("blhd,bshd->bhls", q, k) + self.bias()
        return self.out(torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2))


@pytest.mark.parametrize("pattern", ["open", "half", "one unit open", "fractional"])
def test_a_bias_by_head_from_a_table(pattern):
    model, x = Relative().double(), torch.randn(2, 6, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    heads = graph.groups[1]
    assert (heads.kind, heads.units) == ("heads", 4)
    assert ("table", 1) in {(member.name, member.dim) for member in heads.members}
    unit_oracle.set_gates(graph, model, pattern)
    z = [gate.eval_gates().z.detach() for gate in model.l0_units.gates]
    model.eval()
    torch.testing.assert_close(model(x), unit_oracle.Oracle(plain.eval(), graph, z).model(x))
    small = l0.nn.export(model)
    assert small.table.shape == (11, int((z[1] != 0).sum()))
    torch.testing.assert_close(small(x), model(x))
