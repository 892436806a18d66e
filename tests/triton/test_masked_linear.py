"""Triton's gates per weight and per block against dense formulas in float64."""

import itertools

import pytest
import torch

from l0kernels import HardConcrete, reference
from l0kernels._gates import expand_blocks
from l0kernels.triton_kernels import masked_linear as kernels
from op_checks import SEED, assert_near, make_z, wanted
from triton_device import DEVICE, DTYPES

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy tells of inf and NaN
]

DIST = HardConcrete()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def strided(t):
    """The same values, every other one of a larger tensor."""
    return t.repeat_interleave(2, -1)[..., ::2]


def transposed(t):
    return t.t().contiguous().t()


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


class TestWeights:
    @staticmethod
    def formula(grad, weight, log_alpha, dist):
        """weight * z, dweight and dlog_alpha in the dtypes of the arguments."""
        z = reference.sample_gates(log_alpha.flatten(), seed=SEED, dist=dist).z.view(log_alpha.shape)
        s = (z - dist.gamma) / (dist.zeta - dist.gamma)
        slope = (dist.zeta - dist.gamma) / dist.beta * s * (1 - s) * wanted(z, False)
        dlog_alpha = grad.to(z.dtype) * weight.to(z.dtype) * slope
        return (weight * z).to(weight.dtype), (grad * z).to(weight.dtype), dlog_alpha, z

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dist", [DIST, HardConcrete(0.5, -0.3, 1.2)])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(1, 1), (0, 3), (37, 41), (64, 48), (1, 1025)])
    def test_value_and_gradients(self, shape, dtype, dist):
        weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        log_alpha = torch.randn(shape) * 3
        eager = self.formula(grad, weight, log_alpha, dist)
        exact = self.formula(grad.double(), weight.double(), log_alpha.double(), dist)
        for layout in (torch.clone, strided, transposed):
            w, g, a, seed = on_device(weight, grad, log_alpha, SEED)
            w, g, a = layout(w), layout(g), layout(a)
            masked = kernels.masked_weight(w, a, seed, dist)
            dw, dlog_alpha = kernels.masked_weight_grad(g, w, a, seed, dist, True, True)
            assert masked.dtype == dw.dtype == dtype
            assert masked.is_contiguous()
            assert dw.is_contiguous()
            assert dlog_alpha.is_contiguous()
            got = masked.cpu(), dw.cpu(), dlog_alpha.cpu()
            for value, *expected in zip(got, eager[:3], exact[:3], strict=True):
                assert_near(value, *expected, value.dtype, "weight")
            z = exact[3]
            assert torch.equal(got[0] == 0, (z == 0) | (eager[0] == 0))
            assert torch.equal(got[2] != 0, wanted(z, False) & (eager[2] != 0))

    @pytest.mark.parametrize(("need_w", "need_log_alpha"), list(itertools.product([True, False], repeat=2)))
    def test_only_what_is_needed(self, need_w, need_log_alpha):
        w, g, a, seed = on_device(torch.randn(5, 7), torch.randn(5, 7), torch.randn(5, 7), SEED)
        before = w.clone(), a.clone()
        both = kernels.masked_weight_grad(g, w, a, seed, DIST, True, True)
        got = kernels.masked_weight_grad(g, w, a, seed, DIST, need_w, need_log_alpha)
        for value, expected, need in zip(got, both, (need_w, need_log_alpha), strict=True):
            assert torch.equal(value, expected) if need else value is None
        assert torch.equal(w, before[0])
        assert torch.equal(a, before[1])

    def test_gradient_in_float32_of_a_16_bit_weight(self):
        weight, grad = torch.randn(9, 11).half(), torch.randn(9, 11)
        log_alpha = torch.randn(9, 11)
        w, g, a, seed = on_device(weight, grad, log_alpha, SEED)
        dw, dlog_alpha = kernels.masked_weight_grad(g, w, a, seed, DIST, True, True)
        exact = self.formula(grad.double(), weight.double(), log_alpha.double(), DIST)
        eager = self.formula(grad, weight, log_alpha, DIST)
        assert dw.dtype == torch.float16
        assert_near(dw.cpu(), eager[1], exact[1], torch.float16, "dw")
        assert_near(dlog_alpha.cpu(), eager[2], exact[2], torch.float32, "dlog_alpha")

    def test_nan_gate_shows_and_does_not_spread(self):
        log_alpha = torch.randn(4, 5)
        log_alpha[1, 2] = float("nan")
        w, a, seed = on_device(torch.randn(4, 5), log_alpha, SEED)
        masked = kernels.masked_weight(w, a, seed, DIST)
        assert masked.isnan().nonzero().tolist() == [[1, 2]]


