"""L0Linear: a drop-in nn.Linear, equal to the dense formula for the same seed."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from l0kernels import Gates, nn, reference

KINDS = ["in", "out", "both", "weight", (3, 4), None]
GATED = KINDS[:-1]
N_IN, N_OUT = 21, 13


def make(kind, **options):
    """A layer whose gates are spread from closed to fully open."""
    torch.manual_seed(0)
    layer = nn.L0Linear(N_IN, N_OUT, gate=kind, **options)
    with torch.no_grad():
        for gate in nn.gate_modules(layer):
            gate.log_alpha.normal_(0, 3)
    return layer


def open_all(module):
    with torch.no_grad():
        for gate in nn.gate_modules(module):
            gate.log_alpha.fill_(60.0)


def dense_formula(layer, x, mode=None):
    """The same layer by the reference; draws its seed from torch's generator like the module."""
    options = {"dist": reference.HardConcrete()}
    if layer.weight_gate is not None:
        log_alpha = layer.weight_gate.log_alpha
        return reference.masked_linear(
            x, layer.weight, layer.bias, log_alpha, block=layer.block, mode=mode, **options
        )
    logs = [None if gate is None else gate.log_alpha for gate in (layer.in_gate, layer.out_gate)]
    if mode is None:
        return reference.l0_linear(
            x, layer.weight, layer.bias, in_log_alpha=logs[0], out_log_alpha=logs[1], **options
        )
    gates = [None if log is None else reference.eval_gates(log, mode) for log in logs]
    return reference.gated_linear(x, layer.weight, layer.bias, in_gates=gates[0], out_gates=gates[1])


