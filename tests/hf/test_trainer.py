"""Gates under transformers.Trainer and accelerate: budgets, the penalty, logs, checkpoints, processes."""

import copy
import json
from pathlib import Path

import fresh
import pytest
import torch
import transformers as t
from hf_models import VOCAB
from torch import nn

import l0kernels as l0
from l0kernels import hf

pytestmark = pytest.mark.usefixtures("seeded")


class Examples(torch.utils.data.Dataset):
    """Tokens, and whether the first is the larger half of the vocabulary."""

    def __init__(self, n=64):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, VOCAB, (n, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        ids = self.ids[at]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": (ids[0] > VOCAB // 2).long(),
        }


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    config = t.BertConfig(
        hidden_size=24,
        num_attention_heads=4,
        intermediate_size=14,
        num_hidden_layers=2,
        vocab_size=VOCAB,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return t.BertForSequenceClassification(config).to(dtype)


def arguments(folder, **options):
    given = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "save_strategy": "no",
    }
    return t.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given | options
    )


def optimizer_of(model, gate_lr=0.1, **options):
    groups = l0.nn.parameter_groups(model, gate_lr=gate_lr, weight_decay=0.01)
    return torch.optim.AdamW(groups, lr=1e-3, **options)


def trainer_of(model, folder, callback, optimizer=None, **options):
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    return t.Trainer(
        model,
        arguments(folder, **options),
        train_dataset=Examples(),
        optimizers=(optimizer, None),
        callbacks=[callback],
    )


def test_training_ends_on_its_budget(tmp_path):
    model = hf.gate(classifier())
    callback = hf.L0Callback(keep=0.6)
    trainer = trainer_of(model, tmp_path, callback)
    trainer.train()
    assert callback.budget.steps == 20
    assert callback.budget.count == 20
    assert callback.budget.expected <= 0.6 + 1e-6
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    assert [set(log) >= {"l0_expected", "l0_open", "l0_target", "l0_price"} for log in logs] == [True] * 4
    assert logs[-1]["l0_target"] == 0.6
    assert logs[0]["l0_expected"] > logs[-1]["l0_expected"]
    small = hf.export(model, keep=0.6)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, classifier())]
    assert sizes[0] <= 0.6 * sizes[1]
    small.save_pretrained(tmp_path / "small")
    assert type(hf.from_pretrained(tmp_path / "small")).__name__ == "L0BertForSequenceClassification"
    trainer.train()  # again: attaches once
    assert callback.budget.count == 40


def test_accumulation_and_bf16_count_steps_of_the_optimiser(tmp_path):
    model = hf.gate(classifier())
    callback = hf.L0Callback(keep={"heads": 0.5, "units": 0.5}, cost="params", ramp=0.5)
    trainer = trainer_of(model, tmp_path, callback, gradient_accumulation_steps=3, max_steps=6, bf16=True)
    trainer.train()
    assert callback.budget.count == 6
    assert trainer.state.log_history[-2]["l0_target_heads"] == pytest.approx(0.5 + 0.5 / 6, abs=0.4)
    assert {gate.log_alpha.dtype for gate in model.l0_units.gates} == {torch.float32}


def test_a_budget_of_ones_own_with_flops(tmp_path):
    model = hf.gate(classifier())
    example = {key: value[None] for key, value in Examples()[0].items() if key != "labels"}
    budget = l0.nn.Budget(model, keep=0.7, cost="flops", steps=8, input_shape=example)
    trainer_of(model, tmp_path, hf.L0Callback(budget), max_steps=8).train()
    assert budget.expected <= 0.7 + 1e-6


def by_hand(model, optimizer, steps, accumulate, batch=8, examples=500):
    """The training that the penalty's callback is to do."""
    data = Examples()
    clamp = l0.nn.clamp_after_step(optimizer, model)
    at = 0
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            rows = [data[(at + i) % len(data)] for i in range(batch)]
            at += batch
            loss = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        (l0.nn.penalty(model) / examples).backward()
        optimizer.step()
    clamp.remove()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_that_of_a_plain_loop(accumulate, tmp_path):
    model = hf.gate(classifier(torch.float64), lam=0.05)
    for gate in model.l0_units.gates:  # evaluation gates: both trainings see the same
        gate.eval().train = lambda mode=True, gate=gate: gate
    other = copy.deepcopy(model)
    options = {
        "max_steps": 5,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
    }
    trainer = trainer_of(model, tmp_path, hf.L0Callback(examples=500), **options)
    trainer.model_accepts_loss_kwargs = (
        False  # else it leaves it to the loss to divide, which this one does not
    )
    trainer.train()
    other.train()
    by_hand(other, optimizer_of(other), 5, accumulate)
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
    start = hf.gate(classifier(torch.float64), lam=0.05).l0_units.gates[0].log_alpha
    assert (model.l0_units.gates[0].log_alpha < start - 0.3).all()


