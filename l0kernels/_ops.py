"""Operators of torch.library: what each computes, its fake, and the way to the backend that is named last.

_operator.py says how they are called; a gradient that is not wanted comes back as a tensor of size 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from ._calls import (
    AttentionCall,
    BlockCall,
    Conv2dCall,
    DrawnMlpCall,
    L0LinearCall,
    L0MlpCall,
    LinearCall,
    MlpCall,
    ProxCall,
    Wanted,
)
from ._checks import check_broadcastable
from ._compat import VMAP_MODE, dispatch_key_included
from ._gates import HardConcrete, round_up
from ._operator import LIBRARY, operator
from .impl import conv2d, module
from .impl.memory import vector
from .impl.packed import Term


def refuse_second_derivative(function: str) -> None:
    """RuntimeError in a backward that autograd records: the operators would enter it as constants."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND.format(f"l0kernels.{function}", "create_graph=True"))
    refuse_batched(function)


def refuse_batched(function: str) -> None:
    """RuntimeError in a backward of several gradients at once, of which the operators know nothing."""
    if dispatch_key_included(VMAP_MODE):
        raise RuntimeError(
            f"l0kernels.{function} takes one gradient at a time, got is_grads_batched=True or "
            "vectorize=True; torch.func.jacrev and torch.func.vmap batch them"
        )


NO_SECOND = '{} has no second derivative, got {}; use_backend("reference") has one'


def _given(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if g is None else g for g in grads]


def _fake_grads(tensors: Sequence[Tensor | None], wanted: Wanted, like: Tensor) -> list[Tensor]:
    """Contiguous gradients of those that are wanted."""
    pairs = zip(tensors, wanted.needs, strict=True)
    return _given([t.new_empty(t.shape) if n and t is not None else None for t, n in pairs], like)


