"""Every public call on the backends of the CPU; tests/triton and tests/cuda have the others."""

import ast
import inspect

import pytest
import torch
from call_table import CALLS, FUNCTIONS, check

import l0kernels as l0
from l0kernels import _ops, _registry, conv2d, linear, mlp
from l0kernels._native import native

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
    "pack_channels": {"triton"},
    "unpack_channels": {"triton"},
    "batch_norm_forward": {"triton"},
    "batch_norm_backward": {"triton"},
    "attention_forward": {"triton"},
    "attention_backward": {"triton"},
    "l0_linear_forward": {"cpp", "triton", "cuda"},  # of these, draws_within says where
    "l0_mlp_forward": {"cpp", "triton", "cuda"},
    "l0_mlp_backward": {"cpp", "triton", "cuda"},
    "prox": {"cpp", "triton"},
    "convolution": {"torch", "cpp"},  # the exact ones
    "coupled_penalty": {"torch", "cpp", "cuda"},
    "coupled_penalty_grad": {"torch", "cpp", "cuda"},
    **{
        name: {"torch", "cpp", "triton"}
        for name in (
            "block_linear_forward",
            "block_linear_backward",
            "conv2d_forward",
            "conv2d_backward",
            "conv2d_saved_shapes",
            "conv2d_memory_format",
            "masked_weight",
            "masked_weight_grad",
        )
    },
}
"""What only some backends are asked for; all others, all of them."""


def test_every_backend_has_what_it_is_asked_for():
    from l0kernels import batch_norm

    names = set().union(*map(asked_of, (_ops, conv2d, batch_norm, linear, mlp)))
    assert {"sample", "gate_grad", "l0_mlp_forward", "batch_norm_backward"} <= names
    assert {"linear_saved_shapes", "mlp_saved_shapes", "draws_within"} <= names
    assert set(ONLY) <= names
    backends = ["torch", "triton", "cuda", *(["cpp"] if native is not None else [])]
    if "not installed" in (_registry.why_not("triton") or ""):
        backends.remove("triton")
    for backend in backends:
        for name in names:
            if backend in ONLY.get(name, backends):
                assert callable(getattr(_ops.module(backend), name, None)), f"{backend} has no {name}"


def _eight_bits(name):
    """A call with ``name`` in eight bits."""
    x, w, image, kernel = (
        torch.zeros(4, 8),
        torch.zeros(5, 8),
        torch.zeros(2, 4, 5, 5),
        torch.zeros(3, 4, 1, 1),
    )
    alpha, gates = torch.zeros(8), l0.Gates.from_z(torch.ones(4))
    x, w, image, kernel = (t.to(torch.float8_e4m3fn) for t in (x, w, image, kernel))
    return {
        "gated_linear": lambda: l0.gated_linear(x, w),
        "l0_linear": lambda: l0.l0_linear(x, w, in_log_alpha=alpha),
        "gated_mlp": lambda: l0.gated_mlp(x, [w], [None], [None]),
        "l0_mlp": lambda: l0.l0_mlp(x, [w], [None], [alpha]),
        "masked_linear": lambda: l0.masked_linear(x, w, None, torch.zeros(5, 8)),
        "gated_conv2d": lambda: l0.gated_conv2d(image, kernel),
        "packed_conv2d": lambda: l0.packed_conv2d(image, kernel, out_gates=l0.Gates.from_z(torch.ones(3))),
        "pack_channels": lambda: l0.pack_channels(image, gates),
        "gated_batch_norm": lambda: l0.gated_batch_norm(image, None, None, training=True, gates=gates),
        "gated_layer_norm": lambda: l0.gated_layer_norm(x, x.shape[-1]),
        "gated_rms_norm": lambda: l0.gated_rms_norm(x, x.shape[-1]),
        "gated_group_norm": lambda: l0.gated_group_norm(image, 2, gates=gates),
        "gated_attention": lambda: l0.gated_attention(image, image, image),
        "l2_penalty": lambda: l0.l2_penalty(w),
        "L0Linear": lambda: l0.nn.L0Linear(8, 5)(x),
        "L0MLP": lambda: l0.nn.L0MLP([8, 5])(x),
        "L0Conv2d": lambda: l0.nn.L0Conv2d(4, 3, 1)(image),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in FUNCTIONS if n not in ("sample_gates", "eval_gates", "l0_penalty")),
        "pack_channels",
        "L0Linear",
        "L0MLP",
        "L0Conv2d",
    ],
)
@pytest.mark.parametrize("chosen", ["reference", "torch", *(["cpp"] if native is not None else [])])
def test_eight_bits_are_refused(name, chosen):
    message = (
        r"^(x|q|weights?(\[0\])?) must be float32, float64, bfloat16 or float16, got torch.float8_e4m3fn"
    )
    with l0.use_backend(chosen), pytest.raises(TypeError, match=message):
        _eight_bits(name)()


@pytest.mark.parametrize("chosen", ["reference", "torch", *(["cpp"] if native is not None else [])])
def test_gates_of_one_draw_have_one_dtype(chosen):
    a, b = torch.zeros(3), torch.zeros(4, dtype=torch.float64)
    message = "must have the dtype of .*, torch.float32, got torch.float64"
    with l0.use_backend(chosen):
        with pytest.raises(TypeError, match=f"^out_log_alpha {message}"):
            l0.l0_linear(torch.zeros(2, 3), torch.zeros(4, 3), in_log_alpha=a, out_log_alpha=b)
        with pytest.raises(TypeError, match=message):
            l0.l0_mlp(torch.zeros(2, 3), [torch.zeros(4, 3), torch.zeros(1, 4)], [None] * 2, [a, b])
