"""What of torch is private, each name once, and where torch's own operations need help.

The names are torch's functions themselves, so that a call costs no more than torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # noqa: F401  no public base has all three
from torch.nn.modules.conv import _ConvNd as AnyConv  # noqa: F401  the base of Conv1d and Conv2d
from torch.nn.modules.instancenorm import _InstanceNorm as AnyInstanceNorm  # noqa: F401
from torch.utils import _pytree as pytree  # noqa: F401  the values in whatever holds them
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as mode_stack  # noqa: F401

# What surrounds a call: asked for on every one, before anything else.
tracing_state: Any = torch._C._get_tracing_state
"""What torch.jit.trace records into, or None: torch.jit.is_tracing in a third of its time."""
functorch_active: Any = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is at work; torch has no public question."""
count_modes: Any = torch._C._len_torch_dispatch_stack
"""How many dispatch modes (make_fx, fake tensors, counters) look on: mode_stack without making its list."""
dispatch_key_included: Any = torch._C._dispatch_tls_is_dispatch_key_included
VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
"""The key of a backward of several gradients at once, torch.autograd's, not torch.func's; its name would be
looked up for 3 us."""


def register_fake(library: torch.library.Library, name: str, fake: Any) -> None:
    """torch.library.register_fake for ``name`` of l0kernels, without a search for the caller's source."""
    holder = torch._library.simple_registry.singleton.find(f"l0kernels::{name}").fake_impl
    library._registration_handles.append(holder.register(fake, "l0kernels", lib=library))


def fake_mode() -> Any:
    """The FakeTensorMode at work, or None, without importing it."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def running_function(frame: Any) -> type[torch.autograd.Function] | None:
    """The torch.autograd.Function whose forward runs in `frame` or around it, or None."""
    kinds, classes = {}, [torch.autograd.Function]
    for cls in classes:
        classes += cls.__subclasses__()
        kinds[getattr(cls.forward, "__code__", None)] = cls
    while frame is not None:
        if frame.f_code in kinds:
            return kinds[frame.f_code]
        frame = frame.f_back
    return None


def break_graph(why: str) -> None:
    """Has Dynamo go on in eager mode from here; with fullgraph=True its error says why."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=f"l0kernels: {why}")


graph_task: Any = torch._C._current_graph_task_id
"""The backward pass that this thread runs (-1: none): who draws in one computes a checkpoint again."""
current_node: Any = torch._C._current_autograd_node
"""The node of the graph that this thread's backward pass runs, None: none."""
after_backward: Any = torch.autograd.Variable._execution_engine.queue_callback
"""Calls a function at the end of the backward pass that runs; hooks of tensors end too soon."""
operator_names: Any = torch._C._dispatch_get_all_op_names
"""Of every library: those of l0kernels are found there, not listed a second time."""

unwrap_if_dead: Any = torch._C._functorch.unwrap_if_dead
"""The tensor in a wrapper that outlived its transform of torch.func, or the tensor itself."""


@functools.cache
def direct_apply(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` of eager mode without its look for transforms and defaults: 4 us instead of 7."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The address of a device's current stream; torch.cuda.current_stream makes an object around it."""
unsafe_view: Any = torch.ops.aten._unsafe_view.default
"""A view that autograd takes for none, so that the result of an operator may be changed in place: no copy."""

# Functions of torch as a tensor's __torch_function__ meets them.
function_homes: Any = (torch._C._nn, torch._C._VariableFunctions)
"""Where those are that torch and torch.nn.functional only hand on."""
view_as_subclass: Any = Tensor._make_subclass
"""(class, data): an instance on the memory of a tensor, in no graph of autograd; as_subclass adds a node."""
without_torch_function: Any = torch._C.DisableTorchFunctionSubclass
"""Within it a subclass of Tensor is what torch's own code sees."""

shares_memory: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
"""Whether two tensors lie in one storage."""

# Lists of tensors, a call for all of them instead of a launch for each.
foreach_add_: Any = torch._foreach_add_
foreach_mul: Any = torch._foreach_mul
foreach_copy_: Any = torch._foreach_copy_
foreach_clamp_min_: Any = torch._foreach_clamp_min_
foreach_clamp_max_: Any = torch._foreach_clamp_max_


def settled(x: Tensor, groups: int, stride: Sequence[int]) -> Tensor:
    """x (N, C, ...) in strides that torch's convolution of this stride reads right.

    A single channel may have any stride. Where that is one of channels_last images, oneDNN reads beyond rows
    of which the convolution makes one number each. A single image may have any batch stride. Where that is a
    view's and channels come last, in x and in the weight, torch gets the gradient of a grouped weight wrong.
    """
    if torch.compiler.is_compiling():
        return x
    if x.ndim > 3 and x.shape[1] == 1 and stride[-1] > 1:
        x = x.squeeze(1).unsqueeze(1)
    if groups == 1 or x.ndim != 4 or x.shape[0] != 1:
        return x
    if x.is_contiguous() or x.stride(0) == x.numel():
        return x
    return x.clone(memory_format=torch.contiguous_format)


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The products with weight and bias of no channel at all, which torch's batch_norm refuses to see."""
    for t in (weight, bias):
        x = x if t is None else (x * t.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)
    return x


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch's batch_norm for any number of forwards before a backward, any strides, and no channel at all."""
    if x.shape[1] == 0:
        return affine(x, weight, bias)
    eager = not torch.compiler.is_compiling() and tracing_state() is None
    if running_mean is not None and running_var is not None and eager:
        if training:
            # Autograd keeps them though backward does not read them, and another forward changes them.
            running_mean, running_var = running_mean.data, running_var.data
        elif torch.is_grad_enabled():  # here backward reads them
            running_mean, running_var = running_mean.clone(), running_var.clone()
    one_image = x.shape[0] == 1 and x.stride(0) != x.numel()
    if (one_image or 1 in x.shape[2:]) and not x.is_contiguous():
        # A view may have any stride where there is one. torch's backward takes that for what tells channels
        # last from channels first, and then mixes up the channels of x and of dy.
        x = x.contiguous()
    if not training and running_mean is not None and running_var is not None:  # which it reads as if dense
        running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
    return torch.nn.functional.batch_norm(
        x,
        running_mean,
        running_var,
        None if weight is None else weight.contiguous(),
        bias,
        training,
        momentum,
        eps,
    )
