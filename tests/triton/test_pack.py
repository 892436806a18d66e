"""The Triton pack, unpack and reduce_partials against index_select in fp64; unwritten memory reads as NaN."""

import math

import pytest
import torch

import l0kernels as l0
from l0kernels._calls import GateGrads
from l0kernels.triton_kernels import pack as tp
from triton_device import DEVICE

ELEMENTWISE = (torch.float32, torch.float16, torch.bfloat16)
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1), (7, 13), (37, 131), (130, 24), (5, 1100)]


@pytest.fixture(autouse=True)
def _seeded(seeded):
    """One state of torch's generator."""


class G:
    """A gate as the kernels take it, and what it means: `open` units, `units` in packed order."""

    def __init__(self, z, plain=False):
        size = len(z)
        capacity = -(-size // 128) * 128
        self.size, self.capacity, self.z = size, capacity, z
        self.open = [i for i in range(size) if z[i] != 0]
        closed = [i for i in range(size) if z[i] == 0]
        self.extent = capacity if plain else -(-len(self.open) // 128) * 128
        self.plain = self.extent >= size
        self.units = list(range(size)) if self.plain else self.open
        # The index of a plain gate must not be consulted.
        index = [-1] * size if self.plain else self.open + closed
        index += [0] * (capacity - size)
        self.gate = [
            z.float().to(DEVICE),
            torch.tensor(index, dtype=torch.int32, device=DEVICE),
            torch.tensor([len(self.open), self.extent], dtype=torch.int32, device=DEVICE),
        ]


def draw(size, keep, plain=False):
    """Gates of which about a share `keep` is open, some of them exactly 1."""
    z = torch.rand(size) * 1.5
    z = z.clamp(max=1).masked_fill(torch.rand(size) >= keep, 0)
    return G(z, plain)


KEEPS = [(0.5, False), (0.5, True), (0.06, False), (1.0, False), (0.0, False), (0.0, True)]


def some(size, which):
    return None if which is None else draw(size, *which)


def gate(g):
    return None if g is None else g.gate


def filled(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def expected_pack(full, rows, cols, scale_rows, scale_cols, shape):
    """The packed matrix in fp64, NaN where nothing is written."""
    value = full.double().cpu()
    for dim, g, scale in ((0, rows, scale_rows), (1, cols, scale_cols)):
        if g is None:
            continue
        if scale:
            value = value * (g.z.double()[:, None] if dim == 0 else g.z.double())
        value = value.index_select(dim, torch.tensor(g.units, dtype=torch.long))
    result = torch.full(shape, float("nan"), dtype=torch.float64)
    result[: shape[0] if rows is None else rows.extent, : shape[1] if cols is None else cols.extent] = 0
    result[: value.shape[0], : value.shape[1]] = value
    return result


def close(actual, expected, dtype, ulps=2.0):
    torch.testing.assert_close(
        actual.double().cpu(), expected, rtol=ulps * ULP[dtype], atol=1e-7, equal_nan=True
    )


def check_pack(full, rows, cols, dtype, scale_rows=False, scale_cols=False):
    n_rows, n_cols = full.shape
    align = 16 // dtype.itemsize
    shape = (
        n_rows if rows is None else rows.capacity,
        -(-n_cols // align) * align if cols is None else cols.capacity,
    )
    out = filled(shape, dtype)
    kwargs = {"scale_rows": scale_rows, "scale_cols": scale_cols, "skip_plain": False}
    result = tp.pack(full, gate(rows), gate(cols), dtype, out=out, **kwargs)
    assert result is out
    close(out, expected_pack(full, rows, cols, scale_rows, scale_cols, shape), dtype)
    result = tp.pack(full, gate(rows), gate(cols), dtype, **kwargs)
    assert (result.shape, result.dtype, result.is_contiguous()) == (shape, dtype, True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", KEEPS)
def test_pack_of_one_dimension(shape, keep):
    full = torch.randn(shape, device=DEVICE)
    rows, cols = draw(shape[0], *keep), draw(shape[1], *keep)
    for scale in (False, True):
        check_pack(full, rows, None, torch.float32, scale_rows=scale)
        check_pack(full, None, cols, torch.float32, scale_cols=scale)


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep_rows", [(0.5, False), (0.5, True), (0.0, False)])
@pytest.mark.parametrize("keep_cols", [(0.5, False), (0.5, True), (0.0, False)])
@pytest.mark.parametrize("scale", [(False, False), (True, False), (False, True), (True, True)])
def test_pack_of_both_dimensions(keep_rows, keep_cols, scale):
    full = torch.randn(45, 401, device=DEVICE)
    check_pack(full, draw(45, *keep_rows), draw(401, *keep_cols), torch.float32, *scale)


@pytest.mark.covering(1)
@pytest.mark.parametrize("source", ELEMENTWISE)
@pytest.mark.parametrize("dtype", ELEMENTWISE)
def test_pack_casts(source, dtype):
    full = torch.randn(24, 264, device=DEVICE).to(source)
    check_pack(full, draw(24, 0.5), None, dtype, scale_rows=True)
    check_pack(full, None, draw(264, 0.5), dtype, scale_cols=True)
    check_pack(full, None, draw(264, 0.5), dtype)
    check_pack(full, None, None, dtype)


def layouts(shape):
    """One matrix under several strides."""
    r, c = shape
    full = torch.randn(shape, device=DEVICE)
    yield full.t().contiguous().t()
    yield torch.randn(r, c + 5, device=DEVICE)[:, 2 : c + 2]
    yield torch.randn(r, 2 * c, device=DEVICE)[:, ::2]
    yield torch.randn(c, device=DEVICE).expand(r, c)
    yield torch.randn(r, 1, device=DEVICE).expand(r, c)


def test_pack_of_any_strides():
    for full in layouts((21, 150)):
        check_pack(full, draw(21, 0.5), None, torch.float32)
        check_pack(full, None, draw(150, 0.5), torch.float32)
        check_pack(full, None, draw(150, 0.9, True), torch.float32)
        check_pack(full, draw(21, 0.5), draw(150, 0.5), torch.float32)


def test_pack_leaves_the_buffer_alone_where_all_is_plain():
    full = torch.randn(20, 300, device=DEVICE)
    rows, cols = draw(20, 0.9, True), draw(300, 0.9, True)
    for r, c in ((rows, None), (None, cols), (rows, cols)):
        out = filled((20 if r is None else 128, 300 if c is None else 384), torch.float32)
        tp.pack(full, gate(r), gate(c), torch.float32, out=out)
        assert out.isnan().all()
    for r, c, s in ((rows, None, (1, 0)), (None, cols, (0, 1)), (rows, draw(300, 0.3), (0, 0))):
        shape = (20 if r is None else 128, 300 if c is None else 384)
        out = filled(shape, torch.float32)
        tp.pack(full, gate(r), gate(c), torch.float32, out=out, scale_rows=s[0] == 1, scale_cols=s[1] == 1)
        close(out, expected_pack(full, r, c, s[0], s[1], shape), torch.float32)


def test_pack_without_gates_always_writes():
    full = torch.randn(5, 11, device=DEVICE)
    out = tp.pack(full, None, None, torch.float16)
    assert torch.equal(out[:, :11], full.half())
    assert not out[:, 11:].any()


def test_a_nan_gate_is_open_and_stays_in_its_column():
    z = torch.zeros(300)
    z[7], z[100] = math.nan, 0.5
    cols, rows = G(z), draw(9, 0.5)
    full = torch.randn(9, 300, device=DEVICE)
    check_pack(full, rows, cols, torch.float32, scale_cols=True)
    value, _, dz = tp.unpack(
        torch.ones(9, 128, device=DEVICE), (9, 300), None, cols.gate, torch.float32,
        scale_cols=True, grads=GateGrads(full, cols=True),
    )  # fmt: skip
    assert value[:, 7].isnan().all()
    assert not value[:, 8:].isnan().any()
    torch.testing.assert_close(dz[[7, 100]], full[:, [7, 100]].sum(0))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    rows, cols = draw(shape[0], 0.5), draw(shape[1], 0.5)
    full = torch.randn(shape, device=DEVICE)
    for r, c in ((rows, None), (None, cols), (rows, cols)):
        packed = tp.pack(full, gate(r), gate(c), torch.float32)
        value, dz_r, dz_c = tp.unpack(
            packed, shape, gate(r), gate(c), torch.float32, grads=GateGrads(full, rows=True, cols=True)
        )
        assert value.shape == shape
        assert (dz_r is None) == (r is None)
        assert (dz_c is None) == (c is None)
        assert dz_r is None or torch.equal(dz_r, torch.zeros_like(dz_r))
        assert dz_c is None or torch.equal(dz_c, torch.zeros_like(dz_c))


def packed_of(shape, rows, cols, dtype):
    """A packed matrix: random where open, NaN everywhere else; and its meaning in fp64, natural order."""
    n_rows, n_cols = shape
    align = 16 // dtype.itemsize
    capacity_r = n_rows if rows is None else rows.capacity
    capacity_c = -(-n_cols // align) * align if cols is None else cols.capacity
    packed, dense = filled((capacity_r, capacity_c), dtype), torch.zeros(shape, dtype=torch.float64)
    keep = [list(enumerate(range(n) if g is None else g.units)) for g, n in ((rows, n_rows), (cols, n_cols))]
    keep = [
        [(p, u) for p, u in pairs if g is None or g.z[u] != 0]
        for pairs, g in zip(keep, (rows, cols), strict=True)
    ]
    (place_r, unit_r), (place_c, unit_c) = (
        (torch.tensor([p for p, _ in k], dtype=torch.long), torch.tensor([u for _, u in k], dtype=torch.long))
        for k in keep
    )
    value = torch.randn(len(keep[0]), len(keep[1])).to(dtype)
    packed[place_r[:, None].to(DEVICE), place_c.to(DEVICE)] = value.to(DEVICE)
    dense[unit_r[:, None], unit_c] = value.double()
    return packed, dense


def check_unpack(shape, rows, cols, packed_dtype, dtype, *, scale=(0, 0), full=(False, False), theta=None):
    packed, dense = packed_of(shape, rows, cols, packed_dtype)
    ones = [torch.ones(n, dtype=torch.float64) for n in shape]
    z = [n if g is None or not s else g.z.double() for n, g, s in zip(ones, (rows, cols), scale, strict=True)]
    out = filled(shape, dtype)
    result, dz_rows, dz_cols = tp.unpack(
        packed, shape, gate(rows), gate(cols), dtype,
        scale_rows=scale[0], scale_cols=scale[1], grads=GateGrads(theta, True, True, *full), out=out,
    )  # fmt: skip
    assert result is out
    expected = dense * z[0][:, None] * z[1]
    close(out, expected, dtype)
    assert not out.cpu()[expected == 0].any()
    if theta is None:
        assert dz_rows is None
        assert dz_cols is None
        return
    terms = dense * theta.double().cpu().nan_to_num(0)
    for g, dz, dim, whole in ((rows, dz_rows, 0, full[0]), (cols, dz_cols, 1, full[1])):
        if g is None:
            assert dz is None
            continue
        weighted = terms * (z[1] if dim == 0 else z[0][:, None])
        wanted = g.z != 0 if whole else (g.z > 0) & (g.z < 1)
        expected = weighted.sum(1 - dim).masked_fill(~wanted, 0)
        bound = 8 * ULP[torch.float32] * (weighted.abs().sum(1 - dim).max() + 1)
        assert (dz.dtype, dz.shape) == (torch.float32, (g.size,))
        torch.testing.assert_close(dz.double().cpu(), expected, rtol=0, atol=float(bound))
        assert not dz.cpu()[~wanted].any()


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", KEEPS)
def test_unpack_of_one_dimension(shape, keep):
    theta = torch.randn(shape, device=DEVICE)
    for full, scale in ((False, True), (True, False)):
        rows, cols = draw(shape[0], *keep), draw(shape[1], *keep)
        kwargs = {"scale": (scale, scale), "full": (full, full), "theta": theta}
        check_unpack(shape, rows, None, torch.float32, torch.float32, **kwargs)
        check_unpack(shape, None, cols, torch.float32, torch.float32, **kwargs)


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep_rows", [(0.5, False), (0.5, True), (0.0, False)])
@pytest.mark.parametrize("keep_cols", [(0.5, False), (0.5, True), (0.0, False)])
@pytest.mark.parametrize("scale", [(False, False), (True, False), (False, True), (True, True)])
def test_unpack_of_both_dimensions(keep_rows, keep_cols, scale):
    shape = (45, 401)
    theta = torch.randn(shape, device=DEVICE)
    rows, cols = draw(45, *keep_rows), draw(401, *keep_cols)
    check_unpack(shape, rows, cols, torch.float32, torch.float32, scale=scale, theta=theta)
    if scale == (False, False):
        check_unpack(shape, rows, cols, torch.float32, torch.float32)


@pytest.mark.covering(1)
@pytest.mark.parametrize("packed_dtype", ELEMENTWISE)
@pytest.mark.parametrize("dtype", ELEMENTWISE)
def test_unpack_casts(packed_dtype, dtype):
    shape = (24, 264)
    theta = torch.randn(shape, device=DEVICE).to(dtype)
    check_unpack(shape, draw(24, 0.5), None, packed_dtype, dtype, scale=(True, True), theta=theta)
    check_unpack(shape, None, draw(264, 0.5), packed_dtype, dtype, scale=(True, True), theta=theta)
    check_unpack(shape, None, None, packed_dtype, dtype)


def test_unpack_with_theta_of_any_strides():
    shape = (21, 150)
    for theta in layouts(shape):
        rows, cols = draw(21, 0.5), draw(150, 0.5)
        for r, c in ((rows, None), (None, cols), (rows, cols)):
            check_unpack(shape, r, c, torch.float32, torch.float32, theta=theta)


def test_a_closed_theta_is_not_read():
    shape = (21, 150)
    rows, cols = draw(21, 0.5), draw(150, 0.5)
    theta = torch.randn(shape, device=DEVICE)
    theta[rows.z.to(DEVICE) == 0] = math.nan
    theta[:, cols.z.to(DEVICE) == 0] = math.nan
    check_unpack(shape, rows, cols, torch.float32, torch.float32, scale=(True, True), theta=theta)


def test_unpack_in_many_chunks(monkeypatch):
    monkeypatch.setattr(tp, "_programs", lambda *args: 20)
    shape = (40, 1100)
    theta = torch.randn(shape, device=DEVICE)
    for r, c in ((draw(40, 0.6), None), (None, draw(1100, 0.6)), (draw(40, 0.6), draw(1100, 0.6))):
        check_unpack(shape, r, c, torch.float32, torch.float32, theta=theta)
        check_pack(theta, r, c, torch.float32)


def test_unpack_leaves_the_result_alone_where_all_is_plain():
    shape = (20, 300)
    theta = torch.randn(shape, device=DEVICE)
    rows, cols = draw(20, 0.9, True), draw(300, 0.9, True)
    for r, c in ((rows, None), (None, cols), (rows, cols)):
        packed, dense = packed_of(shape, r, c, torch.float32)
        for dz in (False, True):
            out = filled(shape, torch.float32)
            _, dz_rows, dz_cols = tp.unpack(
                packed, shape, gate(r), gate(c), torch.float32,
                grads=GateGrads(theta, dz, dz), out=out, skip_plain=True,
            )  # fmt: skip
            assert out.isnan().all()
            assert (dz_rows is None) == (not dz or r is None)
            assert dz_cols is None or not dz_cols.isnan().any()
    open_cols = draw(300, 0.3)
    packed, dense = packed_of(shape, rows, open_cols, torch.float32)
    value = tp.unpack(packed, shape, rows.gate, open_cols.gate, torch.float32, skip_plain=True)[0]
    close(value, dense, torch.float32)


def test_pack_then_unpack_is_the_mask():
    full = torch.randn(33, 257, device=DEVICE)
    rows, cols = draw(33, 0.5), draw(257, 0.5)
    packed = tp.pack(full, rows.gate, cols.gate, torch.float32, scale_rows=True)
    value = tp.unpack(packed, (33, 257), rows.gate, cols.gate, torch.float32, scale_cols=True)[0]
    close(value, full.double().cpu() * rows.z.double()[:, None] * cols.z.double(), torch.float32)


def test_the_same_gates_as_the_package_draws():
    z = l0.reference.sample_gates(torch.randn(200) - 2).z
    ours, theirs = G(z), l0.Gates.from_z(z)
    assert not ours.plain
    assert torch.equal(ours.gate[1].cpu(), theirs.index)
    assert torch.equal(ours.gate[2].cpu(), theirs.count)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("size", "p"), [(1, 1), (130, 131), (301, 20)])
@pytest.mark.parametrize("keep", KEEPS)
def test_reduce_partials(size, keep, p):
    g = draw(size, *keep)
    dz, db = (filled((p, g.capacity), torch.float32) for _ in range(2))
    filled_to = len(g.units)
    dz[:, :filled_to], db[:, :filled_to] = torch.randn(2, p, filled_to, device=DEVICE)
    for full, of_gate in ((False, True), (True, True), (False, False)):
        expected = torch.zeros(size, dtype=torch.float64)
        expected[g.units] = dz[:, :filled_to].double().cpu().sum(0)
        wanted = (g.z > 0) & (g.z < 1) if of_gate and not full else g.z != 0
        expected = expected.masked_fill(~wanted, 0)
        total = tp.reduce_partials(dz, g.gate, size, dz=of_gate, full=full)
        torch.testing.assert_close(total.double().cpu(), expected, rtol=1e-5, atol=1e-5)
        assert not total.cpu()[~wanted].any()
    both = tp.reduce_partials2(dz, db, g.gate, size, dtype=torch.bfloat16)
    assert torch.equal(both[0], tp.reduce_partials(dz, g.gate, size, dz=True))
    assert torch.equal(both[1], tp.reduce_partials(db, g.gate, size, dz=False, dtype=torch.bfloat16))


def test_reduce_partials_without_a_gate():
    partial = torch.randn(9, 70, device=DEVICE)
    total = tp.reduce_partials(partial, None, 50, dz=False)
    torch.testing.assert_close(total, partial[:, :50].sum(0), rtol=1e-5, atol=1e-5)
    assert tp.reduce_partials(partial, None, 0, dz=False).shape == (0,)
