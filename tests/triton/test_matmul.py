"""The product with device extents: every layout, epilogue and form, packed and plain, against plain torch."""

import pytest
import torch

from l0kernels.triton_kernels.matmul import Config, Epilogue, Halves, Operand, matmul
from triton_device import DEVICE, INTERPRETED
from triton_gates import bury, dig, make_gate

TILE = Config(32, 64, 32, 4, 2, 2)
KEEPS = (0.0, 0.3, 1.0)


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def close(value, truth, terms):
    """fp32 operands multiplied in tf32 on a GPU: 2^-11 a term; the interpreter multiplies in fp32."""
    unit = 2.0**-23 if INTERPRETED else 2.0**-11
    if truth.numel() == 0:
        return
    torch.testing.assert_close(
        value, truth, rtol=0, atol=8 * unit * terms**0.5 * max(1.0, truth.abs().max().item())
    )


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["packed", "plain"])
def plain(request):
    return request.param == "plain"


@pytest.fixture(params=["tma", "pointers"])
def pointers(request):
    return request.param == "pointers"


def buffer(rows, columns):
    return torch.full((rows, -(-columns // 128) * 128), float("nan"), device=DEVICE)


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
def test_hidden_layer_and_its_gradients(keep, activation, plain, pointers):
    """A gated hidden layer from end to end: act, grad, scatter and every extent."""
    M, N, K, D = 37, 200, 72, 42
    x, w, b, gate = draw(M, K), draw(N, K), draw(N), make_gate(N, keep, plain)
    options = {"config": TILE, "pointers": pointers}
    h, slope = buffer(M, N), buffer(M, N)
    saves = activation in ("gelu", "silu")
    matmul(
        "nt", Operand(x), Operand(w, bury(w, gate, None)), Operand(None, h), (M, N, K), n_gate=gate,
        epilogue=Epilogue("act", activation, b, scale_n=True, saved=slope if saves else None), **options,
    )  # fmt: skip
    act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "relu": torch.relu}.get(
        activation
    )
    a, z = (x @ w.T + b).requires_grad_(), gate[0].clone().requires_grad_()
    hidden = (act(a) if act else a) * z
    close(dig(h, None, gate, (M, N)), hidden.detach(), K)
    _, n_open, extent = extents(gate, N)
    assert not h[:, n_open:extent].any()

    dy, w2 = draw(M, D + 6)[:, :D], draw(D, N + 4)[:, :N]
    hidden.backward(dy @ w2)
    da, partial = buffer(M, N), torch.full((2, -(-M // 32), 256), float("nan"), device=DEVICE)
    after = Epilogue(
        "grad", activation, scale_n=True, saved=slope if saves else None, hidden=Operand(None, h),
        partial=partial, dz=True, db=True,
    )  # fmt: skip
    matmul(
        "nn", Operand(dy), Operand(w2, bury(w2, None, gate)), Operand(None, da), (M, N, D), n_gate=gate,
        epilogue=after, **options,
    )  # fmt: skip
    close(dig(da, None, gate, (M, N)), a.grad, D)
    is_open = gate[0] != 0
    dz = dig(partial[0].sum(0)[None], None, gate, (1, N))[0] / gate[0]
    close(dz[is_open & (gate[0] > 0.05)], z.grad[is_open & (gate[0] > 0.05)], 20 * M * D)
    close(dig(partial[1].sum(0)[None], None, gate, (1, N))[0], a.grad.sum(0), M * D)

    dw2 = buffer(D, N)
    matmul("tn", Operand(dy), Operand(None, h), Operand(None, dw2), (D, N, M), n_gate=gate, **options)
    close(dig(dw2, None, gate, (D, N)), dy.T @ hidden.detach(), M * 4)
    dw1 = torch.full((N, K), float("nan"), device=DEVICE)
    after = Epilogue(scatter=True)
    matmul(
        "tn", Operand(None, da), Operand(x), Operand(dw1), (N, K, M), m_gate=gate, epilogue=after, **options
    )
    close(dw1, a.grad.T @ x, M * 4)
    assert not dw1[~is_open].any()
    dx = torch.full((M, K), float("nan"), device=DEVICE)
    matmul(
        "nn",
        Operand(None, da),
        Operand(w, bury(w, gate, None)),
        Operand(dx),
        (M, K, N),
        k_gate=gate,
        **options,
    )
    close(dx, a.grad @ w, N * 4)
    y = torch.full((M, D), float("nan"), device=DEVICE)
    matmul(
        "nt",
        Operand(None, h),
        Operand(w2, bury(w2, None, gate)),
        Operand(y),
        (M, D, N),
        k_gate=gate,
        **options,
    )
    close(y, hidden.detach() @ w2.T, N * 4)


def extents(gate, size):
    n_open, extent = gate[2].tolist()
    plain = extent >= size
    return plain, size if plain else n_open, -(-size // 128) * 128 if plain else extent


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_product_and_its_gradients(keep, activation, plain, pointers):
    """h = z act(gate half) up half, and the gradients of both halves in one product."""
    M, N, K, D = 40, 200, 72, 48
    x, w, b, gate = draw(M, K), draw(2 * N, K), draw(2 * N), make_gate(N, keep, plain)
    options = {"config": Config(32, 32, 32, 4, 2, 1), "pointers": pointers}
    cap = 256
    packed = torch.cat([bury(w[:N], gate, None), bury(w[N:], gate, None)])
    h, factors = buffer(M, N), buffer(M, 2 * cap)
    matmul(
        "nt", Operand(x), Operand(w, packed), Operand(None, h), (M, N, K), n_gate=gate,
        epilogue=Epilogue("glu", activation, b, scale_n=True, saved=factors),
        halves=Halves(b=(N, cap), saved=cap), **options,
    )  # fmt: skip
    act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    a, z = (x @ w.T + b).requires_grad_(), gate[0].clone().requires_grad_()
    hidden = act(a[:, :N]) * a[:, N:] * z
    close(dig(h, None, gate, (M, N)), hidden.detach(), 4 * K)

    dy, w2 = draw(M, D), draw(D, N)
    hidden.backward(dy @ w2)
    da, partial = buffer(M, 2 * cap), torch.full((3, -(-M // 32), cap), float("nan"), device=DEVICE)
    after = Epilogue(
        "glu_grad", activation, scale_n=True, saved=factors, hidden=Operand(None, h), partial=partial,
        dz=True, db=True,
    )  # fmt: skip
    matmul(
        "nn", Operand(dy), Operand(w2, bury(w2, None, gate)), Operand(None, da), (M, N, D), n_gate=gate,
        epilogue=after, halves=Halves(c=cap, saved=cap), **options,
    )  # fmt: skip
    for half in range(2):
        truth = a.grad[:, half * N : (half + 1) * N]
        close(dig(da[:, half * cap : (half + 1) * cap], None, gate, (M, N)), truth, 4 * D)
        close(dig(partial[1 + half].sum(0)[None], None, gate, (1, N))[0], truth.sum(0), 16 * M * D)
    dx = torch.full((M, K), float("nan"), device=DEVICE)
    matmul(
        "nn", Operand(None, da), Operand(w, packed), Operand(dx), (M, K, N), k_gate=gate,
        halves=Halves(2, (0, cap), (N, cap)), **options,
    )  # fmt: skip
    close(dx, a.grad @ w, 16 * N)


@pytest.mark.covering(2)
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_natural_or_packed_result_is_decided_on_the_device(keep, scale, plain, pointers):
    M, N, K = 33, 264, 40
    x, w, gate = draw(M, K), draw(N, K), make_gate(N, keep, plain)
    y, packed = torch.full((M, N), float("nan"), device=DEVICE), buffer(M, N)
    matmul(
        "nt", Operand(x), Operand(w, bury(w, gate, None)), Operand(y, packed), (M, N, K), n_gate=gate,
        epilogue=Epilogue(scale_n=scale), config=TILE, pointers=pointers,
    )  # fmt: skip
    is_plain, _, _ = extents(gate, N)
    truth = x @ w.T * gate[0] if scale else x @ w.T * (1.0 if is_plain else gate[0] != 0)
    close(y if is_plain else dig(packed, None, gate, (M, N)), truth, 4 * K)
    assert (packed if is_plain else y).isnan().all()


@pytest.mark.parametrize("size", [(1, 1, 1), (0, 5, 5), (5, 0, 5), (5, 5, 0), (129, 67, 33)])
def test_sizes(size, pointers):
    M, N, K = size
    x, w, b = draw(M, K), draw(N, K), draw(N)
    y = torch.full((M, N), float("nan"), device=DEVICE)
    after = Epilogue(bias=b)
    matmul("nt", Operand(x), Operand(w), Operand(y), size, epilogue=after, config=TILE, pointers=pointers)
    close(y, x @ w.T + b, max(K, 1) * 4)


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep", KEEPS)
def test_rows_are_scaled_and_scattered(keep, plain, pointers):
    M, N, K = 150, 70, 40
    a, b, gate = draw(K, M), draw(K, N), make_gate(M, keep, plain)
    packed = bury(a, None, gate)
    c = torch.full((M, N), float("nan"), device=DEVICE)
    matmul(
        "tn", Operand(a, packed), Operand(b), Operand(c), (M, N, K), m_gate=gate,
        epilogue=Epilogue(scatter=True, scale_m=True), config=TILE, pointers=pointers,
    )  # fmt: skip
    close(c, (a.T @ b) * gate[0][:, None], 4 * K)
    assert not c[gate[0] == 0].any()
