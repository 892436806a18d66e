"""Products that gather: forward, every gradient and the chain against the dense formula in float64."""

import itertools

import pytest
import torch

from l0kernels._calls import L0LinearCall, LinearCall, MlpCall, Wanted
from l0kernels._gates import DEFAULT_DIST, Gates, HardConcrete, round_up
from l0kernels.reference.gates import sample_gates
from l0kernels.reference.mlp import ACTIVATIONS
from l0kernels.triton_kernels import gather
from op_checks import assert_near, make_z, wanted
from triton_device import DEVICE, DTYPES

SIDES = list(itertools.product((False, True), repeat=2))
SHAPES = [
    (1, 1, 1),
    (17, 33, 70),
    (100, 45, 67),
    (16, 128, 64),
    (0, 5, 9),
    (3, 0, 4),
    (3, 4, 0),
    (65, 20, 131),
]


@pytest.fixture(autouse=True)
def poison(seeded):
    """Memory that no kernel wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, in order."""
    names = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

        def __getattr__(self, attribute):
            return getattr(self.kernel, attribute)

    for name in ("forward_kernel", "sampling_forward_kernel", "backward_kernel", "sum_parts_kernel"):
        monkeypatch.setattr(gather, name, Counted(name, getattr(gather, name)))
    return names


def gate_of(z, plain=False):
    """[z, index, count] on DEVICE, its extent the whole capacity if plain."""
    _, index, count, _ = Gates.from_z(z)
    if plain:
        count[1] = round_up(len(z))
    return [z.to(DEVICE), index.to(DEVICE), count.to(DEVICE)]


def scattered(shape, dtype, layout):
    """A random matrix: contiguous, transposed, or every other row and column of a larger one."""
    if layout == "transposed":
        return torch.randn(shape[::-1], dtype=dtype).t()
    if layout == "strided":
        return torch.randn(2 * shape[0], 2 * shape[1], dtype=dtype)[::2, ::2]
    return torch.randn(shape, dtype=dtype)


def on_device(t):
    """t with its strides on DEVICE."""
    if t is None or DEVICE == "cpu":
        return t
    base = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
    return base.copy_(t)


def dense_linear(x, w, b, z_in, z_out, scale_out):
    y = x if z_in is None else x * z_in
    y = y.to(w.dtype) @ w.t()
    y = y if b is None else y + b
    if z_out is None:
        return y
    return (y * z_out).to(w.dtype) if scale_out else y.masked_fill(z_out == 0, 0.0)


def dense(formula, tensors, dy, dtype):
    """Result and gradients of a formula of tensors, None among them, in dtype; gates at least in float32."""
    leaves = [
        None if t is None else t.to(dtype if t.dtype == dy.dtype else torch.promote_types(dtype, t.dtype))
        for t in tensors
    ]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    y = formula(*leaves).to(dtype)
    y.backward(dy.to(dtype))
    return y.detach(), [
        None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for t in leaves
    ]


def check(got, formula, tensors, dy, dtype, names, wants=()):
    """Each of ``got`` against the formula; wants: name -> where a gate's gradient is expected."""
    y, grads = dense(formula, tensors, dy, torch.float64)
    y_eager, grads_eager = dense(formula, tensors, dy, dtype)
    results = zip(names, got, [y, *grads], [y_eager, *grads_eager], strict=True)
    for name, value, exact, eager in results:
        if exact is None:
            assert value is None, name
            continue
        value = value.cpu()
        if name in wants:
            assert torch.equal(value != 0, (value != 0) & wants[name]), f"{name}: not zero where it must be"
            exact, eager = exact.where(wants[name], 0.0), eager.where(wants[name], 0.0)
        assert_near(value, eager, exact, dtype, name)


LINEAR = ("y", "dx", "dw", "db", "dz_in", "dz_out")


