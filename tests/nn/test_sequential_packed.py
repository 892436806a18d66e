"""What L0Sequential draws once and keeps packed from layer to layer, and what the next layer reads of it."""

import functools
import sys

import pytest
import torch
from sequential_nets import RELU, block, check, lenet5, spread

from l0kernels import nn
from op_checks import count_open


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def count_draws(monkeypatch):
    calls = []
    gate_module = sys.modules["l0kernels.nn.gate"]
    draw = gate_module.sample_gates

    def counted(log_alphas, **options):
        calls.append(len(log_alphas) if isinstance(log_alphas, list) else 1)
        return draw(log_alphas, **options)

    monkeypatch.setattr(gate_module, "sample_gates", counted)
    return calls


def test_all_gates_in_one_draw(monkeypatch):
    shared = nn.HardConcreteGate(6)
    model = nn.L0Sequential(
        nn.L0Conv2d(3, 6, 1, gate="both", out_gate=shared),
        nn.L0Residual(
            nn.L0Sequential(nn.L0Conv2d(6, 6, 1, gate="in")), nn.L0Conv2d(6, 6, 1, out_gate=shared)
        ),
        torch.nn.Flatten(),
        nn.L0MLP((24, 5, 4)),
        nn.L0Linear(4, 2),
    )
    calls = count_draws(monkeypatch)
    model(torch.randn(2, 3, 2, 2))
    assert calls == [6]
    model.eval()(torch.randn(2, 3, 2, 2))
    assert calls == [6]


def test_a_gate_bank_is_respected(monkeypatch):
    model = spread(lenet5())
    bank = nn.GateBank(model, seed=5)
    x = torch.randn(3, 1, 14, 14)
    draw = bank.draw()
    calls = count_draws(monkeypatch)
    y = model(x)
    assert calls == []
    assert torch.equal(model(x), y)
    bank.draw()
    assert not torch.equal(model(x), y)
    with draw:
        assert torch.equal(model(x), y)
    bank.clear()
    assert not torch.equal(model(x), y)
    y.sum().backward()  # each forward is joined to log_alpha by nodes of its own
    assert all(gate.log_alpha.grad.any() for gate in nn.gate_modules(model))


def test_channels_stay_packed(monkeypatch):
    """No step between the first convolution and the linear layer sees a closed channel."""
    seen = []

    class Watched(RELU):
        def forward(self, x):
            seen.append(tuple(x.shape[1:]))
            return super().forward(x)

    steps = sys.modules["l0kernels.nn.steps"]
    monkeypatch.setattr(steps, "ZERO_KEEPING", steps.ZERO_KEEPING | {Watched})
    monkeypatch.setattr(steps, "POINTWISE", steps.POINTWISE | {Watched})
    model = spread(lenet5())
    for i in (1, 4):
        model[i] = Watched()
    model.eval()(torch.randn(3, 1, 14, 14))
    n, m, *_ = count_open(model)
    assert 0 < n < 6
    assert 0 < m < 10
    assert seen == [(n, 12, 12), (m, 4, 4)]

    seen.clear()
    model = spread(block())
    model[2] = Watched()
    model.eval()(torch.randn(2, 3, 5, 5))
    assert seen == [(count_open(model)[0], 5, 5)]


@pytest.mark.parametrize("gated", [True, False])
def test_columns_of_closed_channels_are_not_read(gated):
    torch.manual_seed(0)
    conv = spread(nn.L0Conv2d(3, 9, 2))
    model = nn.L0Sequential(conv, torch.nn.Flatten(), nn.L0Linear(36, 5, gate="in" if gated else None)).eval()
    x = torch.randn(4, 3, 3, 3)
    closed = conv.out_gate.eval_gates().z == 0
    assert closed.any()
    expected = model(x)
    with torch.no_grad():
        model[2].weight[:, closed.repeat_interleave(4)] = torch.nan
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert not model[2].weight.grad[:, closed.repeat_interleave(4)].any()


