"""L0BatchNorm2d: torch's batch norm of the open channels, exactly zero in the others."""

import copy

import pytest
import torch

from l0kernels import Gates, nn
from l0kernels.conv2d import pack_channels, unpack_channels

OPTIONS = [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"affine": False}]
OPTIONS += [{"track_running_stats": False}]
STATS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def make(**options):
    """A layer and torch's own with the same random parameters and statistics."""
    theirs = torch.nn.BatchNorm2d(6, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    if theirs.track_running_stats:
        theirs.running_mean.normal_()
        theirs.running_var.uniform_(0.5, 2)
    return nn.L0BatchNorm2d.from_dense(theirs), theirs


def buffers(norm):
    return [None if norm.running_mean is None else getattr(norm, name).clone() for name in STATS]


def inputs():
    return (3 * torch.randn(4, 6, 3, 5, dtype=torch.float64) + 2).requires_grad_()


def assert_same(ours, theirs, x, y, y_theirs, stay=(), before=()):
    """Values, gradients and statistics; those of the channels `stay` are as before, which torch's are not."""
    torch.testing.assert_close(y, y_theirs)
    dy = torch.randn_like(y)
    leaves = [x, *ours.parameters()], [x, *theirs.parameters()]
    grads = [torch.autograd.grad(out, part, dy) for out, part in zip((y, y_theirs), leaves, strict=True)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)
    if theirs.track_running_stats and len(before):
        with torch.no_grad():
            theirs.running_mean[stay], theirs.running_var[stay] = before[0][stay], before[1][stay]
    for mine, other in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gates", ["none", "open"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_all_open_it_is_torchs(options, gates, packed, training):
    ours, theirs = make(**options)
    ours.train(training), theirs.train(training)
    x = inputs()
    drawn = Gates.from_z(torch.ones(6, dtype=torch.float64))
    for _ in range(2):
        if packed:
            y = unpack_channels(ours(pack_channels(x, drawn)))
        else:
            y = ours(x, None if gates == "none" else drawn)
        y_theirs = theirs(x)
    assert_same(ours, theirs, x, y, y_theirs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_closed_channels(options, packed, training):
    ours, theirs = make(**options)
    ours.train(training), theirs.train(training)
    z = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64)
    is_open = z != 0
    x, gates = inputs(), Gates.from_z(z)
    before = buffers(ours)
    y = unpack_channels(ours(pack_channels(x, gates))) if packed else ours(x, gates)
    y_theirs = torch.where(is_open.view(-1, 1, 1), theirs(x), 0.0)
    assert not y[:, ~is_open].any()
    assert_same(ours, theirs, x, y, y_theirs, ~is_open, before)


@pytest.mark.parametrize("packed", [True, False])
def test_all_closed(packed):
    ours, _ = make()
    before = buffers(ours)
    x, gates = inputs(), Gates.from_z(torch.zeros(6, dtype=torch.float64))
    y = unpack_channels(ours(pack_channels(x, gates))) if packed else ours(x, gates)
    assert y.shape == x.shape
    assert not y.any()
    for now, then in zip(buffers(ours)[:2], before[:2], strict=True):
        assert torch.equal(now, then)


def test_from_dense_copies():
    theirs = torch.nn.BatchNorm2d(3, 0.1, 0.2, dtype=torch.float64).eval()
    theirs.weight.requires_grad_(False)
    theirs.num_batches_tracked += 5
    ours = nn.L0BatchNorm2d.from_dense(theirs)
    assert type(ours) is nn.L0BatchNorm2d
    assert (ours.eps, ours.momentum, ours.training) == (0.1, 0.2, False)
    assert ours.weight.dtype == ours.running_mean.dtype == torch.float64
    assert not ours.weight.requires_grad
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
        assert ours.state_dict()[name].data_ptr() != value.data_ptr()
    ours.load_state_dict(copy.deepcopy(theirs).state_dict())
    with pytest.raises(TypeError, match=r"norm must be a torch\.nn\.BatchNorm2d, got BatchNorm1d"):
        nn.L0BatchNorm2d.from_dense(torch.nn.BatchNorm1d(3))


def test_refuses_what_it_cannot_take():
    norm = nn.L0BatchNorm2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gates must hold 3 gates"):
        norm(torch.ones(2, 3, 2, 2), Gates.from_z(torch.ones(4)))


@pytest.mark.parametrize("gated", [True, False])
def test_compiles_without_a_graph_break(gated):
    norm = nn.L0BatchNorm2d(6)
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 6, 3, 3)
    gates = Gates.from_z(torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0])) if gated else None
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, gates)
    torch.testing.assert_close(compiled, twin(x, gates))
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
