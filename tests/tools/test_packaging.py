"""What gets installed, what importing it does to a process, what works when optional parts are missing."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import fresh
import pytest
import torch

import l0kernels
import wheels

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")

HAS_EXTENSION = bool(list((ROOT / "l0kernels").glob("_C.*.so")))
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
PLATFORM = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
pytestmark = pytest.mark.xdist_group("packaging")  # one worker builds
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason="no l0kernels._C: built without a compiler")


def clean_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(("L0KERNELS_", "PYTHON"))}


def run_python(code, cwd, **environment):
    """stdout of `code` in a process of its own, outside the repository; fails with its stderr."""
    done = fresh.run(code, cwd, {**clean_environment(), **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel); the wheel is built from the unpacked sdist, so the sdist is known to suffice."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True, dirs_exist_ok=True)
    build("build_sdist", source, dist)
    (sdist,) = dist.glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    place = next(unpacked.iterdir())
    # What earlier builds have left, for this wheel and beside the sources, and a module that is no more.
    for folder in ("build/lib/l0kernels", f"build/lib.{PLATFORM}/l0kernels", "l0kernels"):
        (place / folder).mkdir(parents=True, exist_ok=True)
        (place / folder / f"_CUDA{SUFFIX}").write_text("left")
    (place / f"build/lib.{PLATFORM}/l0kernels/gone.py").write_text("left")
    build("build_wheel", place, dist)
    (wheel,) = dist.glob("*.whl")
    return sdist, wheel


def build(hook, cwd, dist, **environment):
    """Calls the build backend. Without a compiler it must still build, and the test stays quick."""
    code = f"import setuptools.build_meta as b; b.{hook}({str(dist)!r})"
    given = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "L0KERNELS_CUDA": "0", **environment}
    return run_python(code, cwd, **given)


def sources(folder, suffixes):
    """Files of `folder` with one of `suffixes`, relative to the repository."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_sdist_has_every_source(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = sources("csrc", {".h", ".cpp", ".cu", ".cuh"}) | sources("l0kernels", {".py", ".pyi"})
    wanted |= sources("triton_kernels", {".py"}) | {"LICENSE", "pyproject.toml", "setup.py"}
    wanted |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"}
    for folder in ("tests", "bench", "examples", "typings"):  # `make test` reads them
        wanted |= sources(folder, {".py", ".h", ".cpp", ".csv", ".pyi"})
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_sdist_runs_its_own_tests(built, tmp_path):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (place,) = tmp_path.iterdir()
    files = ["tests/reference/test_penalty.py", "tests/tools/test_nets.py", "tests/ops/test_penalty.py"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not resnet"]
    out = run_python(f"import pytest; raise SystemExit(pytest.main({[*options, *files]}))", place)
    assert " passed" in out


def test_an_extension_that_is_not_wanted_is_taken_away_from_beside_the_sources(tmp_path):
    place = tmp_path / "l0kernels"
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0"\n')
    place.mkdir()
    for name in (f"_C{SUFFIX}", f"_CUDA{SUFFIX}", "_C.other-python.so", "_C.pyi"):
        (place / name).touch()
    arguments = ["setup.py", "-q", "build_ext", "--inplace"]
    code = f"import runpy, sys; sys.argv = {arguments}; runpy.run_path('setup.py')"
    run_python(code, tmp_path, L0KERNELS_CPP="0", L0KERNELS_CUDA="0")
    assert {path.name for path in place.iterdir()} == {"_C.other-python.so", "_C.pyi"}


def test_wheel_has_every_module_and_maps_triton_kernels(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = sources("l0kernels", {".py", ".pyi"})
    modules |= {f"l0kernels/{name}" for name in sources("triton_kernels", {".py"})}
    assert modules <= names, sorted(modules - names)
    assert "l0kernels/py.typed" in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"l0kernels"}
    assert not [name for name in names if name.endswith((".h", ".cpp", ".so", "/gone.py"))]
    assert wheels.problems(wheel, ()) == []
    assert wheels.problems(wheel) == ["has the binaries [], expected those of ['_C']"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    fields = metadata.split("\n\n")[0].splitlines()
    assert f"Version: {l0kernels.__version__}" in fields
    assert "License-Expression: MIT" in fields
    required = [line.split(": ", 1)[1] for line in fields if line.startswith("Requires-Dist: ")]
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.10"]
    assert 'triton>=3.4; platform_system == "Linux" and extra == "triton"' in required


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="auditwheel is for Linux")
@needs_extension
def test_manylinux_wheel_shares_torchs_openmp_runtime(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "")}
    command = [sys.executable, str(ROOT / "tests/support/wheels.py"), "--out", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=1800)
    (wheel,) = tmp_path.glob("*.whl")
    assert "manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import torch, l0kernels as l0