def test_a_training_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    found = []
    for part in ("whole", "resumed"):
        model = hf.gate(classifier())
        callback = hf.L0Callback(keep=0.5)
        options = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}
        trainer = trainer_of(model, tmp_path, callback, **options)
        if part == "whole":
            trainer.train()
            assert (tmp_path / "checkpoint-6" / "l0_budget.pt").is_file()
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        found.append([*(p.detach().clone() for p in model.parameters()), *callback.budget._state])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
    file = tmp_path / "checkpoint-6" / "l0_budget.pt"
    saved = torch.load(file)
    torch.save(saved | {"log_alpha": saved["log_alpha"] + 1}, file)
    trainer = trainer_of(hf.gate(classifier()), tmp_path, hf.L0Callback(keep=0.5), **options)
    with pytest.raises(
        ValueError, match=r"checkpoint must be that which .*l0_budget.pt is in, got other gates"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    file.unlink()
    model = hf.gate(classifier())
    trainer = trainer_of(model, tmp_path, hf.L0Callback(keep=0.5), **options)
    with pytest.raises(
        ValueError, match=r"must hold l0_budget.pt to go on at step 6, got none as .*checkpoint-6"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_optimisers_that_would_not_train_gates_are_refused(tmp_path):
    model = hf.gate(classifier())
    with pytest.raises(ValueError, match=r"(?s)no decay.*decays them by 0.01.*parameter_groups"):
        t.Trainer(
            model,
            arguments(tmp_path, weight_decay=0.01),
            train_dataset=Examples(),
            callbacks=[hf.L0Callback(keep=0.5)],
        ).train()
    with pytest.raises(ValueError, match=r"moves them by 5e-05 in a step"):
        t.Trainer(
            model, arguments(tmp_path), train_dataset=Examples(), callbacks=[hf.L0Callback(keep=0.5)]
        ).train()
    weights = torch.optim.AdamW(l0.nn.weight_parameters(model), lr=1e-3)
    with pytest.raises(ValueError, match=r"got one without bert.encoder.layer.0.attention"):
        trainer_of(model, tmp_path, hf.L0Callback(keep=0.5), weights).train()
    with pytest.raises(ValueError, match="must be gated by"):
        trainer_of(
            classifier(), tmp_path, hf.L0Callback(keep=0.5), torch.optim.SGD([nn.Parameter(torch.ones(1))])
        ).train()
    warm = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "max_steps": 2}
    trainer_of(model, tmp_path, hf.L0Callback(keep=0.9), **warm).train()  # begins at a rate of 0, and may


def test_what_a_callback_is_given():
    with pytest.raises(ValueError, match=r"one of budget, keep and examples must be given, got none"):
        hf.L0Callback()
    with pytest.raises(ValueError, match=r"got keep and examples"):
        hf.L0Callback(keep=0.5, examples=10)
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        hf.L0Callback(examples=0)


def test_callbacks_before_it_see_its_figures_where_it_goes_first(tmp_path):
    seen = []

    class Reports(t.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append("l0_open" in logs)

    model = hf.gate(classifier())
    trainer = t.Trainer(
        model,
        arguments(tmp_path, max_steps=2, logging_steps=1),
        train_dataset=Examples(),
        optimizers=(optimizer_of(model), None),
        callbacks=[Reports()],
    )
    hf.L0Callback(keep=0.9).goes_first(trainer)
    trainer.train()
    assert seen[:2] == [True, True]


def test_accelerate_keeps_the_budget_attached():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = hf.gate(classifier())
    optimizer = optimizer_of(model)
    budget = l0.nn.Budget(model, keep=0.5, steps=4)
    budget.attach(optimizer)
    loader = torch.utils.data.DataLoader(Examples(), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert budget.count == 4
    assert budget.expected <= 0.5 + 1e-6


def test_a_checkpoint_of_trainer_holds_the_gates(tmp_path):
    model = hf.gate(classifier())
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trainer_of(model, tmp_path, hf.L0Callback(keep=0.5), **options).train()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    own = {name: value for name, value in model.state_dict().items() if "l0_units" in name}
    assert own
    assert all(torch.equal(saved[name], value) for name, value in own.items())
    assert json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())["model_type"] == "bert"


PROGRAM = """
import os, socket, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import hf_models
import l0kernels as l0
from l0kernels import hf
from test_trainer import classifier, trainer_of, Examples
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
child = os.fork()
rank = 0 if child else 1
os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
for name, callback in (("budget", hf.L0Callback(keep=0.5)), ("penalty", hf.L0Callback(examples=64))):
    model = hf.gate(classifier(), droprate_init=0.3)
    options = dict(max_steps=6, ddp_backend="gloo", ddp_find_unused_parameters=True)
    trainer = trainer_of(model, name, callback, **options)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel", type(trainer.model_wrapped)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(values) for _ in range(2)]
    torch.distributed.all_gather(both, values)
    assert torch.equal(*both), (both[0] - both[1]).abs().max()
    moved = torch.cat([gate.log_alpha.detach() for gate in model.l0_units.gates])
    assert (moved - 0.847).abs().mean() > 0.2
    if name == "budget":
        assert callback.budget.count == 6 and callback.budget.expected <= 0.5 + 1e-6
    print(name, rank)
torch.distributed.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_two_processes_end_with_the_same_gates(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "support")]
    found = fresh.run(PROGRAM.format(paths=paths), tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "budget 0" in found.stdout
    assert "penalty 0" in found.stdout
