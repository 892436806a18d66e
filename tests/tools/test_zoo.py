"""bench/zoo.py, with small nets in place of torchvision's."""

import pytest
import rows
import zoo
from torch import nn


@pytest.fixture(autouse=True)
def small_nets(monkeypatch):
    def build(name):
        width = len(name)
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)
        ), 8

    monkeypatch.setattr(zoo, "build", build)


def test_a_net_is_gated_stepped_and_exported(capsys):
    assert zoo.main(["vgg11_bn"]) == 0
    cells = capsys.readouterr().out.splitlines()[4].strip("| ").split(" | ")
    assert cells[:4] == ["vgg11_bn", "1", "8", "13"]
    assert float(cells[4]) < 1e-5
    assert 0 < float(cells[5]) < 1


def test_steps_take_the_place_of_earlier_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "STEPS", tmp_path / "zoo" / "steps.csv")
    monkeypatch.setattr(zoo, "SECONDS", 0.01)
    assert zoo.tables()["zoo-steps"] == ""
    for names in (["vit_b_16", "alexnet"], ["vit_b_16"]):
        assert zoo.main(["--steps", *names]) == 0
    found = rows.read(zoo.STEPS)
    assert [row["net"] for row in found] == ["alexnet"] * 4 + ["vit_b_16"] * 4
    assert [float(row["keep"]) for row in found[:4]] == list(zoo.KEEPS)
    assert all(float(row["ms"]) > 0 < float(row["dense_ms"]) for row in found)
    lines = zoo.tables()["zoo-steps"].splitlines()
    assert lines[0] == "| step of dense at keep | dense, ms | 1 | 0.5 | 0.25 | 0.1 |"
    assert [text.split(" | ")[0] for text in lines[2:4]] == ["| alexnet", "| vit_b_16"]
    assert lines[3] in capsys.readouterr().out
