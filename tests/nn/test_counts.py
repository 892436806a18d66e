"""Expected and actual sizes against enumeration of all gate patterns."""

import itertools
import math

import fresh
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from l0kernels import nn, reference
from op_checks import count_open

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
    assert count_open(mlp) == expected
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


def closed_by(gate, unit, n, pattern):
    """Whether `gate` closes a unit of n: gates of all its features close a channel, a channel's gate them."""
    bits = pattern[gate]
    if len(bits) > n:
        size = len(bits) // n
        return not any(bits[unit * size : (unit + 1) * size])
    return not bits[unit // (n // len(bits))]


def alive_conv(layer, cols, rows, pattern):
    """(weights, biases) of a layer, weight by weight: linear, convolution or (weight, bias) of a norm."""
    if isinstance(layer, torch.nn.BatchNorm2d):
        n = layer.num_features
        is_open = sum(not any(closed_by(g, i, n, pattern) for g in rows) for i in range(n))
        return is_open * (layer.weight is not None), is_open * (layer.bias is not None)
    n_out, per_group = layer.weight.shape[:2]
    groups = getattr(layer, "groups", 1)
    taps = layer.weight[0, 0].numel()
    is_open = [not any(closed_by(g, o, n_out, pattern) for g in rows) for o in range(n_out)]
    weights = 0
    for o, j in itertools.product(range(n_out), range(per_group)):
        i = o // (n_out // groups) * per_group + j
        reads = not any(closed_by(g, i, per_group * groups, pattern) for g in cols)
        weights += taps * (reads and is_open[o])
    return weights, sum(is_open) if layer.bias is not None else 0


def check_conv(model, shape, sides, other=0):
    """sides: (layer, gates on inputs, gates on outputs, output positions of the whole input)."""
    spread(model)

    def totals(pattern):
        counts = [(*alive_conv(layer, cols, rows, pattern), at) for layer, cols, rows, at in sides]
        return sum(w + b for w, b, _ in counts) + other, sum((2 * w + b) * at for w, b, at in counts)

    params = flops = 0.0
    for probability, pattern in patterns(model):
        n_params, n_flops = totals(pattern)
        params, flops = params + probability * n_params, flops + probability * n_flops
    assert nn.expected_l0(model).item() == pytest.approx(params, rel=1e-6)
    assert nn.expected_flops(model, shape).item() == pytest.approx(flops, rel=1e-6)
    pattern = {gate: (gate.eval_gates().z != 0).int().tolist() for gate in nn.gate_modules(model)}
    assert (nn.eval_l0(model), nn.eval_flops(model, shape)) == totals(pattern)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["in", "out", "both", None])
def test_one_convolution(kind, bias):
    layer = nn.L0Conv2d(4, 3, (2, 3), stride=2, padding=1, dilation=2, bias=bias, gate=kind)
    own = [[] if gate is None else [gate] for gate in (layer.in_gate, layer.out_gate)]
    positions = 5 * 5 * 3  # (9 + 2 - 2 - 1) // 2 + 1 by (7 + 2 - 4 - 1) // 2 + 1
    check_conv(layer, (5, 4, 9, 7), [(layer, *own, positions)])
    expected = reference.conv_expected_flops(
        layer.in_gate.dist.p_open(layer.in_gate.log_alpha).double() if layer.in_gate else 4,
        layer.out_gate.dist.p_open(layer.out_gate.log_alpha).double() if layer.out_gate else 3,
        *((2, 3), (9, 7), 2, 1, 2),
        bias=bias,
    )
    assert nn.expected_flops(layer, (1, 4, 9, 7)).item() == pytest.approx(
        float(torch.as_tensor(expected).detach()), rel=1e-6
    )
    assert reference.conv_output_size((9, 7), (2, 3), 2, 1, 2) == (5, 3)


def test_grouped_and_depthwise_convolutions():
    layer = nn.L0Conv2d(4, 6, 2, groups=2, gate="both")
    check_conv(layer, (2, 4, 3, 3), [(layer, [layer.in_gate], [layer.out_gate], 2 * 4)])
    gate = nn.HardConcreteGate(4)
    layer = nn.L0Conv2d(4, 4, 3, groups=4, gate="both", in_gate=gate, out_gate=gate)
    check_conv(layer, (1, 4, 3, 3), [(layer, [gate], [gate], 1)])
    p = gate.dist.p_open(gate.log_alpha).sum().item()  # once, not squared
    assert nn.expected_l0(layer).item() == pytest.approx(10 * p, rel=1e-5)
    for groups in (1, 2):
        layer = nn.L0Conv2d(4, 4, 1, groups=groups, gate="both", in_gate=gate, out_gate=gate)
        check_conv(layer, (1, 4, 2, 2), [(layer, [gate], [gate], 4)])


