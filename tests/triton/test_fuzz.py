"""Random calls of every operation on the Triton kernels."""

import fuzz_ops
import pytest
import torch

import l0kernels as l0
from triton_device import DEVICE, DTYPES, INTERPRETED

AUTOCASTS = (torch.float16,) if INTERPRETED else (torch.bfloat16,)


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with l0.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("route", ["0", "1", "auto"])
@pytest.mark.parametrize("name", fuzz_ops.OPS)
def test_random_calls(name, route, monkeypatch):
    """``route``: layers packed, gathered within the product, or as their size has it."""
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", route)
    layers = fuzz_ops.PRIMITIVES[name] & {"gated_linear", "gated_mlp", "gated_conv2d"}
    if route == "auto" or layers:
        first = 1000 * ["auto", "0", "1"].index(route)
        for seed in range(first, first + fuzz_ops.count(1 if INTERPRETED else 2)):
            fuzz_ops.check(
                name, seed, dtypes=DTYPES, autocasts=AUTOCASTS, doubles=False, largest=130, device=DEVICE
            )
