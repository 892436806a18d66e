"""The convolutional examples: short runs end to end, proven export, CIFAR-10's files, what they refuse."""

import pickle
import subprocess
import sys

import data
import numpy as np
import pytest
import torch
import train_lenet5
import train_wrn
import trainer

from l0kernels import nn

WRN = ["--depth", "10", "--width", "1", "--batch-size", "4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Short steps on busy cores wait for each other's threads; the number belongs to the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lenet5(*argv):
    args = trainer.parse_args(train_lenet5.EXAMPLE, [*argv, "--threads", "1"])
    return trainer.prepare(train_lenet5.EXAMPLE, args)[0]


def test_lenet5_leaves_every_artefact(tmp_path, capsys):
    options = ["--epochs", "2", "--batch-size", "700", "--no-dense-timing", "--lr", "3e-3"]
    run = train_lenet5.main([*options, "--threads", "1", "--out", str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.pt", "curves.png", "lenet5.pt", "metrics.csv"}
    assert len(run.history) == 2
    assert run.history[-1].loss < run.history[0].loss
    assert run.history[-1].expected_flops < 1 == run.history[-1].actual_flops
    assert run.history[-1].open_units == (20, 50, 800, 500)
    assert run.dense_flops == 2 * 2_293_000 + 20 * 576 + 50 * 64 + 500 + 10  # the paper's 2.293 M products
    assert "431,080 of 431,080 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("closed", [(11, 32, 735, 475), (0, 0, 0, 0), (0, 0, 800, 0), (20, 50, 800, 500)])
def test_lenet5_export_equals_the_gated_net(tmp_path, closed):
    run = lenet5("--no-dense-timing")
    for gate, n in zip(nn.gate_modules(run.gated.average), closed, strict=True):
        gate.log_alpha.fill_(2.0)
        gate.log_alpha[gate.n - n :] = -4.0
    said = trainer.export(run, tmp_path / "net.pt")
    small = trainer.load_exported(train_lenet5.EXAMPLE, tmp_path / "net.pt")
    expected = trainer.predict(run.gated.average, run.data.test_x)
    torch.testing.assert_close(trainer.predict(small, run.data.test_x), expected)
    assert f"{sum(p.numel() for p in small.parameters()):,} of 431,080 parameters" in said
    assert not nn.gate_modules(small)
    if closed[0] == 11:  # 9 and 18 feature maps, of the latter those with an open feature, 65 and 25 inputs
        assert [small[0].out_channels, small[3].in_channels, small[8].in_features] == [9, 9, 65]
        assert small[3].out_channels == 5


def test_digits_become_images_of_mnists_size():
    x = train_lenet5.images(torch.arange(128.0).view(2, 64))
    assert x.shape == (2, 1, 28, 28)
    assert not x[:, :, :2].any()
    assert not x[:, :, :, 26:].any()
    assert torch.equal(x[1, 0, 3:26:3, 3:26:3], torch.arange(64.0, 128.0).view(8, 8))
    flat = torch.rand(2, 784)
    assert torch.equal(train_lenet5.images(flat).flatten(1), flat)


@pytest.mark.parametrize("before_norm", [True, False])
def test_wide_residual_net(tmp_path, capsys, before_norm):
    options = ["--gate-before-norm"] * before_norm
    out = tmp_path / "wrn.pt"
    small = train_wrn.main([*WRN, *options, "--steps", "2", "--compare", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"gates {'before' if before_norm else 'after'} norm, 2 steps of 4 images" in printed
    assert "112 of  112" in printed
    x = torch.randn(2, 3, 32, 32)
    again = torch.load(out, weights_only=False)
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("order", ["after norm", "before norm"])
def test_wide_residual_nets_with_closed_channels(order):
    torch.manual_seed(0)
    net = train_wrn.wide_residual_net(10, 1, order, droprate_init=0.5)
    dense = train_wrn.wide_residual_net(10, 1, "dense")
    assert len(nn.gate_modules(net)) == 3
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for gate in nn.gate_modules(net):
            gate.log_alpha.fill_(60.0)
        dense.load_state_dict(net.state_dict(), strict=False)
        torch.testing.assert_close(net(x), dense(x), rtol=1e-4, atol=1e-4)
        for gate in nn.gate_modules(net):
            gate.log_alpha.normal_(0, 3)
    small = train_wrn.export(net, x)
    kept = sum(p.numel() for p in small.parameters())
    assert kept == nn.eval_l0(net) < sum(p.numel() for p in nn.weight_parameters(net))


def batch(n, pixels=3072, labels=None, protocol=2):
    rng = np.random.default_rng(n)
    values = {b"data": rng.integers(0, 256, (n, pixels), dtype=np.uint8)}
    values[b"labels"] = [int(label) for label in (rng.integers(0, 10, n) if labels is None else labels)]
    return pickle.dumps(values, protocol)


@pytest.fixture
def cifar(tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(batch(2 * i))
    (tmp_path / "test_batch").write_bytes(batch(6))
    return tmp_path


def test_cifar10(cifar, capsys):
    found = data.cifar10(cifar)
    assert found.train_x.shape == (30, 3072)
    assert found.test_x.shape == (6, 3072)
    assert found.train_y.dtype == torch.int64
    expected = pickle.loads((cifar / "data_batch_1").read_bytes())
    assert torch.equal((found.train_x[:2] * 255).round().byte(), torch.from_numpy(expected[b"data"]))
    assert found.train_y[:2].tolist() == expected[b"labels"]
    train_wrn.main([*WRN, "--data", str(cifar), "--epochs", "1", "--compare", "0"])
    assert "7 steps of 4 images" in capsys.readouterr().out


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a batch of CIFAR-10, a pickled dict, got: EOFError"),
        (pickle.dumps({b"data": 1}), "expected a batch of CIFAR-10, a pickled dict, got: KeyError"),
        (pickle.dumps(Evil()), "expected a batch of CIFAR-10, a pickled dict, got: UnpicklingError"),
        (batch(3, pixels=5), r"expected bytes of shape \(n, 3072\) and n labels, got uint8 \(3, 5\)"),
        (batch(3, labels=[1, 2]), r"got uint8 \(3, 3072\) and labels \(2,\)"),
        (batch(2, labels=[1, 10]), r"expected labels in 0\.\.9"),
    ],
)
def test_wrong_files_of_cifar10(cifar, capsys, content, message):
    (cifar / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3: {message}|data_batch_3: .*{message}"):
        data.cifar10(cifar)
    assert capsys.readouterr().out == ""
    (cifar / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3: expected a batch of CIFAR-10, got none"):
        data.cifar10(cifar)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--depth", "12"], "argument --depth: expected 6 n \\+ 4, got 12"),
        (["--droprate", "1"], "argument --droprate: expected a number below 1, got 1.0"),
        (["--steps", "0"], "argument --steps: expected a whole number of at least 1"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        train_wrn.parse_args(argv)
    assert message.replace("\\", "") in capsys.readouterr().err


def test_scripts_say_in_one_line_what_is_wrong(tmp_path):
    argv = [sys.executable, train_wrn.__file__, "--data", tmp_path / "none"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("data_batch_1: expected a batch of CIFAR-10, got none\n")
