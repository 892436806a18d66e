"""Channels that forwards shuffle, gated, against the oracle of unit_oracle."""

import copy

import pytest
import shuffle_nets
import torch
import unit_examples
import unit_oracle
from torch import nn
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import _checks
from l0kernels.nn.units import narrow

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KNOWN = [name for name in shuffle_nets.SHUFFLES if name not in shuffle_nets.UNKNOWN]


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def gated(model, x):
    """The net, the same before it was gated, what is gated, and the example."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for parameter in part.parameters():
                nn.init.uniform_(parameter, 0.1, 1.0)
    model = model.double()
    plain = copy.deepcopy(model)
    return model, plain, l0.nn.gate_(model, x), (x,)


def check(case, pattern, train):
    model, plain, graph, args = case
    unit_oracle.set_gates(graph, model, pattern)
    model.train(train)
    unit_oracle.check(plain, model, graph, args, f"{pattern}, {'train' if train else 'eval'}")


@pytest.fixture
def dense(monkeypatch):
    """The names of the functions that got dense tensors."""
    seen, on_dense = [], narrow._on_dense

    def spy(func, args, kwargs):
        seen.append(func.__name__)
        return on_dense(func, args, kwargs)

    monkeypatch.setattr(narrow, "_on_dense", spy)
    return seen


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("how", shuffle_nets.SHUFFLES)
def test_shuffles(how, groups):
    case = gated(shuffle_nets.Shuffled(how, groups), unit_examples.image(size=6))
    for pattern in unit_oracle.PATTERNS:
        check(case, pattern, True)
    for pattern in ("half", "mixed"):
        check(case, pattern, False)
    case[0].l0_units.multiples = [1 if m == 1 else 4 for m in case[0].l0_units.multiples]
    check(case, "half", True)


@pytest.mark.parametrize("how", shuffle_nets.SHUFFLES)
def test_what_is_shuffled_may_be_written(how):
    model = shuffle_nets.Shuffled(how, 3, written=True)
    for x in (unit_examples.image(size=6), unit_examples.image(size=6).to(memory_format=torch.channels_last)):
        case = gated(copy.deepcopy(model), x)
        for pattern in unit_oracle.PATTERNS:
            check(case, pattern, True)


@pytest.mark.parametrize("how", KNOWN)
def test_shuffles_stay_packed(how, dense):
    model, _, graph, args = gated(shuffle_nets.Shuffled(how, 3), unit_examples.image(size=6))
    unit_oracle.set_gates(graph, model, "fractional")
    model.l0_units.multiples = [1] * len(graph.groups)
    model(*args).sum().backward()
    assert dense == []


def test_a_shuffle_without_a_derivative():
    model, _, graph, (x,) = gated(shuffle_nets.Shuffled("view", 3), unit_examples.image(size=6))
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    wanted = model(x).detach()
    model.change = lambda x, groups: torch.native_channel_shuffle(x, groups=groups)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("how", KNOWN)
def test_a_shuffle_couples_no_channels(how):
    graph = l0.nn.unit_graph(shuffle_nets.Shuffled(how, 3), torch.randn(1, 3, 6, 6))
    assert sum(group.units for group in graph.groups) == 12 + 6
    assert {pin.name for pin in graph.pinned} == {"first.weight", "last.weight"}


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_a_small_shufflenet(groups, dense):
    case = gated(shuffle_nets.ShuffleNet(groups), unit_examples.image(size=8))
    for pattern in unit_oracle.PATTERNS:
        check(case, pattern, True)
    for pattern in ("half", "mixed"):
        check(case, pattern, False)
    x = case[3][0].contiguous(memory_format=torch.channels_last)
    check((*case[:3], (x,)), "mixed", True)
    assert {*dense} <= {"chunk"}  # where all of a half are closed


def test_units_of_a_small_shufflenet():
    """Each channel that a branch makes is a unit, wherever it is shuffled to; those of depthwise
    convolutions are what they read."""
    graph = l0.nn.unit_graph(shuffle_nets.ShuffleNet(), torch.randn(1, 3, 8, 8))
    made = 6 + (6 + 6 + 6) + (6 + 6) + (6 + 6) + (12 + 12 + 12) + 8
    assert sum(group.units for group in graph.groups) == made


@pytest.mark.parametrize("pattern", ["open", "closed", "mixed", "one group closed"])
def test_dense_with_zeros(pattern, monkeypatch):
    case = gated(shuffle_nets.ShuffleNet(3), unit_examples.image(size=8))
    monkeypatch.setattr(_checks, "readable", lambda: False)
    check(case, pattern, True)


def test_on_meta_and_compiled():
    model, _, graph, (x,) = gated(shuffle_nets.ShuffleNet(), unit_examples.image(size=8))
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (2, 3)


@pytest.mark.parametrize("groups", [2, 3])
def test_export_and_copies(groups):
    model, _, graph, (x,) = gated(shuffle_nets.ShuffleNet(groups), unit_examples.image(size=8))
    unit_oracle.set_gates(graph, model, "half", seed=1)
    model.eval()
    torch.testing.assert_close(l0.nn.export(model)(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


class Seen(nn.Module):
    """Hands a part of its forward to somebody."""

    def __init__(self, look):
        super().__init__()
        self.first, self.last, self.look = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), look

    def forward(self, x):
        x = torch.relu(self.first(x))
        parted = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2)
        self.look(parted)
        return self.last(parted.reshape(x.shape))


def half_closed(look):
    model = Seen(lambda parted: None)
    graph = l0.nn.gate_(model, torch.randn(1, 3, 4, 4))
    unit_oracle.set_gates(graph, model, "half")
    model.look = look
    return model


def test_what_is_seen_of_parted_units():
    """All of it, as of the dense tensor."""
    seen = {}

    def look(parted):
        assert isinstance(parted, narrow.Narrow)
        seen.update(
            size=parted.size(), last=parted.shape[-1], ndim=parted.ndim, dtype=parted.dtype, n=parted.numel()
        )
        seen.update(text=repr(parted), copied=copy.deepcopy(parted.detach()), length=len(parted))

    half_closed(look)(torch.randn(2, 3, 4, 4))
    assert seen["size"] == (2, 4, 2, 4, 4)
    assert (seen["last"], seen["ndim"], seen["n"], seen["length"]) == (4, 5, 256, 2)
    assert seen["dtype"] == torch.float32
    assert type(seen["copied"]) is torch.Tensor
    assert seen["copied"].shape == (2, 4, 2, 4, 4)
    assert seen["text"].startswith("tensor(")


def test_hooks_of_parted_units():
    """They see the gradient of all units, and may change it."""
    grads = []

    def look(parted):
        parted.register_hook(lambda grad: grads.append(grad.clone()) or 0 * grad)

    model = half_closed(look)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert grads[0].shape == (2, 4, 2, 4, 4)
    assert not model.first.weight.grad.any()


def test_a_view_that_torch_refuses():
    model = half_closed(lambda parted: parted.view(2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(torch.randn(2, 3, 4, 4))


def test_a_function_of_autograd_must_not_get_parted_units():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    for look in (Twice.apply, lambda parted: Twice.apply(parted.contiguous())):
        with pytest.raises(RuntimeError, match=r"Twice\.apply must not get or make gated units"):
            half_closed(look)(torch.randn(2, 3, 4, 4))


def test_sizes_of_pieces_in_a_tensor():
    """Of torch.tensor_split, and pieces of several sizes."""

    class Pieces(nn.Module):
        def __init__(self, divide):
            super().__init__()
            self.first, self.last, self.divide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), divide

        def forward(self, x):
            return self.last(torch.cat([F.relu(part) for part in self.divide(self.first(x))][::-1], 1))

    for divide in (
        lambda x: torch.tensor_split(x, torch.tensor([3, 4]), dim=1),
        lambda x: x.tensor_split((3, 4), 1),
        lambda x: x.tensor_split(3, 1),
        lambda x: [part.mul_(2) for part in x.clone().tensor_split(3, 1)],
        lambda x: x.split(3, 1),
        lambda x: x.split([1, 3, 4], 1),
    ):
        case = gated(Pieces(divide), unit_examples.image(size=4))
        for pattern in ("half", "mixed", "closed"):
            check(case, pattern, True)


class Copied(nn.Module):
    """A copy in another order of dimensions is written, and what it is a copy of is read afterwards."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        x = self.first(x)
        copy = x.transpose(1, 2).contiguous().mul_(3.0)
        return self.last(x + copy.transpose(1, 2))


def test_a_copy_of_one_unit_is_a_copy():
    model, plain, graph, args = gated(Copied(), unit_examples.image(size=6))
    model.l0_units.multiples = [1 for _ in model.l0_units.multiples]
    unit_oracle.set_gates(graph, model, "open")
    with torch.no_grad():
        l0.nn.gate_parameters(model)[0][1:] = -9.0
    unit_oracle.check(plain, model, graph, args, "one open")
