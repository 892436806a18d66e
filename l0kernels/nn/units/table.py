"""What torch's functions do to units, by kind; a function that stands nowhere here is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._compat import function_homes

Function = Callable[..., Any]

POINTWISE = """
    abs acos alpha_dropout asinh atan bernoulli bfloat16 bool celu ceil clamp clamp_max clamp_min clip clone
    contiguous cos cosh cpu cuda deg2rad detach double dropout elu erf exp expm1 feature_alpha_dropout
    feature_dropout fix float floor frac gelu half hardshrink hardsigmoid hardswish hardtanh int isfinite
    isinf isnan leaky_relu log1p logical_not logsigmoid long mish nan_to_num neg negative positive pow
    __pow__ __rpow__ relu relu6 round rrelu selu sgn sigmoid sign silu sin sinh softplus softshrink softsign
    square tan tanh tanhshrink threshold to trunc type type_as zeros_like ones_like empty_like rand_like
    randn_like full_like requires_grad_ masked_fill nan_to_num dropout1d dropout2d dropout3d zero
"""
"""Each element by itself; value and derivative are finite where it is 0."""

ELEMENTWISE = """
    add sub subtract rsub mul multiply lerp addcmul where maximum minimum fmax fmin
    copysign eq ne lt le gt ge equal_ greater greater_equal less less_equal not_equal logical_and logical_or
    logical_xor __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor __add__ __radd__ __iadd__ __sub__
    __rsub__ __isub__ __mul__ __rmul__ __imul__
"""
"""Operands that meet element by element."""

SUMS = "add sub subtract rsub lerp __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__"
"""Those of them that make a residual stream of two branches."""

QUOTIENTS = "div divide true_divide floor_divide addcdiv __truediv__ __itruediv__ __div__ remainder fmod"
"""Not finite where the second operand is 0: that may have no units."""

MOVES = """
    view reshape flatten unflatten ravel permute transpose swapaxes swapdims swapaxes t adjoint movedim
    moveaxis squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile chunk split
    split_with_sizes tensor_split hsplit vsplit dsplit unbind narrow select index_select __getitem__ cat
    concat concatenate stack hstack vstack dstack roll flip fliplr flipud rot90 view_as reshape_as tril triu
    diagonal pixel_unshuffle channel_shuffle native_channel_shuffle unfold_ data
"""
"""What moves elements and changes none."""

REDUCTIONS = (
    "mean sum amax amin max min var std norm prod nanmean nansum logsumexp median all any std_mean var_mean"
)
OVER = "softmax log_softmax softmin cumsum cumprod normalize"
"""Functions along given dimensions, which those of units may not be among."""

SPATIAL = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    interpolate upsample upsample_nearest upsample_bilinear grid_sample max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices
"""
"""Of each channel by itself, over the dimensions behind."""

RECURRENT = "rnn_tanh rnn_relu gru lstm rnn_tanh_cell rnn_relu_cell gru_cell lstm_cell"
SEQUENCES = "_pack_padded_sequence _pad_packed_sequence"
"""What torch.nn.utils.rnn calls to leave out padding, and to put it back."""

LOOKS = """
    size dim numel nelement ndimension stride is_contiguous is_floating_point is_complex element_size
    get_device storage_offset __len__ is_nonzero_ is_conj is_inference is_same_size data_ptr_ untyped_storage_
    type_ result_type can_cast is_pinned is_signed dense_dim sparse_dim numpy_ is_shared has_names_ __hash__
    __repr__ __format__ register_hook retain_grad _is_view requires_grad
"""
"""What looks at no value."""


_FIRST = ("condition", "input", "tensors", "tensor", "self")


def by_position(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a function of torch whose first one may be given by name: no rule asks for that."""
    name = None if args else next((name for name in _FIRST if name in kwargs), None)
    if name is None:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def _homes() -> list[Any]:
    return [torch, Tensor, F, *function_homes, torch.special]


def functions(names: str | Iterable[str], in_place: bool = True) -> list[Function]:
    """torch's functions and methods of these names, their forms in place among them."""
    found = []
    homes = [(home, vars(home) if isinstance(home, ModuleType) else None) for home in _homes()]
    for name in names.split() if isinstance(names, str) else names:
        forms = [name, f"{name}_"] if in_place and not name.startswith("__") else [name]
        for home, members in homes:
            for form in forms:
                # torch's own search for a name that it lacks takes long.
                value = getattr(home, form, None) if members is None else members.get(form)
                if callable(value):
                    found.append(value)
                elif home is Tensor and value is not None:  # an attribute
                    found.append(value.__get__)
    return found
