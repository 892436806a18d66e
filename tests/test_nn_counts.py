"""Expected and actual sizes against enumeration of all gate patterns."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from l0kernels import nn, reference

L = math.log(0.1 / 1.1)


def spread(model, std=2.0):
    torch.manual_seed(0)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, std)
    return model


def patterns(model):
    """(probability, {gate: list of 0/1}) of every combination of open and closed gates."""
    gates = nn.gate_modules(model)
    p = [torch.sigmoid(gate.log_alpha.detach().double() - 2 / 3 * L).flatten().tolist() for gate in gates]
    for bits in itertools.product((0, 1), repeat=sum(map(len, p))):
        rest = iter(bits)
        pattern = {
            gate: [next(rest) for _ in probabilities] for gate, probabilities in zip(gates, p, strict=True)
        }
        probability = math.prod(
            q if bit else 1 - q
            for gate, probabilities in zip(gates, p, strict=True)
            for q, bit in zip(probabilities, pattern[gate], strict=True)
        )
        yield probability, pattern


def alive(layer, cols, rows, pattern):
    """(weights, biases) of a layer whose inputs and outputs are closed by the gates in cols and rows."""
    open_in = [all(pattern[gate][i] for gate in cols) for i in range(layer.in_features)]
    open_out = [all(pattern[gate][o] for gate in rows) for o in range(layer.out_features)]
    weights = 0
    for o, i in itertools.product(range(layer.out_features), range(layer.in_features)):
        own = True
        if getattr(layer, "weight_gate", None) is not None:
            b_out, b_in = layer.block or (1, 1)
            own = pattern[layer.weight_gate][o // b_out * layer.weight_gate.log_alpha.shape[1] + i // b_in]
        weights += open_in[i] and open_out[o] and own
    return weights, sum(open_out) if layer.bias is not None else 0


def expectation(model, sides):
    """E[parameters], E[FLOPs of a row] by enumeration; sides: (layer, gates on inputs, gates on outputs)."""
    params = flops = 0.0
    for probability, pattern in patterns(model):
        for layer, cols, rows in sides:
            weights, biases = alive(layer, cols, rows, pattern)
            params += probability * (weights + biases)
            flops += probability * (2 * weights + biases)
    return params, flops


def check(model, sides, other=0, rows=1):
    spread(model)
    params, flops = expectation(model, sides)
    assert nn.expected_l0(model).item() == pytest.approx(params + other, rel=1e-6)
    assert nn.expected_flops(model).item() == pytest.approx(flops, rel=1e-6)
    n_in = sides[0][0].in_features
    assert nn.expected_flops(model, (7, n_in)).item() == pytest.approx(7 * rows * flops, rel=1e-6)

    pattern = {gate: (gate.eval_gates().z != 0).int().tolist() for gate in nn.gate_modules(model)}
    counts = [alive(layer, cols, out, pattern) for layer, cols, out in sides]
    assert nn.eval_l0(model) == sum(map(sum, counts)) + other
    assert nn.eval_flops(model, (7, n_in)) == 7 * rows * sum(
        2 * weights + biases for weights, biases in counts
    )


@pytest.mark.parametrize("bias", [True, False])
def test_single_layers(bias):
    layer = nn.L0Linear(4, 3, bias, gate="in")
    check(layer, [(layer, [layer.in_gate], [])])
    layer = nn.L0Linear(4, 3, bias, gate="out")
    check(layer, [(layer, [], [layer.out_gate])])
    layer = nn.L0Linear(4, 3, bias, gate="both")
    check(layer, [(layer, [layer.in_gate], [layer.out_gate])])
    for kind in ("weight", (2, 3), (2, 2)):
        layer = nn.L0Linear(3, 2, bias, gate=kind)
        check(layer, [(layer, [], [])])
    layer = nn.L0Linear(4, 3, bias, gate=None)
    check(layer, [(layer, [], [])])


@pytest.mark.parametrize("gate_input", [True, False])
def test_mlp_chains_its_gates(gate_input):
    mlp = nn.L0MLP((4, 3, 2, 2), gate_input=gate_input)
    a, b, c = mlp.layers
    first = [a.in_gate] if gate_input else []
    check(mlp, [(a, first, [b.in_gate]), (b, [b.in_gate], [c.in_gate]), (c, [c.in_gate], [])])


def test_closed_outputs_are_the_next_closed_inputs():
    a, b = nn.L0Linear(4, 3, gate="out"), torch.nn.Linear(3, 2)
    check(torch.nn.Sequential(a, torch.nn.ReLU(), b), [(a, [], [a.out_gate]), (b, [a.out_gate], [])])


def test_unless_the_activation_moves_zero():
    a, b = nn.L0Linear(4, 3, gate="out"), torch.nn.Linear(3, 2)
    check(torch.nn.Sequential(a, torch.nn.Sigmoid(), b), [(a, [], [a.out_gate]), (b, [], [])])


def test_closed_inputs_close_the_layer_before_whatever_the_activation():
    a, b = torch.nn.Linear(2, 3), nn.L0Linear(3, 2)
    for act in (torch.nn.Sigmoid(), torch.nn.Tanh(), torch.nn.Dropout(0.5)):
        check(torch.nn.Sequential(a, act, b), [(a, [], [b.in_gate]), (b, [b.in_gate], [])])


def test_two_gates_on_one_unit():
    a, b = nn.L0Linear(2, 3, gate="out"), nn.L0Linear(3, 2, gate="both")
    gates = [a.out_gate, b.in_gate]
    check(torch.nn.Sequential(a, torch.nn.ReLU(), b), [(a, [], gates), (b, gates, [b.out_gate])])


def test_one_gate_twice_on_a_unit_counts_once():
    gate = nn.HardConcreteGate(3)
    a, b = nn.L0Linear(2, 3, gate="out", out_gate=gate), nn.L0Linear(3, 2, in_gate=gate)
    check(torch.nn.Sequential(a, b), [(a, [], [gate]), (b, [gate], [])])


@pytest.mark.parametrize("kind", ["both", "weight", (2, 2)])
def test_one_gate_on_both_sides_of_a_layer(kind):
    gate = nn.HardConcreteGate(3)
    a, c = nn.L0Linear(2, 3, gate="out", out_gate=gate), nn.L0Linear(3, 2, in_gate=gate)
    b = nn.L0Linear(3, 3, gate=kind, **({"in_gate": gate, "out_gate": gate} if kind == "both" else {}))
    check(torch.nn.Sequential(a, b, c), [(a, [], [gate]), (b, [gate], [gate]), (c, [gate], [])])


def test_weight_gates_between_neighbours():
    a, b, c = nn.L0Linear(2, 2, gate="out"), nn.L0Linear(2, 3, gate=(2, 2)), nn.L0Linear(3, 2)
    model = torch.nn.Sequential(a, b, torch.nn.GELU(), c)
    check(model, [(a, [], [a.out_gate]), (b, [a.out_gate], [c.in_gate]), (c, [c.in_gate], [])])


def test_nested_containers_are_one_chain():
    mlp, b = nn.L0MLP((3, 2, 2)), torch.nn.Linear(2, 3)
    c = nn.L0Linear(3, 2)
    model = torch.nn.Sequential(mlp, torch.nn.Sequential(torch.nn.ReLU(), b), torch.nn.Sequential(), c)
    x, y = mlp.layers
    sides = [(x, [x.in_gate], [y.in_gate]), (y, [y.in_gate], []), (b, [], [c.in_gate]), (c, [c.in_gate], [])]
    check(model, sides)


def test_a_border_between_layers():
    a, b = nn.L0Linear(3, 4, gate="out"), nn.L0Linear(4, 2)
    model = torch.nn.Sequential(a, torch.nn.LayerNorm(4), b)
    check(model, [(a, [], [a.out_gate]), (b, [b.in_gate], [])], other=8)


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(
            nn.L0Linear(3, 2, gate="out"), torch.nn.ReLU(), torch.nn.Linear(2, 3)
        )
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        return x + self.scale * self.inner(x) + self.inner(x)


def test_other_modules_are_borders_and_rows_are_seen_by_running():
    model = spread(Residual())
    a, b = model.inner[0], model.inner[2]
    sides = [(a, [], [a.out_gate]), (b, [a.out_gate], [])]
    params, flops = expectation(model, sides)
    assert nn.expected_l0(model).item() == pytest.approx(params + 3 + 6)
    assert nn.expected_flops(model, (5, 4, 3)).item() == pytest.approx(2 * 20 * flops)


def test_a_layer_used_twice_has_its_parameters_once():
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    assert nn.eval_l0(model) == 12
    assert nn.eval_flops(model, (1, 3)) == 2 * (18 + 3)


def test_convolutions_in_front():
    conv = torch.nn.Conv2d(1, 2, 3, padding=1)
    layer = nn.L0Linear(8, 3)
    model = spread(torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), layer))
    p = layer.in_gate.dist.p_open(layer.in_gate.log_alpha).double()
    channels = (1 - (1 - p).view(2, 4).prod(1)).sum().item()  # closed where all four features are
    conv_flops = 5 * 4 * channels * (2 * 9 + 1)
    expected = reference.linear_expected_flops(p, 3)
    assert nn.expected_flops(model, (5, 1, 2, 2)).item() == pytest.approx(conv_flops + 5 * expected.item())
    params = reference.linear_expected_params(p, 3)
    assert nn.expected_l0(model).item() == pytest.approx(10 * channels + params.item())
    with pytest.raises(ValueError, match="input_shape must be given for a model with convolutions"):
        nn.expected_flops(model)


def test_a_dense_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2, bias=False))
    assert nn.expected_l0(model).item() == nn.eval_l0(model) == 4 * 3 + 3 + 3 * 2
    assert nn.expected_flops(model).item() == 2 * (12 + 6) + 3
    assert nn.eval_flops(torch.nn.ReLU(), (1, 3)) == 0
    assert nn.eval_l0(torch.nn.ReLU()) == 0


def test_counts_are_those_of_the_exported_model():
    mlp = spread(nn.L0MLP((30, 20, 10, 4)), 3.0)
    small = nn.export(mlp)
    assert nn.eval_l0(mlp) == sum(p.numel() for p in small.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(torch.zeros(6, 30))
    biases = sum(m.out_features for m in small if isinstance(m, torch.nn.Linear))
    assert nn.eval_flops(mlp, (6, 30)) == counter.get_total_flops() + 6 * biases
    assert nn.eval_flops(mlp, (6, 30)) == nn.eval_flops(small, (6, 30))


def test_open_units():
    mlp = spread(nn.L0MLP((30, 20, 10), eval_mode="median"), 3.0)
    expected = [int((gate.eval_gates().z != 0).sum()) for gate in nn.gate_modules(mlp)]
    assert nn.open_units(mlp) == expected
    assert all(0 < n < gate.n for n, gate in zip(expected, nn.gate_modules(mlp), strict=True))


def test_expected_counts_are_differentiable():
    mlp = spread(nn.L0MLP((5, 4, 3)))
    for count in (nn.expected_l0(mlp), nn.expected_flops(mlp, (2, 5))):
        assert count.dtype == torch.float64
        grads = torch.autograd.grad(count, nn.gate_parameters(mlp))
        assert all((grad > 0).all() for grad in grads)


def test_counting_leaves_no_trace():
    mlp = nn.L0MLP((5, 4, 3))
    mlp.layers[1].eval()
    modes = [module.training for module in mlp.modules()]
    state = torch.random.get_rng_state()
    nn.expected_flops(mlp, (2, 5))
    assert [module.training for module in mlp.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in mlp.modules())
    with pytest.raises((ValueError, RuntimeError)):
        nn.expected_flops(mlp, (2, 6))
    assert [module.training for module in mlp.modules()] == modes
    assert not any(module._forward_hooks for module in mlp.modules())


def test_large_counts_are_exact():
    params = 5001 * 4003 + 4003 + 4003 * 11 + 11
    assert params > 2**24  # the integers of float32 end there
    assert nn.eval_l0(nn.L0MLP((5001, 4003, 11))) == params
