"""bench/paper.py: a run goes on where it was saved, and has one row."""

import paper
import pytest
import rows


@pytest.fixture
def few(monkeypatch):
    """Hundreds of digits for thousands."""
    whole = paper.data.mnist5k()
    some = whole._replace(
        train_x=whole.train_x[::10].contiguous(),
        train_y=whole.train_y[::10].contiguous(),
        test_x=whole.test_x[::10].contiguous(),
        test_y=whole.test_y[::10].contiguous(),
    )
    monkeypatch.setattr(paper.data, "mnist5k", lambda: some)
    return some


def run(folder, epochs, nets=("lenet300",), *options):
    assert (
        paper.main(
            [
                *("--epochs", str(epochs), "--seeds", "3", "--net", *nets, *options),
                *("--work", str(folder / "work"), "--csv", str(folder / "paper.csv")),
            ]
        )
        == 0
    )
    return rows.read(folder / "paper.csv")


def test_a_row_a_run_and_an_epoch(few, tmp_path, capsys):
    found = run(tmp_path, 2, ("lenet300", "lenet5-apart"))
    assert [row["net"] for row in found] == ["lenet300", "lenet5-apart"]
    assert found[0]["open"].count("-") == 2
    assert found[1]["open"].count("-") == 3
    assert all(row["best_error"] <= row["last_error"] for row in found)
    epochs = rows.read(tmp_path / "paper-epochs.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2", "1", "2"]
    assert all(float(row[name]) > 0 for row in epochs for name in ("step_ms", "dense_ms", "masked_ms"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("| LeNet-5-Caffe | 10-0.5-0.1-10 | 3 | 2 |")
    assert run(tmp_path, 2, ("lenet300", "lenet5-apart")) == found  # nothing is run again


def test_a_budget_ends_at_the_units_of_the_paper(few, tmp_path):
    (row,) = run(tmp_path, 2, ("lenet300-apart-budget",))
    assert (row["lambdas"], row["open"]) == ("budget", "266-88-33")
    assert 0 < float(row["last_error"]) < 1
    assert row["best_error"] == row["best_epoch"] == ""


def test_other_lambdas_are_a_run_of_their_own(few, tmp_path, capsys):
    run(tmp_path, 1)
    found = run(tmp_path, 1, ("lenet300",), "--lambdas", "0.1", "0.2", "2")
    assert [row["lambdas"] for row in found] == ["0.1 0.1 0.1", "0.1 0.2 2"]
    assert "| LeNet-300-100 | 0.1-0.2-2 | 3 | 1 |" in capsys.readouterr().out
    for net, needed in (("lenet300", "3 for lenet300"), ("lenet5-budget", "none for lenet5-budget")):
        with pytest.raises(SystemExit):
            run(tmp_path, 1, (net,), "--lambdas", "0.1", "0.2")
        assert f"--lambdas must be {needed}, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("net", ["lenet300", "lenet300-budget"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(few, tmp_path, monkeypatch, net):
    whole = run(tmp_path / "whole", 3, (net,))
    epoch, ended = paper.Run.epoch, []

    def stopped(self):
        if len(self.history) == 2 and not ended:
            ended.append(True)
            raise KeyboardInterrupt
        return epoch(self)

    monkeypatch.setattr(paper.Run, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 3, (net,))
    parts = run(tmp_path / "parts", 3, (net,))
    for name in ("open", "last_error", "best_error", "expected_flops"):
        assert parts[0][name] == whole[0][name]
    both = [rows.read(tmp_path / part / "paper-epochs.csv") for part in ("whole", "parts")]
    assert [row["error"] for row in both[0]] == [row["error"] for row in both[1]]
