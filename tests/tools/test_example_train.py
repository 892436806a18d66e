"""The LeNet-300-100 example: a short run end to end, exact resume, proven export, and what it refuses."""

import csv
import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import report
import torch
import train_lenet300
import trainer as example

from l0kernels import nn

ARTEFACTS = {"checkpoint.pt", "curves.png", "lenet300.pt", "metrics.csv"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Short steps on busy cores wait for each other's threads; the number belongs to the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepare(*argv):
    args = example.parse_args(train_lenet300.EXAMPLE, [str(arg) for arg in argv])
    run, _, _ = example.prepare(train_lenet300.EXAMPLE, args)
    return run


def train(out, *argv):
    return train_lenet300.main(["--out", str(out), *map(str, argv)])


def leaves(state, path=""):
    """Every tensor and number of nested dicts and sequences, by its path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in leaves(value, f"{path}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, value in enumerate(state) for k, v in leaves(value, f"{path}/{i}").items()}
    return {path: state}


def assert_same(a, b):
    """Bit for bit, but for the measured times."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype, name
            assert torch.equal(value, b[name]), name
        elif not name.endswith("_ms"):
            assert value == b[name], name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of three epochs: its folder, the run and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    return out, train(out, "--epochs", 3)


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_leaves_every_artefact_and_nothing_else(finished):
    out, run = finished
    assert {path.name for path in out.iterdir()} == ARTEFACTS
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert len(run.history) == 3


def test_metrics_are_the_history(finished):
    out, run = finished
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for row, epoch in zip(rows, run.history, strict=True):
        assert float(row["loss"]) == epoch.loss
        assert float(row["test_error"]) == epoch.test_error
        assert tuple(int(row[f"open_units_{i}"]) for i in range(3)) == epoch.open_units
        assert float(row["step_ratio"]) == pytest.approx(float(row["step_ms"]) / float(row["dense_ms"]))
    assert run.history[-1].loss < run.history[0].loss
    assert run.history[-1].expected_flops < 1 == run.history[-1].actual_flops


def test_table_and_summary(finished, capsys, tmp_path):
    train(tmp_path, "--epochs", 1, "--no-dense-timing")
    printed = capsys.readouterr().out
    assert report.table_head() in printed
    assert "64-300-100 of 64-300-100\n" in printed
    assert "50,610 of 50,610 parameters" in printed
    assert "dense" not in printed.split("FLOPs  ")[-1].split("\n", 1)[1], (
        "an untimed dense net has no step ratio"
    )
    _, run = finished
    assert "step time" in report.summary(run.history, run.config.sizes)


def test_first_among_equals_is_best(finished):
    _, run = finished
    rows = [
        dataclasses.replace(run.history[0], epoch=i, test_error=e) for i, e in enumerate((0.5, 0.1, 0.1, 0.2))
    ]
    assert report.best(rows).epoch == 1
    assert "10.00% (1)" in report.table_row(rows)


def test_resume_is_bit_for_bit(finished, tmp_path):
    train(tmp_path, "--epochs", 1)
    torch.manual_seed(99)  # what happens between two sessions has no say
    train(tmp_path, "--epochs", 3, "--resume")
    assert_same(checkpoint(finished[0]), checkpoint(tmp_path))
    assert_same(*(torch.load(out / "lenet300.pt", weights_only=True) for out in (finished[0], tmp_path)))


def test_dense_timing_does_not_touch_the_training(finished, tmp_path):
    train(tmp_path, "--epochs", 3, "--no-dense-timing")
    assert_same(checkpoint(finished[0]), checkpoint(tmp_path))


def test_seeds_differ(finished, tmp_path):
    run = train(tmp_path, "--epochs", 1, "--seed", 1, "--no-dense-timing")
    assert run.history[0].loss != finished[1].history[0].loss


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--lr", "2e-3"], "lr was 0.001 there, got 0.002"),
        (["--gates-lr", "2e-3"], "gates_lr was 0.001 there, got 0.002"),
        (["--seed", "7"], "seed was 0 there, got 7"),
        (["--batch-size", "50"], "batch_size was 100 there, got 50"),
        (["--lambdas", "1", "1", "2"], r"lambdas was \(0.3, 0.03, 0.1\) there, got \(1.0, 1.0, 2.0\)"),
        (["--epochs", "2"], "--epochs: expected at least 3, as in the checkpoint, got 2"),
    ],
)
def test_resume_refuses_another_configuration(finished, argv, field):
    out, _ = finished
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=field):
        train(out, "--resume", *argv)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_data(finished, monkeypatch):
    out, _ = finished
    digits = example.data.digits()
    monkeypatch.setattr(example.data, "digits", lambda: digits._replace(train_x=digits.train_x.flip(0)))
    with pytest.raises(ValueError, match="data was 'digits:"):
        train(out, "--resume")


