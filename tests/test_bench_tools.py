"""The benchmark's own parts: densities, the correctness gate, rejected blocks, the table."""

import measure
import ops
import pytest
import table
import torch
from check import check
from registry import KEEPS, WORKS


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("n", [100, 784, 4096])
def test_trained_log_alpha_has_the_expected_share(n, keep):
    log_alpha = ops.trained_log_alpha(n, keep, torch.Generator().manual_seed(1))
    assert log_alpha.shape == (n,)
    assert abs(ops.DIST.p_open(log_alpha).sum().item() - keep * n) <= 1
    if keep == 1:
        assert ops.DIST.p_one(log_alpha).min().item() > 1 - 1e-6


def cases(op="linear", shape=(6, 10, 4), keep=0.5):
    return ops.OPS[op](shape, keep), ops.OPS[op](shape, keep, torch.float64)


@pytest.mark.parametrize(
    ("op", "shape"), [("linear", (6, 10, 4)), ("chain", (6, 20, 7, 5, 3)), ("ffn", (6, 10, 14))]
)
def test_references_pass_the_gate(op, shape):
    case, exact = cases(op, shape)
    for name in ("dense_own", "ours_torch", "ours", "ours_nn"):
        case.providers.pop(name, None)
    case.providers["reference"].timed = case.providers["reference_dense"].timed = True
    check(case, exact, op)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * 1.0001, "the output"),
        (lambda y: y.detach().requires_grad_(), "gradient 0"),
        (lambda y: y * float("nan"), "nan"),
    ],
)
def test_gate_stops_a_wrong_provider(spoil, message):
    case, exact = cases()
    forward = case.providers["dense"].forward
    case.providers["dense"].forward = lambda x: spoil(forward(x))
    with pytest.raises(RuntimeError, match=message):
        check(case, exact, "linear")


def test_disturbed_blocks_are_rejected(monkeypatch):
    clock = iter(float(i) for i in range(1_000_000))
    monkeypatch.setattr(measure, "busy_seconds", lambda: next(clock))
    monkeypatch.setattr(measure, "PATIENCE_S", 0.2)
    monkeypatch.setattr(measure, "RETRY_PAUSE_S", 0.01)
    timed = measure.Timed(lambda i: None, torch.no_grad)
    measure.run_block(timed, calls=3, drop=1, undisturbed=True)
    assert (timed.blocks, timed.rejected, timed.seconds) == (1, 1, [])
    measure.run_block(timed, calls=3, drop=1, undisturbed=False)
    assert (timed.blocks, timed.rejected, len(timed.seconds)) == (2, 1, 3)
    with pytest.raises(RuntimeError, match="blocks of idle"):
        measure.interleave({"idle": measure.Timed(lambda i: None, torch.no_grad)}, budget_s=0.0)


def test_table_shows_the_last_row_and_the_verdict(tmp_path):
    work = WORKS[0]
    row = dict.fromkeys(table.FIELDS, "")
    row |= {"op": work.op, "shape": work.shape_name, "keep": "0.5", "provider": "ours", "ms": "1"}
    row |= {"target_stock": "0.27", "target_fair": "0.54"}
    path = tmp_path / "results" / "cpu.csv"
    table.append(path, [row | {"stock": "0.9", "fair": "0.9"}])
    table.append(path, [row | {"stock": "0.54", "fair": "0.5"}])
    rows = list(table.latest(table.read(path)).values())
    assert [r["stock"] for r in rows] == ["0.54"]
    text = table.targets(WORKS, rows)
    assert "| 0.54 / 0.50 |" in text
    assert "| 0.27 / 0.54 |" in text
    assert "| +100 % / met |" in text
    assert "+100 % / met" in table.providers(rows)
