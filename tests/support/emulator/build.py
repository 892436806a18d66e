"""Builds the CUDA sources for the emulator: l0kernels._CUDA as a module that runs on the CPU."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
NAME = "emulated_cuda"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def sanitizer_libraries(compiler: str) -> list[str]:
    """The sanitizers' libraries, to be loaded before Python's own; mere names where there are none."""
    return [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]


def sources() -> list[Path]:
    """Every file that the module depends on."""
    suffixes = {".h", ".cuh", ".cu", ".cpp", ".py"}
    folders = (CSRC, CSRC / "cuda", HERE)
    return sorted(p for folder in folders for p in folder.iterdir() if p.suffix in suffixes)


def why_not() -> str | None:
    """Why the module cannot be built here; None if it can."""
    if not sys.platform.startswith("linux") or shutil.which(COMPILER) is None:
        return "needs g++ on Linux"
    if not all(map(os.path.isabs, sanitizer_libraries(COMPILER))):
        return f"{COMPILER} has no sanitizers"
    return None


def built() -> Path:
    """Folder of the sanitized module; built anew only when a source has changed."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulator" / f"{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}"
    if not list(folder.glob(f"{NAME}*.so")):
        build(folder, COMPILER)
    return folder


def build(folder: Path, compiler: str = "g++", sanitize: bool = True) -> Path:
    """The module compiled into ``folder``, with address and undefined-behaviour sanitizers if asked for.

    The bindings never are: they only pass arguments on, and the compiler would take longest over them.
    """
    flags = ["-ffp-contract=off", *WARNINGS, *(SANITIZE if sanitize else [])]
    flags += [f"-I{path}" for path in (CSRC / "cuda", HERE)]
    flags += ["-DL0_EMULATED", f"-DL0_MODULE={NAME}", '-DL0_ARCHITECTURES="emulated"']
    bindings = CSRC / "cuda/bindings.cpp"
    inputs = [bindings, *sorted((CSRC / "cuda").glob("*.cu")), HERE / "cuda_emulator.cpp"]
    return compile_module(inputs, flags, folder, NAME, compiler, {bindings: ["-O0", "-fno-sanitize=all"]})


def compile_module(
    inputs: list[Path],
    flags: list[str],
    folder: Path,
    name: str,
    compiler: str,
    more: Mapping[Path, list[str]] = MappingProxyType({}),
) -> Path:
    """The sources compiled, some with `more` flags, and linked to extension module ``name`` in ``folder``."""
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", *flags]
    flags += [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        own = [*flags, *more.get(source, [])]
        command = [compiler, *own, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source}:\n{done.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, inputs))
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = ["-shared", *(flag for flag in flags if flag.startswith(("-fsanitize", "-fopenmp")))]
    subprocess.run([compiler, *link, *map(str, objects), "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    if sys.argv[1:]:
        print(build(Path(sys.argv[1]), sanitize="--plain" not in sys.argv))
    else:
        print(why_not() or built())
