"""The examples' trainer by its smallest net: a short run end to end, exact resume, and what it refuses."""

import dataclasses
import errno
import math
import re
import shlex
import signal
import sys
from itertools import pairwise
from pathlib import Path

import baseline
import files
import numpy as np
import picture
import pytest
import report
import shipping
import tiny_mnist
import torch
import train_lenet5
import train_lenet300
import train_wrn
import trainer

from l0kernels import nn

ARTEFACTS = {"checkpoint.pt", "curves.png", "lenet300.pt2", "metrics.csv"}
BATCH = 4  # of 60 images: 15 steps, two blocks in an epoch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Short steps on busy cores wait for each other's threads; the number belongs to the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return tiny_mnist.write(tmp_path_factory.mktemp("mnist"))


@pytest.fixture
def options(mnist):
    """(out, *argv) -> the arguments of a short run."""
    return lambda out, *argv: [
        *("--data", str(mnist), "--out", str(out), "--batch-size", str(BATCH), "--epochs", "3"),
        *map(str, argv),
    ]


@pytest.fixture
def prepare(options, tmp_path):
    def made(*argv):
        args = train_lenet300.parse_args(options(tmp_path, *argv))
        return trainer.prepare(train_lenet300.EXAMPLE, args)[0]

    return made


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):
    """An uninterrupted run of three epochs: its folder and the run."""
    out = tmp_path_factory.mktemp("finished")
    argv = ["--data", str(mnist), "--out", str(out), "--batch-size", str(BATCH), "--epochs", "3"]
    return out, train_lenet300.main(argv)


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
        elif not re.search("_ms|seconds", name):
            assert value == b[name], name


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_leaves_every_artefact_and_nothing_else(finished):
    out, run = finished
    assert {path.name for path in out.iterdir()} == ARTEFACTS
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert len(run.history) == 3
    assert run.history[-1].loss < run.history[0].loss
    assert run.history[-1].expected_flops < 1


def test_metrics_are_the_history(finished):
    out, run = finished
    history, sizes, names = report.read_csv(out / "metrics.csv")
    assert history == run.history
    assert sizes == run.gates == [784, 300, 100]
    assert names == list(train_lenet300.EXAMPLE.units)
    assert [row.epoch for row in history] == [1, 2, 3]
    for before, after in pairwise(history):
        assert before.seconds < after.seconds
        assert before.dense_seconds < after.dense_seconds


def test_the_picture_is_of_the_metrics_alone(finished, tmp_path):
    out, _ = finished
    picture.main([str(out), "--out", str(tmp_path / "a.png"), "--title", "A"])
    expected = picture.draw(*report.read_csv(out / "metrics.csv"), "A")
    assert (tmp_path / "a.png").read_bytes() == expected != (out / "curves.png").read_bytes()
    width, height = (int.from_bytes(expected[i : i + 4]) for i in (16, 20))
    assert (width, height) == (1660, 581)


def test_no_picture_without_metrics(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        picture.main([str(tmp_path)])
    assert "metrics.csv" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="1"):
        picture.main([str(tmp_path)])
    assert "expected the metrics of a run" in capsys.readouterr().err


def test_labels_at_the_ends_of_lines_do_not_meet():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    picture._label_ends(axes, [(y, str(i), "k") for i, y in enumerate((0.5, 0.51, 0.52, 1.0, 0.99))])
    at = sorted((text.xy[1], text.get_text()) for text in axes.texts)
    assert [name for _, name in at] == ["0", "1", "2", "4", "3"]
    assert all(b - a >= 0.15 - 1e-9 for (a, _), (b, _) in pairwise(at))
    assert 0 < at[0][0] < at[-1][0] < 1


ROW = report.Epoch(7, 1.25, 0.021, 0.02, (3, 2), 0.4, 9.0, 20.0, 30.0, 50.0)


def test_table_and_summary_say_what_was_measured():
    head, row = report.table_head([10, 4]).split("\n"), report.table_row([ROW], [10, 4])
    assert "of 10-4" in head[1]
    assert row.split() == [
        "7",
        "1.250",
        "2.1%",
        "2.0%",
        "3-2",
        "40%",
        "9.00",
        "20.00",
        "0.45",
        "30.0",
        "50.0",
    ]
    assert all(len(line) <= len(row) for line in head)
    said = report.summary([ROW], [10, 4], ["maps", "units"])
    assert "misreads 2.1% of the test images, the dense net 2.0%" in said
    assert "3 of 10 maps, 2 of 4 units" in said
    assert "30.0 s with gates and 50.0 s dense: 40% of the time saved" in said
    assert "took 0.45 of a dense one" in said
    slow = dataclasses.replace(ROW, seconds=60.0)
    assert "20% of the time lost" in report.summary([slow], [10, 4], ["maps", "units"])


