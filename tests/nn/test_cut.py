"""export(keep=...): a model of the size that was asked for."""

import pytest
import torch

import l0kernels as l0
from l0kernels import nn

T = torch.nn


@pytest.fixture(autouse=True)
def fixed(seeded):
    """Random nets, always the same."""


def spread(model, std=2.5):
    for gate in nn.gate_modules(model):
        T.init.normal_(gate.log_alpha, 0, std)
    return model


def size(model):
    return sum(p.numel() for p in nn.weight_parameters(model))


def convolutions():
    return T.Sequential(
        T.Conv2d(3, 96, 3),
        T.BatchNorm2d(96),
        T.ReLU(),
        T.Conv2d(96, 120, 3),
        T.ReLU(),
        T.Flatten(),
        T.Linear(120 * 16, 10),
    )


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_size_of_a_chain(keep, mode):
    model = spread(nn.L0MLP([60, 80, 50, 4], eval_mode=mode))
    small = nn.export(model, keep=keep)
    assert keep - 0.01 <= size(small) / size(model) <= keep
    assert all(gate.eval_mode == mode for gate in nn.gate_modules(model))


@pytest.mark.parametrize("keep", [0.8, 0.4, 0.15])
@pytest.mark.parametrize("cost", ["params", "flops"])
def test_size_of_a_model_that_gate_has_gated(keep, cost):
    model = convolutions()
    x = torch.randn(2, 3, 8, 8)
    nn.gate_(model, x)
    spread(model)
    small = nn.export(model, keep=keep, cost=cost, input_shape=x.shape)
    count = nn.eval_flops if cost == "flops" else lambda net, _: size(net)
    assert keep - 0.01 <= count(small, x.shape) / count(nn.ungate_(model), x.shape) <= keep


def test_the_likeliest_stay(monkeypatch):
    monkeypatch.setattr(nn.cut, "FILL", 0)
    model = spread(nn.L0MLP([60, 80, 4]))
    before = [gate.log_alpha.clone() for gate in nn.gate_modules(model)]
    small = nn.export(model, keep=0.3)
    first, ordered = small[0].index, before[1].sort(descending=True)[0]
    assert torch.equal(first, before[0].topk(len(first))[1].sort()[0])
    is_open = torch.zeros(60, dtype=torch.bool).index_fill(0, first, True)
    n = small[-1].in_features
    left = torch.cat((before[0][is_open], ordered[:n])).min()
    assert left >= torch.cat((before[0][~is_open], ordered[n:])).max()
    assert all(torch.equal(g.log_alpha, b) for g, b in zip(nn.gate_modules(model), before, strict=True))


def test_where_everything_is_decided_it_computes_as_eval():
    model = nn.L0MLP([60, 80, 50, 4])
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.copy_(torch.where(torch.rand(gate.n) < 0.5, 1.0 + torch.rand(gate.n), -4.0))
    share = nn.eval_l0(model) / size(model)
    x = torch.randn(5, 60)
    small = nn.export(model, keep=share)
    assert size(small) == nn.eval_l0(model)
    torch.testing.assert_close(small(x), model.eval()(x))


def test_gates_that_have_to_open_do():
    model = nn.L0MLP([60, 80, 4])
    for gate in nn.gate_modules(model):
        T.init.uniform_(gate.log_alpha, -4.5, -3.0)
    assert nn.open_units(model)["layers.0.in_gate"].open == 0
    small = nn.export(model, keep=0.5)
    assert 0.49 <= size(small) / size(model) <= 0.5
    assert small(torch.randn(3, 60)).std() > 0


@pytest.mark.parametrize("multiple", [4, 8])
def test_multiples(multiple):
    small = nn.export(spread(nn.L0MLP([60, 80, 48, 4])), keep=0.4, multiple_of=multiple)
    widths = [layer.in_features for layer in small if isinstance(layer, T.Linear)]
    assert all(n % multiple == 0 or n == 60 for n in widths)
    model = convolutions()
    nn.gate_(model, torch.randn(1, 3, 8, 8))
    small = nn.export(spread(model), keep=0.4, multiple_of=multiple)
    assert small[0].out_channels % multiple == small[3].out_channels % multiple == 0
    assert size(small) / size(nn.ungate_(model)) <= 0.4


@pytest.mark.parametrize(("block", "multiple"), [(2, 4), (4, 2), (3, 2)])
def test_multiples_of_blocks(block, multiple):
    model = T.Sequential(T.Linear(8, 36), T.ReLU(), T.Linear(36, 8))
    nn.gate_(model, torch.randn(1, 8), block=block)
    small = nn.export(spread(model), keep=0.5, multiple_of=multiple)
    assert small[0].out_features % multiple == 0
    assert small[0].out_features % block == 0
    assert 0 < small[0].out_features < 36


def test_evenly():
    model = spread(nn.L0MLP([64, 64, 64, 4]))
    nn.gate_modules(model)[0].log_alpha.data += 3  # the likeliest are all there
    widths = [
        [
            layer.in_features
            for layer in nn.export(model, keep=0.25, evenly=even)
            if isinstance(layer, T.Linear)
        ]
        for even in (False, True)
    ]
    assert widths[1] == [widths[1][0]] * 3
    assert widths[0][0] > widths[0][1]


def test_by_kind():
    model = spread(nn.L0MLP([60, 80, 50, 4]))
    small = nn.export(model, keep={"0.in_gate": 0.5, "1.in_gate": 0.25})
    widths = [layer.in_features for layer in small if isinstance(layer, T.Linear)]
    assert widths[:2] == [30, 20]
    assert widths[2] == nn.open_units(model)["layers.2.in_gate"].open  # its evaluation gates decide


def test_frozen_gates_are_as_they_are():
    model = spread(nn.L0MLP([60, 80, 50, 4]))
    first = nn.gate_modules(model)[0].freeze_()
    small = nn.export(model, keep=0.3)
    assert small[1].in_features == int(first.eval_gates().count[0])
    assert size(small) / size(model) <= 0.3


def test_other_distributions():
    gate = nn.HardConcreteGate(40, dist=l0.HardConcrete(0.5, -0.3, 1.2))
    model = nn.L0Sequential(
        nn.L0Linear(40, 60, gate="in", in_gate=gate), T.ReLU(), nn.L0Linear(60, 4, gate="in")
    )
    small = nn.export(spread(model), keep=0.3)
    assert 0.29 <= size(small) / size(model) <= 0.3


def test_errors():
    model = nn.L0MLP([6, 8, 4])
    with pytest.raises(ValueError, match="evenly needs keep"):
        nn.export(model, evenly=True)
    with pytest.raises(ValueError, match=r"keep must be more than 0.0.*every gate closed.*got 0.001"):
        nn.export(model, keep=0.001)
    with pytest.raises(ValueError, match="cost must be 'params', 'flops' or a function, got 'time'"):
        nn.export(model, keep=0.5, cost="time")
    with pytest.raises(ValueError, match=r"model must contain gates, got a Linear without any"):
        nn.export(T.Linear(2, 2), keep=0.5)
    with pytest.raises(ValueError, match="multiple_of must be 1 for a model"):
        nn.export(model, multiple_of=4)
