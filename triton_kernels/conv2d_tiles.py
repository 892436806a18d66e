"""The tiles of gated_conv2d's products."""

from __future__ import annotations

from typing import NamedTuple

import torch

from l0kernels._calls import Conv2dCall

from .matmul import precision

_VEC = 8  # strides of operands come in units of 8 elements: copies stay wide for 8, 24, 40... channels, too
_ANY = [
    "images",
    "H",
    "W",
    "OH",
    "OW",
    "KH",
    "KW",
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dilation_h",
    "dilation_w",
    "step_y",
    "step_x",
    "rows",
    "programs",
    "capacity",
]
"""Numbers that change no instruction worth a compilation of its own."""


class Window(NamedTuple):
    """The sizes of a convolution in the order in which its kernels take them: of x, of y, of the taps."""

    images: int
    H: int
    W: int
    OH: int
    OW: int
    KH: int
    KW: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int

    @property
    def rows(self) -> int:
        """Pixels of y."""
        return self.images * self.OH * self.OW

    @property
    def turned(self) -> Window:
        """x and y change roles: that of the gradient of x."""
        images, h, w, oh, ow, *rest = self
        return Window(images, oh, ow, h, w, *rest)


def window(call: Conv2dCall) -> Window:
    """The window of a call."""
    images, _, h, w = call.x.shape
    _, _, kh, kw = call.weight.shape
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = call.stride, call.padding, call.dilation
    oh = (h + 2 * pad_h - dilation_h * (kh - 1) - 1) // stride_h + 1
    ow = (w + 2 * pad_w - dilation_w * (kw - 1) - 1) // stride_w + 1
    return Window(images, h, w, oh, ow, kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)


class Config(NamedTuple):
    """A tile and how it is computed; its columns halve LEVELS - 1 times where the open channels end."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    LEVELS: int
    num_warps: int
    num_stages: int
    CTAS: int = 1
    """Programs per multiprocessor."""


def choose(N: int, K: int, gated: bool, dtype: torch.dtype, capability: int) -> Config:
    """The tile of a product with N columns, K channels a tap (``gated``: how many the device decides)."""
    if dtype == torch.float32:
        fast = precision(dtype) == "tf32"
        block_k = 32 if fast and K > 16 else 16
        if not fast or capability < 90:
            return Config(64, 64, block_k, 2, 8, 3)
        return Config(128, 128, block_k, 3, 8, 3) if N > 64 else Config(128, 64, block_k, 2, 4, 3)
    # A chunk that straddles the open channels multiplies zeros: narrower ones where few are expected.
    block_k = 16 if K <= 16 else 32 if K <= 32 or K % 64 or (gated and K < 512) else 64
    stages = 4 if block_k < 64 or capability < 90 else 3
    if capability < 90:
        return Config(128, 128, 32 if K > 16 else 16, 3, 8, 3) if N > 64 else Config(64, 32, 16, 1, 4, 3)
    if N > 128 and capability < 100:
        return Config(128, 256, block_k, 3, 8, stages)
    if N > 64 and capability < 100:
        return Config(128, 128, block_k, 3, 8, stages)
    if N > 32:
        return Config(128 if capability < 100 else 64, 64, block_k, 2, 4, stages)
    return Config(128, 32, block_k, 1, 4, stages)


def choose_dw(N: int, K: int, dtype: torch.dtype, capability: int) -> Config:
    """The tile of a weight gradient of N outputs and K inputs; BLOCK_K counts rows."""
    if dtype == torch.float32:
        return Config(64, 64, 32 if precision(dtype) == "tf32" else 16, 2, 4, 3)
    if capability < 90:
        return Config(64, 64, 32, 2, 4, 3)
    if K > 128 and N > 64 and capability < 100:
        return Config(128, 256, 32, 3, 8, 4)  # with 64 rows a step the addresses spill
    block_n, levels = (128, 3) if K > 64 else (64, 2)
    return Config(128, block_n, 64, levels, 8, 3) if N > 64 else Config(64, block_n, 64, levels, 4, 3)
