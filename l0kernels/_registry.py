"""Which implementation serves a call. Asking for one by name never falls back to another."""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._arguments import GLU
from ._compat import tracing_state

PRIMITIVES = (
    "sample",
    "gate_grad",
    "l0_penalty",
    "l2_penalty",
    "gated_linear",
    "gated_mlp",
    "gated_conv2d",
    "gated_batch_norm",
    "gated_attention",
    "masked_linear",
    "block_linear",
    "pack",
    "unpack",
    "prox",
)
"""What a backend may implement; the rows of backends()."""

NAMES = ("reference", "torch", "cpp", "triton", "cuda")

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_of_process: str | None = os.environ.get("L0KERNELS_BACKEND") or None


def check_name(name: Any, argument: str = "backend") -> None:
    """ValueError unless ``name`` is a backend."""
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")


if _of_process is not None:
    check_name(_of_process, "the environment variable L0KERNELS_BACKEND")


class _Thread(threading.local):
    """Scopes of use_backend as Dynamo reads them: it traces no ContextVar, and guards on these names."""

    def __init__(self) -> None:
        self.scopes: dict[object, str] = {}  # those open in this thread, of all its tasks
        self.entered: str | None = None  # the name of the last of them
        self.traced: str | None = None  # of a scope within compiled code


_of_context: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("l0kernels_backend", default=())
"""Scopes and their names, the innermost last; generators that take turns end theirs in any order."""
_of_thread = _Thread()
_scopes: dict[object, str] = {}  # those open in any thread; they end in any order


def requested() -> str | None:
    """The backend that use_backend, or else the environment, asks for here; None leaves the choice."""
    if torch.compiler.is_dynamo_compiling():
        return _of_thread.traced or _of_thread.entered or _of_process
    open_here = _of_context.get()
    name = _of_thread.traced or (open_here[-1][1] if open_here else None)
    if name is None and _scopes and isinstance(threading.current_thread(), threading._DummyThread):
        # Autograd's thread of a GPU, where checkpoints compute again, knows nothing of who called backward.
        return [*_scopes.values()][-1]
    return name or _of_process


def why_not(name: str) -> str | None:
    """None where backend ``name`` can be used on this machine, else the reason."""
    if name == "cpp":
        return _native.why_not
    if name == "triton":
        return _why_no_triton()
    if name == "cuda":
        return _why_no_cuda()
    return None


@functools.cache
def _cuda() -> Any:
    return import_module("l0kernels.impl.cuda")


@functools.cache
def _why_no_cuda() -> str | None:
    return _cuda().why_not()


@functools.cache
def _why_no_triton() -> str | None:
    if util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; a CUDA torch brings its own)"
    if util.find_spec("l0kernels.triton_kernels") is None:
        return _native.why_not_there("l0kernels.triton_kernels", "the checkout was not installed")
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    return None


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once, too


_LACKS = {
    "reference": {"pack", "unpack"},
    "torch": {"prox"},  # the formula is as fast
    "triton": {"l2_penalty"},  # the formula in plain torch serves it
}


def implements(name: str) -> frozenset[str]:
    """The primitives of backend ``name``; for "reference", dense autograd, all but the packing."""
    if why_not(name):
        return frozenset()
    if name == "cuda":
        return frozenset(PRIMITIVES) & _cuda().SERVES
    return frozenset(PRIMITIVES) - _LACKS.get(name, frozenset())


CUDA_FIRST = frozenset({"gated_linear", "gated_mlp", "l2_penalty"})
"""Where the CUDA kernels come before Triton's: the products of small layers, as measured on an H200, and what
only they have."""

_TRITON_OR_CUDA = "triton; cuda where it is asked for"
_ONLY_TRITON = "triton, the only one"
ON_CUDA = {
    "sample": _TRITON_OR_CUDA,
    "gate_grad": _TRITON_OR_CUDA,
    "l0_penalty": _TRITON_OR_CUDA,
    "l2_penalty": "cuda, the only kernels; plain torch without them",
    "gated_linear": "cuda up to 2**27 products (M * in * out) and 4096 units, timed on an H200; else triton",
    "gated_mlp": "cuda where every layer is as small as that; triton else, and for swiglu and geglu",
    "gated_conv2d": _ONLY_TRITON,
    "gated_batch_norm": _ONLY_TRITON,
    "gated_attention": "triton, which skips closed heads; torch without gates, and where it alone serves",
    "masked_linear": _ONLY_TRITON,
    "block_linear": _ONLY_TRITON,
    "pack": _TRITON_OR_CUDA,
    "unpack": _TRITON_OR_CUDA,
    "prox": _ONLY_TRITON,
}
"""Which backend serves tensors on a GPU unless one is asked for, and why."""


def resolve(device: torch.device, dtype: torch.dtype, primitive: str) -> str:
    """The backend for tensors on ``device``: the requested one, else the fastest that is there.

    Args:
        dtype: of the tensors. On a GPU float64, which is for checking gradients, is the reference's.

    Raises:
        RuntimeError: the requested backend is not available here or does not serve that device, dtype or
            primitive.

    Traced by torch.jit.trace, which knows torch's own operations only, every tensor is the reference's.
    """
    if tracing_state() is not None:
        return "reference"
    name = requested()
    if name is not None:
        reason = why_not(name) or _why_not_serving(name, device, dtype, primitive)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
        return name
    kind = device.type
    if kind in ("cpu", "meta"):
        if _native.native is not None:
            return "cpp"
        if kind == "cpu":
            _warn_of_fallback("CPU", "in plain torch, which is slower", "torch", _native.why_not)
        return "torch"
    if kind == "cuda" and dtype in TRITON_DTYPES:
        if primitive in CUDA_FIRST and primitive not in _PRODUCTS and _why_no_cuda() is None:
            return "cuda"
        if _why_no_triton() is None:
            return "triton"
        _warn_of_fallback("CUDA", "densely, closed gates and all", "reference", _why_no_triton())
    return "reference"  # the "torch" backend would ask the GPU for the counts, a sync per layer


