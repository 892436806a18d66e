"""What a forward reads, on every Python: the bytecode differs, the answer does not."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F

from l0kernels.nn.reads import reads_of


def product(layer, x):
    return F.linear(x, layer.weight)


class Forwards:
    """name: (attributes that are loaded and not called, the flags that are set)."""

    def calls(self, x):
        return self.b(self.a(x).tanh())

    def kinds(self, x):
        if isinstance(self.b.weight, torch.Tensor) and x.dtype != self.b.weight.dtype:
            x = x.to(self.b.weight.device)
        return self.b(x) if self.b.bias is not None else x

    def shape(self, x):
        return x / self.b.weight.shape[1]

    def value(self, x):
        return F.linear(x, self.a.weight.t())

    def elsewhere(self, x):
        return product(self.a, x)

    def own(self, x):
        return x * self.weight

    def asks(self, x):
        return x.to(next(self.parameters()).dtype)

    def parameters_of(self, x):
        return sum(p.abs().sum() for p in self.parameters())

    def hands(self, x):
        return self.b(x, in_gates=self.g())

    def walks(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) * i
        return x[:, 0]

    def opens(self, x):
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        return x

    def indexes(self, block, i):
        return block[i]

    def counts(self, x):
        for block in self.blocks:
            x = block(x) / len(block)
        return x / len(self.blocks)

    def folds(self, x):
        for block in self.blocks:
            x = functools.reduce(lambda x, layer: layer(x) + 1, block, x)
        return x

    def unpacks(self, x):
        first, second = self.blocks
        one, two = second
        return two(one(first(x)))

    def unpacks_each(self, x):
        for one, two in self.blocks:
            x = two(one(x))
        return x

    def unpacks_others(self, x):
        n, d = x.shape
        for i, block in enumerate(self.blocks):
            x = block(x) * i
        return x / (n + d)

    def fetches(self, x):
        return F.linear(x, operator.attrgetter("a.weight")(self))

    def looks(self, x):
        return getattr(self, "b")(x)  # noqa: B009


EXPECTED = {
    "calls": (set(), set()),
    "kinds": ({"b"}, set()),
    "shape": ({"b"}, {"weights"}),
    "value": ({"a"}, {"weights"}),
    "elsewhere": ({"a"}, {"weights"}),
    "own": (set(), set()),
    "asks": (set(), set()),
    "parameters_of": (set(), {"weights"}),
    "hands": (set(), {"gates"}),
    "walks": ({"blocks"}, set()),
    "opens": ({"blocks"}, {"opens"}),
    "indexes": (set(), {"opens"}),
    "counts": ({"blocks"}, {"opens"}),
    "folds": ({"blocks"}, {"opens"}),
    "unpacks": ({"blocks"}, {"opens"}),
    "unpacks_each": ({"blocks"}, {"opens"}),
    "unpacks_others": ({"blocks"}, set()),
    "fetches": ({"a"}, {"weights", "any_module"}),
    "looks": ({"b"}, {"any_module"}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_forward_reads(name):
    kind = type("Model", (torch.nn.Module,), {"forward": getattr(Forwards, name), "__module__": "elsewhere"})
    reads = reads_of(kind())
    names, flags = EXPECTED[name]
    assert names <= reads.names
    assert "a" not in reads.names - names
    for flag in ("weights", "gates", "any_module"):
        assert getattr(reads, flag) == (flag in flags), flag
    # A generator over parameters counts as opened on some Pythons: nothing is lost by that.
    assert reads.opens == ("opens" in flags) or name == "parameters_of"
