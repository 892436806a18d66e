"""Random calls of every operation on every backend of the CPU, the native one at each instruction set.

L0KERNELS_FUZZ_OPS=2000 makes so many of each; those of Triton and CUDA are in tests/triton and tests/cuda.
"""

import fuzz_ops
import pytest

import l0kernels as l0
from op_checks import BACKENDS

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
