"""What the tests of the operations share: inputs, the comparison with float64 and its tolerance."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import l0kernels as l0
from l0kernels import reference
from l0kernels._arguments import GLU
from l0kernels._native import native

BACKENDS = ["torch"] if native is None else ["cpp", "torch"]
ONE_BACKEND = [BACKENDS[0], *(pytest.param(name, marks=pytest.mark.long) for name in BACKENDS[1:])]
"""What the backend hardly changes, such as how dynamo traces a module, is shown on one; `-m long`: on all."""
SEED = torch.tensor([20240229], dtype=torch.int64)
KINDS = ("mixed", "open", "closed", "few")


def count_open(model):
    """How many gates of each vector of a model are open in eval()."""
    return [units.open for units in l0.nn.open_units(model).values()]


def make_z(kind, n, dtype=torch.float32):
    """n gates: closed, fractional and full ones mixed, all open, all closed, or a few fractional ones."""
    if kind == "open":
        return torch.ones(n, dtype=dtype)
    z = torch.zeros(n, dtype=dtype)
    if kind == "few":
        z[:: max(1, n // 3)] = 0.4
    if kind in ("mixed", "wild"):
        u = torch.rand(n, dtype=dtype)
        fractional = torch.rand(n, dtype=dtype).clamp(0.01, 0.99)
        z = torch.where(u < 0.4, torch.zeros_like(u), torch.where(u < 0.8, fractional, torch.ones_like(u)))
    if kind == "wild":  # a caller's own gates need not lie in [0, 1]
        z = z * torch.randn(n, dtype=dtype) * 2
    return z


def wanted(z, full):
    """Where dz is expected: at every open gate, or at fractional ones alone."""
    return z != 0 if full else (z > 0) & (z < 1)


def gate_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


_ROUNDINGS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}


def tolerance(eager, exact, dtype, slack=1):
    """Twice the error of the plain formula in the same dtype, and a few roundings of the largest value.

    Operands are of order one: a value that cancels to less still comes from terms of that size.
    """
    error = (eager.double() - exact).abs().max().item()
    return 2 * error + slack * _ROUNDINGS[dtype] * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())


def assert_near(got, eager, exact, dtype, what, slack=1):
    """``got`` is as near to ``exact`` (float64) as the plain formula ``eager`` in ``dtype``."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel():
        error = (got.double() - exact).abs().max().item()
        limit = tolerance(eager, exact, dtype, slack)
        assert error <= limit, f"{what}: error {error:.3g} above {limit:.3g}"  # fails for a NaN, too


def evaluate(call, tensors, needs, dy, autocast=None):
    """Output and gradients {name: tensor} of ``call(**tensors)`` for the names in ``needs``; dy(y) is y's."""
    leaves = {
        name: None if t is None else t.detach().requires_grad_(name in needs) for name, t in tensors.items()
    }
    with nullcontext() if autocast is None else torch.autocast(tensors["x"].device.type, dtype=autocast):
        y = call(**leaves)
    if not y.requires_grad:
        return y, {}
    grads = torch.autograd.grad(y, [leaves[name] for name in needs], dy(y), allow_unused=True)
    return y.detach(), dict(zip(needs, grads, strict=True))


def compare(
    call,
    tensors,
    *,
    dtype,
    what="",
    masks=None,
    needs=None,
    layout=torch.clone,
    autocast=None,
    slack=1,
    underflow=False,
):
    """Asserts that an operation and every gradient equal the dense formula in float64.

    Args:
        call: (namespace, **tensors) -> y, for the public package and for l0kernels.reference.
        tensors: leaves by name, in any layout; None stays None.
        dtype: of the products, for the tolerance.
        what: names the case in messages.
        masks: by name, where a gate gradient is expected; elsewhere it must be exactly 0.
        needs: names whose gradients are wanted; None is all of them.
        layout: makes y's gradient from values of y's shape.
        autocast: its dtype, or None.
        slack: multiplies the roundings that a result may be off by, where sums are long.
        underflow: whether a gate's gradient that is expected may be rounded to 0.

    Returns:
        y and the gradients by name.
    """
    masks = masks or {}
    needs = [name for name, t in tensors.items() if t is not None] if needs is None else needs
    copies = {name: None if t is None else t.detach().clone() for name, t in tensors.items()}
    doubles = {name: None if t is None else t.detach().double() for name, t in tensors.items()}
    values = None

    def dy(y):
        nonlocal values
        values = torch.randn(y.shape, device=y.device).to(y.dtype) if values is None else values
        return layout(values).to(y.dtype)

    y_eager, eager = evaluate(partial(call, reference), copies, needs, dy, autocast)
    y, grads = evaluate(partial(call, l0), tensors, needs, dy, autocast)
    y_exact, exact = evaluate(partial(call, reference), doubles, needs, dy)

    assert y.dtype == y_eager.dtype, f"{what}: y is {y.dtype}, expected {y_eager.dtype}"
    assert_near(y, y_eager, y_exact, dtype, f"{what} y", slack)
    assert grads.keys() == exact.keys()
    for name, g in grads.items():
        assert (g is None) == (exact[name] is None), f"{what}: d{name} is {g}"
        if g is None:
            continue
        assert g.dtype == tensors[name].dtype, f"{what}: d{name} is {g.dtype}"
        if name in masks:
            wrong = (g != 0) != (masks[name] & (exact[name] != 0))
            wrong &= ~masks[name] if underflow else True
            assert not wrong.any(), f"{what}: zero set of d{name} differs at {wrong.nonzero()[:, 0].tolist()}"
            g = torch.where(masks[name], g, exact[name])  # what is masked still tells how large errors are
        assert_near(g, eager[name], exact[name], dtype, f"{what} d{name}", slack)
    return y, grads


def transposed(t):
    """The same values, columns in memory one after the other."""
    return t.t().contiguous().t()


def sliced(t):
    """The same values as every second row and every third column of a matrix of NaN."""
    rows, cols = t.shape
    whole = t.new_full((2 * rows + 1, 3 * cols + 2), float("nan"))
    part = whole[1::2, 2::3][:rows, :cols]
    return part.copy_(t)


def strided(t):
    """A vector's values as every third element of a vector of NaN."""
    part = t.new_full((3 * len(t) + 1,), float("nan"))[1::3][: len(t)]
    return part.copy_(t)


LAYOUTS = {"contiguous": torch.clone, "transposed": transposed, "sliced": sliced}


def check_large_activations(activation, device="cpu"):
    """A chain's activation and its derivative, up to where torch's own overflow, against torch's."""
    glu = activation in GLU
    a = torch.tensor([0.5, 9.0, 40.0, 88.0, 104.0, 200.0, 1e19, 1e30, 2e37, 1e38, 1.6e38], device=device)
    x = torch.cat([-a, a])[:, None].requires_grad_()
    first = torch.tensor([[1.0], [0.0]] if glu else [[1.0]], device=device)
    bias = torch.tensor([0.0, 1.0], device=device) if glu else None
    layers = [first, torch.ones(1, 1, device=device)], [bias, None], [None, None], activation
    results = []
    for namespace in (l0, reference):
        y = namespace.gated_mlp(x, *layers)
        results.append((y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def to_list(gates):
    """z, index and count as the operators of torch.library take them."""
    return [gates.z.detach(), gates.index, gates.count]
