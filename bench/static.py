"""Shows what the compiler makes of every Triton kernel; needs no GPU. Compiles each variant of
static_cases.py for the chips that launch it and prints registers, spilled bytes, shared memory and the
counts of the instructions that decide its speed; exit status 1 if one of them is not as it must be."""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cli
import triton
from static_cases import ARCHS, Variant, variants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l0kernels.triton_kernels._launch import options_of

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one block may ask for (CUDA C++ programming guide, technical specifications)."""
EXPECTATIONS = ("tensor_core", "mma", "wide_copy", "wide_load")
COUNTED = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "cp16": r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, 0x10\b",
    "cp_less": r"\bcp\.async\.c[ag]\.shared\.global(?![^;]*?, 0x10\b)",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "ld16": r"\bld\.global(?:\.\w+)*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)\b",
    "ld2": r"\bld\.global(?:\.(?!v\d)\w+)*\.[bfu]16\b",
}
"""PTX instructions by column: 16-byte and narrower asynchronous copies, 16-byte and 2-byte loads."""


@dataclass(frozen=True)
class Report:
    """What became of one variant on one chip; `error` is empty where it compiled."""

    name: str
    arch: int
    error: str = ""
    regs: int = 0
    stack: int = 0  # spills go there
    local: int = 0
    shared: int = 0
    wgmma: int = 0
    mma: int = 0
    tcgen05: int = 0
    cp16: int = 0
    cp_less: int = 0
    tma: int = 0
    ld16: int = 0
    ld2: int = 0


@cache
def modules() -> list[str]:
    """The kernel modules of l0kernels.triton_kernels."""
    return sorted({name.partition("/")[0] for name in variants()})


@cache
def variants_of(module: str) -> dict[str, Variant]:
    """Those of one module, by name."""
    return {name: variant for name, variant in variants().items() if name.partition("/")[0] == module}


class Job(NamedTuple):
    module: str
    variant: str
    arch: int


def jobs(archs: Iterable[int] = ARCHS, module: str | None = None) -> Iterator[Job]:
    for name in [module] if module else modules():
        for variant in variants_of(name).values():
            yield from (Job(name, variant.name, arch) for arch in archs if arch in variant.archs)


def source(variant: Variant) -> ASTSource:
    """The arguments of triton.compile; ValueError unless each argument of the kernel is named once."""
    arguments = variant.kernel.arg_names
    given = [*variant.signature, *variant.constexprs]
    if sorted(given) != sorted(arguments):
        raise ValueError(f"{variant.name}: arguments must be {sorted(arguments)}, got {sorted(given)}")
    signature, attrs = {}, {}
    for i, argument in enumerate(arguments):
        kind, _, divisor = variant.signature.get(argument, "constexpr").partition(":")
        signature[argument] = kind
        if divisor:
            attrs[(i,)] = [["tt.divisibility", int(divisor)]]
    return ASTSource(variant.kernel, signature, dict(variant.constexprs), attrs)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the kernel in a cubin, the largest of its functions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found: dict[str, int] = {}
    for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout):
        found[key] = max(int(value), found.get(key, 0))
    if found.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage printed no resources: {done.stdout}{done.stderr}")
    return found


def inspect(variant: Variant, arch: int) -> Report:
    """Compiles one variant for one chip; what the compiler refuses is in the report, not raised."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **options_of(variant.kernel)}
    try:
        kernel: Any = triton.compile(source(variant), target=GPUTarget("cuda", arch, 32), options=options)
        used = resources(kernel.asm["cubin"])
    except Exception as error:  # Triton raises whatever its passes raise; each counts as a failure here
        return Report(variant.name, arch, f"{type(error).__name__}: {error}"[:2000] or repr(error))
    counts = {column: len(re.findall(pattern, kernel.asm["ptx"])) for column, pattern in COUNTED.items()}
    shared = max(kernel.metadata.shared, used["SHARED"])
    return Report(variant.name, arch, "", used["REG"], used["STACK"], used["LOCAL"], shared, **counts)


def inspect_job(job: Job) -> Report:
    return inspect(variants_of(job.module)[job.variant], job.arch)


def problems(report: Report, expects: Iterable[str]) -> list[str]:
    """What is wrong with a compiled variant, in words; empty where nothing is."""
    if report.error:
        return [f"does not compile: {report.error}"]
    found = []
    if report.shared > SHARED_LIMIT[report.arch]:
        limit = SHARED_LIMIT[report.arch]
        found.append(f"asks for {report.shared} bytes of shared memory, sm_{report.arch} has {limit}")
    if report.stack or report.local:
        found.append(f"spills: {report.stack} bytes of stack, {report.local} of local memory")
    any_mma = report.wgmma + report.mma + report.tcgen05
    # Hopper's older mma.sync reaches some 60 % of wgmma; a B200 runs either.
    present = {
        "tensor_core": report.wgmma if report.arch == 90 else any_mma,
        "mma": any_mma,
        "wide_copy": report.cp16 + report.tma,
        "wide_load": report.ld16,
    }
    found += [f"has no {expected} instruction" for expected in expects if not present[expected]]
    return found


class Compiler:
    """Compiles jobs in processes of its own, in the order of submission."""

    def __init__(self, processes: int | None = None) -> None:
        self._pool = ProcessPoolExecutor(
            processes or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
        )
        self._futures: dict[Job, Future[Report]] = {}

    def submit(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if job not in self._futures:
                self._futures[job] = self._pool.submit(inspect_job, job)

    def report(self, job: Job) -> Report:
        self.submit([job])
        return self._futures[job].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "static.py --arch 90 --module matmul")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--module", help="only this one of triton_kernels")
    parser.add_argument("--filter", default="", help="only variants whose name holds this")
    args = parser.parse_args(argv)
    if args.module and args.module not in modules():
        parser.error(f"--module: expected one of {', '.join(modules())}, got {args.module}")
    wanted = [job for job in jobs(args.arch, args.module) if args.filter in job.variant]
    columns = [field.name for field in fields(Report) if field.name not in ("name", "arch", "error")]
    width = max([len(job.variant) for job in wanted], default=0) + 2
    print("variant".ljust(width), "sm ", *(column.rjust(7) for column in columns), " problems")
    compiler, bad = Compiler(), 0
    try:
        compiler.submit(wanted)
        for job in wanted:
            report = compiler.report(job)
            wrong = problems(report, variants_of(job.module)[job.variant].expects)
            bad += bool(wrong)
            figures = (str(getattr(report, column)).rjust(7) for column in columns)
            print(report.name.ljust(width), f"{report.arch:3d}", *figures, "", "; ".join(wrong), flush=True)
    finally:
        compiler.close()
    print(f"{len(wanted)} compiled, {bad} with problems")
    return int(bad > 0)


if __name__ == "__main__":
    cli.run(main)
