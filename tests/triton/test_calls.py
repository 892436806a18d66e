"""Every public call on the Triton kernels: what the reference computes, or the reason why not."""

import pytest
import torch
from call_table import CALLS, check

from triton_device import INTERPRETED


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Evaluating, a module launches what it launches training, with other gates: one of each kind shows it.
SHOWN = (
    *("nn.L0Linear in", "nn.L0Linear weight", "nn.L0Linear ("),
    *("nn.L0MLP relu 1", "nn.L0FeedForward relu", "nn.L0Conv2d both 1", "nn.L0Sequential"),
)
ALIKE = [name for name in CALLS if name.endswith(", evaluating") and not name.startswith(SHOWN)]


@pytest.mark.skipif(not INTERPRETED, reason="the table's tensors are on the CPU")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name for name in CALLS]
)
def test_call(name):
    assert check(name, "triton") is None


@pytest.mark.skipif(not INTERPRETED, reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("eval_gates")])
def test_float64_is_refused(name):
    torch.set_default_dtype(torch.float64)
    try:
        assert check(name, "triton") in (
            "it serves float32, bfloat16 and float16, got torch.float64",
            *([None] if "_norm" in name else []),  # torch's own operations serve it
        )
    finally:
        torch.set_default_dtype(torch.float32)
