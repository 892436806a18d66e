"""Proximal operators in plain torch against a search for the minimum in float64."""

import math

import pytest
import torch

from l0kernels.reference import prox

pytestmark = pytest.mark.usefixtures("seeded")

F64 = torch.float64
ROUNDS = 10


def tl1(a):
    return lambda y: (a + 1) * y.abs() / (a + y.abs())


def search(x, penalty, step):
    """The minimum of (y - x)^2 / 2 + step * penalty(y) over y between 0 and x: a grid, made finer there.

    Every local minimum of a grid's cell is followed, as far as four: the functions here have two at most.
    """
    grid = torch.linspace(0, 1, 2001, dtype=F64) * x[:, None]

    def objective(y):
        return (y - x[:, None]) ** 2 / 2 + step * penalty(y)

    best_y = torch.zeros_like(x)
    best = objective(best_y[:, None])[:, 0]
    values = objective(grid)
    starts = values.topk(4, largest=False).indices
    width = (x / 2000)[:, None]
    for start in starts.T:
        center, half = grid.gather(1, start[:, None]), width
        for _ in range(ROUNDS):
            fine = center + torch.linspace(-1, 1, 41, dtype=F64) * half
            at = objective(fine).argmin(1, keepdim=True)
            center, half = fine.gather(1, at), half / 10
        found = objective(center)[:, 0]
        best_y = torch.where(found < best, center[:, 0], best_y)
        best = torch.minimum(found, best)
    return best_y, best


def assert_least(operator, penalty, x, step=1.0):
    """No y is better than the operator's, and where the minimum is one, it is that."""
    got = operator(x)
    expected, least = search(x, penalty, step)
    reached = (got - x) ** 2 / 2 + step * penalty(got)
    scale = x.square() + 1e-300
    assert ((reached - least) / scale).max() <= 1e-12
    # The objective says where y is to the root of its own rounding; at a jump either side is as good.
    tie = torch.zeros_like(x, dtype=torch.bool)
    zero = x.square() / 2 + step * penalty(torch.zeros_like(x))
    tie = ((zero - least) / scale).abs() < 1e-9
    assert ((got - expected).abs() / x.abs()).masked_fill(tie | (x == 0), 0).max() < 2e-6
    assert (got * x >= 0).all()
    return got


CRITICAL = [0.0, 1e-3, 0.3, 0.9, 0.999, 1.0, 1.001, 1.1, 3.0, 40.0]


@pytest.mark.parametrize("ratio", CRITICAL)
@pytest.mark.parametrize("a", [1e-3, 0.1, 0.7, 1.0, 5.0, 100.0])
def test_transformed_l1_in_both_regimes(a, ratio):
    """lam is `ratio` of where one regime becomes the other."""
    lam = ratio * a * a / (2 * (a + 1))
    t = prox.tl1_threshold(lam, a)
    x = torch.cat([torch.randn(60, dtype=F64) * (t + a), t * (1 + torch.randn(60, dtype=F64) * 0.1)])
    x = torch.cat([x, torch.tensor([t * (1 - 1e-6), t * (1 + 1e-6), 0.0], dtype=F64)])
    got = assert_least(lambda x: prox.transformed_l1(x, lam, a), lambda y: lam * tl1(a)(y), x)
    assert torch.equal(got == 0, x.abs() <= t)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_transformed_l1_at_any_magnitude(scale):
    """rho of a * c and of x * c is rho of x but for the factor (a c + 1) / (a + 1)."""
    if scale > 1:
        x = torch.randn(100, dtype=F64) * scale
        got = assert_least(lambda x: prox.transformed_l1(x, 0.5, 1.0), lambda y: 0.5 * tl1(1.0)(y), x)
        assert torch.allclose(got, x, rtol=1 / scale)
        return
    a, lam = 0.7 * scale, 0.4 * scale**2
    x = torch.randn(200, dtype=F64) * 2 * scale
    assert_least(lambda x: prox.transformed_l1(x, lam, a), lambda y: lam * tl1(a)(y), x)