def test_resume_without_checkpoint(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint.pt: expected a checkpoint to resume from, got none"
    ):
        train(tmp_path / "new", "--resume")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "zip", "foreign", "tensor"])
def test_resume_from_a_wrong_file(finished, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    if damage in ("foreign", "tensor"):
        torch.save({"model": {}} if damage == "foreign" else torch.ones(2), path)
    elif damage == "zip":
        np.savez(tmp_path / "a.npz", a=np.ones(2))
        (tmp_path / "a.npz").rename(path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"epoch 3")
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected a checkpoint of this example, got"):
        train(tmp_path, "--resume")


def close(run, closed):
    """Shuts the first `closed[l]` gates of each layer of the averaged net and opens the others."""
    for layer, n in zip(run.gated.average.layers, closed, strict=True):
        layer.in_gate.log_alpha.fill_(2.0)
        layer.in_gate.log_alpha[:n] = -4.0


@pytest.mark.parametrize(
    ("closed", "parameters"),
    [((24, 100, 90), 40 * 200 + 200 + 200 * 10 + 10 + 10 * 10 + 10), ((0, 0, 0), 50610)],
)
def test_export_equals_the_gated_net(tmp_path, closed, parameters):
    run = prepare("--no-dense-timing")
    close(run, closed)
    said = example.export(run, tmp_path / "net.pt")
    small = example.load_exported(train_lenet300.EXAMPLE, tmp_path / "net.pt")
    assert sum(p.numel() for p in small.parameters()) == parameters
    assert f"{parameters:,} of 50,610 parameters" in said
    torch.testing.assert_close(small(run.data.test_x), example.predict(run.gated.average, run.data.test_x))
    assert not any(isinstance(module, nn.L0MLP | nn.L0Linear) for module in small.modules())


def test_a_wrong_export_is_not_written(tmp_path, monkeypatch):
    def wrong(net):
        small = real(net)
        with torch.no_grad():
            small[-1].bias[3] += 0.01
        return small

    real = nn.export
    monkeypatch.setattr(example.nn, "export", wrong)
    with pytest.raises(RuntimeError, match="expected the gated net's outputs within"):
        example.export(prepare("--no-dense-timing"), tmp_path / "net.pt")
    assert list(tmp_path.iterdir()) == []


def test_average_is_the_bias_corrected_one():
    run = prepare("--no-dense-timing")
    learner, decay = run.gated, run.config.ema_decay
    ema = [torch.zeros_like(p, dtype=torch.float64) for p in learner.model.parameters()]
    for t in range(1, 6):
        learner.step(run.data.train_x[:100], run.data.train_y[:100])
        for e, p in zip(ema, learner.model.parameters(), strict=True):
            e.mul_(decay).add_(p.detach(), alpha=1 - decay)
        for e, average in zip(ema, learner.average.parameters(), strict=True):
            torch.testing.assert_close(average, (e / (1 - decay**t)).float(), rtol=1e-5, atol=1e-6)


def test_log_alpha_stays_clamped():
    run = prepare("--no-dense-timing", "--lr", 3)
    for _ in range(3):
        run.gated.step(run.data.train_x[:100], run.data.train_y[:100])
    largest = max(p.detach().abs().max().item() for p in nn.gate_parameters(run.gated.model))
    assert largest == pytest.approx(math.log(100))


def test_diverged_run_writes_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"finite training loss|NaN"):
        train(tmp_path, "--lr", "1e30", "--epochs", 1, "--no-dense-timing")
    assert list(tmp_path.iterdir()) == []


def test_write_whole_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write_whole(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        (["--lr", "nan"], "argument --lr: expected a finite number above 0, got 'nan'"),
        (["--lr", "fast"], "argument --lr: expected a finite number above 0, got 'fast'"),
        (["--lambdas", "1", "2"], "argument --lambdas: expected 3 arguments"),
        (["--threads", "x"], "argument --threads: expected a whole number of at least 1, got 'x'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        example.parse_args(train_lenet300.EXAMPLE, argv)
    assert message in capsys.readouterr().err


def test_script_says_in_one_line_what_is_wrong(tmp_path):
    argv = [sys.executable, train_lenet300.__file__, "--data", tmp_path / "none", "--out", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("train-images-idx3-ubyte.gz: expected an idx .gz file, got none\n")
    assert list(tmp_path.iterdir()) == []


def test_batch_larger_than_the_data(tmp_path):
    with pytest.raises(
        ValueError, match="--batch-size: expected at most 1437, the training examples, got 1438"
    ):
        train(tmp_path / "new", "--batch-size", 1438)
    assert not (tmp_path / "new").exists()