def test_without_a_dense_net_nothing_is_said_of_it():
    alone = dataclasses.replace(ROW, dense_error=None, dense_ms=None, dense_seconds=None)
    said = report.summary([alone], [10, 4], ["maps", "units"])
    assert "dense" not in said
    assert "Time" not in said
    assert report.table_row([alone], [10, 4]).count(" -") == 4


def test_deep_nets_have_one_number_of_units():
    row = dataclasses.replace(ROW, open_units=(1, 2, 3, 4, 5))
    assert " 15 " in report.table_row([row], [5] * 5)
    assert "of 25" in report.table_head([5] * 5)
    assert "Open: 15 of 25 channels." in report.summary([row], [5] * 5, ["channels"])


def test_the_objective_is_the_loss_and_the_penalty_over_n(prepare):
    run = prepare()
    x, y = run.data.train_x[:BATCH], run.data.train_y[:BATCH]
    torch.manual_seed(3)
    expected = torch.nn.functional.cross_entropy(run.gated.model(x), y) + nn.penalty(run.gated.model) / 60
    torch.manual_seed(3)
    assert torch.equal(run.gated.step(x, y), expected.detach())
    plain = torch.nn.functional.cross_entropy(run.dense.model(x), y)
    assert torch.equal(run.dense.step(x, y), plain.detach())


def test_both_nets_learn_from_the_same_batches(prepare, monkeypatch):
    run = prepare()
    seen = {"gated": [], "dense": []}
    for name in seen:
        learner = getattr(run, name)
        step = lambda x, y, name=name, old=learner.step: (seen[name].append(x), old(x, y))[1]  # noqa: E731
        monkeypatch.setattr(learner, "step", step)
    before = [p.clone() for p in run.dense.model.parameters()]
    assert run.block() == trainer.BLOCK
    assert run.block() == 15 - trainer.BLOCK
    assert len(seen["gated"]) == len(run.history) * 15 == 15
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))
    assert all(not torch.equal(*pair) for pair in zip(before, run.dense.model.parameters(), strict=True))


def test_the_dense_net_does_not_touch_the_training(finished, options, tmp_path):
    run = train_lenet300.main(options(tmp_path, "--no-dense"))
    assert_same(finished[1].gated.state(), run.gated.state())
    assert [row.test_error for row in run.history] == [row.test_error for row in finished[1].history]
    assert baseline.by_magnitude(run) == ""


def test_the_baseline_keeps_the_largest_of_the_dense_net(finished, capsys):
    _, run = finished
    model = baseline.cut(run)
    counts = run.history[-1].open_units
    for layer, plain, count in zip(model.layers, [*run.dense.model][::2], counts, strict=True):
        assert torch.equal(layer.weight, plain.weight)
        is_open, size = layer.in_gate.eval_gates().z == 1, plain.weight.norm(dim=0)
        assert is_open.sum() == count
        assert size[is_open].min() >= size[~is_open].max() if count < len(size) else is_open.all()
    before = run.dense.state()
    said = baseline.by_magnitude(run)
    assert re.fullmatch(r"Baseline: .* trained for 1 more epoch, misreads \d+\.\d%\.", said)
    assert_same(before, run.dense.state())
    assert said == baseline.by_magnitude(run)


def test_the_baseline_of_convolutions(mnist, tmp_path):
    argv = ["--data", str(mnist), "--out", str(tmp_path), "--batch-size", str(BATCH), "--epochs", "1"]
    run, _ = trainer.prepare(train_lenet5.EXAMPLE, train_lenet5.parse_args(argv))
    trainer.train(run, tmp_path)
    run.history[-1] = dataclasses.replace(run.history[-1], open_units=(3, 5, 70, 9))
    model = baseline.cut(run)
    norms = [p.flatten(1).norm(dim=1) for p in (model[0].weight, model[3].weight, model[7].weight.T)]
    gates = (model[0].out_gate, model[3].out_gate, model[7].in_gate)
    for gate, norm, count in zip(gates, norms, (3, 5, 70), strict=True):
        assert gate.eval_gates().z.nonzero()[:, 0].tolist() == norm.topk(count).indices.sort().values.tolist()


