"""Triton's interpreter as `tests/support/interpreter.py` leaves it: quicker, and stricter."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from triton_device import INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED or not triton.__version__.startswith("3.6."), reason="no interpreter, or one as it came"
)


@triton.jit
def inner(a, b, WHICH: tl.constexpr):
    return a + b if WHICH == "add" else (a - b if WHICH == "sub" else a * b)


@triton.jit
def kernel(A, B, C, N: tl.constexpr, WHICH: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    c = inner(tl.load(A + at), tl.load(B + at), WHICH)
    tl.store(C + at, tl.where(tl.cdiv(N, 2) > at, c, tl.zeros_like(c)))


def run(a, b, which):
    c = torch.empty_like(a)
    kernel[(1,)](a, b, c, len(a), which)
    return c


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint32])
@pytest.mark.parametrize("which", ["add", "sub", "mul"])
def test_an_overflow_ends_the_launch(which, dtype):
    """In a function that a kernel calls; the last number that fits is computed."""
    most = torch.iinfo(dtype).max
    first = {"add": 5, "sub": 1, "mul": 6}[which]
    for a, b, c in {
        "add": ((most - 1, 1, most), (most, 1, None)),
        "sub": ((5, 5, 0), (torch.iinfo(dtype).min, 1, None)),
        "mul": ((most // 3, 3, most // 3 * 3), (most // 3, 4, None)),
    }[which]:
        left, right = (torch.tensor(values, dtype=dtype) for values in ([3, a, 2, 1], [2, b, 1, 0]))
        if c is None:
            match = f"int{8 * dtype.itemsize} overflow detected for operation {which}"
            with pytest.raises(InterpreterError, match=match):
                run(left, right, which)
        else:
            assert run(left, right, which).tolist() == [first, c, 0, 0]


def test_a_launch_leaves_the_language_as_it_was():
    names = [(module, name) for module in (tl, tl.core, tl.math, tl.core.tensor) for name in vars(module)]
    before = [getattr(*name) for name in names]
    one = torch.ones(4, dtype=torch.int32)
    for left, right in ((one, one), (one, torch.full_like(one, 2**31 - 1)), (one, one)):
        try:
            assert run(left, right, "add").tolist() == [2, 2, 0, 0]
        except InterpreterError:
            assert right is not one
        assert all(getattr(*name) is value for name, value in zip(names, before, strict=True))


def test_a_shape_is_a_tensors_own():
    """What is kept by shape is right for the next one, and for another type."""
    for dtype in (tl.int32, tl.float32):
        for shape in ([4, 8], [8, 4], [32]):
            block = tl.block_type(dtype, shape)
            assert (block.shape.values, block.numel, block.element_ty) == (shape, 32, dtype)
            assert str(block).endswith(f", {dtype}>")
            tensor = tl.core.tensor(object(), block)
            assert [size.value for size in tensor.shape] == shape
            assert (tensor.dtype, tensor.numel.value) == (dtype, 32)
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.int32, [3])
    assert tl.int32 == tl.core.dtype("int32")
    assert tl.int32 != tl.uint32
