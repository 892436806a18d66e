"""The one way from a tensor to an address, and where large gradients come from.

Native code believes what it is told of memory. So every address of a tensor that came from outside is taken
here, by functions that check what the kernel will assume: a plain tensor with memory of its own, of this
dtype, size and device, and its storage long enough for the last element. What was allocated a line before
needs no check: `fresh`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .._checks import DTYPES, PLAIN, end_of, is_freed
from .._native import native

LARGE = 1 << 20  # bytes, of gradients
HUGE = 32 << 20  # bytes; glibc maps every allocation from here on afresh, smaller ones it keeps itself


class NotPlain(TypeError):
    """A tensor whose memory is not its values. torch's dispatcher can make plain tensors of some of them."""


ANY, CONTIGUOUS, CHANNELS_LAST = range(3)
"""Layouts, as csrc/tensor.h numbers them."""


def looked_at(t: Tensor, dtype: torch.dtype | None, n: int, layout: int, *device: torch.device | None) -> int:
    """Address of what is asked for; 0 where `t` is something else, has no elements or is not to be read.

    Args:
        dtype: None: any.
        n: elements; negative: any.
        device: one; None: the CPU; absent: any.
    """
    try:
        if (
            type(t) not in PLAIN
            or (dtype is not None and t.dtype is not dtype)
            or (n >= 0 and t.numel() != n)
            or (layout == CONTIGUOUS and not t.is_contiguous())
            or (layout == CHANNELS_LAST and not t.is_contiguous(memory_format=torch.channels_last))
            or t.is_neg()
            or (device and not (t.is_cpu if device[0] is None else t.device == device[0]))
        ):
            return 0
        held = t.untyped_storage().nbytes()
        return t.data_ptr() if held >= end_of(t) * t.element_size() else 0
    except (NotImplementedError, RuntimeError):
        return 0  # of a transform, or sparse


def _native_look() -> Callable[..., int]:
    """looked_at in half of its time: a call takes ten of these, and its host time is a small layer's time.

    Where torch has DLPack's C exchange API; else this asks looked_at.
    """
    exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    dtypes = (*DTYPES, torch.int32, torch.int64, torch.uint8, torch.bool)
    samples = [torch.empty(1, dtype=dtype, device="cpu") for dtype in dtypes]
    native.know_tensors(exchange_api, PLAIN, samples, looked_at)
    return native.address


_look = looked_at if native is None else _native_look()


def vector(t: Tensor, name: str, dtype: torch.dtype, n: int, device: torch.device | None = None) -> int:
    """Address of n elements, one after the other; 0 for none.

    Args:
        device: where the kernel runs; None: the CPU.

    Raises:
        NotPlain: a subclass, a lazily negated view, or a tensor without memory of its own.
        TypeError: another dtype.
        ValueError: another size or device, or elements that do not lie one after the other.
        RuntimeError: the tensor's memory was given back.
    """
    address: int = _look(t, dtype, n, CONTIGUOUS, device)
    return address or _told(t, name, dtype, n, CONTIGUOUS, device)


def _told(t: Tensor, name: str, dtype: torch.dtype, n: int, layout: int, device: torch.device | None) -> int:
    """An error that says what is wrong; 0 where there is nothing to read."""
    format_, wanted = torch.contiguous_format, f"{n} contiguous elements"
    if layout == CHANNELS_LAST:
        format_, wanted = torch.channels_last, "in channels_last memory"
    if t.numel() != n or not t.is_contiguous(memory_format=format_):
        raise ValueError(f"{name} must be {wanted}, got {tuple(t.shape)}, strides {t.stride()}")
    return _address(t, name, dtype, int(t.storage_offset()) + n, device) if n else 0


def images(t: Tensor, name: str, dtype: torch.dtype) -> int:
    """Address of a (N, C, H, W) tensor in channels_last memory on the CPU, 0 for none; errors as `vector`."""
    address: int = _look(t, dtype, -1, CHANNELS_LAST, None)
    return address or _told(t, name, dtype, t.numel(), CHANNELS_LAST, None)


