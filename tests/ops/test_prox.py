"""l0kernels.prox against the formula in float64: native code, plain torch, any dtype, layout and number."""

import copy
import dataclasses
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import l0kernels as l0
from l0kernels import _ops, prox, reference
from l0kernels._native import native
from op_checks import tolerance

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = {
    "l1": prox.L1(0.3),
    "l0": prox.L0(0.1),
    "l0_l1": prox.L0L1(0.1, 0.2),
    "l0_l2": prox.L0L2(0.1, 0.5),
    "tl1 small": prox.TransformedL1(1e-4),
    "tl1 soft": prox.TransformedL1(0.2, 1.5),
    "tl1 hard": prox.TransformedL1(0.2, 0.1),
    "lasso": prox.GroupLasso(0.8),
    "lasso columns": prox.GroupLasso(0.8, dim=1, by_size=True),
    "l0 groups": prox.GroupL0(0.8, dim=-1),
    "sparse group": prox.SparseGroupLasso(0.1, 0.5, dim=1),
    "tl1 group": prox.TransformedL1Group(0.4, 1.0, 0.7),
    "tl1 group columns": prox.TransformedL1Group(0.4, 0.2, 0.3, dim=1),
    "top": prox.TopK(3),
    "top groups": prox.GroupTopK(2, dim=0),
}
GROUPED = [name for name, r in NAMES.items() if r.dim is not None]
each = pytest.mark.parametrize("name", NAMES)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def away_from_jumps(regulariser, x, step):
    """Where a rounding of x or of the step changes nothing but the last bits: no jump is near."""
    exact = regulariser.formula(x.double(), step)
    eps = 64 * torch.finfo(wide(x.dtype)).eps
    apart = torch.zeros_like(x, dtype=torch.bool)
    for factor in (1 - eps, 1 + eps):
        other = regulariser.formula(x.double() * factor, step)
        apart |= (exact == 0) != (other == 0)
    return ~apart


def assert_prox(regulariser, x, step=1.0, what=""):
    """Out of place and in place; zeros where float64 has them."""
    before = x.clone()
    got = regulariser.prox(x, step)
    assert torch.equal(x, before) or x.isnan().any()
    assert (got.shape, got.dtype, got.requires_grad) == (x.shape, x.dtype, False)
    own = x.clone(memory_format=torch.preserve_format)
    assert regulariser.prox(own, step, out=own) is own
    assert torch.equal(own, got) or x.isnan().any(), what
    step64 = step.double() if isinstance(step, torch.Tensor) else step
    exact = regulariser.formula(x.double(), step64)
    eager = regulariser.formula(x, step)
    sure = away_from_jumps(regulariser, x, step64)
    assert torch.equal((got == 0) & sure, (exact.to(x.dtype) == 0) & sure), what
    pairs = [t[sure] for t in (got, eager, exact)]
    if pairs[0].numel():
        error = (pairs[0].double() - pairs[2]).abs().max().item()
        assert error <= tolerance(pairs[1], pairs[2], x.dtype), what
    return got


@pytest.mark.covering(2)
@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 48), (5, 6, 3, 3), (3, 4, 70), (130, 9)])
def test_values(name, dtype, shape, backend):
    regulariser = NAMES[name]
    if isinstance(regulariser, prox.TopK | prox.GroupTopK) and shape == (1, 1):
        return
    assert_prox(regulariser, torch.randn(shape).to(dtype), what=f"{name} {shape}")


@pytest.mark.parametrize("name", [name for name in NAMES if "top" not in name])
@pytest.mark.parametrize("shape", [(1, 70), (70, 1), (19, 130), (37, 65), (9, 4097), (545, 67)])
def test_rows_and_columns_that_fill_no_block(name, shape, isa):
    """Several groups or rows are read at once, and some are left over."""
    assert_prox(NAMES[name], torch.randn(shape), what=f"{name} {shape}")
    memory = torch.randn(math.prod(shape) + 1)
    assert_prox(NAMES[name], memory[1:].view(shape), what=f"{name} {shape}, unaligned")


