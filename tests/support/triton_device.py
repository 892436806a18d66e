"""Where the Triton kernels run in these tests: on the GPU, or under Triton's interpreter on the CPU."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = INTERPRETED or torch.cuda.is_available()
"""False: neither a GPU nor TRITON_INTERPRET=1; tests/conftest.py then leaves these tests out."""

# tl.dot in bfloat16 is wrong under the interpreter (Triton 3.6): half precision stands in for it there.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
