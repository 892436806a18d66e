"""python -m l0kernels: what computes on this machine and how to get more, in a line; then the details."""

import os
import platform
import sys

import torch

import l0kernels as l0
from l0kernels import _native, _registry

AGAIN = "install l0kernels again (pip install --force-reinstall --no-deps)"


def on_cpu() -> tuple[str, str | None]:
    """What computes tensors on the CPU, and how to get more."""
    if _native.native is not None:
        return f"native kernels ({_native.native.isa()}) on the CPU", None
    if _native.hidden_package() is not None:
        return "plain torch on the CPU", "leave this folder (see below)"
    return "plain torch on the CPU", f"install a C++ compiler and {AGAIN}"


def on_gpu() -> tuple[str, str | None]:
    """What computes tensors on a GPU, and how to get more."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and os.path.exists("/proc/driver/nvidia"):
            return "nothing on the GPU", "install a CUDA build of torch"
        return "no CUDA device", None
    has = [name for name in ("triton", "cuda") if _registry.why_not(name) is None]
    if not has:
        return "dense torch on the GPU", "pip install triton"
    names = {"triton": "Triton", "cuda": "CUDA"}
    what = f"{' and '.join(names[name] for name in has)} kernels on the GPU"
    if "triton" not in has:
        return what, "pip install triton"
    if "cuda" not in has:
        return what, f"for faster small layers install nvcc and ninja and {AGAIN}"
    return what, None


def summary() -> str:
    """The line that comes first."""
    (cpu, more_cpu), (gpu, more_gpu) = on_cpu(), on_gpu()
    asked = _registry.requested()
    used = f"{cpu}, {gpu}" + (f"; L0KERNELS_BACKEND asks for {asked!r} everywhere" if asked else "")
    more = "; ".join(filter(None, (more_cpu, more_gpu)))
    return f"Used here: {used}. {f'To get more: {more}' if more else 'Nothing is missing'}."


def main() -> None:
    print(summary())
    hidden = _native.hidden_package()
    if hidden is not None:
        print(
            f"This is {_native.HERE}, which hides the installed package in {hidden}: Python looks into the "
            "current folder first. Start it in another folder, or `pip install -e .` here."
        )
    print()
    print(f"l0kernels {l0.__version__}, torch {torch.__version__}, python {platform.python_version()}")
    print(f"cpu: {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}")
    native = _native.native
    if native is not None:
        openmp = "" if native.openmp else ", no OpenMP"
        print(f"native kernels: {native.isa()}, built with {native.compiler}{openmp}")
    for i in range(torch.cuda.device_count()):
        print(f"cuda:{i}: {torch.cuda.get_device_name(i)}")
    print()
    print(l0.backends())


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