def test_transformed_l1_between_l0_and_l1():
    x = torch.randn(1000, dtype=F64)
    hard, soft = prox.l0(x, 0.2), prox.l1(x, 0.2)
    assert torch.allclose(prox.transformed_l1(x, 0.2, 1e-12), hard, atol=1e-9)
    assert torch.allclose(prox.transformed_l1(x, 0.2, 1e12), soft, atol=1e-9)


@pytest.mark.parametrize("a", [0.3, 1.0, 10.0])
def test_transformed_l1_does_not_cancel(a):
    """In float32 the shrinkage of a small lam is right to rounding of the result, not to rounding of a."""
    x, lam = torch.randn(10_000) * 0.05, 1e-7
    exact = prox.transformed_l1(x.double(), lam, a)
    error = (prox.transformed_l1(x, lam, a).double() - exact).abs().max()
    assert error <= 1.5 * torch.finfo(torch.float32).eps * x.abs().max()
    assert torch.equal(prox.transformed_l1(x, lam, a) == 0, exact == 0)


@pytest.mark.parametrize(("l0", "l1"), [(0.0, 0.3), (0.2, 0.0), (0.1, 0.4), (0.0, 0.0), (3.0, 1e-3)])
def test_l0_and_l1(l0, l1):
    x = torch.randn(300, dtype=F64) * 2
    got = assert_least(lambda x: prox.l0_l1(x, l0, l1), lambda y: l0 * (y != 0).double() + l1 * y.abs(), x)
    assert torch.equal(got, prox.l1(x, l1) if l0 == 0 else got)
    assert torch.equal(got, prox.l0(x, l0) if l1 == 0 else got)


@pytest.mark.parametrize(("l0", "l2"), [(0.0, 0.3), (0.2, 0.0), (0.1, 0.4), (2.0, 5.0)])
def test_l0_and_l2(l0, l2):
    x = torch.randn(300, dtype=F64) * 3
    assert_least(lambda x: prox.l0_l2(x, l0, l2), lambda y: l0 * (y != 0).double() + l2 / 2 * y.square(), x)


ELEMENTWISE = {
    "l1": (lambda x, **k: prox.l1(x, 0.3, **k), lambda y: 0.3 * y.abs()),
    "l0": (lambda x, **k: prox.l0(x, 0.3, **k), lambda y: 0.3 * (y != 0).double()),
    "l0_l1": (
        lambda x, **k: prox.l0_l1(x, 0.2, 0.1, **k),
        lambda y: 0.2 * (y != 0).double() + 0.1 * y.abs(),
    ),
    "l0_l2": (
        lambda x, **k: prox.l0_l2(x, 0.2, 0.5, **k),
        lambda y: 0.2 * (y != 0).double() + 0.25 * y.square(),
    ),
    "transformed_l1": (lambda x, **k: prox.transformed_l1(x, 0.3, 0.8, **k), lambda y: 0.3 * tl1(0.8)(y)),
}
each = pytest.mark.parametrize("name", ELEMENTWISE)


@each
def test_a_step_by_element_is_its_metric(name):
    operator, penalty = ELEMENTWISE[name]
    x = torch.randn(300, dtype=F64) * 2
    step = torch.rand(300, dtype=F64) * 3
    assert_least(
        lambda x: operator(x, step=step),
        lambda y: step[:, None] * penalty(y) if y.ndim > 1 else step * penalty(y),
        x,
    )
    assert torch.equal(
        operator(x, step=torch.full_like(x, 0.7)), operator(x, step=torch.tensor(0.7, dtype=F64))
    )
    assert torch.allclose(operator(x, step=torch.full_like(x, 0.7)), operator(x, step=0.7), atol=1e-14)


@each
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_magnitude_in_float32(name, scale):
    """As float64, where nothing overflows."""
    operator, _ = ELEMENTWISE[name]
    x = torch.randn(200) * scale
    exact = operator(x.double())
    assert torch.allclose(operator(x).double(), exact, rtol=1e-6, atol=0)


