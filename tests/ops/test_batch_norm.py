"""gated_batch_norm of dense and of packed channels against the formula in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import Gates, Packed, reference
from op_checks import KINDS, assert_near, make_z

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(3, 7, 4, 5), (2, 1, 3, 3), (5, 33, 1, 2), (64, 8, 1, 1)]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def tensors(shape, dtype=torch.float32, affine=True):
    n = shape[1]
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    statistics = [torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype) + 0.5]
    parameters = [torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)] if affine else [None, None]
    return x, statistics, parameters


def run(function, x, statistics, parameters, gates, dy, training, packed=False, momentum=0.3):
    """y, the statistics afterwards, and the gradients of x and the parameters."""
    statistics = [None if s is None else s.clone() for s in statistics]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *parameters)]
    args = (*statistics, *leaves[1:], training, momentum, 1e-5)
    if packed:
        y = l0.unpack_channels(function(l0.pack_channels(leaves[0], gates), *args))
    else:
        y = function(leaves[0], *args, gates=gates)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(y, given, dy.to(y.dtype), allow_unused=True)
    return [y.detach(), *(s for s in statistics if s is not None), *grads]


def double(values):
    return [None if t is None else t.double() for t in values]


class TestAgainstTheFormula:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_values_statistics_and_gradients(self, backend, dtype, training, packed):
        for shape, kind, affine, fmt in itertools.product(SHAPES, KINDS, (True, False), LAYOUTS):
            x, statistics, parameters = tensors(shape, dtype, affine)
            x = x.contiguous(memory_format=fmt)
            gates = Gates.from_z(make_z(kind, shape[1]))
            dy = torch.randn(shape, dtype=dtype)
            got = run(l0.gated_batch_norm, x, statistics, parameters, gates, dy, training, packed)
            eager = run(reference.gated_batch_norm, x, statistics, parameters, gates, dy, training)
            exact = run(
                reference.gated_batch_norm,
                x.double(),
                double(statistics),
                double(parameters),
                gates,
                dy.double(),
                training,
            )
            for i, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
                a, b, c = (torch.zeros_like(t) if g is None else g for g, t in ((a, c), (b, c), (c, c)))
                assert_near(a, b, c, dtype, f"{shape} {kind} {affine} {fmt} {i}")
            closed = gates.z == 0
            assert not got[0][:, closed].any()
            for before, after in zip(statistics, got[1:3], strict=True):
                assert torch.equal(before[closed], after[closed])
                assert training == (not torch.equal(before, after)) or closed.all()

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_all_open_is_torch_nn(self, backend, training, packed):
        x = torch.randn(4, 6, 3, 3)
        layer, twin = nn.BatchNorm2d(6).train(training), nn.BatchNorm2d(6).train(training)
        gates = Gates.from_z(torch.full((6,), 0.5))  # what z is plays no part
        value = l0.pack_channels(x, gates) if packed else x
        y = l0.gated_batch_norm(
            value,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            training,
            gates=None if packed else gates,
        )
        torch.testing.assert_close(y.data if packed else y, twin(x))
        torch.testing.assert_close(layer.running_mean, twin.running_mean)
        torch.testing.assert_close(layer.running_var, twin.running_var)

    def test_without_gates_and_without_statistics(self, backend):
        x = torch.randn(4, 6, 3, 3)
        torch.testing.assert_close(
            l0.gated_batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True)
        )
        z = make_z("mixed", 6)
        for packed in (False, True):
            gates = Gates.from_z(z)
            got = run(l0.gated_batch_norm, x, [None] * 2, [None] * 2, gates, x, True, packed)
            expected = run(reference.gated_batch_norm, x, [None] * 2, [None] * 2, gates, x, True)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)

    def test_closed_channels_may_hold_anything(self, backend):
        z = torch.tensor([1.0, 0, 0.5, 0])
        x, statistics, parameters = tensors((3, 4, 2, 2))
        x[:, 1], x[:, 3] = float("nan"), float("inf")
        got = run(l0.gated_batch_norm, x, statistics, parameters, Gates.from_z(z), torch.ones(x.shape), True)
        assert all(t.isfinite().all() for t in got)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bit_activations(self, backend, dtype, packed):
        x, statistics, parameters = tensors((4, 9, 5, 5))
        gates, dy = Gates.from_z(make_z("mixed", 9)), torch.randn(x.shape)
        low = x.to(dtype)
        got = run(l0.gated_batch_norm, low, statistics, parameters, gates, dy, True, packed)
        eager = run(reference.gated_batch_norm, low, statistics, parameters, gates, dy, True)
        args = (double(statistics), double(parameters), gates, dy.to(dtype).double(), True)
        exact = run(reference.gated_batch_norm, low.double(), *args)
        assert (got[0].dtype, got[3].dtype) == (dtype, dtype)
        for i, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
            assert_near(a, b, c, dtype, f"{i}")

    def test_other_ranks(self, backend):
        gates = Gates.from_z(make_z("mixed", 5))
        for shape in ((6, 5), (3, 5, 4), (2, 5, 2, 2, 2)):
            x, statistics, parameters = tensors(shape)
            args = (statistics, parameters, gates, torch.ones(shape), True)
            for a, b in zip(
                run(l0.gated_batch_norm, x, *args), run(reference.gated_batch_norm, x, *args), strict=True
            ):
                torch.testing.assert_close(a, b)

    def test_whole_graph(self, backend):
        x, statistics, parameters = tensors((3, 7, 4, 4))
        gates = Gates.from_z(make_z("mixed", 7))
        compiled = torch.compile(l0.gated_batch_norm, fullgraph=True, backend="aot_eager")
        args = (statistics, parameters, gates, torch.ones(x.shape), True)
        for a, b in zip(run(compiled, x, *args), run(l0.gated_batch_norm, x, *args), strict=True):
            torch.testing.assert_close(a, b)
        torch._dynamo.reset()

    def test_reference_of_a_packed_input(self):
        x, statistics, parameters = tensors((3, 7, 4, 4))
        args = (statistics, parameters, Gates.from_z(make_z("mixed", 7)), torch.ones(x.shape), True)
        with l0.use_backend("reference"):
            packed = run(l0.gated_batch_norm, x, *args, packed=True)
        for a, b in zip(packed, run(reference.gated_batch_norm, x, *args), strict=True):
            torch.testing.assert_close(a, b)

    def test_packed_keeps_its_gates(self, backend):
        packed = l0.pack_channels(torch.randn(2, 5, 3, 3), Gates.from_z(make_z("few", 5)))
        y = l0.gated_batch_norm(packed, torch.zeros(5), torch.ones(5))
        assert isinstance(y, Packed)
        assert (y.gates, y.channels) == (packed.gates, 5)


@pytest.mark.parametrize("function", [l0.gated_batch_norm, reference.gated_batch_norm])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4).long()}, TypeError, "x must have a floating-point dtype"),
        ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(N, channels, ...\), got \(4,\)"),
        ({"running_mean": torch.zeros(3)}, ValueError, r"running_mean must have shape \(4,\)"),
        ({"running_var": None}, ValueError, "running_mean and running_var must both be given"),
        (
            {"running_mean": None, "running_var": None},
            ValueError,
            "running_mean must be given where training is False, got None",
        ),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \(4,\)"),
        ({"bias": [1.0]}, TypeError, "bias must be a torch.Tensor"),
        ({"momentum": None}, TypeError, "momentum must be a number, got NoneType"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"gates": torch.ones(4)}, TypeError, "gates must be Gates"),
        ({"gates": Gates.from_z(torch.ones(5))}, ValueError, "gates must hold 4 gates, one per channel of x"),
        (
            {"x": torch.zeros(1, 4, 1, 1), "training": True},
            ValueError,
            r"x must hold more than one value per channel where training is True, got \(1, 4, 1, 1\)",
        ),
    ],
)
def test_errors(function, change, error, message):
    args = {
        "x": torch.zeros(2, 4, 3, 3),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
    } | change
    with pytest.raises(error, match=message):
        function(**args)


def test_gates_beside_a_packed_input():
    gates = Gates.from_z(torch.ones(4))
    packed = l0.pack_channels(torch.zeros(2, 4, 3, 3), gates)
    with pytest.raises(ValueError, match="gates must be None for a Packed x, which has its own, got Gates"):
        l0.gated_batch_norm(packed, torch.zeros(4), torch.ones(4), gates=gates)


class TestStridesThatTorchMisreads:
    """Of these torch's own gradients are wrong: its kernels take for dense what is not."""

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("case", ["strided statistics", "one weight for all", "a height of one"])
    def test_gradients(self, case, training, gated, backend):
        x, weight = torch.randn(3, 30), torch.randn(30)
        if case == "a height of one":
            x = torch.randn(360).as_strided((3, 30, 1, 4), (120, 1, 1, 30))
        if case == "one weight for all":
            weight = weight[:1].expand(30)
        step = 3 if case == "strided statistics" else 1
        mean, var = torch.randn(30), torch.rand(30) + 0.5
        gates = Gates.from_z(make_z("mixed", 30)) if gated else None
        leaves = [t.requires_grad_() for t in (x, weight)]
        dy, results = torch.randn(x.shape), []
        for namespace, dense in ((l0, False), (reference, True)):
            kept = [t.clone() if dense else t.repeat_interleave(step)[::step] for t in (mean, var)]
            given = [t.clone(memory_format=torch.contiguous_format) if dense else t for t in leaves]
            y = namespace.gated_batch_norm(given[0], *kept, given[1], None, training, gates=gates)
            results.append([y, *torch.autograd.grad(y, leaves, dy), *kept])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_no_channels(backend):
    x = torch.randn(3, 0, 2).requires_grad_()
    empty = torch.zeros(0)
    for gates in (None, Gates.from_z(empty)):
        y = l0.gated_batch_norm(x, empty, empty, empty, empty, True, gates=gates)
        assert y.shape == x.shape
    packed = l0.gated_batch_norm(
        l0.pack_channels(torch.zeros(2, 0, 3, 3), gates), None, None, empty, None, True
    )
    assert packed.data.shape == (2, 0, 3, 3)
