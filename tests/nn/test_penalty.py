"""Penalty, clamp and optimiser groups of whole models."""

import copy
import importlib
import math

import pytest
import torch

import l0kernels as l0
from l0kernels import _ops, nn, reference
from l0kernels._native import native
from op_checks import ONE_BACKEND

L = math.log(0.1 / 1.1)
penalty_module = importlib.import_module("l0kernels.nn.penalty")


def p_open(log_alpha):
    return torch.sigmoid(log_alpha.detach().double() - 2 / 3 * L)


def spread(model, std=2.0):
    torch.manual_seed(0)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, std)
    return model


def brute_force(layer, weight_decay):
    """The penalty of one layer with bias, weight by weight."""
    total = 0.0
    n_out, n_in = layer.weight.shape
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    p_in = p_open(layer.in_gate.log_alpha) if layer.in_gate else None
    p_out = p_open(layer.out_gate.log_alpha) if layer.out_gate else None
    p_weight = p_open(layer.weight_gate.log_alpha) if layer.weight_gate else None
    b_out, b_in = layer.block or (1, 1)
    for o in range(n_out):
        for i in range(n_in):
            p = 1.0
            if p_in is not None:
                total += layer.in_gate.lam * p_in[i]
                p = p * p_in[i]
            if p_out is not None:
                total += layer.out_gate.lam * p_out[o]
                same = layer.in_gate is layer.out_gate and i == o
                p = p if same else p * p_out[o]
            if p_weight is not None:
                p = p_weight[o // b_out, i // b_in]
                total += layer.weight_gate.lam * p
            total += weight_decay / 2 * p * weight[o, i] ** 2
        if p_out is not None:
            total += p_out[o] * (layer.out_gate.lam + weight_decay / 2 * bias[o] ** 2)
    return float(total)


@pytest.mark.parametrize("kind", ["in", "out", "both", "weight", (2, 3), (3, 4), (9, 9)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_layer_against_brute_force(kind, weight_decay):
    layer = spread(nn.L0Linear(8, 6, gate=kind, lam=0.3))
    value = nn.penalty(layer, weight_decay=weight_decay)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(brute_force(layer, weight_decay), rel=1e-5)


def test_without_bias_an_output_gate_closes_one_parameter_less():
    layer = spread(nn.L0Linear(8, 6, bias=False, gate="out", lam=1.0))
    expected = 8 * p_open(layer.out_gate.log_alpha).sum().item()
    assert nn.penalty(layer).item() == pytest.approx(expected, rel=1e-5)


def test_one_gate_on_both_sides():
    gate = nn.HardConcreteGate(5)
    layer = spread(nn.L0Linear(5, 5, gate="both", in_gate=gate, out_gate=gate))
    value = nn.penalty(layer, weight_decay=2.0)
    assert value.item() == pytest.approx(brute_force(layer, 2.0), rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_model_sums_layers(weight_decay):
    model = torch.nn.Sequential(
        nn.L0MLP((9, 8, 7), lam=(0.5, 2.0)),
        torch.nn.LayerNorm(7),
        nn.L0Linear(7, 6, gate="both"),
        torch.nn.Linear(6, 5),
        nn.L0Linear(5, 4, gate=(2, 2)),
        nn.L0Linear(4, 4, gate=None),
    )
    spread(model)
    layers = [*model[0].layers, model[2], model[4]]
    expected = sum(brute_force(layer, weight_decay) for layer in layers)
    assert nn.penalty(model, weight_decay=weight_decay).item() == pytest.approx(expected, rel=1e-5)


def test_a_shared_gate_sums_its_groups():
    gate = nn.HardConcreteGate(6, lam=0.1)
    model = torch.nn.ModuleList(
        [
            nn.L0Linear(8, 6, gate="out", out_gate=gate),
            nn.L0Linear(6, 3, in_gate=gate),
            nn.L0Linear(6, 2, in_gate=gate),
        ]
    )
    spread(model)
    expected = 0.1 * (9 + 3 + 2) * p_open(gate.log_alpha).sum().item()
    assert nn.penalty(model).item() == pytest.approx(expected, rel=1e-5)


def test_a_gate_without_a_layer_counts_its_gates():
    model = torch.nn.ModuleDict(
        {"gate": nn.HardConcreteGate((2, 3), lam=0.2), "layer": nn.L0Linear(4, 5, lam=1.0)}
    )
    spread(model)
    expected = (
        0.2 * p_open(model["gate"].log_alpha).sum() + 5 * p_open(model["layer"].in_gate.log_alpha).sum()
    )
    assert nn.penalty(model).item() == pytest.approx(expected.item(), rel=1e-5)


def test_two_distributions():
    dist = reference.HardConcrete(0.5, -0.3, 1.2)
    layers = nn.L0Linear(4, 5, lam=1.0), nn.L0Linear(3, 2, lam=1.0, dist=dist), nn.L0Linear(2, 2, lam=1.0)
    model = spread(torch.nn.ModuleList(layers))
    gates = nn.gate_modules(model)
    expected = sum(
        size * gate.dist.p_open(gate.log_alpha).sum() for gate, size in zip(gates, (5, 2, 2), strict=True)
    )
    torch.testing.assert_close(nn.penalty(model), expected)


def test_lam_is_read_at_each_call():
    layer = nn.L0Linear(4, 5)
    before = nn.penalty(layer).item()
    layer.in_gate.lam = 0.025
    assert nn.penalty(layer).item() == pytest.approx(before / 4)


def test_a_replaced_module_is_seen():
    model = torch.nn.Sequential(nn.L0Linear(4, 5), torch.nn.ReLU(), nn.L0Linear(5, 2))
    nn.penalty(model)
    model[2] = torch.nn.Linear(5, 2)
    torch.testing.assert_close(nn.penalty(model), nn.penalty(model[0]))


def test_one_call_for_all_gates(monkeypatch):
    calls = []
    function = penalty_module.l0_penalty

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(penalty_module, "l0_penalty", counted)
    nn.penalty(copy.deepcopy(nn.L0MLP((6, 5, 4, 3))))
    assert len(calls) == 1


def test_gradient_reaches_every_gate():
    layer = nn.L0Linear(50, 4, lam=0.5)
    with torch.no_grad():
        layer.in_gate.log_alpha.uniform_(-4.6, 4.6)
    nn.penalty(layer).backward()
    p = p_open(layer.in_gate.log_alpha)
    torch.testing.assert_close(
        layer.in_gate.log_alpha.grad.double(), 0.5 * 4 * p * (1 - p), rtol=1e-4, atol=1e-6
    )
    assert layer.weight.grad is None


def test_data_gradient_and_penalty_add_up():
    layer = spread(nn.L0Linear(50, 4))
    x = torch.randn(8, 50)
    torch.manual_seed(2)
    data = torch.autograd.grad(layer(x).square().sum(), layer.in_gate.log_alpha)[0]
    size = torch.autograd.grad(nn.penalty(layer), layer.in_gate.log_alpha)[0]
    torch.manual_seed(2)
    (layer(x).square().sum() + nn.penalty(layer)).backward()
    torch.testing.assert_close(layer.in_gate.log_alpha.grad, data + size)
    assert (data == 0).any()
    assert (size > 0).all()


def test_weight_decay_reaches_weights_and_gates():
    layer = spread(nn.L0Linear(5, 4, gate="both")).double()
    names = ["weight", "bias", "in_gate.log_alpha", "out_gate.log_alpha"]
    parameters = [layer.get_parameter(name) for name in names]

    def value(*_):
        return nn.penalty(layer, weight_decay=0.3)

    assert torch.autograd.gradcheck(value, parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model(dtype):
    layer = spread(nn.L0Linear(8, 6, gate="both"))
    exact = nn.penalty(layer).item()
    layer.to(dtype)
    assert nn.penalty(layer).item() == exact
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.penalty(layer).item() == exact
    coupled = nn.penalty(layer, weight_decay=0.5)
    assert coupled.dtype == torch.float32
    assert coupled.item() == pytest.approx(brute_force(layer, 0.5), rel=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="model must contain gates, got a Linear without any"):
        nn.penalty(torch.nn.Linear(2, 2))
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"weight_decay must be finite and >= 0, got {value}"):
            nn.penalty(nn.L0Linear(2, 2), weight_decay=value)


def test_clamp():
    model = nn.L0MLP((4, 3, 2))
    with torch.no_grad():
        model.layers[0].in_gate.log_alpha.copy_(torch.tensor([-9.0, -1.0, 1.0, 9.0]))
    pointer = model.layers[0].in_gate.log_alpha.data_ptr()
    nn.clamp_gates_(model)
    limit = math.log(100)
    torch.testing.assert_close(
        model.layers[0].in_gate.log_alpha.data, torch.tensor([-limit, -1.0, 1.0, limit])
    )
    assert model.layers[0].in_gate.log_alpha.data_ptr() == pointer
    nn.clamp_gates_(model, 0.5)
    assert model.layers[0].in_gate.log_alpha.abs().max() == 0.5
    nn.clamp_gates_(torch.nn.Linear(2, 2))


def test_clamp_after_step():
    model = nn.L0Linear(30, 2, lam=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    handle = nn.clamp_after_step(optimizer, model)
    nn.penalty(model).backward()
    optimizer.step()
    assert torch.equal(model.in_gate.log_alpha.data, torch.full((30,), -math.log(100)))
    handle.remove()
    optimizer.step()
    assert model.in_gate.log_alpha.max() < -math.log(100)


def test_bad_clamp():
    model = nn.L0Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be > 0"):
            nn.clamp_gates_(model, limit)
        with pytest.raises(ValueError, match="limit must be > 0"):
            nn.clamp_after_step(optimizer, model, limit)
    with pytest.raises(ValueError, match="model must contain gates"):
        nn.clamp_after_step(optimizer, torch.nn.Linear(2, 2))


def test_optimiser_groups_part_the_parameters():
    gate = nn.HardConcreteGate(4)
    model = torch.nn.Sequential(
        nn.L0Linear(3, 4, gate="both", out_gate=gate), nn.L0Linear(4, 2, in_gate=gate), torch.nn.Linear(2, 2)
    )
    gates, weights = nn.gate_parameters(model), nn.weight_parameters(model)
    assert [id(p) for p in gates] == [id(model[0].in_gate.log_alpha), id(gate.log_alpha)]
    assert {id(p) for p in gates} | {id(p) for p in weights} == {id(p) for p in model.parameters()}
    assert len(gates) + len(weights) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": gates, "weight_decay": 0.0, "lr": 0.1}])
    assert len(optimizer.param_groups) == 2


def brute_force_conv(layer, weight_decay):
    """The penalty of a convolution with bias, weight by weight."""
    total = 0.0
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    p_in = p_open(layer.in_gate.log_alpha) if layer.in_gate else None
    p_out = p_open(layer.out_gate.log_alpha) if layer.out_gate else None
    n_out, per_group, *_ = weight.shape
    for o in range(n_out):
        for j in range(per_group):
            i = o // (n_out // layer.groups) * per_group + j
            taps, squares, p = weight[o, j].numel(), weight[o, j].square().sum(), 1.0
            if p_in is not None:
                total += layer.in_gate.lam * p_in[i] * taps
                p = p * p_in[i]
            if p_out is not None:
                total += layer.out_gate.lam * p_out[o] * taps
                p = p if layer.in_gate is layer.out_gate and i == o else p * p_out[o]
            total += weight_decay / 2 * p * squares
        if p_out is not None:
            total += p_out[o] * (layer.out_gate.lam + weight_decay / 2 * bias[o] ** 2)
    return float(total)


@pytest.mark.parametrize("kind", ["in", "out", "both"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_convolution_against_brute_force(kind, groups, weight_decay):
    for layer in (
        nn.L0Conv2d(4, 6, (2, 3), groups=groups, gate=kind, lam=0.3),
        nn.L0Conv1d(4, 6, 3, groups=groups, gate=kind, lam=0.3),
    ):
        spread(layer)
        value = nn.penalty(layer, weight_decay=weight_decay)
        assert value.item() == pytest.approx(brute_force_conv(layer, weight_decay), rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_one_gate_on_both_sides_of_a_convolution(groups):
    gate = nn.HardConcreteGate(6)
    layer = spread(nn.L0Conv2d(6, 6, 2, groups=groups, gate="both", in_gate=gate, out_gate=gate))
    assert nn.penalty(layer, weight_decay=2.0).item() == pytest.approx(brute_force_conv(layer, 2.0), rel=1e-5)


def test_an_ungated_convolution_has_no_penalty():
    gated = nn.L0Conv2d(4, 2, 1, gate="in")
    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 1, gate=None), nn.L0BatchNorm2d(4), gated))
    expected = brute_force_conv(gated, 0.5)
    assert nn.penalty(model, weight_decay=0.5).item() == pytest.approx(expected, rel=1e-5)


def test_weight_decay_reaches_the_weights_of_a_convolution():
    layer = spread(nn.L0Conv2d(3, 4, 2, gate="both")).double()
    assert torch.autograd.gradcheck(lambda *_: nn.penalty(layer, weight_decay=0.3), tuple(layer.parameters()))


def chain():
    return nn.L0MLP((9, 8, 7, 6), lam=(0.5, 2.0, 1.0))


def mixed():
    return torch.nn.Sequential(
        nn.L0Linear(9, 8, gate="both"),
        nn.L0Linear(8, 7, gate="weight"),
        nn.L0Linear(7, 6, gate=(2, 4)),
        nn.L0Linear(6, 6, gate=None),
        nn.L0Linear(6, 5, gate="out", bias=False),
    )


def shared():
    gate = nn.HardConcreteGate(6, lam=0.1)
    return torch.nn.ModuleList(
        [
            nn.L0Linear(8, 6, gate="out", out_gate=gate),
            nn.L0Linear(6, 6, gate="both", in_gate=gate, out_gate=gate),
            nn.L0Linear(6, 3, in_gate=gate),
            nn.L0Conv2d(6, 6, 2, groups=6, gate="both", in_gate=gate, out_gate=gate),
        ]
    )


def convolutions():
    return nn.L0Sequential(
        nn.L0Conv2d(3, 6, 3, gate="out"),
        torch.nn.ReLU(),
        nn.L0Conv2d(6, 8, (2, 3), groups=2, gate="both"),
        torch.nn.ReLU(),
        nn.L0Conv2d(8, 4, 3, gate="in"),
    )


def feed_forward():
    return torch.nn.Sequential(
        nn.L0FeedForward(6, 9, "gelu"), nn.L0FeedForward(6, 7, "swiglu"), nn.L0FeedForward(6, 5, bias=False)
    )


def half():
    """bfloat16 weights beside float32 ones."""
    return torch.nn.Sequential(nn.L0Linear(9, 8, gate="both").bfloat16(), nn.L0Linear(8, 7, gate="out"))


def channels_last():
    model = torch.nn.Sequential(nn.L0Conv2d(4, 6, 3, gate="both"), nn.L0Conv2d(6, 4, 3, gate="in"))
    return model.to(memory_format=torch.channels_last)


def distributions():
    dist = reference.HardConcrete(0.5, -0.3, 1.2)
    return torch.nn.ModuleList(
        [nn.L0Linear(4, 5), nn.L0Linear(3, 2, gate="both", dist=dist), nn.L0Linear(2, 2, gate="out")]
    )


def of_two_precisions():
    """Float32 gates of a float64 weight."""
    model = chain()
    model.layers[1].weight.data = model.layers[1].weight.data.double()
    return model


MODELS = [
    *(chain, mixed, shared, convolutions, feed_forward, half, channels_last, distributions),
    of_two_precisions,
]
WD = 0.7


def value_and_grads(model, factor=1.0):
    value = nn.penalty(model, weight_decay=WD)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(factor * value, list(wanted.values()), allow_unused=True)
    return value.detach(), dict(zip(wanted, grads, strict=True))


def assert_equals_the_reference(model, factor=1.0):
    value, grads = value_and_grads(model, factor)
    eps = torch.finfo(nn.gate_parameters(model)[0].dtype).eps
    with l0.use_backend("reference"):
        exact, exact_grads = value_and_grads(copy.deepcopy(model).double(), factor)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    for name, want in exact_grads.items():
        got = grads[name]
        assert (got is None) == (want is None), name
        if want is None:
            continue
        parameter = model.get_parameter(name)
        assert (got.dtype, got.shape) == (parameter.dtype, parameter.shape)
        error = (got.double() - want).abs().max().item()
        assert error <= 8 * max(eps, torch.finfo(got.dtype).eps) * want.abs().max().item(), name


@pytest.mark.parametrize("make", MODELS)
class TestCoupled:
    def test_equals_the_reference(self, backend, make):
        model = spread(make())
        assert_equals_the_reference(model)
        if make not in (half, of_two_precisions):
            assert_equals_the_reference(model.double())

    def test_of_a_scaled_loss(self, backend, make):
        assert_equals_the_reference(spread(make()), factor=-0.25)

    @pytest.mark.parametrize("frozen", ["weights", "gates", "first"])
    def test_frozen_parameters(self, backend, make, frozen):
        model = spread(make())
        of = {"weights": nn.weight_parameters, "gates": nn.gate_parameters}
        for parameter in of[frozen](model) if frozen in of else [next(model.parameters())]:
            parameter.requires_grad_(False)
        assert_equals_the_reference(model)

    def test_backward_twice(self, backend, make):
        model = spread(make())
        _, grads = value_and_grads(model)
        value = nn.penalty(model, weight_decay=WD)
        value.backward(retain_graph=True)
        value.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (grads[name] is None)
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, 2 * grads[name])

    def test_all_open_and_all_closed(self, backend, make):
        model = make()
        for gate in nn.gate_modules(model):
            torch.nn.init.constant_(gate.log_alpha, math.inf)
        assert_equals_the_reference(model)
        for gate in nn.gate_modules(model):
            torch.nn.init.constant_(gate.log_alpha, -math.inf)
        value, grads = value_and_grads(model)
        assert abs(value.item()) < 1e-30
        assert all(g is None or g.abs().max() < 1e-30 for g in grads.values())


def together():
    """In one graph every model that is no part of another and traced in a way of its own."""
    return torch.nn.ModuleList([make() for make in MODELS if make not in (chain, channels_last)])


@pytest.mark.parametrize("make", [together, *(pytest.param(make, marks=pytest.mark.long) for make in MODELS)])
@pytest.mark.parametrize("backend", ONE_BACKEND, indirect=True)
class TestCompiled:
    def test_whole_graph(self, backend, make):
        torch._dynamo.reset()
        model = spread(make())
        compiled = torch.compile(
            lambda: nn.penalty(model, weight_decay=WD), fullgraph=True, backend="aot_eager"
        )
        value = compiled()
        assert value.item() == pytest.approx(nn.penalty(model, weight_decay=WD).item(), rel=1e-6)
        value.backward()
        for name, grad in value_and_grads(model)[1].items():
            assert (grad is None) == (model.get_parameter(name).grad is None)
            if grad is not None:
                torch.testing.assert_close(model.get_parameter(name).grad, grad)
        torch._dynamo.reset()


class Counted:
    """A module whose calls are counted by name."""

    def __init__(self, module):
        self.module, self.calls = module, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.module, name)


@pytest.mark.skipif(native is None, reason="counts the calls of the native kernels")
@pytest.mark.parametrize("make", [chain, convolutions, feed_forward, shared])
def test_one_native_call_forward_and_one_backward(monkeypatch, make):
    counted = Counted(native)
    monkeypatch.setattr(_ops.module("cpp"), "_C", counted)
    model = make()
    with l0.use_backend("cpp"):
        value = nn.penalty(model, weight_decay=WD)
        assert counted.calls == ["coupled_penalty"]
        value.backward()
        assert counted.calls == ["coupled_penalty", "coupled_penalty_grad"]
        for weight in nn.weight_parameters(model):
            weight.requires_grad_(False)
        nn.penalty(model, weight_decay=WD).backward()
        assert counted.calls[2:] == ["coupled_penalty"]


def test_nan_is_an_error_in_a_gate_and_a_value_in_a_weight(backend):
    model = chain()
    with torch.no_grad():
        model.layers[1].weight[2, 3] = math.nan
    assert nn.penalty(model, weight_decay=WD).isnan()
    with torch.no_grad():
        model.layers[1].in_gate.log_alpha[3] = math.nan
    with pytest.raises(ValueError, match=r"log_alpha\[1\] must not hold NaN"):
        nn.penalty(model, weight_decay=WD)


def test_a_weight_that_does_not_fit_its_gates(backend):
    layer = nn.L0Linear(6, 4, gate="both")
    layer.weight = torch.nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"in_log_alpha must have shape \(7,\) .*, got \(6,\)"):
        nn.penalty(layer, weight_decay=WD)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 6))
    layer.bias = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"out_log_alpha must have shape \(5,\) .*, got \(4,\)"):
        nn.penalty(layer, weight_decay=WD)


