"""The CUDA kernels on a CPU: the same sources on the emulator, sanitized, threads in shuffled order."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from emulator.build import COMPILER, HERE, ROOT, built, sanitizer_libraries, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

FOLDER = Path(__file__).parent
# All but those of the emulator itself, and of the module that nvcc built.
TESTS = sorted({*FOLDER.glob("test_*.py")} - {Path(__file__), FOLDER / "test_static.py"})


@pytest.fixture(scope="session")
def emulator():
    """Folder of the emulated module."""
    return built()


def run(emulator, *arguments, seed=1):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("L0KERNELS_")}
    environment |= {
        "LD_PRELOAD": ":".join(sanitizer_libraries(COMPILER)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "L0_EMULATED_CUDA": str(emulator),
        "L0_EMULATOR_SEED": str(seed),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_kernels(emulator, seed):
    """Every test of the kernels, the threads and blocks of a kernel in another order each time."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "not TestGraph"]
    done = run(emulator, "-m", "pytest", *options, *map(str, TESTS), seed=seed)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


PRELUDE = """
    #include "cuda_emulator.h"
    #include <cstdio>
    #include <string>
    using namespace l0::emulator;
    #define SHARED(T, name) T& name = *static_cast<T*>(shared(sizeof(T), __COUNTER__))
    int out[64];
    template <typename F> int go(F f, unsigned blocks = 1, unsigned cluster = 1) {
      try { run("kernel", dim3(blocks), dim3(64), cluster, 64, f); }
      catch (const std::exception& e) { std::printf("%s\\n", e.what()); return 3; }
      return 0;
    }
"""
REVERSE = """
    struct S { int at[64]; };
    auto kernel = [] {
      SHARED(S, s);
      s.at[threadIdx.x] = threadIdx.x;
      %s
      out[threadIdx.x] = s.at[63 - threadIdx.x];
    };
    if (int error = go(kernel)) return error;
    for (int i = 0; i < 64; ++i) if (out[i] != 63 - i) return 1;
    return 0;
"""
KERNELS = {
    "barrier": REVERSE % "__syncthreads();",
    "missing_barrier": REVERSE % "",
    "barrier_that_some_threads_miss": REVERSE % "if (threadIdx.x < 40) __syncthreads();",
    "different_barriers": REVERSE
    % "if (threadIdx.x < 40) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
    "shared_memory_without_a_value": """
        auto kernel = [] { SHARED(int, s); out[threadIdx.x] = s; };
        go(kernel, 2);
        return out[5] != -1;
    """,
    "overrun_of_shared_memory": """
        auto kernel = [] { static_cast<int*>(dynamic_shared())[threadIdx.x] = 1; };
        return go(kernel);
    """,
    "cluster": """
        auto kernel = [] {
          SHARED(int, s);
          if (threadIdx.x == 0) s = 10 + int(blockIdx.x % 2);
          barrier(Scope::kCluster, 1);
          void* other = in_block_of_cluster(&s, 1 - blockIdx.x % 2);
          if (threadIdx.x == 0) out[blockIdx.x] = *static_cast<int*>(other);
          barrier(Scope::kCluster, 2);
        };
        if (int error = go(kernel, 4, 2)) return error;
        return !(out[0] == 11 && out[1] == 10 && out[2] == 11 && out[3] == 10);
    """,
    "ballot_and_shuffle": """
        auto kernel = [] {
          const unsigned bits = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
          const int neighbour = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
          out[threadIdx.x] = int(bits >> (threadIdx.x % 32) & 1u) + neighbour;
        };
        if (int error = go(kernel)) return error;
        for (int i = 0; i < 64; ++i) if (out[i] != (i % 3 == 0) + (i ^ 1)) return 1;
        return 0;
    """,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(name) -> one of KERNELS run in a process of its own; all are compiled at once."""
    folder = tmp_path_factory.mktemp("kernels")
    source, binary = folder / "kernels.cpp", folder / "kernels"
    functions = [f"int {name}() {{{textwrap.dedent(body)}}}\n" for name, body in KERNELS.items()]
    chosen = "".join(f'if (name == "{name}") return {name}();\n' for name in KERNELS)
    main = f"int main(int, char** argv) {{ const std::string name = argv[1];\n{chosen}return 99; }}\n"
    source.write_text("".join([textwrap.dedent(PRELUDE), *functions, main]))
    flags = ["-std=c++17", "-O0", "-fsanitize=address", f"-I{HERE}"]
    command = [COMPILER, *flags, str(source), str(HERE / "cuda_emulator.cpp"), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return lambda name: subprocess.run(
        [str(binary), name], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.xdist_group("emulator")
class TestTheEmulatorItself:
    """It reports what it is there to find: each of these kernels has one mistake."""

    def test_barrier(self, program):
        assert program("barrier").returncode == 0

    def test_missing_barrier(self, program):
        assert program("missing_barrier").returncode == 1

    def test_barrier_that_some_threads_miss(self, program):
        done = program("barrier_that_some_threads_miss")
        assert done.returncode == 3
        assert "a barrier that others never reach" in done.stdout

    def test_different_barriers(self, program):
        done = program("different_barriers")
        assert done.returncode == 3
        assert "different barriers" in done.stdout

    def test_shared_memory_has_no_value_at_first(self, program):
        assert program("shared_memory_without_a_value").returncode == 0

    def test_overrun_of_shared_memory(self, program):
        assert "heap-buffer-overflow" in program("overrun_of_shared_memory").stderr

    def test_cluster_reads_its_neighbour(self, program):
        assert program("cluster").returncode == 0

    def test_ballot_and_shuffle(self, program):
        assert program("ballot_and_shuffle").returncode == 0
