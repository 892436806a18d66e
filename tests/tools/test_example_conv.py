"""The convolutional examples: short runs end to end, proven export, CIFAR-10's files, what they refuse."""

import pickle

import data
import fresh
import numpy as np
import pytest
import shipping
import tiny_mnist
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


@pytest.fixture
def lenet5(tmp_path):
    """(*argv) -> the run before its first step."""
    tiny_mnist.write(tmp_path)

    def made(*argv):
        options = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--batch-size", "20"]
        args = train_lenet5.parse_args([*options, "--no-dense", *argv])
        return trainer.prepare(train_lenet5.EXAMPLE, args)

    return made


def test_lenet5_learns(lenet5):
    run, out = lenet5("--epochs", "3")
    trainer.train(run, out)
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.csv"}
    assert run.history[-1].loss < run.history[0].loss
    assert run.history[-1].expected_flops < 1
    assert run.gates == [20, 50, 800, 500]
    assert run.dense_flops == 2 * 2_293_000 + 20 * 576 + 50 * 64 + 500 + 10  # the paper's 2.293 M products


@pytest.mark.parametrize("closed", [(11, 32, 735, 475), (0, 0, 0, 0), (0, 0, 800, 0), (20, 50, 800, 500)])
def test_lenet5_export_equals_the_gated_net(lenet5, closed):
    run, out = lenet5()
    for gate, n in zip(nn.gate_modules(run.gated.model), closed, strict=True):
        with torch.no_grad():
            gate.log_alpha.fill_(2.0)
            gate.log_alpha[gate.n - n :] = -4.0
    said = shipping.ship(run, out / "net.pt2")
    program = torch.export.load(out / "net.pt2")
    expected = shipping.predict(run.gated.model.eval(), run.data.test_x)
    torch.testing.assert_close(shipping.predict(program.module(), run.data.test_x), expected)
    kept = sum(p.numel() for p in program.parameters())
    assert f"{kept:,} of 431,080 parameters" in said
    selects = "need l0kernels to load, for SelectInputs" in said
    assert selects == (closed[2] > 0)
    if closed[0] == 11:  # 9 and 18 feature maps, of the latter those with an open feature, 65 and 25 inputs
        shapes = [tuple(p.shape) for name, p in program.named_parameters() if name.endswith("weight")]
        assert shapes == [(9, 1, 5, 5), (5, 9, 5, 5), (25, 65), (10, 25)]


def test_an_export_loads_where_there_is_no_l0kernels(lenet5, tmp_path):
    run, out = lenet5()
    with torch.no_grad():
        nn.gate_modules(run.gated.model)[2].log_alpha[::2] = -4.0
    assert "SelectInputs" in shipping.ship(run, out / "net.pt2")
    x = run.data.test_x[:3]
    torch.save({"x": x, "y": shipping.predict(run.gated.model, x)}, tmp_path / "xy.pt")
    code = (
        "import sys; sys.modules['l0kernels'] = None\n"
        "import torch; net = torch.export.load('out/net.pt2').module(); saved = torch.load('xy.pt')\n"
        "torch.testing.assert_close(net(saved['x']), saved['y'])\n"
        "print('equal')"
    )
    done = fresh.run(code, tmp_path)
    assert done.stdout == "equal\n", done.stderr


@pytest.fixture
def few_images(monkeypatch):
    few = data.random_images(12, 8)
    monkeypatch.setattr(data, "random_images", lambda: few)


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("before_norm", [True, False])
def test_wide_residual_net(tmp_path, capsys, before_norm):
    options = [*WRN, *["--gate-before-norm"] * before_norm, "--epochs", "1", "--out", str(tmp_path)]
    run = train_wrn.main(options)
    printed = capsys.readouterr().out
    assert f"gates {'before' if before_norm else 'after'} norm, on random: 12 images" in printed
    assert "Open: 112 of 112 channels." in printed
    assert "would need l0kernels to load, for Residual" in printed
    assert run.history[-1].dense_ms > 0
    name = "wrn-10-1-before.pt2" if before_norm else "wrn-10-1.pt2"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(tmp_path / name).module()(x), run.gated.model(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("few_images")
def test_wide_residual_nets_resume(tmp_path, monkeypatch):
    def prepare(out, *argv):
        args = train_wrn.parse_args([*WRN, "--epochs", "4", "--out", str(out), *argv])
        return trainer.prepare(train_wrn.example(args), args)

    whole, out = prepare(tmp_path / "a")
    trainer.train(whole, out)
    part, out = prepare(tmp_path / "b")
    part.block(), part.block()
    part.save(out / "checkpoint.pt")
    rest, out = prepare(tmp_path / "b", "--resume")
    trainer.train(rest, out)
    for a, b in ((whole.gated, rest.gated), (whole.dense, rest.dense)):
        assert all(
            torch.equal(*pair) for pair in zip(*(m.model.state_dict().values() for m in (a, b)), strict=True)
        )
    assert [row.loss for row in whole.history] == [row.loss for row in rest.history]


def test_the_rate_of_wide_residual_nets_falls_three_times():
    assert [train_wrn.falling(share) for share in (0, 0.29)] == [1, 1]
    assert [train_wrn.falling(share) for share in (0.3, 0.6, 0.8)] == pytest.approx([0.2, 0.04, 0.008])


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
    small = nn.export(net.eval())
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
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


def test_cifar10(cifar):
    found = data.cifar10(cifar)
    assert found.train_x.shape == (30, 3072)
    assert found.test_x.shape == (6, 3072)
    assert found.train_y.dtype == torch.int64
    expected = pickle.loads((cifar / "data_batch_1").read_bytes())
    assert torch.equal((found.train_x[:2] * 255).round().byte(), torch.from_numpy(expected[b"data"]))
    assert found.train_y[:2].tolist() == expected[b"labels"]
    args = train_wrn.parse_args([*WRN, "--data", str(cifar), "--epochs", "1", "--out", str(cifar / "out")])
    run, out = trainer.prepare(train_wrn.example(args), args)
    trainer.train(run, out)
    assert run.step == run.total == 7


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
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        train_wrn.parse_args(argv)
    assert message.replace("\\", "") in capsys.readouterr().err
