import math

import pytest
import torch

from l0kernels.reference import (
    ALIGN,
    Gates,
    HardConcrete,
    eval_gates,
    sample_gates,
    sample_gates_per_example,
    uniform,
)
from l0kernels.reference.gates import hard_concrete

CLAMP = math.log(100)
DISTS = [HardConcrete(), HardConcrete(beta=0.5, gamma=-0.2, zeta=1.3), HardConcrete(1.0, -0.1, 1.4)]


def seed_of(value):
    return torch.tensor([value], dtype=torch.int64)


def survival(t, log_alpha, dist):
    """P(z > t) for t in [0, 1), from the logistic distribution of the noise."""
    s = (t - dist.gamma) / (dist.zeta - dist.gamma)
    return 1 / (1 + math.exp(dist.beta * math.log(s / (1 - s)) - log_alpha))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("log_alpha", [-CLAMP, -2.398, -1.0, 0.0, 1.386, CLAMP])
def test_sampling_statistics(log_alpha, dist):
    n = 100_000
    z = sample_gates(torch.full((n,), log_alpha), seed=seed_of(3), dist=dist).z.double()
    assert z.min() >= 0
    assert z.max() <= 1

    p_zero = 1 - survival(0.0, log_alpha, dist)
    p_one = survival(1.0 - 1e-15, log_alpha, dist)
    for got, p in (((z == 0).double().mean(), p_zero), ((z == 1).double().mean(), p_one)):
        assert abs(got - p) < 4.5 * math.sqrt(p * (1 - p) / n)

    points = 4000  # E[z] is the integral of P(z > t), here by the midpoint rule
    mean = sum(survival((i + 0.5) / points, log_alpha, dist) for i in range(points)) / points
    assert abs(z.mean() - mean) < 4.5 * z.std() / math.sqrt(n)


# log_alpha, P(z = 0), P(z = 1) of the default constants
MASSES = [
    (-4.605, 0.9529, 0.0020),
    (-2.398, 0.6898, 0.0180),
    (-1.5986, 0.5000, 0.0393),
    (0.0, 0.1682, 0.1682),
    (0.847, 0.0797, 0.3205),
    (1.386, 0.0481, 0.4471),
    (2.197, 0.0220, 0.6453),
    (4.605, 0.0020, 0.9529),
]


@pytest.mark.parametrize(("log_alpha", "p_zero", "p_one"), MASSES)
def test_masses(log_alpha, p_zero, p_one):
    value = torch.tensor(log_alpha, dtype=torch.float64)
    assert HardConcrete().p_open(value).item() == pytest.approx(1 - p_zero, abs=1e-4)
    assert HardConcrete().p_one(value).item() == pytest.approx(p_one, abs=1e-4)


@pytest.mark.parametrize("dist", DISTS)
def test_p_open_is_the_survival_at_zero(dist):
    values = [-CLAMP, -1.0, 0.0, 2.0, CLAMP]
    log_alpha = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([survival(0.0, v, dist) for v in values], dtype=torch.float64)
    torch.testing.assert_close(dist.p_open(log_alpha), expected, rtol=1e-12, atol=0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dist.p_open(log_alpha.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"beta": 0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"gamma": 0.0}, "gamma"),
        ({"zeta": 1}, "zeta"),
        ({"zeta": float("inf")}, "zeta"),
    ],
)
def test_constants_out_of_range(kwargs, name):
    with pytest.raises(ValueError, match=name):
        HardConcrete(**kwargs)


def test_constants_are_numbers_and_frozen():
    with pytest.raises(TypeError, match="beta must be a number"):
        HardConcrete(beta="hot")
    with pytest.raises(AttributeError):
        HardConcrete().beta = 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dist", DISTS)
