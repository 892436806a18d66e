"""The attention kernels against the dense formula in float64."""

import pytest
import torch
from torch.library import opcheck

import l0kernels as l0
from l0kernels import Gates, reference
from l0kernels.reference import uniform
from triton_device import DEVICE, INTERPRETED

BOUNDS = {torch.float32: 1e-5 if INTERPRETED else 2e-2, torch.float16: 3e-3}
"""Of the error's norm beside the result's."""
Z = (0.0, 0.3, 1.0, 0.7)


@pytest.fixture(autouse=True)
def backend():
    """Backend triton; unwritten memory reads as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with l0.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def results(function, tensors, z, dtype, full, options):
    """y and every gradient by name."""
    *leaves, dy = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in leaves]
    gates = None
    if z is not None:
        z = z.detach().to(torch.promote_types(torch.float32, dtype)).requires_grad_()
        gates = Gates.from_z(z, full_grad=full)
    y = function(*leaves, gates=gates, **options)
    y.backward(dy)
    found = {"y": y.detach()} | {name: t.grad for name, t in zip("qkv", leaves, strict=True)}
    return found if z is None else found | {"z": z.grad}


def check(sizes, z=Z, dtype=torch.float32, full=True, lay=lambda t: t, **options):
    B, heads, heads_k, L, S, D = sizes
    counts = (L, heads), (S, heads_k), (S, heads_k), (L, heads)
    tensors = [lay(torch.randn(B, n, h, D, device=DEVICE, dtype=dtype).transpose(1, 2)) for n, h in counts]
    z = None if z is None else torch.tensor(z, device=DEVICE)
    found = results(l0.gated_attention, tensors, z, dtype, full, options)
    expected = results(reference.gated_attention, tensors, z, torch.float64, full, options)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "z" else dtype)
        error = (value.double() - expected[name]).norm().item()
        limit = BOUNDS[dtype] * max(1.0, expected[name].norm().item())
        assert error <= limit, f"{name}: {error:.3g} above {limit:.3g}"
    if z is not None:
        shut = (z == 0).repeat_interleave(heads // len(z))
        assert not found["y"][:, shut].any()
        assert not found["q"][:, shut].any()
        shut = shut.view(heads_k, -1).all(1)
        assert not found["k"][:, shut].any()
        assert not found["v"][:, shut].any()
        assert not found["z"][(z == 0) if full else (z <= 0) | (z >= 1)].any()
    return found


def mask_of(kind, B, heads, L, S):
    if kind == "causal":
        return {"is_causal": True, "scale": 0.3}
    if kind == "bias":
        return {"attn_mask": torch.randn(heads, L, S, device=DEVICE)}
    shapes = {"padding": (B, 1, 1, S), "rows": (L, S), "heads": (1, heads, 1, S), "blind": (B, 1, L, S)}
    taken = torch.rand(shapes[kind], device=DEVICE) < 0.6
    if kind == "blind":  # rows that see no key, and a batch that sees none
        taken[:, :, ::2] = False
        taken[-1] = False
    return {"attn_mask": taken}


@pytest.mark.parametrize("z", [Z, (0.0,) * 4, (1.0,) * 4, (0.0, 0.0, 0.2, 0.0), (-2.0, 3.0, 0.0, 0.5), None])
def test_gates(z):
    check((1, 4, 4, 37, 45, 32), z)


def test_gradients_of_fractional_gates_alone():
    check((1, 4, 4, 9, 20, 16), (0.0, 0.3, 1.0, 0.7), full=False)


@pytest.mark.parametrize("kind", ["causal", "padding", "rows", "heads", "blind", "bias"])
def test_masks(kind):
    for L, S in ((37, 70), (70, 37)):
        check((2, 2, 2, L, S, 16), (0.0, 0.3), **mask_of(kind, 2, 2, L, S))


@pytest.mark.parametrize("z", [(0.5, 0.0), Z, (0.0, 0.0, 0.4, 0.0), None], ids=str)
def test_heads_that_share_keys(z):
    check((2, 4, 2, 20, 35, 16), z, is_causal=True)


@pytest.mark.parametrize("D", [1, 16, 40, 80, 256])
def test_head_sizes(D):
    check((1, 4, 4, 18, 19, D))


@pytest.mark.parametrize(
    "sizes", [(2, 4, 2, 1, 67, 32), (1, 4, 4, 1, 1, 16), (1, 4, 4, 16, 1, 16), (1, 4, 4, 65, 64, 16)]
)
def test_edges(sizes):
    check(sizes)
    check(sizes, is_causal=True)


@pytest.mark.parametrize("sizes", [(0, 4, 4, 3, 4, 16), (2, 4, 4, 0, 4, 16), (2, 4, 4, 3, 0, 16)])
def test_empty(sizes):
    found = check(sizes)
    assert not any(value.any() for value in found.values())


def test_half():
    check((2, 4, 2, 37, 45, 32), Z, torch.float16, is_causal=True)


def test_memory():
    """Sliced heads of one projection, a last dimension in pieces, an expanded gradient."""
    check((1, 4, 4, 20, 9, 16), lay=lambda t: t.mT.contiguous().mT)
    check((1, 4, 4, 20, 9, 16), lay=lambda t: torch.cat([t, t], -1)[..., 16:])
    fused = torch.randn(2, 11, 3, 4, 16, device=DEVICE).requires_grad_()
    gates = Gates.from_z(torch.tensor(Z, device=DEVICE))
    grads = []
    for function in (l0.gated_attention, reference.gated_attention):
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        y = function(q, k, v, gates=gates)
        grads.append(torch.autograd.grad(y.sum(), fused)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_result_lies_as_q_does():
    q = torch.randn(2, 5, 4, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    y = l0.gated_attention(q, q, q)
    assert y.stride() == q.stride()
    assert torch.autograd.grad(y.sum(), q)[0].stride() == q.stride()
    y.add_(1)  # no view of a Function's


@pytest.mark.parametrize("wanted", ["q", "k", "v", "z"])
def test_one_gradient_alone(wanted):
    leaves = {name: torch.randn(1, 4, 20, 16, device=DEVICE) for name in "qkv"}
    leaves["z"] = torch.tensor(Z, device=DEVICE)
    leaf = leaves[wanted].requires_grad_()
    grads = []
    for function in (l0.gated_attention, reference.gated_attention):
        q, k, v, z = leaves.values()
        y = function(q, k, v, gates=Gates.from_z(z), is_causal=True)
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_dropout_draws_what_the_seed_says(monkeypatch):
    B, heads, L, S, D, p = 2, 4, 18, 35, 16, 0.3
    seed = torch.tensor([1 << 40 | 12345], device=DEVICE)
    monkeypatch.setattr("l0kernels.attention.draw_seed", lambda device: seed)
    q, k, v, dy = (torch.randn(B, heads, n, D, device=DEVICE) for n in (L, S, S, L))
    index = (torch.arange(L, device=DEVICE)[:, None] << 32) + torch.arange(S, device=DEVICE)
    index = index.expand(B * heads, L, S)
    stream = torch.arange(B * heads, device=DEVICE)[:, None, None].expand_as(index)
    kept = (uniform(seed, index, stream=stream) >= p).view(B, heads, L, S)
    z = torch.tensor(Z, device=DEVICE)

    def formula(q, k, v, gates):
        weights = (q @ k.mT / D**0.5).softmax(-1) * kept / (1 - p)
        return weights @ v * gates.z[:, None, None]

    found = results(l0.gated_attention, (q, k, v, dy), z, torch.float32, True, {"dropout_p": p})
    expected = results(formula, (q, k, v, dy), z, torch.float64, True, {})
    expected["z"][z == 0] = 0
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_refuses():
    q = torch.randn(1, 2, 3, 257, device=DEVICE)
    with pytest.raises(
        RuntimeError, match=r"^backend 'triton' cannot be used: it serves head dimensions to 256"
    ):
        l0.gated_attention(q, q, q)
    q = q[..., :16]
    mask = torch.zeros(3, 3, device=DEVICE, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"^backend 'triton' cannot be used: it has no gradient of attn_mask"
    ):
        l0.gated_attention(q, q, q, attn_mask=mask)
    leaf = q.contiguous().requires_grad_()
    y = l0.gated_attention(leaf, q, q)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's AOTAutograd adds nothing")
@pytest.mark.parametrize("shared", [1, 2])
def test_operators(shared):
    """Schema, fake and autograd registration, and AOTAutograd with dynamic shapes."""
    q = torch.randn(2, 5, 4, 16).transpose(1, 2)
    k = torch.randn(2, 4 // shared, 16, 6).mT
    call = (q, k, k.clone(), torch.tensor(Z), torch.rand(5, 6) < 0.8, None, 0.25, False, 0.0)
    op = torch.ops.l0kernels
    opcheck(op.gated_attention.default, (*call, "triton"))
    saved = op.gated_attention(*call, "triton")
    for needs in ([True] * 4, [False, True, False, True]):
        rest = (saved, [False], needs, [], "triton")
        opcheck(op.gated_attention_backward.default, (torch.randn_like(q), *call, *rest))


def test_operators_believe_no_sizes():
    op = torch.ops.l0kernels.gated_attention
    q, k = torch.randn(1, 4, 3, 16, device=DEVICE), torch.randn(1, 2, 5, 16, device=DEVICE)
    z, mask, seed = (
        torch.ones(4, device=DEVICE),
        torch.zeros(3, 5, device=DEVICE),
        torch.zeros(1, device=DEVICE),
    )

    def call(q=q, k=k, v=k, z=z, mask=mask, seed=None, dropout=0.0):
        return op(q, k, v, z, mask, seed, 0.25, False, dropout, "triton")

    assert call()[0].shape == q.shape
    for wrong in (
        {"q": q[0]}, {"k": k[:, :1].expand(1, 3, 5, 16)}, {"v": k[:, :, :4]}, {"v": k[..., :8]},
        {"z": torch.ones(3, device=DEVICE)}, {"mask": torch.zeros(4, 5, device=DEVICE)}, {"dropout": 0.5},
        {"seed": seed, "dropout": 0.5},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            call(**wrong)
    with pytest.raises(TypeError, match="v must have the dtype of q"):
        call(v=k.half())
