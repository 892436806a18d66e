"""L0Conv2d and L0Conv1d: drop-in convolutions, equal to the dense formula for the same seed."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from l0kernels import Gates, nn, reference

GATED = ["in", "out", "both"]
KINDS = [*GATED, None]
OPTIONS = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "same": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
}


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def spread(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for gate in nn.gate_modules(layer):
            gate.log_alpha.normal_(0, 3)
    return layer


def make(kind, n_in=8, n_out=10, size=3, **options):
    return spread(nn.L0Conv2d(n_in, n_out, size, gate=kind, **options)).double()


def dense_formula(layer, x, in_z=None, out_z=None):
    """The same layer by torch's own convolution."""
    x = x if in_z is None else x * in_z.view(-1, 1, 1)
    if layer.padding_mode == "zeros":
        padding = layer.padding
    else:
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    y = F.conv2d(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    return y if out_z is None else y * out_z.view(-1, 1, 1)


def drawn(layer, draw):
    """z of the two sides, each gate drawn once."""
    gates = [gate for gate in (layer.in_gate, layer.out_gate) if gate is not None]
    z = dict(zip(gates, [g.z for g in draw([gate.log_alpha for gate in gates])], strict=True))
    return [None if gate is None else z[gate] for gate in (layer.in_gate, layer.out_gate)]


@pytest.mark.parametrize(("ours", "theirs"), [(nn.L0Conv2d, torch.nn.Conv2d), (nn.L0Conv1d, torch.nn.Conv1d)])
def test_same_positional_arguments_as_torch(ours, theirs):
    mine, dense = (list(inspect.signature(c).parameters.items()) for c in (ours, theirs))
    assert [(name, p.default) for name, p in mine[: len(dense)]] == [(n, p.default) for n, p in dense]
    assert all(p.kind is p.KEYWORD_ONLY for _, p in mine[len(dense) :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_same_parameters_as_torch(kind, bias):
    torch.manual_seed(4)
    ours = nn.L0Conv2d(6, 4, (3, 2), groups=2, bias=bias, gate=kind)
    torch.manual_seed(4)
    theirs = torch.nn.Conv2d(6, 4, (3, 2), groups=2, bias=bias)
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value)
        assert state[name].is_contiguous()
    assert isinstance(ours, torch.nn.Conv2d)
    shapes = {"in_gate.log_alpha": (6,), "out_gate.log_alpha": (4,)}
    expected = {n: s for n, s in shapes.items() if kind == "both" or n.startswith(f"{kind}_")}
    assert {n: tuple(v.shape) for n, v in state.items() if n not in theirs.state_dict()} == expected


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_training_is_the_dense_formula_of_the_same_seed(kind, name, bias):
    layer = make(kind, bias=bias, **OPTIONS[name])
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    y_twin = dense_formula(twin, x_twin, *drawn(twin, reference.sample_gates))
    torch.testing.assert_close(y, y_twin)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad)
    for (parameter, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, p=parameter: f"{p}: {text}")
        if parameter.endswith("log_alpha"):
            assert torch.equal(mine.grad != 0, theirs.grad != 0)
            assert (mine.grad != 0).any()


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_evaluation(kind, mode):
    layer = make(kind, eval_mode=mode).eval()
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    z = drawn(layer, lambda logs: reference.eval_gates(logs, mode))
    torch.testing.assert_close(layer(x), dense_formula(layer, x, *z))
    assert torch.equal(layer(x), layer(x))


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [60.0, -60.0])
def test_everything_open_or_closed(kind, training, value):
    layer = make(kind, padding=1).train(training)
    with torch.no_grad():
        for gate in nn.gate_modules(layer):
            gate.log_alpha.fill_(value)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    if kind is None or value > 0:
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
    elif kind == "in":
        expected = layer.bias.view(-1, 1, 1).expand_as(y)
    else:
        expected = torch.zeros_like(y)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    closed = kind is not None and value < 0
    assert bool(layer.weight.grad.any()) != closed
    assert layer.bias.grad.any() == (not closed or kind == "in")


