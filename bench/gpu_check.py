"""Runs everything that needs a GPU: tests, sanitizers, timings, the example (`make gpu-check`). It takes
the machine's own Python, no network and no installed package: a temporary folder maps the checkout to
`l0kernels`. Each part is a process of its own with a time limit; what fails is named and the rest goes
on. Rows go to bench/results/<device>.csv as they are measured, the log to <device>.log beside it, both
also to --out. When --budget-s is over, parts are dropped by name."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import NamedTuple

import cli
from cuda_sanitize import TOOLS
from rows import results_of

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 840.0
WORKERS = 16
BROKEN = 3  # as in run.py
# Tests poison memory by way of deterministic algorithms, for which cuBLAS wants a workspace of fixed size.
TEST_ENV = {
    "OMP_NUM_THREADS": "2",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONHASHSEED": "0",  # every worker lists the same tests
    "COLUMNS": "220",  # of pytest's summary
}
GRACE_S = 6.0  # from the interrupt to the kill
WARM = ("ffn", "linear", "chain", "block", "lenet5")  # ops whose kernels compile beside the tests
TAIL = 40  # lines of a failed process in the log; details.txt has all
NEED_NO_GPU = ("cuda/test_emulated.py", "*/test_static*.py")

ENVIRONMENT = """
import json, os, platform
facts = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
try:
    import torch
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count}
        facts["memory_gib"] = round(p.total_memory / 2**30)
except ImportError as error:
    facts["torch"] = f"missing: {error}"
names = "l0kernels triton numpy pytest xdist pybind11 ninja mlxtend tqdm matplotlib".split()
for name in names:
    try:
        facts[name] = getattr(__import__(name), "__version__", "there")
    except ImportError:
        facts[name] = "missing"
print(json.dumps(facts))
"""


def make_site(root: Path, site: Path) -> Path:
    """A folder for PYTHONPATH in which `import l0kernels` finds the checkout, its triton_kernels too."""
    package = site / "l0kernels"
    package.mkdir(parents=True)
    for entry in sorted((root / "l0kernels").iterdir()):
        if entry.name != "__pycache__" and entry.suffix != ".so":  # an extension was built for another Python
            (package / entry.name).symlink_to(entry)
    (package / "triton_kernels").symlink_to(root / "triton_kernels")
    return site


class Done(NamedTuple):
    code: int | None  # None: out of time
    output: str
    seconds: float


def call(command: Sequence[str | Path], limit_s: float, env: dict[str, str], cwd: Path) -> Done:
    """Runs a command in a process group of its own, which is killed when its time is up."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)  # pytest still reports what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return Done(code, output.read(), time.monotonic() - start)


class Log:
    """Lines to the terminal and to files, as they come; whole outputs to details.txt in `out`."""

    def __init__(self, out: Path, paths: Sequence[Path]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._details = out / "details.txt"
        self._paths = list(paths)

    def add(self, path: Path) -> None:
        self._paths.append(path)

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        for path in self._paths:
            with path.open("a", errors="replace") as file:
                file.write(text + "\n")

    def details(self, title: str, done: Done) -> None:
        with self._details.open("a", errors="replace") as file:
            file.write(f"\n===== {title}: exit {done.code} after {done.seconds:.0f} s\n")
            file.write(done.output[-300_000:] + "\n")

    def tail(self, done: Done) -> None:
        for line in done.output.strip().splitlines()[-TAIL:]:
            self(f"    {line[:300]}")


@dataclass
class Check:
    """What the parts share."""

    args: argparse.Namespace
    log: Log
    out: Path
    site: Path
    work: Path  # scratch
    deadline: float
    csv: Path
    facts: dict[str, object] = field(default_factory=dict)
    built: bool = False  # whether the extensions were, in part or in vain
    reserved_s: float = 0.0  # for the parts that come after the one that runs
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def share(self) -> float:
        """What a part may use of the time that is left."""
        return self.left - self.reserved_s

    def env(self, **more: str) -> dict[str, str]:
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "L0KERNELS_COMMIT": self.args.commit,
            **more,
        }
        env.pop("TRITON_INTERPRET", None)
        if self.args.dry:
            env["OMP_NUM_THREADS"] = "1"  # on tiny shapes threads only wait for each other
        return env

    def fail(self, what: str) -> None:
        self.failures.append(what)
        self.log(f"  FAILED {what}")

    def run(self, what: str, command: Sequence[str | Path], limit_s: float, last: int = 1000) -> Done:
        """Runs Python with these arguments; the `last` lines of what it prints go into the log."""
        done = call([sys.executable, *command], limit_s, self.env(), self.work)
        self.log.details(what, done)
        for line in done.output.strip().splitlines()[-last:]:
            if not line.endswith(": first call"):
                self.log(f"  {line[:500]}")
        if done.code != 0:
            ended = "out of time" if done.code is None else f"exit {done.code}"
            self.fail(f"{what}: {ended} after {done.seconds:.0f} s")
        return done

    def copy_results(self) -> None:
        for path in sorted(self.csv.parent.glob(f"{self.csv.stem}*")):
            if path.suffix in (".csv", ".svg") and path.parent != self.out:
                shutil.copy(path, self.out / path.name)


