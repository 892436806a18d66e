"""python -m l0kernels: versions, devices and which backend implements what."""

import platform

import torch

import l0kernels as l0
from l0kernels._native import native


def main() -> None:
    print(f"l0kernels {l0.__version__}, torch {torch.__version__}, python {platform.python_version()}")
    print(f"cpu: {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}")
    if native is not None:
        print(
            f"native kernels: {native.isa()}, built with {native.compiler}"
            f"{'' if native.openmp else ', no OpenMP'}"
        )
    for i in range(torch.cuda.device_count()):
        print(f"cuda:{i}: {torch.cuda.get_device_name(i)}")
    print()
    print(l0.backends())


if __name__ == "__main__":
    main()