def test_the_bias_is_there_in_training_and_evaluation():
    """AMLab's layer drops it in training and keeps it in evaluation."""
    layer = make("out")
    with torch.no_grad():
        layer.bias.fill_(5.0)
        layer.weight.zero_()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    gates = layer.out_gate()
    expected = (5 * gates.z).view(1, -1, 1, 1).expand(4, 10, 3, 3)
    torch.testing.assert_close(layer(x, out_gates=gates), expected)
    torch.testing.assert_close(layer.eval()(x, out_gates=gates), expected)
    y = layer(x)
    closed = layer.out_gate.eval_gates().z == 0
    assert closed.any()
    assert not y[:, closed].any()
    torch.testing.assert_close(y[:, ~closed].mean((0, 2, 3)), 5 * layer.out_gate.eval_gates().z[~closed])


def test_gates_drawn_beforehand():
    layer = make("both")
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    in_gates, out_gates = layer.in_gate(), layer.out_gate()
    expected = dense_formula(layer, x, in_gates.z, out_gates.z)
    torch.testing.assert_close(layer(x, in_gates, out_gates), expected)
    torch.manual_seed(2)
    y = layer(x, in_gates=in_gates)
    torch.manual_seed(2)
    torch.testing.assert_close(y, layer(x, in_gates, layer.out_gate()))
    layer = make(None)
    torch.testing.assert_close(
        layer(x, in_gates, out_gates), dense_formula(layer, x, in_gates.z, out_gates.z)
    )


def test_out_support():
    layer = make("in")
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    support = Gates.from_z(torch.tensor([0.0, 0.3] * 5, dtype=torch.float64))
    in_gates = layer.in_gate()
    expected = dense_formula(layer, x, in_gates.z, (support.z != 0).double())
    torch.testing.assert_close(layer(x, in_gates, out_support=support), expected)
    with pytest.raises(ValueError, match="out_support must be None for a layer whose outputs are gated"):
        make("out")(x, out_support=support)


def test_one_gate_on_both_sides_of_a_depthwise_convolution():
    gate = nn.HardConcreteGate(8, dtype=torch.float64)
    layer = make("both", n_out=8, groups=8, in_gate=gate, out_gate=gate)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    z = reference.sample_gates([gate.log_alpha])[0].z
    torch.testing.assert_close(y, dense_formula(layer, x, z, z))


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_from_dense(kind, name):
    dense = torch.nn.Conv2d(8, 10, 3, bias=name != "plain", dtype=torch.float64, **OPTIONS[name]).eval()
    dense.weight.requires_grad_(False)
    layer = nn.L0Conv2d.from_dense(dense, gate=kind, droprate_init=0.2, lam=0.3, eval_mode="median")
    assert not layer.training
    assert layer.weight.data_ptr() != dense.weight.data_ptr()
    assert torch.equal(layer.weight, dense.weight)
    assert not layer.weight.requires_grad
    assert (layer.bias is None) == (dense.bias is None)
    for gate in nn.gate_modules(layer):
        assert (gate.droprate_init, gate.lam, gate.eval_mode) == (0.2, 0.3, "median")
        assert gate.log_alpha.dtype == torch.float64
        with torch.no_grad():
            gate.log_alpha.fill_(60.0)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    layer, fresh = make(kind), nn.L0Conv2d(8, 10, 3, gate=kind).double()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.manual_seed(1)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


def test_loads_the_state_of_a_dense_layer():
    dense, layer = torch.nn.Conv2d(8, 10, 3).double(), make("both")
    missing, unexpected = layer.load_state_dict(dense.state_dict(), strict=False)
    assert sorted(missing) == ["in_gate.log_alpha", "out_gate.log_alpha"]
    assert unexpected == []


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(kind, autocast):
    layer = make(kind).float() if autocast else make(kind).to(torch.bfloat16)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float32 if autocast else torch.bfloat16)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == layer.weight.dtype
    for gate in nn.gate_modules(layer):
        assert gate.log_alpha.dtype == gate.log_alpha.grad.dtype == torch.float32
        assert gate.log_alpha.grad.any()
    exact_layer = copy.deepcopy(layer).double()
    torch.manual_seed(3)
    exact = dense_formula(exact_layer, x.double(), *drawn(exact_layer, reference.sample_gates))
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=8 * eps * exact.abs().max().item())


