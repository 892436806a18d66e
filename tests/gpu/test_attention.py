"""On a GPU the attention kernels never make the host wait, can be captured, and equal the formula; so does
torch's attention of all heads."""

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, NEEDS_GPU, ON_GPU, capture, no_sync

import l0kernels as l0
from l0kernels import Gates, reference

pytestmark = NEEDS_GPU

KEEPS = {
    "some": (0.0, 0.3, 1.0, 0.0, 0.7, 0.0, 1.0, 0.2),
    "none": (0.0,) * 8,
    "all": (1.0, 0.5) * 4,
    "one": (0.0,) * 6 + (0.4, 0.0),
}
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the error's norm beside the result's."""


@pytest.fixture(autouse=True)
def exact():
    """float32 is float32 in the kernels, and unwritten memory NaN."""
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before)


def inputs(dtype, B, heads, heads_k, L, S, D):
    """q, k, v and dy, heads behind the sequence in memory as projections leave them."""
    shapes = (L, heads), (S, heads_k), (S, heads_k), (L, heads)
    return [torch.randn(B, n, h, D, device=DEVICE, dtype=dtype).transpose(1, 2) for n, h in shapes]


def results(function, tensors, z, dtype, full=True, **options):
    *leaves, dy = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in leaves]
    z = z.detach().to(torch.promote_types(torch.float32, dtype)).requires_grad_()
    y = function(*leaves, gates=Gates.from_z(z, full_grad=full), **options)
    y.backward(dy)
    return {"y": y.detach()} | dict(
        zip(("q", "k", "v", "z"), [*(t.grad for t in leaves), z.grad], strict=True)
    )


def mask_of(kind, B, heads, L, S):
    """Options of the call: what rows may see."""
    if kind == "causal":
        return {"is_causal": True}
    if kind == "padding":
        lengths = torch.arange(B, device=DEVICE) * S // (2 * B)
        return {"attn_mask": (torch.arange(S, device=DEVICE) < S - lengths[:, None])[:, None, None]}
    if kind == "blind":  # some rows see no key
        mask = torch.rand(L, S, device=DEVICE) < 0.5
        mask[::3] = False
        return {"attn_mask": mask}
    return {"attn_mask": torch.randn(heads, L, S, device=DEVICE)} if kind == "bias" else {}


def check(backend, dtype, sizes, z, kind="", full=True):
    B, heads, heads_k, L, S, _ = sizes
    tensors, options = inputs(dtype, *sizes), mask_of(kind, B, heads, L, S)
    z = torch.tensor(z, device=DEVICE)
    with l0.use_backend(backend):
        found = results(l0.gated_attention, tensors, z, dtype, full, **options)
    expected = results(reference.gated_attention, tensors, z, torch.float64, full, **options)
    for name, value in found.items():
        error = (value.double() - expected[name]).norm().item()
        limit = BOUNDS[dtype] * max(1.0, expected[name].norm().item())
        assert error <= limit, f"{name} of {backend} {dtype} {sizes} {kind}: {error:.3g} above {limit:.3g}"
    for name, per_gate in (("y", heads // len(z)), ("q", heads // len(z)), ("k", heads_k // len(z))):
        if per_gate:
            assert not found[name][:, (z == 0).repeat_interleave(per_gate)].any()
    assert not found["z"][z == 0].any()


LARGE = (2, 8, 8, 517, 389, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["", "causal", "padding", "blind", "bias"])
def test_masks(kind, dtype):
    check("triton", dtype, LARGE, KEEPS["some"], kind)


@pytest.mark.parametrize("keep", KEEPS)
def test_gates(keep):
    check("triton", torch.bfloat16, LARGE, KEEPS[keep], full=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 32, 80, 96, 128, 192, 256])
def test_head_dimensions(D, dtype):
    for kind in ("", "causal"):
        check("triton", dtype, (1, 4, 4, 200, 150, D), (0.5, 0.0, 1.0, 0.2), kind)


@pytest.mark.parametrize("z", [(0.5, 0.0), (0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.3, 0.0)], ids=["of k", "of q"])
def test_shared_keys(z):
    for L, S in ((300, 300), (1, 301), (16, 40)):
        check("triton", torch.bfloat16, (2, 8, 2, L, S, 128), z)


def test_tf32():
    torch.set_float32_matmul_precision("high")
    for D in (64, 128, 256):
        tensors, z = (
            inputs(torch.float32, 1, 4, 4, 200, 150, D),
            torch.tensor([0.5, 0, 1, 0.2], device=DEVICE),
        )
        with l0.use_backend("triton"):
            found = results(l0.gated_attention, tensors, z, torch.float32)
        torch.set_float32_matmul_precision("highest")
        expected = results(reference.gated_attention, tensors, z, torch.float64)
        torch.set_float32_matmul_precision("high")
        for name, value in found.items():
            assert (value - expected[name]).norm() <= 1e-2 * expected[name].norm(), (D, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_attention(dtype):
    check("torch", dtype, (2, 8, 2, 130, 130, 64), KEEPS["some"], "causal")


def test_dropout_is_that_of_the_seed():
    q, k, v, _ = inputs(torch.float32, 2, 4, 4, 150, 190, 64)
    z = torch.tensor([0.5, 0.0, 1.0, 1.0], device=DEVICE)
    ones = torch.ones_like(v, requires_grad=True)
    with l0.use_backend("triton"):
        y = l0.gated_attention(q, k, ones, gates=Gates.from_z(z), dropout_p=0.25)
        grad = torch.autograd.grad(y, ones, torch.ones_like(y))[0]
    assert y[:, 2:].mean().item() == pytest.approx(1, abs=0.02)
    # With dy and v of ones y and dv have one sum, of the weights that stayed: where both drew alike.
    torch.testing.assert_close(y.sum((2, 3)), grad.sum((2, 3)), rtol=1e-4, atol=1e-3)
    assert y[:, 3].std() > 0.01


@pytest.mark.skipif(not ON_GPU, reason="a GPU's")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_never_waits_and_is_captured(backend):
    torch.use_deterministic_algorithms(False)
    tensors = inputs(torch.bfloat16, 2, 8, 2, 333, 333, 64)
    z = torch.tensor(KEEPS["some"], device=DEVICE)
    *leaves, dy = tensors
    leaves = [t.requires_grad_() for t in leaves]
    held = z.clone().requires_grad_()

    def step():
        with l0.use_backend(backend):
            gates = Gates.from_z(held)
            y = l0.gated_attention(*leaves, gates=gates, is_causal=True)
        return y, *torch.autograd.grad(y, [*leaves, held], dy)

    step()
    with no_sync():
        step()
    graph, captured = capture(step)
    for values in (z, z.flip(0)):
        held.data.copy_(values)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        assert not captured[0][:, values == 0].any()