def test_rates_fall_to_zero(prepare):
    run = prepare("--lr", "0.5")
    while run.step < run.total:
        run.block()
    last = trainer.half_then_down(44 / 45)
    rates = {group["name"]: group["lr"] for group in run.gated.optimizer.param_groups}
    assert rates == pytest.approx({"weights": 0.5 * last, "gates": 0.02 * last})
    assert [group["lr"] for group in run.dense.optimizer.param_groups] == pytest.approx([0.5 * last])
    assert trainer.half_then_down(0.5) == 1


def test_seeds_differ(finished, prepare):
    run = prepare("--seed", 1)
    run.block(), run.block()
    assert run.history[0].loss != finished[1].history[0].loss


def interrupt_after(monkeypatch, blocks, times=1):
    """Presses Ctrl-C while that block is trained."""
    block, done = trainer.Run.block, []

    def interrupting(run):
        done.append(run.step)
        if len(done) == blocks:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return block(run)

    monkeypatch.setattr(trainer.Run, "block", interrupting)


def test_resume_after_ctrl_c_is_bit_for_bit(finished, options, tmp_path, monkeypatch, capsys):
    argv = ["train_lenet300.py", *options(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(SystemExit, match="130"):
            trainer.run_script(lambda: train_lenet300.main(argv[1:]))
    assert checkpoint(tmp_path)["step"] == 15 + trainer.BLOCK  # in the middle of an epoch
    said = capsys.readouterr().err
    assert "a checkpoint was written here" in said
    line = shlex.split(said.strip().split("\n")[-1])
    assert line == [sys.executable, *argv, "--resume"]
    torch.manual_seed(99)  # what happens between two sessions has no say
    train_lenet300.main(line[2:])
    assert_same(checkpoint(finished[0]), checkpoint(tmp_path))
    programs = (torch.export.load(out / "lenet300.pt2").state_dict for out in (finished[0], tmp_path))
    assert_same(*programs)


def test_a_second_ctrl_c_does_not_wait(options, tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 3, times=2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        trainer.run_script(lambda: train_lenet300.main(options(tmp_path)))
    assert checkpoint(tmp_path)["step"] == 15
    assert "a checkpoint was written after the last whole epoch" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--lr", "2e-3"], "lr was 0.001 there, got 0.002"),
        (["--gate-lr", "2e-3"], "gate_lr was 0.02 there, got 0.002"),
        (["--seed", "7"], "seed was 0 there, got 7"),
        (["--batch-size", "5"], "batch_size was 4 there, got 5"),
        (["--lambdas", "1", "1", "2"], r"lambdas was \(0.3, 0.3, 0.3\) there, got \(1.0, 1.0, 2.0\)"),
        (["--epochs", "2"], "epochs was 3 there, got 2"),
        (["--no-dense"], "dense was True there, got False"),
    ],
)
def test_resume_refuses_another_configuration(finished, options, argv, field):
    out, _ = finished
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=field):
        train_lenet300.main(options(out, "--resume", *argv))
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_data(finished, options, tmp_path):
    tiny_mnist.write(tmp_path, 50)
    with pytest.raises(ValueError, match="data was 'mnist:"):
        train_lenet300.main(options(finished[0], "--resume", "--data", tmp_path))


def test_resume_without_checkpoint(options, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint.pt: expected a checkpoint to resume from, got none"
    ):
        train_lenet300.main(options(tmp_path / "new", "--resume"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "zip", "foreign", "tensor"])
def test_resume_from_a_wrong_file(finished, options, tmp_path, damage):
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
        train_lenet300.main(options(tmp_path, "--resume"))


def test_log_alpha_stays_clamped(prepare):
    run = prepare("--gate-lr", 3)
    run.block()
    largest = max(p.detach().abs().max().item() for p in nn.gate_parameters(run.gated.model))
    assert largest == pytest.approx(math.log(100))


def test_diverged_run_writes_no_checkpoint(options, tmp_path):
    with pytest.raises(ValueError, match=r"finite training loss|NaN"):
        train_lenet300.main(options(tmp_path, "--lr", "1e30", "--no-dense"))
    assert list(tmp_path.iterdir()) == []


