"""Runs tests with the CPU extension built for the address and undefined-behaviour sanitizers.

    python tests/support/sanitized.py [what pytest takes; default: the tests of the operations]

As a plugin of that run it stands in for l0kernels._C. A fault ends the process with a report.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "_C"
MISTAKE = """
import sanitized, sys, torch
t = torch.zeros(9)
sys.modules["l0kernels._C"].gate_grad(*[t.data_ptr()] * 3, 10, False, (2 / 3, -0.1, 1.1))
"""
TESTS = [
    "test_batch_norm.py",
    "test_budget.py",
    "test_conv2d.py",
    "test_few_channels.py",
    "test_gates.py",
    "test_linear.py",
    "test_masked_linear.py",
    "test_memory.py",
    "test_mlp.py",
    "test_narrow.py",
    "test_native.py",
    "test_penalty.py",
    "test_prox.py",
]


def sanitized_module() -> Path:
    """The extension, built anew only when a source has changed."""
    from emulator.build import CSRC, SANITIZE, compile_module

    sources = sorted(CSRC.glob("*.cpp"))
    digest = hashlib.sha256()
    for path in (*sources, *sorted(CSRC.glob("*.h")), Path(__file__)):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "sanitized" / f"{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}"
    built = list(folder.glob(f"{NAME}*.so"))
    return built[0] if built else compile_module(sources, [*SANITIZE, "-fopenmp"], folder, NAME, _compiler())


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def main() -> int:
    from emulator.build import sanitizer_libraries

    module = sanitized_module()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("L0KERNELS_")}
    environment |= {
        "LD_PRELOAD": ":".join(sanitizer_libraries(_compiler())),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "L0_SANITIZED": str(module),
        "PYTHONPATH": str(ROOT / "tests/support"),
    }
    found = subprocess.run(
        [sys.executable, "-c", MISTAKE], env=environment, capture_output=True, text=True, check=False
    )
    if "heap-buffer-overflow" not in found.stderr:
        raise RuntimeError(f"the sanitizers do not report what they are there to find:\n{found.stderr}")
    arguments = sys.argv[1:] or ["-q", *(str(ROOT / "tests/ops" / name) for name in TESTS)]
    command = [sys.executable, "-m", "pytest", "-p", "sanitized", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())

if "L0_SANITIZED" in os.environ:
    import torch  # noqa: F401  # before the extension: both must share one OpenMP runtime

    spec = importlib.util.spec_from_file_location("l0kernels._C", os.environ["L0_SANITIZED"])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["l0kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["l0kernels._C"])