@pytest.mark.parametrize("kind", GATED)
def test_gradcheck(kind):
    torch.manual_seed(0)
    layer = nn.L0Conv2d(3, 4, 2, stride=2, padding=1, gate=kind).double()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *_):
        torch.manual_seed(1)
        return layer(x)

    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("name", ["plain", "strided", "same", "groups", "reflect"])
def test_conv1d(kind, name):
    options = {key: value[0] if isinstance(value, tuple) else value for key, value in OPTIONS[name].items()}
    layer = spread(nn.L0Conv1d(8, 10, 3, gate=kind, **options)).double()
    assert layer.weight.shape == (10, 8 // layer.groups, 3)
    x = torch.randn(3, 8, 11, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    in_z, out_z = drawn(layer, reference.sample_gates)
    dense = torch.nn.Conv1d(8, 10, 3, dtype=torch.float64, **options)
    dense.load_state_dict(layer.state_dict(), strict=False)
    expected = dense(x if in_z is None else x * in_z[:, None])
    expected = expected if out_z is None else expected * out_z[:, None]
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    expected = torch.autograd.grad(expected, [x, dense.weight, dense.bias], dy)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    twin = nn.L0Conv1d.from_dense(dense, gate=None)
    torch.testing.assert_close(twin(x), dense(x))
    torch.testing.assert_close(layer.eval()(x[0]), layer(x)[0])


def test_meta_device_and_skip_init():
    layer = torch.nn.utils.skip_init(nn.L0Conv2d, 4, 3, 2, gate="both")
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    layer = nn.L0Conv2d(4, 3, 2, device="meta", gate="both").to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()
    assert layer.weight.abs().max() <= 0.25
    assert layer.in_gate.log_alpha.abs().max() < 0.1


def test_repr():
    assert repr(nn.L0Conv2d(2, 3, 5, stride=2, gate="in", lam=0.1)) == (
        "L0Conv2d(\n  2, 3, kernel_size=(5, 5), stride=(2, 2), gate='in'\n"
        "  (in_gate): HardConcreteGate(2, droprate_init=0.5, lam=0.1, eval_mode='paper')\n)"
    )


def test_unbatched_and_empty():
    layer = make("both").eval()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, 10, 4, 3)


def test_bad_arguments():
    gate = nn.HardConcreteGate(4)
    with pytest.raises(ValueError, match=r"gate must be 'in', 'out', 'both', 'weight' or None, got 'some'"):
        nn.L0Conv2d(4, 4, 1, gate="some")
    with pytest.raises(ValueError, match="in_gate must be None with gate='out'"):
        nn.L0Conv2d(4, 4, 1, in_gate=gate)
    with pytest.raises(ValueError, match=r"out_gate must have log_alpha of shape \(5,\), got \(4,\)"):
        nn.L0Conv2d(4, 5, 1, out_gate=gate)
    with pytest.raises(TypeError, match="out_gate must be a HardConcreteGate, got Parameter"):
        nn.L0Conv2d(4, 4, 1, out_gate=gate.log_alpha)
    other = nn.HardConcreteGate(4, dist=reference.HardConcrete(beta=0.5))
    with pytest.raises(ValueError, match="out_gate must have the distribution of in_gate"):
        nn.L0Conv2d(4, 4, 1, gate="both", in_gate=gate, out_gate=other)
    with pytest.raises(TypeError, match=r"conv must be a torch\.nn\.Conv2d, got Linear"):
        nn.L0Conv2d.from_dense(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"conv must be a torch\.nn\.Conv1d, got Conv2d"):
        nn.L0Conv1d.from_dense(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"x must have shape \(N, 4, H, W\)"):
        nn.L0Conv2d(4, 4, 1)(torch.ones(1, 5, 2, 2))


@pytest.mark.parametrize("kind", ["both", "in"])
def test_compiles_without_a_graph_break(kind):
    layer = make(kind, padding=1).float()
    x = torch.randn(2, 8, 5, 5)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