def check_linear(
    shape, dtype, kinds, *, bias=True, scale_out=True, full=False, plain=False, layout="", storage=None
):
    """Forward and all gradients; closed columns of x, W, b and dy hold NaN, for nobody may read them."""
    M, N, K = shape
    storage = storage or dtype
    x, dy = scattered((M, K), storage, layout), scattered((M, N), dtype, layout)
    w, b = scattered((N, K), storage, layout) / max(1, K) ** 0.5, torch.randn(2 * N, dtype=storage)[::2]
    b = b if bias else None
    z_in, z_out = (None if kind is None else make_z(kind, n) for kind, n in zip(kinds, (K, N), strict=True))
    in_gate, out_gate = (None if z is None else gate_of(z, plain) for z in (z_in, z_out))
    clean = [x, w, b, z_in, z_out]
    formula = lambda x, w, b, z_in, z_out: dense_linear(x, w, b, z_in, z_out, scale_out)  # noqa: E731
    dirty = [on_device(None if t is None else t.clone()) for t in (x, w, b, dy)]
    for z, targets in ((z_in, (0, 1)), (z_out, (1, 2, 3))):
        for i in targets:
            if z is not None and dirty[i] is not None:
                closed = (z == 0).to(DEVICE)
                if i == 1 and z is z_out:
                    dirty[i][closed] = torch.nan
                else:
                    dirty[i][..., closed] = torch.nan
    x_, w_, b_, dy_ = dirty
    call = LinearCall(x_, w_, b_, in_gate, out_gate, scale_out, dtype)
    y = gather.linear_forward(call)
    assert y.dtype == dtype
    needs = [True, True, True, z_in is not None, z_out is not None and scale_out]
    grads = gather.linear_backward(call, dy_, Wanted([full] * 2, needs, None))
    if z_out is not None and not scale_out:
        assert grads[4] is None
        clean, names = clean[:4], LINEAR[:5]
        grads, formula = grads[:4], lambda x, w, b, z: dense_linear(x, w, b, z, z_out, False)
    else:
        names = LINEAR
    wants = {n: wanted(z, full) for n, z in (("dz_in", z_in), ("dz_out", z_out)) if z is not None}
    check([y, *grads], formula, clean, dy, dtype, names, wants)
    if z_out is not None:
        assert not y[:, z_out.to(DEVICE) == 0].any()


@pytest.mark.covering(1)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, sides):
    check_linear(shape, torch.float32, ["mixed" if given else None for given in sides])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_in_half_precision(dtype, bias):
    check_linear((40, 37, 90), dtype, ("mixed", "mixed"), bias=bias)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["open", "closed", "few"])
@pytest.mark.parametrize("plain", [False, True])
def test_linear_with_gates_alike(kind, plain):
    check_linear((20, 50, 70), torch.float32, (kind, kind), plain=plain)
    check_linear((20, 50, 70), torch.float32, (kind, "mixed"), plain=plain)
    check_linear((20, 50, 70), torch.float32, ("mixed", kind), plain=plain)


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("wide", [False, True])
def test_linear_of_any_strides(layout, wide, monkeypatch):
    monkeypatch.setattr(gather, "_wide", lambda *_: wide)
    check_linear((20, 35, 70), torch.float32, ("mixed", "mixed"), layout=layout)


def test_linear_with_a_callers_own_gates():
    check_linear((20, 35, 70), torch.float32, ("wild", "wild"), full=True)


def test_linear_that_only_selects_outputs():
    check_linear((20, 35, 70), torch.float32, ("mixed", "mixed"), scale_out=False)


def test_linear_casts_what_it_reads():
    check_linear((20, 35, 70), torch.float16, ("mixed", "mixed"), storage=torch.float32)


@pytest.mark.parametrize("tile", gather.FORWARD_TILES, ids=str)
def test_forward_tiles(tile, monkeypatch):
    monkeypatch.setattr(gather, "FORWARD_TILES", (tile,))
    check_linear((70, 69, 130), torch.float32, ("mixed", "mixed"))


