"""Large gradients in memory that was used before: fresh pages cost more than the product in them.

A 64 MB gradient takes 16384 page faults, longer than the whole gated layer at one open gate in ten. So each
large weight keeps the buffer of its gradient, and lends it again once nothing else refers to it: the step is
done and ``zero_grad`` has dropped it. A gradient that somebody still holds is never touched. The buffer goes
with its weight.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SMALLEST = 32 << 20  # bytes; glibc maps every allocation from here on afresh, smaller ones it recycles itself
KEPT = 2  # buffers per weight: one lives in .grad while gradients accumulate, one is being written

_lock = threading.Lock()
_buffers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _references(buffer: Tensor) -> int:
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)


def empty_grad(weight: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of weight's shape and dtype, for its gradient."""
    if weight.nbytes < SMALLEST:
        return weight.new_empty(weight.shape)
    with _lock:
        buffers = _buffers.setdefault(weight, [])
        for buffer, idle in buffers:
            if buffer.shape == weight.shape and _references(buffer) == idle:
                return buffer.detach()  # an alias: autograd takes it over, the buffer it would clone
        buffer = weight.new_empty(weight.shape)
        if len(buffers) < KEPT:
            buffers.append((buffer, _references(buffer)))
        return buffer.detach()
