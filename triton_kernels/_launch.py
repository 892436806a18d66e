"""Launches compiled kernels without Triton's binding, which costs the host several times the launch itself.

A layer calls its kernels with the same sizes, strides and types step after step: those are the key, the
compiled kernel the value, and addresses pass as plain numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

_LIMIT = 4096
_UNALIGNED = object()
_NUMBERS = frozenset((int, float, bool, type(None)))  # isinstance(arg, Tensor) is half of a launch's cost
_HOOKS = (
    knobs.runtime.launch_enter_hook,
    knobs.runtime.launch_exit_hook,
)  # a profiler's, called by Triton alone
_compiled: dict[tuple[Any, ...], Any] = {}
_options: dict[int, dict[str, int]] = {}


def has_registers(kernel: Any, n: int) -> Any:
    """`kernel`, compiled for up to n registers a thread: ptxas leaves room for a second program."""
    _options[id(kernel)] = {"maxnreg": n}
    return kernel


def options_of(kernel: Any) -> dict[str, int]:
    """What a kernel is compiled with beside warps and stages."""
    return _options.get(id(kernel), {})


def cdiv(a: int, b: int) -> int:
    """ceil(a / b); triton.cdiv takes the host 2 us."""
    return -(-a // b)


def address(t: Any) -> int:
    """Where the tensor t begins, for a kernel that believes its dtype and the strides it is told."""
    return int(t.data_ptr())


T = TypeVar("T")
_remembered: list[Any] = []


def per_gpu(of: Callable[..., T]) -> Callable[..., T]:
    """lru_cache for what the GPU decides, which a recording forgets."""
    cached = functools.lru_cache(of)
    _remembered.append(cached)
    return cached


@per_gpu
def gpu(index: int | None) -> tuple[int, int]:
    """(compute capability * 10, multiprocessors); without an index those of the machine stood in for."""
    if index is None:
        return _stand_in
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _forget() -> None:
    for cached in _remembered:
        cached.cache_clear()


@contextlib.contextmanager
def recording(record: Callable[..., None], stand_in: tuple[int, int]) -> Iterator[None]:
    """In place of a launch ``record(kernel, grid, args, num_warps, num_stages, constants)`` is called.

    Meta tensors are taken to lie on a GPU of ``stand_in``: capability * 10, multiprocessors.
    """
    global _instead, _stand_in
    before = _instead, _stand_in
    _instead, _stand_in = record, stand_in
    _forget()
    try:
        yield
    finally:
        _instead, _stand_in = before
        _forget()


def _interpret(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    constants: dict[str, Any],
) -> None:
    if isinstance(kernel, InterpretedFunction):
        _check(kernel, args, constants)
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)


_instead: Callable[..., None] | None = _interpret if knobs.runtime.interpret else None
_stand_in = 90, 4  # of the interpreter: a small Hopper GPU


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """``kernel[grid](*args, num_warps=..., num_stages=..., **constants)`` on the current device and stream.

    Args:
        args: tensors, numbers and None, in the order of the kernel's parameters.
        constants: its constexpr parameters, which come last, in their order.
    """
    if _instead is not None:
        _instead(kernel, grid, args, num_warps, num_stages, constants)
        return
    device = torch.cuda.current_device()
    values = [arg if type(arg) in _NUMBERS else address(arg) for arg in args]
    kinds = [
        arg if type(arg) in _NUMBERS else arg.dtype if not value & 15 else (arg.dtype, _UNALIGNED)
        for arg, value in zip(args, values, strict=True)
    ]
    key = (id(kernel), device, num_warps, num_stages, *constants.values(), *kinds)
    compiled = _compiled.get(key)
    if compiled is None or _HOOKS[0].calls or _HOOKS[1].calls:
        _check(kernel, args, constants)
        if len(_compiled) >= _LIMIT:
            _compiled.clear()
        options = {"num_warps": num_warps, "num_stages": num_stages, **options_of(kernel)}
        _compiled[key] = kernel[grid](*args, **options, **constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        x,
        y,
        z,
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *values,
        *constants.values(),
    )


def _check(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    expected = kernel.arg_names[len(args) :]
    if [*constants] != expected:
        raise TypeError(f"after {len(args)} arguments the kernel takes {expected}, got {[*constants]}")