def test_same_positional_arguments_as_torch():
    ours, theirs = (list(inspect.signature(c).parameters.items()) for c in (nn.L0Linear, torch.nn.Linear))
    assert [(name, p.default) for name, p in ours[: len(theirs)]] == [(n, p.default) for n, p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for _, p in ours[len(theirs) :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_same_parameters_as_torch(kind, bias):
    torch.manual_seed(4)
    ours = nn.L0Linear(N_IN, N_OUT, bias, gate=kind)
    torch.manual_seed(4)
    theirs = torch.nn.Linear(N_IN, N_OUT, bias)
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value)
        assert state[name].is_contiguous()
    assert isinstance(ours, torch.nn.Linear)
    extra = {
        "in": {"in_gate.log_alpha": (N_IN,)},
        "out": {"out_gate.log_alpha": (N_OUT,)},
        "both": {"in_gate.log_alpha": (N_IN,), "out_gate.log_alpha": (N_OUT,)},
        "weight": {"weight_gate.log_alpha": (N_OUT, N_IN)},
        (3, 4): {"weight_gate.log_alpha": (5, 6)},
        None: {},
    }[kind]
    added = {name: tuple(v.shape) for name, v in state.items() if name not in theirs.state_dict()}
    assert added == extra


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_open_gates_give_nn_linear(kind, training):
    layer = make(kind).train(training)
    open_all(layer)
    x = torch.randn(8, 3, N_IN)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("bias", [True, False])
def test_training_is_the_reference_of_the_same_seed(kind, bias):
    layer, twin = make(kind, bias=bias), make(kind, bias=bias)
    x = torch.randn(16, N_IN, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    dy = torch.randn(16, N_OUT)
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    y_twin = dense_formula(twin, x_twin)
    torch.testing.assert_close(y, y_twin)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad)
    for (name, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
        if name.endswith("log_alpha"):
            assert torch.equal(mine.grad != 0, theirs.grad != 0)
            assert (mine.grad != 0).any()


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_evaluation(kind, mode):
    layer = make(kind, eval_mode=mode).eval()
    x = torch.randn(16, N_IN)
    torch.testing.assert_close(layer(x), dense_formula(layer, x, mode))
    assert torch.equal(layer(x), layer(x))


def test_a_closed_output_is_zero_with_its_bias():
    layer = make("out").eval()
    with torch.no_grad():
        layer.bias.fill_(5.0)
    closed = layer.out_gate.eval_gates().z == 0
    assert closed.any()
    assert not layer(torch.randn(4, N_IN))[:, closed].any()


def test_gates_drawn_beforehand():
    layer = make("both")
    x = torch.randn(5, N_IN)
    in_gates, out_gates = layer.in_gate(), layer.out_gate()
    expected = ((x * in_gates.z) @ layer.weight.T + layer.bias) * out_gates.z
    torch.testing.assert_close(layer(x, in_gates, out_gates), expected)
    torch.testing.assert_close(layer(x, in_gates=in_gates, out_gates=out_gates), expected)
    # One side given: the other one still draws.
    torch.manual_seed(2)
    y = layer(x, in_gates=in_gates)
    torch.manual_seed(2)
    expected = layer(x, in_gates, layer.out_gate())
    torch.testing.assert_close(y, expected)


def test_gates_given_to_an_ungated_side():
    layer = make(None)
    x, z = torch.randn(5, N_IN), torch.tensor([0.0, 2.0] * 10 + [1.0])
    torch.testing.assert_close(layer(x, in_gates=Gates.from_z(z)), F.linear(x * z, layer.weight, layer.bias))


def test_a_shared_gate_drawn_once():
    shared = nn.HardConcreteGate(N_OUT, droprate_init=0.7)
    first = nn.L0Linear(N_IN, N_OUT, gate="out", out_gate=shared)
    second = nn.L0Linear(N_OUT, 4, gate="in", in_gate=shared)
    assert first.out_gate is second.in_gate is shared
    x = torch.randn(6, N_IN)
    gates = shared()
    y = second(first(x, out_gates=gates), in_gates=gates)
    expected = (F.linear(x, first.weight, first.bias) * gates.z**2) @ second.weight.T + second.bias
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert shared.log_alpha.grad.any()


def test_one_gate_on_both_sides_is_drawn_once():
    shared = nn.HardConcreteGate(N_IN, droprate_init=0.8)
    layer = nn.L0Linear(N_IN, N_IN, gate="both", in_gate=shared, out_gate=shared)
    x = torch.randn(6, N_IN)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    z = reference.sample_gates([shared.log_alpha])[0].z
    torch.testing.assert_close(y, z * F.linear(x * z, layer.weight, layer.bias))


def test_a_gate_may_be_frozen_alone():
    layer = make("both")
    layer.in_gate.eval()
    x = torch.randn(6, N_IN)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    out_gates = layer.out_gate()
    torch.testing.assert_close(y, layer(x, layer.in_gate.eval_gates(), out_gates))


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("bias", [True, False])
def test_from_dense(kind, bias):
    dense = torch.nn.Linear(N_IN, N_OUT, bias, dtype=torch.float64).eval()
    dense.weight.requires_grad_(False)
    layer = nn.L0Linear.from_dense(dense, gate=kind, droprate_init=0.2, lam=0.3, eval_mode="median")
    assert not layer.training
    assert layer.weight.data_ptr() != dense.weight.data_ptr()
    assert torch.equal(layer.weight, dense.weight)
    assert not layer.weight.requires_grad
    assert (layer.bias is None) == (not bias)
    for gate in nn.gate_modules(layer):
        assert (gate.droprate_init, gate.lam, gate.eval_mode) == (0.2, 0.3, "median")
        assert gate.log_alpha.dtype == torch.float64
        assert gate.log_alpha.requires_grad
    open_all(layer)
    x = torch.randn(4, N_IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))


def test_loads_the_state_of_a_dense_layer():
    dense, layer = torch.nn.Linear(N_IN, N_OUT), make("both")
    missing, unexpected = layer.load_state_dict(dense.state_dict(), strict=False)
    assert sorted(missing) == ["in_gate.log_alpha", "out_gate.log_alpha"]
    assert unexpected == []
    assert torch.equal(layer.weight, dense.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    layer = make(kind)
    fresh = nn.L0Linear(N_IN, N_OUT, gate=kind)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, N_IN)
    torch.manual_seed(1)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


def test_sharing_survives_copies():
    shared = nn.HardConcreteGate(N_OUT)
    model = torch.nn.ModuleList(
        [nn.L0Linear(N_IN, N_OUT, gate="out", out_gate=shared), nn.L0Linear(N_OUT, 4, in_gate=shared)]
    )
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].out_gate is twin[1].in_gate
        assert len(list(twin.parameters())) == len(list(model.parameters())) == 5


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module(kind, dtype):
    layer = make(kind).to(dtype)
    x = torch.randn(16, N_IN, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    assert y.dtype == layer.weight.dtype == x.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    for gate in nn.gate_modules(layer):
        assert gate.log_alpha.dtype == gate.log_alpha.grad.dtype == torch.float32
    torch.manual_seed(3)
    exact = dense_formula(copy.deepcopy(layer).double(), x.detach().double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps * exact.abs().max().item())


@pytest.mark.parametrize("kind", GATED)
def test_autocast(kind):
    layer = make(kind)
    x = torch.randn(16, N_IN)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        y = layer(x)
        like = torch.nn.Linear(N_IN, N_OUT)(x)
    assert y.dtype == like.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    for gate in nn.gate_modules(layer):
        assert gate.log_alpha.grad.dtype == torch.float32
        assert gate.log_alpha.grad.any()
    torch.manual_seed(3)
    exact = dense_formula(layer, x)
    atol = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", GATED)
def test_gradcheck_in_double(kind):
    torch.manual_seed(0)
    layer = nn.L0Linear(5, 4, gate=kind).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x, *_):
        torch.manual_seed(1)
        return layer(x)

    assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))


