"""Gates, packed buffers and their way back, in plain torch, for the tests of the Triton kernels."""

import torch

from l0kernels._gates import compact, round_up
from triton_device import DEVICE


def make_gate(n, keep, plain=False):
    """[z, index, count]: a share ``keep`` open, half of it fractional; ``plain``: read in natural order."""
    z = torch.where(torch.rand(n) < 0.5, torch.rand(n) * 0.9 + 0.1, torch.ones(n))
    z = (z * (torch.rand(n) < keep)).to(DEVICE)
    index, count = compact(z)
    if plain:
        count[1] = round_up(n)
    return [z, index, count]


def positions(gate, size):
    """Unit of every position that holds one, and where the zeros after them end."""
    if gate is None:
        return torch.arange(size, device=DEVICE), size
    n_open, extent = gate[2].tolist()
    if extent >= size:
        return torch.arange(size, device=DEVICE), round_up(size)
    return gate[1][:n_open].long(), extent


def bury(t, rows, cols):
    """The packed buffer of t: NaN wherever nothing may be read."""
    shape = [n if gate is None else round_up(n) for n, gate in zip(t.shape, (rows, cols), strict=True)]
    packed = torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)
    (r, r_end), (c, c_end) = positions(rows, t.shape[0]), positions(cols, t.shape[1])
    packed[:r_end, :c_end] = 0
    packed[: len(r), : len(c)] = t[r][:, c]
    return packed


def dig(packed, rows, cols, shape):
    """The natural matrix of a packed one; 0 where closed."""
    (r, _), (c, _) = positions(rows, shape[0]), positions(cols, shape[1])
    full = torch.zeros(shape, dtype=packed.dtype, device=packed.device)
    full[r[:, None], c[None]] = packed[: len(r), : len(c)]
    return full
