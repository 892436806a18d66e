"""Variants of every Triton kernel compile for their chips, fit, spill nothing, have what is expected of them.

Each is compiled for sm_90. Of those meant for all chips the first of a kernel is compiled for all, the others
in turn for sm_80 or sm_100: `make static` compiles everything. Without `-m long` each kernel has so many
variants on sm_90 that every type, flag and expectation is in one, and its first on one other chip.
"""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import static
import triton
import triton.language as tl
from static_cases import ARCHS, Variant, variants

from l0kernels.triton_kernels import _launch


def _traits(variant):
    types = {kind.split(":")[0] for kind in variant.signature.values()}  # "*bf16:16": 16 is what divides it
    flags = {(k, c) for k, c in variant.constexprs.items() if c is None or isinstance(c, (bool, str))}
    return types | flags | set(variant.expects)


def _jobs():
    """Every job, by kernel and chip, with its variant's traits."""
    jobs = defaultdict(list)
    for module in static.modules():
        turns = Counter()
        for name, variant in static.variants_of(module).items():
            kernel = variant.kernel.__name__
            turn = turns[kernel]
            turns[kernel] += 1
            archs = (90, (80, 100)[turn % 2]) if turn and variant.archs == ARCHS else variant.archs
            for arch in archs:
                jobs[module, kernel, arch].append((static.Job(module, name, arch), _traits(variant)))
    return jobs


def _few(jobs):
    """So many of them that no trait is missing, those that bring most first."""
    missing, found = set().union(*(traits for _, traits in jobs)), []
    while missing:
        job, traits = max(jobs, key=lambda entry: len(entry[1] & missing))
        found.append(job)
        missing -= traits
    return found


BY_KERNEL = _jobs()
JOBS = sorted(
    (job for jobs in BY_KERNEL.values() for job, _ in jobs), key=lambda job: (job.module, job.arch != 90)
)
KERNELS = [*dict.fromkeys((module, kernel) for module, kernel, _ in BY_KERNEL)]
SHORT = {job for key, jobs in BY_KERNEL.items() if key[2] == 90 for job in _few(jobs)}
SHORT |= {BY_KERNEL[(*kernel, (80, 100)[i % 2])][0][0] for i, kernel in enumerate(KERNELS)}
LONG = pytest.mark.long


def _id(job):
    return f"{job.variant}-sm{job.arch}"


@pytest.fixture(scope="module")
def report_of(request):
    """What becomes of a job: all selected are compiled ahead, in the order of the tests, on all cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the cores have a process each, and the tests are dealt out
        yield static.inspect_job
        return
    compiler = static.Compiler()
    selected = (getattr(item, "callspec", None) for item in request.session.items)
    compiler.submit(spec.params["job"] for spec in selected if spec and "job" in spec.params)
    yield compiler.report
    compiler.close()


@pytest.mark.parametrize("job", [j if j in SHORT else pytest.param(j, marks=LONG) for j in JOBS], ids=_id)
def test_variant(report_of, job):
    expects = static.variants_of(job.module)[job.variant].expects
    assert set(expects) <= set(static.EXPECTATIONS)
    report = report_of(job)
    assert not static.problems(report, expects), report


def test_every_kernel_is_compiled_for_every_chip():
    assert set(BY_KERNEL) == {(*kernel, arch) for kernel in KERNELS for arch in ARCHS}
    assert set(static.jobs([90])) <= set(JOBS)
    short = {key for key, jobs in BY_KERNEL.items() if any(job in SHORT for job, _ in jobs)}
    assert all(sum((*kernel, arch) in short for arch in ARCHS) == 2 for kernel in KERNELS)
    assert {job.arch for job in SHORT} == set(ARCHS)


def test_every_kernel_that_is_launched_has_a_case():
    sources = "".join(path.read_text() for path in Path(_launch.__file__).parent.glob("*.py"))
    launched = set(re.findall(r"\blaunch\(\s*(\w+),", sources))
    assert {variant.kernel.__name__ for variant in variants().values()} == launched


def test_every_module_has_variants_for_hopper():
    assert static.modules()
    for name in static.modules():
        variants = static.variants_of(name).values()
        assert all(variant.archs and set(variant.archs) <= set(ARCHS) for variant in variants), name
        assert any(90 in variant.archs for variant in variants), name


# What the checks above can see, shown on kernels made for it.


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs)
        b = tl.load(b_ptr + offs[:, None] * K + k + offs)
        acc = tl.dot(a, b.T, acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs, acc)


@triton.jit
def _gathered(a_ptr, index_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(c_ptr + offs, tl.load(a_ptr + tl.load(index_ptr + offs)))


@triton.jit
def _broken(a_ptr):
    tl.store(a_ptr, undefined_name)  # noqa: F821


def product(kind="*bf16:16", block=64, expects=("tensor_core", "wide_copy"), k="i32:16", **options):
    signature = {"a_ptr": kind, "b_ptr": kind, "c_ptr": "*fp32:16", "K": k}
    return Variant(
        "toy/product", _product, signature, {"BLOCK": block}, expects=frozenset(expects), **options
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_product_has_its_instructions(arch):
    report = static.inspect(product(num_stages=3), arch)
    assert static.problems(report, ("tensor_core", "wide_copy", "mma")) == []
    assert (report.wgmma > 0) == (arch == 90)
    assert (report.mma > 0) == (arch == 80)
    assert 0 < report.shared <= static.SHARED_LIMIT[arch]
    assert 0 < report.regs <= 255
    assert report.cp16 > 0
    assert report.cp_less == 0


def test_products_without_tensor_cores_or_wide_copies_are_caught():
    narrow = static.inspect(product(block=32), 90)  # too small a tile for wgmma
    assert static.problems(narrow, ("tensor_core",)) == ["has no tensor_core instruction"]
    assert static.problems(narrow, ("mma",)) == []
    unaligned = static.inspect(product("*bf16", k="i32"), 90)
    assert unaligned.ld2 > 0
    assert static.problems(unaligned, ("wide_copy",)) == ["has no wide_copy instruction"]


def test_spills_and_too_much_shared_memory_are_caught():
    spilling = static.inspect(product(block=128, num_warps=1), 80)
    found = static.problems(spilling, ())
    assert any(problem.startswith("spills") for problem in found), spilling
    greedy = static.inspect(product(block=128, num_stages=9, num_warps=8), 90)
    assert [problem.partition(" ")[0] for problem in static.problems(greedy, ())] == ["asks"], greedy


def test_wide_and_narrow_loads_are_told_apart():
    signature = {"a_ptr": "*bf16:16", "index_ptr": "*i32:16", "c_ptr": "*bf16:16"}
    report = static.inspect(Variant("toy/gathered", _gathered, signature, {"BLOCK": 1024}), 90)
    assert report.ld16 > 0  # the index
    assert report.ld2 == 8  # what it points to: 1024 elements, 128 threads
    assert static.problems(report, ("wide_load",)) == []


def test_what_does_not_compile_is_a_report():
    report = static.inspect(Variant("toy/broken", _broken, {"a_ptr": "*fp32"}, {}), 90)
    assert "undefined_name" in report.error
    assert static.problems(report, ())[0].startswith("does not compile")
    unnamed = static.inspect(Variant("toy/unnamed", _gathered, {"a_ptr": "*bf16"}, {"BLOCK": 16}), 90)
    assert "arguments must be" in unnamed.error