def block_formula(x, weight, bias, z, dy, block, full, dtype):
    """y, dx, dweight, dbias and dz of the dense layer, products in ``dtype``."""
    n_out, n_in = weight.shape
    block = min(block[0], max(1, n_out)), min(block[1], max(1, n_in))
    spread = expand_blocks(z, block, (n_out, n_in))
    scaled = (weight * spread).to(dtype)
    y = torch.mm(x.to(dtype), scaled.t())
    if bias is not None:
        y = y + bias.to(dtype)
    dx = torch.mm(dy.to(dtype), scaled).to(x.dtype)
    raw = torch.mm(dy.to(dtype).t(), x.to(dtype)).to(z.dtype)
    terms = torch.zeros(z.shape[0] * block[0], z.shape[1] * block[1], dtype=z.dtype)
    terms[:n_out, :n_in] = raw * weight
    dz = terms.view(z.shape[0], block[0], z.shape[1], block[1]).sum((1, 3)) * wanted(z, full)
    return y, dx, (raw * spread).to(weight.dtype), dy.sum(0), dz


def check_blocks(
    size, block, *, kind="mixed", full=False, dtype=torch.float32, param_dtype=None, layout=torch.clone
):
    m, n_in, n_out = size
    param_dtype = dtype if param_dtype is None else param_dtype
    grid = -(-n_out // block[0]), -(-n_in // block[1])
    z = make_z(kind, grid[0] * grid[1]).view(grid)
    x, dy = torch.randn(m, n_in).to(param_dtype), torch.randn(m, n_out).to(dtype)
    weight = (torch.randn(n_out, n_in) / max(1, n_in) ** 0.5).to(param_dtype)
    bias = torch.randn(n_out).to(param_dtype)
    eager = block_formula(x, weight, bias, z, dy, block, full, dtype)
    doubles = [t.double() for t in (x, weight, bias, z, dy)]
    exact = block_formula(*doubles, block, full, torch.float64)

    closed = expand_blocks(z, block, (n_out, n_in)) == 0
    unread = weight.masked_fill(closed, float("nan"))  # nothing of a closed block is read
    dev_x, dev_w, dev_z, dev_dy = (layout(t) for t in on_device(x, unread, z, dy))
    (dev_b,) = on_device(bias)
    y = kernels.block_linear_forward(dev_x, dev_w, dev_b, dev_z, *block, dtype)
    grads = kernels.block_linear_backward(dev_dy, dev_x, dev_w, dev_z, *block, full, dtype, [True] * 4)
    got = [t.cpu() for t in (y, *grads)]
    names = ("y", "dx", "dweight", "dbias", "dz")
    dtypes = (dtype, param_dtype, param_dtype, dtype, torch.float32)
    for name, kept, value, single, double in zip(names, dtypes, got, eager, exact, strict=True):
        assert value.dtype == kept, name
        assert value.is_contiguous(), name
        rounded = dtype if name != "dbias" else kept
        assert_near(value, single, double, rounded, f"{name} {size} {block} {kind}")
    assert not got[2][closed].any()
    assert not got[4][~wanted(z, full)].any()
    if m:
        assert ((got[2] != 0) | closed | (eager[2].abs() < 1e-3)).all()
    without = kernels.block_linear_forward(dev_x, dev_w, None, dev_z, *block, dtype).cpu()
    no_bias = [
        block_formula(*t, block, full, d)[0]
        for t, d in zip(
            ([x, weight, None, z, dy], [*doubles[:2], None, *doubles[3:]]),
            (dtype, torch.float64),
            strict=True,
        )
    ]
    assert_near(without, *no_bias, dtype, "y without bias")


class TestBlocks:
    @pytest.mark.covering(1)
    @pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (13, 37, 29)])
    @pytest.mark.parametrize("block", [(1, 1), (2, 3), (16, 16), (5, 64), (64, 5), (1000, 1000), (1000, 8)])
    def test_sizes_and_blocks(self, size, block):
        check_blocks(size, block)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("size", "block"),
        [
            ((70, 200, 300), (150, 100)),  # several tiles in a block, either way
            ((130, 128, 128), (64, 32)),
            ((20, 130, 140), (16, 16)),
            ((33, 96, 72), (24, 48)),
            ((5, 300, 40), (32, 128)),
        ],
    )
    def test_tiles_and_dtypes(self, size, block, dtype):
        check_blocks(size, block, dtype=dtype)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("kind", ["open", "closed", "few", "wild"])
    @pytest.mark.parametrize("full", [False, True])
    def test_kinds(self, kind, full):
        check_blocks((19, 45, 52), (16, 8), kind=kind, full=full)

    def test_autocast(self):
        """Products in float16 of float32 inputs and parameters."""
        check_blocks((19, 45, 52), (16, 8), dtype=torch.float16, param_dtype=torch.float32)

    @pytest.mark.parametrize("layout", [strided, transposed])
    def test_layouts(self, layout):
        check_blocks((19, 45, 52), (16, 8), layout=layout)

    @pytest.mark.parametrize("size", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
    def test_empty(self, size):
        check_blocks(size, (2, 3))

    def test_expanded_gradient(self):
        x, weight, z = on_device(torch.randn(6, 10), torch.randn(8, 10), make_z("mixed", 4).view(2, 2))
        dy = torch.ones((), device=DEVICE).expand(6, 8)
        args = (x, weight, z, 4, 5, False, torch.float32, [True] * 4)
        got = kernels.block_linear_backward(dy, *args)
        expected = kernels.block_linear_backward(dy.contiguous(), *args)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("need_x", [True, False])
    @pytest.mark.parametrize("need_w", [True, False])
    @pytest.mark.parametrize("need_b", [True, False])
    @pytest.mark.parametrize("need_z", [True, False])
    def test_only_what_is_needed(self, need_x, need_w, need_b, need_z):
        needs = [need_x, need_w, need_b, need_z]
        x, weight, dy = on_device(torch.randn(6, 10), torch.randn(8, 10), torch.randn(6, 8))
        (z,) = on_device(make_z("mixed", 6).view(2, 3))
        args = (dy, x, weight, z, 4, 4, False, torch.float32)
        everything = kernels.block_linear_backward(*args, [True] * 4)
        before = weight.clone()
        for value, expected, need in zip(
            kernels.block_linear_backward(*args, needs), everything, needs, strict=True
        ):
            assert torch.equal(value, expected) if need else value is None
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("lines", [3, 70])
    def test_lists(self, lines, monkeypatch):
        """Open blocks ascending, then closed ones, of rows and of columns; lines longer than _LINE, too."""
        monkeypatch.setattr(kernels, "_LINE", 16)
        z = make_z("mixed", 5 * lines).view(5, lines)
        weight = torch.randn(5, lines)
        (dev_w, dev_z) = on_device(weight, z)
        rows, cols, _ = kernels._prepare(dev_w, dev_z, 1, 1, torch.float32, True, True, True)
        for got, gates in ((rows.cpu(), z), (cols.cpu(), z.t())):
            for line, gate in zip(got.tolist(), gates, strict=True):
                is_open, is_closed = (gate != 0).nonzero()[:, 0], (gate == 0).nonzero()[:, 0]
                assert line == [len(is_open), *is_open.tolist(), *is_closed.tolist()]

    def test_precision_follows_torch(self):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            assert kernels.precision_of(torch.float32) == "ieee"
            assert kernels.precision_of(torch.bfloat16) == "tf32"
            torch.set_float32_matmul_precision("high")
            assert kernels.precision_of(torch.float32) == "tf32"
        finally:
            torch.set_float32_matmul_precision(before)