@pytest.mark.parametrize("tile", [gather.LARGE_TILE, *gather.SMALL_TILES], ids=str)
def test_backward_tiles(tile, monkeypatch):
    monkeypatch.setattr(gather, "_backward_tile_for", lambda *_: tile)
    check_linear((70, 69, 130), torch.float32, ("mixed", "mixed"))


def test_an_expanded_gradient():
    x, w = torch.randn(5, 9, device=DEVICE), torch.randn(7, 9, device=DEVICE)
    dy = torch.ones(1, 1, device=DEVICE).expand(5, 7)
    call = LinearCall(x, w, None, None, None, False, torch.float32)
    dx, dw, *_ = gather.linear_backward(
        call, dy, Wanted([False] * 2, [True, True, False, False, False], None)
    )
    torch.testing.assert_close(dx, w.sum(0).expand(5, 9))
    torch.testing.assert_close(dw, x.sum(0).expand(7, 9))


@pytest.mark.parametrize("needs", [[i == j for j in range(5)] for i in range(5)] + [[False] * 5], ids=str)
def test_only_what_is_needed(needs, launches):
    dy, *tensors = (torch.randn(s, device=DEVICE) for s in ((6, 7), (6, 9), (7, 9), (7,)))
    call = LinearCall(*tensors, *(gate_of(make_z("mixed", n)) for n in (9, 7)), True, torch.float32)
    every = gather.linear_backward(call, dy, Wanted([False] * 2, [True] * 5, None))
    some = gather.linear_backward(call, dy, Wanted([False] * 2, needs, None))
    assert len(launches) == 1 + any(needs)
    for value, full, needed in zip(some, every, needs, strict=True):
        if needed:
            torch.testing.assert_close(value, full)
        else:
            assert value is None


def test_gradients_of_log_alpha():
    dist = HardConcrete(0.5, -0.2, 1.3)
    dy, *tensors = (torch.randn(s, device=DEVICE) for s in ((6, 70), (6, 90), (70, 90), (70,)))
    gates = [gate_of(make_z("mixed", n)) for n in (90, 70)]
    call = LinearCall(*tensors, *gates, True, torch.float32)
    for z, dz, dlog in zip(
        (gates[0][0], gates[1][0]),
        *(gather.linear_backward(call, dy, Wanted([False] * 2, [True] * 5, d))[3:] for d in (None, dist)),
        strict=True,
    ):
        s = (z - dist.gamma) / (dist.zeta - dist.gamma)
        slope = (dist.zeta - dist.gamma) / dist.beta * s * (1 - s)
        torch.testing.assert_close(dlog, torch.where((z > 0) & (z < 1), dz * slope, 0.0))
        assert dlog.any()


@pytest.mark.covering(1)
@pytest.mark.parametrize("sides", SIDES[1:])
@pytest.mark.parametrize("shape", [(17, 33, 70), (50, 70, 150), (3, 1, 128), (0, 5, 9), (4, 129, 7)], ids=str)
def test_sampling_inside_the_product(shape, sides, launches):
    M, N, K = shape
    rank = {17: 0, 50: 1}.get(M, 2**32 - 1)
    seed = torch.randint(2**62, (1,))
    x, w, b = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    alphas = [torch.randn(n) if given else None for given, n in zip(sides, (K, N), strict=True)]
    given = [a for a in alphas if a is not None]
    tensors = (on_device(t) for t in (x, w, b, *alphas, seed))
    call = L0LinearCall(*tensors, DEFAULT_DIST, torch.float32)
    y, z, index, count = gather.l0_linear_forward(call, rank, 0.5)
    assert launches == ["sampling_forward_kernel"]
    expected = sample_gates(given, seed=seed, rank=rank)
    sizes = [len(a) for a in given]
    for gates, z_, index_, count_ in zip(
        expected,
        z.cpu().split(sizes),
        index.cpu().split([round_up(n) for n in sizes]),
        count.cpu().split(2),
        strict=True,
    ):
        torch.testing.assert_close(z_, gates.z)
        assert torch.equal(index_, gates.index)
        assert count_[0] == gates.count[0]
        plain = int(count_[0]) > 0.5 * len(z_)
        assert count_[1] == (round_up(len(z_)) if plain else gates.count[1])
    zs = iter(gates.z for gates in expected)
    z_in, z_out = (next(zs) if given else None for given in sides)
    exact = dense_linear(*(None if t is None else t.double() for t in (x, w, b, z_in, z_out)), True)
    assert_near(y.cpu(), dense_linear(x, w, b, z_in, z_out, True), exact, torch.float32, "y")