def test_a_weight_changed_in_place_before_backward(backend):
    model = chain()
    value = nn.penalty(model, weight_decay=WD)
    with torch.no_grad():
        model.layers[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def grouped_model():
    shared = l0.nn.HardConcreteGate(6)
    return torch.nn.ModuleDict(
        {
            "first": l0.nn.L0Linear(4, 6, gate="both", out_gate=shared),
            "norm": torch.nn.LayerNorm(6),
            "second": l0.nn.L0Linear(6, 3, in_gate=shared),
        }
    )


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_parameter_groups_spare_gates_the_decay():
    model = grouped_model()
    model["second"].weight.requires_grad_(False)
    weights, gates = l0.nn.parameter_groups(model, gate_lr=0.5, weight_decay=0.1)
    assert names_of(model, weights) == [
        "first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight", "second.bias"
    ]  # fmt: skip
    assert names_of(model, gates) == ["first.in_gate.log_alpha", "first.out_gate.log_alpha"]
    del weights["params"], gates["params"]
    assert weights == {"weight_decay": 0.1, "name": "weights"}
    assert gates == {"weight_decay": 0.0, "lr": 0.5, "name": "gates"}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_of_parameter_groups_decays_weights_alone(kind):
    model = grouped_model()
    before = copy.deepcopy(model)
    groups = l0.nn.parameter_groups(model, no_decay=lambda _, p: p.ndim < 2)
    optimizer = kind(groups, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        factor = 0.95 if name in ("first.weight", "second.weight") else 1.0
        torch.testing.assert_close(parameter, factor * old)


def test_parameter_groups_leave_out_what_is_not_there():
    assert [group["name"] for group in l0.nn.parameter_groups(torch.nn.Linear(2, 2))] == ["weights"]
    assert [group["name"] for group in l0.nn.parameter_groups(l0.nn.HardConcreteGate(2))] == ["gates"]
    (weights,) = l0.nn.parameter_groups(torch.nn.Linear(2, 2))
    assert set(weights) == {"params", "name"}


@pytest.mark.parametrize("name", ["gate_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_parameter_groups_check_their_rates(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0"):
        l0.nn.parameter_groups(grouped_model(), **{name: value})