def test_value_and_gradient_follow_the_formula(dtype, dist):
    log_alpha = torch.linspace(-5, 5, 501, dtype=dtype, requires_grad=True)
    z = sample_gates(log_alpha, seed=seed_of(11), dist=dist).z
    z.sum().backward()
    assert z.dtype == log_alpha.grad.dtype == dtype

    u = uniform(seed_of(11), torch.arange(501)).double()
    s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + log_alpha.detach().double()) / dist.beta))
    width = dist.zeta - dist.gamma
    stretched = s * width + dist.gamma
    inside = (stretched > 0) & (stretched < 1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(z.detach().double(), stretched.clamp(0, 1), rtol=0, atol=16 * eps)
    expected = torch.where(inside, width / dist.beta * s * (1 - s), 0.0)
    torch.testing.assert_close(log_alpha.grad.double(), expected, rtol=0, atol=16 * eps)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_zero_set_is_exact(seed):
    log_alpha = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * 2
    log_alpha.requires_grad_()
    z = sample_gates(log_alpha, seed=seed_of(seed)).z
    z.backward(torch.ones_like(z))
    inside = (z > 0) & (z < 1)
    assert torch.equal(log_alpha.grad != 0, inside)
    assert (~inside).any()


@pytest.mark.parametrize(
    ("dist", "edge"), [(HardConcrete(1, -2.0, 2.0), 0.0), (HardConcrete(1, -1.0, 3.0), 1.0)]
)
def test_no_gradient_at_equality(dist, edge):
    log_alpha = torch.zeros(3, requires_grad=True)
    z = hard_concrete(log_alpha, torch.full((3,), 0.5), dist)  # s = 1/2 lands on the edge without rounding
    z.sum().backward()
    assert z.tolist() == [edge] * 3
    assert log_alpha.grad.tolist() == [0.0] * 3


def test_sampling_gradcheck():
    log_alpha = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_alpha.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: sample_gates(a, seed=seed_of(1)).z, log_alpha)
    assert torch.autograd.gradgradcheck(lambda a: sample_gates(a, seed=seed_of(1)).z, log_alpha)
    assert torch.autograd.gradcheck(lambda a: sample_gates_per_example(a, 3, seed=seed_of(1)), log_alpha)


def test_noise_depends_on_seed_position_stream_and_rank_only():
    a, b = torch.zeros(100), torch.zeros(60)
    first, second = sample_gates([a, b], seed=seed_of(5))
    assert torch.equal(first.z, sample_gates(a, seed=seed_of(5)).z)
    assert torch.equal(sample_gates(torch.zeros(400), seed=seed_of(5)).z[:100], first.z)
    assert not torch.equal(second.z, first.z[:60])
    u = uniform(seed_of(5), torch.arange(60), stream=1)
    assert torch.equal(second.z, hard_concrete(b, u, HardConcrete()))
    assert not torch.equal(sample_gates(a, seed=seed_of(6)).z, first.z)
    u = uniform(seed_of(5), torch.arange(100), rank=7)
    assert torch.equal(sample_gates(a, seed=seed_of(5), rank=7).z, hard_concrete(a, u, HardConcrete()))


def test_float64_gates_share_the_noise():
    log_alpha = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    z32 = sample_gates(log_alpha, seed=seed_of(8)).z
    z64 = sample_gates(log_alpha.double(), seed=seed_of(8)).z
    torch.testing.assert_close(z32.double(), z64, rtol=0, atol=5e-7)


def test_missing_seed_comes_from_torchs_generator():
    log_alpha = torch.zeros(50)
    torch.manual_seed(3)
    first, second = sample_gates(log_alpha), sample_gates(log_alpha)
    torch.manual_seed(3)
    again = sample_gates(log_alpha)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,))
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.z, sample_gates(log_alpha, seed=seed).z)
    assert not torch.equal(first.z, second.z)

    state = torch.get_rng_state()
    own = [sample_gates(log_alpha, generator=torch.Generator().manual_seed(3)).z for _ in range(2)]
    assert torch.equal(own[0], own[1])
    assert torch.equal(own[0], first.z)
    assert torch.equal(torch.get_rng_state(), state)