def test_a_long_gate_vector_is_sampled_inside():
    n = gather.MAX_GATES
    x, w, alpha = torch.randn(2, n), torch.randn(3, n) / n**0.5, torch.randn(n)
    seed = torch.tensor([-5])
    tensors = (on_device(t) for t in (x, w, None, alpha, None, seed))
    y, z, index, _ = gather.l0_linear_forward(L0LinearCall(*tensors, DEFAULT_DIST, torch.float32))
    gates = sample_gates(alpha, seed=seed)
    torch.testing.assert_close(z.cpu(), gates.z)
    assert torch.equal(index.cpu(), gates.index)
    torch.testing.assert_close(y.cpu(), (x * gates.z) @ w.t(), rtol=1e-4, atol=1e-4)


def test_a_nan_is_an_open_gate():
    alpha = torch.zeros(5)
    alpha[3] = torch.nan
    x, w, seed = torch.ones(2, 5), torch.ones(3, 5), torch.tensor([1])
    tensors = (on_device(t) for t in (x, w, None, alpha, None, seed))
    y, z, index, count = gather.l0_linear_forward(L0LinearCall(*tensors, DEFAULT_DIST, torch.float32))
    assert torch.equal(z.isnan(), alpha.isnan().to(DEVICE))
    assert 3 in index[: int(count[0])]
    assert y.isnan().all()


def check_mlp(
    sizes, M, dtype, activation, kinds, *, bias=True, full=False, needs=None, launches=None, dist=None
):
    depth = len(sizes) - 1
    x, dy = torch.randn(M, sizes[0], dtype=dtype), torch.randn(M, sizes[-1], dtype=dtype)
    pairs = list(itertools.pairwise(sizes))
    weights = [torch.randn(n, k, dtype=dtype) / max(1, k) ** 0.5 for k, n in pairs]
    biases = [torch.randn(n, dtype=dtype) if bias else None for _, n in pairs]
    zs = [None if kind is None else make_z(kind, n) for kind, n in zip(kinds, sizes, strict=False)]

    def formula(x, *tensors):
        weights, biases, zs = (tensors[i * depth : (i + 1) * depth] for i in range(3))
        for i, (w, b, z) in enumerate(zip(weights, biases, zs, strict=True)):
            h = ACTIVATIONS[activation](x) if i else x
            x = dense_linear(h if z is None else (h * z).to(h.dtype), w, b, None, None, False)
        return x

    gates = [None if z is None else gate_of(z) for z in zs]
    params = [on_device(w) for w in weights], [on_device(b) for b in biases]
    call = MlpCall(on_device(x), *params, gates, activation, dtype, False)
    y, saved = gather.mlp_forward(call)
    assert [(tuple(a.shape), a.dtype) for a in saved] == [((M, n), dtype) for n in sizes[1:-1]]
    needs = [True] * (1 + 2 * depth) + [z is not None for z in zs] if needs is None else needs
    grads = gather.mlp_backward(call, on_device(dy), saved, Wanted([full] * depth, needs, None))
    assert [g is not None for g in grads] == [
        n and t is not None for n, t in zip(needs, [x, *weights, *biases, *zs], strict=True)
    ]
    layers = range(depth)
    names = ["y", "dx", *(f"d{part}{i}" for part in "wbz" for i in layers)]
    wants = {f"dz{i}": wanted(z, full) for i, z in enumerate(zs) if z is not None}
    tensors = [x, *weights, *biases, *zs]
    if not all(n or t is None for n, t in zip(needs, tensors, strict=True)):
        return grads
    check([y, *grads], formula, tensors, dy, dtype, names, wants)
    return grads


