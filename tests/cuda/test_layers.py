"""The CUDA kernels of small layers and chains against formulas in float64; on the GPU or on the emulator."""

import itertools

import pytest
import torch
from cuda_checks import DIST, EPS, FLOATS, gate_of, launches, near, on_device
from cuda_device import DEVICE, RUNS

import l0kernels as l0
from l0kernels import reference
from l0kernels._calls import DrawnMlpCall, L0LinearCall, L0MlpCall, LinearCall, MlpCall, Wanted
from l0kernels._gates import round_up
from l0kernels.gates import split
from l0kernels.impl import cuda
from op_checks import SEED, check_large_activations, make_z, sliced, transposed

if not RUNS:
    pytest.skip("no GPU; test_emulated.py runs these on the CPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.usefixtures("public")
def test_the_public_chain_draws_on_the_way():
    """A launch a layer, none for the gates, and the gradients of every log_alpha."""
    sizes, seed = (37, 50, 20, 5), torch.tensor([3])
    x = torch.randn(9, sizes[0])
    weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]
    log_alphas = [torch.randn(37), None, torch.randn(20)]
    leaves = [t for t in (x, *weights, *log_alphas) if t is not None]
    results = []
    for namespace, dtype, place in ((l0, torch.float32, on_device), (reference, torch.float64, torch.clone)):
        made = [place(t.to(dtype)).requires_grad_() for t in leaves]
        gates = [made[4], None, made[5]]
        # The noise of the reference is that of float32.
        before = launches()
        y = namespace.l0_mlp(made[0], made[1:4], [None] * 3, gates, "relu", seed=place(seed))
        assert launches() - before in (0, 3)
        results.append([y, *torch.autograd.grad(y.square().sum(), made)])
    for got, want in zip(*results, strict=True):
        near(got.detach(), want.detach(), 1e-4, want.abs().amax().item())


class TestNothing:
    """No rows, no inputs or no outputs: gates are drawn all the same, and every gradient is written."""

    @pytest.mark.parametrize("size", [(0, 20, 30), (5, 0, 30), (5, 20, 0), (0, 0, 3), (0, 3, 0), (3, 0, 0)])
    def test_layer(self, size, public):
        M, K, N = size
        x, w, b = (on_device(torch.randn(*s)) for s in ((M, K), (N, K), (N,)))
        alphas = [on_device(torch.randn(n)) for n in (K, N)]
        call = L0LinearCall(x, w, b, *alphas, on_device(SEED), DIST, torch.float32)
        drawn = cuda.l0_linear_forward(call)
        apart = cuda.sample(alphas, on_device(SEED), 0, DIST)
        assert all(torch.equal(a, b) for a, b in zip(drawn[1:], apart, strict=True))
        leaves = [t.requires_grad_() for t in (x, w, b, *alphas)]
        y = l0.l0_linear(x, w, b, in_log_alpha=alphas[0], out_log_alpha=alphas[1], seed=on_device(SEED))
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        with l0.use_backend("reference"):
            z = reference.l0_linear(
                x, w, b, in_log_alpha=alphas[0], out_log_alpha=alphas[1], seed=on_device(SEED)
            )
        exact = torch.autograd.grad(z, leaves, torch.ones_like(z), allow_unused=True)
        torch.testing.assert_close(y, z)
        for got, want in zip(grads, exact, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)

    @pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (6, 0, 4, 3), (6, 5, 0, 3), (6, 5, 4, 0)])
    def test_chain(self, sizes, public):
        M, *widths = sizes
        x = on_device(torch.randn(M, widths[0])).requires_grad_()
        weights = [on_device(torch.randn(m, n)).requires_grad_() for n, m in itertools.pairwise(widths)]
        biases = [on_device(torch.randn(n)).requires_grad_() for n in widths[1:]]
        alphas = [on_device(torch.randn(n)).requires_grad_() for n in widths[:-1]]
        leaves, results = [x, *weights, *biases, *alphas], []
        for backend in ("cuda", "reference"):
            with l0.use_backend(backend):
                y = l0.l0_mlp(x, weights, biases, alphas, "gelu", seed=on_device(SEED))
                grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
                results.append([y, *grads])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)

    def test_penalty_of_an_empty_kernel(self, public):
        a = on_device(torch.zeros(3)).requires_grad_()
        weight = on_device(torch.zeros(3, 3, 0, 2)).requires_grad_()
        total = l0.l2_penalty(weight, in_log_alpha=a, out_log_alpha=a)
        assert total.item() == 0
        assert all(not g.any() for g in torch.autograd.grad(total, [weight, a]))


