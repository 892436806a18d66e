"""Gates, layouts and tolerances for the tests of the CUDA kernels."""

import torch
from cuda_device import DEVICE, EMULATOR

from l0kernels._gates import HardConcrete, compact, round_up
from l0kernels.impl import cuda
from op_checks import LAYOUTS

DIST = HardConcrete()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


def launches():
    """Launches so far; only the emulator counts them."""
    return EMULATOR.emulator_launches() if EMULATOR else 0


def on_device(t):
    return t.to(DEVICE)


def gate_of(z, tau=cuda.TAU):
    """[z, index, count] as the sampler leaves them."""
    index, count = compact(z)
    if count[0] > tau * len(z):
        count[1] = round_up(len(z))
    return [on_device(t) for t in (z, index, count)]


def near(got, want, eps, scale):
    """Exactly 0 where ``want`` is, else within eps times the size of the terms."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape
    assert ((got == 0) >= (want == 0)).all(), "a zero is not exact"
    error = (got - want).abs()
    assert (error <= eps * (scale + want.abs())).all(), f"error {error.max():.3g}"  # fails for a NaN, too


WEIGHT_LAYOUTS = {
    **LAYOUTS,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}
