"""masked_linear, per weight and per block, on every backend against the dense formula in float64."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

import l0kernels as l0
from l0kernels import reference
from op_checks import LAYOUTS, SEED, compare, strided, wanted

pytestmark = pytest.mark.usefixtures("poison")

SIZES = [(1, 1, 1), (3, 5, 7), (13, 37, 29), (14, 32, 28), (5, 385, 33), (70, 61, 130)]
BLOCKS = [(1, 1), (2, 3), (16, 16), (5, 64), (64, 5), (1000, 1000)]


def masked(*, block=None, mode=None, dist=None):
    options = {"block": block, "mode": mode, "seed": SEED} | ({} if dist is None else {"dist": dist})

    def call(namespace, x, weight, bias, log_alpha):
        return namespace.masked_linear(x, weight, bias, log_alpha, **options)

    return call


def grid(n_out, n_in, block):
    return (n_out, n_in) if block is None else (math.ceil(n_out / block[0]), math.ceil(n_in / block[1]))


def case(size, block=None, *, dtype=torch.float32, bias=True, shift=0.0):
    """Leaves; gates are closed with a probability that falls with ``shift``."""
    batch, n_in, n_out = size
    return {
        "x": torch.randn(batch, n_in, dtype=dtype),
        "weight": torch.randn(n_out, n_in, dtype=dtype) / max(1, n_in) ** 0.5,
        "bias": torch.randn(n_out, dtype=dtype) if bias else None,
        "log_alpha": torch.randn(grid(n_out, n_in, block), dtype=dtype) * 2 + shift,
    }


def drawn(log_alpha):
    """z of the training gate."""
    return reference.sample_gates(log_alpha.detach().flatten(), seed=SEED).z.view(log_alpha.shape)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_blocks(backend, size, dtype):
    for block, bias in itertools.product([None, *BLOCKS], [True, False]):
        tensors = case(size, block, dtype=dtype, bias=bias)
        masks = {"log_alpha": wanted(drawn(tensors["log_alpha"]), False)}
        compare(masked(block=block), tensors, dtype=dtype, what=f"{block}", masks=masks)


@pytest.mark.parametrize("block", [None, (2, 3), (16, 16)])
def test_zero_sets(backend, block):
    tensors = case((9, 41, 37), block)
    _, grads = compare(masked(block=block), tensors, dtype=torch.float32)
    z = drawn(tensors["log_alpha"])
    assert torch.equal(grads["log_alpha"] != 0, wanted(z, False))
    spread = z if block is None else z.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(grads["weight"] != 0, (spread != 0)[:37, :41])


@pytest.mark.parametrize("block", [None, (4, 5), (7, 64)])
@pytest.mark.parametrize("shift", [-40.0, -5.0, 40.0])
def test_all_closed_nearly_closed_and_all_open(backend, block, shift):
    tensors = case((9, 41, 37), block, shift=shift)
    y, grads = compare(masked(block=block), tensors, dtype=torch.float32)
    if shift == -40:
        assert torch.equal(y, tensors["bias"].expand(9, 37))
        assert not any(grads[name].any() for name in ("x", "weight", "log_alpha"))
    if shift == 40:
        dense = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
        torch.testing.assert_close(y, dense.detach(), rtol=1e-5, atol=1e-5)
        assert not grads["log_alpha"].any()


@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
@pytest.mark.parametrize("block", [None, (2, 3), (16, 16), (1000, 7)])
def test_evaluation(backend, block, mode):
    tensors = case((9, 41, 37), block)
    needs = ["x", "weight", "bias"]
    compare(masked(block=block, mode=mode), tensors, dtype=torch.float32, needs=needs)
    log_alpha = tensors["log_alpha"].requires_grad_()
    y = masked(block=block, mode=mode)(l0, **{**tensors, "log_alpha": log_alpha})
    assert not y.requires_grad


@pytest.mark.parametrize("block", [None, (4, 5)])
@pytest.mark.parametrize("shape", [(41,), (0, 41), (2, 0, 41), (3, 2, 41), (2, 1, 3, 41)])
def test_leading_dimensions_and_empty_batches(backend, block, shape):
    tensors = case((1, 41, 37), block)
    tensors["x"] = torch.randn(shape)
    y, grads = compare(masked(block=block), tensors, dtype=torch.float32)
    assert y.shape == (*shape[:-1], 37)
    assert grads["x"].shape == shape


@pytest.mark.parametrize("block", [None, (4, 5)])
@pytest.mark.parametrize("size", [(3, 0, 5), (3, 5, 0), (0, 3, 5)])
def test_no_rows_inputs_or_outputs(backend, block, size):
    compare(masked(block=block), case(size, block), dtype=torch.float32)


@pytest.mark.parametrize("block", [None, (4, 5), (16, 40)])
def test_layouts(backend, block):
    layouts = [*LAYOUTS.values(), lambda dy: dy[:1, :1].expand(dy.shape)]
    for x_layout, w_layout, dy_layout in itertools.product(layouts[:3], layouts[:3], layouts):
        tensors = case((12, 41, 37), block)
        tensors["x"], tensors["weight"] = x_layout(tensors["x"]), w_layout(tensors["weight"])
        tensors["bias"], tensors["log_alpha"] = strided(tensors["bias"]), w_layout(tensors["log_alpha"])
        compare(masked(block=block), tensors, dtype=torch.float32, layout=dy_layout)


@pytest.mark.parametrize("block", [None, (4, 5)])
@pytest.mark.parametrize("batch", [4, 60])
def test_every_subset_of_gradients(backend, block, batch):
    names = ("x", "weight", "bias", "log_alpha")
    for n in range(len(names) + 1):
        for needs in itertools.combinations(names, n):
            _, grads = compare(
                masked(block=block),
                case((batch, 23, 19), block),
                dtype=torch.float32,
                what=f"{needs}",
                needs=list(needs),
            )
            assert set(grads) == set(needs)


@pytest.mark.parametrize("block", [None, (2, 3)])
@pytest.mark.parametrize("mode", [None, "paper", "median", "topk"])
def test_gradcheck(backend, block, mode):
    tensors = case((3, 7, 5), block, dtype=torch.float64)
    for name, t in tensors.items():
        t.requires_grad_(mode is None or name != "log_alpha")
    options = {"block": block, "mode": mode, "seed": SEED}
    assert gradcheck(lambda *leaves: l0.masked_linear(*leaves, **options), list(tensors.values()))


@pytest.mark.parametrize("block", [None, (4, 5)])
def test_seed_and_constants(backend, block):
    tensors = case((3, 23, 19), block)
    compare(masked(block=block, dist=l0.HardConcrete(0.5, -0.3, 1.2)), tensors, dtype=torch.float32)
    args = list(tensors.values())
    torch.manual_seed(1)
    first, second = l0.masked_linear(*args, block=block), l0.masked_linear(*args, block=block)
    torch.manual_seed(1)
    assert torch.equal(l0.masked_linear(*args, block=block), first)
    assert not torch.equal(first, second)
    seeded = [l0.masked_linear(*args, block=block, seed=SEED) for _ in range(2)]
    assert torch.equal(*seeded)


def test_single_weight_blocks_are_weight_gates(backend):
    tensors = case((9, 41, 37))
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    results = []
    for block in (None, (1, 1)):
        y = masked(block=block)(l0, **leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
    assert torch.equal(results[0][-1] != 0, results[1][-1] != 0)


@pytest.mark.parametrize("block", [None, (4, 5)])
def test_float64_gates_of_a_float32_layer_and_the_reverse(backend, block):
    for layer_dtype, gate_dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        tensors = case((9, 41, 37), block, dtype=layer_dtype)
        tensors["log_alpha"] = tensors["log_alpha"].to(gate_dtype)
        compare(masked(block=block), tensors, dtype=torch.float32)


class TestBlocksLargerThanTheWeight:
    """A block is cropped at the edge: nothing of its full size is made."""

    @pytest.mark.parametrize("block", [(2**31 - 1, 4), (4, 2**31 - 1), (2**31 - 1, 2**31 - 1)])
    @pytest.mark.parametrize("name", ["cpp", "torch", "reference"])
    def test_values_and_gradients(self, block, name):
        torch.manual_seed(0)
        x, w = torch.randn(3, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
        shape = (-(-8 // block[0]), -(-6 // block[1]))
        a = torch.randn(shape, requires_grad=True)
        z = torch.ones(8, 6)
        with l0.use_backend(name):
            drawn = l0.sample_gates(a.detach().flatten(), seed=torch.tensor([5])).z.view(shape)
            y = l0.masked_linear(x, w, None, a, block=block, seed=torch.tensor([5]))
            y.sum().backward()
        for r in range(8):
            for c in range(6):
                z[r, c] = drawn[r // block[0], c // block[1]]
        torch.testing.assert_close(y, x @ (w * z).t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, (w * z).sum(0).expand(3, 6), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(w.grad, x.detach().sum(0) * z, rtol=1e-5, atol=1e-5)

    def test_of_a_layer(self):
        layer = l0.nn.L0Linear(6, 8, gate=(4, 2**31 - 1))
        p_open = layer.weight_gate.dist.p_open(layer.weight_gate.log_alpha.detach())
        squares = layer.weight.detach().square().view(2, -1).sum(1, keepdim=True)
        want = (p_open * (24 * layer.weight_gate.lam + 0.05 * squares)).sum()
        torch.testing.assert_close(l0.nn.penalty(layer, weight_decay=0.1).detach(), want)

    def test_a_layer_resized_by_hand(self):
        layer = l0.nn.L0Linear(6, 8, gate="weight")
        layer.weight.data = layer.weight.data[:-1].clone()
        with pytest.raises(ValueError, match=r"weight must have shape \(8, 6\)"):
            l0.nn.penalty(layer, weight_decay=0.1)
        layer.weight_gate.log_alpha.data = layer.weight_gate.log_alpha.data[:-1].clone()
        with pytest.raises(RuntimeError, match=r"must hold the n=48 gates .*got 42 .*set n, too"):
            l0.nn.penalty(layer)

    @pytest.mark.parametrize("block", [(0, 2), (-5, -13), (2, 5)])
    @pytest.mark.parametrize("name", ["cpp", "torch"])
    def test_the_operator(self, block, name):
        args = (torch.randn(2, 13), torch.randn(9, 13), None, torch.ones(1, 1), *block, torch.float32, name)
        with pytest.raises(ValueError, match=r"must be positive|one per block"):
            torch.ops.l0kernels.block_linear(*args)


class TestErrors:
    def call(self, **changes):
        kwargs = case((2, 6, 4)) | changes
        return l0.masked_linear(**kwargs)

    def test_nan(self, backend):
        for shape, block in (((4, 6), None), ((2, 2), (2, 3))):
            for mode in (None, "paper", "median", "topk"):
                log_alpha = torch.zeros(shape)
                log_alpha[1, 1] = float("nan")
                with pytest.raises(ValueError, match="log_alpha must not hold NaN"):
                    self.call(log_alpha=log_alpha, block=block, mode=mode)

    def test_shapes(self, backend):
        with pytest.raises(ValueError, match=r"log_alpha must have shape \(4, 6\) .* got \(4, 5\)"):
            self.call(log_alpha=torch.zeros(4, 5))
        with pytest.raises(ValueError, match=r"log_alpha must have shape \(2, 2\) .* got \(4, 6\)"):
            self.call(block=(3, 4))
        with pytest.raises(ValueError, match=r"log_alpha must have 2 dimension\(s\), got shape \(24,\)"):
            self.call(log_alpha=torch.zeros(24))
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\) .* got \(6,\)"):
            self.call(bias=torch.zeros(6))
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 6\), .* got \(2, 4\)"):
            self.call(x=torch.zeros(2, 4))

    def test_block(self, backend):
        for block in (3, (3,), (1, 2, 3), "ab c"):
            with pytest.raises(TypeError, match=r"block must be a pair \(b_out, b_in\) or None, got"):
                self.call(block=block)
        with pytest.raises(ValueError, match=r"block\[1\] must be in \[1, .* got 0"):
            self.call(block=(2, 0))
        with pytest.raises(TypeError, match=r"block\[0\] must be an int, got float"):
            self.call(block=(2.0, 2))

    def test_dtypes_devices_and_modes(self, backend):
        with pytest.raises(TypeError, match=r"log_alpha must be float32 or float64, got torch.bfloat16"):
            self.call(log_alpha=torch.zeros(4, 6).bfloat16())
        with pytest.raises(
            TypeError, match=r"x must have the dtype of weight, torch.float32, got torch.float64"
        ):
            self.call(x=torch.zeros(2, 6).double())
        with pytest.raises(ValueError, match="log_alpha must be on cpu, the device of weight, got meta"):
            self.call(log_alpha=torch.zeros(4, 6, device="meta"))
        with pytest.raises(ValueError, match="mode must be one of 'paper', 'median', 'topk', got 'mean'"):
            self.call(mode="mean")
        with pytest.raises(TypeError, match="seed must be an int64 tensor"):
            self.call(seed=4)
        with pytest.raises(TypeError, match="dist must be a HardConcrete"):
            self.call(dist=None)
