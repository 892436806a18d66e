"""The one way from a tensor to an address, and where large gradients come from.

Native code believes what it is told of memory. So every address of a tensor that came from outside is taken
here, by functions that check what the kernel will assume: a plain tensor with memory of its own, of this
dtype, size and device, and its storage long enough for the last element. What was allocated a line before
needs no check: `fresh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import PLAIN, is_freed
from .._native import native

HUGE = 32 << 20  # bytes; glibc maps every allocation from here on afresh, smaller ones it keeps itself


class NotPlain(TypeError):
    """A tensor whose memory is not its values. torch's dispatcher can make plain tensors of some of them."""


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
    try:  # in one expression: a call takes ten of these, and its host time is a small layer's time
        if (
            type(t) in PLAIN
            and t.dtype is dtype
            and t.numel() == n
            and t.is_contiguous()
            and not t.is_neg()
            and (t.is_cpu if device is None else t.device == device)
            and t.untyped_storage().nbytes() >= (t.storage_offset() + n) * dtype.itemsize
        ):
            address = t.data_ptr()
            if address:
                return address
    except (NotImplementedError, RuntimeError):
        pass  # it has no storage: said below
    if t.numel() != n or not t.is_contiguous():
        got = f"{tuple(t.shape)}, strides {t.stride()}"
        raise ValueError(f"{name} must be {n} contiguous elements, got {got}")
    return _address(t, name, dtype, int(t.storage_offset()) + n, device) if n else 0


def _ordinary(t: Tensor, dtype: torch.dtype, n: int, fmt: torch.memory_format) -> int:
    """Address of n elements on the CPU in a memory format, by the checks of `vector`; 0 where one fails."""
    try:
        if (
            type(t) in PLAIN
            and t.dtype is dtype
            and t.numel() == n
            and t.is_contiguous(memory_format=fmt)
            and not t.is_neg()
            and t.is_cpu
            and t.untyped_storage().nbytes() >= (t.storage_offset() + n) * dtype.itemsize
        ):
            return t.data_ptr()
    except (NotImplementedError, RuntimeError):
        pass  # the callers say what is wrong
    return 0


def vectors(ts: Sequence[Tensor | None], name: str, dtype: torch.dtype, sizes: Sequence[int]) -> list[int]:
    """`vector` of each, on the CPU; 0 for None."""
    fmt = torch.contiguous_format
    return [
        0 if t is None else _ordinary(t, dtype, n, fmt) or vector(t, name, dtype, n)
        for t, n in zip(ts, sizes, strict=True)
    ]


def images(t: Tensor, name: str, dtype: torch.dtype) -> int:
    """Address of a (N, C, H, W) tensor in channels_last memory on the CPU, 0 for none; errors as `vector`."""
    address = _ordinary(t, dtype, t.numel(), torch.channels_last)
    if address:
        return address
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} must be in channels_last memory, got {tuple(t.shape)}, strides {t.stride()}"
        )
    n = t.numel()
    return _address(t, name, dtype, int(t.storage_offset()) + n, None) if n else 0


def matrix(
    t: Tensor, name: str, dtype: torch.dtype, rows: int, cols: int, device: torch.device | None = None
) -> tuple[int, int, int]:
    """Address and the two strides of a matrix of any strides; errors as `vector`."""
    if t.shape != (rows, cols):
        raise ValueError(f"{name} must have shape {(rows, cols)}, got {tuple(t.shape)}")
    by_row, by_col = t.stride()
    if not rows or not cols:
        return 0, by_row, by_col
    end: Any = t.storage_offset() + (rows - 1) * by_row + (cols - 1) * by_col + 1
    try:
        if (
            type(t) in PLAIN
            and t.dtype is dtype
            and not t.is_neg()
            and (t.is_cpu if device is None else t.device == device)
            and t.untyped_storage().nbytes() >= end * dtype.itemsize
        ):
            address = t.data_ptr()
            if address:
                return address, by_row, by_col
    except (NotImplementedError, RuntimeError):
        pass
    return _address(t, name, dtype, end, device), by_row, by_col


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
    if t is None or not (n := t.numel()):
        return 0
    try:  # as in `vector`, of one in one piece
        if (
            type(t) in PLAIN
            and t.is_contiguous()
            and not t.is_neg()
            and t.untyped_storage().nbytes() >= (t.storage_offset() + n) * t.element_size()
        ):
            address = t.data_ptr()
            if address:
                return address
    except (NotImplementedError, RuntimeError):
        pass
    reach = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return _address(t, name, t.dtype, int(t.storage_offset()) + reach + 1, t.device)


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
    than the whole gated layer at one open gate in ten, and 32 of 2 MB.
    """
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if native is not None and grad.nbytes >= HUGE and grad.is_cpu:
        native.advise_huge_pages(grad.data_ptr(), grad.nbytes)
    return grad