def bound(exact, dtype, depth):
    """Absolute error of sums of ``depth`` products of terms of order one that were rounded to ``dtype``."""
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return 4 * EPS[dtype] * max(1.0, exact.abs().max().item()) + depth * EPS[gates]


def close(got, exact, dtype, depth):
    exact = exact.detach()
    assert got.shape == exact.shape
    if exact.numel():
        assert (got.double().cpu() - exact).abs().max().item() <= bound(exact, dtype, depth)


def as_gates(gate, full):
    """The reference's gates of a [z, index, count], with z in float64 as a leaf."""
    if gate is None:
        return None
    z, index, count = (t.cpu() for t in gate)
    return reference.Gates(z.double().requires_grad_(), index, count, full)


class TestSmallLinear:
    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(
        ("size", "kinds"),
        [
            ((1, 1, 1), ("open", None)),
            ((7, 37, 19), ("mixed", "mixed")),
            ((33, 150, 40), ("mixed", None)),
            ((20, 40, 70), (None, "few")),
            ((5, 64, 48), (None, None)),
            ((18, 30, 33), ("closed", "mixed")),
            ((18, 30, 33), ("few", "closed")),
            ((0, 20, 30), ("mixed", "mixed")),
            ((3, 700, 17), ("few", "open")),
        ],
        ids=str,
    )
    def test_forward_and_backward(self, size, kinds, dtype):
        m, n_in, n_out = size
        z_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        layouts = itertools.cycle([torch.clone, transposed, sliced])
        for scale_out, full, with_bias in [(True, False, True), (True, True, True), (False, False, False)]:
            kind = {"mixed": "wild"} if full else {}
            in_gate, out_gate = (
                None if k is None else gate_of(make_z(kind.get(k, k), n, z_dtype))
                for k, n in zip(kinds, (n_in, n_out), strict=True)
            )
            x, w = torch.randn(m, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
            b = torch.randn(n_out, dtype=dtype) if with_bias else None
            dy = torch.randn(m, n_out, dtype=dtype)
            layout = next(layouts)
            call = LinearCall(
                layout(on_device(x)),
                layout(on_device(w)),
                None if b is None else on_device(b),
                in_gate,
                out_gate,
                scale_out,
                dtype,
            )
            y, saved = cuda.linear_forward(call)
            assert saved == []

            leaves = {"x": x, "w": w, "b": b}
            leaves = {k: None if t is None else t.double().requires_grad_() for k, t in leaves.items()}
            gates = [as_gates(g, full) for g in (in_gate, out_gate)]
            exact = reference.gated_linear(
                leaves["x"], leaves["w"], leaves["b"], in_gates=gates[0],
                **{"out_gates" if scale_out else "out_support": gates[1]},
            )  # fmt: skip
            close(y, exact, dtype, n_in)
            if out_gate is not None:
                assert (y[:, out_gate[0] == 0] == 0).all()

            can = [True, True, with_bias, in_gate is not None, out_gate is not None and scale_out]
            for needs in (
                can,
                [False, False, *can[2:]],
                [True, False, False, False, False],
                [False, True] + [False] * 3,
            ):
                before = launches()
                asked = Wanted([full, full], needs, None)
                got = cuda.linear_backward(call, layout(on_device(dy)), saved, asked)
                assert launches() - before in (0, 1)
                inputs = [leaves["x"], leaves["w"], leaves["b"], *(None if g is None else g.z for g in gates)]
                wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
                grads = iter(
                    torch.autograd.grad(exact, wanted, dy.double(), retain_graph=True) if wanted else []
                )
                for i, (g, need) in enumerate(zip(got, needs, strict=True)):
                    assert (g is not None) == need
                    if g is None:
                        continue
                    want = next(grads)
                    if i > 2:
                        z = (in_gate if i == 3 else out_gate)[0].cpu()
                        seen = z != 0 if full else (z > 0) & (z < 1)
                        want = torch.where(seen, want, 0.0)
                        assert (g.cpu()[~seen] == 0).all()
                    close(g, want, dtype, (m + 1) * 4 * max(n_in, n_out) if i > 2 else m + n_out)

    @pytest.mark.parametrize("sides", ["in", "out", "both"])
    def test_drawing_is_sampling(self, sides):
        m, n_in, n_out = 20, 300, 150
        x, w, b = (on_device(torch.randn(s)) for s in ((m, n_in), (n_out, n_in), (n_out,)))
        a_in = on_device(torch.randn(n_in)) if sides != "out" else None
        a_out = on_device(torch.randn(n_out)) if sides != "in" else None
        seed = on_device(torch.tensor([77]))
        given = [a for a in (a_in, a_out) if a is not None]
        z, index, count = cuda.sample(given, seed, 3, DIST)
        call = L0LinearCall(x, w, b, a_in, a_out, seed, DIST, torch.float32)
        y, *drawn = cuda.l0_linear_forward(call, 3)
        for got, whole in zip(drawn, (z, index, count), strict=True):
            assert torch.equal(got, whole)
        gates = iter([list(gate[:3]) for gate in split(given, *drawn)])
        sides = [None if a is None else next(gates) for a in (a_in, a_out)]
        given = LinearCall(x, w, b, *sides, True, torch.float32)
        assert torch.equal(y, cuda.linear_forward(given)[0])

    def test_to_log_alpha_is_gate_grad(self):
        m, n_in, n_out = 20, 100, 50
        x, w, b, dy = (on_device(torch.randn(s)) for s in ((m, n_in), (n_out, n_in), (n_out,), (m, n_out)))
        gates = [gate_of(make_z("mixed", n)) for n in (n_in, n_out)]
        call = LinearCall(x, w, b, *gates, True, torch.float32)
        dz, da = (
            cuda.linear_backward(call, dy, [], Wanted([False] * 2, [False] * 3 + [True] * 2, dist))[3:]
            for dist in (None, DIST)
        )
        for g, gate, got in zip(dz, gates, da, strict=True):
            near(got, cuda.gate_grad(g, gate[0], DIST), 4 * EPS[torch.float32], 1e-3)

    def test_more_units_than_the_kernel_holds(self):
        x, w = on_device(torch.randn(2, 4097)), on_device(torch.randn(3, 4097))
        with pytest.raises(RuntimeError, match=r"up to 4096 units, got 4097.*triton"):
            cuda.linear_forward(LinearCall(x, w, None, None, None, True, torch.float32))


class TestSmallMlp:
    @pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
    def test_large_arguments(self, activation, public):
        check_large_activations(activation, DEVICE)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
    @pytest.mark.parametrize(
        "kinds", [("mixed", "mixed", "few"), (None, "open", "closed"), ("few", None, "mixed")], ids=str
    )
    def test_forward_and_backward(self, kinds, activation, dtype):
        m, sizes = 19, (40, 70, 35, 10)
        z_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(m, sizes[0], dtype=dtype)
        weights = [torch.randn(b, a).div(a**0.5).to(dtype) for a, b in itertools.pairwise(sizes)]
        biases = [torch.randn(sizes[1], dtype=dtype), None, torch.randn(sizes[3], dtype=dtype)]
        gates = [
            None if k is None else gate_of(make_z(k, n, z_dtype))
            for k, n in zip(kinds, sizes[:-1], strict=True)
        ]
        full = [False, True, False]
        call = MlpCall(
            on_device(x),
            [on_device(w) for w in weights],
            [None if b is None else on_device(b) for b in biases],
            gates,
            activation,
            dtype,
            False,
        )
        before = launches()
        y, saved = cuda.mlp_forward(call)
        assert launches() - before in (0, 3)

        leaf = [x, *weights, *biases]
        leaf = [None if t is None else t.double().requires_grad_() for t in leaf]
        given = [as_gates(g, f) for g, f in zip(gates, full, strict=True)]
        exact = reference.gated_mlp(leaf[0], leaf[1:4], leaf[4:], given, activation)
        close(y, exact, dtype, 70)
        dy = torch.randn(m, sizes[3], dtype=dtype)
        inputs = [*leaf, *(None if g is None else g.z for g in given)]
        everything = [t is not None for t in inputs]
        for needs in (
            everything,
            [False, *everything[1:]],
            [i in (3, 9) and n for i, n in enumerate(everything)],
        ):
            before = launches()
            got = cuda.mlp_backward(call, on_device(dy), saved, Wanted(full, needs, None))
            assert launches() - before in (0, 1, 3)
            wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
            grads = iter(torch.autograd.grad(exact, wanted, dy.double(), retain_graph=True))
            for i, (g, need) in enumerate(zip(got, needs, strict=True)):
                assert (g is not None) == need
                if g is None:
                    continue
                want = next(grads)
                if i > 6:
                    z = gates[i - 7][0].cpu()
                    seen = z != 0 if full[i - 7] else (z > 0) & (z < 1)
                    want = torch.where(seen, want, 0.0)
                    assert (g.cpu()[~seen] == 0).all()
                close(g, want, dtype, 16 * m * 70)

    def test_drawing_is_sampling(self):
        sizes = (40, 70, 35, 10)
        x = on_device(torch.randn(19, 40))
        weights = [on_device(torch.randn(b, a)) for a, b in itertools.pairwise(sizes)]
        log_alphas = [on_device(torch.randn(40)), None, on_device(torch.randn(35))]
        seed = on_device(torch.tensor([78]))
        z, index, count = cuda.sample([log_alphas[0], log_alphas[2]], seed, 1, DIST)
        biases = [None] * 3
        call = L0MlpCall(x, weights, biases, log_alphas, "relu", seed, DIST, torch.float32)
        y, saved, drawn = cuda.l0_mlp_forward(call, 1)
        for got, whole in zip(drawn, (z, index, count), strict=True):
            assert torch.equal(got, whole)
        first, last = (list(gate[:3]) for gate in split([log_alphas[0], log_alphas[2]], *drawn))
        given = MlpCall(x, weights, biases, [first, None, last], "relu", torch.float32, False)
        assert torch.equal(y, cuda.mlp_forward(given)[0])
        dy = on_device(torch.randn(19, 10))
        wanted = Wanted([False] * 3, [True, *[True] * 3, *[False] * 3, True, False, True], DIST)
        call = DrawnMlpCall(x, weights, biases, [True, False, True], *drawn, "relu", torch.float32)
        grads = cuda.l0_mlp_backward(call, dy, saved, wanted)
        known = cuda.mlp_backward(given, dy, saved, wanted)
        for got, want in zip(grads, known, strict=True):
            assert (got is None and want is None) or torch.equal(got, want)

    def test_mixed_dtypes_are_cast(self):
        """Under autocast the parameters are float32 and the product is not; gradients have their types."""
        x, w = on_device(torch.randn(9, 20)), [on_device(torch.randn(30, 20)), on_device(torch.randn(5, 30))]
        gates = [gate_of(make_z("mixed", 20)), gate_of(make_z("mixed", 30))]
        half = torch.bfloat16
        call = MlpCall(x, w, [None, None], gates, "relu", half, False)
        y, saved = cuda.mlp_forward(call)
        assert y.dtype == saved[0].dtype == half
        needs = [True, True, True, False, False, True, True]
        grads = cuda.mlp_backward(call, torch.randn_like(y), saved, Wanted([False] * 2, needs, None))
        assert all(g.dtype == torch.float32 for g, n in zip(grads, needs, strict=True) if n)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are the GPU's")
class TestGraph:
    def test_replays_equal_eager_calls(self):
        """Captured launches have tickets of their own: eager ones between replays do not disturb them."""
        a = [torch.randn(n, device="cuda") for n in (784, 300, 100)]
        sizes = (784, 300, 100, 10)
        x, dy = torch.randn(100, 784, device="cuda"), torch.randn(100, 10, device="cuda")
        weights = [torch.randn(n, m, device="cuda") / m**0.5 for m, n in itertools.pairwise(sizes)]
        seed = torch.tensor([3], device="cuda")
        needs = [True] + [True] * 3 + [False] * 3 + [True] * 3

        def step():
            z, index, count = cuda.sample(a, seed, 0, DIST)
            n = [t.shape[0] for t in a]
            parts = z.split(n), index.split([round_up(k) for k in n]), count.view(-1, 2).unbind()
            gates = [list(part) for part in zip(*parts, strict=True)]
            call = MlpCall(x, weights, [None] * 3, gates, "relu", torch.float32, False)
            y, saved = cuda.mlp_forward(call)
            grads = cuda.mlp_backward(call, dy, saved, Wanted([False] * 3, needs, DIST))
            total, grad = cuda.l0_penalty(a, [1.0] * 3, DIST)
            return [y, total, grad, *(g for g in grads if g is not None)]

        step()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            captured = step()
        for value in (3, 4, 5):
            seed.fill_(value)
            eager = [t.clone() for t in step()]
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                graph.replay()
            step()
            torch.cuda.synchronize()
            for got, want in zip(captured, eager, strict=True):
                assert torch.equal(got, want)
