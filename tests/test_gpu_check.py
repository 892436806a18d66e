"""What `make gpu-check` is made of, shown without a GPU: the mapped package, time limits, reports, rows."""

import json
import os
import subprocess
import sys
import time

import gpu_bench
import gpu_check
import gpu_measure
import gpu_micro
import gpu_ops
import pytest
import table
import torch
from gpu_check import ROOT, Counts, Done, Shard
from registry import GPU_WORKS, KEEPS


@pytest.fixture
def log(tmp_path):
    return gpu_check.Log(tmp_path / "out", [tmp_path / "out" / "log.txt"])


@pytest.fixture
def check(tmp_path, log):
    site = gpu_check.make_site(ROOT, tmp_path / "site")
    args = gpu_check.argparse.Namespace(budget_s=60.0, dry=True, commit="abc", tests_s=30.0, data=None)
    out = tmp_path / "out"
    return gpu_check.Check(args, log, out, site, tmp_path, time.monotonic() + 60, out / "dry.csv")


def logged(check):
    return (check.out / "log.txt").read_text()


# ---- the mapped package


def test_the_site_maps_the_checkout_in_a_fresh_process(check):
    code = """
import json, sys, l0kernels, l0kernels.nn
from l0kernels import _registry, triton_kernels
from l0kernels.triton_kernels import _variants
print(json.dumps([l0kernels.__file__, triton_kernels.__file__, _variants.__name__, "triton" in sys.modules]))
"""
    # -S hides the installed package: what is imported comes from the site alone.
    env = check.env()
    env["PYTHONPATH"] += os.pathsep + os.path.dirname(os.path.dirname(torch.__file__))
    done = gpu_check.call([sys.executable, "-S", "-c", code], 60, env, check.work)
    assert done.code == 0, done.output
    package, kernels, name, heavy = json.loads(done.output.splitlines()[-1])
    assert package == str(check.site / "l0kernels" / "__init__.py")
    assert kernels == str(check.site / "l0kernels" / "triton_kernels" / "__init__.py")
    assert name == "l0kernels.triton_kernels._variants"
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
    sleeper = "import time, pathlib; time.sleep(3); pathlib.Path('late').touch()"
    code = "import subprocess, sys; print('begun', flush=True); "
    code += f"subprocess.run([sys.executable, '-c', {sleeper!r}])"
    start = time.monotonic()
    done = gpu_check.call([sys.executable, "-c", code], 0.7, dict(os.environ), tmp_path)
    assert (done.code, done.output.splitlines()[0]) == (None, "begun")
    assert time.monotonic() - start < 2.5
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_a_pytest_out_of_time_still_reports_what_it_has(check, monkeypatch):
    tests = check.work / "tests"
    tests.mkdir()
    (check.work / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tests / "test_slow.py").write_text(
        "import time, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no such thing')\ndef test_skipped(): pass\n"
        "def test_hangs(): time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", check.work)
    shard = Shard("test_slow.py")
    done, junit = gpu_check.run_shard(check, shard, time.monotonic() + 20, 0)
    assert done.code is None
    counts = gpu_check.report_shard(check, shard, done, junit)
    assert (counts.failed, counts.skipped) == (1, 1)
    text = logged(check)
    assert "test_fails: AssertionError: one is not two" in text
    assert "skipped 1: no such thing" in text
    assert any("out of time, at" in f and "test_hangs" in f for f in check.failures), check.failures
    missing = gpu_check.report_shard(
        check, Shard("test_x.py"), Done(139, "boom", 1.0), check.work / "none.xml"
    )
    assert missing == Counts(failed=1)
    assert "exit 139, no report" in check.failures[-1]
    assert "    boom" in logged(check)


