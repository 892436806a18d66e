"""The CUDA kernels of penalties, against formulas in float64; on the GPU or on the emulator."""

import copy

import pytest
import torch
from cuda_checks import DIST, EPS, FLOATS, WEIGHT_LAYOUTS, launches, near, on_device
from cuda_device import DEVICE, RUNS

import l0kernels as l0
from l0kernels import nn, reference
from l0kernels.impl import cuda
from op_checks import compare, sliced

if not RUNS:
    pytest.skip("no GPU; test_emulated.py runs these on the CPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")


class TestPenalty:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sizes", [[1], [784, 300, 100], [0, 3], [5000, 1], [7] * 50], ids=str)
    def test_l0(self, sizes, dtype):
        a = [torch.randn(n, dtype=dtype) for n in sizes]
        weights = [float(i + 1) for i in range(len(sizes))]
        total, grad = cuda.l0_penalty([on_device(t) for t in a], weights, DIST)
        p = [DIST.p_open(t.double()) for t in a]
        want = sum(w * q.sum() for w, q in zip(weights, p, strict=True))
        near(total, want, 8 * EPS[dtype], 0.0)
        exact = torch.cat([w * q * (1 - q) for w, q in zip(weights, p, strict=True)])
        near(grad, exact, 8 * EPS[dtype], max(weights))

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(1, 1), (70, 300), (129, 1100)])
    @pytest.mark.parametrize("sides", ["both", "out", "in"])
    def test_coupled(self, shape, sides, dtype):
        """Two weights under the same gates, the second one's bias, and gates without a weight."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        layout = sliced if shape == (70, 300) and sides == "out" else torch.clone
        thetas = [torch.randn(s, dtype=dtype) for s in (shape, shape, shape[:1])]
        gates = [torch.randn(n, dtype=wide) for n in (*shape, 7)]
        out, in_ = (-1 if sides == "in" else 0), (-1 if sides == "out" else 1)
        numbers, weights = [(out, in_), (out, in_), (out, -1)], [2.0, 0.0, 1.0]
        terms = [
            (layout(on_device(t)) if t.ndim == 2 else on_device(t), *n, 1)
            for t, n in zip(thetas, numbers, strict=True)
        ]
        places = [on_device(a) for a in gates]
        before = launches()
        total, grad = cuda.coupled_penalty(terms, places, weights, 0.3, DIST)
        assert launches() - before in (0, 1)
        factor = on_device(torch.tensor(3.0, dtype=wide))
        grads = cuda.coupled_penalty_grad(terms, places, factor, 0.3, DIST)
        assert launches() - before in (0, 2)

        leaves = [t.double().requires_grad_() for t in (*thetas, *gates)]
        exact = [w * reference.l0_penalty(a) for a, w in zip(leaves[3:], weights, strict=True)]
        for theta, (o, i) in zip(leaves[:3], numbers, strict=True):
            given = {"out_log_alpha": None if o < 0 else leaves[3 + o]}
            given |= {"in_log_alpha": None if i < 0 else leaves[3 + i]}
            exact.append(reference.l2_penalty(theta[:, None] if theta.ndim == 1 else theta, 0.3, **given))
        want = torch.stack(exact).sum()
        wanted = torch.autograd.grad(want, leaves)
        eps = max(EPS[wide], EPS[dtype] / 4)
        near(total, want.detach(), 32 * eps, 0.0)
        near(grad, torch.cat(wanted[3:]), 64 * EPS[wide], 2.0)
        for got, exact_grad, theta in zip(grads, wanted, thetas, strict=False):
            assert got.dtype == theta.dtype
            near(got, 3 * exact_grad, 4 * EPS[dtype], 0.9)
        assert all((words == 0).all() for words in cuda._tickets.of_stream.values())

    def test_more_than_a_launch_holds(self):
        """Weights of two dtypes."""
        gates = [torch.randn(5) for _ in range(60)]
        thetas = [torch.randn(5, 3).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(40)]
        terms = [(on_device(theta), i, -1, 1) for i, theta in enumerate(thetas)]
        places = [on_device(a) for a in gates]
        before = launches()
        total, grad = cuda.coupled_penalty(terms, places, [1.0] * 60, 0.3, DIST)
        grads = cuda.coupled_penalty_grad(terms, places, on_device(torch.tensor(2.0)), 0.3, DIST)
        assert launches() - before in (0, 3 + 3)
        leaves = [t.double().requires_grad_() for t in (*gates, *thetas)]
        want = reference.l0_penalty(leaves[:60])
        for theta, a in zip(leaves[60:], leaves, strict=False):
            want = want + reference.l2_penalty(theta, 0.3, out_log_alpha=a)
        wanted = torch.autograd.grad(want, leaves)
        near(total, want.detach(), 1e-5, 0.0)
        near(grad, torch.cat(wanted[:60]), 1e-5, 1.0)
        for got, exact, theta in zip(grads, wanted[60:], thetas, strict=True):
            assert got.dtype == theta.dtype
            near(got, 2 * exact, 4 * EPS[theta.dtype], 1.0)


class TestL2OfWeights:
    """One term: any rank, layout and number of groups."""

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
    @pytest.mark.parametrize(
        ("shape", "groups", "layout"),
        [
            ((70, 37), 1, "contiguous"),
            ((150, 40, 3, 3), 1, "contiguous"),
            ((150, 40, 3, 3), 1, "channels last"),
            ((20, 16, 1, 1), 1, "contiguous"),
            ((12, 130, 5), 1, "strided"),
            ((12, 5, 3, 3), 3, "contiguous"),
            ((6, 1, 3, 3), 6, "contiguous"),
            ((0, 4), 1, "contiguous"),
        ],
        ids=str,
    )
    def test_equals_reference(self, shape, groups, layout, sides):
        dtypes = (torch.float32, torch.bfloat16) if sides == (True, True) else (torch.float64,)
        for dtype in dtypes:
            gates = torch.float64 if dtype == torch.float64 else torch.float32
            weight = torch.randn(shape).to(dtype)
            out = torch.randn(shape[0], dtype=gates) if sides[0] else None
            in_ = torch.randn(shape[1] * groups, dtype=gates) if sides[1] else None
            leaves = [t if t is None else t.double().requires_grad_() for t in (weight, out, in_)]
            exact = reference.l2_penalty(
                leaves[0], 0.3, out_log_alpha=leaves[1], in_log_alpha=leaves[2], groups=groups
            )
            used = [t for t in leaves if t is not None]
            wanted = iter(torch.autograd.grad(exact * 3, used))
            given = [on_device(a) for a in (out, in_) if a is not None]
            numbers = (-1 if out is None else 0, -1 if in_ is None else len(given) - 1)
            terms = [(WEIGHT_LAYOUTS[layout](on_device(weight)), *numbers, groups)]
            total, grad = cuda.coupled_penalty(terms, given, [0.0] * len(given), 0.3, DIST)
            parts = iter(grad.split([len(a) for a in given]))
            factor = on_device(torch.tensor(3.0, dtype=gates))
            got = cuda.coupled_penalty_grad(terms, given, factor, 0.3, DIST)
            got += [None if a is None else next(parts) for a in (out, in_)]
            near(total, exact.detach(), 64 * EPS[gates], 0.0)
            assert got[0].dtype == dtype
            scale = max(1.0, exact.item())
            for i, (g, leaf) in enumerate(zip(got, leaves, strict=True)):
                assert (g is None) == (leaf is None)
                if g is not None:
                    near(g * (3 if i else 1), next(wanted), 64 * EPS[gates] if i else 4 * EPS[dtype], scale)
            assert all((words == 0).all() for words in cuda._tickets.of_stream.values())


@pytest.mark.usefixtures("public")
class TestPublicPenalty:
    """l2_penalty and nn.penalty as a model calls them, through autograd."""

    @pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
    @pytest.mark.parametrize(
        ("shape", "groups", "layout"),
        [
            ((70, 37), 1, "transposed"),
            ((70, 1), 1, "contiguous"),  # a bias is a column
            ((20, 16, 3, 3), 1, "channels last"),
            ((12, 5, 3, 2), 3, "contiguous"),
            ((6, 1, 3, 3), 6, "contiguous"),
        ],
        ids=str,
    )
    def test_l2(self, shape, groups, layout, sides):
        for dtype in (torch.float32, torch.bfloat16) if all(sides) else (torch.float64,):
            gates = torch.float64 if dtype == torch.float64 else torch.float32
            tensors = {
                "weight": WEIGHT_LAYOUTS[layout](on_device(torch.randn(shape).to(dtype))),
                "in_log_alpha": on_device(torch.randn(shape[1] * groups, dtype=gates)) if sides[0] else None,
                "out_log_alpha": on_device(torch.randn(shape[0], dtype=gates)) if sides[1] else None,
            }

            def call(namespace, weight, groups=groups, **kwargs):
                return namespace.l2_penalty(weight, 0.3, groups=groups, **kwargs)

            before = launches()
            y, grads = compare(call, tensors, dtype=dtype)
            # One pass for the value and the gates, one for the weight; no formula in their place.
            assert launches() - before in (0, 2)
            assert y.dtype == gates
            compare(call, tensors, dtype=dtype, needs=[name for name in grads if name != "weight"])

    def test_gates_of_the_other_precision(self):
        """The formula's: the kernels take all in one precision."""
        leaves = [on_device(t).requires_grad_() for t in (torch.randn(7, 5), torch.randn(5).double())]
        before = launches()
        l0.l2_penalty(leaves[0], 0.3, in_log_alpha=leaves[1]).backward()
        assert launches() == before
        exact = [t.detach().double().requires_grad_() for t in leaves]
        reference.l2_penalty(exact[0], 0.3, in_log_alpha=exact[1]).backward()
        for got, want in zip(leaves, exact, strict=True):
            near(got.grad, want.grad, 1e-6, 1.0)

    def test_of_a_model(self):
        shared = nn.L0Conv2d(3, 6, 3, gate="out").out_gate
        model = nn.L0Sequential(
            nn.L0Conv2d(3, 6, 3, gate="out"),
            nn.L0Conv2d(6, 6, 3, groups=3, gate="both", in_gate=shared, out_gate=shared),
            nn.L0Conv2d(6, 8, 3, groups=2, gate="both"),
            nn.L0Linear(8, 13, gate="both"),
            nn.L0Linear(13, 13, gate="in", bias=False),
            nn.L0FeedForward(13, 20),
        ).to(DEVICE)
        for gate in nn.gate_modules(model):
            torch.nn.init.normal_(gate.log_alpha, std=2.0)
        double = copy.deepcopy(model).double()
        before = launches()
        total = nn.penalty(model, weight_decay=0.3)
        # For all gates, 7 weights, two of them in groups, and 5 biases whose rows are gated.
        assert launches() - before in (0, 1)
        total.backward()
        assert launches() - before in (0, 2)
        with l0.use_backend("reference"):
            exact = nn.penalty(double, weight_decay=0.3)
            exact.backward()
        near(total.detach(), exact.detach(), 1e-6, 0.0)
        for (name, got), want in zip(model.named_parameters(), double.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None), name
            if want.grad is not None:
                near(got.grad, want.grad, 1e-5, want.grad.abs().max().item())
