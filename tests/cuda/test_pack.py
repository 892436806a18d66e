"""The CUDA kernels that pack and unpack, value by value, against indexing; on the GPU or on the emulator."""

import itertools

import pytest
import torch
from cuda_checks import EPS, FLOATS, gate_of, near, on_device
from cuda_device import RUNS

from l0kernels._calls import GateGrads
from l0kernels._gates import round_up
from l0kernels.impl import cuda
from op_checks import make_z, sliced, transposed

if not RUNS:
    pytest.skip("no GPU; test_emulated.py runs these on the CPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")


def units(gate, size):
    """Units in packed order, and the extent; all of them, without padding, where there is no gate."""
    if gate is None:
        return torch.arange(size), None
    n_open, extent = gate[2].tolist()
    if extent >= size:
        return torch.arange(size), round_up(size)
    return gate[1][:n_open].cpu().long(), extent


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
