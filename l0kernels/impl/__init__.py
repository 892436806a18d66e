"""Implementations of the operators in _ops.py, one module per backend; all have the same functions.

cpp      native kernels on raw addresses; 16-bit products go through packed.py
torch    packed.py over torch's own index_select, mm and index_copy
triton   launchers of triton_kernels/, imported on first use
portable what torch computes, and cpp where no kernel takes the dtype or layout
memory   the one way from a tensor to an address
packed   the compositions pack -> product -> unpack, for either of the two pairs of pack and unpack
"""

from importlib import import_module
from types import ModuleType

from .._native import native

_MODULES = {
    name: import_module(f"{__name__}.{name}")
    for name in ("torch", "cpp")
    if name != "cpp" or native is not None
}


def module(name: str) -> ModuleType:
    """The module of backend ``name``."""
    if name not in _MODULES:
        _MODULES[name] = import_module(f"{__name__}.{name}")
    return _MODULES[name]
