"""What the operations compute: every formula dense, in plain torch, on any device and in any float dtype.

Same names and signatures as the public package, differentiable by autograd. Imports only torch, and the
types and checks that every backend shares.
"""

from .._gates import ALIGN, Gates, HardConcrete
from . import budget as budget
from . import prox
from .attention import gated_attention
from .batch_norm import gated_batch_norm
from .conv2d import gated_conv2d
from .convolution import gated_convolution
from .counts import (
    conv_expected_flops,
    conv_expected_params,
    conv_output_size,
    linear_expected_flops,
    linear_expected_params,
)
from .gates import eval_gates, sample_gates, sample_gates_per_example
from .linear import gated_linear, l0_linear
from .masked_linear import masked_linear
from .mlp import gated_mlp, l0_mlp
from .norm import gated_group_norm, gated_layer_norm, gated_rms_norm
from .penalty import l0_penalty, l2_penalty
from .philox import philox4x32, uniform

__all__ = [
    "ALIGN",
    "Gates",
    "HardConcrete",
    "conv_expected_flops",
    "conv_expected_params",
    "conv_output_size",
    "eval_gates",
    "gated_attention",
    "gated_batch_norm",
    "gated_conv2d",
    "gated_convolution",
    "gated_group_norm",
    "gated_layer_norm",
    "gated_linear",
    "gated_mlp",
    "gated_rms_norm",
    "l0_linear",
    "l0_mlp",
    "l0_penalty",
    "l2_penalty",
    "linear_expected_flops",
    "linear_expected_params",
    "masked_linear",
    "philox4x32",
    "prox",
    "sample_gates",
    "sample_gates_per_example",
    "uniform",
]