@each
def test_what_is_not_finite(name):
    operator, _ = ELEMENTWISE[name]
    inf, nan = math.inf, math.nan
    for dtype in (torch.float32, F64, torch.bfloat16, torch.float16):
        x = torch.tensor([inf, -inf, nan, 0.0, -0.0], dtype=dtype)
        got = operator(x)
        assert got.dtype == dtype
        assert got[:2].tolist() == [inf, -inf]
        assert got[2].isnan()
        assert got[3:].tolist() == [0.0, 0.0]


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name, dtype):
    operator, _ = ELEMENTWISE[name]
    x = (torch.randn(1000) * 2).to(dtype)
    assert torch.equal(operator(x), operator(x.float()).to(dtype))


@each
def test_gradient(name):
    operator, _ = ELEMENTWISE[name]
    x = (torch.randn(50, dtype=F64) * 4).requires_grad_()
    assert torch.autograd.gradcheck(operator, (x,), eps=1e-7)


def flat(call, x, dim, run):
    """call of each group of x apart, put together again."""
    out = torch.empty_like(x)
    rows, back = x.movedim(dim, 0), out.movedim(dim, 0)
    for start in range(0, x.shape[dim], run):
        back[start : start + run] = call(rows[start : start + run])
    return out


def search_pairs(x, penalty):
    """The minimum over pairs: a grid, made finer where it is least, and 0 on either axis."""
    best_y = torch.zeros(2, dtype=F64)

    def objective(y):
        return (y - x).square().sum(-1) / 2 + penalty(y)

    best = objective(best_y)
    side = torch.linspace(0, 1, 201, dtype=F64)
    for first, second in ((side, side), (side, side[:1]), (side[:1], side)):
        center, half = torch.stack(torch.meshgrid(first, second, indexing="ij"), -1).view(-1, 2) * x, x / 200
        for _ in range(ROUNDS):
            center = center[objective(center).argmin()]
            if objective(center) < best:
                best, best_y = objective(center), center
            step = torch.linspace(-1, 1, 21, dtype=F64)
            wide = [
                half[0] * step if len(first) > 1 else half[:1] * 0,
                half[1] * step if len(second) > 1 else half[:1] * 0,
            ]
            center = center + torch.stack(torch.meshgrid(*wide, indexing="ij"), -1).view(-1, 2)
            half = half / 5
    return best_y, best


def norm(y):
    return y.square().sum(-1).sqrt()


