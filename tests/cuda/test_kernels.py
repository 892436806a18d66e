"""The CUDA kernels, value by value, against formulas in float64; on the GPU or on the emulator."""

import copy
import itertools

import call_table
import fuzz_ops
import pytest
import torch
from cuda_device import DEVICE, EMULATOR, RUNS
from torch.library import opcheck

import l0kernels as l0
from l0kernels import _registry, nn, reference
from l0kernels._calls import DrawnMlpCall, GateGrads, L0LinearCall, L0MlpCall, LinearCall, MlpCall, Wanted
from l0kernels._gates import ALIGN, HardConcrete, compact, round_up
from l0kernels.gates import split
from l0kernels.impl import cuda
from op_checks import LAYOUTS, SEED, check_large_activations, compare, make_z, sliced, transposed

if not RUNS:
    pytest.skip("no GPU; test_emulated.py runs these on the CPU", allow_module_level=True)

DIST = HardConcrete()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


@pytest.fixture(autouse=True)
def poison():
    """Unwritten memory reads as NaN or as the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def public(monkeypatch):
    """The public functions use the kernels, for the emulator's tensors on the CPU as well."""
    monkeypatch.setattr(_registry, "_why_not_serving", lambda *_: None)
    with l0.use_backend("cuda"):
        yield


@pytest.fixture
def served(monkeypatch):
    """Backend "cuda" by its name, on the emulator as on a GPU; what it does not serve is refused."""
    real = _registry._why_not_serving
    where = torch.device("cuda", 0)
    monkeypatch.setattr(_registry, "_why_not_serving", lambda name, _, *what: real(name, where, *what))


def launches():
    """Launches so far; only the emulator counts them."""
    return EMULATOR.emulator_launches() if EMULATOR else 0


def on_device(t):
    return t.to(DEVICE)


def gate_of(z, tau=cuda.TAU):
    """[z, index, count] as the sampler leaves them."""
    index, count = compact(z)
    if count[0] > tau * len(z):
        count[1] = round_up(len(z))
    return [on_device(t) for t in (z, index, count)]


def units(gate, size):
    """Units in packed order, and the extent; all of them, without padding, where there is no gate."""
    if gate is None:
        return torch.arange(size), None
    n_open, extent = gate[2].tolist()
    if extent >= size:
        return torch.arange(size), round_up(size)
    return gate[1][:n_open].cpu().long(), extent


