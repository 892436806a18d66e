"""The benchmark's own parts: densities, the correctness gate, timing, the runner, tables."""

from dataclasses import replace

import check
import cost
import measure
import micro
import net_ops
import ops
import plot
import pytest
import registry
import rows
import run
import torch
import training
import wrapper
from registry import KEEPS, QUICK, TABLE_KEEPS, WORKS

CPU = torch.device("cpu")


# ---- densities


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("n", [100, 784, 4096])
def test_trained_log_alpha_has_the_expected_share(n, keep):
    log_alpha = ops.trained_log_alpha(n, keep, torch.Generator().manual_seed(1))
    assert log_alpha.shape == (n,)
    assert abs(ops.DIST.p_open(log_alpha).sum().item() - keep * n) <= 1
    if keep == 1:
        assert ops.DIST.p_one(log_alpha).min().item() > 1 - 1e-6
    if keep == 0:
        assert ops.DIST.p_open(log_alpha).max().item() < 1e-6


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_the_ends_of_the_sweep_are_exact_whatever_the_noise(keep):
    log_alpha = ops.trained_log_alpha(5000, keep, torch.Generator())
    for seed in range(20):
        assert (ops.l0.sample_gates(log_alpha, seed=torch.tensor([seed])).z == keep).all()
        assert (ops.torch_gate(log_alpha) == keep).all()


def test_densities_are_set_in_place_for_every_copy_and_for_each_vector():
    case = ops.chain(QUICK["chain"], torch.float32, CPU)
    addresses = [gate.data_ptr() for copies in case.log_alphas for gate in copies]
    case.set_keep((20, 12, 3))
    assert addresses == [gate.data_ptr() for copies in case.log_alphas for gate in copies]
    for copies, wanted in zip(case.log_alphas, (20, 12, 3), strict=True):
        assert len(copies) == 2
        assert copies[0].equal(copies[1])
        assert abs(ops.DIST.p_open(copies[0]).sum().item() - wanted) <= 1


# ---- the correctness gate


def pair(op, shape=None, dtype=torch.float32):
    return tuple(net_ops.ALL_OPS[op](shape or QUICK[op], dtype, CPU, exact) for exact in (False, True))


@pytest.mark.parametrize("op", sorted(net_ops.ALL_OPS))
def test_every_provider_is_right_at_every_density(op):
    case, exact = pair(op)
    checker = check.Checker(case, exact, "float32")
    for keep in (0.5, 1.0, 0.0):
        checker.set_keep(keep)
        for name, provider in case.providers.items():
            if "compiled" not in name and (
                provider.backend == "default" or ops.usable_backend(provider.backend)
            ):
                assert checker.error(name, provider) < 1e-4, name


@pytest.mark.parametrize("op", ["linear", "ffn", "swiglu"])
def test_grouped_mm_is_right_though_only_a_gpu_times_it(op):
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has none")
    case, exact = pair(op)
    if op == "linear":
        stock, gates = case.truths["masked"].args[0][0], case.log_alphas[0][0]
        forward = lambda x: ops.grouped_linear(stock, gates, x)  # noqa: E731
    else:
        forward = lambda x: ops.grouped_ffn(*case.truths["masked"].args, x)  # noqa: E731
    checker = check.Checker(case, exact, "float32")
    checker.set_keep(0.5)
    assert checker.error("grouped_mm", replace(case.providers["masked"], forward=forward)) < 1e-5


def test_a_provider_with_noise_of_its_own_is_compared_with_all_gates_open():
    case, exact = pair("linear", (6, 10, 4))
    checker = check.Checker(case, exact, "float32")
    checker.set_keep(0.5)
    own = replace(case.providers["masked"], own_noise=True)
    assert checker.error("own", own) < 1e-5
    assert 0.2 < ops.DIST.p_open(case.log_alphas[0][0]).mean().item() < 0.8  # put back
    wrong = replace(own, forward=lambda x: own.forward(x) * 1.01)
    with pytest.raises(RuntimeError, match="value 0"):
        checker.error("wrong", wrong)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * 1.0001, "value 0"),
        (lambda y: y.detach().requires_grad_(), "value 1"),
        (lambda y: y * float("nan"), "nan"),
    ],
)
def test_the_gate_stops_a_wrong_provider(spoil, message):
    case, exact = pair("linear", (6, 10, 4))
    checker = check.Checker(case, exact, "float32")
    checker.set_keep(0.5)
    provider = case.providers["dense"]
    with pytest.raises(RuntimeError, match=message):
        checker.error("dense", replace(provider, forward=lambda x: spoil(provider.forward(x))))


