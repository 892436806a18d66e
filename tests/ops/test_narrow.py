"""Products of what exists, on a CPU: weights packed with their taps, convolutions as products of matrices."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import narrow
from l0kernels._gates import round_up
from l0kernels._native import native
from l0kernels.impl import im2col, module
from l0kernels.impl.batch_norm import Channels, Settings
from l0kernels.impl.im2col import Geometry, Way

needs_native = pytest.mark.skipif(native is None, reason="no native kernels")

GEOMETRIES = [
    ((1, 1), Geometry((1, 1), (0, 0), (1, 1))),
    ((1, 1), Geometry((2, 2), (0, 0), (1, 1))),
    ((3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((3, 2), Geometry((2, 1), (2, 0), (1, 3))),
    ((5, 4), Geometry((1, 3), (0, 4), (2, 1))),
    ((2, 2), Geometry((2, 2), (0, 1), (1, 1))),
]
SIZES = [(0, 3, 5), (1, 1, 1), (3, 8, 5), (2, 17, 16)]  # images, channels read, channels made


@pytest.fixture(autouse=True)
def poisoned(poison):
    """Unwritten memory reads as NaN."""


def gate(n, exist, generator):
    """A gate as pack takes it, of `exist` of n units, some of which are closed; and which exist."""
    index = torch.randperm(n, generator=generator)[:exist].sort().values
    z = torch.zeros(n, dtype=torch.float64)
    z[index] = torch.rand(exist, dtype=torch.float64, generator=generator) * 1.2
    z[index[: exist // 3]] = 0
    z.clamp_(max=1)
    absent = torch.tensor([i for i in range(n) if i not in set(index.tolist())], dtype=torch.int64)
    order = torch.zeros(round_up(n))
    order[:n] = torch.cat([index, absent])
    return [z, order.int(), torch.full((2,), exist, dtype=torch.int32)], index


def near(got, expected, dtype):
    bound = 2000 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected.double(), rtol=bound, atol=bound)


@pytest.fixture(params=["packed", "by tap", "direct"])
def ways(request, monkeypatch):
    """How convolutions are computed: by packed weights, or by one call of csrc."""
    monkeypatch.setattr(im2col, "_has_small_images", lambda *_: request.param == "by tap")
    monkeypatch.setattr(im2col, "_is_little", lambda *_: request.param == "direct")
    im2col._plan.cache_clear()
    yield
    im2col._plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@needs_native
def test_convolutions(isa, ways, dtype):
    """narrow_conv2d and every gradient against torch's convolution of the gathered weight in float64."""
    generator = torch.Generator().manual_seed(1)
    for (kernel, geometry), (n, ins, outs) in itertools.product(GEOMETRIES, SIZES):
        full_in, full_out = ins + 3, outs + 2
        (z, *order), read = gate(full_in, ins, generator)
        rows, made = gate(full_out, outs, generator)
        x = torch.randn(n, ins, 9, 8, dtype=dtype)
        weight = torch.randn(full_out, full_in, *kernel, dtype=dtype)
        bias = torch.randn(outs, dtype=dtype)
        z, rows[0] = z.to(dtype), rows[0].to(dtype)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, z)]
        sides = narrow.Sides(rows, [leaves[3].detach(), *order], 1, "cpp")
        y = narrow.narrow_conv2d(*leaves, sides, im2col.plan(x.shape, kernel, geometry, outs))
        exact = [t.detach().double().requires_grad_() for t in leaves]
        packed = exact[1][made][:, read] * exact[3][read][:, None, None]
        right = F.conv2d(exact[0], packed, exact[2], *geometry)
        near(y, right, dtype)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not y._is_view()
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, leaves, dy)
        expected = [*torch.autograd.grad(right, exact, dy.double())]
        expected[3] = expected[3].masked_fill((z <= 0) | (z >= 1), 0)
        for mine, theirs in zip(got, expected, strict=True):
            near(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [Way.PATCHES, Way.TORCH])
