"""Operators of torch.library: schemas, fakes, and the way to the backend that the last argument names.

They are opaque and not differentiable; the autograd.Functions beside the public functions are. A gate is []
or [z, index, count]; a gradient that is not wanted comes back as a tensor of size 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from ._checks import PLAIN, check_tensor
from ._compat import VMAP_MODE, count_modes, dispatch_key_included, functorch_active, operator_names
from ._flops import tell_counters
from ._gates import HardConcrete, round_up
from .impl import conv2d, module
from .impl.memory import NotPlain, check_not_freed, plain, vector
from .impl.packed import Term

_LIBRARY = torch.library.Library("l0kernels", "DEF")
_PLAIN_OR_NONE = (*PLAIN, type(None))
# In part at least on every backend of the CPU.
_MADE_OF_TORCH = ("gated_conv2d", "gated_conv2d_backward", "coupled_penalty", "coupled_penalty_grad")


def _define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated implementation as operator l0kernels::NAME and returns how to call it."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]

        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        operator = getattr(torch.ops.l0kernels, name).default
        kinds = [str(p.type) for p in operator._schema.arguments]
        names = [p.name for p in operator._schema.arguments]
        singles = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
        lists = [i for i, kind in enumerate(kinds) if kind in ("List[Tensor]", "List[Optional[Tensor]]")]

        def opaque(*args: Any) -> Any:
            backend = args[-1] if names[-1] == "backend" else "torch"
            if backend == "torch" or (backend == "cpp" and name in _MADE_OF_TORCH):
                for i in singles:
                    check_not_freed(args[i], names[i])
                for i in lists:
                    for t in args[i]:
                        check_not_freed(t, names[i])
            # Autograd falls through: a backend made of torch's operations must not record a graph of its own.
            if not torch.is_grad_enabled() or (backend == "cpp" and name not in _MADE_OF_TORCH):
                return implementation(*args)
            with torch.no_grad():
                return implementation(*args)

        _LIBRARY.impl(name, opaque, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"l0kernels::{name}", fake, lib=_LIBRARY)
        first_is_list = 0 in lists

        def is_plain(args: tuple[Any, ...]) -> bool:
            for i in singles:
                if type(args[i]) not in _PLAIN_OR_NONE:
                    return False
            for i in lists:
                for t in args[i]:
                    if type(t) not in _PLAIN_OR_NONE:
                        return False
            return True

        def refuse_sparse(args: tuple[Any, ...]) -> None:
            for i in (*singles, *lists):
                for t in (args[i],) if i in singles else args[i]:
                    if t is not None and t.layout is not torch.strided:
                        check_tensor(f"{names[i]} of l0kernels.{name}", t)

        def call(*args: Any) -> Any:
            # The dispatcher costs 6 to 10 us, as much as a small layer; eager tensors do without,
            # unless a mode (make_fx, say) wants to see the operators.
            if torch.compiler.is_compiling():
                return operator(*args)
            if count_modes():
                tell_counters()
                return operator(*args)
            if functorch_active():
                register_batching()
                return operator(*args)
            # Of cpp, which asks for every address, type and all, only the place matters here.
            first = args[0][0] if first_is_list else args[0]
            native = names[-1] == "backend" and args[-1] == "cpp" and name not in _MADE_OF_TORCH
            if (first.is_cpu or first.is_cuda) and (native or is_plain(args)):
                try:
                    return opaque(*args)
                except NotPlain:  # negated views are made plain here, a transform's tensors by the dispatcher
                    refuse_sparse(args)
                    args = tuple(map(_made_plain, args))
                except RuntimeError:  # torch's words, where a fast way has looked at sizes alone
                    refuse_sparse(args)
                    raise
            for i in (*singles, *lists):
                for t in (args[i],) if i in singles else args[i]:
                    if is_dtensor(t):
                        raise TypeError(
                            f"{names[i]} of l0kernels.{name} must be a plain tensor, got a "
                            "DTensor: give its full_tensor() or to_local(), or shard the module as "
                            "l0kernels.nn documents"
                        )
            return operator(*args)

        return call

    return register


def _made_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return plain(value)
    return [_made_plain(item) for item in value] if isinstance(value, list | tuple) else value


def is_dtensor(t: Any) -> bool:
    """Whether t is a DTensor, without importing what most programs never need."""
    kind = type(t)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


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


_dist = functools.lru_cache(HardConcrete)


def _gate(tensors: list[Tensor]) -> list[Tensor] | None:
    return tensors or None


def _given(grads: list[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if g is None else g for g in grads]


def _fake_sample(log_alpha: list[Tensor], seed: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = log_alpha[0]
    sizes = [a.shape[0] for a in log_alpha]
    return (
        first.new_empty(sum(sizes)),
        first.new_empty(sum(map(round_up, sizes)), dtype=torch.int32),
        first.new_empty(2 * len(sizes), dtype=torch.int32),
    )


@_define(
    "sample(Tensor[] log_alpha, Tensor seed, int rank, float beta, float gamma, float zeta, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_sample,
)
def sample(
    log_alpha: list[Tensor], seed: Tensor, rank: int, beta: float, gamma: float, zeta: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return module(backend).sample(log_alpha, seed, rank, _dist(beta, gamma, zeta))


@_define(
    "sample_expected(Tensor[] log_alpha, Tensor seed, int rank, float beta, float gamma, float zeta,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda log_alpha, seed, *_: (*_fake_sample(log_alpha, seed), log_alpha[0].new_empty(len(log_alpha))),
)
def sample_expected(
    log_alpha: list[Tensor], seed: Tensor, rank: int, beta: float, gamma: float, zeta: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, index and count as of ``sample``, and sum_g p_open_g of every vector from the same pass."""
    expected = log_alpha[0].new_empty(len(log_alpha))
    drawn = module(backend).sample(log_alpha, seed, rank, _dist(beta, gamma, zeta), expected)
    return *drawn, expected


