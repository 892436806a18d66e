"""triton_kernels/_launch.py as on a GPU, kernels only recording: what is compiled anew, and what runs."""

import pytest
import torch

pytest.importorskip("triton")

from l0kernels.triton_kernels import _launch


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


class Kernel:
    """Stands for a triton.jit function of parameters x_ptr, y_ptr, n, scale, SIZE, FLAG."""

    def __init__(self):
        self.arg_names = ["x_ptr", "y_ptr", "n", "scale", "SIZE", "FLAG"]
        self.compiled = []

    def __getitem__(self, grid):
        def call(*args, num_warps, num_stages, **constants):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_instead", None)
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    return Kernel()


def launch(kernel, x, y=None, n=5, scale=0.5, size=8, flag=True, **options):
    _launch.launch(kernel, (7, 2), x, y, n, scale, SIZE=size, FLAG=flag, **options)


def test_a_known_call_runs_what_was_compiled_with_the_addresses_of_now(kernel):
    first, second = torch.zeros(32), torch.zeros(32)
    launch(kernel, first)
    launch(kernel, second)
    assert len(kernel.compiled) == 1
    grid_stream_and_kernel = (7, 2, 1, 103, "function", "metadata", None, None, None)
    arguments = (second.data_ptr(), None, 5, 0.5, 8, True)
    assert kernel.compiled[0].runs == [grid_stream_and_kernel + arguments]


def test_whatever_the_compiler_looks_at_compiles_anew(kernel):
    x = torch.zeros(33)
    changes = (
        {"x": x.half()},
        {"x": x[1:]},  # 4 bytes off
        {"y": x},
        {"y": x[1:]},
        {"n": 16},
        {"scale": 0.25},
        {"size": 16},
        {"flag": False},
        {"num_warps": 8},
        {"num_stages": 2},
    )
    for n, change in enumerate(changes, 1):
        launch(kernel, **{"x": x, **change})
        launch(kernel, **{"x": x, **change})
        assert len(kernel.compiled) == n
        assert len(kernel.compiled[-1].runs) == 1


def test_constants_out_of_order_are_refused(kernel):
    with pytest.raises(TypeError, match=r"after 4 arguments the kernel takes \['SIZE', 'FLAG'\]"):
        _launch.launch(kernel, (1,), torch.zeros(4), None, 1, 1.0, FLAG=True, SIZE=8)