def profile_of(csv: Path) -> Path:
    return csv.with_name(f"{csv.stem}-ncu.csv")


# ---- the parts


def environment(check: Check) -> None:
    done = call([sys.executable, "-c", ENVIRONMENT], 90, check.env(), check.work)
    check.log.details("environment", done)
    try:
        check.facts = json.loads(done.output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        check.fail("environment: no facts")
        check.log.tail(done)
    check.log("  " + ", ".join(f"{name} {value}" for name, value in check.facts.items()))
    for name in ("pytest", "xdist", "pybind11", "mlxtend", "tqdm", "matplotlib", "ninja"):
        if check.facts.get(name) == "missing":
            check.log(f"  no {name}: what needs it is skipped by name")
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        done = call(["nvidia-smi", query, "--format=csv,noheader"], 30, check.env(), check.work)
        check.log(f"  nvidia-smi: {done.output.strip()}")
    check.run("python -m l0kernels", ["-m", "l0kernels"], 90)


class Counts(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self._asdict().items())


def read_pytest(output: str) -> tuple[dict[str, Counts], list[str]]:
    """Counts by file and the tests that were running at the end, from what pytest -v -n says as it goes."""
    counts: dict[str, Counts] = {}
    running: dict[str, None] = {}
    for line in output.splitlines():
        match = re.match(r"(?:\[gw\d+\] \[ *\d+%\] (\w+) |(ERROR) )?\S*?tests/(\w+/\w+\.py)(?:::(.+))?", line)
        if match is None:
            continue
        verdict, collecting, file, name = match.groups()
        if name is not None and not collecting:
            test = f"{file}::{name.strip()}"
            if verdict is None:
                running[test] = None
            else:
                running.pop(test, None)
        if verdict or (collecting and name is None):
            kind = {"PASSED": "passed", "SKIPPED": "skipped", "XFAIL": "skipped"}.get(verdict, "failed")
            before = counts.get(file, Counts())
            counts[file] = before._replace(**{kind: getattr(before, kind) + 1})
    return counts, list(running)


def run_tests(check: Check, limit_s: float) -> Done:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rfEs",
        "--tb=short",
        "-n",
        str(WORKERS),
    ]
    command += ["--durations=20", "--continue-on-collection-errors", "-m", "", "-p", "no:cacheprovider"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-o", "filterwarnings=default"]
    command += [f"--ignore-glob={ROOT}/tests/{name}" for name in NEED_NO_GPU]
    command += [ROOT / "tests" / name for name in ("gpu", "triton", "cuda")]
    # In the mapped folder, so that python -m does not find the checkout's own l0kernels first.
    return call(command, limit_s, check.env(**TEST_ENV), check.site)


def report_tests(check: Check, done: Done) -> None:
    check.log.details("pytest", done)
    counts, running = read_pytest(done.output)
    for file, of_file in sorted(counts.items()):
        check.log(f"  {file}: {of_file}")
        if of_file.failed:
            check.fail(f"tests {file}: {of_file.failed} of {sum(of_file)}")
    # The slowest tests and pytest's summary: what failed and why, what was skipped and why.
    _, slowest, end = done.output.partition("= slowest 20 durations")
    lines = [line for line in end.splitlines()[1:] if line and not line.startswith("=")]
    for line in lines[:60]:
        check.log(f"    {line[:220]}")
    if len(lines) > 60:
        check.log(f"    and {len(lines) - 60} more in details.txt")
    if done.code is None:
        check.fail(f"tests: out of time, at {', '.join(running)[:2000]}")
    elif done.code not in (0, 1):
        check.fail(f"tests: exit {done.code}")
    if not slowest:
        check.log.tail(done)
    total = Counts(*map(sum, zip(*counts.values(), strict=True)))
    check.log(f"  TESTS: {total}, {done.seconds:.0f} s")


def build(check: Check, limit_s: float) -> Done:
    """The native extensions into the mapped folder; where there is an nvcc, that of CUDA must succeed."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={check.site}", f"--build-temp={check.work / 'build'}"]
    arch = str(check.facts.get("capability", "9.0"))
    more = {"TORCH_CUDA_ARCH_LIST": "9.0a" if arch == "9.0" else arch}
    more["L0KERNELS_CUDA"] = "1" if shutil.which("nvcc") else "auto"
    return call(command, limit_s, check.env(L0KERNELS_CPP="auto", **more), ROOT)


def libraries(check: Check) -> list[str]:
    return sorted(path.name for path in (check.site / "l0kernels").glob("_C*.so"))


def has_cuda(check: Check) -> bool:
    return any(name.startswith("_CUDA.") for name in libraries(check))


def report_build(check: Check, done: Done) -> None:
    check.built = True
    check.log.details("build", done)
    found = libraries(check)
    check.log(f"  native extensions: {', '.join(found) or 'none'}, {done.seconds:.0f} s")
    missing = [n for n in ("_C", "_CUDA") if not any(library.startswith(f"{n}.") for library in found)]
    for name in missing:
        check.fail(f"build of {name}: {'out of time' if done.code is None else f'exit {done.code}'}")
    if missing:
        check.log.tail(done)


def can_run_cuda(check: Check, what: str) -> bool:
    """Whether there are CUDA kernels to run, built now if no part has done so."""
    if "device" not in check.facts:
        check.log(f"  {what}: skipped, no CUDA device")
        return False
    if not check.built:
        report_build(check, build(check, check.share))
    if not has_cuda(check):
        check.fail(f"{what}: _CUDA is not built")
    return has_cuda(check)


def tests(check: Check) -> None:
    """Parity, no host sync, CUDA graphs, once csrc is built; the bench's kernels compile beside them."""
    missing = [name for name in ("pytest", "xdist") if check.facts.get(name) == "missing"]
    if missing:
        check.fail(f"tests: skipped, no {', '.join(missing)}")
        return
    limit_s = min(check.args.tests_s, check.share - GRACE_S)
    end = time.monotonic() + limit_s
    with ThreadPoolExecutor(len(WARM)) as pool:
        warm = {pool.submit(warm_up, check, op, limit_s): op for op in WARM}
        report_build(check, build(check, limit_s))
        report_tests(check, run_tests(check, end - time.monotonic()))
        for warmed in as_completed(warm):
            done = warmed.result()
            check.log.details(f"warm {warm[warmed]}", done)
            check.log(f"  kernels of {warm[warmed]}: exit {done.code} after {done.seconds:.0f} s")


def bench_command(check: Check, part: str, budget_s: float) -> list[str | Path]:
    script = ROOT / "bench" / ("micro.py" if part == "micro" else "run.py")
    command: list[str | Path] = [script, "--csv", check.csv, "--budget-s", f"{budget_s:.0f}"]
    if part != "micro":
        command += ["--op", part]
    return [*command, "--device", "cpu", "--quick"] if check.args.dry else [*command, "--device", "cuda"]


def warm_up(check: Check, op: str, limit_s: float) -> Done:
    command = [sys.executable, *bench_command(check, op, limit_s), "--warm"]
    return call(command, limit_s, check.env(), check.work)


def retry_options(done: Done, without: list[str]) -> list[str] | None:
    """The options of another attempt at a part that lost the GPU or hung; None if there is no telling why."""
    broken = re.search(r"BROKEN by (\S+):", done.output)
    if broken and broken[1].startswith("mode-"):
        return ["--modes", "eager"] if broken[1] == "mode-graph" else None
    name = broken[1] if broken else None
    if name is None and done.code is None:
        last = done.output.strip().splitlines()[-1:] or [""]
        hung = re.fullmatch(r"\s*(\S+): first call", last[0])
        name = hung[1] if hung else None
    if name is None:
        return None
    without.append(name)
    return ["--without", *without]


def bench(part: str, limit_s: float) -> Callable[[Check], None]:
    def run(check: Check) -> None:
        without: list[str] = []
        options: list[str] = []
        end = time.monotonic() + min(limit_s, check.share)
        for _ in range(3):
            seconds = end - time.monotonic()
            if seconds < 10:
                break
            done = check.run(f"bench {part}", [*bench_command(check, part, seconds - 8), *options], seconds)
            check.copy_results()
            if done.code == 0:
                return
            more = retry_options(done, without)
            if more is None:
                return
            options = more
            check.log(f"  again with {' '.join(options)}")

    return run


def sanitize(check: Check) -> None:
    """compute-sanitizer's tools over every CUDA kernel, all at once."""
    if not can_run_cuda(check, "sanitize"):
        return
    limit_s = min(80.0, check.share)
    script = ROOT / "bench" / "cuda_sanitize.py"
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        runs = []
        for tool in TOOLS:
            command: list[str | Path] = [script, "--tool", tool, "--limit-s", f"{limit_s - 4:.0f}"]
            runs.append(pool.submit(check.run, f"sanitize {tool}", command, limit_s))
        for run in as_completed(runs):
            run.result()


def ncu(check: Check) -> None:
    """Nsight Compute's figures of the CUDA kernels, if time and permissions allow."""
    if not can_run_cuda(check, "ncu"):
        return
    limit_s = check.share - GRACE_S
    script = ROOT / "bench" / "cuda_ncu.py"
    command: list[str | Path] = [sys.executable, script, profile_of(check.csv)]
    command += ["--limit-s", f"{limit_s:.0f}"]
    done = call(command, limit_s, check.env(), check.work)
    check.log.details("ncu", done)
    check.copy_results()
    if done.code is None or "TimeoutExpired" in done.output:
        check.log("  ncu: dropped, time is up")
    elif done.code != 0:
        check.fail(f"ncu: exit {done.code}")
        check.log.tail(done)
    else:
        check.log(
            f"  ncu: {max(len(done.output.strip().splitlines()) - 1, 0)} launches, {done.seconds:.0f} s"
        )


def example(check: Check) -> None:
    """A few epochs of the example on the GPU: on the digits, and on MNIST if its files are at hand."""
    missing = [name for name in ("tqdm", "matplotlib") if check.facts.get(name) == "missing"]
    if missing:
        check.log(f"  example: skipped, no {', '.join(missing)}")
        return
    device = "cpu" if check.args.dry else "cuda"
    script: list[str | Path] = [ROOT / "examples" / "train_lenet300.py", "--device", device]
    runs: list[tuple[str, list[str | Path]]] = []
    if check.facts.get("mlxtend") == "missing":
        check.log("  digits: skipped, no mlxtend")
    else:
        runs.append(("digits", ["--epochs", "1" if check.args.dry else "10"]))
    mnist = check.args.data or ROOT / "shared" / "data" / "mnist"
    if mnist.is_dir():
        runs.append(("mnist", ["--data", mnist, "--epochs", "2"]))
    else:
        check.log(f"  MNIST: skipped, not at hand in {mnist}")
    for name, options in runs:
        command = [*script, *options, "--out", check.work / f"lenet-{name}"]
        check.run(f"example {name}", command, min(60.0, check.share), last=16)


def report(check: Check) -> None:
    """The README's tables and, where matplotlib is, its plot, from all rows of this device."""
    if not check.csv.exists():
        check.log("  report: skipped, there are no rows")
        return
    scripts: list[list[str | Path]] = [[ROOT / "bench" / "table.py", check.csv, "--targets", "--micro"]]
    if check.facts.get("matplotlib") == "missing":
        check.log("  plot: skipped, no matplotlib")
    else:
        scripts.append([ROOT / "bench" / "plot.py", check.csv])
    for command in scripts:
        check.run(f"report {Path(command[0]).name}", command, min(60.0, check.share))
    check.copy_results()


def tune(check: Check) -> None:
    """The product's tiles, for choose() in triton_kernels/matmul.py; not a part of a whole check."""
    check.run("tune", [ROOT / "bench" / "tune.py"], check.left)


class Part(NamedTuple):
    run: Callable[[Check], None]
    needs_s: float  # is not begun with less time left; parts before it leave as much
    always: bool = True
    optional: bool = False  # no failure if there is no time


PARTS: dict[str, Part] = {
    "environment": Part(environment, 0),
    "tests": Part(tests, 60),
    "ffn": Part(bench("ffn", 105), 30),
    "linear": Part(bench("linear", 55), 25),
    "chain": Part(bench("chain", 60), 25),
    "block": Part(bench("block", 50), 20),
    "lenet5": Part(bench("lenet5", 40), 20),
    "sanitize": Part(sanitize, 30),
    "micro": Part(bench("micro", 75), 30),
    "example": Part(example, 15),
    "report": Part(report, 10),
    "tune": Part(tune, 60, always=False),
    "ncu": Part(ncu, 40, optional=True),
}
"""By value: what is dropped when the time is up stands last."""


def run_parts(check: Check, names: Sequence[str]) -> Iterator[str]:
    """Runs them in order; yields the name of each that ran."""
    for i, name in enumerate(names):
        part = PARTS[name]
        if check.left < part.needs_s:
            check.log(f"{name}: dropped, {max(check.left, 0):.0f} s left of {check.args.budget_s:.0f}")
            if not part.optional:
                check.failures.append(f"{name}: dropped")
            continue
        later = (PARTS[other] for other in names[i + 1 :])
        needed = sum(other.needs_s for other in later if not other.optional)
        check.reserved_s = min(needed, check.left - part.needs_s)
        start = time.monotonic()
        check.log(f"{name}: {check.left:.0f} s left")
        try:
            part.run(check)
        except Exception as error:  # a part must not take the others with it
            check.fail(f"{name}: {type(error).__name__}: {error}")
        check.log(f"{name}: {time.monotonic() - start:.0f} s")
        yield name


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "gpu_check.py --part environment tests")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="only these")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="default %(default)s")
    parser.add_argument(
        "--tests-s", type=float, default=300.0, help="of it for the tests, default %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu_check", help="copies of CSV and log, details.txt"
    )
    parser.add_argument(
        "--data", type=Path, help="folder of MNIST's four .gz files, default shared/data/mnist"
    )
    parser.add_argument(
        "--commit", default=os.environ.get("L0KERNELS_COMMIT", ""), help="for the rows, without git"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, rows only to --out")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget_s
    out = args.out.resolve()
    log = Log(out, [out / "gpu-check.log"])
    log(f"gpu-check {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC, budget {args.budget_s:.0f} s")
    work = Path(tempfile.mkdtemp(prefix="l0kernels-gpu-"))
    try:
        site = make_site(ROOT, work / "site")
        check = Check(args, log, out, site, work, deadline, out / "dry.csv")
        done = list(run_parts(check, ["environment"]))
        device = str(check.facts.get("device", ""))
        if not device and not args.dry:
            log("no CUDA device: nothing can be checked here (--dry shows that the script runs)")
            return 2
        if not args.dry:
            check.csv = results_of(device)
            log.add(check.csv.with_suffix(".log"))
            log(f"{device}: {check.facts}")
        chosen = args.part or [name for name, part in PARTS.items() if part.always]
        done += run_parts(check, [name for name in chosen if name != "environment"])
        check.copy_results()
        seconds = args.budget_s - check.left
        log(
            f"ran {', '.join(done)} in {seconds:.0f} s; "
            + ("all well" if not check.failures else "FAILURES:")
        )
        for failure in check.failures:
            log(f"  {failure}")
        return 1 if check.failures else 0
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch: name another one, make gpu-check PYTHON=...")
    cli.run(main)