@_define(
    "gate_grad(Tensor dz, Tensor z, float beta, float gamma, float zeta, str backend) -> Tensor",
    lambda dz, z, *_: z.new_empty(z.shape),
)
def gate_grad(dz: Tensor, z: Tensor, beta: float, gamma: float, zeta: float, backend: str) -> Tensor:
    return module(backend).gate_grad(dz, z, _dist(beta, gamma, zeta))


@_define(
    "l0_penalty(Tensor[] log_alpha, float[] weights, float beta, float gamma, float zeta, str backend)"
    " -> (Tensor, Tensor)",
    lambda log_alpha, *_: (
        log_alpha[0].new_empty(()),
        log_alpha[0].new_empty(sum(a.numel() for a in log_alpha)),
    ),
)
def l0_penalty(
    log_alpha: list[Tensor], weights: list[float], beta: float, gamma: float, zeta: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_weights(weights, log_alpha)
    return module(backend).l0_penalty(log_alpha, weights, _dist(beta, gamma, zeta))


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


@_define(
    "coupled_penalty(Tensor[] thetas, Tensor[] gates, float[] weights, int[] layout, float decay,"
    " float[] dist, str backend) -> (Tensor, Tensor)",
    _fake_coupled_penalty,
)
def coupled_penalty(
    thetas: list[Tensor],
    gates: list[Tensor],
    weights: list[float],
    layout: list[int],
    decay: float,
    dist: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``l0_penalty`` of the gates plus the L2 terms, and its gradient of the gates, flat."""
    return module(backend).coupled_penalty(_terms(thetas, layout), gates, weights, decay, _dist(*dist))


@_define(
    "coupled_penalty_grad(Tensor[] thetas, Tensor[] gates, int[] layout, Tensor factor, float decay,"
    " float[] dist, str backend) -> Tensor[]",
    lambda thetas, *_: [torch.empty_like(theta) for theta in thetas],
)
def coupled_penalty_grad(
    thetas: list[Tensor],
    gates: list[Tensor],
    layout: list[int],
    factor: Tensor,
    decay: float,
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    """factor times the gradient of every theta: dense, for closed weights decay too."""
    terms = _terms(thetas, layout)
    return module(backend).coupled_penalty_grad(terms, gates, factor, decay, _dist(*dist))


def _fake_gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    scale_out: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    shapes = [(x.shape[0], weight.shape[0])]
    if backend == "triton":
        shapes += module(backend).linear_saved_shapes(x, weight, bool(in_gate), bool(out_gate), dtype)
    return [x.new_empty(shape, dtype=dtype) for shape in shapes]


@_define(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] in_gate, Tensor[] out_gate, bool scale_out,"
    " ScalarType dtype, str backend) -> Tensor[]",
    _fake_gated_linear,
)
def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    scale_out: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """y, and what backward takes over."""
    y = module(backend).linear_forward(x, weight, bias, _gate(in_gate), _gate(out_gate), scale_out, dtype)
    return [y[0], *y[1]] if backend == "triton" else [y]


def _fake_l0_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    seed: Tensor,
    dist: list[float],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    given = [a for a in (in_log_alpha, out_log_alpha) if a is not None]
    return [x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), *_fake_sample(given, seed)]


@_define(
    "l0_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? in_log_alpha, Tensor? out_log_alpha,"
    " Tensor seed, float[] dist, ScalarType dtype, str backend) -> Tensor[]",
    _fake_l0_linear,
)
def l0_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    seed: Tensor,
    dist: list[float],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """y, and z, index and count as of ``sample``, drawn on the way."""
    args = (x, weight, bias, in_log_alpha, out_log_alpha, seed)
    return [*module(backend).l0_linear_forward(*args, 0, _dist(*dist), dtype)]


def draws_within(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    log_alphas: Sequence[Tensor],
    dtype: torch.dtype,
    backend: str,
    activation: str = "identity",
) -> bool:
    """Whether the backend has l0_linear, for several layers l0_mlp, for these tensors."""
    if backend == "cuda":  # its kernels draw in the type that they multiply by
        return dtype != torch.float64 and all(a.dtype == torch.float32 for a in log_alphas)
    if backend == "cpp":
        return module(backend).draws_within([x, *weights, *biases, *log_alphas], dtype, activation)
    if backend == "triton" and len(weights) == 1:
        return module(backend).draws_within(x, *weights, log_alphas, dtype)
    return False


def _fake_gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    saved: list[Tensor],
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dtype: torch.dtype,
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    shapes: list[Tensor | None] = [
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
        in_gate[0].new_empty(in_gate[0].shape) if in_gate else None,
        out_gate[0].new_empty(out_gate[0].shape) if out_gate else None,
    ]
    return _given([s if n else None for s, n in zip(shapes, needs, strict=True)], x)


@_define(
    "gated_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor[] in_gate,"
    " Tensor[] out_gate, Tensor[] saved, bool scale_out, bool full_in, bool full_out, ScalarType dtype,"
    " bool[] needs, float[] dist, str backend) -> Tensor[]",
    _fake_gated_linear_backward,
)
def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    saved: list[Tensor],
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dtype: torch.dtype,
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    """With ``dist`` (beta, gamma, zeta) the gates' gradients are those of log_alpha, else those of z."""
    gates = (_gate(in_gate), _gate(out_gate))
    kept = (saved,) if backend == "triton" else ()
    args = (dy, x, weight, bias, *gates, *kept, scale_out, full_in, full_out, dtype, needs)
    return _given(module(backend).linear_backward(*args, _dist(*dist) if dist else None), x)


def _gates(tensors: list[Tensor | None]) -> list[list[Tensor] | None]:
    """Three entries a layer, all None where it has no gate."""
    triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
    return [None if triple[0] is None else [t for t in triple if t is not None] for triple in triples]


def _fake_gated_mlp(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Tensor | None],
    activation: str,
    dtype: torch.dtype,
    repack: bool,
    backend: str,
) -> list[Tensor]:
    if backend == "triton":
        gated = [gate is not None for gate in gates[::3]]
        shapes = module(backend).saved_shapes(x, weights, gated, activation, dtype, repack)
        shapes.insert(0, (x.shape[0], weights[-1].shape[0]))
        return [x.new_empty(shape, dtype=dtype) for shape in shapes]
    # Rows, not the columns of the next: a gated product keeps both of its arguments.
    hidden = [x.new_empty(x.shape[0], w.shape[0], dtype=dtype) for w in weights[:-1]]
    if _keeps_both(x, weights, biases, activation, dtype, backend):
        hidden += [torch.empty_like(h) for h in hidden]
    return [x.new_empty(x.shape[0], weights[-1].shape[0], dtype=dtype), *hidden]


def _keeps_both(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str,
    dtype: torch.dtype,
    backend: str,
) -> bool:
    """Whether the backend saves both the hidden activations and their arguments."""
    return (
        activation in ("gelu", "silu")
        and backend == "cpp"
        and module(backend)._fused(dtype, x, *weights, *biases)
    )


@_define(
    "gated_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] gates, str activation,"
    " ScalarType dtype, bool repack, str backend) -> Tensor[]",
    _fake_gated_mlp,
)
def gated_mlp(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Tensor | None],
    activation: str,
    dtype: torch.dtype,
    repack: bool,
    backend: str,
) -> list[Tensor]:
    """y, and what backward takes over; with ``repack`` without packed operands, which it then packs again."""
    args = (x, weights, biases, _gates(gates), activation, dtype)
    y, saved = module(backend).mlp_forward(*args, *([repack] if backend == "triton" else []))
    return [y, *saved]


