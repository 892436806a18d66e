"""Batch normalisation of packed channels: values, running statistics and gradients against torch in fp64."""

import pytest
import torch
from torch.nn import functional as F

from l0kernels.impl import triton as backend
from triton_device import DEVICE, DTYPES
from triton_gates import make_gate, positions


@pytest.fixture(autouse=True)
def poison():
    """Fresh inputs; unwritten memory reads as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def bury(x, gate):
    """x in capacity layout: open channels first, zeros to the extent, NaN beyond."""
    if gate is None:
        return x.contiguous(memory_format=torch.channels_last)
    units, end = positions(gate, x.shape[1])
    data = torch.full_like(x, float("nan"), memory_format=torch.channels_last)
    data[:, :end] = 0
    data[:, : len(units)] = torch.where((gate[0][units] != 0)[:, None, None], x[:, units], 0.0)
    return data


def dig(data, gate):
    """The dense channels of a capacity layout; its zeros are checked."""
    assert data.is_contiguous(memory_format=torch.channels_last)
    if gate is None:
        return data
    units, end = positions(gate, data.shape[1])
    assert not data[:, len(units) : end].any()
    assert data[:, end:].isnan().all()
    full = torch.zeros_like(data)
    full[:, units] = data[:, : len(units)]
    assert not full[:, gate[0] == 0].any()
    return full


def near(value, exact, dtype, what, scale=1.0):
    eps = torch.finfo(dtype).eps
    bound = 8 * eps * scale * max(1.0, exact.abs().max().item()) if exact.numel() else 0
    assert value.shape == exact.shape, what
    if exact.numel():
        error = (value.double() - exact).abs().max().item()
        assert error <= bound, f"{what}: {error} above {bound}"  # fails for a NaN, too


def check(shape, gate, *, training=True, dtype=torch.float32, affine=True, tracked=True, mean=0.0, scale=1.0):
    channels = shape[1]
    x, dy = (draw(*shape) + mean).to(dtype), draw(*shape).to(dtype)
    weight, bias = (draw(channels), draw(channels)) if affine else (None, None)
    running = (draw(channels), draw(channels).square() + 0.1) if tracked else (None, None)
    is_open = torch.ones(channels, dtype=torch.bool, device=DEVICE) if gate is None else gate[0] != 0

    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    exact_running = [None if t is None else t.double() for t in running]
    exact = F.batch_norm(leaves[0], *exact_running, *leaves[1:], training or not tracked, 0.3, 1e-3)
    exact = exact * is_open[:, None, None]
    exact.backward(dy.double())

    before = [None if t is None else t.clone() for t in running]
    y, *stats = backend.batch_norm_forward(bury(x, gate), gate, *running, weight, bias, training, 0.3, 1e-3)
    near(dig(y, gate), exact.detach(), dtype, "y", scale)
    for got, right, was in zip(running, exact_running, before, strict=True):
        if got is not None:
            near(got[is_open], right[is_open], torch.float32, "running", scale)
            assert torch.equal(got[~is_open], was[~is_open])
            assert training or torch.equal(got, was)
    needs = [True, affine, affine]
    given = (bury(dy, gate), bury(x, gate), gate, *stats, weight, training or not tracked)
    dx, *rest = backend.batch_norm_backward(*given, needs)
    near(dig(dx, gate), leaves[0].grad, dtype, "dx", scale)
    for value, leaf in zip(rest, leaves[1:], strict=True):
        if affine:
            near(value, leaf.grad * is_open, torch.float32, "parameters", 4 * scale)
            assert not value[~is_open].any()
        else:
            assert value is None
    alone = [backend.batch_norm_backward(*given, [i == j for j in range(3)]) for i in range(3)]
    for i, grads in enumerate(alone[: 3 if affine else 1]):
        assert [g is not None for g in grads] == [i == j for j in range(3)]
        assert torch.equal(torch.nan_to_num(grads[i]), torch.nan_to_num([dx, *rest][i]))


@pytest.mark.covering(1)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("channels", "kind"), [(5, "none"), (5, "plain"), (140, "none"), (140, "plain"), (140, "packed")]
)
def test_channels(channels, kind, training):
    gate = None if kind == "none" else make_gate(channels, 0.4, plain=kind == "plain")
    check((3, channels, 5, 4), gate, training=training)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_all_closed_and_all_open(keep):
    check((2, 130, 3, 3), make_gate(130, keep))
    check((2, 6, 3, 3), make_gate(6, keep), training=False)


def test_without_parameters_and_statistics():
    gate = make_gate(140, 0.4)
    check((2, 140, 3, 3), gate, affine=False)
    check((2, 140, 3, 3), gate, tracked=False)
    check((2, 140, 3, 3), gate, tracked=False, training=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype):
    check((4, 140, 3, 3), make_gate(140, 0.4), dtype=dtype)


def test_many_rows_and_a_large_mean():
    """Shares of the rows that do not end on a tile; a mean of 1000 leaves fp32 what its rounding leaves."""
    gate = make_gate(6, 0.7)
    check((7, 6, 19, 13), gate, scale=4.0)
    x = draw(5, 6, 21, 17) + 1000
    y, mean, rstd = backend.batch_norm_forward(bury(x, gate), gate, None, None, None, None, True, 0.1, 1e-5)
    exact = F.batch_norm(x.double(), None, None, training=True, eps=1e-5) * (gate[0] != 0)[:, None, None]
    near(dig(y, gate), exact, torch.float32, "y", 500.0)
    std = x.double().var((0, 2, 3), unbiased=False).add(1e-5).sqrt()
    is_open = gate[0] != 0
    torch.testing.assert_close(1 / rstd.double()[is_open], std[is_open], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double()[is_open], x.double().mean((0, 2, 3))[is_open], rtol=1e-6, atol=0)


def test_one_value_and_empty_batch():
    check((1, 6, 1, 1), make_gate(6, 0.5), training=False)
    gate = make_gate(6, 0.5)
    x = draw(0, 6, 2, 2)
    y, mean, rstd = backend.batch_norm_forward(x, gate, None, None, None, None, True, 0.1, 1e-5)
    grads = backend.batch_norm_backward(y, x, gate, mean, rstd, None, True, [True, True, True])
    assert y.shape == grads[0].shape == x.shape
    assert not grads[1].any()
    assert not grads[2].any()


def test_rows_of_any_strides():
    gate = make_gate(6, 0.5)
    x, dy = draw(2, 6, 3, 4), torch.ones((), device=DEVICE).expand(2, 6, 3, 4)
    x = torch.where((gate[0] != 0)[:, None, None], x, 0.0)
    args = (gate, None, None, None, None, True, 0.1, 1e-5)
    y, mean, rstd = backend.batch_norm_forward(x, *args)
    assert torch.equal(y, backend.batch_norm_forward(bury(x, gate), *args)[0])
    _, _, db = backend.batch_norm_backward(dy, x, gate, mean, rstd, None, True, [False, False, True])
    assert torch.equal(db, 24.0 * (gate[0] != 0))


@pytest.mark.parametrize("training", [True, False])
def test_vectors_of_any_strides(training):
    """Parameters are read, and the running statistics written, whatever their strides."""
    gate, x = make_gate(20, 0.6), draw(3, 20, 2, 5)
    weight, bias = draw(40)[::2], draw(1).expand(20)
    results = []
    for strided in (True, False):
        torch.manual_seed(5)
        mean, var = draw(60)[::3], (draw(20, 2).abs() + 0.5)[:, 1]
        args = [mean, var, weight, bias] if strided else [t.contiguous() for t in (mean, var, weight, bias)]
        y, *rest = backend.batch_norm_forward(bury(x, gate), gate, *args, training, 0.3, 1e-5)
        results.append([dig(y, gate), *rest, args[0], args[1]])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