MAGNITUDES = {
    "distinct": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float(),
    "one value": lambda n: torch.full((n,), -2.0),
    "mostly zeros": lambda n: torch.where(torch.rand(n) < 0.9, 0.0, torch.randn(n)),
    "strange": lambda n: torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-42, -1.0]).repeat(n)[:n],
}


class TestTopK:
    """Native code selects by the bits; which of equal elements stay is the first ones, as in the formula."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("values", MAGNITUDES)
    def test_is_the_formula(self, dtype, values, isa):
        for n in (1, 15, 17, 64, 2047, 2049, 70000):
            x = MAGNITUDES[values](n).to(dtype)
            for k in {0, 1, n // 10, n // 2, n - 1, n}:
                regulariser = prox.TopK(k)
                expected = regulariser.formula(x, 1.0)
                assert torch.equal(regulariser.prox(x).nan_to_num(5.0), expected.nan_to_num(5.0)), (n, k)
                own = x.clone()
                regulariser.prox_(own)
                assert torch.equal(own.nan_to_num(5.0), expected.nan_to_num(5.0)), (n, k)

    @pytest.mark.parametrize("n_threads", [1, 2, 3])
    def test_what_a_sample_does_not_show(self, n_threads, threads, isa):
        """Every 4th of 4 * 65,536 elements is another than the rest, and the sample is all of those."""
        threads(n_threads)
        for inside, outside in ((1.0, 1e-3), (1e-3, 1.0)):
            x = torch.randn(65536, 4) * outside
            x[:, 0] = torch.randn(65536) * inside
            for k in (10, 60000, 70000, 200000):
                regulariser = prox.TopK(k)
                got = regulariser.prox(x)
                assert torch.equal(got, regulariser.formula(x, 1.0)), k
                assert (got != 0).sum() == k

    @pytest.mark.skipif(native is None, reason="l0kernels._C was not built")
    @pytest.mark.parametrize(
        "wrong", [{3: 64}, {5: (1, 2, 3)}, {6: (1, 0.1, 0.1)}, {8: 7.0}, {8: -1.0}, {8: 1e300}]
    )
    def test_native_code_takes_no_more_than_there_are(self, wrong):
        """Of (x, y, type, step, group_step, sizes, before, group, k, after)."""
        x = torch.randn(6)
        none = (0, 0.0, 0.0)
        call = [x.data_ptr(), x.data_ptr(), 0, 0, 0, (1, 1, 6), none, 3, 2.0, none]
        native.prox([tuple(call)], 1)
        for place, value in wrong.items():
            call[place] = value
        with pytest.raises(ValueError, match="the k largest are at most all elements"):
            native.prox([tuple(call)], 1)

    def test_among_equals_the_first_index_stays(self, isa):
        x = torch.ones(6, 9).t()
        assert torch.equal(prox.TopK(5).prox(x), prox.TopK(5).formula(x, 1.0))


@each
@pytest.mark.parametrize("n", [1, 31, 1023, 1024, 1025, 5000])
def test_rows_of_any_length(name, n, backend):
    x = torch.randn(4, n) * 3
    assert_prox(NAMES[name], x if n > 1 else torch.randn(4, 2))


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_by_element(name, dtype, backend):
    x = torch.randn(33, 20).to(dtype)
    step = (torch.rand(33, 20) + 0.05).to(dtype)
    assert_prox(NAMES[name], x, step)
    assert torch.allclose(
        NAMES[name].prox(x, torch.tensor(0.5)).float(), NAMES[name].prox(x, 0.5).float(), rtol=1e-2, atol=1e-5
    )


@each
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps", "expanded", "offset"])
def test_any_layout(name, layout, backend):
    x = {
        "transposed": lambda: torch.randn(6, 9).t(),
        "channels_last": lambda: torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last),
        "gaps": lambda: torch.randn(12, 18)[::2, ::3],
        "expanded": lambda: torch.randn(6, 1).expand(6, 5),
        "offset": lambda: torch.randn(6 * 9 + 1)[1:].view(6, 9),
    }[layout]()
    regulariser = NAMES[name]
    expected = regulariser.prox(x.contiguous())
    # Native code takes no gaps: the formula has other roundings.
    same = torch.allclose if layout in ("gaps", "expanded") else torch.equal
    assert same(regulariser.prox(x), expected)
    step = torch.rand(x.shape) + 0.1
    assert same(regulariser.prox(x, step), regulariser.prox(x.contiguous(), step))
    if layout != "expanded":
        whole = (
            x.clone(memory_format=torch.preserve_format)
            if layout != "gaps"
            else torch.zeros(12, 18)[::2, ::3].copy_(x)
        )
        regulariser.prox_(whole)
        assert same(whole, expected)


def test_gaps_are_left_alone(backend):
    memory = torch.ones(8, 8)
    prox.L0(10).prox_(memory[:, ::2])
    assert memory.sum() == 32
    assert (memory[:, 1::2] == 1).all()


@each
def test_out(name, backend):
    x, out = torch.randn(6, 9), torch.randn(6, 9)
    assert NAMES[name].prox(x, 0.7, out) is out
    assert torch.equal(out, NAMES[name].prox(x, 0.7))
    other = torch.empty(9, 6).t()
    assert torch.equal(NAMES[name].prox(x, 0.7, other), out)


@each
def test_several_tensors(name, backend):
    tensors = [
        torch.randn(6, 9),
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(9, 6).t(),
        torch.randn(4, 4).bfloat16(),
    ]
    expected = [NAMES[name].prox(x, step) for x, step in zip(tensors, (0.1, 0.2, 0.3, 0.4), strict=True)]
    same = [NAMES[name].prox(x, 0.5) for x in tensors]
    both = [[t.clone(memory_format=torch.preserve_format) for t in tensors] for _ in range(2)]
    NAMES[name].prox_(both[0], [0.1, 0.2, 0.3, 0.4])
    NAMES[name].prox_(both[1], 0.5)
    assert all(map(torch.equal, both[0], expected))
    assert all(map(torch.equal, both[1], same))


@pytest.mark.parametrize("name", [name for name in NAMES if "top" not in name])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_magnitude(name, scale, backend):
    x = torch.randn(20, 30) * scale
    exact = NAMES[name].formula(x.double(), 1.0)
    assert torch.allclose(NAMES[name].prox(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if "top" not in name])
def test_what_is_not_finite(name, dtype, backend):
    x = torch.randn(6, 40).to(dtype)
    x[0, 3], x[1, 2], x[2, 1], x[3] = math.nan, math.inf, -math.inf, 0.0
    x[4, 5:9] = -0.0
    for step in (1.0, torch.ones(6, 40)):
        got, expected = NAMES[name].prox(x, step), NAMES[name].formula(x, step)
        assert got[0, 3].isnan()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())
        assert (got[3, [0, *range(4, 40)]] == 0).all() or expected[3].isnan().any()


@pytest.mark.parametrize("name", GROUPED)
def test_runs(name, backend):
    regulariser = copy.copy(NAMES[name])
    if not hasattr(regulariser, "run") or "top" in name:
        return
    object.__setattr__(regulariser, "run", 3)
    for shape in ((6, 12), (9, 6), (3, 6, 5), (3, 3), (6, 300)):
        if shape[regulariser.dim] % 3 == 0:
            assert_prox(regulariser, torch.randn(shape))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing(name, shape, backend):
    if "top" not in name:
        assert NAMES[name].prox(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("name", [name for name in NAMES if "top" not in name])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(name, dtype, isa):
    x = (torch.randn(40, 70) * 2).to(dtype)
    step = torch.rand(40, 70) + 0.1
    assert_prox(NAMES[name], x)
    assert_prox(NAMES[name], x, step.to(wide(dtype)))


@pytest.mark.skipif(native is None, reason="no native kernels")
@pytest.mark.parametrize("name", [name for name in NAMES if "top" not in name])
@pytest.mark.parametrize("shape", [(300, 400), (1000, 3, 64), (2, 70_000), (70_000, 3), (95, 8193)])
def test_threads_change_nothing(name, shape, threads):
    x = torch.randn(shape)
    with l0.use_backend("cpp"):
        one = NAMES[name].prox(x)
        threads(3)
        assert torch.equal(NAMES[name].prox(x), one)


@pytest.mark.parametrize("a", [0.05, 0.5, 1.0, 4.0, 1e3])
@pytest.mark.parametrize("ratio", [1e-5, 0.003, 0.01, 0.06, 0.1, 0.3, 0.99, 1.01, 5.0])
def test_transformed_l1_between_the_regimes(a, ratio, backend):
    """lam is `ratio` of where one becomes the other; the shrinkage itself is right, not x less it alone."""
    lam = ratio * a * a / (2 * (a + 1))
    t = reference.prox.tl1_threshold(lam, a)
    x = t * (1.02 + 3 * torch.rand(5000))
    for step in (1.0, torch.ones_like(x)):
        got = prox.transformed_l1(x, lam, a, step=step)
        exact = reference.prox.transformed_l1(x.double(), lam, a)
        eager = reference.prox.transformed_l1(x, lam, a)
        error, limit = (got - exact).abs().max(), (eager - exact).abs().max()
        assert error <= 2 * limit + 8 * torch.finfo(torch.float32).eps * x.max()


@pytest.mark.parametrize(
    ("call", "regulariser"),
    [
        (lambda x, **k: prox.l1(x, 0.3, **k), prox.L1(0.3)),
        (lambda x, **k: prox.l0(x, 0.3, **k), prox.L0(0.3)),
        (lambda x, **k: prox.l0_l1(x, 0.3, 0.1, **k), prox.L0L1(0.3, 0.1)),
        (lambda x, **k: prox.l0_l2(x, 0.3, 0.1, **k), prox.L0L2(0.3, 0.1)),
        (lambda x, **k: prox.transformed_l1(x, 0.3, 0.5, **k), prox.TransformedL1(0.3, 0.5)),
        (lambda x, **k: prox.group_lasso(x, 0.3, 1, **k), prox.GroupLasso(0.3, 1)),
        (lambda x, **k: prox.group_l0(x, 0.3, 1, 2, **k), prox.GroupL0(0.3, 1, 2)),
        (lambda x, **k: prox.sparse_group_lasso(x, 0.3, 0.2, 1, **k), prox.SparseGroupLasso(0.3, 0.2, 1)),
        (
            lambda x, **k: prox.transformed_l1_group(x, 0.3, 1.0, 0.2, 1, **k),
            prox.TransformedL1Group(0.3, 1.0, 0.2, 1),
        ),
        (lambda x, **k: prox.top_k(x, 5, **k), prox.TopK(5)),
        (lambda x, **k: prox.group_top_k(x, 2, 1, **k), prox.GroupTopK(2, 1)),
    ],
)
def test_functions_are_those_of_the_objects(call, regulariser, backend):
    x, step = torch.randn(5, 6), torch.rand(5, 6) + 0.1
    assert torch.equal(call(x), regulariser.prox(x))
    assert torch.equal(call(x, step=0.1), regulariser.prox(x, 0.1))
    assert torch.equal(call(x, step=step), regulariser.prox(x, step))
    own = x.clone()
    assert call(own, out=own) is own
    assert torch.equal(own, regulariser.prox(x))


@each
def test_objects_are_values(name):
    regulariser = NAMES[name]
    assert pickle.loads(pickle.dumps(regulariser)) == regulariser == copy.deepcopy(regulariser)
    assert hash(regulariser) == hash(copy.copy(regulariser))
    for field in dataclasses.fields(regulariser):
        with pytest.raises(AttributeError):
            setattr(regulariser, field.name, 2)


VALUES = {
    "l1": lambda x: 0.3 * x.abs().sum(),
    "l0": lambda x: 0.1 * (x != 0).sum(),
    "l0_l1": lambda x: 0.1 * (x != 0).sum() + 0.2 * x.abs().sum(),
    "l0_l2": lambda x: 0.1 * (x != 0).sum() + 0.25 * x.square().sum(),
    "tl1 hard": lambda x: 0.2 * (1.1 * x.abs() / (0.1 + x.abs())).sum(),
    "lasso": lambda x: 0.8 * x.norm(dim=1).sum(),
    "lasso columns": lambda x: 0.8 * math.sqrt(len(x)) * x.norm(dim=0).sum(),
    "l0 groups": lambda x: 0.8 * (x.norm(dim=0) != 0).sum(),
    "sparse group": lambda x: 0.1 * x.abs().sum() + 0.5 * x.norm(dim=0).sum(),
    "tl1 group": lambda x: 0.12 * (2 * x.abs() / (1 + x.abs())).sum() + 0.28 * x.norm(dim=1).sum(),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_penalties(name):
    x = torch.randn(6, 5, dtype=torch.float64) * (torch.rand(6, 5) < 0.7)
    x[2] = 0
    assert torch.allclose(NAMES[name].value(x).double(), VALUES[name](x).double())
    assert NAMES[name].value(x.bfloat16()).dtype == torch.float32
    if "l0" not in name:
        x.requires_grad_()
        (grad,) = torch.autograd.grad(NAMES[name].value(x), x)
        (expected,) = torch.autograd.grad(VALUES[name](x), x)
        assert torch.allclose(grad[x != 0], expected[x != 0])


def test_values_of_projections():
    x = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]])
    assert [prox.TopK(k).value(x).item() for k in (2, 3)] == [math.inf, 0.0]
    assert [prox.GroupTopK(k).value(x).item() for k in (1, 2)] == [math.inf, 0.0]


def test_autograd_sees_that_a_parameter_has_changed(backend):
    weight, x = nn.Parameter(torch.randn(3, 4)), torch.randn(2, 4, requires_grad=True)
    y = (x @ weight.t()).sum()
    prox.L1(0.1).prox_(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_no_gradient_is_lost_in_silence(backend):
    x = torch.randn(3, requires_grad=True)
    message = r"^x must need no gradient, which does not flow through l0kernels\.prox"
    for call in (lambda: prox.l1(x, 0.1), lambda: prox.l1(x * 2, 0.1), lambda: prox.L1(0.1).prox_(x * 2)):
        with pytest.raises(RuntimeError, match=message):
            call()
    with torch.no_grad():
        assert not prox.l1(x, 0.1).requires_grad
    prox.L1(0.1).prox_(x)


def test_compiled(backend):
    x = torch.randn(6, 8)
    for regulariser in (prox.TransformedL1(0.2), prox.SparseGroupLasso(0.1, 0.4, 1)):
        compiled = torch.compile(regulariser.prox, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, 0.5), regulariser.prox(x, 0.5))
        own = x.clone()
        torch.compile(partial(regulariser.prox, out=own), backend="aot_eager", fullgraph=True)(own, 0.5)
        assert torch.equal(own, regulariser.prox(x, 0.5))


def test_under_vmap(backend):
    x = torch.randn(3, 6, 8)
    got = torch.vmap(prox.GroupLasso(1.0).prox)(x)
    assert torch.equal(got, torch.stack([prox.GroupLasso(1.0).prox(one) for one in x]))


def test_opcheck(backend):
    if not l0._registry.has(backend, "prox"):
        return
    x = torch.randn(4, 6)
    call = _ops.ProxCall(x, torch.rand(4, 6), None, [1.0, 0.1, 0.2], [1.0, 0.3], [3.0, 0.1, 1.0], [4, 6, 1])
    torch.library.opcheck(torch.ops.l0kernels.prox.default, (*call, backend))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: prox.L1(-1), ValueError, "^lam must be >= 0, got -1$"),
        (lambda x: prox.L0(math.nan), ValueError, "^lam must be finite, got nan$"),
        (lambda x: prox.L0L1(1, -2), ValueError, "^l1 must be >= 0, got -2$"),
        (lambda x: prox.L0L2(1, "2"), TypeError, "^l2 must be a number, got str$"),
        (lambda x: prox.TransformedL1(1, 0), ValueError, r"^a must be in \(0, 1e30\], got 0"),
        (lambda x: prox.TransformedL1Group(1, 1, -0.1), ValueError, "^group_share must be >= 0, got -0.1$"),
        (
            lambda x: prox.TransformedL1Group(1, 1, 1.1),
            ValueError,
            r"^group_share must be in \[0, 1\], got 1.1$",
        ),
        (lambda x: prox.GroupLasso(1, run=0), ValueError, r"^run must be in \[1, "),
        (lambda x: prox.TopK(-1), ValueError, r"^k must be in \[0, "),
        (lambda x: prox.TopK(1.5), TypeError, "^k must be an int, got float$"),
        (lambda x: prox.GroupLasso(1, 2).prox(x), ValueError, r"^dim must be in \[-2, 2\), got 2$"),
        (lambda x: prox.GroupL0(1, 1, 4).prox(x), ValueError, "^run must divide the 6 entries"),
        (lambda x: prox.TopK(25).prox(x), ValueError, "^k must be at most the 24 elements of x, got 25$"),
        (lambda x: prox.GroupTopK(5).prox(x), ValueError, "^k must be at most the 4 groups of x, got 5$"),
        (
            lambda x: prox.L1(1).prox(x.int()),
            TypeError,
            "^x must have a floating-point dtype, got torch.int32$",
        ),
        (lambda x: prox.L1(1).prox(x.to_sparse()), TypeError, "^x must be a dense tensor, got layout"),
        (
            lambda x: prox.L1(1).prox(x.cfloat()),
            TypeError,
            "^x must have a floating-point dtype, got torch.complex64$",
        ),
        (
            lambda x: prox.L1(1).prox(x.to(torch.float8_e4m3fn)),
            TypeError,
            "^x must be float32, float64, bfloat16 or",
        ),
        (lambda x: prox.L1(1).prox(3.0), TypeError, "^x must be a torch.Tensor, got float$"),
        (lambda x: prox.L1(1).prox(x, -1), ValueError, "^step must be >= 0, got -1$"),
        (lambda x: prox.L1(1).prox(x, torch.ones(6)), ValueError, "^step must be a number or have shape"),
        (
            lambda x: prox.L1(1).prox_([x, x], [1.0]),
            ValueError,
            "^step must be one or one per tensor, 2, got 1$",
        ),
        (
            lambda x: prox.L1(1).prox(x, out=x[0]),
            ValueError,
            r"^out must have shape \(4, 6\) \(that of x\), got",
        ),
        (
            lambda x: prox.L1(1).prox(x, out=x.double()),
            TypeError,
            "^out must have the dtype of x, torch.float32, got",
        ),
        (
            lambda x: prox.L1(1).prox(x, out=x.to("meta")),
            ValueError,
            "^out must be on cpu, the device of x, got meta",
        ),
    ],
)
def test_wrong_arguments(call, error, message, backend):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 6))


def test_memory_that_was_given_back(backend):
    x = torch.randn(8)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^x must have memory for its"):
        prox.L1(1).prox_(x)


def test_zeros_stay_zeros_under_quantisation():
    """A symmetric quantiser, zero point 0, as torch.ao's fake-quantise computes it."""
    w = prox.GroupLasso(3.0, dim=1).prox(prox.L1(0.3).prox(torch.randn(20, 16)))
    assert 0 < (w == 0).sum() < w.numel()
    scale = (w.abs().max() / 127).item()
    quantised = torch.fake_quantize_per_tensor_affine(w, scale, 0, -128, 127)
    assert torch.equal(quantised == 0, (w == 0) | (w.abs() <= scale / 2))
    assert (quantised[:, (w == 0).all(0)] == 0).all()
