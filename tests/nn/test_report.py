"""What the gates of a model do, in words, numbers, files and pictures."""

import csv
import json
import math

import pytest
import torch

from l0kernels import nn

T = torch.nn


def model_of(*values):
    """An MLP whose gate vectors have these log_alphas, repeated."""
    model = nn.L0MLP([20, 30, 12, 4])
    with torch.no_grad():
        for gate, own in zip(nn.gate_modules(model), values, strict=True):
            gate.log_alpha.copy_(torch.tensor(own).repeat(30)[: gate.n])
    return model


DECIDED = [4.5, 4.5, 4.5, -4.5]


class TestNumbers:
    def test_against_the_counts(self):
        torch.manual_seed(0)
        model = model_of(DECIDED, DECIDED, DECIDED)
        for gate in nn.gate_modules(model):
            T.init.normal_(gate.log_alpha, 0, 2)
        found = nn.report(model, (1, 20))
        assert found.parameters == nn.Size(
            sum(w.numel() for w in nn.weight_parameters(model)),
            pytest.approx(nn.expected_l0(model).item()),
            nn.eval_l0(model),
        )
        assert found.flops.expected == pytest.approx(nn.expected_flops(model, (1, 20)).item())
        assert found.flops.open == nn.eval_flops(model, (1, 20))
        for one, gate in zip(found.gates, nn.gate_modules(model), strict=True):
            p = gate.dist.p_open(gate.log_alpha.detach().double())
            assert one.total == gate.n
            assert one.expected == pytest.approx(p.sum().item())
            assert one.undecided == pytest.approx(((p > 0.1) & (p < 0.9)).double().mean().item())
            assert one.log_alpha[0] == gate.log_alpha.min().item()
            assert one.log_alpha[-1] == gate.log_alpha.max().item()
            assert list(one.log_alpha) == sorted(one.log_alpha)
            assert one.open == int(gate.eval_gates().count[0])
            for mode in ("paper", "median", "topk"):
                gate.eval_mode = mode
                assert getattr(one, mode) == int(gate.eval_gates().count[0])
            assert abs(one.sampled - one.expected) < 5 * math.sqrt(gate.n / 4) + 1

    def test_what_a_vector_closes(self):
        found = nn.report(model_of(DECIDED, [4.5], [4.5]), (1, 20))
        first, second, third = found.gates
        assert (first.parameters, first.open_parameters) == (20 * 30, 15 * 30)
        assert (second.parameters, second.open_parameters) == (30 * 20 + 30 + 30 * 12,) * 2
        assert (third.parameters, third.flops) == (12 * 30 + 12 + 12 * 4, 2 * 12 * 30 + 12 + 2 * 12 * 4)
        assert first.flops == 2 * 600
        assert nn.report(model_of(DECIDED, [4.5], [4.5])).gates[0].flops is None

    def test_a_model_that_gate_has_gated(self):
        net = T.Sequential(T.Conv2d(3, 8, 3), T.ReLU(), T.Conv2d(8, 4, 3))
        nn.gate_(net, torch.randn(1, 3, 8, 8))
        found = nn.report(net, (1, 3, 8, 8))
        assert [gate.name for gate in found.gates] == [*nn.open_units(net)]
        assert found.gates[0].layers == ("0", "2")
        assert found.gates[0].parameters == 8 * 27 + 8 + 8 * 9 * 4

    def test_it_draws_by_itself(self):
        model = model_of([0.0], [0.0], [0.0])
        before = torch.get_rng_state()
        assert nn.report(model).to_dict() == nn.report(model).to_dict()
        assert torch.equal(torch.get_rng_state(), before)
        assert len({nn.report(model, seed=seed).gates[1].sampled for seed in range(10)}) > 2


class TestWarnings:
    def only(self, model):
        return nn.report(model).warnings

    def test_none(self):
        assert self.only(model_of(DECIDED, DECIDED, DECIDED)) == []

    def test_still(self):
        model = nn.L0MLP([20, 30, 12, 4], droprate_init=0.2)
        still = [text for text in self.only(model) if "no log_alpha has moved from 1.39" in text]
        assert len(still) == 3
        assert not any("neither" in text for text in self.only(model))

    def test_undecided(self):
        found = self.only(model_of([0.5, -0.5], DECIDED, DECIDED))
        assert "layers.0.in_gate: 100% of the gates are neither open nor closed" in found[0]

    def test_closed_and_closing(self):
        found = self.only(model_of([-4.5], [4.5], [4.5]))
        assert "layers.0.in_gate: every evaluation gate is closed: nothing passes there" in found
        model = nn.L0MLP([100, 4])
        with torch.no_grad():
            nn.gate_modules(model)[0].log_alpha.fill_(-4.5)[:2] = 4.5
        assert "layers.0.in_gate: 2 of 100 evaluation gates are open: it is about to close" in self.only(
            model
        )

    def test_modes_that_disagree(self):
        found = self.only(model_of([-2.0, 4.5, 4.5, 4.5], DECIDED, DECIDED))
        assert found == [
            "layers.0.in_gate: evaluation gates disagree (paper 100%, median 75%, topk 85%): "
            "the gates are not decided yet; export(keep=...) asks no mode"
        ]
        (found,) = self.only(model_of([4.5, -4.5, -4.5, -4.5], DECIDED, DECIDED))
        assert (
            "(paper 25%, median 25%, topk 30%): topk counts P(z > 0), which is .05 for a closed gate" in found
        )


