"""Convolutions of few channels by panels of patches, on every instruction set against torch's in float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import Gates
from l0kernels._native import native
from l0kernels.impl import few_channels, im2col
from l0kernels.impl.im2col import Geometry

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(native is None, reason="no native kernels"),
]
FORMATS = (torch.contiguous_format, torch.channels_last)
# images, channels read and made, kernel, height, width, stride, padding, dilation
SHAPES = {
    "LeNet's first": (3, 1, 20, (5, 5), 14, 14, (1, 1), (0, 0), (1, 1)),
    "LeNet's second": (5, 20, 50, (5, 5), 12, 12, (1, 1), (0, 0), (1, 1)),
    "no image": (0, 3, 5, (3, 3), 6, 7, (1, 1), (1, 1), (1, 1)),
    "one of all": (1, 1, 1, (1, 2), 1, 2, (1, 1), (0, 0), (1, 1)),
    "one position": (7, 3, 4, (3, 4), 3, 4, (1, 1), (0, 0), (1, 1)),
    "one open": (2, 17, 1, (3, 3), 9, 7, (1, 1), (1, 1), (1, 1)),
    "full vectors": (2, 16, 32, (3, 3), 8, 8, (1, 1), (1, 1), (1, 1)),
    "panels end": (2, 8, 4, (2, 2), 9, 9, (1, 1), (0, 0), (1, 1)),  # 32 entries, then the ones of the bias
    "strides": (3, 5, 8, (3, 2), 11, 10, (2, 3), (1, 0), (1, 1)),
    "stride over the kernel": (2, 3, 6, (2, 2), 9, 11, (3, 4), (0, 1), (1, 1)),
    "dilation": (2, 4, 6, (3, 3), 11, 9, (1, 1), (2, 2), (2, 1)),
    "both": (2, 6, 3, (3, 4), 13, 12, (2, 2), (3, 4), (1, 3)),
    "wide padding": (2, 2, 3, (2, 2), 3, 2, (1, 1), (4, 5), (1, 1)),
    "many": (1, 37, 141, (2, 3), 6, 19, (1, 1), (0, 1), (1, 1)),
    "many images": (37, 2, 3, (2, 2), 4, 3, (1, 1), (0, 0), (1, 1)),
    "several parts": (7, 2, 3, (3, 3), 20, 18, (1, 1), (0, 0), (1, 1)),  # of the sums over positions
    "large": (1, 3, 16, (7, 7), 70, 45, (2, 2), (3, 3), (1, 1)),
}


def case(name, dtype=torch.float32):
    n, ins, outs, kernel, height, width, *geometry = SHAPES[name]
    x = torch.randn(n, ins, height, width, dtype=dtype)
    weight = torch.randn(outs, ins, *kernel, dtype=dtype)
    return x, weight, torch.randn(outs, dtype=dtype), (*map(list, geometry), 1)


def run(x, weight, bias, conv, fmt, dy, need_x=True, need_w=True):
    y = few_channels.convolve(x, weight, bias, conv, fmt)
    return y, *few_channels.convolve_grad(dy, x, weight, conv, fmt, need_x, need_w)


def near(got, expected, like):
    """Within the roundings of sums of as many products as `like` says."""
    assert got.shape == expected.shape
    bound = 8 * torch.finfo(got.dtype).eps * like**0.5
    largest = max(1.0, expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_against_torch(isa, name, dtype):
    x, weight, bias, conv = case(name, dtype)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    right = F.conv2d(*exact, *conv)
    dy = torch.randn(right.shape, dtype=dtype)
    grads = torch.autograd.grad(right, exact, dy.double())
    sums = (weight[0].numel(), weight.shape[0] * weight[0, 0].numel(), dy[:, 0].numel() + 1)
    for fmt in FORMATS:
        y, dx, dw, db = run(x, weight, bias, conv, fmt, dy)
        near(y, right.detach(), sums[0])
        near(
            few_channels.convolve(x, weight, None, conv, fmt),
            (right - exact[2][:, None, None]).detach(),
            sums[0],
        )
        for got, expected, like in zip((dx, dw, db), grads, (sums[1], sums[2], sums[2]), strict=True):
            near(got, expected, like)
        for t in (y, dx):
            assert t.is_contiguous(memory_format=fmt)
        assert dw.is_contiguous()


@pytest.mark.parametrize("name", ["LeNet's first", "strides", "many images", "several parts", "large"])
def test_threads_do_not_change_a_bit(isa, name, threads):
    x, weight, bias, conv = case(name)
    for fmt in FORMATS:
        dy = torch.randn_like(few_channels.convolve(x, weight, bias, conv, fmt))
        first = run(x, weight, bias, conv, fmt, dy)
        for number in (2, 3, 5):
            threads(number)
            for a, b in zip(first, run(x, weight, bias, conv, fmt, dy), strict=True):
                assert torch.equal(a, b)
        threads(1)


def test_what_is_not_wanted_is_not_there(isa):
    x, weight, bias, conv = case("dilation")
    dy = torch.randn_like(F.conv2d(x, weight, bias, *conv))
    _, *every = run(x, weight, bias, conv, FORMATS[1], dy)
    for need_x, need_w in itertools.product((False, True), repeat=2):
        _, *some = run(x, weight, bias, conv, FORMATS[1], dy, need_x, need_w)
        for t, whole, needed in zip(some, every, (need_x, need_w, need_w), strict=True):
            assert torch.equal(t, whole) if needed else t is None


def test_large_images_have_their_gradient_from_torch(isa, monkeypatch):
    x, weight, bias, conv = case("both")
    exact = x.double().requires_grad_()
    right = F.conv2d(exact, weight.double(), bias.double(), *conv)
    dy = torch.randn(right.shape)
    (expected,) = torch.autograd.grad(right, exact, dy.double())
    for fmt in FORMATS:
        _, *own = run(x, weight, bias, conv, fmt, dy)
        monkeypatch.setattr(im2col, "PATCHES", 1)
        _, dx, dw, db = run(x, weight, bias, conv, fmt, dy)
        monkeypatch.undo()
        near(dx, expected, 36)
        assert dx.is_contiguous(memory_format=fmt)
        assert torch.equal(dw, own[1])
        assert torch.equal(db, own[2])
        assert run(x, weight, bias, conv, fmt, dy, need_w=False)[2:] == (None, None)


def test_operands_of_any_strides(isa):
    x, weight, bias, conv = case("strides")
    dy = torch.randn_like(F.conv2d(x, weight, bias, *conv))
    whole = run(x, weight, bias, conv, FORMATS[0], dy)

    def sliced(t):
        return t.new_full([2 * n + 1 for n in t.shape], float("nan"))[
            tuple([slice(1, None, 2)] * t.ndim)
        ].copy_(t)

    part = run(*map(sliced, (x, weight, bias)), conv, FORMATS[0], sliced(dy))
    negative = run(*(torch._neg_view(-t) for t in (x, weight, bias)), conv, FORMATS[0], torch._neg_view(-dy))
    for a, *others in zip(whole, part, negative, strict=True):
        for b in others:
            assert torch.equal(a, b)


def test_nan_and_infinity_pass(isa):
    x, weight, bias, conv = case("LeNet's first")
    x[1, 0, 3, 4], x[2, 0, 13, 13] = float("nan"), float("inf")
    for fmt in FORMATS:
        right = F.conv2d(x.double(), weight.double(), bias.double(), *conv)
        y = few_channels.convolve(x, weight, bias, conv, fmt)
        assert torch.equal(y.isnan(), right.isnan())
        assert torch.equal(y.isinf(), right.isinf())


def test_which_convolutions(isa):
    def serves(ins, outs, kernel=(3, 3), groups=1, dtype=torch.float32, like=torch.empty):
        x, weight = like(2, ins, 9, 9, dtype=dtype), torch.empty(outs, ins // groups, *kernel, dtype=dtype)
        return few_channels.serves(x, weight, ([1, 1], [0, 0], [1, 1], groups))

    few = isa != "base"
    assert serves(20, 50) == serves(1, 20, (5, 5)) == serves(3, 64) == few
    assert serves(9, 5, dtype=torch.float64) == few
    assert serves(16, 20) == (isa == "avx512")
    assert not serves(64, 64)
    assert not serves(8, 16, dtype=torch.float64)
    assert not serves(20, 50, (1, 1))
    assert not serves(3, 8, (9, 9))
    assert not serves(20, 50, groups=10)
    assert not serves(20, 50, dtype=torch.bfloat16)
    assert not serves(20, 50, like=lambda *size, dtype: torch.empty(*size, dtype=dtype).as_subclass(Named))


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("fmt", FORMATS)
def test_gated_layers_are_computed_so(isa, fmt, monkeypatch):
    """Both operators, and the layers of packed channels; the rule has no say in what comes out."""
    monkeypatch.setattr(im2col, "are_few", lambda *_: True)
    x = torch.randn(4, 6, 8, 8).contiguous(memory_format=fmt)
    weight, bias = torch.randn(9, 6, 3, 3), torch.randn(9)
    ins = [0.0, 1, 0.5, 0, 1, 1], [0.0] * 6, [0.0] * 5 + [0.3]
    outs = [0.4] + [0.0, 1] * 4, [0.0] * 9
    for z in itertools.product(map(torch.tensor, ins), map(torch.tensor, outs)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, *z)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        right = F.conv2d(exact[0] * exact[3][:, None, None], exact[1], exact[2], padding=1)
        right = right * exact[4][:, None, None]
        dy = torch.randn(right.shape)
        expected = [*torch.autograd.grad(right, exact, dy.double())]
        for i in (3, 4):
            expected[i] = expected[i].masked_fill((exact[i] <= 0) | (exact[i] >= 1), 0)
        for packed in (False, True):
            sides = [Gates.from_z(z, full_grad=False) for z in leaves[3:]]
            gates = {"in_gates": sides[0], "out_gates": sides[1]}
            if packed:
                y = l0.unpack_channels(l0.packed_conv2d(*leaves[:3], padding=1, **gates))
            else:
                y = l0.gated_conv2d(*leaves[:3], padding=1, **gates)
            near(y, right.detach(), 100)
            for got, wanted in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
                near(got, wanted, 500)


def test_gradients_of_another_size_or_dtype_are_refused():
    """Operators take what nobody has compared with their outputs."""
    x, weight, bias, conv = case("dilation")
    for fmt in FORMATS:
        dy = torch.randn_like(few_channels.convolve(x, weight, bias, conv, fmt))
        for wrong in (dy[:-1], dy[:, :-1], dy[..., :-1], dy[..., :-1, :]):
            with pytest.raises(ValueError, match=r"the gradient must have shape \(2, 6, .*\), got"):
                few_channels.convolve_grad(wrong, x, weight, conv, fmt, True, True)
        with pytest.raises(TypeError, match=r"the gradient must have dtype torch\.float32, got"):
            few_channels.convolve_grad(dy.double(), x, weight, conv, fmt, True, True)


def test_gradients_of_depthwise_ones_are_refused_by_size():
    x, taps = torch.randn(2, 3, 6, 5).to(memory_format=torch.channels_last), torch.randn(9, 3)
    shape = im2col.shape_of(x, (3, 3), Geometry((1, 1), (1, 1), (1, 1)))
    dy = torch.randn_like(im2col.depthwise(x, taps, shape))
    for wrong in ((dy[:1], x, taps), (dy, x[:1], taps), (dy, x, taps[:8])):
        with pytest.raises(ValueError, match=r"must be .* contiguous elements, got"):
            im2col.depthwise_grad(*wrong, shape, True, True)
    for wrong in ((x[:1], taps), (x, taps[:8])):
        with pytest.raises(ValueError, match=r"must be .* contiguous elements, got"):
            im2col.depthwise(*wrong, shape)


def test_native_code_refuses_what_does_not_fit():
    x = torch.zeros(1, 4, 20, 20)
    at = x.data_ptr()
    good = im2col.shape_of(x, (3, 3), Geometry((1, 1), (1, 1), (1, 1)))
    wide = im2col.shape_of(x, (9, 9), Geometry((1, 1), (1, 1), (1, 1)))
    with pytest.raises(ValueError, match="shape: "):
        native.conv(False, [*good[:12], 6, 20], 2, True, at, at, at, at, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="out: -1"):
        native.conv(False, good, -1, True, at, at, at, at, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="at most 64 taps, got 81"):
        native.conv(False, wide, 2, True, at, at, 0, 0, at, at, 0, 0, 1)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_results_lie_where_x_does(fmt):
    """Whatever device torch makes tensors on by default."""
    x, weight, bias, conv = case(next(iter(SHAPES)))
    dy = torch.randn_like(few_channels.convolve(x, weight, bias, conv, fmt))
    expected = run(x, weight, bias, conv, fmt, dy)
    with torch.device("meta"):
        got = run(x, weight, bias, conv, fmt, dy)
    assert all(map(torch.equal, got, expected))