@needs_native
def test_ways_to_compute_a_convolution(isa, way, dtype):
    """Each of them of every convolution, whichever is the fastest."""
    far = (3, 3), Geometry((1, 1), (9, 9), (1, 1))  # there are outputs that no pixel reaches
    wide = (3, 3), Geometry((1, 2), (7, 7), (8, 7))  # and taps that reach no pixel
    for (kernel, geometry), (n, ins, outs) in itertools.product([*GEOMETRIES, far, wide], SIZES):
        x = torch.randn(n, ins, 9, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outs, ins, *kernel, dtype=dtype)
        packed = weight.permute(0, 2, 3, 1).reshape(outs, -1)
        plan = im2col.plan(x.shape, kernel, geometry, outs)._replace(way=way)
        exact = [t.double().clone().requires_grad_() for t in (x, weight)]
        for bias in (None, torch.randn(outs, dtype=dtype)):
            y = im2col.forward(x, packed, bias, plan)
            right = F.conv2d(*exact, None if bias is None else bias.double(), *geometry)
            near(y, right, dtype)
            assert y.is_contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(y)
        right_x, right_w = torch.autograd.grad(right, exact, dy.double())
        for need_x, need_w in ((True, True), (True, False), (False, True)):
            dx, dw = im2col.backward(dy, x, packed, plan, need_x, need_w)
            assert (dx is not None, dw is not None) == (need_x, need_w)
            if dx is not None:
                near(dx, right_x, dtype)
                assert dx.is_contiguous(memory_format=torch.channels_last)
            if dw is not None:
                near(dw, right_w.permute(0, 2, 3, 1).reshape(outs, -1), dtype)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [Way.TAPS, Way.DIRECT])
@needs_native
def test_convolutions_in_one_call(isa, threads, way, dtype):
    """By the weight of all channels, however many threads; each gradient alone is that of all."""
    generator = torch.Generator().manual_seed(2)
    far = (3, 3), Geometry((1, 1), (9, 9), (1, 1))  # there are outputs that no pixel reaches
    wide = (3, 3), Geometry((1, 2), (7, 7), (8, 7))  # and taps that reach no pixel
    cpp = module("cpp")
    for (kernel, geometry), (n, ins, outs) in itertools.product(
        [*GEOMETRIES, far, wide], [(1, 1, 1), (2, 17, 16), (2, 35, 50), (3, 8, 5), (1, 70, 33)]
    ):
        cols, read = gate(ins + 9, ins, generator)
        rows, made = gate(outs + 3, outs, generator)
        rows[0], cols[0] = rows[0].to(dtype), cols[0].to(dtype)
        x = torch.randn(n, ins, 9, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outs + 3, ins + 9, *kernel, dtype=dtype)
        bias = torch.randn(outs, dtype=dtype)
        plan = im2col.plan(x.shape, kernel, geometry, outs)._replace(way=way)
        leaves = [x.double(), weight.double(), cols[0].double()]
        leaves = [t.clone().requires_grad_() for t in leaves]
        right = leaves[1][made][:, read] * leaves[2][read][:, None, None]
        kernels = weight[made][:, read] * cols[0][read][:, None, None]
        right = F.conv2d(leaves[0], right, bias.double(), *geometry)
        y, packed = cpp.open_conv(x, weight, bias, rows, cols, True, plan, keeps=way is Way.DIRECT)
        near(y, right, dtype)
        assert packed is None if way is Way.TAPS else torch.equal(packed.view(outs, ins, *kernel), kernels)
        dy = torch.randn_like(y)
        expected = [*torch.autograd.grad(right, leaves, dy.double())]
        z = cols[0]
        expected[2] = expected[2].masked_fill((z <= 0) | (z >= 1), 0)
        operands = dy, x, weight, None, rows, cols, True, plan
        threads(1)
        grads = cpp.open_conv_grad(*operands, (True, True, True))
        for mine, theirs in zip(grads, expected, strict=True):
            near(mine, theirs, dtype)
        assert y.is_contiguous(memory_format=torch.channels_last)
        if way is Way.DIRECT:  # images that lie as planes
            planes = x.contiguous()
            assert torch.equal(cpp.open_conv(planes, weight, bias, rows, cols, True, plan)[0], y)
            dx, *others = cpp.open_conv_grad(dy, planes, weight, packed, *operands[4:], (True, True, True))
            assert dx.is_contiguous()
            assert all(torch.equal(a, b) for a, b in zip((dx, *others), grads, strict=True))
        for count, needs in ((2, (True, True, True)), (3, (True, False, True)), (1, (False, True, False))):
            threads(count)
            assert torch.equal(cpp.open_conv(x, weight, bias, rows, cols, True, plan)[0], y)
            for got, whole, needed in zip(cpp.open_conv_grad(*operands, needs), grads, needs, strict=True):
                assert torch.equal(got, whole) if needed else got is None


