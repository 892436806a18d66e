"""What a forward writes in place, through views and what may be one: as of dense tensors however they lie."""

import functools
import itertools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l0kernels as l0
from l0kernels.nn.units import narrow, narrow_layout
from l0kernels.nn.units.place import groups_of

SIZE = 4


@functools.cache
def units(n_open):
    """A draw that leaves the first units of SIZE, and their space."""
    net = nn.Sequential(nn.Linear(3, SIZE), nn.ReLU(), nn.Linear(SIZE, 3), nn.ReLU(), nn.Linear(3, 1))
    l0.nn.gate_(net, torch.randn(2, 3))
    gates = groups_of(net.eval())
    for group, gate in zip(gates.groups, gates.gates, strict=True):
        values = [40.0] * n_open + [-40.0] * (SIZE - n_open) if group.units == SIZE else [40.0, -40.0, 40.0]
        gate.log_alpha.data.copy_(torch.tensor(values))
    return net[0]._l0_units.outs, gates.now(), gates.spaces


def images_of_layers(data):
    """As layers make them of contiguous ones."""
    return data.contiguous(memory_format=torch.channels_last), narrow_layout.IN_ORDER


def channels_last_images(data):
    return data.contiguous(memory_format=torch.channels_last), narrow_layout.LAST


def rows(data):
    return data, None


