"""Activations and their derivatives in registers, fp32, chosen at compile time."""

import triton
import triton.language as tl


@triton.jit
def _reciprocal(x):
    """1 / x for x > 0, to 2 ulp: one special-function operation where a division takes eight."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def _normal(a):
    """Distribution function and density of the normal distribution at a.

    erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7; its exp(-x^2) is the density's.
    """
    e = tl.exp2(a * a * -0.7213475204444817)
    t = _reciprocal(1.0 + 0.23164190 * tl.abs(a))
    p = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    tail = p * e
    return tl.where(a < 0.0, tail, 1.0 - tail), e * 0.3989422804014327


@triton.jit
def _sigmoid(a):
    # A power of two that overflows would make NaN of 0 * inf; what is left of it beyond, times an a of -1e38,
    # would be seen.
    s = _reciprocal(1.0 + tl.exp2(tl.minimum(a * -1.4426950408889634, 120.0)))
    return tl.where(a < -83.0, 0.0, s)


@triton.jit
def act(a, ACT: tl.constexpr):
    """h = act(a) in fp32; gelu is the erf form. A NaN stays a NaN."""
    if ACT == "relu":
        return tl.where(a <= 0.0, 0.0, a)
    elif ACT == "gelu":
        cdf, _ = _normal(a)
        return a * cdf
    elif ACT == "silu":
        return a * _sigmoid(a)
    else:
        return a


@triton.jit
def act_grad(a, ACT: tl.constexpr):
    """dh/da; what it shares with act is computed once."""
    if ACT == "relu":
        return tl.where(a > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        cdf, density = _normal(a)
        return a * density + cdf
    elif ACT == "silu":
        s = _sigmoid(a)
        return a * s * (1.0 - s) + s
    else:
        return a * 0.0 + 1.0
