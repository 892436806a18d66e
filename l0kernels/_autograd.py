"""How the autograd.Functions are called: eager, compiled, and under the transforms of torch.func."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops
from ._checks import PLAIN
from ._compat import break_graph, direct_apply, functorch_active, unwrap_if_dead


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` in the form that the surroundings take."""
    if torch.compiler.is_compiling():
        if functorch_active() and torch.is_grad_enabled():
            # Dynamo would take the derivative of the forward, which has none, for that of the Function.
            break_graph("no derivative of torch.func is taken inside of a compiled graph; call it outside")
        return function.apply(*_distinct(args))
    if forward_ad._current_level >= 0:
        _refuse_duals(args)
    if functorch_active():
        return _apply_functional(function, args)
    return direct_apply(function)(*[unwrap_if_dead(a) if type(a) in PLAIN else a for a in args])


def _refuse_dual(*_: Any) -> Any:
    raise RuntimeError(
        "l0kernels has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad), got a dual tensor; "
        'take reverse mode (vjp, jacrev), or use_backend("reference"), which has both'
    )


def _refuse_duals(args: Iterable[Any]) -> None:
    """RuntimeError where a tensor carries a tangent."""
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            _refuse_dual()


def differentiates(t: Tensor) -> bool:
    """Whether somebody may want a derivative of what is made of t, reverse or forward."""
    return (t.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _distinct(args: Iterable[Any]) -> list[Any]:
    """Views of tensors that come a second time: Dynamo takes none twice."""
    distinct: list[Any] = []
    for arg in args:
        twice = isinstance(arg, Tensor) and any(arg is other for other in distinct)
        distinct.append(arg.view_as(arg) if twice else arg)
    return distinct


class _Context:
    """What the forward of a Function puts on its ctx, and what its backward finds there."""

    def __init__(self) -> None:
        self.needs_input_grad: tuple[bool, ...] = ()
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.origins: list[int | None] = []
        self.single = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _apply_functional(function: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    context = _Context()
    results = _functional(function).apply(context, *args)
    return results[0] if context.single else results[: len(results) - context.origins.count(None)]


@functools.cache
def _functional(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """``function`` as torch.func wants it: what forward saves is an input or an output, and is put on the ctx
    afterwards. Batched, its operators run example by example. Costs more per call than a small layer does, so
    that eager calls go without."""

    class Functional(torch.autograd.Function):
        generate_vmap_rule = True
        jvp: Any = staticmethod(_refuse_dual)

        @staticmethod
        @torch.compiler.disable  # behind a break of the graph Dynamo would trace what it does not know
        def forward(context: _Context, *args: Any) -> Any:
            outputs = function.forward(context, *args)
            context.single = not isinstance(outputs, tuple)
            saved = context.saved_tensors
            # Which argument a saved tensor is; None: it is made here, and comes back as an output.
            number = {id(arg): i for i, arg in enumerate(args) if isinstance(arg, Tensor)}
            context.origins = [-1 if t is None else number.get(id(t)) for t in saved]
            made = [t for t, origin in zip(saved, context.origins, strict=True) if origin is None]
            context.saved_tensors = ()
            return (outputs, *made) if context.single else (*outputs, *made)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            context, *args = inputs
            made = output[len(output) - context.origins.count(None) :]
            rest = iter(made)
            saved = [
                next(rest) if origin is None else None if origin < 0 else args[origin]
                for origin in context.origins
            ]
            ctx.save_for_backward(*saved)
            ctx.mark_non_differentiable(*made)
            ctx.context = context

        @staticmethod
        @torch.compiler.disable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            context, n_made = ctx.context, ctx.context.origins.count(None)
            grads = grads[: len(grads) - n_made]
            again = _Context()
            again.__dict__.update(context.__dict__)
            again.needs_input_grad = ctx.needs_input_grad[1:]
            again.saved_tensors = ctx.saved_tensors
            with torch.no_grad():
                results = function.backward(again, *grads)
            wanted = [i for i, result in enumerate(results) if result is not None]
            behind = [t for t in (*grads, *again.saved_tensors) if t is not None and t.requires_grad]
            joined = _NoSecond.apply(len(wanted), *(results[i] for i in wanted), *behind)
            out: list[Tensor | None] = [None] * len(results)
            for i, result in zip(wanted, joined, strict=True):
                out[i] = result
            return None, *out

    Functional.__name__ = Functional.__qualname__ = function.__name__
    return Functional


class _NoSecond(torch.autograd.Function):
    """First derivatives, which torch.func always prepares to derive once more: it may not."""

    generate_vmap_rule = True
    jvp: Any = staticmethod(_refuse_dual)

    @staticmethod
    def forward(n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_ops.NO_SECOND.format("l0kernels", "a derivative of a gradient"))
