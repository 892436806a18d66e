"""The hard-concrete gate in registers: noise, value and slope (arXiv 1712.01312, equations 10 and 11)."""

import triton
import triton.language as tl


@triton.jit
def uniform(seed, index, stream, rank):
    """u = ((r >> 9) + 0.5) * 2^-23, r the first Philox4x32-10 word: key = seed (int64), counter = (index low,
    index high, stream, rank)."""
    index = index.to(tl.int64)
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    r, _, _, _ = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero + rank.to(tl.uint32))
    return ((r >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gate_value(log_alpha, u, inv_beta, gamma, zeta):
    """z = clip(sigmoid((logit(u) + log_alpha) / beta) * (zeta - gamma) + gamma, 0, 1); NaN stays."""
    logit = (tl.log(u) - tl.log(1.0 - u) + log_alpha) * inv_beta
    s = 1.0 / (1.0 + tl.exp(-logit))
    z = s * (zeta - gamma) + gamma
    z = tl.where(z < 0.0, 0.0, z)
    return tl.where(z > 1.0, 1.0, z)


@triton.jit
def gate_slope(z, inv_beta, gamma, zeta):
    """dz/dlog_alpha from z alone: (zeta - gamma) / beta * s * (1 - s) where 0 < z < 1, else exactly 0."""
    width = zeta - gamma
    s = (z - gamma) / width
    return tl.where((z > 0.0) & (z < 1.0), width * inv_beta * s * (1.0 - s), 0.0)