def test_shards_cover_every_gpu_test_once():
    first = gpu_check.shards(ROOT / "tests", built=False)
    second = gpu_check.shards(ROOT / "tests", built=True)
    names = {path.name for path in (ROOT / "tests").glob("test_triton_*.py")}
    assert names == {shard.file for shard in first if shard.file.startswith("test_triton_")}
    assert not [shard for shard in second if shard.file.startswith("test_triton_")]
    assert {"test_gpu_ops.py", "test_gpu_sync.py"} <= {shard.file for shard in first}
    assert all(shard.keywords.startswith("not cuda") for shard in first if "gpu" in shard.file)
    assert all(shard.keywords.startswith("cuda") for shard in second if "gpu" in shard.file)
    assert not [shard for shard in (*first, *second) if shard.file == "test_gpu_check.py"]


class Within(dict):
    """What pytest -k asks of a name: whether it holds a word."""

    def __init__(self, name):
        self.name = name

    def __missing__(self, word):
        return word in self.name


def test_the_split_of_a_file_leaves_no_test_out_and_runs_none_twice():
    command = [sys.executable, "-m", "pytest", "tests/test_gpu_ops.py", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > 500
    for name in names:
        chosen = [k for k in gpu_check.SPLIT["test_gpu_ops.py"] if eval(k, {}, Within(name))]
        assert len(chosen) == 1, name


# ---- parts


def test_tests_part_reports_every_process_and_those_of_a_fresh_build(check, monkeypatch):
    tests = check.work / "tests"
    tests.mkdir()
    (check.work / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tests / "test_gpu_a.py").write_text("def test_a(): pass\ndef test_a_cuda(): assert False, 'wrong'\n")
    (tests / "test_triton_b.py").write_text("import no_such_module\n")
    (tests / "test_cuda_c.py").write_text("def test_c(): pass\n")
    monkeypatch.setattr(gpu_check, "ROOT", check.work)

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
        "test_gpu_a.py[not cuda]: 1 passed, 0 failed, 0 skipped",
        "test_gpu_a.py[cuda]: 0 passed, 1 failed, 0 skipped",
        "test_a_cuda: AssertionError: wrong",
        "test_cuda_c.py: 1 passed",
        "test_triton_b.py: 0 passed, 1 failed",
        "No module named 'no_such_module'",
        "kernels of ffn: exit 1 after 2 s",
        "TESTS: 2 passed, 2 failed, 0 skipped",
    ):
        assert line in text, text
    assert len(check.failures) == 2


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
    assert names.index("sanitize") == names.index("step") + 1
    assert names.index("cuda") == names.index("micro") + 1
    assert names[-1] == "ncu"
    needed = sum(part.needs_s for part in gpu_check.PARTS.values() if part.always and not part.optional)
    assert needed + 170 + 30 < gpu_check.BUDGET_S
    for work in GPU_WORKS:
        assert work.op in gpu_check.PARTS
        assert work.op in gpu_ops.OPS
    assert [name for name, part in gpu_check.PARTS.items() if not part.always] == ["tune"]
    assert gpu_check.slug("NVIDIA H200") == GPU_WORKS[0].device == "nvidia-h200"


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


def test_cuda_part_writes_the_rows_that_it_got(cuda_check):
    lines = [
        {"name": "copy", "us": 56.54, "p20": 56.48, "p80": 56.55, "gb_s": 4154, "of_copy": 1.0},
        {"name": "pack rows keep 0.5", "us": 34.0, "p20": 33.0, "p80": 35.0, "gb_s": 3411},
        {"name": "7-3 forward and backward keep 1.0", "us": 85.6, "p20": 85.0, "p80": 86.0},
    ]
    script = "import sys\nassert sys.argv[1:] == ['target']\n"
    script += "".join(f"print({json.dumps(json.dumps(line))})\n" for line in lines)
    (cuda_check.work / "bench" / "cuda_cases.py").write_text(script + "sys.exit(5)\n")
    gpu_check.cuda(cuda_check)
    rows = table.read(cuda_check.csv)
    names = ("op", "keep", "pass", "mode", "provider", "ms", "ms_p20", "ms_p80", "gbps")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("copy", "1", "fwd", "graph", "copy", "0.05654", "0.05648", "0.05655", "4154"),
        ("pack rows", "0.5", "fwd", "graph", "ours_cuda", "0.034", "0.033", "0.035", "3411"),
        ("7-3 forward and backward", "1", "fwd+bwd", "graph", "ours_cuda", "0.0856", "0.085", "0.086", ""),
    ]
    assert {(row["device"], row["commit"], row["environment"]) for row in rows} == {
        ("a GPU", "abc", "CUDA 13.0 triton 3")
    }
    assert "| pack rows" in table.gpu_micro(GPU_WORKS, rows)
    assert [failure[:12] for failure in cuda_check.failures] == ["cuda: exit 5"]


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


