"""Layers of sixteen bits, and under autocast, beside float64."""

from functools import partial

import pytest
import torch

import l0kernels as l0
from l0kernels import Gates, reference
from l0kernels._arguments import GLU, ROWS
from op_checks import SEED, compare, wanted

pytestmark = pytest.mark.usefixtures("seeded")
LOW = [torch.bfloat16, torch.float16]


def low_call(name):
    """Calls on explicit leaves, by namespace, for the comparison with float64."""

    def linear(namespace, x, w, b, a_in, a_out):
        return namespace.l0_linear(x, w, b, in_log_alpha=a_in, out_log_alpha=a_out, seed=SEED)

    def support(namespace, x, w, b, a_out):
        g = namespace.sample_gates(a_out, seed=SEED)
        return namespace.gated_linear(x, w, b, out_support=g)

    def mlp(activation, namespace, x, w, b, w2, b2, a_in, a_out):
        gates = namespace.sample_gates([a_in, a_out], seed=SEED)
        if activation in GLU:
            w, b = torch.cat((w, w.flip(0))), torch.cat((b, -b))
        return namespace.gated_mlp(x, [w, w2], [b, b2], gates, activation)

    def masked(block, namespace, x, w, b, a):
        return namespace.masked_linear(x, w, b, a, block=block, seed=SEED)

    table = {
        "linear": linear,
        "support": support,
        "masked": partial(masked, None),
        "blocks": partial(masked, (16, 8)),
    }
    return table.get(name) or partial(mlp, name)


def low_case(name, dtype):
    shapes = {"x": (37, 53), "w": (41, 53), "b": (41,)}
    shapes |= {
        "linear": {"a_in": (53,), "a_out": (41,)},
        "support": {"a_out": (41,)},
        "masked": {"a": (41, 53)},
        "blocks": {"a": (3, 7)},
    }.get(name, {"w2": (19, 41), "b2": (19,), "a_in": (53,), "a_out": (41,)})
    scale = {"w": 53**-0.5, "w2": 41**-0.5}
    return {
        n: torch.randn(s) if n.startswith("a") else (torch.randn(s) * scale.get(n, 1)).to(dtype)
        for n, s in shapes.items()
    }


class TestLowPrecision:
    NAMES = ("linear", "support", *ROWS, "masked", "blocks")

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("name", NAMES)
    def test_sixteen_bit_layers(self, backend, poison, name, dtype):
        y, grads = compare(low_call(name), low_case(name, dtype), dtype=dtype)
        assert y.dtype == dtype
        for leaf, grad in grads.items():
            assert grad is None or grad.dtype == (torch.float32 if leaf.startswith("a") else dtype)

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("name", NAMES)
    def test_autocast(self, backend, poison, name, dtype):
        y, grads = compare(low_call(name), low_case(name, torch.float32), dtype=dtype, autocast=dtype)
        assert y.dtype == dtype
        assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())

    @pytest.mark.parametrize("dtype", LOW)
    def test_mixed_dtypes_under_autocast(self, backend, poison, dtype):
        tensors = low_case("linear", torch.float32)
        tensors["x"] = tensors["x"].to(dtype)  # as it leaves the layer before
        y, grads = compare(low_call("linear"), tensors, dtype=dtype, autocast=dtype)
        assert y.dtype == dtype
        assert grads["x"].dtype == dtype
        assert grads["w"].dtype == torch.float32

    @pytest.mark.parametrize("dtype", LOW)
    def test_zero_set_of_gate_gradients(self, backend, dtype):
        for autocast in (None, dtype):
            tensors = low_case("linear", dtype if autocast is None else torch.float32)
            drawn = reference.sample_gates([tensors["a_in"], tensors["a_out"]], seed=SEED)
            _, grads = compare(low_call("linear"), tensors, dtype=dtype, autocast=autocast)
            for name, g in zip(("a_in", "a_out"), drawn, strict=True):
                assert torch.equal(grads[name] != 0, wanted(g.z, False))

    def test_autocast_leaves_float64_alone(self, backend):
        tensors = {n: t.double() for n, t in low_case("linear", torch.float32).items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = low_call("linear")(l0, **tensors)
        assert torch.equal(y, low_call("linear")(l0, **tensors))

    @pytest.mark.parametrize("dtype", LOW)
    def test_all_closed_and_no_gates(self, backend, poison, dtype):
        x, w, b = (torch.randn(s).to(dtype) for s in ((5, 40), (33, 40), (33,)))
        closed = Gates.from_z(torch.zeros(40))
        assert torch.equal(l0.gated_linear(x, w, b, in_gates=closed), b.expand(5, 33))
        assert not l0.gated_linear(x, w, b, out_gates=Gates.from_z(torch.zeros(33))).any()
        torch.testing.assert_close(l0.gated_linear(x, w, b), torch.nn.functional.linear(x, w, b))
        assert l0.gated_linear(x[:0], w, b, in_gates=closed).shape == (0, 33)