def matrix(
    t: Tensor, name: str, dtype: torch.dtype, rows: int, cols: int, device: torch.device | None = None
) -> tuple[int, int, int]:
    """Address and the two strides of a matrix of any strides; errors as `vector`."""
    if t.shape != (rows, cols):
        raise ValueError(f"{name} must have shape {(rows, cols)}, got {tuple(t.shape)}")
    by_row, by_col = t.stride()
    if not rows or not cols:
        return 0, by_row, by_col
    address = _look(t, dtype, -1, ANY, device) or _address(t, name, dtype, end_of(t), device)
    return address, by_row, by_col


def optional(
    t: Tensor | None, name: str, dtype: torch.dtype, n: int, device: torch.device | None = None
) -> int:
    """`vector`, or 0 for None."""
    return 0 if t is None else vector(t, name, dtype, n, device)


def fresh(t: Tensor | None) -> int:
    """Address of what the caller has just allocated; 0 for None and for no elements."""
    return 0 if t is None else t.data_ptr()


def _address(t: Tensor, name: str, dtype: torch.dtype, end: int, device: torch.device | None) -> int:
    """`end`: one past the last element, counted from the start of the storage."""
    if t.dtype is not dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {t.dtype}")
    held = _held(t, name)
    if not (t.is_cpu if device is None else t.device == device):
        raise ValueError(f"{name} must be on {device or 'the CPU'}, got {t.device}")
    if held < end * t.element_size():
        raise _freed(t, name, held)
    address = t.data_ptr()
    if not address:  # zeros that torch keeps without memory
        raise NotPlain(f"{name} must be a plain tensor with memory of its own, got {_kind(t)}")
    return address


def _held(t: Tensor, name: str) -> int:
    """Bytes of the storage of a tensor whose memory is its values."""
    if type(t) not in PLAIN or t.is_neg():
        raise NotPlain(f"{name} must be a plain tensor, got {_kind(t)}: give its values as one")
    try:
        return t.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # of a transform, or sparse
        raise NotPlain(f"{name} must be a plain tensor with memory of its own, got {_kind(t)}") from None


def _freed(t: Tensor, name: str, held: int) -> RuntimeError:
    return RuntimeError(
        f"{name} must have memory for its {tuple(t.shape)} elements, but its storage was resized to {held} "
        "bytes, as sharding and offloading do: bring it back before the call"
    )


def strided(t: Tensor | None, name: str) -> int:
    """Address of a tensor of any dtype, device, shape and strides, which are handed on; 0: none.

    Raises:
        NotPlain, ValueError, RuntimeError: as `vector`.
    """
    if t is None:
        return 0
    address: int = _look(t, None, -1, ANY)
    return address or (_address(t, name, t.dtype, end_of(t), t.device) if t.numel() else 0)


def check_not_freed(t: Tensor | None, name: str) -> None:
    """RuntimeError where torch's own operations would read memory that was given back."""
    if t is not None and is_freed(t):
        raise _freed(t, name, t.untyped_storage().nbytes())


def _kind(t: Tensor) -> str:
    if type(t) not in PLAIN:
        return f"a {type(t).__name__}"
    if t.is_neg():
        return "a lazily negated view"
    return f"one without ({t.layout})"


def plain(t: Tensor) -> Tensor:
    """t, or its values in memory of their own where it is lazily negated or zeros without memory.

    The dispatcher does the same, but not in lists with absent tensors; and compositions of torch's
    operations meet such tensors without it.
    """
    if t.is_neg():
        return t.resolve_neg()
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t._is_zerotensor() else t


def empty_grad(weight: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of weight's shape and dtype, for its gradient.

    A large one lies on huge pages: a gradient of 64 MB takes 16384 faults of 4 KB pages, which last longer
    than the whole gated layer at one open gate in ten, and 32 of 2 MB. Smaller ones are freed in every step,
    too, and glibc is to keep their memory.
    """
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if native is not None and grad.is_cpu:
        if grad.nbytes >= HUGE:
            native.advise_huge_pages(grad.data_ptr(), grad.nbytes)
        elif grad.nbytes >= LARGE:
            _keep_freed_memory()
    return grad


@cache
def _keep_freed_memory() -> None:
    """Once is enough."""
    native.keep_freed_memory()
