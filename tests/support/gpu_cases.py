"""What the tests on a GPU share: backends, gates on the device.

L0KERNELS_TEST_DEVICE=cpu runs them with the backends of the CPU, to show that the tests are right, or with
TRITON_INTERPRET=1 with Triton's interpreter.
"""

import functools
import os
import re

import pytest
import torch

from l0kernels import Gates, _registry
from l0kernels._gates import round_up

DEVICE = os.environ.get("L0KERNELS_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("triton", "cuda") if ON_GPU else ("triton",) if INTERPRETED else ("torch", "cpp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Poisoning wants deterministic algorithms, which warn of those that cuBLAS and torch lack.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


REFUSED = {
    "cuda": {
        "swiglu": "it does not serve 'swiglu'; triton does",
        "geglu": "it does not serve 'geglu'; triton does",
        "masked_linear": "it does not serve masked_linear; the triton backend does",
        "block_linear": "it does not serve block_linear; the triton backend does",
        "gated_conv2d": "it does not serve gated_conv2d; the triton backend does",
    }
}
"""What a backend does not serve, and what it says of it."""


def or_refused(argument, feature=lambda value: value):
    """Where the backend does not serve ``feature`` of an argument, the test is that it says exactly so."""

    def decorate(test):
        @functools.wraps(test)
        def run(**arguments):
            backend = _registry.requested()
            reason = REFUSED.get(backend, {}).get(feature(arguments[argument]))
            if reason is None:
                return test(**arguments)
            message = re.escape(f"backend {backend!r} cannot be used: {reason}")
            with pytest.raises(RuntimeError, match=f"^{message}$"):
                test(**arguments)

        return run

    return decorate


def on_device(value):
    """Tensors to the device in the layout that they have, through lists and dictionaries."""
    if isinstance(value, dict):
        return {name: on_device(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [on_device(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    # A copy of the whole storage: strides, offset and what lies between the elements stay.
    storage = value.detach().as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
    return storage.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())


def gates_from(z, *, plain, full=False):
    """Gates of z, packed, or plain as the sampler makes them above its share: natural order, whole extent."""
    gates = Gates.from_z(z, full_grad=full)
    if not plain or not (ON_GPU or INTERPRETED):  # the backends of the CPU know packed gates alone
        return gates
    n = z.shape[0]
    capacity = torch.full((1,), round_up(n), dtype=torch.int32, device=z.device)
    count = torch.cat([gates.count[:1], capacity])
    return Gates(z, gates.index, count, full)


def why_skip(backend):
    """The reason why a backend cannot be tested here, or None."""
    return _registry.why_not(backend)


class no_sync:
    """Within it, whatever makes the host wait for the GPU is an error."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


def capture(call):
    """(graph, what call returned), after a warm-up in a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result
