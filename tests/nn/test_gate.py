"""HardConcreteGate: initialisation, the two modes, precision, copies."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch

import l0kernels as l0
from l0kernels import nn, reference
from l0kernels.nn.gate import draw

LOW = [torch.float16, torch.bfloat16]


def same_draw(gate, other):
    """Both gates drawn after the same torch.manual_seed."""
    zs = []
    for module in (gate, other):
        torch.manual_seed(7)
        zs.append(module().z)
    return torch.equal(*zs)


@pytest.mark.parametrize("droprate", [0.2, 0.5, 0.9])
def test_initialisation(droprate):
    torch.manual_seed(0)
    log_alpha = nn.HardConcreteGate(10000, droprate_init=droprate).log_alpha
    mean = math.log(1 - droprate) - math.log(droprate)
    assert abs(log_alpha.mean().item() - mean) < 5 * 0.01 / 100
    assert abs(log_alpha.std().item() - 0.01) < 5 * 0.01 / math.sqrt(2 * 10000)


def test_training_draws_anew_and_differentiably():
    gate = nn.HardConcreteGate(500)
    first, second = gate(), gate()
    assert not torch.equal(first.z, second.z)
    first.z.sum().backward()
    fractional = (first.z > 0) & (first.z < 1)
    assert torch.equal(gate.log_alpha.grad != 0, fractional)


def test_draw_is_the_reference_of_the_same_seed():
    gate = nn.HardConcreteGate(321, dist=reference.HardConcrete(0.5, -0.2, 1.3))
    torch.manual_seed(3)
    drawn = gate()
    torch.manual_seed(3)
    expected = reference.sample_gates(gate.log_alpha, dist=gate.dist)
    torch.testing.assert_close(drawn.z, expected.z)
    assert torch.equal(drawn.index, expected.index)
    assert torch.equal(drawn.count, expected.count)


@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_evaluation_gate(mode):
    gate = nn.HardConcreteGate(200, eval_mode=mode)
    with torch.no_grad():
        gate.log_alpha.normal_(-1, 2)
    inside_training = gate.eval_gates()
    gates = gate.eval()()
    expected = reference.eval_gates(gate.log_alpha, mode)
    torch.testing.assert_close(gates.z, expected.z)
    assert not gates.z.requires_grad
    assert torch.equal(gates.z, inside_training.z)
    assert 0 < int(gates.count[0]) < 200


def test_shaped_gate():
    gate = nn.HardConcreteGate((3, 5))
    assert gate.log_alpha.shape == (3, 5)
    assert gate.n == 15
    assert gate().z.shape == (15,)
    assert gate.eval()().z.shape == (15,)


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_leaves_log_alpha_untouched(dtype):
    gate = nn.HardConcreteGate(50)
    before = gate.log_alpha.detach().clone()
    gate().z.sum().backward()
    grad = gate.log_alpha.grad.clone()
    model = torch.nn.Sequential(gate, torch.nn.Linear(2, 2))
    model.to(dtype)
    assert model[1].weight.dtype == dtype
    assert gate.log_alpha.dtype == torch.float32
    assert torch.equal(gate.log_alpha, before)
    assert torch.equal(gate.log_alpha.grad, grad)
    assert nn.HardConcreteGate(5, dtype=dtype).log_alpha.dtype == torch.float32


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_double_and_back(convert):
    gate = nn.HardConcreteGate(50)
    before = gate.log_alpha.detach().clone()
    assert gate.double().log_alpha.dtype == torch.float64
    assert gate().z.dtype == torch.float64
    assert convert(gate).log_alpha.dtype == torch.float32
    assert torch.equal(gate.log_alpha, before)
    assert nn.HardConcreteGate(5, dtype=torch.float64).log_alpha.dtype == torch.float64


def test_default_dtype_double():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert nn.HardConcreteGate(3).log_alpha.dtype == torch.float64
    finally:
        torch.set_default_dtype(default)


def test_meta_device_and_deferred_initialisation():
    gate = nn.HardConcreteGate(1000, droprate_init=0.3, device="meta")
    assert gate.log_alpha.is_meta
    gate.to_empty(device="cpu")
    gate.reset_parameters()
    assert abs(gate.log_alpha.mean().item() - math.log(0.7 / 0.3)) < 0.01
    skipped = torch.nn.utils.skip_init(nn.HardConcreteGate, 4)
    assert skipped.log_alpha.device.type == "cpu"


def test_copies():
    gate = nn.HardConcreteGate(64, droprate_init=0.3, lam=0.1, eval_mode="median")
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin.log_alpha.data_ptr() != gate.log_alpha.data_ptr()
        assert (twin.lam, twin.eval_mode, twin.dist) == (0.1, "median", gate.dist)
        assert same_draw(gate, twin)
    other = nn.HardConcreteGate(64)
    file = io.BytesIO()
    torch.save(gate.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_draw(gate, other)


def test_repr_names_what_matters():
    assert repr(nn.HardConcreteGate(3)) == (
        "HardConcreteGate(3, droprate_init=0.5, lam=0.1, eval_mode='paper')"
    )
    assert "(2, 3)" in repr(nn.HardConcreteGate((2, 3)))
    assert "beta=0.5" in repr(nn.HardConcreteGate(3, dist=reference.HardConcrete(beta=0.5)))


def test_gates_drawn_together_use_one_seed():
    gates = [nn.HardConcreteGate(n) for n in (40, 300, 7)]
    torch.manual_seed(1)
    drawn = draw(gates)
    torch.manual_seed(1)
    expected = reference.sample_gates([gate.log_alpha for gate in gates])
    for mine, theirs in zip(drawn, expected, strict=True):
        torch.testing.assert_close(mine.z, theirs.z)


def test_draw_of_mixed_gates():
    wide = reference.HardConcrete(gamma=-0.5, zeta=1.5)
    shared, frozen, other = (
        nn.HardConcreteGate(50),
        nn.HardConcreteGate(50),
        nn.HardConcreteGate(50, dist=wide),
    )
    frozen.eval()
    torch.manual_seed(5)
    first, none, evaluated, second, stretched = draw([shared, None, frozen, shared, other])
    assert none is None
    assert first is second, "a gate that stands in two places is drawn once"
    assert torch.equal(evaluated.z, frozen.eval_gates().z)
    torch.manual_seed(5)
    torch.testing.assert_close(first.z, reference.sample_gates([shared.log_alpha])[0].z)
    torch.testing.assert_close(stretched.z, reference.sample_gates([other.log_alpha], dist=wide)[0].z)
    assert draw([]) == []
    assert draw([None]) == [None]


def test_gate_modules_are_distinct_and_in_order():
    shared = nn.HardConcreteGate(4)
    first = nn.L0Linear(3, 4, gate="both", out_gate=shared)
    second = nn.L0Linear(4, 2, in_gate=shared)
    model = torch.nn.Sequential(first, second)
    assert nn.gate_modules(model) == [first.in_gate, shared]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0,), {}, ValueError, "n must be positive, got 0"),
        (((3, -1),), {}, ValueError, "n must be positive"),
        ((2.5,), {}, TypeError, "n must be an int or a sequence of ints, got 2.5"),
        (((),), {}, TypeError, "n must be"),
        ((3,), {"droprate_init": 0.0}, ValueError, r"droprate_init must lie in \(0, 1\), got 0.0"),
        ((3,), {"droprate_init": 1}, ValueError, "droprate_init"),
        ((3,), {"lam": -1.0}, ValueError, "lam must be finite and >= 0, got -1.0"),
        ((3,), {"lam": math.nan}, ValueError, "lam"),
        ((3,), {"eval_mode": "mean"}, ValueError, "eval_mode must be one of .* got 'mean'"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error, match=words):
        nn.HardConcreteGate(*arguments, **options)


def test_nan_is_an_error_in_both_modes():
    gate = nn.HardConcreteGate(3)
    with torch.no_grad():
        gate.log_alpha[1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        gate()
    with pytest.raises(ValueError, match="NaN"):
        gate.eval()()


def test_a_gate_with_a_forward_of_its_own_is_refused_by_layers():
    class Binary(nn.HardConcreteGate):
        def forward(self):
            return l0.Gates.from_z(super().forward().z.round(), full_grad=False)

    for make in (nn.L0Linear, functools.partial(nn.L0Conv2d, kernel_size=1)):
        with pytest.raises(TypeError, match="in_gate must have the forward of HardConcreteGate, got Binary"):
            make(3, 2, gate="in", in_gate=Binary(3))


def test_a_gate_with_evaluation_gates_of_its_own():
    class Binary(nn.HardConcreteGate):
        def eval_gates(self):
            return l0.Gates.from_z(super().eval_gates().z.round(), full_grad=False)

    gate = Binary(6)
    with torch.no_grad():
        gate.log_alpha.normal_(0, 3)
    linear = torch.nn.Linear(4, 6)
    layer = nn.L0Linear(6, 2, gate="in", in_gate=gate)
    x, z = torch.randn(3, 4), gate.eval_gates().z
    for model in (nn.L0Sequential(linear, layer), torch.nn.Sequential(linear, layer)):
        expected = torch.nn.functional.linear(linear(x) * z, layer.weight, layer.bias)
        torch.testing.assert_close(model.eval()(x), expected)
        torch.testing.assert_close(nn.export(model)(x), expected)
        assert nn.eval_l0(model) == 5 * int(z.sum()) + 2 * int(z.sum()) + 2
