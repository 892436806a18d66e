"""Argument checks. They compare attributes only and touch no data, so that they cost nothing beside an op;
each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._compat import count_modes, fake_mode, functorch_active, tracing_state

GATE_DTYPES = (torch.float32, torch.float64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Of activations and weights. Eight bits are for storage: torch multiplies none of them without scales."""
PLAIN = (Tensor, torch.nn.Parameter)
"""The types whose memory is what their numbers say; a subclass may have none, or mean something else."""


def readable() -> bool:
    """Whether tensors have values that Python may look at: nobody compiles, traces or transforms."""
    return not (torch.compiler.is_compiling() or functorch_active() or is_traced())


def refuse_traced_draw() -> None:
    """RuntimeError under torch.jit.trace, whose graph would have the gates of this one draw for ever."""
    if tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace would freeze gates drawn in train() into its graph; l0kernels is traced in "
            "eval(): call that on the model before, or give the draw a seed that is an input of the graph"
        )


def is_traced() -> bool:
    """Whether torch.jit.trace or make_fx records what is called, or fake tensors ask for shapes alone."""
    if tracing_state() is not None:
        return True
    if not count_modes():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        return True
    return fake_mode() is not None


def check_tensor(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a dense tensor, RuntimeError if memory of it was given back: torch's own
    operations would read what is not theirs."""
    if not isinstance(value, Tensor):
        way_out = "; torch.export traces l0kernels" if type(value).__name__ == "Proxy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{way_out}")
    if type(value) in PLAIN:
        if value.layout is not torch.strided or value.is_nested:
            raise _not_dense(name, value)
        if not torch.compiler.is_compiling() and is_freed(value):
            raise RuntimeError(
                f"{name} must have memory for its {tuple(value.shape)} elements, but its storage was resized "
                f"to {value.untyped_storage().nbytes()} bytes, as sharding and offloading do: bring it back "
                "before the call"
            )
    elif torch.nn.parameter.is_lazy(value):
        raise TypeError(f"{name} must have values, got a {type(value).__name__}: call its module once before")
    elif value.layout is not torch.strided:
        raise _not_dense(name, value)


def _not_dense(name: str, value: Tensor) -> TypeError:
    kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
    way = "to_padded_tensor" if value.is_nested else "to_dense"
    return TypeError(f"{name} must be a dense tensor, got {kind}: make it one, as with {way}")


def end_of(value: Tensor) -> int:
    """One past the last element of a tensor that has some, counted from the start of its storage."""
    n = value.numel()
    if not value.is_contiguous():
        n = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return int(value.storage_offset()) + n


def is_freed(value: Tensor) -> bool:
    """Whether the storage of a tensor ends before its last element, in particular if it has no bytes."""
    try:
        held = value.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # sparse, or of a transform: it has none to lose
        return False
    return value.numel() > 0 and held < end_of(value) * value.element_size()


def check_floating(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a tensor of one of DTYPES."""
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}: convert it, as with "
            f"{name}.to(torch.bfloat16)"
        )


def check_shape(name: str, value: Tensor, shape: Sequence[int], why: str) -> None:
    """ValueError unless ``value`` has ``shape``; ``why`` says what the shape follows from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({why}), got {tuple(value.shape)}")


def check_broadcastable(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless ``value`` can be expanded to ``shape``."""
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(f"{name} must be broadcastable to {tuple(shape)}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    """ValueError unless ``value`` lies on ``device``, the device of ``other``."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, the device of {other}, got {value.device}")


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """TypeError unless both tensors share a dtype or autocast is there to reconcile them."""
    if value.dtype == other.dtype:
        return
    kind = value.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, low: int, high: int) -> None:
    """TypeError unless ``value`` is an int, ValueError unless ``low <= value < high``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def check_number(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a real number, ValueError unless it is finite."""
    if type(value) in (float, int) and -math.inf < value < math.inf:  # an ABC's isinstance costs 1 us
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(float(value)) < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def check_log_alpha(name: str, value: Any, ndim: int | None = None) -> None:
    """TypeError unless ``value`` is float32 or float64, ValueError unless it has ``ndim`` dimensions."""
    check_tensor(name, value)
    if value.dtype not in GATE_DTYPES:
        raise TypeError(
            f"{name} must be float32 or float64, got {value.dtype}: gate parameters lose their updates in "
            "lower precision, so they stay float32 in a model of any dtype (under FSDP's mixed precision: "
            "l0kernels.nn.keep_gates_whole)"
        )
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}")


