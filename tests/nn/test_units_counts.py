"""Counts and the penalty of a model that gate_ has gated, beside sums over its elements."""

import copy
import itertools
import math

import pytest
import torch
import unit_oracle
from export_nets import NETS, assert_same, gated, set_gates
from torch import nn
from torch.nn import functional as F
from unit_cases import LAYERED, layered

import l0kernels as l0
from l0kernels.nn.cost import cost_of
from l0kernels.nn.units.place import groups_of


def element_openness(model, p_of):
    """P(open) of each element of each parameter that units touch, from the members of the groups alone."""
    gates = groups_of(model)
    units: dict[str, dict[int, dict[int, tuple[int, int]]]] = {}
    for group, gate in zip(gates.groups, gates.gates, strict=True):
        for member in group.members:
            at = units.setdefault(member.name, {}).setdefault(member.dim, {})
            for unit, entries in enumerate(member.index.tolist()):
                for entry in entries:
                    at[entry] = (id(gate), unit // gates.block)
    p = {(id(gate), i): value for gate in gates.gates for i, value in enumerate(p_of(gate))}
    found = {}
    parameters = dict(model.named_parameters())
    for name, sides in units.items():
        if name not in parameters:
            continue
        shape = [n if dim in sides else 1 for dim, n in enumerate(parameters[name].shape)]
        values = []
        for place in itertools.product(*map(range, shape)):
            keys = {sides[dim][at] for dim, at in enumerate(place) if dim in sides and at in sides[dim]}
            values.append(
                torch.stack([p[key] for key in keys]).prod() if keys else torch.tensor(1.0).double()
            )
        found[name] = torch.stack(values).view(shape)
    return found


def p_open(gate):
    return gate.dist.p_open(gate.log_alpha).double()


@pytest.mark.covering(1)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_expected_l0_is_the_sum_over_the_elements(name, block):
    model, _ = gated(name, block=block)
    openness = element_openness(model, p_open)
    wanted = sum(
        p.numel() if n not in openness else openness[n].expand(p.shape).sum()
        for n, p in model.named_parameters()
        if "l0_units" not in n
    )
    found = l0.nn.expected_l0(model)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    alphas = l0.nn.gate_parameters(model)
    ours, theirs = torch.autograd.grad(found, alphas), torch.autograd.grad(wanted, alphas)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_expected_flops_are_those_of_the_draws(name):
    """With gates that are open or closed for sure, what is expected is what is evaluated."""
    model, x = gated(name)
    for gate in groups_of(model).gates:
        gate.log_alpha.data = torch.where(gate.log_alpha > 0, 60.0, -60.0)
    shape = x if name == "mixer" else x.shape
    flops = l0.nn.eval_flops(model, shape)
    assert (
        round(l0.nn.expected_flops(model, shape).item())
        == flops
        == l0.nn.eval_flops(l0.nn.export(model), shape)
    )
    if name in ("mlp", "mixer"):
        assert l0.nn.eval_flops(model) == l0.nn.eval_flops(l0.nn.export(model))
    for gate in groups_of(model).gates:
        gate.log_alpha.data.fill_(60)
    l0.nn.ungate_(dense := copy.deepcopy(model))
    assert l0.nn.eval_flops(model, shape) == l0.nn.eval_flops(dense, shape)
    assert l0.nn.eval_l0(model) == sum(p.numel() for p in dense.parameters())


def test_expected_flops_have_a_gradient():
    model, x = gated("resnet")
    l0.nn.expected_flops(model, x.shape).backward()
    assert all(p.grad is not None and (p.grad >= 0).all() for p in l0.nn.gate_parameters(model))


def test_flops_of_three_dimensional_and_transposed_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv3d(2, 6, 3), nn.ConvTranspose3d(6, 5, 2, 2), nn.Conv3d(5, 2, 1)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    model, x = Net(), torch.randn(1, 2, 5, 5, 5)
    l0.nn.gate_(model, x)
    set_gates(model)
    model.eval()
    small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert l0.nn.eval_flops(model, x.shape) == l0.nn.eval_flops(small, x.shape)
    with pytest.raises(ValueError, match="input_shape must be given"):
        l0.nn.eval_flops(model)


def test_open_units_by_name():
    model, _ = gated("resnet")
    names = [group.name for group in groups_of(model).groups]
    found = l0.nn.open_units(model)
    assert list(found) == names
    assert list(found.values()) == [(int(gate().count[0]), gate.n) for gate in groups_of(model).gates]


@pytest.mark.covering(1)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_penalty_is_the_sum_over_the_elements(name, block):
    model, _ = gated(name, block=block)
    model.double().train()
    for gate in groups_of(model).gates:
        gate.lam = 0.3
    openness = element_openness(model, p_open)
    parameters = dict(model.named_parameters())
    l2 = sum((p * parameters[n].square()).sum() for n, p in openness.items())
    size = 0.0
    for group, gate in zip(groups_of(model).groups, groups_of(model).gates, strict=True):
        size = size + group.parameters * p_open(gate).repeat_interleave(block)[: group.units].sum()
    wanted = 0.3 * size + 0.01 / 2 * l2
    found = l0.nn.penalty(model, weight_decay=0.01)
    torch.testing.assert_close(found, wanted)
    inputs = [p for n, p in parameters.items() if n in openness or "l0_units" in n]
    ours = torch.autograd.grad(found, inputs)
    theirs = torch.autograd.grad(wanted, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["resnet", "mixer"])
def test_penalty_in_single_precision_and_of_a_frozen_gate(name):
    model, _ = gated(name)
    groups_of(model).gates[0].freeze_()
    model.train()
    found = l0.nn.penalty(model, weight_decay=0.1)
    found.backward()
    openness = element_openness(
        model, lambda gate: (gate.eval_gates().z != 0).double() if gate.frozen else p_open(gate)
    )
    parameters = dict(model.named_parameters())
    l2 = sum((p * parameters[n].double().square()).sum() for n, p in openness.items())
    size = sum(
        gate.lam * group.parameters * p_open(gate).sum()
        for group, gate in zip(groups_of(model).groups, groups_of(model).gates, strict=True)
        if not gate.frozen
    )
    torch.testing.assert_close(found.double(), size + 0.05 * l2, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("name", LAYERED)
def test_counts_of_gates_of_layers(name):
    model, plain, graph, _ = layered(name)
    unit_oracle.set_gates(graph, model, "fractional")
    gates = model.l0_units
    p = {gate: gate.dist.p_open(gate.log_alpha.double()) for gate in l0.nn.gate_modules(model)}
    of = dict(
        zip((group.name for group in gates.groups), zip(gates.gates, gates.layered, strict=True), strict=True)
    )
    sides = {}
    for group in gates.groups:
        gate, at = of[group.name]
        own = p[gate] if at is None else p[gate] * p[gates.l0_layers][at]
        for member in group.members:
            along = sides.setdefault(member.name, {}).setdefault(member.dim, {})
            along.update({int(i): (group.name, u, own[u]) for u, row in enumerate(member.index) for i in row})
    total = 0.0
    for parameter_name, parameter in plain.named_parameters():
        if parameter_name not in sides:
            total += parameter.numel()
            continue
        for place in itertools.product(*map(range, parameter.shape)):
            met = {along[place[dim]] for dim, along in sides[parameter_name].items() if place[dim] in along}
            total += math.prod(
                float(value) for _, _, value in {(n, u): (n, u, v) for n, u, v in met}.values()
            )
    assert float(l0.nn.expected_l0(model)) == pytest.approx(total, rel=1e-9)
    found = cost_of(model, l0.nn.gate_modules(model))
    x = torch.cat([p[gate].detach() for gate in found.gates])
    assert float(l0.reference.budget.Terms(found.terms)(x)) == pytest.approx(total, rel=1e-9)