@pytest.mark.parametrize("part", ["sanitize", "cuda", "ncu"])
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
    check.facts = {"sklearn": "missing", "tqdm": "4", "matplotlib": "missing"}
    gpu_check.example(check)
    assert "example: skipped, no sklearn, matplotlib" in logged(check)
    assert not check.failures


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main(["--out", str(tmp_path), "--part", "environment"]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.csv"))


def test_dry_run_writes_rows_and_a_table(tmp_path):
    assert gpu_check.main(["--dry", "--out", str(tmp_path), "--part", "linear"]) == 0
    rows = table.read(tmp_path / "dry.csv")
    assert {row["keep"] for row in rows} == {f"{keep:g}" for keep in KEEPS}
    assert {row["pass"] for row in rows} == {"fwd", "fwd+bwd"}
    assert {"dense", "dense_own", "masked", "index_select", "grouped_mm", "ours"} <= {
        r["provider"] for r in rows
    }
    for row in rows:
        assert float(row["ms"]) > 0
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        assert not row["error"] or float(row["error"]) < 1e-5
        assert row["provider"] != "dense" or row["stock"] == "1.000"
    assert (tmp_path / "gpu-check.log").read_text().strip().endswith("all well")
    assert "===== bench linear" in (tmp_path / "details.txt").read_text()


# ---- the rows


def test_rows_refuse_a_file_with_other_columns(tmp_path):
    path = tmp_path / "a.csv"
    table.append(path, [{"op": "linear"}], table.GPU_FIELDS)
    table.append(path, [{"op": "ffn"}], table.GPU_FIELDS)
    assert [row["op"] for row in table.read(path)] == ["linear", "ffn"]
    with pytest.raises(ValueError, match="expected the columns"):
        table.append(path, [{"op": "linear"}])


def test_table_of_gpu_rows_has_ratios_targets_and_the_parts():
    row = dict.fromkeys(table.GPU_FIELDS, "")
    row |= {"op": "ffn", "shape": "8192x4096x14336", "dtype": "bfloat16", "pass": "fwd+bwd", "mode": "eager"}
    rows = [
        row | {"keep": "0.5", "provider": "dense", "ms": "8", "stock": "1.000", "fair": "1.020"},
        row | {"keep": "0.5", "provider": "ours", "ms": "9", "stock": "1.2", "fair": "1.3"},
        row
        | {"keep": "0.5", "provider": "ours", "ms": "4", "stock": "0.500", "fair": "0.583"}
        | {"target_stock": "0.53", "target_fair": "0.55"},
        row
        | {
            "op": "copy",
            "shape": "9",
            "keep": "1",
            "provider": "copy",
            "ms_p20": "2",
            "ms_p80": "2",
            "ms": "2",
        },
    ]
    rows = table.gpu_latest(rows)
    assert len(rows) == 3
    text = table.gpu_targets(GPU_WORKS, rows)
    assert "| ours |  |  | 4 (0.500 / 0.583) |  |  |" in text
    assert "| · verdict |  |  | met / +6 % |  |  |" in text
    assert "| copy 9 bfloat16 | 1 | eager | copy | 2000 (2000-2000) |  |  |" in table.gpu_micro(
        GPU_WORKS, rows
    )


# ---- timing


class CountingClock(gpu_measure.HostClock):
    """Every mark is a millisecond after the one before."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        self.now += 1e-3
        return self.now


def test_interleave_rotates_groups_and_keeps_every_sample():
    clock, calls = CountingClock(), {"a": [], "b": []}
    entered = []

    class Context:
        def __enter__(self):
            entered.append(self)

        def __exit__(self, *_):
            pass

    steps = {name: gpu_measure.Timed(calls[name].append, Context) for name in calls}
    gpu_measure.interleave(steps, clock, budget_s=0.0)
    for name, timed in steps.items():
        assert len(timed.ms) == gpu_measure.MIN_ROUNDS * 40  # blocks of 40 ms
        assert timed.ms == pytest.approx([1.0] * len(timed.ms))
        assert calls[name][-3:] == [37, 38, 39]
    assert len(entered) == 2 * (1 + gpu_measure.MIN_ROUNDS)
    timed = gpu_measure.Timed(calls["a"].append)
    assert gpu_measure.block(timed, 2, 10, clock) == pytest.approx([0.1, 0.1])
    timed.ms = [float(i) for i in range(11)]
    assert [timed.quantile(q) for q in (0.2, 0.5, 0.8)] == [2, 5, 8]


@pytest.mark.parametrize("op", sorted(gpu_ops.OPS))
def test_every_provider_is_right_at_every_density(op):
    """Also what only a GPU times: grouped_mm, the step written with modules, at densities set in place."""
    device = torch.device("cpu")
    case, exact = (
        gpu_ops.OPS[op](gpu_bench.QUICK[op], torch.float32, device, exact) for exact in (False, True)
    )
    checker = gpu_bench.Checker(case, exact)
    for keep in (0.5, 1.0, 0.1):
        case.set_keep(keep)
        checker.set_keep(keep)
        for name, provider in case.providers.items():
            if provider.backend == "cuda" or "compiled" in name:
                continue
            provider = gpu_bench.replace(
                provider, backend="torch" if provider.backend == "triton" else "reference"
            )
            assert checker.error(name, provider) < 1e-4, name
    assert case.flops("dense", 0.1, True) == case.dense_flops > case.flops("ours", 0.1, True) > 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * 1.001, "the output"),
        (lambda y: y.detach().requires_grad_(), "gradient 0"),
        (lambda y: y * float("nan"), "nan"),
    ],
)
def test_a_wrong_provider_is_not_timed(spoil, message):
    device = torch.device("cpu")
    case, exact = (gpu_ops.linear((6, 10, 4), torch.float32, device, exact) for exact in (False, True))
    case.set_keep(0.5)
    checker = gpu_bench.Checker(case, exact)
    checker.set_keep(0.5)
    provider = case.providers["dense"]
    wrong = gpu_bench.replace(provider, forward=lambda x: spoil(provider.forward(x)))
    with pytest.raises(RuntimeError, match=message):
        checker.error("dense", wrong)


def test_micro_gates_are_gates():
    z, index, count = gpu_micro._gate(300, 0.5, torch.device("cpu"))
    assert count.tolist() == [150, 256]
    assert index.shape == (384,)
    assert (z[index[:150].long()] == 0.5).all()
    assert not z[index[150:300].long()].any()
    assert index[:150].tolist() == sorted(index[:150].tolist())


def test_micro_names_a_source_that_fails_and_measures_the_others(tmp_path, monkeypatch):
    def broken(device, quick):
        raise ImportError("no kernels")
        yield

    lines = []
    monkeypatch.setattr(gpu_micro, "SOURCES", (broken, gpu_micro.copies))
    path = tmp_path / "rows.csv"
    common = dict.fromkeys(("date", "commit"), "x")
    log = lambda *words: lines.append(" ".join(map(str, words)))  # noqa: E731
    assert not gpu_micro.run(path, common, torch.device("cpu"), time.monotonic() + 60, True, log)
    assert any("broken: stopped, ImportError: no kernels" in line for line in lines)
    (row,) = table.read(path)
    assert (row["op"], row["provider"], row["mode"]) == ("copy", "copy", "eager")
    assert float(row["gbps"]) > 0
