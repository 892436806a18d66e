"""Every public call on the backends of the CPU; others: test_triton_calls.py and test_cuda_kernels.py."""

import ast
import inspect

import pytest
import torch
from call_table import CALLS, FUNCTIONS, check

import l0kernels as l0
from l0kernels import _ops, _registry, conv2d
from l0kernels._registry import native

pytestmark = pytest.mark.usefixtures("poison")


def test_the_table_has_every_public_function():
    functions = {name for name in l0.__all__ if inspect.isfunction(getattr(l0, name))}
    functions -= {"backends", "use_backend", "pack_channels", "unpack_channels"}
    assert set(FUNCTIONS) == functions


@pytest.mark.parametrize("name", CALLS)
def test_call(name, backend):
    assert check(name, backend) is None


@pytest.mark.parametrize("name", ["sample_gates one", "l0_linear in", "l0_mlp relu 1", "gated_conv2d both"])
def test_call_in_float64(name, backend):
    torch.set_default_dtype(torch.float64)
    try:
        assert check(name, backend) is None
    finally:
        torch.set_default_dtype(torch.float32)


def asked_of(module):
    """Names that ``module`` asks a backend's module for: ``module(...).NAME``."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Name) and called.id == "module":
                names.add(node.attr)
    return names


ONLY = {
    "saved_shapes": {"triton"},
    "linear_saved_shapes": {"triton"},
    "conv2d_saved_shapes": {"triton"},
    "pack_channels": {"triton"},
    "unpack_channels": {"triton"},
    "batch_norm_forward": {"triton"},
    "batch_norm_backward": {"triton"},
    "_fused": {"cpp"},
    "draws_within": {"cpp", "triton"},
    "l0_linear_forward": {"cpp", "triton", "cuda"},  # of these, draws_within says where
    "l0_mlp_forward": {"cpp", "triton", "cuda"},
    "l0_mlp_backward": {"cpp", "triton", "cuda"},
    "coupled_penalty": {"torch", "cpp", "cuda"},
    "coupled_penalty_grad": {"torch", "cpp", "cuda"},
    **{
        name: {"torch", "cpp", "triton"}
        for name in (
            "block_linear_forward",
            "block_linear_backward",
            "conv2d_forward",
            "conv2d_backward",
            "masked_weight",
            "masked_weight_grad",
        )
    },
}
"""What only some backends are asked for; all others, all of them."""


def test_every_backend_has_what_it_is_asked_for():
    from l0kernels import batch_norm

    names = set().union(*map(asked_of, (_ops, conv2d, batch_norm)))
    assert {"sample", "gate_grad", "l0_mlp_forward", "batch_norm_backward"} <= names
    assert set(ONLY) <= names
    backends = ["torch", "triton", "cuda", *(["cpp"] if native is not None else [])]
    if _registry.why_not("triton") == "the package triton is not installed":
        backends.remove("triton")
    for backend in backends:
        for name in names:
            if backend in ONLY.get(name, backends):
                assert callable(getattr(_ops.module(backend), name, None)), f"{backend} has no {name}"
