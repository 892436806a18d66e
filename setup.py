"""Decides which native extensions are built; everything else about the package is in pyproject.toml.

L0KERNELS_CPP=auto|0|1 (default auto): build l0kernels._C from csrc/ when a C++ compiler is there, never, or
fail without one. L0KERNELS_CUDA=auto|0|1: the same for l0kernels._CUDA from csrc/cuda/ and nvcc; no GPU is
needed, and TORCH_CUDA_ARCH_LIST ("8.0 9.0a 10.0+PTX") chooses what it is built for. MAX_JOBS compilers run at
once, as many as there are processors unless set. What an earlier build has left is never installed for what
this one leaves out.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

from pybind11 import get_include
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

CHOICES = {name: os.environ.get(f"L0KERNELS_{name}", "auto") for name in ("CPP", "CUDA")}
for name, choice in CHOICES.items():
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"L0KERNELS_{name} must be auto, 0 or 1, got {choice!r}")

# -fno-math-errno and -fno-trapping-math let loops vectorise without changing a result. Not -ffast-math: a NaN
# must stay a NaN, and at link time it would set flush-to-zero for the whole process.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", HOST_FLAGS]
STRICT = "-Werror all-warnings"  # of kernels; the bindings are the host compiler's, whichever it is
ARCHITECTURES = "8.0 9.0a 10.0+PTX"
BINARIES = (".so", ".pyd", ".dylib")
JOBS = int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count() or 1

WITHOUT = {
    "l0kernels._C": "CPU tensors will be computed in plain torch, which is slower. For the native kernels "
    "install a C++ compiler (Debian: apt install g++; conda: conda install gxx), then l0kernels again",
    "l0kernels._CUDA": "CUDA tensors will be computed by Triton kernels alone. For those of small layers "
    "install nvcc and ninja, then l0kernels again; L0KERNELS_CUDA=0 asks for none",
}

# nvcc lists the headers that it reads: a touched one rebuilds only what includes it.
NINJA = """\
ninja_required_version = 1.5
builddir = {folder}
rule compile
  command = {compile} $strict -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {link} $in -o $out
"""


def find_nvcc() -> str | None:
    """nvcc of CUDACXX, CUDA_HOME or the PATH, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [
        os.environ.get("CUDACXX"),
        *(f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"]),
        "nvcc",
    ]
    found = (shutil.which(path) for path in candidates if path)
    return next((path for path in found if path), None)


def gencode(nvcc: str) -> list[str]:
    """nvcc's flags for the GPUs asked for; of those taken by default, the ones this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    flags = []
    for entry in asked or ARCHITECTURES.split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0a or 10.0+PTX, got {entry!r}")
        arch = match[1] + match[2]
        if not asked and f"sm_{arch.rstrip('af')}" not in known:
            continue
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def escaped(path: Path) -> str:
    """A path as build.ninja spells it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class Build(build):
    """Starts without an earlier build's modules, and has build_ext run where there is nothing to build."""

    sub_commands: ClassVar = [(n, None if n == "build_ext" else when) for n, when in build.sub_commands]

    def run(self) -> None:
        for path in Path(self.build_lib).rglob("*"):
            if path.is_file() and path.suffix not in BINARIES:
                path.unlink()
        super().run()


class OptionalBuildExt(build_ext):
    """Leaves an extension out, with a warning, where it cannot be built and was not asked for."""

    def run(self) -> None:
        built = {ext.name for ext in self.extensions or []}
        for name in ("l0kernels._C", "l0kernels._CUDA"):
            if name not in built:
                self.remove(name)
        super().run()

    def remove(self, name: str) -> None:
        """Takes away what an earlier build has made of extension ``name`` where this one writes."""
        path = Path(*name.split("."))
        # A folder for wheels is installed whole, other Pythons' extensions with it; the sources stay theirs.
        left = [p for p in (Path(self.build_lib, path.parent)).glob(f"{path.name}.*") if p.suffix in BINARIES]
        left += [path.with_name(path.name + sysconfig.get_config_var("EXT_SUFFIX"))] if self.inplace else []
        for old in left:
            if old.exists():
                old.unlink()
                print(f"removed {old}, which an earlier build has left", file=sys.stderr)

    def build_extension(self, ext: Any) -> None:
        try:
            if ext.name == "l0kernels._CUDA":
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:  # setuptools has no common base for "no compiler" and "compiler failed"
            if not ext.optional:
                raise
            self.remove(ext.name)
            print(
                f"warning: l0kernels is installed without {ext.name}: {error}\nwarning: {WITHOUT[ext.name]}",
                file=sys.stderr,
            )

    def build_cuda(self, ext: Any) -> None:
        """nvcc run by ninja, for the bindings too; static cudart, and nothing of torch."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("no nvcc: set CUDA_HOME (L0KERNELS_CUDA=0 does without)")
        # The wheel's executable is beside this Python, which need not be in the PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        ninja = shutil.which("ninja", path=path)
        if ninja is None:
            raise RuntimeError("no ninja (pip install ninja; L0KERNELS_CUDA=0 does without)")
        architectures = gencode(nvcc)
        include = [f"-I{path}" for path in (*ext.include_dirs, get_include(), *self.include_dirs)]
        names = ",".join(sorted({flag.rpartition("=")[2] for flag in architectures}))
        define = f'-DL0_ARCHITECTURES="{names}"'
        folder, target = Path(self.build_temp) / "cuda", Path(self.get_ext_fullpath(ext.name))

        def command(*words: str) -> str:
            return shlex.join([nvcc, *words, *architectures]).replace("$", "$$")

        rules = NINJA.format(
            folder=escaped(folder),
            compile=command(*CUDA_FLAGS, *include, define),
            link=command("-shared", "-cudart", "static"),
        )
        objects = []
        for source in ext.sources:
            objects.append(escaped(folder / f"{Path(source).name}.o"))
            rules += f"build {objects[-1]}: compile {source}\n"
            rules += f"  strict = {STRICT}\n" if source.endswith(".cu") else ""
        rules += f"build {escaped(target)}: link {' '.join(objects)}\n"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        script = folder / "build.ninja"
        script.write_text(rules)
        build = [ninja, "-f", str(script), "-j", str(JOBS)]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ninja: {done.stdout}{done.stderr}")


cpp = Pybind11Extension(
    "l0kernels._C",
    sorted(glob("csrc/*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=FLAGS + OPENMP,
    extra_link_args=OPENMP,
    optional=CHOICES["CPP"] != "1",
)
cuda = Extension(
    "l0kernels._CUDA",
    sorted(glob("csrc/cuda/*.c*[up]")),
    include_dirs=["csrc", "csrc/cuda"],
    optional=CHOICES["CUDA"] != "1",
)

wanted = [cpp] if CHOICES["CPP"] != "0" else []
if CHOICES["CUDA"] == "1" or (CHOICES["CUDA"] == "auto" and sys.platform == "linux" and find_nvcc()):
    wanted.append(cuda)

ParallelCompile("MAX_JOBS", default=0).install()
setup(ext_modules=wanted, cmdclass={"build": Build, "build_ext": OptionalBuildExt})
