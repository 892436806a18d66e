"""What L0Sequential calls, not computes: watched, replaced, of another kind."""

import itertools

import pytest
import torch
from sequential_nets import RELU, lenet5, spread

from l0kernels import nn


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def test_a_layer_with_hooks_is_called_by_itself():
    model = spread(lenet5())
    x = torch.randn(3, 1, 14, 14)
    nn.GateBank(model, seed=2).draw()
    y = model(x)
    for module in model:
        seen = []
        handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape))
        torch.testing.assert_close(model(x), y)
        assert len(seen) == 1
        assert seen[0][0] == 3
        handle.remove()
    model[3].register_full_backward_hook(lambda *_: seen.append("backward"))
    model(x).sum().backward()
    assert seen[-1] == "backward"


def test_a_layer_whose_forward_was_put_there_is_called():
    model = spread(lenet5()).eval()
    x = torch.randn(3, 1, 14, 14)
    expected, calls = model(x), []
    for layer in (model[0], model[3], model[7]):
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: calls.append(1) or forward(*args)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 3


def test_a_watched_inner_container_is_called():
    def watch(module, how):
        if how == "forward":
            module.forward = lambda x: 2 * type(module).forward(module, x) + 1
        elif how == "pre":
            module.register_forward_pre_hook(lambda _, args: (2 * args[0] + 1,))
        elif how == "post":
            module.register_forward_hook(lambda _, args, y: 2 * y + 1)
        elif how == "backward":
            module.register_full_backward_hook(lambda _, dx, dy: (2 * dx[0],))

    def residual(*layers):
        return nn.L0Residual(nn.L0Sequential(*layers), torch.nn.Conv2d(4, 4, 1))

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    kinds = (torch.nn.Sequential, nn.L0Sequential, residual)
    for how, kind in itertools.product(("forward", "pre", "post", "backward"), kinds):
        inner = kind(nn.L0Conv2d(4, 4, 3, padding=1, gate="both"), torch.nn.Tanh())
        watch(inner, how)
        model = nn.L0Sequential(nn.L0Conv2d(3, 4, 3), inner, nn.L0Conv2d(4, 2, 1, gate="in"))
        spread(model).double()
        nn.GateBank(model, seed=1).draw()
        y = model(x)
        expected = model[2](model[1](model[0](x)))
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        inputs = [x, *model.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
        )


def test_a_watched_inner_container_agrees_on_the_draw():
    gate = nn.HardConcreteGate(4)
    inner = torch.nn.Sequential(RELU(), nn.L0Conv2d(4, 4, 1, gate="both", in_gate=gate, out_gate=gate))
    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3, gate="out", out_gate=gate), inner))
    x = torch.randn(2, 3, 6, 6)

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = step()
    inner.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(step(), expected)
    assert gate.drawn is None


def test_a_convolution_of_another_kind_is_called():
    class Doubled(torch.nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3), Doubled(4, 4, 1), nn.L0Conv2d(4, 2, 1, gate="in")))
    x = torch.randn(2, 3, 6, 6)
    y = model.eval()(x)
    torch.testing.assert_close(y, model[2](model[1](model[0](x))))
    torch.testing.assert_close(nn.export(model)(x), y)


@pytest.mark.parametrize("gate", ["both", "out", "weight", (2, 2)])
@pytest.mark.parametrize("at", [0, 1])
def test_a_chain_within_with_a_replaced_layer(gate, at):
    """Its gates act, too, that an L0MLP does not have itself."""
    torch.manual_seed(0)
    inner = nn.L0MLP([8, 7, 6])
    old = inner.layers[at]
    inner.layers[at] = nn.L0Linear(old.in_features, old.out_features, gate=gate)
    model = nn.L0Sequential(nn.L0Linear(6, 8), torch.nn.ReLU(), inner, torch.nn.ReLU(), nn.L0Linear(6, 3))
    with torch.no_grad():
        for source in nn.gate_modules(model):
            source.log_alpha.normal_(0, 2)
    x, bank = torch.randn(4, 6), nn.GateBank(model, seed=1)
    for training in (True, False):
        model.train(training)
        bank.draw()
        expected = inner.layers[1](inner.layers[0](model[0](x).relu()).relu())
        torch.testing.assert_close(model(x), model[4](expected.relu()))


def test_a_norm_in_a_watched_inner_container_knows_its_gates():
    """A hook changes no value: the container is not called, for a call would hide the gates from the norm."""
    inner = torch.nn.Sequential(nn.L0BatchNorm2d(4), RELU())
    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3, gate=None), inner, nn.L0Conv2d(4, 2, 1, gate="in")))
    nn.GateBank(model, seed=1).draw()
    assert not model[2].in_gate.drawn.z.all()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    inner.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), expected)
