"""Nets of L0Sequential, and the dense masked composition that their tests compare with."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from l0kernels import nn, reference

RELU, POOL = torch.nn.ReLU, torch.nn.MaxPool2d


def spread(model, std=3.0, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, std)
    return model


def fill(model, value):
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.fill_(value)
    return model


class Dense:
    """The same net in plain torch: every product dense, every gate a multiplication by z."""

    def __init__(self, norms):
        self.norms = norms  # L0BatchNorm2d -> gate of its channels
        self.gates = {}

    def __call__(self, model, x):
        found = list(dict.fromkeys(nn.gate_modules(model)))
        pending = [gate for gate in found if gate.training]
        self.gates = dict(
            zip(pending, reference.sample_gates([g.log_alpha for g in pending]), strict=True)
        ) | {gate: gate.eval_gates() for gate in found if not gate.training}
        return self.run(model, x)

    def run(self, module, x):
        if isinstance(module, nn.L0MLP):
            gates = [self.z(layer.in_gate) for layer in module.layers]
            for i, (layer, z) in enumerate(zip(module.layers, gates, strict=True)):
                x = nn.mlp.ACTIVATIONS[module.activation]()(x) if i else x
                x = F.linear(x if z is None else x * z.z, layer.weight, layer.bias)
            return x
        if isinstance(module, torch.nn.Sequential):
            for child in module:
                x = self.run(child, x)
            return x
        if isinstance(module, nn.L0Residual):
            return (x if module.shortcut is None else self.run(module.shortcut, x)) + self.run(module.body, x)
        if isinstance(module, nn.L0BatchNorm2d):
            gate = self.norms.get(module)
            arguments = module.running_mean, module.running_var, module.weight, module.bias
            if module.training:
                module.num_batches_tracked.add_(1)
            options = module.training, module.momentum, module.eps
            return reference.gated_batch_norm(x, *arguments, *options, gates=self.z(gate))
        if isinstance(module, nn.L0Conv2d):
            if module.padding_mode != "zeros":
                sides = module._reversed_padding_repeated_twice
                x, padding = F.pad(x, sides, mode=module.padding_mode), 0
            else:
                padding = module.padding
            options = module.stride, padding, module.dilation, module.groups
            gates = {"in_gates": self.z(module.in_gate), "out_gates": self.z(module.out_gate)}
            return reference.gated_conv2d(x, module.weight, module.bias, *options, **gates)
        if isinstance(module, nn.L0Linear) and module.weight_gate is None:
            gates = {"in_gates": self.z(module.in_gate), "out_gates": self.z(module.out_gate)}
            return reference.gated_linear(x, module.weight, module.bias, **gates)
        return module(x)

    def z(self, gate):
        return None if gate is None else self.gates[gate]


def check(make, shape, norms=lambda model: {}, log_alpha=None, training=True, std=3.0, dtype=torch.float64):
    """Output, every gradient and every buffer of make() equal those of the dense composition."""
    torch.manual_seed(0)
    model = spread(make(), std).to(dtype).train(training)
    if log_alpha is not None:
        fill(model, log_alpha)
    twin = copy.deepcopy(model)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    y = model(x)
    torch.manual_seed(11)
    y_twin = Dense(norms(twin))(twin, x_twin)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, y_twin, **tolerance)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad, **tolerance)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        got, expected = (torch.zeros_like(p) if p.grad is None else p.grad for p in (mine, theirs))
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        if name.endswith("log_alpha"):
            assert torch.equal(got != 0, expected != 0), name
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return model


def lenet5():
    return nn.L0Sequential(
        nn.L0Conv2d(1, 6, 3),
        RELU(),
        POOL(2),
        nn.L0Conv2d(6, 10, 3),
        RELU(),
        POOL(2),
        torch.nn.Flatten(),
        nn.L0Linear(40, 17),
        RELU(),
        nn.L0Linear(17, 5),
    )


def small_net():
    layers = nn.L0Conv2d(1, 4, 3), RELU(), POOL(2), torch.nn.Flatten(), nn.L0Linear(16, 5)
    return nn.L0Sequential(*layers)


def block():
    """The recommended order; the gate stands on the inputs of the second convolution."""
    return nn.L0Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.L0BatchNorm2d(12),
        RELU(),
        nn.L0Conv2d(12, 8, 3, padding=1, gate="in"),
    )


def paper_block():
    """The paper's order: the gate on the outputs of the first convolution, in front of the norm."""
    with pytest.warns(UserWarning, match=r"'1' multiplies its outputs by gates directly before .* '2'"):
        return nn.L0Sequential(
            torch.nn.Identity(),
            nn.L0Conv2d(3, 12, 3, padding=1, bias=False),
            nn.L0BatchNorm2d(12),
            RELU(),
            torch.nn.Conv2d(12, 8, 3, padding=1),
        )


def wide_block(before_norm=False):
    """A block of a wide residual net, as the paper gates it and as recommended."""
    a, b = nn.L0BatchNorm2d(6), nn.L0BatchNorm2d(12)
    conv2 = torch.nn.Conv2d(12, 9, 3, padding=1, bias=False)
    conv1 = torch.nn.Conv2d(6, 12, 3, 2, padding=1, bias=False)
    if before_norm:
        conv1 = nn.L0Conv2d(6, 12, 3, 2, padding=1, bias=False, gate="out")
    else:
        conv2 = nn.L0Conv2d(12, 9, 3, padding=1, bias=False, gate="in")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = nn.L0Sequential(conv1, b, RELU(), conv2)
        return nn.L0Sequential(a, RELU(), nn.L0Residual(inner, torch.nn.Conv2d(6, 9, 1, 2, bias=False)))


def wide_norms(model):
    conv1, norm, _, conv2 = model[2].body
    return {norm: getattr(conv1, "out_gate", None) or conv2.in_gate}
