"""Where the CUDA kernels run in these tests: on the GPU, or on the emulator beside this file on the CPU."""

import importlib
import os
import sys

import torch

from l0kernels.impl import cuda

EMULATED = os.environ.get("L0_EMULATED_CUDA")
"""Folder of the emulated module; cuda/test_emulated.py builds it and sets this in a process of its own."""

if EMULATED:
    sys.path.insert(0, EMULATED)
    cuda._CUDA = importlib.import_module("emulated_cuda")
    cuda._CUDA.emulator_seed(int(os.environ.get("L0_EMULATOR_SEED", "1")))

DEVICE = "cpu" if EMULATED else "cuda"
RUNS = bool(EMULATED) or (torch.cuda.is_available() and cuda.why_not() is None)
EMULATOR = cuda._CUDA if EMULATED else None
