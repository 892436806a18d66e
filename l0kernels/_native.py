"""The extensions of csrc, or why they are not there. What they hold is in _C.pyi and _CUDA.pyi."""

from importlib import import_module, util
from typing import Any

import torch  # before the extension: both must share torch's OpenMP runtime  # noqa: F401


def load(name: str, why_not_built: str) -> tuple[Any, str | None]:
    """Extension ``name``, or None and why."""
    if util.find_spec(name) is None:
        return None, f"{name} was not built ({why_not_built})"
    try:
        return import_module(name), None
    except ImportError as error:
        return None, f"{name} does not load: {error}"


native, why_not = load("l0kernels._C", "no C++ compiler at installation, or L0KERNELS_CPP=0")
