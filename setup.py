"""Decides whether the native extension is built; everything else about the package is in pyproject.toml.

L0KERNELS_CPP=auto|0|1 (default auto): build l0kernels._C from csrc/ when a C++ compiler is there, never, or
fail without one.
"""

import os
import sys
from glob import glob
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("L0KERNELS_CPP", "auto")
if CHOICE not in ("auto", "0", "1"):
    raise SystemExit(f"L0KERNELS_CPP must be auto, 0 or 1, got {CHOICE!r}")

# -fno-math-errno and -fno-trapping-math let loops vectorise without changing a result. Not -ffast-math: a NaN
# must stay a NaN, and at link time it would set flush-to-zero for the whole process.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class OptionalBuildExt(build_ext):
    """Leaves the extension out, with a warning, where it cannot be built and was not asked for."""

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # setuptools has no common base for "no compiler" and "compiler failed"
            if CHOICE == "1":
                raise
            print(f"warning: l0kernels is installed without its native kernels: {error}", file=sys.stderr)
            print(
                "warning: torch's own operations will be used; python -m l0kernels shows what is there",
                file=sys.stderr,
            )


extension = Pybind11Extension(
    "l0kernels._C",
    sorted(glob("csrc/*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=FLAGS + OPENMP,
    extra_link_args=OPENMP,
    optional=CHOICE != "1",
)

ParallelCompile("L0KERNELS_BUILD_JOBS", default=0).install()
setup(ext_modules=[] if CHOICE == "0" else [extension], cmdclass={"build_ext": OptionalBuildExt})