def test_bfloat16_and_tf32_have_bounds_of_their_own():
    case, exact = pair("linear", dtype=torch.bfloat16)
    checker = check.Checker(case, exact, "bfloat16")
    checker.set_keep(0.5)
    for name in ("dense", "masked", "torch"):
        assert 1e-4 < checker.error(name, case.providers[name]) < 2e-2
    before = torch.get_float32_matmul_precision()
    with check.precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


# ---- timing


class CountingClock(measure.HostClock):
    """Every mark is a millisecond after the one before."""

    block_ms = 40.0

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def mark(self):
        self.now += 1e-3
        return self.now

    def end(self):
        return False, 7

    def exchange_us(self):
        return 5.0


def test_interleave_rotates_groups_and_keeps_every_sample():
    clock, calls, entered = CountingClock(), {"a": [], "b": []}, []

    class Context:
        def __enter__(self):
            entered.append(self)

        def __exit__(self, *_):
            pass

    steps = {name: measure.Timed(calls[name].append, Context) for name in calls}
    measure.interleave(steps, clock, budget_s=0.0)
    for name, timed in steps.items():
        assert len(timed.ms) == measure.MIN_ROUNDS * 40  # blocks of 40 ms
        assert timed.ms == pytest.approx([1.0] * len(timed.ms))
        assert calls[name][-3:] == [37, 38, 39]
        assert timed.blocks == measure.MIN_ROUNDS
    assert len(entered) == 2 * (2 + measure.MIN_ROUNDS)
    assert measure.run_block(measure.Timed(calls["a"].append), 2, 0, 10, clock) == pytest.approx([0.1, 0.1])
    block = measure.Block([float(i) for i in range(11)], 0.0, 5.0)
    timed = measure.Timed(calls["a"].append, kept=[block])
    assert [timed.quantile(q) for q in (0.2, 0.5, 0.8)] == [2, 5, 8]


def test_what_comes_before_a_step_is_not_timed():
    order = []
    timed = measure.Timed(lambda i: order.append(("step", i)), setup=lambda i: order.append(("setup", i)))
    measure.run_block(timed, 2, 1, 1, CountingClock())
    assert order == [(what, i) for i in (0, 0, 1) for what in ("setup", "step")]
    assert timed.ms == pytest.approx([1.0, 1.0])


def test_disturbed_blocks_are_rejected(monkeypatch):
    seconds = iter(float(i) for i in range(1_000_000))
    monkeypatch.setattr(measure, "busy_seconds", lambda: next(seconds))
    monkeypatch.setattr(measure, "PATIENCE_S", 0.2)
    monkeypatch.setattr(measure, "RETRY_PAUSE_S", 0.01)
    timed = measure.Timed(lambda i: None)
    measure.run_block(timed, 3, 1, 1, measure.HostClock())
    assert (timed.blocks, timed.rejected, timed.ms) == (1, 1, [])
    measure.run_block(timed, 3, 1, 1, measure.HostClock(quick=True))
    assert (timed.blocks, timed.rejected, len(timed.ms)) == (2, 1, 3)
    with pytest.raises(RuntimeError, match="blocks of idle"):
        measure.interleave({"idle": measure.Timed(lambda i: None)}, measure.HostClock(), budget_s=0.0)


