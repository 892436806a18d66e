"""bench/wrn.py: a row a point of both orders, a table and a picture of them."""

import plot
import pytest
import rows
import wrn


def test_points_of_both_orders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wrn, "POINTS", (0.4,))
    path = tmp_path / "wrn.csv"
    size = ("--depth", "10", "--width", "1", "--batch", "2", "--rounds", "1")
    assert wrn.main([*size, "--csv", str(path)]) == 0
    found = rows.read(path)
    assert [row["order"] for row in found] == [order for order in wrn.ORDERS for _ in range(2)]
    assert [float(row["p_open"]) for row in found] == pytest.approx(2 * [0.92, 0.4], abs=1e-3)
    for row in found:
        # The stem, the shortcuts and the last layer have no gates.
        assert float(row["p_open"]) <= float(row["expected_flops"]) < float(row["p_open"]) + 0.1
        assert min(float(row["gated_ms"]), float(row["dense_ms"])) > 0
    assert "| before norm | 40 % | 4" in capsys.readouterr().out
    (picture,) = plot.pictures([path])
    picture.save()
    assert "<!-- gates after norm -->" in picture.out.read_text()
    monkeypatch.setattr(wrn, "PATH", path)
    assert wrn.tables()["wrn"].count("| after norm |") == 2


def test_odds_of_all_gates(monkeypatch):
    model = wrn.train_wrn.wide_residual_net(10, 1, "after norm", droprate_init=0.3, lam=0.0)
    assert wrn.at(model, 0.25) == pytest.approx(0.25)
    assert all(
        gate.dist.p_open(gate.log_alpha).allclose(gate.log_alpha.new_tensor(0.25))
        for gate in wrn.l0.nn.gate_modules(model)
    )


def test_no_rows_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(wrn, "PATH", tmp_path / "none.csv")
    assert wrn.tables() == {}