def test_lenet_chains_its_gates():
    a, b = nn.L0Conv2d(1, 3, 2), nn.L0Conv2d(3, 2, 2)
    c, d = nn.L0Linear(4, 2), nn.L0Linear(2, 3)
    pool, act = torch.nn.MaxPool2d(2), torch.nn.ReLU()
    model = nn.L0Sequential(a, act, pool, b, act, torch.nn.Flatten(), c, act, d)
    sides = [
        (a, [], [a.out_gate], 2 * 24),
        (b, [a.out_gate], [b.out_gate, c.in_gate], 2 * 2),  # a channel closes with its features
        (c, [b.out_gate, c.in_gate], [d.in_gate], 2),  # and they with it
        (d, [d.in_gate], [], 2),
    ]
    check_conv(model, (2, 1, 7, 5), sides)


@pytest.mark.parametrize("container", [nn.L0Sequential, torch.nn.Sequential])
def test_norms_between_convolutions(container):
    a, b = torch.nn.Conv2d(2, 3, 1), nn.L0Conv2d(3, 2, 1, gate="in")
    norm = nn.L0BatchNorm2d(3)
    model = container(a, norm, torch.nn.ReLU(), b)
    gates = [b.in_gate]
    sides = [(a, [], gates, 4), (norm, gates, gates, 0), (b, gates, [], 4)]
    check_conv(model, (1, 2, 2, 2), sides)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.L0BatchNorm2d, torch.nn.BatchNorm2d])
def test_a_gate_before_a_norm(kind, affine):
    norm = kind(3, affine=affine)
    a, b = nn.L0Conv2d(2, 3, 1), torch.nn.Conv2d(3, 2, 1)
    with pytest.warns(UserWarning, match="'0' multiplies its outputs"):
        model = nn.L0Sequential(a, norm, b)
    gates = [a.out_gate] if kind is nn.L0BatchNorm2d else []  # torch's makes constants of zeros
    check_conv(model, (1, 2, 2, 2), [(a, [], [a.out_gate], 4), (norm, gates, gates, 0), (b, gates, [], 4)])


def test_sums_are_borders_for_what_is_read_but_zeros_go_through():
    stream = nn.HardConcreteGate(3)
    first = nn.L0Conv2d(2, 3, 1, out_gate=stream)
    body = [nn.L0BatchNorm2d(3), nn.L0Conv2d(3, 3, 1, gate="out", out_gate=stream)]
    last = nn.L0Conv2d(3, 1, 1, gate="both")
    model = nn.L0Sequential(first, nn.L0Residual(torch.nn.Sequential(*body)), last)
    sides = [
        (first, [], [stream], 4),
        (body[0], [stream], [stream], 0),
        (body[1], [stream], [stream], 4),
        (last, [stream, last.in_gate], [last.out_gate], 4),
    ]
    check_conv(model, (1, 2, 2, 2), sides)


def test_conv1d_counts():
    a, b = nn.L0Conv1d(2, 3, 2), nn.L0Conv1d(3, 2, 1, gate="in")
    model = torch.nn.Sequential(a, torch.nn.MaxPool1d(2), b)
    check_conv(model, (1, 2, 5), [(a, [], [a.out_gate, b.in_gate], 4), (b, [a.out_gate, b.in_gate], [], 2)])


def test_counts_of_convolutions_are_those_of_the_exported_model():
    model = spread(
        nn.L0Sequential(
            nn.L0Conv2d(1, 20, 3),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            nn.L0Conv2d(20, 30, 3, gate="both"),
            torch.nn.Flatten(),
            nn.L0Linear(480, 40),
            torch.nn.ReLU(),
            nn.L0Linear(40, 10),
        ),
        3.0,
    )
    small = nn.export(model)
    assert nn.eval_l0(model) == sum(p.numel() for p in small.parameters())
    assert nn.eval_flops(model, (6, 1, 14, 14)) == nn.eval_flops(small, (6, 1, 14, 14))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(torch.zeros(6, 1, 14, 14))
    convs = [m for m in small if isinstance(m, torch.nn.Conv2d)]
    biases = convs[0].out_channels * 144 + convs[1].out_channels * 16
    biases += sum(m.out_features for m in small if isinstance(m, torch.nn.Linear))
    assert nn.eval_flops(model, (6, 1, 14, 14)) == counter.get_total_flops() + 6 * biases


