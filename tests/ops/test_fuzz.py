"""Random calls of every operation on every backend of the CPU, the native one at each instruction set.

L0KERNELS_FUZZ_OPS=2000 makes so many of each; those of Triton and CUDA are in tests/triton and tests/cuda.
"""

import itertools

import fuzz_ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l0kernels as l0
from l0kernels import Gates
from l0kernels._arguments import ROWS
from op_checks import BACKENDS, LAYOUTS, compare, make_z, wanted

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", fuzz_ops.OPS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpp"])
def test_portable(name, backend):
    with l0.use_backend(backend):
        for seed in range(fuzz_ops.count(10)):
            fuzz_ops.check(name, seed)


@pytest.mark.parametrize("name", fuzz_ops.OPS)
def test_native(name, isa):
    for seed in range(fuzz_ops.count(6)):
        fuzz_ops.check(name, seed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    kinds=st.lists(st.sampled_from(["mixed", "open", "closed", "few", "wild", None]), min_size=3, max_size=3),
    activation=st.sampled_from(list(ROWS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    full=st.booleans(),
    value=st.integers(0, 2**31),
)
def test_chains_of_random_shapes(batch, sizes, kinds, activation, layout, full, value):
    torch.manual_seed(value)
    depth = len(sizes) - 1
    tensors, masks = {"x": LAYOUTS[layout](torch.randn(batch, sizes[0]))}, {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        n_rows = n_out * (ROWS[activation] if i + 1 < depth else 1)
        tensors[f"w{i}"] = LAYOUTS[layout](torch.randn(n_rows, n_in) / n_in**0.5)
        tensors[f"b{i}"] = torch.randn(n_rows)
        if kinds[i] is not None:
            tensors[f"z{i}"] = make_z(kinds[i], n_in)
            masks[f"z{i}"] = wanted(tensors[f"z{i}"], full)

    def call(namespace, x, **leaves):
        w, b = ([leaves[f"{name}{i}"] for i in range(depth)] for name in "wb")
        gates = [
            Gates.from_z(leaves[f"z{i}"], full_grad=full) if f"z{i}" in leaves else None for i in range(depth)
        ]
        return namespace.gated_mlp(x, w, b, gates, activation)

    for name in [n for n in ("cpp", "torch") if l0.backends()["gated_mlp"][n] == "yes"]:
        with l0.use_backend(name):
            compare(call, tensors, dtype=torch.float32, what=name, masks=masks)