def check_seed(seed: Any, device: torch.device, name: str = "seed") -> None:
    """TypeError unless ``seed`` is an int64 tensor, ValueError unless it is (1,) and on ``device``."""
    if not isinstance(seed, Tensor):
        raise TypeError(f"{name} must be an int64 tensor of shape (1,), got {type(seed).__name__}")
    if seed.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor of shape (1,), got dtype {seed.dtype}")
    check_shape(name, seed, (1,), "one seed")
    check_device(name, seed, device, "log_alpha")


def fits_chain(
    x: Any, weights: Sequence[Any], biases: Sequence[Any], log_alphas: Sequence[Any], rows: int = 1
) -> bool:
    """Whether a chain of layers with gate parameters on their inputs is all right; a few attributes a tensor.

    ``rows`` of a hidden weight make one unit. False sends the caller to the checks that say what is wrong:
    those cost as much as a small layer.
    """
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return False
    try:
        dtype, device, n = x.dtype, x.device, x.shape[-1] * rows
        for weight, bias, log_alpha in zip(weights, biases, log_alphas, strict=True):
            n_out, n_in = weight.shape
            if n_in * rows != n or weight.dtype is not dtype or weight.device != device:
                return False
            if bias is not None and (
                bias.shape != (n_out,) or bias.dtype is not dtype or bias.device != device
            ):
                return False
            if log_alpha is not None and (
                log_alpha.shape != (n_in,)
                or log_alpha.dtype is not torch.float32
                or log_alpha.device != device
            ):
                return False
            n = n_out
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return dtype in DTYPES


def check_linear(x: Any, weight: Any, bias: Any, at: str = "") -> None:
    """Checks of ``x (..., in)``, ``weight (out, in)`` and ``bias (out,)`` or None, for torch's F.linear.

    Args:
        at: the position within a sequence, as "[0]", for messages about weights[0] and biases[0].
    """
    check_floating("x", x)
    check_weight(weight, bias, at)
    name = f"weights{at}" if at else "weight"
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape (..., {weight.shape[1]}), the columns of {name}, got {tuple(x.shape)}"
        )
    check_device("x", x, weight.device, name)
    check_same_dtype("x", x, name, weight)


def check_weight(weight: Any, bias: Any, at: str = "") -> None:
    """Checks of ``weight (out, in)`` and ``bias (out,)`` or None; ``at`` as in check_linear."""
    name = f"weights{at}" if at else "weight"
    if callable(weight):  # the quantised layers of torch
        raise TypeError(
            f"{name} must be a torch.Tensor, got a {type(weight).__name__}: its layer was replaced by one "
            "that keeps no weight (torch.ao.quantization does so); quantise what l0kernels.nn.export returns"
        )
    check_floating(name, weight)
    if weight.ndim != 2:
        raise ValueError(f"{name} must have shape (out, in), got {tuple(weight.shape)}")
    check_bias(weight, bias, at)


def check_bias(weight: Tensor, bias: Any, at: str = "") -> None:
    """Checks of ``bias (weight.shape[0],)`` or None; ``at`` as in check_linear."""
    if bias is None:
        return
    name, weight_name = (f"biases{at}", f"weights{at}") if at else ("bias", "weight")
    check_floating(name, bias)
    check_shape(name, bias, (weight.shape[0],), f"one per row of {weight_name}")
    check_device(name, bias, weight.device, weight_name)
    check_same_dtype(name, bias, weight_name, weight)