def test_meta_device_and_skip_init():
    layer = torch.nn.utils.skip_init(nn.L0Linear, 4, 3, gate="both")
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    layer = nn.L0Linear(4, 3, device="meta", gate="weight").to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()
    assert layer.weight.abs().max() <= 0.5
    assert layer.weight_gate.log_alpha.abs().max() < 0.1


def test_repr():
    assert repr(nn.L0Linear(2, 3, gate="in", lam=0.1)) == (
        "L0Linear(\n  in_features=2, out_features=3, bias=True, gate='in'\n"
        "  (in_gate): HardConcreteGate(2, droprate_init=0.5, lam=0.1, eval_mode='paper')\n)"
    )


def test_leading_dimensions_and_empty_batch():
    layer = make("both")
    assert layer(torch.randn(2, 3, 4, N_IN)).shape == (2, 3, 4, N_OUT)
    assert layer(torch.randn(N_IN)).shape == (N_OUT,)
    assert layer(torch.randn(0, N_IN)).shape == (0, N_OUT)


@pytest.mark.parametrize("kind", ["input", (3,), (0, 4), (2.0, 4), 5, True, (1, 2, 3)])
def test_unknown_gate(kind):
    with pytest.raises(ValueError, match=r"gate must be 'in', 'out', .* got "):
        nn.L0Linear(4, 4, gate=kind)


def test_bad_given_gates():
    gate = nn.HardConcreteGate(4)
    with pytest.raises(ValueError, match="out_gate must be None with gate='in'"):
        nn.L0Linear(4, 4, out_gate=gate)
    with pytest.raises(ValueError, match="in_gate must be None with gate='weight'"):
        nn.L0Linear(4, 4, gate="weight", in_gate=gate)
    with pytest.raises(ValueError, match=r"in_gate must have log_alpha of shape \(5,\), got \(4,\)"):
        nn.L0Linear(5, 4, in_gate=gate)
    with pytest.raises(TypeError, match="in_gate must be a HardConcreteGate, got Parameter"):
        nn.L0Linear(4, 4, in_gate=gate.log_alpha)
    other = nn.HardConcreteGate(4, dist=reference.HardConcrete(beta=0.5))
    with pytest.raises(ValueError, match="out_gate must have the distribution of in_gate"):
        nn.L0Linear(4, 4, gate="both", in_gate=gate, out_gate=other)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv2d"):
        nn.L0Linear.from_dense(torch.nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("kind", ["weight", (2, 2)])
def test_weight_gates_take_no_other_gates(kind):
    layer = nn.L0Linear(4, 4, gate=kind)
    with pytest.raises(ValueError, match="in_gates and out_gates must be None"):
        layer(torch.randn(2, 4), in_gates=nn.HardConcreteGate(4)())


# Of the other kinds TestDraws of ops/test_compile.py compiles steps.
@pytest.mark.parametrize(
    "kind", [kind if kind == "out" else pytest.param(kind, marks=pytest.mark.long) for kind in GATED]
)
def test_compiles_without_a_graph_break(kind):
    layer = make(kind)
    x = torch.randn(4, N_IN)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