TRANSPOSED = [
    (torch.nn.ConvTranspose1d, 1, {}),
    (torch.nn.ConvTranspose2d, 2, {"bias": False}),
    (torch.nn.ConvTranspose2d, 2, {"stride": 2, "output_padding": 1, "padding": 1}),
    (torch.nn.ConvTranspose2d, 2, {"groups": 2, "dilation": 2}),
    (torch.nn.ConvTranspose3d, 3, {"groups": 2, "stride": (1, 2, 1)}),
]


@pytest.mark.parametrize(("kind", "dims", "options"), TRANSPOSED)
def test_transposed_convolutions(kind, dims, options):
    layer, shape = kind(4, 6, 3, **options), (2, 4, *(4, 5, 3)[:dims])
    x = torch.zeros(shape)
    with torch.no_grad():
        y = layer(x)
    groups, positions = options.get("groups", 1), x.numel() // 4
    products = 2 * 4 * 6 // groups * 3**dims * positions
    assert nn.eval_flops(layer, shape) == products + y.numel() * (layer.bias is not None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == products
    assert nn.eval_l0(layer) == sum(p.numel() for p in layer.parameters())

    class ByName(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(input=x)

    assert nn.eval_flops(ByName(), shape) == nn.eval_flops(layer, shape)
    behind = torch.nn.Sequential(spread(nn.L0Conv2d(2, 4, 1)), torch.nn.ConvTranspose2d(4, 3, 2))
    assert nn.eval_l0(behind) == count_open(behind)[0] * 3 + 4 * 3 * 4 + 3  # it reads all channels


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 7}])
def test_attention(options):
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, **options)
    q = torch.zeros(2, 5, 8)
    k, v = (torch.zeros(2, 6, options.get(name, 8)) for name in ("kdim", "vdim"))

    class Cross(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, key=k, value=v)[0]

    rows, bias = (10, 12, 12), attention.in_proj_bias is not None
    sizes = (8, options.get("kdim", 8), options.get("vdim", 8))
    expected = sum(n * 8 * (2 * size + bias) for n, size in zip(rows, sizes, strict=True))
    expected += 10 * 8 * (2 * 8 + bias) + 2 * 10 * 6 * (8 + 8)
    assert nn.eval_flops(Cross(), q.shape) == expected
    assert nn.eval_flops(attention) == 8 * sum(2 * size + bias for size in (*sizes, 8))
    assert nn.eval_l0(attention) == sum(p.numel() for p in attention.parameters())


def test_models_that_take_other_than_floats():
    model = torch.nn.Sequential(torch.nn.Embedding(11, 6), spread(nn.L0MLP((6, 4, 2))))
    tokens = torch.arange(10).view(2, 5)
    assert nn.eval_flops(model, tokens) == 10 * nn.eval_flops(model)
    assert nn.expected_flops(model, tokens).item() == pytest.approx(10 * nn.expected_flops(model).item())
    assert nn.eval_l0(model) == 66 + nn.eval_l0(model[1])


def test_layers_of_chains_count_once():
    mlp, block = spread(nn.L0MLP((6, 5, 4))), spread(nn.L0FeedForward(6, 5, "swiglu"))
    for model in (mlp, block):
        assert nn.eval_flops(model, (3, 6)) == 3 * nn.eval_flops(model)


def test_one_gate_on_both_sides_of_flatten():
    gate = nn.HardConcreteGate(4)
    a = nn.L0Conv2d(4, 2, 1, gate="in", in_gate=gate)
    b = nn.L0Linear(4, 3, in_gate=gate)  # two features of each of a's channels
    check_conv(
        torch.nn.Sequential(a, torch.nn.ReLU(), torch.nn.Flatten(), b),
        (1, 4, 1, 2),
        [(a, [gate], [gate], 2), (b, [gate], [], 1)],
    )


def test_one_gate_on_both_sides_behind_flatten():
    gate = nn.HardConcreteGate(2)
    a, c = nn.L0Conv2d(1, 2, 1, out_gate=gate), nn.L0Linear(2, 2, gate="both", in_gate=None, out_gate=gate)
    b = nn.L0Linear(4, 2, gate="both", out_gate=gate)
    check_conv(
        torch.nn.Sequential(a, torch.nn.Flatten(), b, torch.nn.Tanh(), c),
        (1, 1, 1, 2),
        [
            (a, [], [gate, b.in_gate], 2),
            (b, [gate, b.in_gate], [gate, c.in_gate], 1),  # a channel's gate meets itself in two features
            (c, [gate, c.in_gate], [gate], 1),
        ],
    )


