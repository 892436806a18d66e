"""Activations and their derivatives in registers, fp32, chosen at compile time."""

import triton
import triton.language as tl

ACTIVATIONS = ("identity", "relu", "gelu", "silu")


@triton.jit
def erf(x):
    """erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7; shares exp(-x^2) with the density of gelu'."""
    t = tl.fdiv(1.0, 1.0 + 0.3275911 * tl.abs(x))
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    e = 1.0 - p * tl.exp(-x * x)
    return tl.where(x < 0.0, -e, e)


@triton.jit
def act(a, ACT: tl.constexpr):
    """h = act(a); gelu is the erf form."""
    if ACT == "relu":
        return tl.where(a <= 0.0, 0.0, a)  # a NaN stays a NaN
    elif ACT == "gelu":
        return 0.5 * a * (1.0 + erf(a * 0.7071067811865476))
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
        x = a * 0.7071067811865476
        return 0.5 * (1.0 + erf(x)) + a * tl.exp(-x * x) * 0.3989422804014327
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-a))
        return s * (1.0 + a * (1.0 - s))
    else:
        return a * 0.0 + 1.0
