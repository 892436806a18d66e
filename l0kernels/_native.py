"""The extension of csrc, l0kernels._C, or why it is not there."""

from importlib import import_module, util
from typing import Any

import torch  # before the extension: both must share torch's OpenMP runtime  # noqa: F401


def _load() -> tuple[Any, str | None]:
    if util.find_spec("l0kernels._C") is None:
        return None, "l0kernels._C was not built (no C++ compiler at installation, or L0KERNELS_CPP=0)"
    try:
        return import_module("l0kernels._C"), None
    except ImportError as error:
        return None, f"l0kernels._C does not load: {error}"


native, why_not = _load()
