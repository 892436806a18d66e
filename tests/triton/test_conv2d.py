"""The convolution's launchers: every side packed and dense, every gradient, against the reference in fp64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import Gates, reference
from l0kernels._calls import Conv2dCall, Wanted
from l0kernels._gates import HardConcrete
from l0kernels.impl import triton as backend
from l0kernels.triton_kernels import conv2d, conv2d_tiles
from triton_device import DEVICE, DTYPES, INTERPRETED
from triton_gates import make_gate, positions

DIST = HardConcrete()


@pytest.fixture(autouse=True)
def poison():
    """Fresh inputs; unwritten memory reads as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def bury(x, gate):
    """x in capacity layout: open channels first, zeros to the extent, NaN beyond."""
    units, end = positions(gate, x.shape[1])
    data = torch.full_like(x, float("nan"), memory_format=torch.channels_last)
    data[:, :end] = 0
    is_open = gate[0][units] != 0
    data[:, : len(units)] = torch.where(is_open[:, None, None], x[:, units], 0.0)
    return data


def dig(data, gate):
    """The dense channels of a capacity layout; its zeros are checked."""
    units, end = positions(gate, data.shape[1])
    assert not data[:, len(units) : end].any()
    assert data[:, end:].isnan().all()
    full = torch.zeros_like(data)
    full[:, units] = data[:, : len(units)]
    assert not full[:, gate[0] == 0].any()
    return full


def error_of(dtype):
    """Of a sum of terms of order one, relative to its norm."""
    if dtype == torch.float32:
        return 1e-5 if INTERPRETED else 2e-3
    return 4 * torch.finfo(dtype).eps


def near(value, exact, dtype, what):
    assert value.shape == exact.shape, what
    bound = error_of(dtype) * max(1.0, exact.norm().item())
    assert (value.double() - exact).norm().item() <= bound, what  # fails for a NaN, too


def check(
    x_shape, n_out, kernel, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, gates=(None, None),
    scales=(True, True), packed=(False, False), full=(False, False), bias=True, dtype=torch.float32,
    layout=torch.contiguous_format, dist=None, memory=torch.contiguous_format,
):  # fmt: skip
    """Forward and backward of the launchers; the gates' gradients exactly zero where they must be."""
    conv = ([*stride], [*padding], [*dilation], groups)
    x = draw(*x_shape, dtype=dtype).contiguous(memory_format=layout)
    weight = draw(n_out, x_shape[1] // groups, *kernel, dtype=dtype).contiguous(memory_format=memory)
    b = draw(n_out, dtype=dtype) if bias else None
    in_gate, out_gate = gates
    given = bury(x, in_gate) if packed[0] and in_gate else x

    leaves = [t if t is None else t.double().requires_grad_() for t in (x, weight, b)]
    z = [None if g is None else g[0].double().requires_grad_() for g in gates]
    scaled = leaves[0]
    if in_gate:
        scaled = scaled * (z[0] if scales[0] else (in_gate[0] != 0).double())[:, None, None]
    exact = F.conv2d(scaled, leaves[1], leaves[2], stride, padding, dilation, groups)
    if out_gate:
        exact = exact * (z[1] if scales[1] else (out_gate[0] != 0).double())[:, None, None]

    call = Conv2dCall(given, weight, b, in_gate, out_gate, *scales, *packed, *conv, dtype)
    y, saved = backend.conv2d_forward(call)
    assert y.is_contiguous(memory_format=torch.channels_last)
    shapes = backend.conv2d_saved_shapes(call)
    assert [tuple(t.shape) for t in saved] == [tuple(shape) for shape in shapes]
    dense = dig(y, out_gate) if packed[1] and out_gate else y
    near(dense, exact.detach(), dtype, "y")
    if out_gate:
        assert not dense[:, out_gate[0] == 0].any()

    dy = draw(*exact.shape, dtype=dtype)
    exact.backward(dy.double())
    dy = bury(dy, out_gate) if packed[1] and out_gate else dy.contiguous(memory_format=layout)
    wants_z = [g is not None and scale for g, scale in zip(gates, scales, strict=True)]
    needs = [True, True, bias, *wants_z]
    dx, dw, db, *dz = backend.conv2d_backward(call, dy, saved, Wanted([*full], needs, dist))
    near(dig(dx, in_gate) if packed[0] and in_gate else dx, leaves[0].grad, dtype, "dx")
    near(dw, leaves[1].grad, dtype, "dw")
    assert dw.is_contiguous()
    if in_gate and groups == 1:
        assert not dw[:, in_gate[0] == 0].any()
    if out_gate:
        assert not dw[out_gate[0] == 0].any()
    if bias:
        near(db, leaves[2].grad, dtype, "db")
        assert out_gate is None or not db[out_gate[0] == 0].any()
    else:
        assert db is None
    for value, leaf, gate, wanted, all_open in zip(dz, z, gates, wants_z, full, strict=True):
        if not wanted:
            assert value is None
            continue
        values = gate[0]
        where = (values != 0) if all_open else (values > 0) & (values < 1)
        assert not value[~where].any()
        right = torch.where(where, leaf.grad, 0.0)
        if dist is not None:
            s = (values.double() - dist.gamma) / (dist.zeta - dist.gamma)
            right = right * (dist.zeta - dist.gamma) / dist.beta * s * (1 - s)
        near(value, right, dtype, "dz")


GEOMETRIES = (
    {"kernel": (3, 3), "padding": (1, 1)},
    {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel": (2, 3), "stride": (2, 3), "padding": (2, 1), "dilation": (2, 3)},
    {"kernel": (1, 1), "stride": (3, 2)},
    {"kernel": (4, 1), "stride": (1, 4), "dilation": (1, 1), "padding": (0, 3)},
    {"kernel": (1, 1)},
)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(f"{k}{v}" for k, v in g.items()))
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(LAYOUTS[::-1], marks=pytest.mark.long)])
def test_strides_paddings_and_dilations(geometry, layouts):
    """Of images in one memory layout without gates, in the other with them."""
    for gates, layout in zip(((None, None), (make_gate(9, 0.6), make_gate(7, 0.6))), layouts, strict=True):
        check((2, 9, 7, 6), 7, **geometry, gates=gates, layout=layout)


