"""What gates are held against: the dense net, cut to as many units by the size of its weights, trained on."""

from typing import TYPE_CHECKING

import shipping
import torch
import torch.nn.functional as F
from torch import Tensor

import l0kernels as l0

if TYPE_CHECKING:
    from trainer import Run

ONE_IN = 10
"""The cut net trains on for one in so many epochs of the run, with the learning rates of its end."""
SURE = 30.0
"""A log_alpha at which a gate is exactly 0 or 1."""


def cut(run: "Run") -> torch.nn.Module:
    """The gated net with the dense net's weights, its gates frozen, those of the largest weights open.

    Each gate vector keeps as many as the trained one has open, those whose weights have the largest L2 norm.
    """
    assert run.dense is not None
    model = run.example.gated(run.config.lambdas).to(run.device)
    gates = l0.nn.gate_modules(model)
    log_alphas = {id(gate.log_alpha) for gate in gates}
    weights = [p for p in model.parameters() if id(p) not in log_alphas]
    dense = run.dense.model
    with torch.no_grad():
        for ours, theirs in zip(
            [*weights, *model.buffers()], [*dense.parameters(), *dense.buffers()], strict=True
        ):
            ours.copy_(theirs)
    sizes = _sizes(model)
    for gate, open_units in zip(gates, run.history[-1].open_units, strict=True):
        of = torch.full_like(gate.log_alpha.detach(), -SURE)
        of[sizes[gate].topk(open_units).indices] = SURE
        with torch.no_grad():
            gate.log_alpha.copy_(of)
        gate.freeze_()
    return model


@torch.no_grad()
def _sizes(model: torch.nn.Module) -> dict[l0.nn.HardConcreteGate, Tensor]:
    """The L2 norm of the weights that each gate multiplies."""
    sizes = {}
    for layer in model.modules():
        for name, dim in (("in_gate", 1), ("out_gate", 0)):
            gate = getattr(layer, name, None)
            if isinstance(gate, l0.nn.HardConcreteGate):
                assert isinstance(layer.weight, Tensor)
                sizes[gate] = layer.weight.transpose(0, dim).flatten(1).norm(dim=1)
    return sizes


def by_magnitude(run: "Run") -> str:
    """Cuts, trains on, and says in a sentence what came out; nothing of the run changes."""
    if run.dense is None:
        return ""
    config, random = run.config, torch.Generator().manual_seed(run.config.seed)
    epochs = max(1, config.epochs // ONE_IN)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = cut(run)
        optimizer = run.example.optimizer([p for p in model.parameters() if p.requires_grad], config.lr)
        x, y = run.data.train_x, run.data.train_y
        for i in range(epochs * run.steps):
            if i % run.steps == 0:
                order = torch.randperm(len(y), generator=random).to(run.device)
            rate = run.example.schedule(1 - 1 / ONE_IN + i / (ONE_IN * epochs * run.steps))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate
            rows = order[i % run.steps * config.batch_size :][: config.batch_size]
            loss = F.cross_entropy(
                model(run.example.augmented(x.index_select(0, rows))), y.index_select(0, rows)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        wrong = shipping.predict(model, run.data.test_x).argmax(1) != run.data.test_y
    return (
        f"Baseline: the dense net, cut to as many units by the size of its weights and trained for {epochs} "
        f"more epoch{'s' if epochs > 1 else ''}, misreads {wrong.double().mean().item():.1%}."
    )
