"""bench/proximal.py: it runs, and its tables are what its rows say."""

import proximal
import pytest
import torch

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def whole_denormals():
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("only", ["training", "steps", "operators"])
def test_quick(only, tmp_path, capsys, whole_denormals):
    if only == "training":
        pytest.importorskip("mlxtend")
    options = ["--methods", "dense", "transformed l1 + group", "magnitude", "hard concrete"]
    assert proximal.main(["--quick", "--only", only, *options, "--folder", str(tmp_path)]) == 0
    rows = proximal.read(tmp_path / f"{only}.csv")
    assert [path.name for path in tmp_path.iterdir()] == [f"{only}.csv"]
    (table,) = filter(None, proximal.tables(tmp_path).values())
    assert table in capsys.readouterr().out
    if only == "training":
        assert [row["method"] for row in rows] == options[1:]
        for row in rows:
            sizes = [int(n) for n in row["units"].split("-")]
            assert all(n <= most for n, most in zip(sizes, proximal.SIZES, strict=True))
            assert 0 < float(row["parameters"]) <= float(row["flops"]) <= 100
        assert rows[0]["units"] == "784-300-100-10"
        # Half of the epochs are dense, then these columns stay.
        assert rows[2]["units"] == "314-75-50-10"


def test_tables_of_nothing_are_empty(tmp_path):
    assert set(proximal.tables(tmp_path).values()) == {""}


def test_tables_are_means_over_seeds(tmp_path):
    common = dict.fromkeys(proximal.COMMON, "1")
    rows = [
        common | {"method": "a", "seed": str(seed), "epochs": "3", "error": error, "units": f"{seed}-2-1",
                  "parameters": "10", "flops": "20", "step_ms": step, "dense_ms": "2"}
        for seed, error, step in ((0, "1.0", "1"), (1, "3.0", "3"))
    ]  # fmt: skip
    proximal.write("training", tmp_path, proximal.TRAINING, rows)
    text = proximal.training_table(tmp_path)
    assert "| a | 2.00 ± 1.00 | 0-2-1 | 10.0 ± 0.0 | 20.0 ± 0.0 | 1.00 |" in text
    assert "3 epochs, 2 seeds" in text