@_define(
    "l0_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] log_alphas, str activation, Tensor seed,"
    " float[] dist, ScalarType dtype, str backend) -> Tensor[]",
    lambda x, weights, biases, log_alphas, activation, seed, dist, dtype, backend: [
        *_fake_sample([a for a in log_alphas if a is not None], seed),
        *_fake_gated_mlp(x, weights, biases, [], activation, dtype, False, backend),
    ],
)
def l0_mlp(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    log_alphas: list[Tensor | None],
    activation: str,
    seed: Tensor,
    dist: list[float],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """z, index and count as of ``sample``, drawn on the way, then what gated_mlp returns."""
    y, saved, gates = module(backend).l0_mlp_forward(
        x, weights, biases, log_alphas, activation, seed, 0, _dist(*dist), dtype
    )
    return [*gates, y, *saved]


def _fake_gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Tensor | None],
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    full: list[bool],
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    inputs = [x, *weights, *biases, *gates[::3]]
    return _given(
        [t.new_empty(t.shape) if n and t is not None else None for t, n in zip(inputs, needs, strict=True)], x
    )


@_define(
    "gated_mlp_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] gates,"
    " Tensor[] saved, str activation, ScalarType dtype, bool[] full, bool[] needs, float[] dist, str backend)"
    " -> Tensor[]",
    _fake_gated_mlp_backward,
)
def gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Tensor | None],
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    full: list[bool],
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    """With ``dist`` (beta, gamma, zeta) the gates' gradients are those of log_alpha, else those of z."""
    args = (dy, x, weights, biases, _gates(gates), saved, activation, dtype, full, needs)
    return _given(module(backend).mlp_backward(*args, _dist(*dist) if dist else None), x)


