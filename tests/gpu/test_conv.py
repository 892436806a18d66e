"""Gated convolutions and batch norms on a GPU, dense and packed, against the dense formula in float64."""

import itertools

import pytest
import test_batch_norm
import test_conv2d
import torch
from gpu_cases import BACKENDS, DEVICE, DTYPES, NEEDS_GPU, gates_from, on_device, or_refused, why_skip
from test_conv2d import LAYOUTS, needs_of

import l0kernels as l0
from l0kernels import Packed, reference
from op_checks import assert_near, compare, make_z

pytestmark = NEEDS_GPU

WIDE = {
    "three by three": (160, 320, (3, 3), 10, 9, {"padding": 1}),
    "two strides": (320, 160, (3, 3), 9, 10, {"stride": 2, "padding": 1}),
    "strides and dilation": (
        136,
        200,
        (3, 2),
        11,
        9,
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    ),
    "pointwise, wide": (320, 136, (1, 1), 8, 8, {}),
    "pointwise, strided": (192, 136, (1, 1), 8, 8, {"stride": 2}),
    "groups, wide": (160, 320, (3, 3), 6, 7, {"groups": 20, "padding": 1}),
    "depthwise, wide": (160, 160, (3, 3), 7, 7, {"groups": 160, "padding": 1}),
}
"""As test_conv2d.GEOMETRIES; with more than 128 channels a gate can be packed."""

SIDES = [(True, "out_gates"), (False, "out_support"), (True, None)]


def ids(dtype):
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    reason = why_skip(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    with l0.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison():
    """Fresh numbers in every test; unwritten memory reads as NaN; no tf32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def layer(options, sides, *, packed=False, plain=False, full=False):
    """The call of a layer whose gates come from the leaves z_in and z_out."""

    def call(namespace, x, weight, bias, z_in=None, z_out=None):
        kwargs = dict(options)
        if sides[0]:
            kwargs["in_gates"] = gates_from(z_in, plain=plain, full=full)
        if sides[1]:
            kwargs[sides[1]] = gates_from(z_out, plain=plain, full=full)
        if namespace is reference or not packed:
            return namespace.gated_conv2d(x, weight, bias, **kwargs)
        if sides[0]:
            x = l0.pack_channels(x, kwargs["in_gates"])
        y = l0.packed_conv2d(x, weight, bias, **kwargs)
        return l0.unpack_channels(y) if isinstance(y, Packed) else y

    return call


def check(name, sides, dtype, *, layout="contiguous", kinds=("mixed", "mixed"), n=3, full=False, **options):
    tensors, conv, masks = test_conv2d.case(name, sides, kinds, dtype, full, n)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    tensors, masks = on_device([tensors, masks])
    return compare(
        layer(conv, sides, full=full, **options), tensors, dtype=dtype, masks=masks,
        what=f"{name} {sides} {layout} {kinds} {options}", needs=needs_of(tensors, sides),
    )  # fmt: skip


served = or_refused("dtype", lambda _: "gated_conv2d")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """test_conv2d's cases know the wide ones, too."""
    for name, geometry in WIDE.items():
        monkeypatch.setitem(test_conv2d.GEOMETRIES, name, geometry)


@each_dtype
@pytest.mark.parametrize("name", test_conv2d.GEOMETRIES)
@served
def test_conv_geometries(name, dtype):
    for sides, packed in zip(SIDES, (False, True, True), strict=True):
        check(name, sides, dtype, packed=packed, layout="channels_last" if packed else "contiguous")


@each_dtype
@pytest.mark.parametrize("name", WIDE)
@served
def test_conv_wide(name, dtype):
    for packed, plain in itertools.product((False, True), repeat=2):
        check(name, (True, "out_gates"), dtype, packed=packed, plain=plain, kinds=("few", "mixed"))


@each_dtype
@served
def test_conv_kinds_of_gates(dtype):
    for kinds in itertools.product(("open", "closed", "few"), repeat=2):
        _, grads = check("two strides", (True, "out_gates"), dtype, kinds=kinds, packed=True)
        if kinds == ("closed", "closed"):
            assert not any(grad.any() for grad in grads.values())
    check("three by three", (True, "out_gates"), dtype, kinds=("wild", "wild"), full=True)


@each_dtype
@served
def test_conv_slices_and_empty_batches(dtype):
    check("strides", (True, "out_gates"), dtype, layout="sliced")
    check("two strides", (True, "out_gates"), dtype, layout="sliced")
    for name in ("strides", "depthwise", "pointwise, wide"):
        check(name, (True, "out_gates"), dtype, n=0)


@each_dtype
@served
def test_chain_of_convolutions(dtype):
    """conv, norm, relu, pool, conv, packed from end to end, twice: the running statistics move, too."""
    n = 160
    tensors = {
        "x": torch.randn(4, 3, 12, 12, dtype=dtype),
        "w1": torch.randn(n, 3, 3, 3, dtype=dtype) * 0.2,
        "weight": torch.rand(n) + 0.5,
        "shift": torch.randn(n),
        "w2": torch.randn(24, n, 3, 3, dtype=dtype) * 0.03,
        "z": make_z("few", n),
    }
    tensors = on_device(tensors)
    statistics = {}

    def call(namespace, x, w1, weight, shift, w2, z):
        gates = gates_from(z, plain=False)
        kind = {"device": DEVICE, "dtype": weight.dtype}
        mean, var = torch.zeros(n, **kind), torch.ones(n, **kind)
        packed = namespace is l0
        conv = l0.packed_conv2d if packed else namespace.gated_conv2d
        h = conv(x, w1, None, 1, 1, out_support=gates)
        options = {} if packed else {"gates": gates}
        h = namespace.gated_batch_norm(h, mean, var, weight, shift, True, **options)
        act = lambda t: torch.nn.functional.max_pool2d(torch.relu(t), 2)  # noqa: E731
        h = h.map(act) if packed else act(h)
        statistics[namespace, x.dtype] = (mean, var)
        return conv(h, w2, None, 2, in_gates=gates)

    compare(call, tensors, dtype=dtype, masks={"z": (tensors["z"] > 0) & (tensors["z"] < 1)})
    mine, exact = statistics[l0, dtype], statistics[reference, torch.float64]
    for got, right in zip(mine, exact, strict=True):
        bound = 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), right, rtol=bound, atol=bound)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_dtype
@served
def test_norms(dtype, training):
    for shape, plain in itertools.product([(5, 160, 9, 7), (40, 136, 8, 8), (3, 7, 5, 5)], (False, True)):
        x, statistics, parameters = on_device(list(test_batch_norm.tensors(shape)))
        x, gates = x.to(dtype), gates_from(make_z("few", shape[1]).to(DEVICE), plain=plain)
        # Of the dtype: torch's own sums of it are rounded to it on a GPU, ours are not.
        dy = torch.randn(shape, device=DEVICE).to(dtype)
        run = test_batch_norm.run
        got = run(l0.gated_batch_norm, x, statistics, parameters, gates, dy, training, True)
        eager = run(reference.gated_batch_norm, x, statistics, parameters, gates, dy, training)
        doubles = [[t.double() for t in group] for group in (statistics, parameters)]
        exact = run(reference.gated_batch_norm, x.double(), *doubles, gates, dy.double(), training)
        for mine, plainly, right in zip(got, eager, exact, strict=True):
            # Sums of many rows: a few roundings of what the terms add up to.
            assert_near(mine, plainly, right, dtype if mine.shape == shape else torch.float32, f"{shape}")