_warned: set[str] = set()  # of these kinds of tensors


def _warn_of_fallback(kind: str, how: str, name: str, why: str | None) -> None:
    """Says once what the fastest backend for a kind of tensors is not there for; who asks for one, knows."""
    if kind in _warned or torch.compiler.is_compiling():
        return
    _warned.add(kind)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("l0kernels"):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"l0kernels computes {kind} tensors {how}: {why}. `python -m l0kernels` says how to get more; "
        f"L0KERNELS_BACKEND={name} or l0kernels.use_backend({name!r}) asks for this and silences the warning",
        UserWarning,
        stacklevel=level,
    )


_PRODUCTS = ("gated_linear", "gated_mlp")


def resolve_layers(x: Tensor, weights: Sequence[Tensor], primitive: str, activation: str = "identity") -> str:
    """resolve for the product of x (..., in) and the weights: small layers on a GPU may have own kernels."""
    backend = resolve(x.device, x.dtype, primitive)
    if activation in GLU:
        if backend == "cuda":
            raise RuntimeError(
                f"backend 'cuda' cannot be used: it does not serve {activation!r}; triton does"
            )
    elif backend == "triton" and requested() is None and primitive in CUDA_FIRST and _why_no_cuda() is None:
        sizes = [x.shape[-1], *(weight.shape[0] for weight in weights)]
        if _cuda().small(x.numel() // max(sizes[0], 1), sizes):
            return "cuda"
    return backend


def who_draws(log_alpha: Tensor, backend: str) -> str:
    """The backend that draws for one that multiplies: on a GPU the fastest may be another, or float64's."""
    if backend not in ("triton", "cuda"):
        return backend
    backend = resolve(log_alpha.device, log_alpha.dtype, "sample")
    return "torch" if backend == "reference" else backend


def packs_exactly(backend: str) -> bool:
    """Whether what it packs is as long as there are open units, which takes a host that knows how many."""
    return backend != "triton"


def has(backend: str, primitive: str) -> bool:
    """Whether there is an operator of its own for the primitive; for others the formula serves."""
    return backend != "reference" and primitive not in _LACKS.get(backend, ())


def _why_not_serving(name: str, device: torch.device, dtype: torch.dtype, primitive: str) -> str | None:
    kind = device.type
    if name == "cpp" and kind not in ("cpu", "meta"):
        return f"it serves tensors on the CPU, got {device}"
    if name == "triton":
        if kind != "meta" and (kind == "cuda") == _interpreted():
            return (
                f"it serves tensors on {'the CPU (interpreted)' if _interpreted() else 'CUDA'}, got {device}"
            )
        if dtype not in TRITON_DTYPES:
            return f"it serves float32, bfloat16 and float16, got {dtype}"
    if name == "cuda":
        if kind not in ("cuda", "meta"):
            return f"it serves tensors on CUDA, got {device}"
        if primitive not in _cuda().SERVES:
            return f"it does not serve {primitive}; the triton backend does"
    return None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context in which every operation uses backend ``name``, in this thread or task of asyncio alone.

    A thread started within begins without it, as with any context variable;
    ``contextvars.copy_context().run`` hands it on. A backward pass uses the backend of its forward.

    Args:
        name: "reference", "torch", "cpp", "triton" or "cuda". See backends().

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot be used on this machine; nothing falls back silently.
    """
    check_name(name, "name")
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    if torch.compiler.is_dynamo_compiling():
        traced, _of_thread.traced = _of_thread.traced, name
        try:
            yield
        finally:
            _of_thread.traced = traced
        return
    scope, here = object(), _of_thread.scopes
    traced = _of_thread.traced
    _of_context.set((*_of_context.get(), (scope, name)))
    here[scope] = _scopes[scope] = _of_thread.entered = name
    _of_thread.traced = None
    try:
        yield
    finally:
        del here[scope], _scopes[scope]
        _of_context.set(tuple(pair for pair in _of_context.get() if pair[0] is not scope))
        _of_thread.entered = [*here.values()][-1] if here else None
        _of_thread.traced = traced


class BackendTable(dict[str, dict[str, str]]):
    """primitive -> backend -> "yes" or why not; prints as a table."""

    def __str__(self) -> str:
        reasons = {name: why_not(name) for name in NAMES}
        width = max(map(len, PRIMITIVES)) + 2
        lines = ["".ljust(width) + "".join(name.ljust(11) for name in NAMES)]
        for primitive, row in self.items():
            marks = ("yes" if row[name] == "yes" else "-" for name in NAMES)
            lines.append(primitive.ljust(width) + "".join(mark.ljust(11) for mark in marks).rstrip())
        lines += [f"{name}: {reason}" for name, reason in reasons.items() if reason]
        lines += [
            "on CUDA tensors:",
            *(f"  {primitive.ljust(width)}{why}" for primitive, why in ON_CUDA.items()),
        ]
        return "\n".join(lines)

    __repr__ = __str__


def backends() -> BackendTable:
    """The table of primitives and backends: "yes", or the reason why one is not available on this machine."""
    return BackendTable(
        {
            p: {name: "yes" if p in implements(name) else why_not(name) or "-" for name in NAMES}
            for p in PRIMITIVES
        }
    )