SOURCES = {
    "images": ((2, SIZE, 4, 3), 1, images_of_layers),
    "channels_last": ((2, SIZE, 4, 3), 1, channels_last_images),
    "contiguous": ((2, SIZE, 4, 3), 1, rows),
    "rows": ((2, 4, SIZE), 2, rows),
    "one row": ((SIZE, 4), 0, rows),
}
LAYOUTS = {
    "as it is": lambda x: x,
    "permuted": lambda x: x.transpose(0, -1),
    "of a permuted one": lambda x: x.transpose(-1, -2).neg(),
    "moved": lambda x: x.movedim(1, -1) * 2,
    "sliced": lambda x: x[1:],
    "sliced inside": lambda x: x.narrow(-1, 0, x.shape[-1] - 1),
    "half": lambda x: x.chunk(2, x.shape.index(SIZE))[0],
    "expanded": lambda x: x.unsqueeze(1).expand(*x.shape[:1], 2, *x.shape[1:]),
    "squeezed": lambda x: x.unsqueeze(0).transpose(1, 2).squeeze(0),
}
FUNCTIONS = {
    "flatten": lambda x: x.flatten(),
    "flatten 1": lambda x: x.flatten(1),
    "flatten -2": lambda x: torch.flatten(x, -2),
    "flatten 0 1": lambda x: x.flatten(0, 1),
    "reshape": lambda x: x.reshape(len(x), -1),
    "reshape by hand": lambda x: x.reshape((*x.shape[:-2], x.shape[-2] * x.shape[-1])),
    "reshape the same": lambda x: x.reshape(x.shape),
    "parts": lambda x: x.reshape(*x.shape[: (at := x.shape.index(4))], 2, 2, *x.shape[at + 1 :]),
    "unflatten": lambda x: x.unflatten(x.shape.index(4), (2, 2)),
    "view": lambda x: x.view(len(x), -1),
    "contiguous": lambda x: x.contiguous(),
    "contiguous channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to contiguous": lambda x: x.to(memory_format=torch.contiguous_format),
    "to channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "to": lambda x: x.to(x.dtype),
    "to copy": lambda x: x.to(x.dtype, copy=True),
    "clone": lambda x: x.clone(),
    "clone contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "chunk contiguous": lambda x: x.chunk(2, -1)[1].contiguous(),
    "split contiguous": lambda x: x.tensor_split(2, 1)[0].contiguous(),
    "permuted contiguous": lambda x: x.movedim(1, -1).contiguous(),
    "permuted flatten": lambda x: x.movedim(1, -1).flatten(1),
    "transposed reshape": lambda x: x.transpose(0, 1).reshape(x.shape[1], -1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "view_as": lambda x: x.view_as(x),
    "ravel": lambda x: x.ravel(),
    "select": lambda x: x[:, 0],
    "units": lambda x: x[:, :2],
    "diagonal": lambda x: x.diagonal(),
    "unbind": lambda x: x.unbind(1)[0],
    "shuffled": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape),
    "relu": lambda x: x.neg(),
    "catted": lambda x: torch.cat([x, x], 1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "softmax": lambda x: F.normalize(x, dim=-1),
}
WRITES = {
    "mul_": lambda x: x.mul_(2),
    "iadd": lambda x: x.__iadd__(x * 2),
    "setitem": lambda x: x.__setitem__(slice(0, 1), x[:1] * 3),
    "relu": lambda x: F.relu(x, inplace=True),
    "neg_": lambda x: x.neg_(),
}


class Run:
    """Everything that a forward made, as dense tensors, and the gradient of what it began with."""

    def __init__(self, begin, steps, writes):
        self.made, self.leaf = [], None
        x, self.leaf = begin
        self.made.append(x)
        for at, function in steps:
            self.made.append(function(self.made[at]))
        for at, write in writes:
            write(self.made[at])

    def values(self):
        with torch.no_grad():
            return [narrow.plain(x).clone() for x in self.made]

    def gradient(self):
        total = 0
        for i, x in enumerate(self.made):
            x = narrow.plain(x)
            weights = torch.linspace(1, 2 + i, x.numel(), dtype=x.dtype).view(x.shape)
            total = total + (x * weights).sum()
        return torch.autograd.grad(total, self.leaf)[0]


def dense_source(source, n_open):
    shape, dim, lay = SOURCES[source]
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = whole.index_fill(dim, torch.arange(n_open, SIZE), 0).requires_grad_()
    as_layers = lay is images_of_layers
    return (leaf.clone() if as_layers else lay(leaf)[0].clone()), leaf


def narrow_source(source, n_open, space, draw, spaces):
    _, dim, lay = SOURCES[source]
    leaf, index = dense_source(source, n_open)[1].detach().requires_grad_(), draw.present(space).index
    data, order = lay(leaf if index is None else leaf.index_select(dim, index))
    x = narrow.Narrow.of(data.clone(), space, dim, draw, spaces)
    x._order = order
    return x, leaf


def caught(compute):
    """What is computed, or torch's error of what is written but needed, or is one of several views."""
    try:
        return compute(), None
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return None, error


def made_of(run):
    return run, run.values()


def compared(source, n_open, steps, writes):
    """Whether a dense run is possible, with which the narrow one is compared."""
    dense = dense_source(source, n_open)
    try:
        right = Run(dense, steps, writes)
    except (RuntimeError, IndexError, ValueError):
        return False
    expected, wrong = caught(lambda: right.gradient().narrow(SOURCES[source][1], 0, n_open))
    space, draw, spaces = units(n_open)
    draw.twins = []
    values, error = caught(
        lambda: made_of(Run(narrow_source(source, n_open, space, draw, spaces), steps, writes))
    )
    if error is not None:
        if wrong is None:
            raise error
        return True
    mine, values = values
    for i, (a, b) in enumerate(zip(values, right.values(), strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, i=i: f"made {i}: {text}")
    if wrong is None:
        torch.testing.assert_close(mine.gradient().narrow(SOURCES[source][1], 0, n_open), expected)
    return True


@pytest.mark.parametrize("n_open", [0, 1, 2, SIZE])
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_written(source, n_open):
    """To the result, or to what it was made of: each sees of the other what it would of dense tensors."""
    done = set()
    for (name, function), layout, at in itertools.product(FUNCTIONS.items(), LAYOUTS.values(), range(3)):
        if compared(source, n_open, [(0, layout), (1, function)], [(at, WRITES["mul_"])]):
            done.add(name)
    assert {*FUNCTIONS} - done <= {"contiguous channels_last", "to channels_last"}


@pytest.mark.parametrize("seed", range(8))
def test_random_forwards(seed):
    """Views of views, several writes, of tensors that others have been made of."""
    rng, done = random.Random(seed), 0
    every = {**LAYOUTS, **FUNCTIONS}
    while done < 40:
        steps = [(rng.randrange(i + 1), every[rng.choice([*every])]) for i in range(rng.randint(1, 4))]
        writes = [
            (rng.randrange(len(steps) + 1), WRITES[rng.choice([*WRITES])]) for _ in range(rng.randint(1, 3))
        ]
        done += compared(rng.choice([*SOURCES]), rng.choice([0, 1, 2, 3, SIZE]), steps, writes)