def test_gates_stay_float32_under_autocast():
    log_alpha = torch.randn(300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = sample_gates(log_alpha, seed=seed_of(1)).z
    (expected,) = torch.autograd.grad(plain.sum(), log_alpha)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = sample_gates(log_alpha, seed=seed_of(1)).z
        evaluated = [eval_gates(log_alpha, mode).z for mode in ("paper", "median", "topk")]
    (grad,) = torch.autograd.grad(z.sum(), log_alpha)
    assert torch.equal(z, plain)
    assert torch.equal(grad, expected)
    for mode, value in zip(("paper", "median", "topk"), evaluated, strict=True):
        assert torch.equal(value, eval_gates(log_alpha, mode).z)


def test_nan_is_never_a_closed_gate():
    log_alpha = torch.tensor([0.0, float("nan"), 1.0])
    for call in (sample_gates, eval_gates):
        with pytest.raises(ValueError, match="NaN"):
            call(log_alpha)
    z = hard_concrete(log_alpha, torch.full((3,), 0.5), HardConcrete())
    assert z.isnan().tolist() == [False, True, False]
    assert Gates.from_z(z).count.tolist() == [3, ALIGN]


def test_infinite_log_alpha_saturates():
    log_alpha = torch.tensor([-math.inf, math.inf], requires_grad=True)
    z = sample_gates(log_alpha, seed=seed_of(0)).z
    z.sum().backward()
    assert z.tolist() == [0.0, 1.0]
    assert log_alpha.grad.tolist() == [0.0, 0.0]


def test_per_example_gates():
    log_alpha = torch.randn(7, generator=torch.Generator().manual_seed(0))
    z = sample_gates_per_example(log_alpha, 5, seed=seed_of(4), rank=2)
    u = uniform(seed_of(4), torch.arange(35), rank=2).reshape(5, 7)
    assert torch.equal(z, hard_concrete(log_alpha, u, HardConcrete()))
    assert sample_gates_per_example(log_alpha, 0).shape == (0, 7)
    torch.manual_seed(0)
    drawn = sample_gates_per_example(log_alpha, 2)
    torch.manual_seed(0)
    assert torch.equal(drawn, sample_gates_per_example(log_alpha, 2))
    with pytest.raises(ValueError, match="batch"):
        sample_gates_per_example(log_alpha, -1)
    with pytest.raises(TypeError, match="batch"):
        sample_gates_per_example(log_alpha, 2.0)


def expected_layout(z):
    closed = [j for j, v in enumerate(z.tolist()) if v == 0]
    opened = [j for j, v in enumerate(z.tolist()) if v != 0]
    rounded = math.ceil(len(z) / ALIGN) * ALIGN
    index = opened + closed + [0] * (rounded - len(z))
    return index, [len(opened), math.ceil(len(opened) / ALIGN) * ALIGN]


@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 257, 1000])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_index_and_count(n, density):
    generator = torch.Generator().manual_seed(n)
    z = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < density)
    gates = Gates.from_z(z)
    index, count = expected_layout(z)
    assert gates.index.tolist() == index
    assert gates.count.tolist() == count
    assert gates.index.dtype == gates.count.dtype == torch.int32
    assert gates.full_grad


def test_index_and_count_of_drawn_gates():
    for gates in (sample_gates(torch.zeros(300), seed=seed_of(1)), eval_gates(torch.randn(300), "topk")):
        index, count = expected_layout(gates.z)
        assert gates.index.tolist() == index
        assert gates.count.tolist() == count
        assert not gates.full_grad


def test_from_z_keeps_the_graph_and_any_value():
    z = torch.tensor([0.0, -1.0, 2.5, -0.0, math.nan], dtype=torch.float64, requires_grad=True)
    gates = Gates.from_z(z, full_grad=False)
    assert gates.z is z
    assert not gates.full_grad
    assert gates.index.tolist()[:5] == [1, 2, 4, 0, 3]
    assert gates.count.tolist() == [3, ALIGN]
    assert gates._fields == ("z", "index", "count", "full_grad")