def test_two_gates_on_both_sides():
    a, b = nn.HardConcreteGate(3), nn.HardConcreteGate(3)
    layers = (
        nn.L0Linear(2, 3, gate="out", out_gate=a),
        nn.L0Linear(3, 3, gate="both", in_gate=b, out_gate=a),
        nn.L0Linear(3, 2, in_gate=b),
    )
    check(
        torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]),
        [(layers[0], [], [a, b]), (layers[1], [a, b], [a, b]), (layers[2], [a, b], [])],
    )


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def dense_chain():
    return torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4))


SEEN = {
    # what torch counts of the dense module, and the gated ones
    "linear": (
        lambda: torch.nn.Linear(10, 7),
        [lambda kind=kind: nn.L0Linear(10, 7, gate=kind) for kind in ("in", "out", "both", "weight", (2, 3))],
        (2, 3, 10),
    ),
    "mlp": (
        dense_chain,
        [lambda: nn.L0MLP((10, 7, 4)), lambda: nn.L0MLP((10, 7, 4), gate_input=False)],
        (5, 10),
    ),
    "block": (dense_chain, [lambda: nn.L0FeedForward(10, 7)], (5, 10)),
    "conv2d": (
        lambda: torch.nn.Conv2d(4, 6, 3, padding=1),
        [lambda kind=kind: nn.L0Conv2d(4, 6, 3, padding=1, gate=kind) for kind in ("in", "out", "both")],
        (2, 4, 5, 6),
    ),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("needs_dx", [True, False])
def test_torchs_counter_sees_the_dense_work(name, needs_dx):
    dense, gated, shape = SEEN[name]
    x = torch.randn(shape, requires_grad=needs_dx)
    expected = flops(dense(), x)
    for make in gated:
        model = make()
        if name == "block":  # down's and up's widths are those of the model
            expected = flops(torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.Linear(7, 10)), x)
        assert flops(model, x) == expected
        assert flops(model.eval(), x) == expected
        with torch.no_grad():
            for gate in nn.gate_modules(model):
                gate.log_alpha.fill_(-30)
        assert flops(model, x) == expected  # an upper bound


def test_torchs_counter_sees_packed_convolutions_once():
    def modules(conv, linear, **options):
        convs = conv(3, 8, 3, **options), conv(8, 6, 3, groups=2, **options)
        return convs[0], torch.nn.ReLU(), convs[1], torch.nn.Flatten(), linear(24, 5)

    model = nn.L0Sequential(*modules(nn.L0Conv2d, nn.L0Linear))
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.fill_(30)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    dense = flops(torch.nn.Sequential(*modules(torch.nn.Conv2d, torch.nn.Linear)), x)
    assert flops(model, x) == dense
    with torch.no_grad():
        model[0].out_gate.log_alpha[:4] = -30
    assert 0 < flops(model, x) < dense


def test_a_counter_that_is_there_before_the_first_operator(tmp_path):
    program = """
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    import l0kernels as l0
    l0.nn.L0Linear(10, 7)(torch.zeros(3, 10))
assert counter.get_total_flops() == 2 * 3 * 10 * 7, counter.get_total_flops()
own = {torch.ops.l0kernels.l0_linear: lambda *_, **__: 5}
with FlopCounterMode(display=False, custom_mapping=own) as counter:
    l0.nn.L0Linear(10, 7)(torch.zeros(3, 10))
assert counter.get_total_flops() == 5
"""
    for code in (program, "import sys, l0kernels; assert 'torch.utils.flop_counter' not in sys.modules"):
        done = fresh.run(code, tmp_path)
        assert done.returncode == 0, done.stderr


def test_flops_of_an_exported_model_whose_layers_have_nothing_left():
    model = nn.L0MLP([3, 4, 2])
    with torch.no_grad():
        model.layers[1].in_gate.log_alpha.fill_(-10)
    small = nn.export(model)
    assert small[-1].in_features == 0
    assert nn.eval_flops(model, (5, 3)) == nn.eval_flops(small, (5, 3)) == 5 * 2
    assert nn.expected_flops(small, (5, 3)) == 5 * 2