def test_a_sum_of_branches_packed_by_one_gate(monkeypatch):
    stream = nn.HardConcreteGate(10)

    def conv(n_in, size):
        return nn.L0Conv2d(n_in, 10, size, padding=size // 2, gate="out", out_gate=stream)

    def make():
        return nn.L0Sequential(
            conv(3, 3),
            nn.L0Residual(nn.L0Sequential(nn.L0BatchNorm2d(10), RELU(), conv(10, 3))),
            nn.L0Residual(torch.nn.Sequential(RELU(), conv(10, 1)), conv(10, 1)),
            nn.L0BatchNorm2d(10),
            torch.nn.Conv2d(10, 4, 1),
        )

    check(make, (4, 3, 5, 5), lambda m: dict.fromkeys((m[1].body[0], m[3]), m[0].out_gate))
    unpacked = []
    module = sys.modules["l0kernels.nn.sequential"]
    unpack = module.unpack_channels
    monkeypatch.setattr(module, "unpack_channels", lambda x: unpacked.append(x) or unpack(x))
    spread(make())(torch.randn(2, 3, 5, 5))
    assert unpacked == []


def half_open(n, seed=0):
    """A gate whose even half is closed, in train() as in eval()."""
    gate = nn.HardConcreteGate(n)
    with torch.no_grad():
        gate.log_alpha.fill_(30.0)
        gate.log_alpha[::2] = -30.0
    return gate


def reads(layer, n, *args):
    """A gated layer of n inputs, half of them closed."""
    return layer(n, *args, gate="in", in_gate=half_open(n))


COLUMNS = {
    # The convolution in front has as many channels as the gated layer has inputs, and they are others.
    "columns of images": (
        lambda: [torch.nn.Conv2d(3, 8, 1), reads(nn.L0Linear, 8, 5)],
        (2, 3, 4, 8),
    ),
    "columns behind pooling": (
        lambda: [nn.L0Conv2d(3, 8, 1, gate=None), torch.nn.MaxPool2d(1), RELU(), reads(nn.L0Linear, 8, 5)],
        (2, 3, 4, 8),
    ),
    "columns of sequences": (
        lambda: [nn.L0Conv1d(3, 8, 1, gate=None), reads(nn.L0Linear, 8, 5)],
        (2, 3, 8),
    ),
    "columns of one sequence": (
        lambda: [nn.L0Conv1d(3, 8, 1, gate=None), torch.nn.Flatten(), reads(nn.L0Linear, 8, 5)],
        (3, 8),
    ),
    "one image, flattened": (
        lambda: [nn.L0Conv2d(3, 4, 1, gate=None), torch.nn.Flatten(), reads(nn.L0Linear, 4, 5)],
        (3, 2, 2),
    ),
    "one image behind an unknown module": (
        lambda: [torch.nn.PReLU(), torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), reads(nn.L0Linear, 4, 5)],
        (3, 2, 2),
    ),
    "a sum of branches": (
        lambda: [
            nn.L0Residual(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(3, 8, 1)),
            RELU(),
            reads(nn.L0Linear, 8, 5),
        ],
        (2, 3, 4, 8),
    ),
    "pooling over channels": (
        lambda: [torch.nn.Conv1d(3, 8, 1), torch.nn.AvgPool2d(3, 1, 1), reads(nn.L0Conv1d, 8, 5, 1)],
        (2, 3, 7),
    ),
    "pooling over gated channels": (
        lambda: [
            nn.L0Conv1d(3, 8, 1, gate="out", out_gate=half_open(8)),
            torch.nn.AvgPool2d(3, 1, 1),
            nn.L0Conv1d(8, 5, 1, gate="in"),
        ],
        (2, 3, 7),
    ),
    "a sequence for one image": (
        lambda: [torch.nn.Conv1d(3, 4, 1), nn.L0Conv2d(2, 5, 1, gate="in", in_gate=half_open(2))],
        (2, 3, 6),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COLUMNS)
def test_units_lie_where_the_next_layer_reads_them(name, training):
    modules, shape = COLUMNS[name]
    modules = modules()
    model = nn.L0Sequential(*modules).double().train(training)
    if training:
        nn.GateBank(model, seed=1).draw()
    results = []
    for run in (model, lambda x: functools.reduce(lambda x, module: module(x), modules, x)):
        torch.manual_seed(2)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_pooled_map_flattens_into_the_gate_of_its_channels():
    """Where Flatten leaves one feature of each channel, a convolution computes those that are read."""
    model = spread(
        nn.L0Sequential(
            torch.nn.Conv2d(3, 12, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.L0Linear(12, 4)
        )
    ).eval()
    closed = model[3].in_gate.eval_gates().z == 0
    x = torch.randn(2, 3, 6, 6)
    expected = model[3](model[2](model[1](model[0](x))))
    with torch.no_grad():
        model[0].weight[closed] = torch.nan
    torch.testing.assert_close(model(x), expected)
