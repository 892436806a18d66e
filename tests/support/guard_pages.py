"""Runs the native kernels on operands and results that touch unreadable pages: what strays outside dies.

A script for tests/ops/test_native.py: a stray access ends the process, not the test session. --whole: all of
the product of sizes, types, layouts and options, of which otherwise a part runs.
"""

import ctypes
import itertools
import mmap
import sys

import torch

from l0kernels import Gates
from l0kernels._native import native
from l0kernels.impl.im2col import Geometry, shape_of

PAGE = mmap.PAGESIZE
WHOLE = "--whole" in sys.argv
LIBC = ctypes.CDLL(None, use_errno=True)
KEPT = []
CONSTANTS = (2 / 3, -0.1, 1.1)


def guarded(t, at_end):
    """``t`` copied between two unreadable pages, next to the second, or next to the first."""
    size = -(-max(t.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (base, base + PAGE + size):
        if LIBC.mprotect(ctypes.c_void_p(page), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (size - t.nbytes if at_end else 0)
    KEPT.append(memory)
    if t.numel() == 0:
        return t
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
    return copy.copy_(t)


def address(t):
    return 0 if t is None else t.data_ptr()


def matrix(t, transposed):
    """Address and strides of ``t``; transposed: of memory that holds its columns one after the other."""
    return (t.data_ptr(), 1, t.shape[0]) if transposed else (t.data_ptr(), t.shape[1], 1)


def gate_of(z, at_end):
    gates = Gates.from_z(z)
    parts = [guarded(t, at_end) for t in (gates.z, gates.index[: len(z)], gates.count)]
    return (*map(address, parts), len(z), True)


def layer(m, n_in, n_out, dtype, z_in, z_out, transposed, at_end, threads):
    def random(*shape):
        return guarded(torch.randn(shape, dtype=dtype), at_end)

    def empty(*shape):
        return guarded(torch.full(shape, float("nan"), dtype=dtype), at_end)

    x, w, b, dy = random(m, n_in), random(n_out, n_in), random(n_out), random(m, n_out)
    g_in = None if z_in is None else gate_of(z_in, at_end)
    g_out = None if z_out is None else gate_of(z_out, at_end)
    double = dtype == torch.float64
    head = (
        double,
        m,
        n_in,
        n_out,
        matrix(x, transposed),
        matrix(w, transposed),
        address(b),
        g_in,
        g_out,
        True,
    )
    y, dx, dw, db = empty(m, n_out), empty(m, n_in), empty(n_out, n_in), empty(n_out)
    dz_in = None if z_in is None else empty(n_in)
    dz_out = None if z_out is None else empty(n_out)
    native.linear_forward(*head, None, address(y), threads)
    grads = map(address, (dx, dw, db, dz_in, dz_out))
    native.linear_backward(*head, matrix(dy, transposed), *grads, CONSTANTS, threads)
    for t in (y, dx, dw, db, dz_in, dz_out):
        assert t is None or not t.isnan().any(), "a result was not written whole"
    KEPT.clear()


def chain(m, sizes, dtype, zs, activation, at_end, threads):
    def random(*shape):
        return guarded(torch.randn(shape, dtype=dtype), at_end)

    def empty(*shape):
        return guarded(torch.full(shape, float("nan"), dtype=dtype), at_end)

    x, dy, y, dx = random(m, sizes[0]), random(m, sizes[-1]), empty(m, sizes[-1]), empty(m, sizes[0])
    layers, results = [], [y, dx]
    for i, (n_in, n_out, z) in enumerate(zip(sizes[:-1], sizes[1:], zs, strict=True)):
        w, b, dw, db = random(n_out, n_in), random(n_out), empty(n_out, n_in), empty(n_out)
        h, pre = (empty(m, n_in), empty(m, n_in) if activation > 1 else None) if i else (None, None)
        dz = None if z is None else empty(n_in)
        gate = None if z is None else gate_of(z, at_end)
        layers.append((n_in, n_out, matrix(w, False), address(b), gate, *map(address, (h, pre, dw, db, dz))))
        results += [dw, db, dz]
        KEPT.extend((w, b, h, pre))
    head = (dtype == torch.float64, m, matrix(x, False), activation, layers)
    native.mlp_forward(*head, None, address(y), threads)
    native.mlp_backward(*head, matrix(dy, False), address(dx), CONSTANTS, threads)
    for t in results:
        assert t is None or not t.isnan().any(), "a result was not written whole"
    KEPT.clear()


def blocks(m, n_in, n_out, b_out, b_in, dtype, at_end):
    def random(*shape):
        return guarded(torch.randn(shape, dtype=dtype), at_end)

    def empty(*shape):
        return guarded(torch.full(shape, float("nan"), dtype=dtype), at_end)

    x, w, b, dy = random(m, n_in), random(n_out, n_in), random(n_out), random(m, n_out)
    z = guarded(torch.rand(-(-n_out // b_out), -(-n_in // b_in), dtype=dtype).sub(0.4).relu(), at_end)
    y, dx, dw, db, dz = empty(m, n_out), empty(m, n_in), empty(n_out, n_in), empty(n_out), empty(*z.shape)
    head = (dtype == torch.float64, m, n_in, n_out, b_out, b_in, matrix(x, False), matrix(w, False))
    native.block_linear_forward(*head, address(b), address(z), address(y), 1)
    grads = map(address, (dx, dw, db, dz))
    native.block_linear_backward(*head, address(z), False, matrix(dy, False), *grads, 1)
    for t in (y, dx, dw, db, dz):
        assert not t.isnan().any(), "a result was not written whole"
    KEPT.clear()


def sampling(n, dtype, at_end):
    log_alpha = guarded(torch.randn(n, dtype=dtype), at_end)
    z, seed = guarded(torch.empty(n, dtype=dtype), at_end), guarded(torch.tensor([5]), at_end)
    index = guarded(torch.empty(-(-n // 128) * 128, dtype=torch.int32), at_end)
    count = guarded(torch.empty(2, dtype=torch.int32), at_end)
    double = dtype == torch.float64
    gate = (address(z), address(index), address(count), n, False)
    expected = guarded(torch.full((1,), float("nan"), dtype=dtype), at_end)
    native.sample(double, (address(seed), 0, CONSTANTS, [address(log_alpha)]), [gate], address(expected), 1)
    assert not expected.isnan()
    grad = guarded(torch.empty(n, dtype=dtype), at_end)
    native.gate_grad(address(log_alpha), address(z), address(grad), n, double, CONSTANTS)
    KEPT.clear()


def penalty(n_out, n_in, run, groups, dtype, at_end):
    """Both sides of a weight gated, and the outputs of its bias."""
    gates = [guarded(torch.randn(n, dtype=dtype), at_end) for n in (groups * n_out, groups * n_in)]
    thetas = [guarded(torch.randn(groups * n_out, n, dtype=dtype), at_end) for n in (n_in * run, 1)]
    total, factor = (guarded(torch.ones(1, dtype=dtype), at_end) for _ in range(2))
    sizes = [len(g) for g in gates]
    grad = guarded(torch.full((sum(sizes),), float("nan"), dtype=dtype), at_end)
    grads = [guarded(torch.full(t.shape, float("nan"), dtype=dtype), at_end) for t in thetas]
    head = (
        dtype == torch.float64,
        [(address(g), len(g), 1.0) for g in gates],
        [
            (address(thetas[0]), groups * n_out, n_in * run, groups, run, 0, 1),
            (address(thetas[1]), groups * n_out, 1, 1, 1, 0, -1),
        ],
        *(0.1, -1.6),
    )
    native.coupled_penalty(*head, address(total), address(grad), 1)
    native.coupled_penalty_grad(*head, address(factor), [*map(address, grads)], 1)
    for t in (grad, *grads):
        assert not t.isnan().any(), "a result was not written whole"
    KEPT.clear()


def convolution(shape, n_out, dtype, last, at_end, threads):
    """``shape``: ConvShape of csrc/conv.h; ``last``: channels last."""
    n, height, width, n_in, *kernel = shape[:6]
    out = n * n_out * shape[12] * shape[13]
    x, w, b, dy = (
        guarded(torch.randn(size, dtype=dtype), at_end)
        for size in (n * height * width * n_in, n_out * n_in * kernel[0] * kernel[1], n_out, out)
    )
    y, dx, dw, db = (
        guarded(torch.full_like(t, float("nan")), at_end) if t.numel() else t for t in (dy, x, w, b)
    )
    head = dtype == torch.float64, shape, n_out, last, address(x), address(w)
    native.conv(*head, address(b), address(y), 0, 0, 0, 0, threads)
    native.conv(*head, 0, 0, address(dy), address(dx), address(dw), address(db), threads)
    for t in (y, dx, dw, db):
        assert not t.isnan().any(), "a result was not written whole"
    KEPT.clear()


def open_convolution(shape, n_out, by_tap, planar, dtype, at_end, threads):
    """Of inputs and outputs some of which are closed, by the weight of all."""
    n, height, width, n_in, *kernel = shape[:6]
    z_in, z_out = (torch.rand(2 * size + 1, dtype=dtype) for size in (n_in, n_out))
    z_in[torch.randperm(len(z_in))[n_in:]] = 0
    z_out[torch.randperm(len(z_out))[n_out:]] = 0
    out, taps = n * n_out * shape[12] * shape[13], kernel[0] * kernel[1]
    x, w, b, dy = (
        guarded(torch.randn(size, dtype=dtype), at_end)
        for size in (n * height * width * n_in, len(z_out) * len(z_in) * taps, n_out, out)
    )
    y, dx, dw, dz = (
        guarded(torch.full_like(t, float("nan")), at_end) if t.numel() else t for t in (dy, x, w, z_in)
    )
    gates = gate_of(z_out, at_end), gate_of(z_in, at_end)
    ways = dtype == torch.float64, shape, by_tap, planar, n_out
    packed = guarded(torch.full((n_out * n_in * taps,), float("nan"), dtype=dtype), at_end)
    kept = 0 if by_tap else address(packed)
    head = *ways, *gates, True, len(z_out), len(z_in), address(x), address(w), kept
    native.open_conv(*head, address(b), address(y), 0, 0, 0, 0, threads)
    native.open_conv(*head, 0, 0, address(dy), address(dx), address(dw), address(dz), threads)
    for t in (y, dx, dw, dz, *([] if by_tap else [packed])):
        assert not t.isnan().any(), "a result was not written whole"
    KEPT.clear()


LARGE = (1031, 1019, 1), (129, 911, 9)  # matrices that go past the caches: rows, columns, and their runs


def scattered(rows, cols, run, dtype, at_end):
    """A large matrix from its open rows and columns."""
    z_row, z_col = (torch.rand(n, dtype=dtype).sub(0.5).relu() for n in (rows, cols))
    n_rows, n_cols = (int((z != 0).sum()) for z in (z_row, z_col))
    packed = guarded(torch.randn(n_rows, n_cols * run, dtype=dtype), at_end)
    full = guarded(torch.full((rows, cols * run), float("nan"), dtype=dtype), at_end)
    gates, is_double = (gate_of(z_row, at_end), gate_of(z_col, at_end)), dtype == torch.float64
    sizes = int(is_double), n_rows, n_cols, address(full), int(is_double), rows, cols
    native.unpack(
        matrix(packed, False), *sizes, *gates, True, True, is_double, (0, 0, 0), 0, 0, 0, run, False, 2
    )
    assert not full.isnan().any(), "the matrix was not written whole"
    KEPT.clear()


def product(step, *values):
    """The product of `values`, or of it every `step`-th, so that all combinations of all but one are there.

    Of the last values, if they are `step`, one goes with each combination of the others.
    """
    for places in itertools.product(*(range(len(v)) for v in values)):
        if WHOLE or sum(places) % step == 0:
            yield [v[i] for v, i in zip(values, places, strict=True)]


def main():
    torch.manual_seed(0)
    dtypes, either = (torch.float32, torch.float64), (False, True)
    sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (13, 17, 33),
        (14, 32, 64),
        (15, 31, 47),
        (29, 65, 16),
        (16, 386, 18),
        (2, 770, 3),
    ]
    sizes += [(m, n, n + m) for m, n in zip(range(1, 34, 3), range(40, 7, -3), strict=True)]
    for name in ("base", "avx2", "avx512"):
        if not native.set_isa(name):
            continue
        cases = product(2, sizes, dtypes, either, either)
        for i, ((m, n_in, n_out), dtype, at_end, transposed) in enumerate(cases):
            z_in = [None, torch.rand(n_in, dtype=dtype), torch.rand(n_in, dtype=dtype).sub(0.5).relu()][i % 3]
            z_out = [None, torch.rand(n_out, dtype=dtype), torch.rand(n_out, dtype=dtype).sub(0.3).relu()][
                i // 3 % 3
            ]
            layer(m, n_in, n_out, dtype, z_in, z_out, transposed, at_end, 1 + i // 3 % 2)
        for (m, n_in, n_out), dtype, at_end, activation in product(2, sizes, dtypes, either, range(4)):
            widths = (n_in, n_out, n_in, 3)
            zs = [torch.rand(n, dtype=dtype).sub(0.4).relu() for n in widths[:-1]]
            chain(m, widths, dtype, [zs[0], None, zs[2]] if activation // 2 else zs, activation, at_end, 1)
        for (m, n_in, n_out), dtype, at_end in itertools.product(sizes, dtypes, either):
            blocks(m, n_in, n_out, 4, 5, dtype, at_end)
            blocks(m, n_in, n_out, 16, 32, dtype, at_end)
            penalty(n_out, n_in, 1, 1, dtype, at_end)
            penalty(m, n_in, 3, 1 + m % 3, dtype, at_end)
        for n, dtype, at_end in itertools.product((1, 7, 128, 1025), dtypes, either):
            sampling(n, dtype, at_end)
        options = ((1, 1), (0, 0), (1, 1)), ((2, 3), (1, 0), (1, 1)), ((1, 2), (2, 4), (2, 1))
        some = sizes if WHOLE else sizes[:8] + sizes[8::3]  # the others have as many outputs
        cases = product(3, some, dtypes, either, either, options)
        for i, ((m, n_in, n_out), dtype, last, at_end, (stride, padding, dilation)) in enumerate(cases):
            images = torch.empty(1 + m % 4, n_in % 23 + 1, 5 + m % 3, 6 + n_out % 13, device="meta")
            shape = shape_of(images, (1 + m % 3, 2 + i % 3), Geometry(stride, padding, dilation))
            convolution(shape, n_out, dtype, last, at_end, 1 + i // 3 % 2)
            by_tap, planar = ((True, False), (False, True), (False, False))[i % 3]
            open_convolution(shape, n_out, by_tap, planar, dtype, at_end, 1 + i // 3 % 2)
        for (rows, cols, run), dtype, at_end in itertools.product(LARGE, dtypes, either):
            scattered(rows, cols, run, dtype, at_end)
        print(name, "ok")


if __name__ == "__main__":
    sys.exit(main())