with l0.use_backend("cpp"):
    l0.l0_linear(torch.ones(64, 512), torch.ones(512, 512), in_log_alpha=torch.zeros(512))
print(l0.__file__, *{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
"""
    package, *runtimes = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert Path(package).is_relative_to(tmp_path)
    assert len(runtimes) == 1, runtimes


def test_wheel_without_a_compiler_works(built, tmp_path):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import torch, l0kernels as l0, l0kernels.triton_kernels as t; print(l0.__file__); print(t.__file__);"
        "y = l0.l0_linear(torch.ones(3, 5), torch.ones(4, 5), in_log_alpha=torch.zeros(5));"
        "print(tuple(y.shape))"
    )
    package, mapped, shape = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split("\n")[:3]
    assert Path(package) == tmp_path / "site/l0kernels/__init__.py"
    assert Path(mapped) == tmp_path / "site/l0kernels/triton_kernels/__init__.py"
    assert shape == "(3, 4)"


NVCC = """
    import pathlib, subprocess, sys
    words = sys.argv[1:]
    if "--list-gpu-code" in words:
        raise SystemExit(print("sm_80 sm_90 sm_100"))
    output = pathlib.Path(words[words.index("-o") + 1])
    if "-c" in words:
        source, depfile = words[words.index("-c") + 1], words[words.index("-MF") + 1]
        if "all-warnings" not in words and source.endswith(".cu"):
            raise SystemExit("kernels are compiled without -Werror")
        include = [word for word in words if word.startswith("-I")]
        command = ["g++", "-DL0_EMULATED", "-I{emulator}", *include, "-std=c++17", "-x", "c++", source]
        subprocess.run([*command, "-MM", "-MF", depfile, "-MT", str(output)], check=True)
    output.write_text("".join(words))
    with open("{log}", "a") as log:
        log.write(output.name + "\\n")
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("g++"), reason="needs g++ on Linux"
)
class TestCudaBuild:
    """What setup.py has ninja do; a script that only names the headers it would read stands for nvcc."""

    KERNELS = ("gates", "pack", "penalty", "runtime", "small")

    @pytest.fixture
    def build(self, tmp_path):
        """Runs build_ext in a copy of the sources; all output, and what was made, in order."""
        root, log, nvcc = tmp_path / "a copy", tmp_path / "log", tmp_path / "nvcc"
        shutil.copytree(ROOT / "csrc", root / "csrc")
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root / name)
        script = textwrap.dedent(NVCC).format(emulator=ROOT / "tests/support/emulator", log=log)
        nvcc.write_text(f"#!{sys.executable}\n{script}")
        nvcc.chmod(0o755)

        def run(code="", *, succeeds=True, **environment):
            log.write_text("")
            given = {"L0KERNELS_CPP": "0", "L0KERNELS_CUDA": "1", "CUDACXX": str(nvcc), **environment}
            arguments = [
                "setup.py",
                "-q",
                "build_ext",
                f"--build-lib={root / 'lib'}",
                f"--build-temp={root / 'o'}",
            ]
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    f"import runpy, sys; sys.argv = {arguments}\n{code}\nrunpy.run_path('setup.py')",
                ],
                cwd=root,
                env=clean_environment() | given,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
            made = [name.split(".")[0] for name in log.read_text().splitlines()]
            return done.stdout + done.stderr, made

        run.root = root
        return run

    def test_only_what_includes_a_touched_header_is_built_again(self, build):
        everything = sorted(("bindings", *self.KERNELS))
        _, made = build()
        assert sorted(made[:-1]) == everything
        assert made[-1] == "_CUDA"
        assert list((build.root / "lib/l0kernels").glob("_CUDA.*"))
        assert build()[1] == []
        for header, users in (("penalty.h", ["bindings", "penalty"]), ("draw.cuh", ["gates", "small"])):
            os.utime(build.root / "csrc/cuda" / header)
            _, made = build()
            assert sorted(made[:-1]) == users
            assert made[-1] == "_CUDA"
        assert sorted(build(TORCH_CUDA_ARCH_LIST="9.0a", MAX_JOBS="1")[1][:-1]) == everything

    HIDDEN = (
        "import shutil; which = shutil.which;"
        "shutil.which = lambda name, **kwargs: None if {} in name else which(name, **kwargs)"
    )

    @pytest.mark.parametrize("tool", ["ninja", "nvcc"])
    def test_without_the_tools(self, build, tool):
        hidden = self.HIDDEN.format(repr(tool))
        output, _ = build(hidden, succeeds=False)
        assert f"RuntimeError: no {tool}" in output
        output, made = build(hidden, L0KERNELS_CUDA="auto")
        assert made == []
        assert ("warning: l0kernels is installed without l0kernels._CUDA: no ninja" in output) == (
            tool == "ninja"
        )
        assert build(hidden, L0KERNELS_CUDA="0") == ("", [])

    def test_an_error_of_the_compiler(self, build):
        (build.root / "csrc/cuda/pack.h").write_text('#include "nowhere.h"\n')
        output, _ = build(succeeds=False)
        assert "nowhere.h" in output
        output, _ = build(L0KERNELS_CUDA="auto")
        assert "installed without l0kernels._CUDA" in output
        assert "nowhere.h" in output

    def test_choices(self, build):
        assert (
            "L0KERNELS_CUDA must be auto, 0 or 1, got 'yes'" in build(L0KERNELS_CUDA="yes", succeeds=False)[0]
        )
        output, _ = build(TORCH_CUDA_ARCH_LIST="Hopper", succeeds=False)
        assert "TORCH_CUDA_ARCH_LIST: expected entries like 9.0a or 10.0+PTX, got 'Hopper'" in output