def test_another_z_gets_its_own_index_and_count():
    """_replace, and copy.replace where Python has it."""
    gates = Gates.from_z(torch.tensor([0.0, 0.5, 1.0, 0.0]), full_grad=False)
    z = torch.tensor([2.0, 0.0, 0.0, 1.0], requires_grad=True)
    for replaced in (gates._replace(z=z), gates.__replace__(z=z)):
        assert isinstance(replaced, Gates)
        assert replaced.z is z
        assert replaced.index.tolist()[:4] == [0, 3, 1, 2]
        assert replaced.count.tolist() == [2, ALIGN]
        assert not replaced.full_grad
    longer = gates._replace(z=torch.ones(200), full_grad=True)
    assert (longer.index.shape, longer.count.tolist(), longer.full_grad) == ((256,), [200, 256], True)
    whole = gates._replace(z=z, index=gates.index, count=gates.count)  # all three: as they are given
    assert whole.index is gates.index
    assert whole.count is gates.count
    one = gates._replace(z=z, count=gates.count)
    assert one.count is gates.count
    assert one.index.tolist()[:4] == [0, 3, 1, 2]
    assert gates._replace(full_grad=True)[:3] == gates[:3]
    for wrong, error, message in (
        ({"z": 1.0}, TypeError, "z must be a torch.Tensor"),
        ({"z": torch.ones(2, 2)}, ValueError, r"z must have shape \(G,\), got \(2, 2\)"),
        ({"zeta": z}, TypeError, r"a field of Gates is one of .*, got \['zeta'\]"),
    ):
        with pytest.raises(error, match=message):
            gates._replace(**wrong)


EVALUATED = {
    "paper": [0, 0, 0.1018, 0.5, 0.74, 0.86, 0.98, 1],
    "median": [0, 0, 0, 0.5, 0.8371, 0.9667, 1, 1],
    # sum(1 - p_open) = 2.46 here: the two smallest are closed, the others are not stretched
    "topk": [0, 0, 0.1280, 0.5, 0.7343, 0.8407, 0.9332, 0.9960],
}