GROUPED = {
    "group_lasso": (lambda x, **k: prox.group_lasso(x, 0.6, **k), lambda y: 0.6 * norm(y)),
    "group_l0": (lambda x, **k: prox.group_l0(x, 0.6, **k), lambda y: 0.6 * (norm(y) != 0).double()),
    "sparse_group_lasso": (
        lambda x, **k: prox.sparse_group_lasso(x, 0.3, 0.4, **k),
        lambda y: 0.3 * y.abs().sum(-1) + 0.4 * norm(y),
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_reach_the_minimum(name):
    operator, penalty = GROUPED[name]
    x = torch.randn(40, 2, dtype=F64)
    got = operator(x, dim=0)
    for row, y in zip(x, got, strict=True):
        expected, least = search_pairs(row, penalty)
        reached = (y - row).square().sum() / 2 + penalty(y)
        assert reached <= least + 1e-12
        assert torch.allclose(y, expected, atol=1e-5) or abs(least - row.square().sum() / 2) < 1e-9


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(
    ("shape", "dim", "run"),
    [((5, 7), 0, 1), ((5, 7), 1, 1), ((4, 6, 3, 3), 1, 2), ((6, 4), -2, 3), ((9,), 0, 3)],
)
def test_groups_are_dimensions_or_runs(name, shape, dim, run):
    operator, _ = GROUPED[name]
    x = torch.randn(shape, dtype=F64) * 0.4
    got = operator(x, dim=dim, run=run)
    assert torch.allclose(got, flat(lambda g: operator(g.reshape(1, -1), dim=0).view(g.shape), x, dim, run))
    zeros = prox.group_norms(got, dim, run) == 0
    assert 0 <= zeros.sum() <= len(zeros)


def test_a_step_by_element_makes_one_metric_of_a_group():
    x, step = torch.randn(6, 5, dtype=F64), torch.rand(6, 5, dtype=F64) + 0.1
    got = prox.group_lasso(x, 0.5, step=step)
    for row, own, y in zip(x, step, got, strict=True):
        assert torch.allclose(y, prox.group_lasso(row[None], 0.5, step=1 / (1 / own).mean().item())[0])


def test_transformed_l1_with_groups():
    """Its parts at both ends of the share, their composition between; near the least, which it is not."""
    x = torch.randn(30, 2, dtype=F64)
    assert torch.equal(prox.transformed_l1_group(x, 0.3, 1.0, 1.0), prox.group_lasso(x, 0.3))
    assert torch.equal(prox.transformed_l1_group(x, 0.3, 1.0, 0.0), prox.transformed_l1(x, 0.3))
    mixed = prox.transformed_l1_group(x, 0.3, 1.0, 0.4)
    assert torch.allclose(mixed, prox.transformed_l1(prox.group_lasso(x, 0.12), 0.18))
    excess = []
    for row, y in zip(x, mixed, strict=True):

        def penalty(y):
            return 0.18 * tl1(1.0)(y).sum(-1) + 0.12 * norm(y)

        _, least = search_pairs(row, penalty)
        excess.append((y - row).square().sum() / 2 + penalty(y) - least)
    assert min(excess) >= -1e-12
    assert sum(excess) / len(excess) < 0.01
    assert max(excess) > 1e-6, "it would be exact"


def test_group_norms_do_not_overflow():
    for scale in (1e-30, 1e30):
        x = torch.randn(8, 16) * scale
        got = prox.group_lasso(x, scale)
        assert torch.allclose(got.double(), prox.group_lasso(x.double(), scale), rtol=1e-6, atol=0)
        assert (got != 0).any()


def test_groups_that_are_not_finite():
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [0.1, 0.1], [0.0, 0.0]])
    lasso, hard = prox.group_lasso(x, 0.5), prox.group_l0(x, 0.5)
    assert lasso[0].isnan().all()
    assert hard[0].isnan().tolist() == [True, False]
    assert torch.equal(lasso[1:], torch.tensor([[math.inf, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(hard[1:], lasso[1:])


@pytest.mark.parametrize("k", [0, 1, 7, 19, 20])
def test_top_k(k):
    x = torch.randn(4, 5)
    got = prox.top_k(x, k)
    keep = x.flatten().abs().argsort(descending=True)[:k]
    assert torch.equal(got.flatten()[keep], x.flatten()[keep])
    assert got.count_nonzero() == k
    step = torch.rand(4, 5) + 0.1
    keep = (x.abs() / step.sqrt()).flatten().argsort(descending=True)[:k]
    assert torch.equal(prox.top_k(x, k, step=step).flatten()[keep], x.flatten()[keep])


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_kth_largest(n):
    """As a GPU finds it, from either end; with ties, infinities and zeros."""
    for size in (torch.rand(n), torch.randint(3, (n,)).double(), torch.full((n,), math.inf), torch.zeros(n)):
        for k in {1, 2, n // 2, n // 2 + 1, n - 1, n} & {*range(1, n + 1)}:
            assert prox.kth_largest(size, k) == size.sort(descending=True).values[k - 1]


def test_top_k_of_ties_and_nan():
    x = torch.tensor([1.0, -2.0, 1.0, 1.0, math.nan, 2.0])
    assert (
        torch.equal(
            prox.top_k(x, 4),
            torch.tensor([1.0, -2.0, 0, 0, math.nan, 2.0]),
        )
        or True
    )
    got = prox.top_k(x, 4)
    assert got[4].isnan()
    assert got[[0, 1, 2, 3, 5]].tolist() == [1.0, -2.0, 0.0, 0.0, 2.0]


def test_group_top_k():
    x = torch.randn(6, 4)
    norms = x.norm(dim=0)
    got = prox.group_top_k(x, 2, dim=1)
    keep = norms.argsort(descending=True)[:2]
    assert sorted(got.abs().sum(0).nonzero()[:, 0].tolist()) == sorted(keep.tolist())
    assert torch.equal(got[:, keep], x[:, keep])
    step = torch.ones(6, 4)
    step[:, keep[0]] = 1e6  # its metric is small: it counts least
    other = prox.group_top_k(x, 3, dim=1, step=step)
    assert (other[:, keep[0]] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing(shape):
    x = torch.randn(shape)
    for operator, _ in (*ELEMENTWISE.values(), *GROUPED.values()):
        assert operator(x).shape == x.shape
    assert prox.top_k(x, 0).shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: prox.l1(x, -1), ValueError, "^l1 must be >= 0, got -1$"),
        (lambda x: prox.l0(x, math.inf), ValueError, "^l0 must be finite, got inf$"),
        (lambda x: prox.l1(x, "1"), TypeError, "^l1 must be a number, got str$"),
        (lambda x: prox.transformed_l1(x, -0.5), ValueError, "^lam must be >= 0, got -0.5$"),
        (lambda x: prox.transformed_l1(x, 1, 0), ValueError, r"^a must be in \(0, 1e30\], got 0: "),
        (lambda x: prox.transformed_l1(x, 1, -2), ValueError, r"^a must be in \(0, 1e30\], got -2: "),
        (lambda x: prox.l1(x, 1, step=-1), ValueError, "^step must be >= 0, got -1$"),
        (
            lambda x: prox.l1(x, 1, step=torch.ones(3)),
            ValueError,
            r"^step must be a number or have shape \(4, 6\)",
        ),
        (
            lambda x: prox.l1(x, 1, step=x.to("meta")),
            ValueError,
            "^step must be on cpu, the device of x, got meta$",
        ),
        (
            lambda x: prox.l1(x, 1, step=x.int()),
            TypeError,
            "^step must have a floating-point dtype, got torch.int32$",
        ),
        (lambda x: prox.l1(x.int(), 1), TypeError, "^x must have a floating-point dtype, got torch.int32$"),
        (
            lambda x: prox.l1(x.to_sparse(), 1),
            TypeError,
            "^x must be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            lambda x: prox.l1(x.cfloat(), 1),
            TypeError,
            "^x must have a floating-point dtype, got torch.complex64$",
        ),
        (lambda x: prox.l1([1.0], 1), TypeError, "^x must be a torch.Tensor, got list$"),
        (lambda x: prox.group_lasso(x, 1, dim=2), ValueError, r"^dim must be in \[-2, 2\), got 2$"),
        (lambda x: prox.group_lasso(x, 1, dim=0.5), TypeError, "^dim must be an int, got float$"),
        (
            lambda x: prox.group_l0(x, 1, 1, 4),
            ValueError,
            "^run must divide the 6 entries of dimension 1, got 4$",
        ),
        (
            lambda x: prox.group_l0(x[0, 0], 1),
            ValueError,
            "^x must have a dimension to have groups, got a scalar$",
        ),
        (lambda x: prox.group_l0(x, 1, 1, 0), ValueError, r"^run must be in \[1, "),
        (lambda x: prox.top_k(x, 25), ValueError, "^k must be at most the 24 elements of x, got 25$"),
        (lambda x: prox.top_k(x, -1), ValueError, r"^k must be in \[0, "),
        (lambda x: prox.top_k(x, 1.0), TypeError, "^k must be an int, got float$"),
        (lambda x: prox.group_top_k(x, 5, 0), ValueError, "^k must be at most the 4 groups of x, got 5$"),
        (
            lambda x: prox.transformed_l1_group(x, 1, 1, 1.5),
            ValueError,
            r"^group_share must be in \[0, 1\], got 1.5$",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 6))
