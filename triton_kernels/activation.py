"""Activations and their derivatives in registers, fp32, chosen at compile time."""

import triton
import triton.language as tl

ACTIVATIONS = ("identity", "relu", "gelu", "silu")


@triton.jit
def act(a, ACT: tl.constexpr):
    """h = act(a); gelu is the erf form."""
    if ACT == "relu":
        return tl.where(a <= 0.0, 0.0, a)  # a NaN stays a NaN
    elif ACT == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif ACT == "silu":
        return a / (1.0 + tl.exp(-a))
    else:
        return a


@triton.jit
def act_grad(a, ACT: tl.constexpr):
    """dh/da."""
    if ACT == "relu":
        return tl.where(a > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        density = tl.exp(-0.5 * a * a) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * density
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-a))
        return s * (1.0 + a * (1.0 - s))
    else:
        return a * 0.0 + 1.0
