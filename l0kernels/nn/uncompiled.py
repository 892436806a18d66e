"""What torch.compile leaves alone. A module of its own, to be imported where something is compiled: what its
decorator needs takes a second to import."""

from collections.abc import Callable

import torch


@torch.compiler.disable
def uncompiled(call: Callable[[], None]) -> None:
    """Calls it."""
    call()
