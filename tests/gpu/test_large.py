"""Operands of more than 2^31 elements on a GPU: offsets are 64 bits wide."""

import pytest
import torch
from gpu_cases import NEEDS_GPU, ON_GPU

import l0kernels as l0

ROWS, IN, OUT = 786_432, 4096, 256
TAIL = 64

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.skipif(
        not ON_GPU
        or not torch.cuda.is_available()
        or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
        reason="needs a GPU of 60 GB",
    ),
]


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_three_billion_elements(keep):
    torch.manual_seed(0)
    assert ROWS * IN > 2**31
    x = torch.randn(ROWS, IN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(OUT, IN, device="cuda") * IN**-0.5).to(torch.bfloat16)
    z = (torch.rand(IN, device="cuda") < keep).float()
    with l0.use_backend("triton"):
        y = l0.gated_linear(x, w, in_gates=l0.Gates.from_z(z))
        dy = torch.randn(TAIL, OUT, device="cuda", dtype=torch.bfloat16)
        grad = torch.zeros_like(y)
        grad[-TAIL:] = dy
        y.backward(grad)
    tail = x.detach()[-TAIL:].float()
    exact = (tail * z) @ w.float().T
    torch.testing.assert_close(y[-TAIL:].float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    exact = (dy.float() @ w.float()) * z
    torch.testing.assert_close(x.grad[-TAIL:].float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    assert not x.grad[: ROWS - TAIL].any()