class TestForms:
    def test_table(self):
        text = str(nn.report(model_of(DECIDED, [0.5], DECIDED), (1, 20)))
        lines = text.splitlines()
        assert lines[0].split() == (
            [
                "gate",
                "of",
                "open",
                "in",
                "eval()",
                "expected",
                "sampled",
                "undecided",
                "log_alpha",
                "parameters",
                "FLOPs",
            ]
        )
        assert lines[1].startswith("layers.0.in_gate  20  15 (15 / 15 / 15)")
        assert lines[5].startswith("parameters: ")
        assert lines[6].startswith("FLOPs: ")
        assert lines[7].startswith("! layers.1.in_gate: 100% of the gates")
        assert "FLOPs" not in str(nn.report(model_of(DECIDED, [0.5], DECIDED)))

    def test_dict(self):
        found = nn.report(model_of(DECIDED, [0.5], DECIDED), (1, 20)).to_dict()
        assert json.loads(json.dumps(found)) == found
        assert list(found) == ["gates", "parameters", "flops", "warnings"]
        assert found["gates"]["layers.0.in_gate"]["open"] == 15

    def test_csv(self, tmp_path):
        path = tmp_path / "gates.csv"
        model = model_of(DECIDED, [0.5], DECIDED)
        nn.report(model).to_csv(path, 1)
        nn.report(model, (1, 20)).to_csv(str(path), 2)
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["1"] * 3 + ["2"] * 3
        assert [float(x) for x in rows[0]["log_alpha"].split()] == [-4.5, -4.5, 4.5, 4.5, 4.5]
        assert rows[0]["flops"] == ""
        assert rows[3]["flops"] == "1200"
        assert rows[1]["warnings"].startswith("100% of the gates")
        path.write_text("a,b\n")
        with pytest.raises(
            ValueError, match=r"path must be a file with the columns \['step', 'name'.*got \['a'"
        ):
            nn.report(model).to_csv(path)

    def test_writer(self):
        class Writer:
            def __init__(self):
                self.seen = {}

            def add_scalar(self, tag, value, step=None):
                self.seen[tag] = value, step

        writer = Writer()
        nn.report(model_of(DECIDED, [0.5], DECIDED), (1, 20)).write(writer, 7)
        assert writer.seen["gates/layers.0.in_gate/open"] == (0.75, 7)
        assert writer.seen["gates/layers.1.in_gate/undecided"] == (1.0, 7)
        assert writer.seen["gates/layers.1.in_gate/log_alpha"] == (0.5, 7)
        assert 0 < writer.seen["gates/flops/open"][0] < writer.seen["gates/parameters/open"][0] + 0.1
        assert all(type(value) is float for value, _ in writer.seen.values())

    @pytest.mark.parametrize("name", ["gates.png", "gates.svg"])
    def test_picture(self, tmp_path, name):
        pytest.importorskip("matplotlib")
        nn.report(model_of(DECIDED, [0.5], DECIDED)).plot(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in content
        assert len(content) > 2000


class TestWatch:
    def test_in_a_plain_loop(self, tmp_path):
        model = model_of(DECIDED, [0.5], DECIDED)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = []
        watch = nn.Watch(model, 2, call=lambda *got: seen.append(got), csv=tmp_path / "gates.csv")
        handle = watch.attach(optimizer)
        for _ in range(5):
            optimizer.step()
        handle.remove()
        optimizer.step()
        assert [step for step, _ in seen] == [2, 4]
        assert watch.last is seen[-1][1]
        assert len((tmp_path / "gates.csv").read_text().splitlines()) == 7

    def test_prices_are_written(self):
        seen = {}

        class Writer:
            def add_scalar(self, tag, value, step):
                seen[tag] = value

        model = model_of(DECIDED, [0.5], DECIDED)
        budget = nn.Budget(model, {"0.in_gate": 0.3}, steps=2, ramp=0)
        budget.step()
        nn.Watch(model, 1, budget=budget, writer=Writer()).step()
        assert seen["budget/mu/0.in_gate"] == budget.mu["0.in_gate"]
        assert seen["budget/target/0.in_gate"] == 0.3
        assert seen["gates/layers.0.in_gate/expected"] < 0.4

    def test_as_a_callback_of_trainers(self):
        """transformers calls every event of every callback by name; Lightning, on_train_batch_end."""
        watch = nn.Watch(model_of(DECIDED, [0.5], DECIDED), 2)
        for event in ("on_init_end", "on_train_begin", "on_step_begin", "on_optimizer_step"):
            assert getattr(watch, event)("args", "state", "control", model=None) is None
        watch.on_step_end("args", "state", "control", model=None)
        watch.on_train_batch_end("trainer", "module", "outputs", "batch", 0)
        assert watch.steps == 2
        assert watch.last is not None
        logs = {"loss": 1.0}
        watch.on_log("args", "state", "control", logs=logs)
        assert set(logs) == {"loss", "parameters/expected", "parameters/open"}
        with pytest.raises(AttributeError, match="Watch has no attribute 'off'"):
            assert watch.off

    def test_as_a_callback_of_lightning(self):
        """Lightning 2.6 sets callbacks up, and saves their state under a key or that of old checkpoints."""
        watch = nn.Watch(model_of(DECIDED, [0.5], DECIDED), 100)
        watch.setup("trainer", "module", stage="fit")
        for i in range(3):
            watch.on_train_batch_end("trainer", "module", "outputs", "batch", i)
        watch.teardown("trainer", "module", stage="fit")
        saved = {watch.state_key: watch.state_dict()}
        again = nn.Watch(watch.model, 100)
        again.load_state_dict(saved.get(again.state_key, saved.get(again._legacy_state_key)))
        assert again.steps == 3

    def test_errors(self):
        with pytest.raises(ValueError, match="every must be at least 1, got 0"):
            nn.Watch(model_of(DECIDED, [0.5], DECIDED), 0)
        for make in (nn.Watch, nn.report):
            with pytest.raises(ValueError, match="model must contain gates, got a Linear without any"):
                make(T.Linear(2, 2))
