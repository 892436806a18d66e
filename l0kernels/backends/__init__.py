"""Implementations of the operators in _ops.py, one module per backend; all have the same functions.

cpp      native kernels on raw addresses; 16-bit products go through packed.py
torch    packed.py over torch's own index_select, mm and index_copy
packed   the compositions pack -> product -> unpack, for either of the two pairs of pack and unpack
"""

from types import ModuleType

from .._registry import native


def module(name: str) -> ModuleType:
    """The module of backend ``name``, "cpp" or "torch"."""
    return _MODULES[name]


from . import torch as _torch  # noqa: E402

_MODULES: dict[str, ModuleType] = {"torch": _torch}
if native is not None:
    from . import cpp as _cpp

    _MODULES["cpp"] = _cpp