@pytest.mark.parametrize("mode", EVALUATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_gates(mode, dtype):
    log_alpha = torch.tensor([m[0] for m in MASSES], dtype=dtype, requires_grad=True)
    gates = eval_gates(log_alpha, mode)
    expected = torch.tensor(EVALUATED[mode], dtype=dtype)
    torch.testing.assert_close(gates.z, expected, rtol=0, atol=2e-4)
    assert torch.equal(gates.z == 0, expected == 0)
    assert not gates.z.requires_grad
    assert log_alpha.requires_grad


def test_default_mode_and_lists():
    log_alphas = [torch.randn(5), torch.randn(9)]
    for mode in ("paper", "median", "topk"):
        for alone, together in zip(log_alphas, eval_gates(log_alphas, mode), strict=True):
            assert torch.equal(eval_gates(alone, mode).z, together.z)
    assert torch.equal(eval_gates(log_alphas[0]).z, eval_gates(log_alphas[0], "paper").z)
    assert sample_gates([]) == []
    assert eval_gates([]) == []


@pytest.mark.parametrize("dist", DISTS)
def test_median_is_the_gate_of_one_half(dist):
    log_alpha = torch.linspace(-6, 6, 97, dtype=torch.float64)
    half = torch.full((97,), 0.5)
    assert torch.equal(eval_gates(log_alpha, "median", dist=dist).z, hard_concrete(log_alpha, half, dist))
    closed = eval_gates(log_alpha, "median", dist=dist).z == 0
    assert torch.equal(closed, dist.p_open(log_alpha) <= 0.5)


def topk_by_sorting(values, dist):
    n_closed = round(len(values) - sum(survival(0.0, v, dist) for v in values))
    closed = sorted(range(len(values)), key=lambda j: (values[j], j))[:n_closed]
    return [0.0 if j in closed else 1 / (1 + math.exp(-0.8 * v / dist.beta)) for j, v in enumerate(values)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dist", DISTS)
def test_topk_closes_the_lowest_index_first_among_ties(seed, dist):
    generator = torch.Generator().manual_seed(seed)
    log_alpha = (torch.randn(200, generator=generator, dtype=torch.float64) * 4).clamp(-CLAMP, CLAMP)
    assert (log_alpha == -CLAMP).sum() > 1
    got = eval_gates(log_alpha, "topk", dist=dist).z
    expected = torch.tensor(topk_by_sorting(log_alpha.tolist(), dist), dtype=torch.float64)
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got, expected)


def test_topk_of_equal_gates():
    # p_open = .8318 each: round(10 * .1682) = 2 are closed.
    assert eval_gates(torch.zeros(10), "topk").z.tolist() == [0.0, 0.0] + [0.5] * 8
    # Equal sigmoids of unequal parameters are no ties: the parameters decide.
    log_alpha = torch.tensor([40.0] * 5 + [39.0] + [-9.0])
    assert eval_gates(log_alpha, "topk").z.tolist() == [1.0] * 6 + [0.0]
    assert eval_gates(torch.full((4,), -30.0), "topk").z.tolist() == [0.0] * 4


@pytest.mark.parametrize("call", [sample_gates, eval_gates])
@pytest.mark.parametrize(
    ("log_alpha", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.bfloat16), TypeError, "log_alpha must be float32 or float64.*bfloat16"),
        (torch.zeros(3, dtype=torch.float16), TypeError, "log_alpha must be float32 or float64.*float16"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "log_alpha must be float32 or float64.*int64"),
        (torch.zeros(3, 2), ValueError, r"log_alpha must have 1 dimension.*\(3, 2\)"),
        (torch.tensor(0.0), ValueError, "log_alpha must have 1 dimension"),
        ([torch.zeros(2), [0.0]], TypeError, r"log_alpha\[1\] must be a torch.Tensor, got list"),
        ([torch.zeros(2), torch.tensor([math.nan])], ValueError, r"log_alpha\[1\] must not hold NaN"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], ValueError, r"log_alpha\[1\] must be on cpu"),
    ],
)
def test_bad_log_alpha(call, log_alpha, error, message):
    with pytest.raises(error, match=message):
        call(log_alpha)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"seed": 3}, TypeError, "seed must be an int64 tensor.*got int"),
        ({"seed": torch.zeros(1)}, TypeError, "seed must be an int64 tensor.*float32"),
        ({"seed": torch.tensor(3)}, ValueError, r"seed must have shape \(1,\)"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must have shape \(1,\).*\(2,\)"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed must be on cpu.*meta"),
        ({"rank": -1}, ValueError, "rank"),
        ({"rank": 2**32}, ValueError, "rank"),
        ({"rank": 0.0}, TypeError, "rank must be an int"),
        ({"dist": (2 / 3, -0.1, 1.1)}, TypeError, "dist must be a HardConcrete, got tuple"),
        ({"seed": torch.tensor([1]), "generator": torch.Generator()}, ValueError, "either seed or generator"),
    ],
)
def test_bad_sampling_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        sample_gates(torch.zeros(4), **kwargs)


def test_generator_of_another_device():
    with pytest.raises(ValueError, match=r"generator must be on meta.*got cpu"):
        sample_gates(torch.zeros(4, device="meta"), generator=torch.Generator())


@pytest.mark.parametrize("mode", ["Paper", "", None, 3])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match="mode must be one of 'paper', 'median', 'topk', got"):
        eval_gates(torch.zeros(4), mode)


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        ([1.0], TypeError, "z must be a torch.Tensor, got list"),
        (torch.ones(3, dtype=torch.bool), TypeError, "z must be float32 or float64, got torch.bool"),
        (torch.ones(3, dtype=torch.bfloat16), TypeError, "z must be float32 or float64, got torch.bfloat16"),
        (torch.ones(3, 1), ValueError, r"z must have shape \(G,\), got \(3, 1\)"),
    ],
)
def test_bad_z(z, error, message):
    with pytest.raises(error, match=message):
        Gates.from_z(z)