def test_blocks_with_the_cores_apart_are_not_mixed_with_others():
    def timed(*exchanges):
        blocks = [measure.Block([float(us)], 0.0, us) for us in exchanges]
        return measure.Timed(print, kept=blocks)

    steps = {"a": timed(5.0, 6.0, 20.0), "b": timed(20.0, 7.0)}
    measure.keep_one_place(steps)
    assert [step.ms for step in steps.values()] == [[5.0, 6.0], [7.0]]
    assert [step.rejected for step in steps.values()] == [1, 1]
    steps = {"a": timed(5.0, 20.0, 21.0), "b": timed(20.0, 19.0)}  # b was never timed with the cores near
    measure.keep_one_place(steps)
    assert [step.ms for step in steps.values()] == [[20.0, 21.0], [20.0, 19.0]]
    steps = {"a": timed(5.0, 6.0), "b": timed(20.0, 21.0)}  # nothing in common: both count as apart
    measure.keep_one_place(steps)
    assert [step.ms for step in steps.values()] == [[5.0, 6.0], [20.0, 21.0]]
    assert timed(5.0, 6.0, 20.0).exchange_us == 20.0
    steps = {"a": timed(0.0), "b": timed(0.0, 0.0)}  # a GPU, or one thread
    measure.keep_one_place(steps)
    assert [len(step.ms) for step in steps.values()] == [1, 2]


def test_exchange_takes_time_between_two_threads_alone(threads):
    threads(2)
    assert measure.Exchange().us() > 0
    assert measure.HostClock(quick=True).exchange_us() == 0
    threads(1)
    assert measure.Exchange().us() == 0


def exchanged(us, commit="a", keep="1"):
    row = dict.fromkeys(rows.FIELDS, "")
    return row | {"op": "linear", "keep": keep, "commit": commit, "exchange_us": us, "ms": us}


def test_rows_with_the_cores_near_come_before_later_ones_of_their_commit():
    near, far, newer = exchanged("5"), exchanged("20"), exchanged("21", "b")
    assert rows.apart([near, far, exchanged("")]) == [far]
    assert "1 of 2 figures with the cores apart" in rows.machine([near, far])
    assert "apart" not in rows.machine([near])
    assert rows.latest([far, near]) == rows.latest([near, far]) == [near]
    assert rows.latest([near, exchanged("7")]) == [exchanged("7")]
    assert rows.latest([near, newer]) == [newer]
    assert rows.latest([exchanged(""), exchanged("", "b")]) == [exchanged("", "b")]


def test_what_was_measured_with_the_cores_apart_is_measured_again(monkeypatch, tmp_path):
    us = iter([50.0, 5.0])
    calls = []

    def measured(self, keep, deadline):
        calls.append(keep)
        return [exchanged(f"{next(us, 5.0)}", keep=f"{keep:g}") | {"shape": "32x64x48", "dtype": "float32"}]

    monkeypatch.setattr(run.Bench, "measure", measured)
    monkeypatch.setattr(run.Exchange, "us", lambda self: 5.5)
    args = run.parse(["--op", "linear", "--shape", "32x64x48", "--keep", "0.5", "0.1", "--provider", "dense"])
    right, found = run.run(args.works, args, float("inf"))
    assert (right, calls, len(found)) == (True, [0.5, 0.1, 0.5], 3)


def test_passes_are_what_they_say():
    case = ops.linear((6, 10, 4), torch.float32, CPU)
    case.set_keep(1.0)
    provider = case.providers["dense"]
    weight = provider.leaves[0]
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    for name in registry.PASSES:
        step, setup = case.steps(provider, name)
        assert (setup is not None) == (name == "bwd")
        before = len(seen)
        measure.Timed(step, setup=setup).call(0)
        assert len(seen) - before == (name != "fwd")
        assert weight.grad is None
        assert case.batches[0].grad is None


def test_peak_memory_counts_what_a_step_allocates():
    assert measure.peak_mb(lambda i: torch.empty(1 << 20), CPU) == pytest.approx(4, rel=0.01)
    assert measure.launches(lambda i: None, CPU) is None


# ---- the runner


def quick(tmp_path, *options):
    path = tmp_path / "rows.csv"
    code = run.main(["--quick", "--csv", str(path), "--without", "masked_compiled", *options])
    return code, rows.read(path) if path.exists() else []


