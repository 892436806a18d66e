"""sample_gates, eval_gates and Gates on every backend: the same noise, exact orders, the closed form."""

import copy
import math

import pytest
import torch

import l0kernels as l0
from l0kernels import Gates, HardConcrete, reference
from l0kernels.gates import ALIGN
from op_checks import SEED, assert_near, compare, make_z, strided, wanted

pytestmark = pytest.mark.usefixtures("poison")

DISTS = [HardConcrete(), HardConcrete(0.5, -0.3, 1.2)]


def assert_order(gates):
    """index: open ascending, closed ascending, zeros; count: open, and open rounded up to ALIGN."""
    z, index, count = gates.z.detach(), gates.index, gates.count
    closed = z == 0
    padding = torch.zeros(-len(z) % ALIGN, dtype=torch.int64)
    expected = torch.cat([(~closed).nonzero()[:, 0], closed.nonzero()[:, 0], padding])
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(index.long(), expected)
    n_open = int((~closed).sum())
    assert count.tolist() == [n_open, -(-n_open // ALIGN) * ALIGN]


def assert_same_gates(got, log_alpha, exact, eager):
    """Gates ``got`` are those of the formula: z near, closed, full and fractional ones the same."""
    assert got.z.dtype == log_alpha.dtype
    assert got.full_grad is False
    assert_near(got.z.detach(), eager.z.detach(), exact.z.detach(), log_alpha.dtype, "z")
    assert torch.equal(got.z == 0, exact.z == 0)
    assert torch.equal(got.z == 1, exact.z == 1)
    assert_order(got)


class TestSampling:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("dist", DISTS)
    def test_every_length_equals_the_formula(self, backend, dist, dtype):
        lengths = [*range(301), 383, 509, 512, 1023, 1024, 1025, 2047, 2053, 4096, 4999, 5000]
        log_alphas = [torch.randn(n, dtype=dtype) * 3 for n in lengths]
        drawn = l0.sample_gates(log_alphas, seed=SEED, dist=dist)
        eager = reference.sample_gates(log_alphas, seed=SEED, dist=dist)
        exact = reference.sample_gates([a.double() for a in log_alphas], seed=SEED, dist=dist)
        for parts in zip(drawn, log_alphas, exact, eager, strict=True):
            if len(parts[1]):
                assert_same_gates(*parts)
            else:
                assert_order(parts[0])

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
    @pytest.mark.parametrize("rank", [0, 1, 2**32 - 1])
    def test_seed_and_rank(self, backend, seed, rank):
        seed = torch.tensor([seed])
        log_alphas = [torch.randn(133), torch.randn(70)]
        drawn = l0.sample_gates(log_alphas, seed=seed, rank=rank)
        eager = reference.sample_gates(log_alphas, seed=seed, rank=rank)
        exact = reference.sample_gates([a.double() for a in log_alphas], seed=seed, rank=rank)
        for parts in zip(drawn, log_alphas, exact, eager, strict=True):
            assert_same_gates(*parts)

    def test_noise_is_bit_equal(self, backend):
        """u, recovered from fractional z in float64, lies on its grid of 2^-23 where the generator put it."""
        log_alpha = torch.randn(4000, dtype=torch.float64)
        z = l0.sample_gates(log_alpha, seed=SEED).z
        dist = HardConcrete()
        fractional = (z > 0) & (z < 1)
        s = (z - dist.gamma) / (dist.zeta - dist.gamma)
        u = torch.sigmoid(dist.beta * torch.logit(s) - log_alpha)
        expected = reference.uniform(SEED, torch.arange(4000)).double()
        assert (u - expected)[fractional].abs().max() < 2.0**-40
        assert fractional.sum() > 1000

    def test_many_gates_on_one_and_two_threads(self, backend, threads):
        log_alpha = torch.randn(200_003)
        one = l0.sample_gates(log_alpha, seed=SEED)
        threads(2)
        two = l0.sample_gates(log_alpha, seed=SEED)
        if backend == "cpp":  # torch's own logarithm depends on how threads share a vector
            assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
        assert_order(one)
        assert_order(two)
        z = reference.sample_gates(log_alpha, seed=SEED).z
        for gates in (one, two):
            assert (gates.z - z).abs().max() < 2e-6  # a gate this near the clip may fall on either side of it
            assert ((gates.z == 0) != (z == 0)).sum() < 10
            assert ((gates.z == 1) != (z == 1)).sum() < 10

    def test_streams(self, backend):
        log_alpha = torch.zeros(2000)
        alone = l0.sample_gates(log_alpha, seed=SEED)
        first, second = l0.sample_gates([log_alpha, log_alpha], seed=SEED)
        assert torch.equal(first.z, alone.z)
        assert (second.z != alone.z).float().mean() > 0.5  # another stream
        other = l0.sample_gates(log_alpha, seed=SEED, rank=1)
        assert (other.z != alone.z).float().mean() > 0.5
        prefix = l0.sample_gates(log_alpha[:700], seed=SEED)
        assert torch.equal(prefix.z, alone.z[:700])  # noise goes by index, not by length

    def test_lists_and_tuples(self, backend):
        a, b = torch.randn(10), torch.randn(200)
        assert l0.sample_gates([], seed=SEED) == []
        (single,) = l0.sample_gates([a], seed=SEED)
        assert torch.equal(single.z, l0.sample_gates(a, seed=SEED).z)
        pairs = zip(l0.sample_gates((a, b), seed=SEED), l0.sample_gates([a, b], seed=SEED), strict=True)
        assert all(torch.equal(left.z, right.z) for left, right in pairs)

    def test_same_seed_same_result_and_inputs_untouched(self, backend):
        log_alpha, seed = torch.randn(500), SEED.clone()
        before = log_alpha.clone()
        first, second = (l0.sample_gates(log_alpha, seed=seed) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
        assert torch.equal(log_alpha, before)
        assert torch.equal(seed, SEED)

    def test_a_missing_seed(self, backend):
        log_alpha = torch.zeros(500)
        torch.manual_seed(3)
        first, second = l0.sample_gates(log_alpha), l0.sample_gates(log_alpha)
        torch.manual_seed(3)
        assert torch.equal(l0.sample_gates(log_alpha).z, first.z)
        assert not torch.equal(first.z, second.z)
        torch.manual_seed(3)
        assert torch.equal(reference.sample_gates(log_alpha).z == 0, first.z == 0)  # the same seed is drawn
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(l0.sample_gates(log_alpha, generator=generator).z, first.z)
        assert torch.equal(torch.get_rng_state(), state)

    def test_strided_and_expanded_log_alpha(self, backend):
        log_alpha = torch.randn(300)
        expected = l0.sample_gates(log_alpha, seed=SEED).z
        assert torch.equal(l0.sample_gates(strided(log_alpha), seed=SEED).z, expected)
        assert torch.equal(
            l0.sample_gates(torch.randn(1).expand(1), seed=SEED).index, torch.zeros(128, dtype=torch.int32)
        )
        expanded = torch.tensor([0.3]).expand(300)
        assert torch.equal(
            l0.sample_gates(expanded, seed=SEED).z, l0.sample_gates(expanded.clone(), seed=SEED).z
        )

    def test_extreme_log_alpha(self, backend):
        log_alpha = torch.tensor([-1e30, -200.0, -30.0, 30.0, 200.0, 1e30, -float("inf"), float("inf")])
        z = l0.sample_gates(log_alpha, seed=SEED).z
        assert z.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_leaves_gates_alone(self, backend, dtype):
        log_alpha = torch.randn(300, requires_grad=True)
        expected = l0.sample_gates(log_alpha, seed=SEED).z
        with torch.autocast("cpu", dtype=dtype):
            z = l0.sample_gates(log_alpha, seed=SEED).z
        assert z.dtype == torch.float32
        assert torch.equal(z, expected)
        (grad,) = torch.autograd.grad(z.sum(), log_alpha)
        assert grad.dtype == torch.float32


class TestDistribution:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dist", DISTS)
    @pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 1.7, 4.0])
    def test_closed_form(self, backend, dist, log_alpha):
        n = 200_000
        values = torch.full((n,), log_alpha)
        z = l0.sample_gates(values, seed=SEED, dist=dist).z.double()
        p_zero = 1 - dist.p_open(values[:1].double()).item()
        p_one = dist.p_one(values[:1].double()).item()
        for observed, p in (((z == 0).sum().item(), p_zero), ((z == 1).sum().item(), p_one)):
            assert abs(observed - n * p) < 4.5 * math.sqrt(n * p * (1 - p))
        u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / dist.beta)
        exact = (s * (dist.zeta - dist.gamma) + dist.gamma).clamp(0, 1)
        assert abs(z.mean() - exact.mean()) < 4.5 * exact.std() / math.sqrt(n)
        assert abs(z.square().mean() - exact.square().mean()) < 4.5 * exact.square().std() / math.sqrt(n)

    def test_gates_and_streams_are_independent(self, backend):
        n = 100_000
        gates = l0.sample_gates([torch.zeros(n)] * 3, seed=SEED)
        a, b, c = (g.z - g.z.mean() for g in gates)
        pairs = [(a, b), (b, c), (a, c), (a[1:], a[:-1]), (a[1024:], a[:-1024])]
        for x, y in pairs:
            correlation = (x * y).mean() / (x.std() * y.std())
            assert abs(correlation) < 4.5 / math.sqrt(n)