def near(got, want, eps, scale):
    """Exactly 0 where ``want`` is, else within eps times the size of the terms."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape
    assert ((got == 0) >= (want == 0)).all(), "a zero is not exact"
    error = (got - want).abs()
    assert (error <= eps * (scale + want.abs())).all(), f"error {error.max():.3g}"  # fails for a NaN, too


class TestSample:
    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "sizes",
        [[1], [127, 128, 129], [0, 5, 0], [784, 300, 100], [2049, 4500, 31], [17000], [300, 140_001]],
        ids=str,
    )
    def test_equals_reference(self, sizes, dtype):
        log_alphas = [torch.randn(n, dtype=dtype) * 3 for n in sizes]
        seed = torch.randint(2**62, (1,))
        before = launches()
        expected = on_device(torch.empty(len(sizes), dtype=dtype))
        args = [on_device(a) for a in log_alphas], on_device(seed), 5, DIST
        z, index, count = cuda.sample(*args, expected)
        assert launches() - before in (0, 1)
        for with_sums, without in zip((z, index, count), cuda.sample(*args), strict=True):
            assert torch.equal(with_sums, without)
        index, count = index.cpu().split([round_up(n) for n in sizes]), count.cpu().view(-1, 2)
        for i, (values, a) in enumerate(zip(z.cpu().split(sizes), log_alphas, strict=True)):
            exact = reference.gates.sample_z(a.double(), seed, i, 5, DIST)
            error = (values.double() - exact).abs().max().item() if len(a) else 0.0
            assert error <= 8 * EPS[dtype]
            # Order and counts are those of the values drawn, whatever their last bit.
            want_index, want_count = compact(values)
            if want_count[0] > torch.tensor(cuda.TAU) * len(a):
                want_count[1] = round_up(len(a))
            assert torch.equal(index[i], want_index)
            assert torch.equal(count[i], want_count)
            assert abs(expected[i].item() - DIST.p_open(a.double()).sum().item()) <= 16 * EPS[dtype] * len(a)

    @pytest.mark.parametrize("shift", [-30.0, 30.0])
    def test_all_closed_and_all_open(self, shift):
        z, index, count = cuda.sample(
            [on_device(torch.full((300,), shift))], on_device(torch.tensor([7])), 0, DIST
        )
        assert (z == (shift > 0)).all()
        assert torch.equal(index.cpu(), torch.cat([torch.arange(300), torch.zeros(84)]).int())
        assert count.tolist() == ([300, 384] if shift > 0 else [0, 0])

    def test_nan_is_open(self):
        a = torch.full((5,), -30.0)
        a[3] = float("nan")
        z, index, count = cuda.sample([on_device(a)], on_device(torch.tensor([7])), 0, DIST)
        assert z.isnan().tolist() == [False, False, False, True, False]
        assert index[:5].tolist() == [3, 0, 1, 2, 4]
        assert count.tolist() == [1, ALIGN]

    def test_more_vectors_than_one_launch_takes(self):
        sizes = [1 + i % 5 for i in range(100)]
        a = [torch.randn(n) for n in sizes]
        seed = torch.tensor([11])
        z, _, count = cuda.sample([on_device(t) for t in a], on_device(seed), 0, DIST)
        want = torch.cat(reference.gates.sample_zs(a, seed, 0, DIST))
        near(z, want, 8 * EPS[torch.float32], 1.0)
        assert count.view(-1, 2)[:, 0].tolist() == [int((v != 0).sum()) for v in want.split(sizes)]

    def test_expected_of_a_bank(self, public):
        gates = [nn.HardConcreteGate(n, dtype=t) for n in (31, 4500) for t in (torch.float32, torch.float64)]
        bank = nn.GateBank(torch.nn.ModuleList(gates).to(DEVICE))
        before = launches()
        expected = bank.draw(expected=True).expected
        assert launches() - before in (0, 2)
        for gate in gates:
            a = gate.log_alpha.detach()
            assert expected[gate].dtype == a.dtype
            near(expected[gate], DIST.p_open(a.double()).sum(), 16 * EPS[a.dtype], len(a))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gate_grad(self, dtype):
        z, dz = make_z("mixed", 1000, dtype), torch.randn(1000, dtype=dtype)
        got = cuda.gate_grad(on_device(dz), on_device(z), DIST).cpu()
        s = (z.double() - DIST.gamma) / (DIST.zeta - DIST.gamma)
        slope = (DIST.zeta - DIST.gamma) / DIST.beta * s * (1 - s)
        want = torch.where((z > 0) & (z < 1), dz.double() * slope, 0.0)
        assert torch.equal(got == 0, want == 0)
        near(got, want, 8 * EPS[dtype], 1.0)


def pack_cases():
    """Sizes and kinds of gates of both sides; 300 and 700 can be packed, 100 is always plain."""
    yield from itertools.product(
        [(1, 1), (37, 300), (300, 37), (140, 700)], ["few", "mixed", "open", None], [None]
    )
    yield from itertools.product([(37, 300), (19, 700), (3, 100)], [None], ["few", "mixed", "open", "closed"])
    yield from [((300, 400), "few", "mixed"), ((150, 260), "mixed", "few"), ((150, 260), "open", "few")]
    # Few rows, of several pieces; rows of whole 16 bytes, and not; spans that begin anywhere.
    yield from [((3, 1300), "mixed", None), ((9, 1304), "few", None), ((40, 1304), None, "mixed")]


class TestPack:
    @pytest.mark.parametrize(("shape", "kind_rows", "kind_cols"), list(pack_cases()))
    def test_equals_gather(self, shape, kind_rows, kind_cols):
        dtypes = itertools.cycle(
            [(t, t) for t in FLOATS]
            + [
                (torch.float32, torch.bfloat16),
                (torch.float16, torch.float32),
                (torch.float64, torch.float32),
            ]
        )
        layouts = itertools.cycle([torch.clone, torch.clone, transposed, sliced])
        skipped = sum(shape) + len(str(kind_rows))  # so that the cases meet all pairs between them
        dtypes = itertools.islice(dtypes, skipped % 7, None)
        for scale, _ in itertools.product([False, True], range(2)):
            dtype, to = next(dtypes)
            self.check(shape, kind_rows, kind_cols, scale, dtype, to, next(layouts))

    def check(self, shape, kind_rows, kind_cols, scale, dtype, to, layout):
        full = torch.randn(shape, dtype=dtype)
        z_dtype = torch.float64 if to == torch.float64 else torch.float32
        rows, cols = (
            None if kind is None else gate_of(make_z(kind, n, z_dtype))
            for kind, n in zip((kind_rows, kind_cols), shape, strict=True)
        )
        got = cuda.pack(
            layout(on_device(full)), rows, cols, to, scale_rows=scale, scale_cols=scale, skip_plain=False
        ).cpu()
        (row_units, row_extent), (col_units, col_extent) = units(rows, shape[0]), units(cols, shape[1])
        want = full.double()[row_units][:, col_units]
        if scale and rows is not None:
            want = want * rows[0].cpu().double()[row_units, None]
        if scale and cols is not None:
            want = want * cols[0].cpu().double()[col_units]
        n_rows, n_cols = want.shape
        extent_rows = shape[0] if row_extent is None else row_extent
        extent_cols = round_up(shape[1], 16 // to.itemsize) if col_extent is None else col_extent
        near(got[:n_rows, :n_cols], want, EPS[to] + EPS[z_dtype], torch.finfo(to).tiny)
        assert (got[n_rows:extent_rows, :extent_cols] == 0).all()
        assert (got[:extent_rows, n_cols:extent_cols] == 0).all()
        assert got[extent_rows:].isnan().all()
        assert got[:, extent_cols:].isnan().all()

    def test_plain_is_skipped(self):
        full = on_device(torch.randn(20, 300))
        gate = gate_of(make_z("open", 300))
        assert cuda.pack(full, None, gate, torch.float32).isnan().all()
        assert not cuda.pack(full, None, gate, torch.float32, scale_cols=True).isnan().any()
        assert not cuda.pack(full, None, None, torch.float32).isnan().any()

    def test_closed_infinities_are_not_touched(self):
        full = torch.randn(20, 300)
        z = make_z("few", 300)
        full[:, z == 0] = float("nan")
        assert not cuda.pack(on_device(full), None, gate_of(z), torch.float32)[:, :128].isnan().any()


class TestUnpack:
    @pytest.mark.parametrize(("shape", "kind_rows", "kind_cols"), list(pack_cases()))
    def test_equals_scatter_and_sums(self, shape, kind_rows, kind_cols):
        dtypes = itertools.cycle(
            [(t, t) for t in FLOATS] + [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
        )
        layouts = itertools.cycle([torch.clone, transposed, sliced])
        dtypes = itertools.islice(dtypes, (sum(shape) + len(str(kind_rows))) % 6, None)
        for scale, full in [(False, False), (True, False), (True, True)]:
            dtype, to = next(dtypes)
            self.check(shape, kind_rows, kind_cols, scale, full, dtype, to, next(layouts))

    def check(self, shape, kind_rows, kind_cols, scale, full, dtype, to, layout):
        z_dtype = torch.float64 if to == torch.float64 else torch.float32
        kind = {"mixed": "wild"} if full else {}
        rows, cols = (
            None if name is None else gate_of(make_z(kind.get(name, name), n, z_dtype))
            for name, n in zip((kind_rows, kind_cols), shape, strict=True)
        )
        (row_units, row_extent), (col_units, col_extent) = units(rows, shape[0]), units(cols, shape[1])
        packed = torch.full(
            (row_extent or shape[0], round_up(col_extent or shape[1], 8)), float("nan"), dtype=dtype
        )
        values = torch.randn(len(row_units), len(col_units), dtype=dtype)
        packed[: len(row_units), : len(col_units)] = values
        theta = torch.randn(shape, dtype=to)
        got, dz_row, dz_col = cuda.unpack(
            on_device(packed), shape, rows, cols, to, scale_rows=scale, scale_cols=scale,
            grads=GateGrads(layout(on_device(theta)), True, True, full, full),
        )  # fmt: skip
        spread = torch.zeros(shape, dtype=torch.float64)
        spread[row_units[:, None], col_units] = values.double()
        z_row = torch.ones(shape[0]).double() if rows is None else rows[0].cpu().double()
        z_col = torch.ones(shape[1]).double() if cols is None else cols[0].cpu().double()
        spread = spread * (z_row != 0)[:, None] * (z_col != 0)
        want = spread * (z_row[:, None] if scale else 1) * (z_col if scale else 1)
        near(got, want, EPS[to] + EPS[z_dtype], torch.finfo(to).tiny)
        product = spread * theta.double()
        for dz, gate, dim, other in ((dz_row, rows, 0, z_col), (dz_col, cols, 1, z_row[:, None])):
            assert (dz is None) == (gate is None)
            if gate is None:
                continue
            z = gate[0].cpu()
            terms = product * other if scale else product
            wanted = z != 0 if full else (z > 0) & (z < 1)
            exact = torch.where(wanted, terms.sum(1 - dim), 0.0)
            near(dz, exact, shape[1 - dim] * EPS[z_dtype], terms.abs().amax().item())
            assert dz.dtype == z_dtype
        assert all((words == 0).all() for words in cuda._tickets.of_stream.values())

    def test_skip_plain_still_sums(self):
        gate = gate_of(torch.cat([torch.ones(299), torch.full((1,), 0.5)]))
        packed, theta = torch.randn(20, 304), torch.randn(20, 300)
        out, _, dz = cuda.unpack(
            on_device(packed),
            (20, 300),
            None,
            gate,
            torch.float32,
            grads=GateGrads(on_device(theta), cols=True),
            skip_plain=True,
        )
        assert out.isnan().all()
        near(dz[-1], (packed[:, 299].double() * theta[:, 299]).sum(), 1e-5, 1.0)
        assert (dz[:-1] == 0).all()

    def test_the_same_sums_every_time(self):
        gate, theta = gate_of(make_z("mixed", 300)), on_device(torch.randn(60, 300))
        packed = on_device(torch.randn(60, 384))
        first, second = (
            cuda.unpack(packed, (60, 300), None, gate, torch.float32, grads=GateGrads(theta, cols=True))
            for _ in range(2)
        )
        assert torch.equal(first[2], second[2])


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


WEIGHT_LAYOUTS = {
    **LAYOUTS,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


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


class TestOpcheck:
    """Schema and fake of every operator that the kernels serve; l0_mlp is theirs alone."""

    # Without the comparison of values with AOTAutograd's: beyond the open units buffers hold anything.
    UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")
    OPS = torch.ops.l0kernels
    CONSTANTS = (DIST.beta, DIST.gamma, DIST.zeta)

    def check(self, name, *args):
        opcheck(getattr(self.OPS, name).default, (*args, "cuda"), test_utils=self.UTILITIES)

    def test_gates(self):
        a, other = on_device(torch.randn(140)), on_device(torch.randn(7))
        self.check("sample", [a, other], on_device(SEED), 3, [*self.CONSTANTS])
        self.check("sample_expected", [a, other], on_device(SEED), 3, [*self.CONSTANTS])
        self.check("gate_grad", a, on_device(make_z("mixed", 140)), [*self.CONSTANTS])
        self.check("l0_penalty", [a, other], [1.0, 2.5], [*self.CONSTANTS])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", list(LAYOUTS))
    def test_layers(self, layout, dtype):
        sizes, dist = ((6, 13), (9, 13), (5, 9), (6, 9), (6, 5)), list(self.CONSTANTS)
        x, w, w2, dy, dy2 = (WEIGHT_LAYOUTS[layout](on_device(torch.randn(s).to(dtype))) for s in sizes)
        bias, hidden = on_device(torch.randn(9).to(dtype)), gate_of(make_z("mixed", 9))
        gates = [*gate_of(make_z("mixed", 13)), *hidden]
        self.check("gated_linear", x, w, bias, gates[:3], hidden, True, dtype)
        settings = (True, dtype, [], [False, True], [True] * 5, dist)
        self.check("gated_linear_backward", dy, x, w, bias, gates[:3], hidden, *settings)
        weights, biases = [w, w2], [bias, None]
        self.check("gated_mlp", x, weights, biases, gates, "relu", dtype, False)
        _, *saved = self.OPS.gated_mlp(x, weights, biases, gates, "relu", dtype, False, "cuda")
        wanted = ([False] * 2, [True, True, True, True, False, True, True], dist)
        self.check("gated_mlp_backward", dy2, x, weights, biases, gates, "relu", dtype, False, saved, *wanted)
        a, a2 = on_device(torch.randn(13)), on_device(torch.randn(9))
        for log_alphas in ([a, a2], [None, a2], [a, None]):
            args = (x, weights, biases, log_alphas, "relu", on_device(SEED), dist, dtype)
            self.check("l0_mlp", *args)
            z, index, count, _, *saved = self.OPS.l0_mlp(*args, "cuda")
            gated = [log_alpha is not None for log_alpha in log_alphas]
            needs = [True, True, True, True, False, *gated]
            drawn = (gated, z, index, count, "relu", dtype)
            wanted = ([False] * 2, needs, dist)
            self.check("l0_mlp_backward", dy2, x, weights, biases, *drawn, saved, *wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_l2(self, dtype):
        gates = torch.float64 if dtype == torch.float64 else torch.float32
        channels_last = torch.randn(6, 5, 3, 2).contiguous(memory_format=torch.channels_last)
        for weight, groups in (
            (torch.randn(6, 5), 1),
            (transposed(torch.randn(6, 5)), 1),
            (sliced(torch.randn(6, 5)), 1),
            (torch.randn(6, 5, 3, 2), 2),
            (channels_last, 1),
            (channels_last, 2),
        ):
            weight = on_device(weight.to(dtype))
            out, in_ = (on_device(torch.randn(n, dtype=gates)) for n in (6, 5 * groups))
            bias, factor = on_device(torch.randn(6).to(dtype)), on_device(torch.ones((), dtype=gates))
            thetas, given, settings = [weight, bias], [out, in_], (0.3, list(self.CONSTANTS))
            every = ((0, 1), (0, -1), (-1, 1), (-1, -1))
            for sides in every if dtype == torch.float32 else every[:1]:
                layout = [*sides, groups, 0, -1, 1]
                self.check("coupled_penalty", thetas, given, [1.0, 0.0], layout, *settings)
                self.check("coupled_penalty_grad", thetas, given, layout, factor, *settings)


REFUSED = {
    "masked_linear weights": "it does not serve masked_linear; the triton backend does",
    "masked_linear blocks": "it does not serve block_linear; the triton backend does",
    "gated_mlp swiglu": "it does not serve 'swiglu'; triton does",
    "gated_mlp geglu": "it does not serve 'geglu'; triton does",
    "l0_mlp swiglu": "it does not serve 'swiglu'; triton does",
    "l0_mlp geglu": "it does not serve 'geglu'; triton does",
    "gated_conv2d": "it does not serve gated_conv2d; the triton backend does",
    "packed_conv2d": "it does not serve gated_conv2d; the triton backend does",
    "gated_attention": "it does not serve gated_attention; the triton backend does",
    "gated_batch_norm": "it does not serve gated_batch_norm; the triton backend does",
    "nn.L0Linear weight": "it does not serve masked_linear; the triton backend does",
    "nn.L0Linear (5, 5)": "it does not serve block_linear; the triton backend does",
    "nn.L0Conv2d": "it does not serve gated_conv2d; the triton backend does",
    "nn.L0Sequential": "it does not serve gated_conv2d; the triton backend does",
    "nn.L0FeedForward swiglu": "it does not serve 'swiglu'; triton does",
}
"""By how its name begins, what the CUDA kernels answer to a call of the table; they compute all others."""


@pytest.mark.skipif(not EMULATOR, reason="the table's and the fuzzer's tensors are on the CPU")
class TestEveryCall:
    @pytest.mark.parametrize("name", call_table.CALLS)
    def test_call(self, name, served):
        reasons = {reason for start, reason in REFUSED.items() if name.startswith(start)}
        assert {call_table.check(name, "cuda")} == (reasons or {None})

    @pytest.mark.parametrize("name", ["l0_linear in", "l0_mlp relu 1", "gated_linear both"])
    def test_call_in_float64(self, name, served):
        torch.set_default_dtype(torch.float64)
        try:
            assert call_table.check(name, "cuda") is None
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize("name", fuzz_ops.OPS)
    def test_random_calls(self, name, public):
        if _registry.implements("cuda") >= fuzz_ops.PRIMITIVES[name]:
            for seed in range(fuzz_ops.count(5)):
                fuzz_ops.check(name, seed, largest=150, activations=fuzz_ops.ACTIVATIONS[:4])


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


class TestGatesOfAnotherType:
    @pytest.mark.parametrize("wrong", ["dtype", "strides", "index"])
    def test_refused(self, wrong):
        z, index, count = gate_of(torch.ones(20))
        z = z.double() if wrong == "dtype" else on_device(torch.ones(40))[::2] if wrong == "strides" else z
        gate = [z, index.long() if wrong == "index" else index, count]
        x, w = on_device(torch.ones(3, 20)), on_device(torch.ones(4, 20))
        message = "must be 20 contiguous" if wrong == "strides" else "must have dtype torch"
        with pytest.raises((TypeError, ValueError), match=f"^in_gate {message}"):
            cuda.linear_forward(LinearCall(x, w, None, gate, None, False, torch.float32))


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


def refusal(name):
    return rf"^{name} must be on the device of the matrix, {DEVICE}(:\d+)?, got meta$"


class TestOtherDevices:
    """An address of another device must not reach a kernel; a meta tensor stands for every one."""

    @pytest.mark.parametrize("name", ["rows", "cols"])
    def test_gates_of_packing(self, name):
        gates = {"rows": None, "cols": None, name: [t.to("meta") for t in gate_of(make_z("few", 300))]}
        matrix = on_device(torch.randn(300, 300))
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.pack(matrix, dtype=torch.float32, **gates)
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.unpack(matrix, (300, 300), dtype=torch.float32, **gates)

    def test_theta(self):
        matrix, theta = on_device(torch.randn(300, 304)), torch.randn(300, 300, device="meta")
        gate = gate_of(make_z("few", 300))
        with pytest.raises(RuntimeError, match=refusal("theta")):
            cuda.unpack(matrix, (300, 300), gate, None, torch.float32, grads=GateGrads(theta, rows=True))
        with pytest.raises(RuntimeError, match=refusal("theta")):
            cuda.coupled_penalty([(theta, 0, -1, 1)], [on_device(torch.randn(300))], [1.0], 0.1, DIST)

    @pytest.mark.parametrize("name", ["in_gate", "out_gate", "weight"])
    def test_layer(self, name):
        x, dy = on_device(torch.randn(5, 30)), on_device(torch.randn(5, 30))
        given = {"weight": on_device(torch.randn(30, 30)), "bias": None, "in_gate": None, "out_gate": None}
        given |= {name: gate_of(make_z("few", 30)) if given[name] is None else given[name]}
        other = given[name]
        given[name] = [t.to("meta") for t in other] if isinstance(other, list) else other.to("meta")
        call = LinearCall(x, **given, scale_out=True, dtype=torch.float32)
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.linear_forward(call)
        wanted = Wanted([False] * 2, [True] * 2 + [False] * 3, None)
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.linear_backward(call, dy, [], wanted)

    def test_gates_of_a_chain(self):
        x, weights = on_device(torch.randn(5, 30)), [on_device(torch.randn(30, 30)) for _ in range(2)]
        gates = [None, [t.to("meta") for t in gate_of(make_z("few", 30))]]
        call = MlpCall(x, weights, [None, None], gates, "relu", torch.float32, False)
        with pytest.raises(RuntimeError, match=refusal("gates")):
            cuda.mlp_forward(call)
        saved, needs = [on_device(torch.randn(5, 30))], [True] * 3 + [False] * 4
        with pytest.raises(RuntimeError, match=refusal("gates")):
            cuda.mlp_backward(call, x, saved, Wanted([False] * 2, needs, None))


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