@needs_native
def test_convolutions_in_one_call_refuse_what_does_not_fit():
    cpp, geometry = module("cpp"), Geometry((1, 1), (1, 1), (1, 1))
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 4, 3, 3)
    plan = im2col.plan(x.shape, (3, 3), geometry, 5)._replace(way=Way.TAPS)
    y, _ = cpp.open_conv(x, weight, None, None, None, False, plan)
    with pytest.raises(ValueError, match="the plan must be of"):
        cpp.open_conv(x[:, :3], weight, None, None, None, False, plan)
    with pytest.raises(ValueError, match="the plan must be of"):
        cpp.open_conv(x, weight[:, :, :2], None, None, None, False, plan)
    with pytest.raises(ValueError, match=r"the gradient must have shape \(.*\), got"):
        cpp.open_conv_grad(y[:, :3], x, weight, None, None, None, False, plan, (True, True, False))
    with pytest.raises(ValueError, match="packed must be 180 contiguous elements"):
        cpp.open_conv_grad(y, x, weight, torch.randn(179), None, None, False, plan, (True, True, False))
    with pytest.raises(ValueError, match="gates: must be those of"):
        cpp.open_conv(x, torch.randn(5, 6, 3, 3), None, None, None, False, plan)
    with pytest.raises(ValueError, match="plan: must be of the 5 outputs that exist, got 4"):
        cpp.open_conv(x, weight, None, None, None, False, plan._replace(outs=4))
    with pytest.raises(ValueError, match="x must be in channels_last memory"):
        cpp.open_conv(x.contiguous(), weight, None, None, None, False, plan)
    with pytest.raises(ValueError, match="weight must be"):
        cpp.open_conv(x, weight.transpose(2, 3), None, None, None, False, plan)
    with pytest.raises(TypeError, match="weight must have dtype"):
        cpp.open_conv(x, weight.double(), None, None, None, False, plan)