class TestGradient:
    @pytest.mark.parametrize("dist", DISTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_formula_with_its_zero_set(self, backend, dist, dtype):
        for n in (1, 13, 128, 385, 3000):
            tensors = {"log_alpha": torch.randn(n, dtype=dtype) * 2}

            def call(namespace, log_alpha):
                return namespace.sample_gates(log_alpha, seed=SEED, dist=dist).z

            z, grads = compare(call, tensors, dtype=dtype, what=f"{n}")
            assert torch.equal(grads["log_alpha"] != 0, wanted(z, False))

    def test_formula_from_z_alone(self, backend):
        dist = HardConcrete()
        log_alpha = torch.randn(2000, dtype=torch.float64, requires_grad=True)
        z = l0.sample_gates(log_alpha, seed=SEED).z
        (grad,) = torch.autograd.grad(z.sum(), log_alpha)
        s = (z.detach() - dist.gamma) / (dist.zeta - dist.gamma)
        expected = (dist.zeta - dist.gamma) / dist.beta * s * (1 - s)
        torch.testing.assert_close(grad, expected.where(wanted(z, False), 0.0), rtol=1e-13, atol=0)

    def test_each_vector_of_a_list_has_its_own_node(self, backend):
        a, b, c = torch.randn(40, requires_grad=True), torch.randn(50), torch.randn(60, requires_grad=True)
        gates = l0.sample_gates([a, b, c], seed=SEED)
        assert [g.z.requires_grad for g in gates] == [True, False, True]
        grad_c = torch.autograd.grad(gates[2].z.sum(), c)[0]  # the others are not touched
        gates[0].z.sum().backward()
        assert torch.equal(a.grad != 0, wanted(gates[0].z, False))
        assert torch.equal(grad_c != 0, wanted(gates[2].z, False))
        assert b.grad is None

    def test_uses_add_up(self, backend):
        log_alpha = torch.randn(40, requires_grad=True)
        z = l0.sample_gates(log_alpha, seed=SEED).z
        (one,) = torch.autograd.grad(z.sum(), log_alpha, retain_graph=True)
        (three,) = torch.autograd.grad(z.sum() + 2 * z.sum(), log_alpha)
        torch.testing.assert_close(three, 3 * one)

    def test_gradient_in_any_layout(self, backend):
        log_alpha = torch.randn(40, requires_grad=True)
        z = l0.sample_gates(log_alpha, seed=SEED).z
        dz = torch.randn(40)
        results = [
            torch.autograd.grad(z, log_alpha, g, retain_graph=True)[0] for g in (dz, strided(dz), dz.clone())
        ]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        (ones,) = torch.autograd.grad(z, log_alpha, torch.ones(1).expand(40), retain_graph=True)
        assert torch.equal(ones, torch.autograd.grad(z.sum(), log_alpha)[0])

    def test_no_gradient_mode(self, backend):
        log_alpha = torch.randn(40, requires_grad=True)
        with torch.no_grad():
            assert not l0.sample_gates(log_alpha, seed=SEED).z.requires_grad
        assert not l0.sample_gates(log_alpha.detach(), seed=SEED).z.requires_grad
        z, index, count, _ = l0.sample_gates(log_alpha, seed=SEED)
        assert (z.requires_grad, index.requires_grad, count.requires_grad) == (True, False, False)

    def test_changing_z_in_place_is_noticed(self, backend):
        log_alpha = torch.randn(40, requires_grad=True)
        z = l0.sample_gates(log_alpha, seed=SEED).z
        with torch.no_grad():
            z.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified .*inplace"):
            z.sum().backward()


class TestEvaluation:
    @pytest.mark.parametrize("mode", ["paper", "median", "topk"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_reference_and_carries_no_gradient(self, backend, mode, dtype):
        for n in (0, 1, 127, 128, 129, 1000):
            log_alpha = (torch.randn(n, dtype=dtype) * 3).requires_grad_()
            gates = l0.eval_gates(log_alpha, mode)
            expected = reference.eval_gates(log_alpha, mode)
            assert torch.equal(gates.z, expected.z)
            assert not gates.z.requires_grad
            assert gates.z.dtype == dtype
            assert gates.full_grad is False
            assert_order(gates)
        pair = l0.eval_gates([torch.zeros(3), torch.ones(4)], mode)
        assert [len(g.z) for g in pair] == [3, 4]

    def test_default_is_paper(self, backend):
        log_alpha = torch.randn(100)
        assert torch.equal(l0.eval_gates(log_alpha).z, l0.eval_gates(log_alpha, "paper").z)


class TestFromZ:
    def test_open_is_what_is_not_zero(self):
        z = torch.tensor([0.0, -0.0, 1e-45, -2.0, float("nan"), 3.0, 0.0])
        gates = Gates.from_z(z)
        assert gates.index[:7].tolist() == [2, 3, 4, 5, 0, 1, 6]
        assert gates.count.tolist() == [4, 128]
        assert gates.full_grad is True

    @pytest.mark.parametrize("kind", ["open", "closed", "mixed", "wild"])
    @pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 256, 1000])
    def test_order(self, kind, n):
        assert_order(Gates.from_z(make_z(kind, n)))

    def test_keeps_the_graph(self):
        log_alpha = torch.randn(20, requires_grad=True)
        gates = Gates.from_z(log_alpha.relu())
        gates.z.sum().backward()
        assert torch.equal(log_alpha.grad, (log_alpha > 0).float())

    def test_copies(self, backend):
        gates = l0.sample_gates(torch.randn(30), seed=SEED)
        for twin in (copy.copy(gates), copy.deepcopy(gates)):
            assert isinstance(twin, Gates)
            assert all(torch.equal(a, b) for a, b in zip(gates[:3], twin[:3], strict=True))
        assert copy.deepcopy(HardConcrete(0.5)) == HardConcrete(0.5)


class TestErrors:
    def test_nan_names_the_vector(self, backend):
        good, bad = torch.zeros(5), torch.tensor([0.0, float("nan")])
        with pytest.raises(ValueError, match=r"^log_alpha must not hold NaN"):
            l0.sample_gates(bad)
        with pytest.raises(ValueError, match=r"log_alpha\[2\] must not hold NaN"):
            l0.sample_gates([good, good, bad])
        with pytest.raises(ValueError, match=r"log_alpha must not hold NaN"):
            l0.sample_gates(bad.double())
        for mode in ("paper", "median", "topk"):
            with pytest.raises(ValueError, match=r"log_alpha\[1\] must not hold NaN"):
                l0.eval_gates([good, bad], mode)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
    def test_dtype(self, backend, dtype):
        log_alpha = torch.zeros(4).to(dtype)
        for call in (l0.sample_gates, l0.eval_gates, Gates.from_z):
            with pytest.raises(TypeError, match=f"must be float32 or float64, got {dtype}"):
                call(log_alpha)
        with pytest.raises(TypeError, match=rf"log_alpha\[1\] must be float32 or float64, got {dtype}"):
            l0.sample_gates([torch.zeros(4), log_alpha])

    def test_one_dtype_a_call(self, backend):
        with pytest.raises(TypeError, match=r"log_alpha\[1\] must have .*float32, got torch.float64"):
            l0.sample_gates([torch.zeros(3), torch.zeros(3, dtype=torch.float64)])

    @pytest.mark.parametrize("shape", [(), (3, 4)])
    def test_shape(self, backend, shape):
        for call in (l0.sample_gates, l0.eval_gates):
            with pytest.raises(ValueError, match=r"log_alpha must have 1 dimension\(s\), got shape \("):
                call(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"z must have shape \(G,\), got"):
            Gates.from_z(torch.zeros(shape))

    def test_device(self, backend):
        with pytest.raises(ValueError, match=r"log_alpha\[1\] must be on cpu, .*got meta"):
            l0.sample_gates([torch.zeros(3), torch.zeros(3, device="meta")])
        with pytest.raises(ValueError, match="seed must be on cpu, the device of log_alpha, got meta"):
            l0.sample_gates(torch.zeros(3), seed=SEED.to("meta"))

    @pytest.mark.parametrize("value", [None, [0.0, 1.0], 3.0])
    def test_kind(self, backend, value):
        with pytest.raises(TypeError):
            l0.sample_gates(value)
        with pytest.raises(TypeError, match=r"z must be a torch.Tensor, got"):
            Gates.from_z(value)

    def test_seed(self, backend):
        log_alpha = torch.zeros(3)
        with pytest.raises(TypeError, match=r"seed must be an int64 tensor of shape \(1,\), got int"):
            l0.sample_gates(log_alpha, seed=5)
        with pytest.raises(TypeError, match=r"seed must be an int64 tensor .* got dtype torch.int32"):
            l0.sample_gates(log_alpha, seed=SEED.int())
        for seed in (SEED[0], SEED.expand(2), SEED[None]):
            with pytest.raises(ValueError, match=r"seed must have shape \(1,\) .* got \("):
                l0.sample_gates(log_alpha, seed=seed)
        with pytest.raises(ValueError, match="give either seed or generator, got both"):
            l0.sample_gates(log_alpha, seed=SEED, generator=torch.Generator())

    @pytest.mark.parametrize("rank", [-1, 2**32])
    def test_rank(self, backend, rank):
        with pytest.raises(ValueError, match=rf"rank must be in \[0, 4294967296\), got {rank}"):
            l0.sample_gates(torch.zeros(3), rank=rank)
        with pytest.raises(TypeError, match="rank must be an int, got float"):
            l0.sample_gates(torch.zeros(3), rank=1.0)

    def test_mode_and_constants(self, backend):
        with pytest.raises(ValueError, match="mode must be one of 'paper', 'median', 'topk', got 'mean'"):
            l0.eval_gates(torch.zeros(3), "mean")
        for call in (l0.sample_gates, l0.eval_gates):
            with pytest.raises(TypeError, match="dist must be a HardConcrete, got tuple"):
                call(torch.zeros(3), dist=(2 / 3, -0.1, 1.1))
        for name, constants in (("beta", (0.0,)), ("gamma", (1.0, 0.0)), ("zeta", (1.0, -0.1, 1.0))):
            with pytest.raises(ValueError, match=f"{name} must be"):
                HardConcrete(*constants)