def _fake_l0_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gated: list[bool],
    z: Tensor,
    index: Tensor,
    count: Tensor,
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    dz = [z.new_empty(w.shape[1]) if has_gate else None for w, has_gate in zip(weights, gated, strict=True)]
    shapes = [*(None if t is None else t.new_empty(t.shape) for t in (x, *weights, *biases)), *dz]
    return _given([t if n else None for t, n in zip(shapes, needs, strict=True)], x)


@_define(
    "l0_mlp_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor?[] biases, bool[] gated, Tensor z,"
    " Tensor index, Tensor count, Tensor[] saved, str activation, ScalarType dtype, bool[] needs,"
    " float[] dist, str backend) -> Tensor[]",
    _fake_l0_mlp_backward,
)
def l0_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gated: list[bool],
    z: Tensor,
    index: Tensor,
    count: Tensor,
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, weights, biases and log_alphas from what l0_mlp returned."""
    args = (dy, x, weights, biases, gated, z, index, count, saved, activation, dtype, needs)
    return _given(module(backend).l0_mlp_backward(*args, _dist(*dist)), x)


@_define(
    "masked_weight(Tensor weight, Tensor log_alpha, Tensor seed, float beta, float gamma, float zeta,"
    " str backend) -> Tensor",
    lambda weight, *_: weight.new_empty(weight.shape),
)
def masked_weight(
    weight: Tensor, log_alpha: Tensor, seed: Tensor, beta: float, gamma: float, zeta: float, backend: str
) -> Tensor:
    dist = _dist(beta, gamma, zeta)
    return module(backend).masked_weight(weight, log_alpha, seed, dist).contiguous()


@_define(
    "masked_weight_grad(Tensor grad, Tensor weight, Tensor log_alpha, Tensor seed, float beta, float gamma,"
    " float zeta, bool need_w, bool need_log_alpha, str backend) -> (Tensor, Tensor)",
    lambda grad, weight, log_alpha, seed, beta, gamma, zeta, need_w, need_log_alpha, backend: (
        weight.new_empty(weight.shape if need_w else 0),
        log_alpha.new_empty(log_alpha.shape if need_log_alpha else 0),
    ),
)
def masked_weight_grad(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor,
    beta: float,
    gamma: float,
    zeta: float,
    need_w: bool,
    need_log_alpha: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dist = _dist(beta, gamma, zeta)
    dw, dlog_alpha = module(backend).masked_weight_grad(
        grad, weight, log_alpha, seed, dist, need_w, need_log_alpha
    )
    return (
        weight.new_empty(0) if dw is None else dw.contiguous(),
        log_alpha.new_empty(0) if dlog_alpha is None else dlog_alpha.contiguous(),
    )


@_define(
    "block_linear(Tensor x, Tensor weight, Tensor? bias, Tensor z, int b_out, int b_in, ScalarType dtype,"
    " str backend) -> Tensor",
    lambda x, weight, bias, z, b_out, b_in, dtype, backend: x.new_empty(
        x.shape[0], weight.shape[0], dtype=dtype
    ),
)
def block_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    b_out: int,
    b_in: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    blocks = _blocks(weight, z, b_out, b_in)
    return module(backend).block_linear_forward(x, weight, bias, z, *blocks, dtype)


def _blocks(weight: Tensor, z: Tensor, b_out: int, b_in: int) -> tuple[int, int]:
    """b_out and b_in, cropped to the weight: backends spread z over whole blocks.

    Raises:
        ValueError: a block that is not positive, or z is not one per block.
    """
    if b_out < 1 or b_in < 1:
        raise ValueError(f"b_out and b_in must be positive, got {b_out} and {b_in}")
    n_out, n_in = weight.shape
    shape = (-(-n_out // b_out), -(-n_in // b_in))
    if z.shape != shape:
        raise ValueError(f"z must have shape {shape}, one per block, got {tuple(z.shape)}")
    return min(b_out, n_out or 1), min(b_in, n_in or 1)


@_define(
    "block_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor z, int b_out, int b_in,"
    " bool full, ScalarType dtype, bool[] needs, str backend) -> Tensor[]",
    lambda dy, x, weight, bias, z, b_out, b_in, full, dtype, needs, backend: _given(
        [
            t.new_empty(t.shape) if n and t is not None else None
            for t, n in zip((x, weight, bias, z), needs, strict=True)
        ],
        x,
    ),
)
def block_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    b_out: int,
    b_in: int,
    full: bool,
    dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    blocks = _blocks(weight, z, b_out, b_in)
    dx, dw, db, dz = module(backend).block_linear_backward(dy, x, weight, z, *blocks, full, dtype, needs)
    return _given([dx, dw, None if db is None or bias is None else db.to(bias.dtype), dz], x)


def _fake_gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    conv = (stride, padding, dilation, groups)
    shape = conv2d.output_shape(x, weight, conv)
    if backend != "triton":
        return [_empty(x, shape, dtype, conv2d.memory_format(x, weight))]
    saved = module(backend).conv2d_saved_shapes(
        tuple(x.shape), tuple(weight.shape), bool(in_gate), bool(out_gate), in_packed, out_packed, conv, dtype
    )
    y = _empty(x, shape, dtype, torch.channels_last)
    return [y, *(x.new_empty(s, dtype=dtype) for s in saved)]


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=fmt)


@_define(
    "gated_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor[] in_gate, Tensor[] out_gate, bool scale_in,"
    " bool scale_out, bool in_packed, bool out_packed, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " int groups, ScalarType dtype, str backend) -> Tensor[]",
    _fake_gated_conv2d,
)
def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """y, and what backward takes over; the flags are those of impl/triton.py."""
    y, saved = module(backend).conv2d_forward(
        x,
        weight,
        bias,
        _gate(in_gate),
        _gate(out_gate),
        scale_in,
        scale_out,
        in_packed,
        out_packed,
        (stride, padding, dilation, groups),
        dtype,
    )
    return [y, *saved]


def _fake_gated_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    saved: list[Tensor],
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    full_in: bool,
    full_out: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    fmt = torch.channels_last if backend == "triton" else conv2d.memory_format(x, weight)
    shapes: list[Tensor | None] = [
        _empty(x, x.shape, x.dtype, fmt),
        weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
        in_gate[0].new_empty(in_gate[0].shape) if in_gate else None,
        out_gate[0].new_empty(out_gate[0].shape) if out_gate else None,
    ]
    return _given([s if n else None for s, n in zip(shapes, needs, strict=True)], x)


@_define(
    "gated_conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor[] in_gate,"
    " Tensor[] out_gate, Tensor[] saved, bool scale_in, bool scale_out, bool in_packed, bool out_packed,"
    " bool full_in, bool full_out, SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups,"
    " ScalarType dtype, bool[] needs, float[] dist, str backend) -> Tensor[]",
    _fake_gated_conv2d_backward,
)
def gated_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: list[Tensor],
    out_gate: list[Tensor],
    saved: list[Tensor],
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    full_in: bool,
    full_out: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    needs: list[bool],
    dist: list[float],
    backend: str,
) -> list[Tensor]:
    """With ``dist`` (beta, gamma, zeta) the gates' gradients are those of log_alpha, else those of z."""
    grads = module(backend).conv2d_backward(
        dy,
        x,
        weight,
        bias,
        _gate(in_gate),
        _gate(out_gate),
        saved,
        scale_in,
        scale_out,
        in_packed,
        out_packed,
        full_in,
        full_out,
        (stride, padding, dilation, groups),
        dtype,
        needs,
        _dist(*dist) if dist else None,
    )
    return _given(grads, x)


