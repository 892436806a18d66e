"""Implementations of the operators in _ops.py, one module per backend; all have the same functions.

cpp      native kernels on raw addresses; 16-bit products go through packed.py
torch    packed.py over torch's own index_select, mm and index_copy
triton   launchers of triton_kernels/, imported on first use
memory   the one way from a tensor to an address
packed   the compositions pack -> product -> unpack, for either of the two pairs of pack and unpack
"""

from importlib import import_module
from types import ModuleType

from .._registry import native as _C

_MODULES = {
    name: import_module(f"{__name__}.{name}") for name in ("torch", "cpp") if name != "cpp" or _C is not None
}


# In part at least on every backend of the CPU.
_MADE_OF_TORCH = ("gated_conv2d", "gated_conv2d_backward", "coupled_penalty", "coupled_penalty_grad")


def native(operator: str) -> frozenset[str]:
    """The backends that compute an operator past torch, and look at every operand before they do."""
    return frozenset() if operator in _MADE_OF_TORCH else frozenset(("cpp",))


def made_of_torch(operator: str) -> frozenset[str]:
    """Those that compute it, in part at least, by torch's own operations."""
    return frozenset(("torch", "cpp") if operator in _MADE_OF_TORCH else ("torch",))


def module(name: str) -> ModuleType:
    """The module of backend ``name``."""
    if name not in _MODULES:
        _MODULES[name] = import_module(f"{__name__}.{name}")
    return _MODULES[name]