def test_import_from_another_directory(tmp_path):
    out = run_python("import l0kernels, l0kernels.triton_kernels as t; print(t.__name__)", tmp_path)
    assert out.strip() == "l0kernels.triton_kernels"


def test_triton_kernels_refuses_the_bare_name(tmp_path):
    code = (
        "try:\n    import triton_kernels\n"
        "except ImportError as error:\n    print(error)\n"
        "else:\n    raise SystemExit('imported under the bare name')"
    )
    assert "import l0kernels.triton_kernels" in run_python(code, tmp_path, PYTHONPATH=str(ROOT))


def test_import_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import l0kernels, l0kernels.nn, l0kernels.reference, l0kernels.triton_kernels\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = set(run_python(code, tmp_path).split())
    assert "l0kernels" in loaded
    heavy = {"triton", "numpy", "matplotlib", "scipy", "sklearn", "tqdm", "setuptools", "sympy", "networkx"}
    assert not loaded & heavy


def test_import_loads_little_of_torch_and_collects_nothing(tmp_path):
    code = """
import gc, sys, torch
before, collected = set(sys.modules), []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
import l0kernels
more = sorted(name for name in set(sys.modules) - before if not name.startswith("l0kernels"))
print(more, 2 in collected, gc.isenabled(), "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""
    assert run_python(code, tmp_path).strip() == "['torch.nn.utils.prune'] False True False False"


TRAIN_STEP = """
import torch, l0kernels as l0
x, weight, bias = torch.randn(7, 13), torch.randn(5, 13, requires_grad=True), torch.zeros(5)
log_alpha = torch.zeros(13, requires_grad=True)
with l0.use_backend({backend!r}):
    l0.l0_linear(x, weight, bias, in_log_alpha=log_alpha, seed=torch.tensor([3])).square().sum().backward()