@_define("copied_seed(Tensor seed) -> Tensor", torch.empty_like)
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


_LIBRARY.define("kept_seed(Tensor seed) -> Tensor")
_LIBRARY.impl("kept_seed", _kept_seed, "CompositeImplicitAutograd")
_KEPT_SEED = torch.ops.l0kernels.kept_seed.default


def kept_seed(seed: Tensor) -> Tensor:
    """The seed of a draw. In a compiled graph it goes from forward to backward through an opaque operator.

    Left to themselves, compilers may compute it again in backward, from a generator or a counted step that
    has moved on since: then backward would have other gates, silently.
    """
    return _KEPT_SEED(seed) if torch.compiler.is_compiling() else seed


@_define(
    "weighted_penalty(Tensor[] log_alpha, Tensor weights, float beta, float gamma, float zeta, str backend)"
    " -> (Tensor, Tensor)",
    lambda log_alpha, weights, *_: (
        log_alpha[0].new_empty(()),
        log_alpha[0].new_empty(sum(a.numel() for a in log_alpha)),
    ),
)
def weighted_penalty(
    log_alpha: list[Tensor], weights: Tensor, beta: float, gamma: float, zeta: float, backend: str
) -> tuple[Tensor, Tensor]:
    """``l0_penalty`` with a tensor of weights: a compiled graph has no guard on their values."""
    dist = _dist(beta, gamma, zeta)
    if weights.device.type == "cpu":
        vector(weights, "weights", weights.dtype, len(log_alpha))
        return module(backend).l0_penalty(log_alpha, weights.tolist(), dist)
    # On a GPU the weights stay there.
    flat = torch.cat([a.flatten() for a in log_alpha])
    each = zip(weights.to(flat.dtype).unbind(), log_alpha, strict=True)
    spread = torch.cat([weight.expand(a.numel()) for weight, a in each])
    p_open = dist.p_open(flat)
    return (spread * p_open).sum(), spread * p_open * (1 - p_open)


@functools.cache
def register_batching() -> None:
    """Has torch.vmap run the operators example by example; once, at the first transform."""
    for name in operator_names():
        if name.startswith("l0kernels::"):
            operator = getattr(torch.ops.l0kernels, name.split("::")[1].split(".")[0]).default
            if operator is not _KEPT_SEED and not operator._schema.is_mutable:
                torch.library.register_vmap(operator, functools.partial(_one_by_one, operator), lib=_LIBRARY)


def _one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    if not info.batch_size:
        raise ValueError(f"torch.vmap must have at least one example for {operator}, got none")

    def example(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [example(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i).contiguous()

    results = [
        operator(*(example(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(each) for each in zip(*results, strict=True)]
    kind = type(results[0])
    return kind(stacked), kind([0] * len(stacked))