def gate_of(n, kind):
    """Packed, with an extent below n, which takes more than 128 channels, or plain."""
    gate = make_gate(n, 0.3, plain=kind == "plain")
    assert (int(gate[2][1]) >= n) == (kind == "plain")
    return gate


@pytest.mark.covering(2)
@pytest.mark.parametrize("kernel", [(1, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("sides", ["in", "out", "both"])
@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_sides_packed_and_dense(kind, sides, kernel):
    """Wide layers: capacity layouts on either side, selected or multiplied, W in either memory."""
    wide = (130, 136) if kind == "packed" else (70, 72)  # packed, an extent is a multiple of 128
    n_in, n_out = (wide[0] if sides != "out" else 8), (wide[1] if sides != "in" else 5)
    gates = (gate_of(n_in, kind) if sides != "out" else None, gate_of(n_out, kind) if sides != "in" else None)
    for packed in itertools.product((False, True), repeat=2):
        possible = all(not p or g is not None for p, g in zip(packed, gates, strict=True))
        if possible and (sides != "both" or any(packed)):
            scales = (not packed[1], packed[0] or packed[1])
            memory = torch.channels_last if packed[0] else torch.contiguous_format
            check(
                (1, n_in, 2, 3), n_out, kernel, gates=gates, packed=packed, scales=scales, memory=memory,
                layout=torch.channels_last, dist=DIST if packed[0] else None,
            )  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("n", [12, 130], ids=["narrow", "wide"])
def test_all_open_and_all_closed(n, keep):
    gates = make_gate(n, keep), make_gate(12, keep)
    for packed in (False, True) if n == 12 else (True,):
        check((1, n, 2, 3), 12, (2, 1), gates=gates, packed=(packed, packed), full=(True, True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype):
    gates = gate_of(136, "packed"), gate_of(140, "packed")
    check((1, 136, 2, 3), 140, (1, 2), gates=gates, packed=(True, True), dtype=dtype)
    check((2, 20, 5, 4), 24, (3, 3), padding=(1, 1), gates=(make_gate(20, 0.6), None), dtype=dtype)


def test_autocast_casts_on_the_way():
    x, weight, gate = draw(2, 12, 5, 4), draw(6, 12, 3, 3), make_gate(12, 0.6)
    conv, half = ([1, 1], [1, 1], [1, 1], 1), torch.float16
    call = Conv2dCall(x, weight, None, gate, None, True, True, False, False, *conv, half)
    y, saved = backend.conv2d_forward(call)
    exact = F.conv2d(x * gate[0][:, None, None], weight, padding=1)
    assert y.dtype == half
    near(y, exact.double(), half, "y")
    wanted = Wanted([False] * 2, [True, True, False, False, False], None)
    dx, dw, *_ = backend.conv2d_backward(call, y, saved, wanted)
    assert dx.dtype == dw.dtype == torch.float32
    near(dx, torch.nn.grad.conv2d_input(x.shape, weight, exact, padding=1).double()
         * gate[0][:, None, None].double(), half, "dx")  # fmt: skip


@pytest.mark.parametrize("groups", [2, 6], ids=["two", "depthwise"])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_groups(groups, multiplier):
    options = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "groups": groups}
    n_out = 6 * multiplier
    for gates in ((None, None), (make_gate(6, 0.6), None), (make_gate(6, 0.6), make_gate(n_out, 0.6))):
        check((2, 6, 4, 3), n_out, (3, 2), **options, gates=gates)


@pytest.mark.covering(1)
@pytest.mark.parametrize("groups", [34, 136], ids=["groups", "depthwise"])
@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_groups_packed(kind, groups):
    gates = gate_of(136, kind), gate_of(136, kind)
    for packed in ((True, False), (False, True)):
        options = {"groups": groups, "gates": gates, "packed": packed, "scales": (True, packed[0])}
        check((1, 136, 3, 2), 136, (1, 2), **options, dist=DIST)


def test_empty_batch_and_strided_inputs():
    check((0, 6, 5, 4), 4, (3, 3), gates=(make_gate(6, 0.5), make_gate(4, 0.5)))
    check((0, 6, 5, 4), 6, (3, 3), groups=6, gates=(make_gate(6, 0.5), None))
    conv = ([1, 1], [0, 0], [1, 1], 1)
    wide, weight = draw(2, 20, 9, 5).contiguous(memory_format=torch.channels_last), draw(4, 16, 6, 2)
    x, weight = wide[:, 3:11, ::2], weight[:, ::2, ::2]
    call = Conv2dCall(x, weight, None, None, None, True, True, False, False, *conv, x.dtype)
    y, saved = backend.conv2d_forward(call)
    near(y, F.conv2d(x.double(), weight.double()), x.dtype, "y")
    dy = torch.ones((), device=DEVICE).expand_as(y)
    wanted = Wanted([False] * 2, [False, True, False, False, False], None)
    _, dw, *_ = backend.conv2d_backward(call, dy, saved, wanted)
    near(dw, torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double()), x.dtype, "dw")


def test_nothing_beyond_the_channels_of_a_slice_is_read():
    """Channels that a view leaves out may hold anything."""
    wide = draw(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    wide[:, 12:] = float("nan")
    x, weight = wide[:, :12], draw(8, 12, 3, 3)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    y, _ = backend.conv2d_forward(
        Conv2dCall(x, weight, None, None, None, True, True, False, False, *conv, x.dtype)
    )
    near(y, F.conv2d(x.double(), weight.double(), padding=1), x.dtype, "y")


@pytest.mark.parametrize(
    "n_open", [0, 17, 64, 65, 140, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 40, 60, 97))]
)
def test_tiles_cover_the_open_columns(n_open):
    """Tiles halve where the columns end: every width, in the product and in the gradient of W."""
    n, k = 144, 16
    z = torch.zeros(n, device=DEVICE)
    z[torch.randperm(n)[:n_open]] = 0.5
    gate = list(Gates.from_z(z)[:3])
    x, weight, dy = draw(1, k, 3, 4), draw(n, k, 2, 1), draw(1, n, 2, 4)
    product, gradient = (
        conv2d_tiles.Window(1, *sizes, 1, 1, 0, 0, 1, 1) for sizes in ((3, 4, 2, 4, 2, 1), (2, 4, 2, 4, 1, 1))
    )
    y = torch.full((8, n), float("nan"), device=DEVICE)
    packed = conv2d.pack_weight(weight, gate, None, torch.float32)
    rows = conv2d.as_rows(x).contiguous()
    for levels in (1, 2, 3):
        config = conv2d_tiles.Config(16, 64, 16, levels, 4, 2)
        conv2d.convolve(
            conv2d.Operand(rows), packed, conv2d.Operand(y), product, (n, k),
            n_gate=gate, mode_n=1, config=config,
        )  # fmt: skip
        exact = F.conv2d(x.double(), weight.double()) * z[:, None, None]
        near(dig(conv2d.as_images(y, 1, 2, 4), gate), exact, torch.float32, f"y {levels}")
        # The narrowing side of dW is that of the inputs: y's channels play x.
        dw, _, parts = conv2d.weight_product(
            conv2d.Operand(draw(8, 8)[:, :4]), conv2d.Operand(conv2d.as_rows(bury(dy, gate))),
            draw(4, n, 1, 1), gradient, i_gate=gate, modes=(0, 1), dz_i=True, config=config,
        )  # fmt: skip
        assert dw.isfinite().all()
        assert parts.isfinite().all()
        assert not dw[:, z == 0].any()
        assert (dw[:, z != 0] != 0).all()


def test_channels_are_packed_and_unpacked():
    for n, kind in ((7, "plain"), (140, "packed"), (140, "plain")):
        gate = gate_of(n, kind)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = draw(2, n, 3, 2).contiguous(memory_format=layout)
            data = backend.pack_channels(x, gate, torch.float32)
            assert data.is_contiguous(memory_format=torch.channels_last)
            exact = x * (gate[0] != 0)[:, None, None]
            assert torch.equal(dig(data, gate), exact)
            assert torch.equal(backend.unpack_channels(bury(x, gate), gate, torch.float32), exact)


def test_reference_has_the_same_formula():
    """What the other tests compare with is the reference's convolution."""
    x, weight, b, z = draw(2, 6, 5, 4), draw(4, 6, 3, 3), draw(4), torch.rand(4, device=DEVICE)
    y = reference.gated_conv2d(x, weight, b, 2, 1, out_gates=Gates.from_z(z))
    torch.testing.assert_close(y, F.conv2d(x, weight, b, 2, 1) * z[:, None, None])


@pytest.mark.covering(2)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["every second", "one for all", "later"])
def test_a_bias_of_any_strides(layout, kernel, groups):
    """Kernels read it by address alone."""
    whole = draw(40)
    bias = {"every second": whole[::2], "one for all": whole[:1].expand(20), "later": whole[20:]}[layout]
    x, weight = draw(1, 8, 8, 7), draw(20, 8 // groups, *kernel)
    z = torch.rand(20, device=DEVICE) * (torch.rand(20, device=DEVICE) < 0.6)
    leaves = [t.requires_grad_() for t in (x, weight, bias.detach(), z)]
    results = []
    for name in ("triton", "reference"):
        with l0.use_backend(name):
            gates = Gates.from_z(
                z if name == "triton" else torch.where(z == 0, z.detach(), z), full_grad=True
            )
            y = l0.gated_conv2d(*leaves[:3], groups=groups, out_gates=gates)
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * max(1.0, want.abs().max().item()))