@needs_native
def test_gates_that_are_1_have_a_gradient_of_0():
    x, weight, z = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.ones(3)
    leaves = [t.requires_grad_() for t in (x, weight, z)]
    geometry, sides = Geometry((1, 1), (1, 1), (1, 1)), narrow.Sides(None, None, 1, "cpp")
    plan = im2col.plan(x.shape, (3, 3), geometry, 5)
    y = narrow.narrow_conv2d(leaves[0], leaves[1], None, leaves[2], sides, plan)
    right = F.conv2d(x, weight, padding=1)
    near(y, right, torch.float32)
    dy = torch.randn_like(y)
    *got, dz = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(dz, torch.zeros(3))
    for mine, theirs in zip(got, torch.autograd.grad(right, leaves[:2], dy), strict=True):
        near(mine, theirs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@needs_native
def test_depthwise(isa, dtype):
    for (kernel, geometry), n, channels in itertools.product(GEOMETRIES, (0, 1, 3), (1, 2, 7, 33, 70)):
        leaves = [
            torch.randn(n, channels, 9, 8, dtype=dtype, requires_grad=True),
            torch.randn(channels, 1, *kernel, dtype=dtype, requires_grad=True),
        ]
        y = narrow.narrow_depthwise(*leaves, geometry)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        right = F.conv2d(*exact, None, *geometry, groups=channels)
        near(y, right, dtype)
        dy = torch.randn_like(y)
        for mine, theirs in zip(
            torch.autograd.grad(y, leaves, dy),
            torch.autograd.grad(right, exact, dy.double()),
            strict=True,
        ):
            near(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@needs_native
def test_batch_norm(isa, dtype):
    """Values, every gradient and the running statistics against torch's of gathered vectors in float64."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(2,), (70,), (3, 1, 1), (2, 3, 5), (4, 17, 16)]
    forms = [(True, True, True), (True, False, True), (True, True, False), (False, True, True)]
    for (n, *image), exist, (training, affine, running) in itertools.product(
        sizes, (1, 3, 8, 40, 150), forms
    ):
        size = exist + 5
        index = torch.randperm(size, generator=generator)[:exist].sort().values
        updated = torch.arange(0, exist if affine else 0, 2)  # without affine: none of them
        x, dy = (3 + torch.randn(n, exist, *image, dtype=dtype) for _ in range(2))
        vectors = [torch.rand(size, dtype=dtype) + 0.5 for _ in range(4)]
        weight, bias = vectors[:2] if affine else (None, None)
        own = [t.clone() for t in vectors[2:]] if running else [None, None]
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        channels, settings = Channels(index, updated), Settings(training, 0.3, 1e-3, size)
        y = narrow.narrow_batch_norm(leaves[0], *(leaves[1:] or (None, None)), *own, channels, settings)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        some = [None if t is None else t.double()[index] for t in (vectors[2:] if running else own)]
        gathered = [t[index] for t in exact[1:]] or [None, None]
        right = F.batch_norm(exact[0], *some, *gathered, training, 0.3, 1e-3)
        assert y.is_contiguous(memory_format=torch.channels_last) if image else y.is_contiguous()
        got = torch.autograd.grad(y, leaves, dy)
        expected = torch.autograd.grad(right, exact, dy.double())
        for mine, theirs in zip((y, *got), (right, *expected), strict=True):
            scale = theirs.abs().max() + 32  # 1 / sqrt(eps), by which rounding may grow
            near(mine / scale, theirs / scale, dtype)
        for mine, before, theirs in zip(own, vectors[2:], some, strict=True):
            if running:
                after = before.double()
                if training:
                    after[index[updated]] = theirs[updated]
                near(mine, after, dtype)
                assert mine._version == training


@needs_native
def test_chunks_and_threads_change_nothing(threads, monkeypatch):
    """Whatever is made at a time, by however many threads: depthwise and norms to the bit."""
    x, weight = torch.randn(5, 40, 12, 12), torch.randn(40, 1, 3, 3)
    geometry, dy = Geometry((1, 1), (1, 1), (1, 1)), torch.randn(5, 40, 12, 12)

    def run():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = narrow.narrow_depthwise(*leaves, geometry)
        every = Channels(None, None), Settings(True, 0.1, 1e-5, 40)
        norm = narrow.narrow_batch_norm(
            leaves[0], leaves[1][:, 0, 0, 0].contiguous(), None, None, None, *every
        )
        return y, norm, *torch.autograd.grad(y, leaves, dy), *torch.autograd.grad(norm, leaves, dy)

    first = run()
    threads(3)
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)
    kernel = torch.randn(8, 9 * 40)
    plan = im2col.plan(x.shape, (3, 3), geometry, 8)._replace(way=im2col.Way.PATCHES)
    whole = im2col.forward(x, kernel, None, plan)
    monkeypatch.setattr(im2col, "CHUNK", 1)
    torch.testing.assert_close(im2col.forward(x, kernel, None, plan), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_native)])
@pytest.mark.parametrize("run", [1, 2, 9])
def test_runs_are_columns_with_several_entries(backend, run):
    """pack and unpack of runs are those of a matrix in which each column's gate stands for its entries."""
    generator = torch.Generator().manual_seed(run)
    pair = module(backend)
    for (rows, made), (cols, read), (scale_rows, scale_cols) in [
        (gate(7, 4, generator), gate(6, 5, generator), scales)
        for scales in ((False, True), (True, False), (True, True))
    ]:
        full = torch.randn(7, 6 * run, dtype=torch.float64)
        packed = pair.pack(
            full, rows, cols, torch.float64, scale_rows=scale_rows, scale_cols=scale_cols, run=run
        )
        factor = torch.ones(7, 6, dtype=torch.float64)
        factor = factor * rows[0][:, None] if scale_rows else factor
        factor = factor * cols[0] if scale_cols else factor
        scaled = (full.view(7, 6, run) * factor[:, :, None])[made][:, read]
        torch.testing.assert_close(packed, scaled.reshape(len(made), -1))
        out = torch.full((7, 6 * run), float("nan"), dtype=torch.float64)
        grads = l0._calls.GateGrads(full, scale_rows, scale_cols)
        dw, dz_rows, dz_cols = pair.unpack(
            packed, (7, 6 * run), rows, cols, torch.float64,
            scale_rows=scale_rows, scale_cols=scale_cols, grads=grads, out=out, run=run,
        )  # fmt: skip
        right = torch.zeros(7, 6, run, dtype=torch.float64)
        right[made[:, None], read] = scaled
        terms = right * full.view(7, 6, run)
        torch.testing.assert_close(dw, (right * factor[:, :, None]).view(7, -1))
        for dz, z, other, scale, dim in (
            (dz_rows, rows[0], cols[0] if scale_cols else torch.ones(6).double(), scale_rows, 1),
            (dz_cols, cols[0], (rows[0] if scale_rows else torch.ones(7).double())[:, None], scale_cols, 0),
        ):
            if scale:
                expected = (terms.sum(2) * other).sum(dim).masked_fill((z <= 0) | (z >= 1), 0)
                torch.testing.assert_close(dz, expected)
            else:
                assert dz is None


@needs_native
def test_native_code_refuses_shapes_that_do_not_fit():
    x = torch.zeros(1, 4, 5, 5)
    good = im2col.shape_of(x, (3, 3), Geometry((1, 1), (1, 1), (1, 1)))
    at = x.data_ptr()
    for change in ((12, 6), (13, 4), (6, 0), (4, -1), (0, -1)):
        shape = [*good]
        shape[change[0]] = change[1]
        with pytest.raises(ValueError, match="shape: "):
            native.im2col(False, shape, at, at, 1)
        with pytest.raises(ValueError, match="shape: "):
            native.depthwise(False, shape, at, at, at, 0, 0, 0, 1)
    wide = im2col.shape_of(torch.zeros(1, 4, 20, 20), (9, 9), Geometry((1, 1), (1, 1), (1, 1)))
    with pytest.raises(ValueError, match="at most 64 taps, got 81"):
        native.depthwise(False, wide, at, at, at, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="at most 64 taps, got 81"):
        native.col2im(False, wide, at, at, 1)
    for index, rows, updated in ((4, 9, 0), (-1, 9, 0), (0, 0, 0), (0, 9, 1)):
        numbers = torch.tensor([index, updated])
        at_index, at_updated = numbers.data_ptr(), numbers.data_ptr() + 8
        with pytest.raises(ValueError, match=r"index must|updated must|sizes: "):
            native.batch_norm(
                False, rows, 1, 4, at_index, True, at, 0, 0, at, at, 0.1, at, 0, 0, 0.1, at_updated, 1,
                0, 0, 0, 0, 1,
            )  # fmt: skip
    for strides, run in (((1, 6), 2), ((6, 1), 0)):
        with pytest.raises(ValueError, match=f"run must be positive, .* got {run}"):
            native.pack((at, *strides), 0, 6, 2, at, 0, 6, 2, None, None, False, False, False, run, False, 1)


@needs_native
def test_runs_of_strided_matrices_are_copied():
    strided = torch.randn(4, 6).t()
    assert torch.equal(module("cpp").pack(strided, None, None, torch.float32, run=2), strided)


@needs_native
def test_second_derivatives_are_refused_and_views_are_taken_for_their_values():
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    rows, made = gate(4, 3, torch.Generator().manual_seed(0))
    sides = narrow.Sides([t.float() if t.is_floating_point() else t for t in rows], None, 1, "cpp")
    plan = im2col.plan(x.shape, (3, 3), geometry, 3)
    with pytest.raises(ValueError, match="plan must be of"):
        narrow.narrow_conv2d(x[:1], weight, None, None, sides, plan)
    calls = {
        "narrow_conv2d": lambda x, w: narrow.narrow_conv2d(x, w, None, None, sides, plan),
        "narrow_depthwise": lambda x, w: narrow.narrow_depthwise(x, w[:3, :1], geometry),
        "narrow_batch_norm": lambda x, w: narrow.narrow_batch_norm(
            x,
            w[:3, 0, 0, 0].contiguous(),
            None,
            None,
            None,
            Channels(None, None),
            Settings(True, 0.1, 1e-5, 3),
        ),
        "narrow_weight": lambda x, w: F.conv2d(x, narrow.narrow_weight(w, None, sides), padding=1),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=name):
            torch.autograd.grad(call(x, weight).square().sum(), weight, create_graph=True)
        negated = torch.complex(torch.zeros(2, 3, 5, 5), -x.detach()).conj().imag
        assert negated.is_neg()
        torch.testing.assert_close(call(negated, weight), call(x.detach(), weight))
    right = F.conv2d(x, weight[made], padding=1)
    torch.testing.assert_close(calls["narrow_conv2d"](x, weight), right, rtol=1e-4, atol=1e-4)
