"""What has transformers' Trainer train gates: budget or penalty, checks, figures in its logs, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..nn.budget import Budget
from ..nn.counts import eval_l0, expected_l0
from ..nn.gate import gate_modules
from ..nn.names import named_gates
from ..nn.penalty import clamp_after_step, penalty
from .gate import gates_of

STATE = "l0_budget.pt"
"""The file of a checkpoint that the state of a budget is in."""
SLOWEST = 1e-3
"""A gate that only its price pulls moves so much in a step; 2.7 is the way that it has to go."""


class L0Callback(TrainerCallback):
    """Trains the gates of a model that :func:`gate` has gated: with a budget, or with the penalty.

    ::

        optimizer = torch.optim.AdamW(l0.nn.parameter_groups(model, gate_lr=0.05), lr=2e-5)
        callback = hf.L0Callback(keep=0.5)
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])

    The loss is not touched. A budget acts behind each step of the optimiser, so it counts steps, not batches,
    under accumulation; a step that overflows in fp16 is none. The penalty's gradient is added before it,
    behind accumulation and clipping.

    Each log has ``l0_expected`` and ``l0_open``, the share of the parameters (or of the budget's cost) that
    is expected to be left and that the evaluation gates leave now; of a budget ``l0_target`` and
    ``l0_price``, too. Shares of kinds have their names behind. They are in ``trainer.state.log_history`` and
    in what the progress bar prints. Callbacks that come before, such as those of ``report_to``, have read the
    log by then: see :meth:`goes_first`.

    A checkpoint gets a file with the budget's state: ``train(resume_from_checkpoint=...)`` goes on from it.

    Args:
        budget: a :class:`l0kernels.nn.Budget` of the model; its `steps` are steps of the optimiser.
        keep: in place of it: makes one when the training begins, with the steps that it will have.
        cost, ramp, input_shape: of that, as of :class:`l0kernels.nn.Budget`.
        examples: in place of both: N, the number of examples, whose mean the loss is;
            ``penalty(model) / N`` counts beside the loss.

    Raises:
        ValueError: not one of budget, keep and examples.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        keep: float | Mapping[str, float] | None = None,
        cost: Any = "params",
        ramp: float = 0.3,
        input_shape: Any = None,
        examples: int | None = None,
    ) -> None:
        given = [
            name
            for name, of in (("budget", budget), ("keep", keep), ("examples", examples))
            if of is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"one of budget, keep and examples must be given, got {' and '.join(given) or 'none'}"
            )
        if examples is not None and examples < 1:
            raise ValueError(f"examples must be at least 1, got {examples!r}")
        self.budget = budget
        self.examples = examples
        self._wish: dict[str, Any] = {"keep": keep, "cost": cost, "ramp": ramp, "input_shape": input_shape}
        self._handle: Any = None
        self._whole = 0

    def goes_first(self, trainer: Any) -> L0Callback:
        """Puts it before all callbacks of a Trainer, so that those of ``report_to`` have its figures, too."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the optimiser, and attaches to it.

        Raises:
            ValueError: the model is not gated; the optimiser lacks gates, decays them, or moves them by
                less than 1e-3 in a step; the penalty in fp16 without clipping.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        model = getattr(model, "module", model)
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # within accelerate's
        gates_of(model)
        check_optimizer(model, optimizer)
        if self.examples is not None and args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "max_grad_norm must be positive in fp16, got 0: without clipping, gradients are still scaled "
                "where that of the penalty joins them"
            )
        if self._handle is not None:
            self._handle.remove()
        if self.examples is not None:
            self._handle = clamp_after_step(optimizer, model)
        else:
            if self.budget is None or (self._wish["keep"] is not None and self.budget.model is not model):
                self.budget = Budget(model, steps=state.max_steps, **self._wish)
            if state.global_step:
                self._resume(args, state, _log_alpha(model))
            self._handle = self.budget.attach(optimizer)
        self._whole = _parameters(model)

    def _resume(self, args: Any, state: Any, log_alpha: Tensor) -> None:
        assert self.budget is not None
        name = f"checkpoint-{state.global_step}"
        given = [args.resume_from_checkpoint] if isinstance(args.resume_from_checkpoint, str) else []
        folders: list[str | Path] = [*given, Path(args.output_dir) / name]
        files = [Path(folder) / STATE for folder in folders]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(
                f"checkpoint must hold {STATE} to go on at step {state.global_step}, got none as "
                f"{' or '.join(map(str, files))}: it is written by this callback. For one elsewhere set "
                "TrainingArguments(resume_from_checkpoint=folder), too"
            )
        saved = torch.load(file, weights_only=True)
        if not torch.equal(saved["log_alpha"], log_alpha.cpu()):
            raise ValueError(
                f"checkpoint must be that which {file} is in, got other gates. For one elsewhere set "
                "TrainingArguments(resume_from_checkpoint=folder), too"
            )
        self.budget.load_state_dict(saved["budget"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the optimiser go."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient of the penalty."""
        if self.examples is None:
            return
        model = getattr(kwargs["model"], "module", kwargs["model"])
        trained = [p for p in model.parameters() if p.requires_grad]
        price = penalty(model) / self.examples
        # Without hooks: those of DistributedDataParallel would wait for the others, whose gates are alike.
        for p, grad in zip(trained, torch.autograd.grad(price, trained, allow_unused=True), strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the figures."""
        model = kwargs.get("model")
        if logs is None or model is None or not self._whole:
            return
        figures = self.figures(getattr(model, "module", model))
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What a log gets."""
        budget = self.budget
        if budget is not None:
            values = {"expected": budget.expected, "open": budget.deterministic}
            values |= {"target": budget.target, "price": budget.mu}
        else:
            values = {
                "expected": float(expected_l0(model).detach()) / self._whole,
                "open": eval_l0(model) / self._whole,
            }
        found: dict[str, float] = {}
        for name, value in values.items():
            kinds = value if isinstance(value, dict) else {"": value}
            found |= {f"l0_{name}_{kind}" if kind else f"l0_{name}": float(of) for kind, of in kinds.items()}
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the budget's state into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.budget is not None and state.is_world_process_zero and folder.is_dir():
            model = getattr(kwargs["model"], "module", kwargs["model"])
            saved = {"budget": self.budget.state_dict(), "log_alpha": _log_alpha(model).cpu()}
            torch.save(saved, folder / STATE)


def _log_alpha(model: nn.Module) -> Tensor:
    return torch.cat([gate.log_alpha.detach().flatten() for gate in gate_modules(model)])


def _parameters(model: nn.Module) -> int:
    gates = {id(gate.log_alpha) for gate in gate_modules(model)}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ValueError where an optimiser would not train the gates of a model: as Trainer's own would not."""
    names = {id(gate.log_alpha): name for gate, (name, _) in named_gates(model).items()}
    seen = {}
    for group in optimizer.param_groups:
        own = [names[id(p)] for p in group["params"] if id(p) in names]
        lr, decay = float(group.get("initial_lr", group["lr"])), group.get("weight_decay", 0.0)
        seen.update(dict.fromkeys(own))
        why = ""
        if own and decay:
            why = f"decays them by {decay:g}, which opens them"
        elif own and not lr >= SLOWEST:
            why = f"moves them by {lr:g} in a step, with which they will not close"
        if why:
            raise ValueError(_advice(f"one that {why}, {own[0]} among them"))
    missing = [
        names[id(gate.log_alpha)]
        for gate in gate_modules(model)
        if names[id(gate.log_alpha)] not in seen and gate.log_alpha.requires_grad
    ]
    if missing:
        raise ValueError(_advice(f"one without {missing[0]}"))


def _advice(got: str) -> str:
    return (
        f"optimizer must train the gates, with no decay and a rate of {SLOWEST:g} or more, got {got}. "
        "Trainer's own does not: Trainer(..., optimizers=(torch.optim.AdamW(l0kernels.nn.parameter_groups("
        "model, gate_lr=0.05, weight_decay=0.01), lr=2e-5), None))"
    )
