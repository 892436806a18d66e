"""L0 regularisation that really skips: hard-concrete gates drawn, compacted and multiplied in.

In short::

    import l0kernels as l0

    gates = l0.sample_gates(log_alpha)                       # z, and which gates are open
    y = l0.gated_linear(x, weight, bias, in_gates=gates)     # costs what is open
    l0_norm = l0.l0_penalty(log_alpha, group_size=weight.shape[0], lam=0.1)
    loss = criterion(y, target) + l0_norm / N                # a mean loss; N training examples
"""

import gc as _gc
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import torch as _torch  # before the native extension: both must share one OpenMP runtime  # noqa: F401

# What is made here lives on. A collection meanwhile would look through all that torch has made, which costs
# more than the import.
_collects = _gc.isenabled()
_gc.disable()
try:
    from . import nn, reference
    from ._registry import backends, use_backend
    from .attention import gated_attention
    from .batch_norm import gated_batch_norm
    from .conv2d import Packed, gated_conv2d, pack_channels, packed_conv2d, unpack_channels
    from .gates import Gates, HardConcrete, eval_gates, sample_gates
    from .linear import gated_linear, l0_linear
    from .masked_linear import masked_linear
    from .mlp import gated_mlp, l0_mlp
    from .norm import gated_group_norm, gated_layer_norm, gated_rms_norm
    from .penalty import l0_penalty, l2_penalty
finally:
    if _collects:
        _gc.enable()

if _TYPE_CHECKING:
    from . import prox


def __getattr__(name: str) -> _Any:
    if name == "prox":  # what few trainings use can wait
        return _import_module(".prox", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Gates",
    "HardConcrete",
    "Packed",
    "backends",
    "eval_gates",
    "gated_attention",
    "gated_batch_norm",
    "gated_conv2d",
    "gated_group_norm",
    "gated_layer_norm",
    "gated_linear",
    "gated_mlp",
    "gated_rms_norm",
    "l0_linear",
    "l0_mlp",
    "l0_penalty",
    "l2_penalty",
    "masked_linear",
    "nn",
    "pack_channels",
    "packed_conv2d",
    "prox",
    "reference",
    "sample_gates",
    "unpack_channels",
    "use_backend",
]
