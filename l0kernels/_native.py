"""The extensions of csrc, or why they are not there. What they hold is in _C.pyi and _CUDA.pyi."""

import sys
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch  # before the extension: both must share torch's OpenMP runtime  # noqa: F401

HERE = Path(__file__).resolve().parent


def hidden_package() -> Path | None:
    """The folder of another l0kernels in sys.path, which this one hides: as a rule, the installed one."""
    for entry in sys.path:
        folder = Path(entry, "l0kernels").resolve()
        if folder != HERE and (folder / "__init__.py").is_file():
            return folder
    return None


def why_not_there(name: str, why_not_built: str) -> str:
    """Why module ``name`` of this package is not there."""
    hidden = hidden_package()
    if hidden is not None:
        return (
            f"{name} is not in {HERE}, which hides the installed package in {hidden}: Python looks into the "
            "folder of the script, or the current one, first. Start it elsewhere, or `pip install -e .` here"
        )
    if (HERE.parent / "setup.py").is_file():
        why_not_built += "; `pip install -e .` in the checkout builds it"
    return f"{name} was not built ({why_not_built})"


def load(name: str, why_not_built: str) -> tuple[Any, str | None]:
    """Extension ``name``, or None and why."""
    if util.find_spec(name) is None:
        return None, why_not_there(name, why_not_built)
    try:
        return import_module(name), None
    except ImportError as error:
        return None, f"{name} does not load: {error}"


native, why_not = load("l0kernels._C", "no C++ compiler at installation, or L0KERNELS_CPP=0")