@pytest.mark.covering(1)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chain(activation, dtype, launches):
    check_mlp((50, 40, 30, 10), 20, dtype, activation, ["mixed"] * 3)
    assert launches == ["forward_kernel"] * 3 + ["backward_kernel"] * 3


@pytest.mark.parametrize("kind", ["open", "closed", "few", None])
def test_chain_with_gates_alike(kind):
    check_mlp((30, 70, 10), 20, torch.float32, "gelu", [kind, kind], bias=kind != "few")
    check_mlp((30, 70, 10), 20, torch.float32, "silu", [None, kind])
    check_mlp((30, 70, 10), 20, torch.float32, "relu", [kind, "mixed"])


@pytest.mark.covering(1)
@pytest.mark.parametrize("sizes", [(5, 3), (1, 1, 1), (130, 67, 2, 65)], ids=str)
@pytest.mark.parametrize("M", [0, 1, 37])
def test_chain_of_odd_sizes(sizes, M):
    check_mlp(sizes, M, torch.float32, "gelu", ["mixed"] * (len(sizes) - 1))


def test_chain_with_a_callers_own_gates():
    check_mlp((30, 40, 10), 20, torch.float32, "silu", ["wild", "wild"], full=True)


def test_chain_of_what_is_needed(launches):
    # Only the last weight, then only the gate of the second layer: what lies below costs no launch.
    for needs, backward in (
        ([0, 0, 1, 0, 0, 0, 0], 1),
        ([0, 0, 0, 0, 0, 0, 1], 1),
        ([0, 1, 0, 0, 0, 0, 0], 2),
    ):
        launches.clear()
        check_mlp((30, 40, 10), 8, torch.float32, "relu", ["mixed"] * 2, needs=[bool(n) for n in needs])
        assert launches.count("backward_kernel") == backward


@pytest.mark.parametrize("kinds", [("mixed", "mixed"), ("mixed", None), (None, "mixed")], ids=str)
def test_long_sums_are_split(kinds, launches, monkeypatch):
    monkeypatch.setattr(gather, "MAX_STEPS", 2)
    check_linear((20, 140, 90), torch.float32, kinds)
    assert launches == ["forward_kernel", "backward_kernel", "sum_parts_kernel"]


def test_few_rows_of_a_large_matrix(launches):
    check_linear((2, 200, 600), torch.float32, ("mixed", "mixed"))
    assert launches.count("sum_parts_kernel") == 1


def test_which_layers_are_preferred(monkeypatch):
    monkeypatch.delenv("L0KERNELS_TRITON_GATHER", raising=False)
    assert gather.prefers(100, 300, 784, torch.float32)
    assert gather.prefers(1, 4096, 4096, torch.bfloat16)
    assert not gather.prefers(8192, 4096, 4096, torch.bfloat16)
    assert not gather.prefers(1, 1, 1, torch.float64)
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", "1")
    assert gather.prefers(8192, 4096, 4096, torch.bfloat16)
    assert not gather.prefers(1, 1, 1, torch.float64)
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", "0")
    assert not gather.prefers(1, 1, 1, torch.float32)
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", "yes")
    with pytest.raises(RuntimeError, match="L0KERNELS_TRITON_GATHER must be auto, 0 or 1, got 'yes'"):
        gather.prefers(1, 1, 1, torch.float32)
