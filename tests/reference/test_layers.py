import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from l0kernels.reference import (
    Gates,
    HardConcrete,
    eval_gates,
    gated_conv2d,
    gated_linear,
    gated_mlp,
    l0_linear,
    masked_linear,
    sample_gates,
    uniform,
)
from l0kernels.reference.gates import hard_concrete

SEED = torch.tensor([20], dtype=torch.int64)
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "identity": nn.Identity()}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def randn(*shape):
    """A float64 leaf."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def mixed_z(n):
    """Own gates with closed, fractional, full and out-of-range values; leaf."""
    values = itertools.islice(itertools.cycle([0.0, 0.3, 1.0, -0.7, 0.0, 1.5]), n)
    return torch.tensor(list(values), dtype=torch.float64, requires_grad=True)


def ones(n, dtype=torch.float32):
    return Gates.from_z(torch.ones(n, dtype=dtype))


SIDES = [
    (True, None),
    (False, "gates"),
    (True, "gates"),
    (False, "support"),
    (True, "support"),
    (False, None),
]


def sides(n_in, n_out, side):
    """Keyword arguments of a layer from the two z, and such z; whose zeros stay zero, whatever is added."""
    open_in, open_out = mixed_z(n_in) != 0, mixed_z(n_out) != 0

    def build(z_in, z_out):
        kwargs, z_in, z_out = {}, z_in * open_in, z_out * open_out
        if side[0]:
            kwargs["in_gates"] = Gates.from_z(z_in)
        if side[1] is not None:
            kwargs[f"out_{side[1]}"] = Gates.from_z(z_out)
        return kwargs

    return build, mixed_z(n_in), mixed_z(n_out)


class TestGatedLinear:
    @pytest.mark.parametrize("side", SIDES)
    def test_formula_by_hand(self, side):
        build, z_in, z_out = sides(5, 4, side)
        x, weight, bias = randn(3, 5), randn(4, 5), randn(4)
        y = gated_linear(x, weight, bias, **build(z_in, z_out))
        for n, o in itertools.product(range(3), range(4)):
            value = bias[o].item()
            for i in range(5):
                value += (z_in[i].item() if side[0] else 1) * x[n, i].item() * weight[o, i].item()
            if side[1] == "gates":
                value *= z_out[o].item()
            elif side[1] == "support":
                value *= z_out[o].item() != 0
            assert y[n, o].item() == pytest.approx(value, rel=1e-12, abs=1e-12)

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_gradcheck(self, side, has_bias):
        build, z_in, z_out = sides(5, 4, side)
        bias = randn(4) if has_bias else None
        if side[1] == "support":
            z_out.requires_grad_(False)

        def call(x, weight, z_in, z_out, bias):
            return gated_linear(x, weight, bias, **build(z_in, z_out))

        assert gradcheck(call, (randn(2, 3, 5), randn(4, 5), z_in, z_out, bias))

    def test_support_gives_its_gates_no_gradient(self):
        z = mixed_z(4)
        y = gated_linear(randn(3, 5), randn(4, 5), randn(4), out_support=Gates.from_z(z))
        y.sum().backward()
        assert z.grad is None
        assert torch.equal(y == 0, (z == 0).expand(3, 4))

    def test_support_then_input_gates_equal_output_gates(self):
        z = mixed_z(6)
        gates = Gates.from_z(z)
        x, first, bias, second = randn(3, 5), randn(6, 5), randn(6), randn(2, 6)
        leaves = (x, first, bias, second, z)
        a = gated_linear(gated_linear(x, first, bias, out_support=gates), second, in_gates=gates)
        b = gated_linear(gated_linear(x, first, bias, out_gates=gates), second)
        torch.testing.assert_close(a, b)
        grads = [[*torch.autograd.grad(y.square().sum(), leaves)] for y in (a, b)]
        for grad in grads:
            grad[-1] = grad[-1][z != 0]  # a closed gate's dz differs, and reaches no log_alpha
        for left, right in zip(*grads, strict=True):
            torch.testing.assert_close(left, right)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_open_gates_are_torch_nn(self, dtype):
        layer = nn.Linear(37, 11).to(dtype)
        x = torch.randn(2, 3, 37, dtype=dtype)
        expected = layer(x)
        gates = {"in_gates": ones(37), "out_gates": ones(11)}
        assert torch.equal(gated_linear(x, layer.weight, layer.bias), expected)
        assert torch.equal(gated_linear(x, layer.weight, layer.bias, **gates), expected)
        assert torch.equal(gated_linear(x, layer.weight, layer.bias, out_support=ones(11)), expected)
        log_alpha = {"in_log_alpha": torch.full((37,), 40.0), "out_log_alpha": torch.full((11,), 40.0)}
        assert torch.equal(l0_linear(x, layer.weight, layer.bias, **log_alpha), expected)

    @pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 0, 5), (2, 3, 4, 5)])
    def test_leading_dimensions(self, shape):
        gates = {"in_gates": Gates.from_z(mixed_z(5)), "out_gates": Gates.from_z(mixed_z(4))}
        x, weight, bias = randn(*shape), randn(4, 5), randn(4)
        y = gated_linear(x, weight, bias, **gates)
        flat = gated_linear(x.reshape(-1, 5), weight, bias, **gates)
        assert y.shape == (*shape[:-1], 4)
        torch.testing.assert_close(y, flat.reshape(y.shape), rtol=0, atol=1e-15)

    def test_non_contiguous_inputs(self):
        gates = {"in_gates": Gates.from_z(mixed_z(10)[::2]), "out_gates": Gates.from_z(mixed_z(4))}
        x, weight, bias = randn(5, 3).T, randn(5, 4).T, randn(8)[::2]
        y = gated_linear(x, weight, bias, **gates)
        expected = gated_linear(x.contiguous(), weight.contiguous(), bias.contiguous(), **gates)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (5, 1), (0, 3), (3, 0)])
    def test_smallest_sizes(self, sizes):
        n_in, n_out = sizes
        gates = {"in_gates": Gates.from_z(mixed_z(n_in)), "out_gates": Gates.from_z(mixed_z(n_out))}
        assert gated_linear(randn(2, n_in), randn(n_out, n_in), randn(n_out), **gates).shape == (2, n_out)

    @pytest.mark.parametrize("mode", ["train", "paper", "median", "topk"])
    def test_closed_unit_is_exactly_zero_with_its_bias(self, mode):
        log_alpha = torch.tensor([-30.0, 30.0, -30.0, 30.0])
        gates = sample_gates(log_alpha) if mode == "train" else eval_gates(log_alpha, mode)
        bias = torch.full((4,), 5.0, requires_grad=True)
        x, weight = torch.randn(3, 5), torch.randn(4, 5)
        for kwargs in ({"out_gates": gates}, {"out_support": gates}):
            y = gated_linear(x, weight, bias, **kwargs)
            (grad,) = torch.autograd.grad(y.sum(), bias)
            assert torch.equal(y == 0, (log_alpha < 0).expand(3, 4))
            torch.testing.assert_close(y[:, 1::2], nn.functional.linear(x, weight, bias)[:, 1::2])
            assert grad.tolist() == [0.0, 3.0, 0.0, 3.0]

    def test_bfloat16_rounds_z_with_the_product_only(self):
        z = torch.tensor([0.3, 0.7003])  # z in bfloat16 would be off by up to 0.2 %
        x, weight = torch.tensor([[1.0078125, 3.0]], dtype=torch.bfloat16), torch.eye(2, dtype=torch.bfloat16)
        expected = (x.float() * z).to(torch.bfloat16)
        assert torch.equal(gated_linear(x, weight, in_gates=Gates.from_z(z)), expected)
        assert torch.equal(gated_linear(x, weight, out_gates=Gates.from_z(z)), expected)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_bfloat16_keeps_float32_gate_gradients(self, autocast):
        log_alpha = torch.randn(64, requires_grad=True)
        dtype = torch.float32 if autocast else torch.bfloat16
        x, weight = torch.randn(16, 64).to(dtype), torch.randn(8, 64).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = l0_linear(x, weight, in_log_alpha=log_alpha, seed=SEED)
        assert y.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(y.float().square().sum(), log_alpha)
        exact = l0_linear(x.double(), weight.double(), in_log_alpha=log_alpha.double(), seed=SEED)
        (expected,) = torch.autograd.grad(exact.square().sum(), log_alpha)
        z = sample_gates(log_alpha, seed=SEED).z
        assert grad.dtype == torch.float32
        assert torch.equal(grad != 0, (z > 0) & (z < 1))
        assert (grad - expected).norm() < 0.03 * expected.norm()

    @pytest.mark.parametrize("full", [True, False])
    @pytest.mark.parametrize("function", [gated_linear, gated_conv2d])
    def test_where_a_gate_gets_a_gradient(self, function, full):
        z = torch.tensor([0.0, 0.4, 1.0, -0.5, 2.0], requires_grad=True)
        held = z.detach()
        x, weight = torch.randn(3, 5), torch.randn(5, 5)
        if function is gated_conv2d:
            x, weight = x[..., None, None], weight[..., None, None]
        expected = (held != 0) if full else (held > 0) & (held < 1)
        for side in ("in_gates", "out_gates"):
            y = function(x, weight, **{side: Gates.from_z(z, full_grad=full)})
            (dz,) = torch.autograd.grad(y.square().sum(), z)
            assert torch.equal(dz != 0, expected)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    @pytest.mark.parametrize("function", [gated_linear, gated_conv2d])
    def test_closed_units_may_hold_anything(self, function, bad):
        z = torch.tensor([0.0, 0.4, 1.0, 0.0], requires_grad=True)
        closed = z.detach() == 0
        x, weight, bias = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4)
        x[:, closed] = weight[:, closed] = weight[closed] = bias[closed] = bad
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        if function is gated_conv2d:
            x, weight = x[..., None, None], weight[..., None, None]
        gates = Gates.from_z(z)
        for sides in ({"in_gates": gates, "out_gates": gates}, {"in_gates": gates, "out_support": gates}):
            y = function(x, weight, bias, **sides)
            assert y.isfinite().all()
            grads = torch.autograd.grad(y.sum(), [*leaves, z])
            assert all(grad.isfinite().all() for grad in grads)


class TestL0Linear:
    @pytest.mark.parametrize("has_in", [True, False])
    @pytest.mark.parametrize("has_out", [True, False])
    def test_streams_and_gradcheck(self, has_in, has_out):
        x, weight, bias = randn(3, 5), randn(4, 5), randn(4)
        in_la, out_la = (randn(5) if has_in else None), (randn(4) if has_out else None)
        drawn = iter(sample_gates([a for a in (in_la, out_la) if a is not None], seed=SEED))
        kwargs = {"in_gates": next(drawn) if has_in else None, "out_gates": next(drawn) if has_out else None}

        def call(x, weight, bias, in_la, out_la):
            return l0_linear(x, weight, bias, in_log_alpha=in_la, out_log_alpha=out_la, seed=SEED)

        assert torch.equal(call(x, weight, bias, in_la, out_la), gated_linear(x, weight, bias, **kwargs))
        assert gradcheck(call, (x, weight, bias, in_la, out_la))

    def test_missing_seed_and_constants(self):
        x, weight, log_alpha = torch.randn(3, 50), torch.randn(4, 50), torch.zeros(50)
        dist = HardConcrete(0.5, -0.3, 1.2)
        torch.manual_seed(1)
        first = l0_linear(x, weight, in_log_alpha=log_alpha, dist=dist)
        torch.manual_seed(1)
        gates = sample_gates(log_alpha, dist=dist)
        assert torch.equal(first, gated_linear(x, weight, in_gates=gates))
        assert not torch.equal(first, l0_linear(x, weight, in_log_alpha=log_alpha, dist=dist))

    def test_gradient_zero_set(self):
        log_alpha = torch.randn(500, requires_grad=True)
        l0_linear(
            torch.randn(9, 500), torch.randn(7, 500), in_log_alpha=log_alpha, seed=SEED
        ).sum().backward()
        z = sample_gates(log_alpha, seed=SEED).z
        assert torch.equal(log_alpha.grad != 0, (z > 0) & (z < 1))

    def test_closed_gates_get_zero_weight_gradients(self):
        log_alpha, weight = torch.randn(500) - 1, torch.randn(7, 500, requires_grad=True)
        gates = sample_gates(log_alpha, seed=SEED)
        gated_linear(torch.randn(9, 500), weight, in_gates=gates).sum().backward()
        assert torch.equal(weight.grad != 0, (gates.z != 0).expand(7, 500))


class TestGatedMLP:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_open_gates_are_torch_nn(self, activation):
        layers = [nn.Linear(13, 17), nn.Linear(17, 7, bias=False), nn.Linear(7, 3)]
        act = ACTIVATIONS[activation]
        net = nn.Sequential(layers[0], act, layers[1], act, layers[2])
        x = torch.randn(2, 5, 13)
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        for gates in ([ones(13), ones(17), ones(7)], [None] * 3):
            assert torch.equal(gated_mlp(x, weights, biases, gates, activation), net(x))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gates_multiply_after_the_activation(self, activation):
        x, weights, biases = randn(4, 5), [randn(6, 5), randn(3, 6)], [randn(6), randn(3)]
        gates = [Gates.from_z(mixed_z(5)), Gates.from_z(mixed_z(6))]
        hidden = ACTIVATIONS[activation]((x * gates[0].z) @ weights[0].T + biases[0]) * gates[1].z
        expected = hidden @ weights[1].T + biases[1]
        torch.testing.assert_close(gated_mlp(x, weights, biases, gates, activation), expected)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("gated", [(True, True, True), (False, True, False), (True, False, False)])
    def test_gradcheck(self, activation, gated):
        sizes = (3, 5, 4, 2)
        log_alphas = [randn(n) for n in sizes[:-1]]
        weights = [randn(b, a) for a, b in itertools.pairwise(sizes)]
        biases = [randn(5), None, randn(2)]

        def call(x, *leaves):
            drawn = sample_gates(leaves[:3], seed=SEED)
            gates = [g if use else None for g, use in zip(drawn, gated, strict=True)]
            return gated_mlp(x, leaves[3:6], leaves[6:], gates, activation)

        assert gradcheck(call, (randn(2, 3), *log_alphas, *weights, *biases))

    @pytest.mark.parametrize(("activation", "act"), [("swiglu", nn.SiLU()), ("geglu", nn.GELU())])
    def test_gated_product(self, activation, act):
        gate, up, down = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        x, z = torch.randn(2, 4, 5), Gates.from_z(mixed_z(6).float())
        weights = [torch.cat((gate.weight, up.weight)), down.weight]
        biases = [torch.cat((gate.bias, up.bias)), down.bias]
        y = gated_mlp(x, weights, biases, [None, z], activation)
        torch.testing.assert_close(y, down(act(gate(x)) * up(x) * z.z))
        y = gated_mlp(x, weights, biases, [None, None], activation)
        torch.testing.assert_close(y, down(act(gate(x)) * up(x)))

    @pytest.mark.parametrize("activation", ["swiglu", "geglu"])
    def test_gated_product_gradcheck(self, activation):
        log_alphas = [randn(n) for n in (3, 5, 4)]
        leaves = [randn(10, 3), randn(8, 5), randn(2, 4), randn(10), None, randn(2)]

        def call(x, *leaves):
            gates = sample_gates(leaves[:3], seed=SEED)
            return gated_mlp(x, leaves[3:6], leaves[6:], gates, activation)

        assert gradcheck(call, (randn(2, 3), *log_alphas, *leaves))

    def test_default_activation_single_layer_and_empty_batch(self):
        x, weight, bias = randn(3, 5), randn(4, 5), randn(4)
        assert torch.equal(gated_mlp(x, [weight], [bias], [None]), nn.functional.linear(x, weight, bias))
        pair = gated_mlp(x, [weight, weight.T], [bias, None], [None, None])
        assert torch.equal(pair, gated_mlp(x, [weight, weight.T], [bias, None], [None, None], "relu"))
        assert gated_mlp(randn(0, 5), [weight], [bias], [Gates.from_z(mixed_z(5))]).shape == (0, 4)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_bfloat16(self, activation):
        weights = [torch.randn(6, 5).bfloat16(), torch.randn(3, 6).bfloat16()]
        gates = sample_gates([torch.zeros(5), torch.zeros(6)], seed=SEED)
        y = gated_mlp(torch.randn(4, 5).bfloat16(), weights, [None, None], gates, activation)
        assert y.dtype == torch.bfloat16


class TestMaskedLinear:
    @pytest.mark.parametrize("block", [None, (1, 1), (2, 3), (5, 7), (8, 16)])
    @pytest.mark.parametrize("mode", [None, "paper", "median", "topk"])
    def test_each_weight_has_the_gate_of_its_block(self, block, mode):
        x, weight, bias = randn(3, 7), randn(5, 7), randn(5)
        b_out, b_in = block or (1, 1)
        log_alpha = randn(math.ceil(5 / b_out), math.ceil(7 / b_in))
        if mode is None:
            u = uniform(SEED, torch.arange(log_alpha.numel())).reshape(log_alpha.shape)
            z = hard_concrete(log_alpha, u, HardConcrete())
        else:
            z = eval_gates(log_alpha.flatten(), mode).z.reshape(log_alpha.shape)
        mask = torch.empty(5, 7, dtype=torch.float64)
        for o, i in itertools.product(range(5), range(7)):
            mask[o, i] = z[o // b_out, i // b_in]
        y = masked_linear(x, weight, bias, log_alpha, block=block, seed=SEED, mode=mode)
        torch.testing.assert_close(y, nn.functional.linear(x, weight * mask, bias))

    @pytest.mark.parametrize("block", [None, (2, 3)])
    @pytest.mark.parametrize("mode", [None, "paper", "median", "topk"])
    def test_gradcheck(self, block, mode):
        log_alpha = randn(5, 7) if block is None else randn(3, 3)
        if mode is not None:
            log_alpha.requires_grad_(False)

        def call(x, weight, bias, log_alpha):
            return masked_linear(x, weight, bias, log_alpha, block=block, seed=SEED, mode=mode)

        assert gradcheck(call, (randn(3, 7), randn(5, 7), randn(5), log_alpha))

    @pytest.mark.parametrize("block", [None, (2, 3)])
    def test_open_and_closed(self, block):
        layer = nn.Linear(7, 5)
        x = torch.randn(3, 7)
        opened = torch.full((5, 7) if block is None else (3, 3), 40.0)
        y = masked_linear(x, layer.weight, layer.bias, opened, block=block)
        assert torch.equal(y, layer(x))
        y = masked_linear(x, layer.weight, layer.bias, -opened, block=block)
        assert torch.equal(y, layer.bias.expand(3, 5))  # the bias is ungated
        assert torch.equal(
            masked_linear(x, layer.weight, None, -opened, block=block, mode="topk"), torch.zeros(3, 5)
        )

    def test_gradient_zero_set_and_seed(self):
        log_alpha = torch.randn(30, 40, requires_grad=True)
        weight = torch.randn(30, 40, requires_grad=True)
        x = torch.randn(6, 40)
        masked_linear(x, weight, None, log_alpha, seed=SEED).sum().backward()
        z = sample_gates(log_alpha.detach().flatten(), seed=SEED).z.reshape(30, 40)
        assert torch.equal(log_alpha.grad != 0, (z > 0) & (z < 1))
        assert torch.equal(weight.grad != 0, z != 0)
        torch.manual_seed(2)
        first = masked_linear(x, weight, None, log_alpha)
        torch.manual_seed(2)
        assert torch.equal(first, masked_linear(x, weight, None, log_alpha))
        assert not torch.equal(first, masked_linear(x, weight, None, log_alpha))

    def test_evaluation_carries_no_gate_gradient(self):
        log_alpha = torch.zeros(2, 3, requires_grad=True)
        y = masked_linear(torch.randn(4, 3), torch.randn(2, 3), None, log_alpha, mode="paper")
        assert not y.requires_grad

    def test_bfloat16(self):
        log_alpha = torch.randn(5, 7, requires_grad=True)
        x, weight = torch.randn(3, 7).bfloat16(), torch.randn(5, 7).bfloat16()
        y = masked_linear(x, weight, None, log_alpha, seed=SEED)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert log_alpha.grad.dtype == torch.float32


GEOMETRIES = [
    {},
    {"stride": 2},
    {"stride": (2, 1), "padding": (0, 2)},
    {"padding": 1, "dilation": 2},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": "valid", "stride": 3},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": 2, "padding": 1, "dilation": 2},
]


class TestGatedConv2d:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_open_gates_are_torch_nn(self, geometry, bias):
        layer = nn.Conv2d(4, 8, 3, bias=bias, **geometry)
        for x in (torch.randn(2, 4, 9, 8), torch.randn(4, 9, 8)):
            expected = layer(x)
            for kwargs in (
                {"in_gates": ones(4), "out_gates": ones(8)},
                {"in_gates": ones(4), "out_support": ones(8)},
                {},
            ):
                assert torch.equal(gated_conv2d(x, layer.weight, layer.bias, **geometry, **kwargs), expected)

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_gates_scale_channels(self, geometry):
        x, bias = randn(2, 4, 9, 8), randn(8)
        weight = randn(8, 4 // geometry.get("groups", 1), 3, 3)
        z_in, z_out = mixed_z(4), mixed_z(8)
        gates = {"in_gates": Gates.from_z(z_in), "out_gates": Gates.from_z(z_out)}
        y = gated_conv2d(x, weight, bias, **geometry, **gates)
        scaled = torch.stack([z * x[:, c] for c, z in enumerate(z_in)], 1)
        dense = nn.functional.conv2d(scaled, weight, bias, **geometry)
        for c, z in enumerate(z_out):
            torch.testing.assert_close(y[:, c], z * dense[:, c])

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("side", SIDES)
    def test_gradcheck(self, geometry, side):
        build, z_in, z_out = sides(4, 4, side)
        weight = randn(4, 4 // geometry.get("groups", 1), 3, 3)
        if side[1] == "support":
            z_out.requires_grad_(False)

        def call(x, weight, bias, z_in, z_out):
            return gated_conv2d(x, weight, bias, **geometry, **build(z_in, z_out))

        assert gradcheck(call, (randn(1, 4, 5, 6), weight, randn(4), z_in, z_out), fast_mode=True)

    def test_gradcheck_of_drawn_gates(self):
        def call(x, weight, in_log_alpha, out_log_alpha):
            in_gates, out_gates = sample_gates([in_log_alpha, out_log_alpha], seed=SEED)
            return gated_conv2d(x, weight, in_gates=in_gates, out_gates=out_gates)

        assert gradcheck(call, (randn(1, 3, 4, 4), randn(4, 3, 2, 2), randn(3), randn(4)))

    @pytest.mark.parametrize("mode", ["train", "paper", "median", "topk"])
    def test_closed_channel_is_exactly_zero_with_its_bias(self, mode):
        log_alpha = torch.tensor([-30.0, 30.0, -30.0])
        gates = sample_gates(log_alpha) if mode == "train" else eval_gates(log_alpha, mode)
        bias = torch.full((3,), 5.0, requires_grad=True)
        x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
        for kwargs in ({"out_gates": gates}, {"out_support": gates}):
            y = gated_conv2d(x, weight, bias, **kwargs)
            (grad,) = torch.autograd.grad(y.sum(), bias)
            assert torch.equal(y == 0, (log_alpha < 0)[:, None, None].expand_as(y))
            torch.testing.assert_close(y[:, 1], nn.functional.conv2d(x, weight, bias)[:, 1])
            assert grad.tolist() == [0.0, 18.0, 0.0]

    def test_empty_batch_strides_and_bfloat16(self):
        weight, gates = randn(3, 4, 2, 2), Gates.from_z(mixed_z(4))
        assert gated_conv2d(randn(0, 4, 5, 5), weight, in_gates=gates).shape == (0, 3, 4, 4)
        x = randn(2, 5, 5, 4).permute(0, 3, 1, 2)
        a, b = (gated_conv2d(v, weight, in_gates=gates) for v in (x, x.contiguous()))
        torch.testing.assert_close(a, b)
        y = gated_conv2d(
            x.bfloat16(), weight.bfloat16(), in_gates=gates, out_support=Gates.from_z(mixed_z(3))
        )
        assert y.dtype == torch.bfloat16


X, W, B = torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(4)
G4, G5 = ones(4), ones(5)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([[0.0] * 5], W), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((X.int(), W), {}, TypeError, "x must have a floating-point dtype, got torch.int32"),
        ((torch.zeros(2, 6), W), {}, ValueError, r"x must have shape \(\.\.\., 5\).*got \(2, 6\)"),
        ((torch.tensor(1.0), W), {}, ValueError, r"x must have shape \(\.\.\., 5\).*got \(\)"),
        ((X.double(), W), {}, TypeError, "x must have the dtype of weight, torch.float32, got torch.float64"),
        ((X.to(META), W.to(META).double()), {}, TypeError, "x must have the dtype of weight"),
        ((X.to(META), W), {}, ValueError, "x must be on cpu, the device of weight, got meta"),
        ((X, B), {}, ValueError, r"weight must have shape \(out, in\), got \(4,\)"),
        ((X, W, torch.zeros(5)), {}, ValueError, r"bias must have shape \(4,\).*got \(5,\)"),
        ((X, W, B.double()), {}, TypeError, "bias must have the dtype of weight"),
        ((X, W, B.to(META)), {}, ValueError, "bias must be on cpu"),
        ((X, W), {"in_gates": torch.ones(5)}, TypeError, "in_gates must be Gates.*got Tensor"),
        ((X, W), {"in_gates": G4}, ValueError, r"in_gates must hold 5 gates.*got z of shape \(4,\)"),
        ((X, W), {"out_gates": G5}, ValueError, "out_gates must hold 4 gates"),
        ((X, W), {"out_support": G5}, ValueError, "out_support must hold 4 gates"),
        (
            (X, W),
            {"out_support": G4, "out_gates": G4},
            ValueError,
            "either out_gates or out_support, got both",
        ),
        ((X, W), {"in_gates": Gates(*(t.to(META) for t in G5[:3]))}, ValueError, "in_gates.z must be on cpu"),
        ((X, W), {"in_gates": G5._replace(index=G5.index[:5])}, ValueError, r"in_gates.index.*\(128,\)"),
        ((X, W), {"in_gates": G5._replace(count=G5.count[:1])}, ValueError, r"in_gates.count.*\(2,\)"),
        (
            (X, W),
            {"in_gates": G5._replace(count=5)},
            TypeError,
            "in_gates.count must be a torch.Tensor, got int",
        ),
        (
            (X, W),
            {"in_gates": G5._replace(index=G5.index.long())},
            TypeError,
            "must be int32, got torch.int64",
        ),
        (
            (X, W),
            {"in_gates": G5._replace(z=G5.z.bfloat16())},
            TypeError,
            "in_gates.z must be float32 or float64",
        ),
    ],
)
def test_bad_gated_linear(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        gated_linear(*args, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"in_log_alpha": torch.zeros(4)}, ValueError, "in_gates must hold 5 gates"),
        ({"out_log_alpha": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "float32 or float64"),
        ({"in_log_alpha": torch.full((5,), math.nan)}, ValueError, "NaN"),
        ({"in_log_alpha": torch.zeros(5), "seed": 1}, TypeError, "seed must be an int64 tensor"),
        ({"in_log_alpha": torch.zeros(5), "dist": None}, TypeError, "dist must be a HardConcrete"),
    ],
)
def test_bad_l0_linear(kwargs, error, message):
    with pytest.raises(error, match=message):
        l0_linear(X, W, B, **kwargs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [], "biases": [], "gates": []}, ValueError, "weights must hold at least one matrix"),
        ({"biases": [None]}, ValueError, "biases must hold one entry per weight, 2, got 1"),
        ({"gates": [None] * 3}, ValueError, "gates must hold one entry per weight, 2, got 3"),
        ({"activation": "tanh"}, ValueError, "activation must be one of 'relu', 'gelu'.*got 'tanh'"),
        ({"activation": nn.ReLU()}, ValueError, "activation must be one of"),
        ({"weights": [W, torch.zeros(3, 5)]}, ValueError, r"weights\[1\] must have 4 columns.*\(3, 5\)"),
        ({"activation": "swiglu"}, ValueError, r"weights\[1\] must have 2 columns, half the rows .*\(3, 4\)"),
        (
            {"weights": [torch.zeros(7, 5), torch.zeros(3, 4)], "biases": [None] * 2, "activation": "geglu"},
            ValueError,
            r"weights\[0\] must have an even number of rows, two per unit of 'geglu', got shape \(7, 5\)",
        ),
        ({"weights": [W, torch.zeros(3, 4).double()]}, TypeError, r"weights\[1\] must have the dtype of x"),
        ({"weights": [W, torch.zeros(3, 4, device=META)]}, ValueError, r"weights\[1\] must be on cpu"),
        ({"weights": [W, torch.zeros(3)]}, ValueError, r"weights\[1\] must have shape \(out, in\)"),
        ({"biases": [B, torch.zeros(4)]}, ValueError, r"biases\[1\] must have shape \(3,\)"),
        ({"biases": [B.double(), None]}, TypeError, r"biases\[0\] must have the dtype of weights\[0\]"),
        ({"gates": [G4, None]}, ValueError, r"gates\[0\] must hold 5 gates, one per input of weights\[0\]"),
        ({"gates": [None, G5]}, ValueError, r"gates\[1\] must hold 4 gates"),
        (
            {"x": torch.zeros(2, 4)},
            ValueError,
            r"x must have shape \(\.\.\., 5\), the columns of weights\[0\]",
        ),
    ],
)
def test_bad_gated_mlp(change, error, message):
    args = {"x": X, "weights": [W, torch.zeros(3, 4)], "biases": [B, None], "gates": [G5, G4]} | change
    with pytest.raises(error, match=message):
        gated_mlp(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"log_alpha": torch.zeros(5, 4)},
            ValueError,
            r"log_alpha must have shape \(4, 5\) \(the shape of weight\)",
        ),
        ({"log_alpha": torch.zeros(20)}, ValueError, "log_alpha must have 2 dimension"),
        ({"log_alpha": torch.zeros(4, 5).half()}, TypeError, "log_alpha must be float32 or float64"),
        ({"log_alpha": torch.full((4, 5), math.nan)}, ValueError, "log_alpha must not hold NaN, got 20"),
        ({"log_alpha": torch.zeros(4, 5, device=META)}, ValueError, "log_alpha must be on cpu"),
        ({"block": (2, 2)}, ValueError, r"log_alpha must have shape \(2, 3\)"),
        ({"block": 2}, TypeError, "block must be a pair"),
        ({"block": (2, 2, 2)}, TypeError, "block must be a pair"),
        ({"block": (0, 2)}, ValueError, r"block\[0\] must be in \[1"),
        ({"block": (2, 2.0)}, TypeError, r"block\[1\] must be an int"),
        ({"mode": "soft"}, ValueError, "mode must be one of"),
        ({"seed": 1}, TypeError, "seed must be an int64 tensor"),
        ({"dist": 1}, TypeError, "dist must be a HardConcrete"),
        ({"x": torch.zeros(2, 4)}, ValueError, "x must have shape"),
    ],
)
def test_bad_masked_linear(change, error, message):
    args = {"x": X, "weight": W, "bias": B, "log_alpha": torch.zeros(4, 5)} | change
    with pytest.raises(error, match=message):
        masked_linear(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 3, 8, 8)}, ValueError, r"x must have shape \(N, 4, H, W\).*got \(1, 3, 8, 8\)"),
        ({"x": torch.zeros(4, 8)}, ValueError, "x must have shape"),
        ({"weight": torch.zeros(6, 4, 3)}, ValueError, "weight must have shape"),
        ({"groups": 4}, ValueError, "groups must divide the 6 rows of weight, got 4"),
        ({"groups": 0}, ValueError, "groups must be in"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(6,\)"),
        ({"x": torch.zeros(1, 4, 8, 8).double()}, TypeError, "x must have the dtype of weight"),
        ({"in_gates": ones(6)}, ValueError, "in_gates must hold 4 gates"),
        ({"out_gates": ones(4)}, ValueError, "out_gates must hold 6 gates"),
        ({"out_support": ones(4)}, ValueError, "out_support must hold 6 gates"),
    ],
)
def test_bad_gated_conv2d(change, error, message):
    args = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3)} | change
    with pytest.raises(error, match=message):
        gated_conv2d(**args)