@pytest.mark.covering(2)
@pytest.mark.parametrize("sizes", [(0, 6), (8, 0)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_no_inputs_or_no_outputs(packed, groups, sizes):
    """The bias and its gate are all there is to it, or nothing is."""
    n_in, n_out = sizes
    leaves = [
        draw(2, n_in, 4, 5),
        draw(n_out, n_in // groups, 3, 3),
        draw(n_out),
        torch.rand(n_out, device=DEVICE),
    ]
    x, weight, bias, z = (t.requires_grad_() for t in leaves)
    gates = Gates.from_z(z)
    with l0.use_backend("triton"):
        if packed:
            y = l0.unpack_channels(l0.packed_conv2d(x, weight, bias, groups=groups, out_gates=gates))
        else:
            y = l0.gated_conv2d(x, weight, bias, groups=groups, out_gates=gates)
        grads = torch.autograd.grad(y, [x, weight, bias, z], torch.ones_like(y))
    assert torch.equal(y, (bias * z)[None, :, None, None].expand(2, n_out, 2, 3))
    want = [torch.zeros_like(x), torch.zeros_like(weight), 12 * z, 12 * bias]
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.long)])
def test_outputs_may_be_changed_in_place(n):
    """As those of torch's convolution: what a Function returns must be no view."""
    gates = Gates.from_z(torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.2], device=DEVICE), full_grad=False)
    w = draw(6, 6, 2, 2).requires_grad_()
    calls = {
        "dense": lambda x: l0.gated_conv2d(x, w, out_gates=gates),
        "grouped": lambda x: l0.gated_conv2d(x, w[:, :2], groups=3, in_gates=gates, out_gates=gates),
        "unpack": lambda x: l0.unpack_channels(l0.pack_channels(x * 1, gates)),
        "between": lambda x: l0.packed_conv2d(l0.pack_channels(x * 1, gates), w, in_gates=gates),
        "norm": lambda x: l0.unpack_channels(
            l0.gated_batch_norm(l0.pack_channels(x * 1, gates), None, None, training=True)
        ),
    }
    x = draw(n, 6, 4, 4).requires_grad_()
    with l0.use_backend("triton"):
        for name, call in calls.items():
            expected = torch.autograd.grad(call(x).relu().sum(), x)[0]
            got = torch.autograd.grad(call(x).relu_().sum(), x)[0]
            assert torch.equal(got, expected), name