def test_run_writes_a_row_for_every_provider_pass_and_density(tmp_path, capsys):
    options = ["--op", "chain", "--keep", "1", "0.5", "--pass", "fwd", "bwd", "step"]
    code, found = quick(tmp_path, *options)
    assert code == 0
    names = {"dense", "dense_own", "masked", "index_select", "torch", "nn"}
    assert names <= {row["provider"] for row in found}
    assert {(row["keep"], row["pass"]) for row in found} == {
        (k, p) for k in ("1", "0.5") for p in options[6:]
    }
    for row in found:
        assert all(row[name] for name in ("date", "commit", "device", "torch", "peak_mb", "error", "tflops"))
        assert row["stock"] == f"{float(row['stock']):.3f}"
    assert "| chain 16x40x24x12x5 float32, step, eager |" in capsys.readouterr().out


def test_a_wrong_provider_fails_the_run_and_has_no_row(tmp_path, monkeypatch, capsys):
    good = ops.index_select
    monkeypatch.setattr(ops, "index_select", lambda *args: good(*args) * 1.01)
    code, found = quick(tmp_path, "--op", "linear", "--keep", "0.5")
    assert code == 1
    assert "index_select" not in {row["provider"] for row in found}
    assert "torch" in {row["provider"] for row in found}
    out = capsys.readouterr().out
    assert "index_select: NOT TIMED" in out
    assert "A CHECK FAILED" in out