def full_disk(monkeypatch, folder):
    """As of now nothing can be written under this folder."""
    write = Path.write_bytes

    def write_bytes(path, content):
        if path.is_relative_to(folder):
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_a_full_disk_does_not_lose_the_net(options, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(files.tempfile, "tempdir", str(other))
    full_disk(monkeypatch, out)
    with pytest.raises(SystemExit) as stop:
        trainer.run_script(lambda: train_lenet300.main(options(out)))
    printed = capsys.readouterr().out
    assert all(f"epoch {i} is not saved, training goes on: cannot write" in printed for i in (1, 2, 3))
    said = str(stop.value)
    assert said.startswith(f"error: cannot write {out / 'lenet300.pt2'}: ")
    assert "No space left on device" in said
    elsewhere = Path(re.search("it is in (.*) instead", said)[1])
    assert elsewhere.is_relative_to(other)
    assert torch.export.load(elsewhere).module()(torch.rand(3, 784)).shape == (3, 10)
    assert list(out.iterdir()) == []


def test_nowhere_to_write(tmp_path, monkeypatch):
    full_disk(monkeypatch, Path("/"))
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="nor is there room in the temporary, the home or the current folder"):
        files.write_somewhere(tmp_path / "a", b"a")


def test_folders_are_tried_before_the_training(options, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(trainer, "train", trained.append)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out: expected a folder that can be written to"):
        train_lenet300.main(options(tmp_path / "file" / "out"))
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(OSError, match=r"--out: expected \d+ MB of free disk at .*, got 1"):
        train_lenet300.main(options(tmp_path / "out"))
    assert not trained


def test_write_whole_keeps_the_old_file_on_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    full_disk(monkeypatch, tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        files.write_whole(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_export_is_not_written(options, tmp_path, monkeypatch, capsys):
    def wrong(net):
        small = real(net)
        with torch.no_grad():
            small[-1].bias[3] += 0.01
        return small

    real = nn.export
    monkeypatch.setattr(shipping.l0.nn, "export", wrong)
    with pytest.raises(SystemExit) as stop:  # with a text it is exit status 1
        trainer.run_script(lambda: train_lenet300.main(options(tmp_path)))
    assert str(stop.value).startswith("error: export: expected the gated net's outputs within")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.csv"}
    assert "Export" not in capsys.readouterr().out


def test_another_prediction_is_a_difference_however_small():
    wanted = torch.tensor([[1.0, 1.0 - 1e-7]])
    assert shipping.prove(wanted, wanted.clone()) == 0
    with pytest.raises(RuntimeError, match="1 other predictions"):
        shipping.prove(wanted.flip(1), wanted)
    with pytest.raises(RuntimeError, match="difference of nan"):
        shipping.prove(wanted * math.nan, wanted)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        (["--lr", "nan"], "argument --lr: expected a finite number above 0, got 'nan'"),
        (["--lr", "fast"], "argument --lr: expected a finite number above 0, got 'fast'"),
        (["--threads", "x"], "argument --threads: expected a whole number of at least 1, got 'x'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        train_lenet300.parse_args(argv)
    assert message in capsys.readouterr().err


def test_wrong_numbers_of_lambdas_and_images(options, tmp_path):
    with pytest.raises(ValueError, match="--lambdas: expected 3 numbers, got 2"):
        train_lenet300.main(options(tmp_path / "new", "--lambdas", 1, 2))
    with pytest.raises(ValueError, match="--batch-size: expected at most 60, the training examples, got 61"):
        train_lenet300.main(options(tmp_path / "new", "--batch-size", 61))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", [train_lenet5, train_lenet300, train_wrn, picture])
def test_help_ends_with_an_example_that_parses(script, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        (script.main if script is picture else script.parse_args)(["--help"])
    last = capsys.readouterr().out.strip().split("\n")[-1]
    prefix = f"example: python examples/{Path(script.__file__).name} "
    assert last.startswith(prefix)
    argv = last.removeprefix(prefix).split()
    if script is picture:
        monkeypatch.setattr(report, "read_csv", lambda path: [str(path)])
        monkeypatch.setattr(picture, "draw", lambda *found: b"")
        monkeypatch.setattr(files, "write_whole", lambda path, content: print(path))
        picture.main(argv)
        assert capsys.readouterr().out == "docs/assets/train.png\n"
    else:
        assert script.parse_args(argv).epochs > 0


def test_scripts_say_in_one_line_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit) as stop:
        trainer.run_script(lambda: train_lenet300.main(["--data", str(tmp_path / "none")]))
    assert str(stop.value).startswith("error: ")
    assert str(stop.value).endswith("train-images-idx3-ubyte.gz: expected an idx .gz file, got none")