def _fake_sample(log_alpha: Sequence[Tensor], seed: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = log_alpha[0]
    sizes = [a.shape[0] for a in log_alpha]
    return (
        first.new_empty(sum(sizes)),
        first.new_empty(sum(map(round_up, sizes)), dtype=torch.int32),
        first.new_empty(2 * len(sizes), dtype=torch.int32),
    )


@operator(_fake_sample)
def sample(
    log_alpha: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return module(backend).sample(log_alpha, seed, rank, dist)


@operator(
    lambda log_alpha, seed, *_: (*_fake_sample(log_alpha, seed), log_alpha[0].new_empty(len(log_alpha)))
)
def sample_expected(
    log_alpha: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, index and count as of ``sample``, and sum_g p_open_g of every vector from the same pass."""
    expected = log_alpha[0].new_empty(len(log_alpha))
    z, index, count = module(backend).sample(log_alpha, seed, rank, dist, expected)
    return z, index, count, expected


@operator(lambda dz, z, *_: z.new_empty(z.shape))
def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete, backend: str) -> Tensor:
    return module(backend).gate_grad(dz, z, dist)


def _fake_penalty(log_alpha: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    first = log_alpha[0]
    return first.new_empty(()), first.new_empty(sum(a.numel() for a in log_alpha))


@operator(_fake_penalty)
def l0_penalty(
    log_alpha: list[Tensor], weights: list[float], dist: HardConcrete, backend: str
) -> tuple[Tensor, Tensor]:
    _check_weights(weights, log_alpha)
    return module(backend).l0_penalty(log_alpha, weights, dist)


@operator(_fake_penalty)
def weighted_penalty(
    log_alpha: list[Tensor], weights: Tensor, dist: HardConcrete, backend: str
) -> tuple[Tensor, Tensor]:
    """``l0_penalty`` with a tensor of weights: a compiled graph has no guard on their values."""
    if weights.device.type == "cpu":
        vector(weights, "weights", weights.dtype, len(log_alpha))
        return module(backend).l0_penalty(log_alpha, weights.tolist(), dist)
    # On a GPU the weights stay there.
    flat = torch.cat([a.flatten() for a in log_alpha])
    each = zip(weights.to(flat.dtype).unbind(), log_alpha, strict=True)
    spread = torch.cat([weight.expand(a.numel()) for weight, a in each])
    p_open = dist.p_open(flat)
    return (spread * p_open).sum(), spread * p_open * (1 - p_open)


def _check_weights(weights: list[float], log_alpha: list[Tensor]) -> None:
    """ValueError unless every vector has its weight: kernels read as many as there are vectors."""
    if not log_alpha or len(weights) != len(log_alpha):
        raise ValueError(
            f"weights must be one per gate vector, {len(log_alpha)} of 1 or more, got {len(weights)}"
        )


def _terms(thetas: list[Tensor], layout: list[int]) -> list[Term]:
    """``layout`` holds what follows the weight, term by term."""
    return [*zip(thetas, layout[::3], layout[1::3], layout[2::3], strict=True)]


def _fake_coupled_penalty(thetas: list[Tensor], gates: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(thetas[0].dtype, torch.float32)
    sizes = (), sum(a.numel() for a in gates)
    total, grad = (thetas[0].new_empty(size, dtype=dtype) for size in sizes)
    return total, grad


@operator(_fake_coupled_penalty)
def coupled_penalty(
    thetas: list[Tensor],
    gates: list[Tensor],
    weights: list[float],
    layout: list[int],
    decay: float,
    dist: HardConcrete,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``l0_penalty`` of the gates plus the L2 terms, and its gradient of the gates, flat."""
    return module(backend).coupled_penalty(_terms(thetas, layout), gates, weights, decay, dist)


@operator(lambda thetas, *_: [torch.empty_like(theta) for theta in thetas])
def coupled_penalty_grad(
    thetas: list[Tensor],
    gates: list[Tensor],
    layout: list[int],
    factor: Tensor,
    decay: float,
    dist: HardConcrete,
    backend: str,
) -> list[Tensor]:
    """factor times the gradient of every theta: dense, for closed weights decay too."""
    return module(backend).coupled_penalty_grad(_terms(thetas, layout), gates, factor, decay, dist)


def _fake_linear(call: LinearCall, backend: str) -> list[Tensor]:
    x, weight = call.x, call.weight
    shapes = [(x.shape[0], weight.shape[0]), *module(backend).linear_saved_shapes(call)]
    return [x.new_empty(shape, dtype=call.dtype) for shape in shapes]


@operator(_fake_linear)
def gated_linear(call: LinearCall, backend: str) -> list[Tensor]:
    """y, and what backward takes over."""
    y, saved = module(backend).linear_forward(call)
    return [y, *saved]


def _fake_l0_linear(call: L0LinearCall, backend: str) -> list[Tensor]:
    given = [a for a in (call.in_log_alpha, call.out_log_alpha) if a is not None]
    y = call.x.new_empty(call.x.shape[0], call.weight.shape[0], dtype=call.dtype)
    return [y, *_fake_sample(given, call.seed)]


@operator(_fake_l0_linear)
def l0_linear(call: L0LinearCall, backend: str) -> list[Tensor]:
    """y, and z, index and count as of ``sample``, drawn on the way."""
    return [*module(backend).l0_linear_forward(call)]


def _fake_linear_backward(
    dy: Tensor, call: LinearCall | Conv2dCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    z = [None if gate is None else gate[0] for gate in (call.in_gate, call.out_gate)]
    return _fake_grads([call.x, call.weight, call.bias, *z], wanted, call.x)


@operator(_fake_linear_backward)
def gated_linear_backward(
    dy: Tensor, call: LinearCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    """Gradients of x, weight, bias and the two gates."""
    return _given(module(backend).linear_backward(call, dy, saved, wanted), call.x)


def _fake_mlp(call: MlpCall, backend: str) -> list[Tensor]:
    shapes = [(call.x.shape[0], call.weights[-1].shape[0]), *module(backend).mlp_saved_shapes(call)]
    return [call.x.new_empty(shape, dtype=call.dtype) for shape in shapes]


@operator(_fake_mlp)
def gated_mlp(call: MlpCall, backend: str) -> list[Tensor]:
    """y, and what backward takes over."""
    y, saved = module(backend).mlp_forward(call)
    return [y, *saved]


def _fake_l0_mlp(call: L0MlpCall, backend: str) -> list[Tensor]:
    x, weights, biases, log_alphas, activation, seed, _, dtype = call
    ungated = MlpCall(x, weights, biases, [None] * len(weights), activation, dtype, False)
    given = [a for a in log_alphas if a is not None]
    return [*_fake_sample(given, seed), *_fake_mlp(ungated, backend)]


@operator(_fake_l0_mlp)
def l0_mlp(call: L0MlpCall, backend: str) -> list[Tensor]:
    """z, index and count as of ``sample``, drawn on the way, then what gated_mlp returns."""
    y, saved, gates = module(backend).l0_mlp_forward(call)
    return [*gates, y, *saved]


def _fake_mlp_backward(
    dy: Tensor, call: MlpCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    z = [None if gate is None else gate[0] for gate in call.gates]
    return _fake_grads([call.x, *call.weights, *call.biases, *z], wanted, call.x)


@operator(_fake_mlp_backward)
def gated_mlp_backward(
    dy: Tensor, call: MlpCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    """Gradients of x, then of all weights, biases and gates."""
    return _given(module(backend).mlp_backward(call, dy, saved, wanted), call.x)


def _fake_l0_mlp_backward(
    dy: Tensor, call: DrawnMlpCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    pairs = zip(call.weights, call.gated, strict=True)
    z = [call.z.new_empty(w.shape[1]) if has_gate else None for w, has_gate in pairs]
    return _fake_grads([call.x, *call.weights, *call.biases, *z], wanted, call.x)


@operator(_fake_l0_mlp_backward)
def l0_mlp_backward(
    dy: Tensor, call: DrawnMlpCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    """Gradients of x, then of all weights, biases and log_alphas, from what l0_mlp returned."""
    return _given(module(backend).l0_mlp_backward(call, dy, saved, wanted), call.x)


@operator(lambda weight, *_: weight.new_empty(weight.shape))
def masked_weight(
    weight: Tensor, log_alpha: Tensor, seed: Tensor, dist: HardConcrete, backend: str
) -> Tensor:
    return module(backend).masked_weight(weight, log_alpha, seed, dist).contiguous()


@operator(
    lambda grad, weight, log_alpha, seed, dist, need_w, need_log_alpha, backend: (
        weight.new_empty(weight.shape if need_w else 0),
        log_alpha.new_empty(log_alpha.shape if need_log_alpha else 0),
    )
)
def masked_weight_grad(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor,
    dist: HardConcrete,
    need_w: bool,
    need_log_alpha: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dw, dlog_alpha = module(backend).masked_weight_grad(
        grad, weight, log_alpha, seed, dist, need_w, need_log_alpha
    )
    return (
        weight.new_empty(0) if dw is None else dw.contiguous(),
        log_alpha.new_empty(0) if dlog_alpha is None else dlog_alpha.contiguous(),
    )


def _in_blocks(call: BlockCall) -> BlockCall:
    """With b_out and b_in cropped to the weight: backends spread z over whole blocks.

    Raises:
        ValueError: a block that is not positive, or z is not one per block.
    """
    b_out, b_in, z = call.b_out, call.b_in, call.z
    if b_out < 1 or b_in < 1:
        raise ValueError(f"b_out and b_in must be positive, got {b_out} and {b_in}")
    n_out, n_in = call.weight.shape
    shape = (-(-n_out // b_out), -(-n_in // b_in))
    if z.shape != shape:
        raise ValueError(f"z must have shape {shape}, one per block, got {tuple(z.shape)}")
    return call._replace(b_out=min(b_out, n_out or 1), b_in=min(b_in, n_in or 1))


@operator(lambda call, _: call.x.new_empty(call.x.shape[0], call.weight.shape[0], dtype=call.dtype))
def block_linear(call: BlockCall, backend: str) -> Tensor:
    return module(backend).block_linear_forward(_in_blocks(call))


@operator(lambda dy, call, wanted, _: _fake_grads(call[:4], wanted, call.x))
def block_linear_backward(dy: Tensor, call: BlockCall, wanted: Wanted, backend: str) -> list[Tensor]:
    dx, dw, db, dz = module(backend).block_linear_backward(_in_blocks(call), dy, wanted)
    bias = call.bias
    return _given([dx, dw, None if db is None or bias is None else db.to(bias.dtype), dz], call.x)


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=fmt)


def _fake_conv2d(call: Conv2dCall, backend: str) -> list[Tensor]:
    x, shapes = call.x, module(backend).conv2d_saved_shapes(call)
    shape = conv2d.output_shape(x, call.weight, call.conv)
    y = _empty(x, shape, call.dtype, module(backend).conv2d_memory_format(x, call.weight))
    return [y, *(x.new_empty(s, dtype=call.dtype) for s in shapes)]


@operator(_fake_conv2d)
def gated_conv2d(call: Conv2dCall, backend: str) -> list[Tensor]:
    """y, and what backward takes over."""
    y, saved = module(backend).conv2d_forward(call)
    return [y, *saved]


def _fake_conv2d_backward(
    dy: Tensor, call: Conv2dCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    x, grads = call.x, _fake_linear_backward(dy, call, saved, wanted, backend)
    if wanted.needs[0]:
        grads[0] = _empty(x, x.shape, x.dtype, module(backend).conv2d_memory_format(x, call.weight))
    return grads


@operator(_fake_conv2d_backward)
def gated_conv2d_backward(
    dy: Tensor, call: Conv2dCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    """Gradients of x, weight, bias and the two gates."""
    return _given(module(backend).conv2d_backward(call, dy, saved, wanted), call.x)


def _checked_attention(call: AttentionCall) -> AttentionCall:
    """Kernels believe these sizes.

    Raises:
        ValueError: k, v, z, mask or seed does not fit q.
    """
    q, k, v, z, mask, seed = call[:6]
    if q.ndim != 4 or k.ndim != 4 or q.shape[1] % max(k.shape[1], 1) or (q.shape[1] and not k.shape[1]):
        raise ValueError(
            f"q and k must have shapes (B, shared * H, L, D) and (B, H, S, D), got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    if k.shape != (q.shape[0], k.shape[1], k.shape[2], q.shape[3]) or v.shape != k.shape:
        raise ValueError(
            f"k and v must have one shape, of q's batch and last dimension, got {tuple(k.shape)} and "
            f"{tuple(v.shape)} for q of {tuple(q.shape)}"
        )
    if z is not None and (z.ndim != 1 or len(z) not in (q.shape[1], k.shape[1])):
        raise ValueError(f"z must be one per head of q or of k, got {tuple(z.shape)}")
    if mask is not None:
        check_broadcastable("mask", mask, (*q.shape[:3], k.shape[2]))
    if call.dropout > 0 and (seed is None or seed.shape != (1,) or seed.dtype != torch.int64):
        raise ValueError("seed must be (1,) int64 where there is dropout")
    for name, t in (("k", k), ("v", v), ("z", z), ("mask", mask), ("seed", seed)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, the device of q, got {t.device}")
        if name in "kv" and t is not None and t.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")
    return call


def _in_one_piece(t: Tensor) -> Tensor:
    """t as attention takes it: a row of a head lies in one piece."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _fake_attention(call: AttentionCall, backend: str) -> list[Tensor]:
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    return [torch.empty_like(_in_one_piece(call.q)), lse]


@operator(_fake_attention)
def gated_attention(call: AttentionCall, backend: str) -> list[Tensor]:
    """y in the memory order of q, and what backward takes over."""
    y, saved = module(backend).attention_forward(_checked_attention(call))
    return [y, *saved]


def _fake_attention_backward(
    dy: Tensor, call: AttentionCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    tensors = [*map(_in_one_piece, call[:3]), call.z]
    pairs = zip(tensors, wanted.needs, strict=True)
    return _given([torch.empty_like(t) if n and t is not None else None for t, n in pairs], call.q)


@operator(_fake_attention_backward)
def gated_attention_backward(
    dy: Tensor, call: AttentionCall, saved: list[Tensor], wanted: Wanted, backend: str
) -> list[Tensor]:
    """Gradients of q, k and v, in the memory order of each, and of the gates; ``saved``: y and the rest."""
    call = _checked_attention(call)
    if dy.shape != call.q.shape:
        raise ValueError(f"dy must have the shape of q, {tuple(call.q.shape)}, got {tuple(dy.shape)}")
    return _given(module(backend).attention_backward(call, dy, saved, wanted), call.q)


@operator(lambda call, _: torch.empty_like(call.x))
def prox(call: ProxCall, backend: str) -> Tensor:
    y = torch.empty_like(call.x)
    module(backend).prox([call], [y])
    return y


@operator(torch.empty_like)
def copied_seed(seed: Tensor) -> Tensor:
    return seed.clone()


def _kept_seed(seed: Tensor) -> Tensor:
    """copied_seed, told to AOTAutograd to be saved for backward."""
    meta = torch.fx.traceback.current_meta
    before = meta.get("recompute")
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        return copied_seed(seed)
    finally:
        if before is None:
            del meta["recompute"]
        else:
            meta["recompute"] = before


LIBRARY.define("kept_seed(Tensor seed) -> Tensor")
LIBRARY.impl("kept_seed", _kept_seed, "CompositeImplicitAutograd")
_KEPT_SEED = torch.ops.l0kernels.kept_seed.default


def kept_seed(seed: Tensor) -> Tensor:
    """The seed of a draw. In a compiled graph it goes from forward to backward through an opaque operator.

    Left to themselves, compilers may compute it again in backward, from a generator or a counted step that
    has moved on since: then backward would have other gates, silently.
    """
    return _KEPT_SEED(seed) if torch.compiler.is_compiling() else seed