assert weight.grad.abs().sum() > 0 and log_alpha.grad.abs().sum() > 0
"""


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_works_without_triton_and_extension(tmp_path, backend):
    block = "import sys; sys.modules['triton'] = sys.modules['l0kernels._C'] = None\n"
    run_python(block + TRAIN_STEP.format(backend=backend), tmp_path)


def test_missing_extension_is_named_and_never_replaced_silently(tmp_path):
    code = (
        "import sys; sys.modules['l0kernels._C'] = None\n"
        "import torch, l0kernels as l0\nprint(l0.backends())\n"
        "try:\n    with l0.use_backend('cpp'):\n"
        "        l0.l0_linear(torch.randn(2, 3), torch.randn(4, 3), in_log_alpha=torch.zeros(3))\n"
        "except RuntimeError as error:\n    assert 'cpp' in str(error), error\n"
        "else:\n    raise SystemExit('the missing backend was replaced silently')"
    )
    assert "cpp" in run_python(code, tmp_path)


MAIN = "import runpy; runpy.run_module('l0kernels', run_name='__main__')"


def test_main_says_in_a_line_what_is_used_and_how_to_get_more(tmp_path):
    out = run_python(MAIN, tmp_path)
    for word in (l0kernels.__version__, torch.__version__, "reference", "torch", "cpp"):
        assert word in out
    assert out.startswith(f"Used here: {'native kernels' if HAS_EXTENSION else 'plain torch'}")
    out = run_python(f"import sys; sys.modules['l0kernels._C'] = None; {MAIN}", tmp_path)
    assert out.startswith("Used here: plain torch on the CPU")
    assert "To get more: install a C++ compiler and install l0kernels again" in out.splitlines()[0]
    asked = run_python(MAIN, tmp_path, L0KERNELS_BACKEND="torch").splitlines()[0]
    assert "L0KERNELS_BACKEND asks for 'torch' everywhere" in asked


def test_main_into_a_pipe_that_closes(tmp_path):
    command = f"'{sys.executable}' -m l0kernels | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("Used here: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_checkout_that_hides_the_installed_package_is_named(built, tmp_path):
    _, wheel = built
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.copytree(ROOT / "l0kernels", checkout / "l0kernels", ignore=shutil.ignore_patterns("*.so"))
    (checkout / "setup.py").touch()
    code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n{MAIN}"
    first, second = run_python(code, checkout, PYTHONPATH=f"{checkout}:{site}").splitlines()[:2]
    assert "To get more: leave this folder (see below)" in first
    assert second.startswith(
        f"This is {checkout}/l0kernels, which hides the installed package in {site}/l0kernels"
    )
    # The reason stands wherever the extension is missed, too.
    asked = code.replace(MAIN, "import l0kernels as l0\nwith l0.use_backend('cpp'): pass")
    with pytest.raises(AssertionError, match=f"is not in {checkout}/l0kernels, which hides the installed"):
        run_python(asked, checkout, PYTHONPATH=f"{checkout}:{site}")
    alone = code.replace(MAIN, "import l0kernels as l0; print(l0.backends()['sample']['cpp'])")
    assert "`pip install -e .` in the checkout builds it" in run_python(
        alone, checkout, PYTHONPATH=str(checkout)
    )


FIRST_OPERATION = """
import sys, warnings
sys.modules["l0kernels._C"] = None
import torch, l0kernels as l0
def draw():
    return l0.sample_gates(torch.zeros(3)), l0.l0_linear(torch.ones(2, 3), torch.ones(4, 3))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {code}
print(*(f"{{w.filename}}:{{w.message}}" for w in caught), sep="\\n")
"""


@pytest.mark.parametrize("code", ["draw(); draw()", "with l0.use_backend('torch'): draw()"])
def test_plain_torch_in_place_of_the_extension_warns_once(tmp_path, code):
    asked = "use_backend" in code
    said = run_python(FIRST_OPERATION.format(code=code), tmp_path).strip().splitlines()
    assert len(said) == (0 if asked else 1)
    if said:
        assert said[0].startswith("<string>:l0kernels computes CPU tensors in plain torch, which is slower: ")
        assert "L0KERNELS_BACKEND=torch" in said[0]
    assert not run_python(FIRST_OPERATION.format(code="draw()"), tmp_path, L0KERNELS_BACKEND="torch").strip()


@needs_extension
def test_extension_keeps_denormals(tmp_path):
    # A shared object linked with -ffast-math sets flush-to-zero for the whole process when it is loaded.
    code = (
        "import torch, l0kernels._C\n"
        "assert (torch.tensor([1e-40]) * torch.ones(1)).item() != 0, 'float32 denormals are flushed'\n"
        "assert float('1e-310') * float('1') != 0, 'float64 denormals are flushed'"
    )
    run_python(code, tmp_path)


@needs_extension
def test_native_kernels_run_on_torchs_thread_team(tmp_path):
    # A second OpenMP runtime would start a team of its own, and the two teams spin against each other.
    code = """
import os, torch, l0kernels as l0
torch.set_num_threads(2)
x, weight = torch.randn(512, 512), torch.randn(512, 512)
def threads(): return len(os.listdir("/proc/self/task"))
alone = threads()
with l0.use_backend("cpp"):
    l0.l0_linear(x, weight, in_log_alpha=torch.zeros(512))
native = threads()
weight @ x
torch.relu(torch.randn(1 << 20))
print(alone, native, threads())
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/task")
    alone, native, both = map(int, run_python(code, tmp_path).split())
    assert native == alone + 1, "the native product did not start one helper thread"
    assert both == native, "torch and the extension run separate OpenMP teams"


@needs_extension
def test_openmp_symbols_are_torchs(tmp_path):
    # scikit-learn and others map copies of libgomp too; what counts is whose symbols the extension calls.
    code = """
import ctypes, torch, l0kernels._C
address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    low, high = (int(part, 16) for part in line.split()[0].split("-"))
    if low <= address < high:
        print(line.split()[-1])
"""
    owner = Path(run_python(code, tmp_path).strip())
    site = Path(torch.__file__).resolve().parent
    shipped = [*site.glob("lib/libgomp*"), *site.parent.glob("torch.libs/libgomp*")]
    if not shipped:
        pytest.skip("this torch uses the system's libgomp")
    assert owner.resolve() in {path.resolve() for path in shipped}