def test_what_a_machine_lacks_is_named_but_ours_must_run(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("not here")

    linear = net_ops.ALL_OPS["linear"]

    def build(*args, **kwargs):
        case = linear(*args, **kwargs)
        if case.providers:
            case.providers = {
                name: replace(case.providers["masked"], forward=broken) if name in left_out else provider
                for name, provider in case.providers.items()
            }
        return case

    monkeypatch.setitem(run.ALL_OPS, "linear", build)
    left_out = ["masked_compiled"]
    path = tmp_path / "a.csv"
    assert run.main(["--quick", "--op", "linear", "--keep", "0.5", "--csv", str(path)]) == 0
    assert "masked_compiled: skipped, RuntimeError: not here" in capsys.readouterr().out
    left_out = ["torch"]
    assert quick(tmp_path, "--op", "linear", "--keep", "0.5")[0] == 1


def test_time_that_is_up_drops_by_name(tmp_path, capsys):
    code, found = quick(tmp_path, "--op", "linear", "--budget-s", "0.000001")
    assert (code, found) == (0, [])
    assert (
        "linear 32x64x48 float32 keep 0.5, 0.1, 1, 0.25, 0.9: dropped, time is up" in capsys.readouterr().out
    )


def test_works_are_chosen_by_device_op_shape_and_dtype():
    default, full = registry.chosen("cpu"), registry.chosen("cpu", full=True)
    assert run.parse(["--full"]).passes == list(registry.PASSES)
    assert run.parse(["--full", "--pass", "fwd"]).passes == ["fwd"]
    assert set(default) < set(full)
    assert {w.dtype for w in default} == {"float32"}
    (bf16,) = registry.chosen("cpu", "linear", "512x4096x4096", "bfloat16")
    assert (bf16.dtype, bf16.full) == ("bfloat16", True)
    (listed,) = registry.chosen("cpu", "linear", "100x784x300")
    assert listed.targets
    (new,) = registry.chosen("cpu", "chain", "7x5x3")
    assert (new.shape, new.passes) == ((7, 5, 3), ("step",))
    assert not registry.chosen("cpu", "linear", dtype="tf32")
    assert {w.shape[0] for w in full if w.shape[1:] == (4096, 4096)} >= {64, 256, 512, 1024, 4096, 16384}
    for work in WORKS:
        assert work.op in net_ops.ALL_OPS
        assert work.op in QUICK
        assert cost.cost(work.op, work.shape, 0.5, work.main_pass, work.dtype).flops > 0
        assert {keep for keep in work.targets if not isinstance(keep, tuple)} <= set(TABLE_KEEPS)


# ---- cost


@pytest.mark.parametrize("op", sorted(net_ops.ALL_OPS))
def test_cost_falls_to_what_stays_dense(op):
    dense, half, none = (cost.cost(op, QUICK[op], keep, "fwd+bwd", "float32") for keep in (1.0, 0.5, 0.0))
    assert dense.flops > half.flops > none.flops >= 0
    assert dense.bytes > half.bytes > none.bytes > 0
    forward, backward = (cost.cost(op, QUICK[op], 0.5, name, "float32") for name in ("fwd", "bwd"))
    assert forward + backward == half
    assert cost.cost(op, QUICK[op], 0.5, "step", "float32").flops > half.flops


def test_cost_of_a_linear_layer_is_the_sum_of_its_products():
    M, K, N = 8, 16, 32
    found = cost.cost("linear", (M, K, N), 1.0, "fwd+bwd", "bfloat16")
    assert found.flops == 6 * M * K * N
    assert found.bytes == 2 * 3 * (M * K + K * N + M * N)


# ---- primitives


def test_micro_gates_are_gates():
    z, index, count = micro._gate(300, 0.5, CPU)
    assert count.tolist() == [150, 256]
    assert index.shape == (384,)
    assert (z[index[:150].long()] == 0.5).all()
    assert not z[index[150:300].long()].any()
    assert index[:150].tolist() == sorted(index[:150].tolist())


def test_micro_names_a_source_that_fails_and_measures_the_others(tmp_path, monkeypatch):
    def broken(device, quick):
        raise ImportError("no kernels")
        yield

    def wrong(device, quick):
        steps = {"torch": lambda i: None}
        values = lambda name: [torch.ones(2) if name else torch.zeros(2)]  # noqa: E731
        yield micro.Part("sample", "2", torch.float32, 0.5, steps, values=values)

    lines = []
    monkeypatch.setattr(micro, "SOURCES", (broken, wrong, micro.copies))
    path = tmp_path / "rows.csv"
    common = dict.fromkeys(("date", "commit"), "x")
    log = lambda *words: lines.append(" ".join(map(str, words)))  # noqa: E731
    assert not micro.run(path, common, CPU, 1e18, True, log)
    assert any("broken: stopped, ImportError: no kernels" in line for line in lines)
    assert any("wrong: stopped, RuntimeError: sample 2 torch: differs from fp64" in line for line in lines)
    (found,) = rows.read(path)
    assert (found["op"], found["provider"], found["mode"]) == ("copy", "copy", "eager")
    assert float(found["gbps"]) > 0


# ---- training runs


def test_training_rows_are_medians_of_stretches_and_replace_those_of_the_same_run(tmp_path):
    metrics = [
        {"epoch": str(i), "test_error": "0.5", "step_ms": str(i), "dense_ms": "2", "expected_flops": "1"}
        for i in range(1, 101)
    ]
    found = training.condense(metrics, points=10)
    assert [r["epoch"] for r in found] == [str(i) for i in range(10, 101, 10)]
    assert found[0]["step_ms"] == "5.5"
    path = tmp_path / "a-training.csv"
    for run_name in ("digits", "mnist", "digits"):
        named = [dict.fromkeys(training.FIELDS, "x") | r | {"run": run_name, "cores": "2"} for r in found]
        training.replace_run(path, named)
    assert [r["run"] for r in rows.read(path)] == ["mnist"] * 10 + ["digits"] * 10
    assert plot.main([str(path)]) == 0
    drawn = (tmp_path / "a-training.svg").read_text()
    assert plot.run_title("mnist") == "LeNet-300-100, MNIST"
    assert plot.run_title("of before") == "of before"
    assert all(f"<!-- {plot.run_title(name)} -->" in drawn for name in ("mnist", "digits"))
    assert "error 50.00%, FLOPs 100% of dense" in drawn


def test_training_without_its_data_says_so(capsys):
    with pytest.raises(SystemExit):
        training.main(["mnist"])
    assert "expected --data" in capsys.readouterr().err


def test_wrapper_times_packed_tensors(capsys):
    assert wrapper.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines[1:-1]] == [*wrapper.OPERATIONS]
    assert "the wrapper costs" in lines[-1]
    x = wrapper.packed()
    assert x.shape[1] == 32 > x._data.shape[1]
