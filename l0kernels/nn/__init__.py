"""How it is trained: layers that own gates, penalty and size of a model, export to plain torch.

A whole training, for N examples in batches::

    model = l0.nn.L0MLP([64, 64, 2])                                # a gate on each input of each layer
    optimizer = torch.optim.Adam(l0.nn.parameter_groups(model), lr=1e-3)
    l0.nn.clamp_after_step(optimizer, model)                        # keeps closed gates within reach
    for x, target in batches:
        loss = torch.nn.functional.cross_entropy(model(x), target)
        loss = loss + l0.nn.penalty(model) / N
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(l0.nn.summary(model))                                     # what is open
    small = l0.nn.export(model)                                     # plain torch.nn, without what is closed
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .bank import Draw, GateBank
from .batch_norm import L0BatchNorm1d, L0BatchNorm2d, L0BatchNorm3d
from .conv import (
    L0Conv1d,
    L0Conv2d,
    L0Conv3d,
    L0ConvTranspose1d,
    L0ConvTranspose2d,
    L0ConvTranspose3d,
)
from .counts import eval_flops, eval_l0, expected_flops, expected_l0
from .distributed import agree_on_gates, independent_gates_, keep_gates_whole
from .export import Residual, ScatterOutputs, SelectInputs, SlicedConv1d, SlicedConv2d, SlicedLinear, export
from .feed_forward import GatedProduct, L0FeedForward
from .gate import GatedLayer, HardConcreteGate, gate_modules
from .linear import L0Linear
from .mlp import L0MLP
from .norm import L0GroupNorm, L0LayerNorm, L0RMSNorm
from .penalty import (
    clamp_after_step,
    clamp_gates_,
    gate_parameters,
    parameter_groups,
    penalty,
    weight_parameters,
)
from .report import GateReport, Report, Size, Watch, report
from .sequential import L0Residual, L0Sequential
from .summary import GateSummary, Open, Summary, open_units, summary
from .units import UnitGraph, gate_, ungate_, unit_graph

if _TYPE_CHECKING:
    from .attention import L0MultiheadAttention
    from .budget import Budget
    from .checkpoints import converted_state_dict
    from .lagrangian import Lagrangian
    from .schedules import Ramp, Schedule, set_lam_

_LATER = {
    "Budget": ".budget",
    "L0MultiheadAttention": ".attention",
    "Lagrangian": ".lagrangian",
    "Ramp": ".schedules",
    "Schedule": ".schedules",
    "converted_state_dict": ".checkpoints",
    "set_lam_": ".schedules",
}
"""Where names are that few trainings use: these modules are imported when asked for."""


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return getattr(_import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "L0MLP",
    "Budget",
    "Draw",
    "GateBank",
    "GateReport",
    "GateSummary",
    "GatedLayer",
    "GatedProduct",
    "HardConcreteGate",
    "L0BatchNorm1d",
    "L0BatchNorm2d",
    "L0BatchNorm3d",
    "L0Conv1d",
    "L0Conv2d",
    "L0Conv3d",
    "L0ConvTranspose1d",
    "L0ConvTranspose2d",
    "L0ConvTranspose3d",
    "L0FeedForward",
    "L0GroupNorm",
    "L0LayerNorm",
    "L0Linear",
    "L0MultiheadAttention",
    "L0RMSNorm",
    "L0Residual",
    "L0Sequential",
    "Lagrangian",
    "Open",
    "Ramp",
    "Report",
    "Residual",
    "ScatterOutputs",
    "Schedule",
    "SelectInputs",
    "Size",
    "SlicedConv1d",
    "SlicedConv2d",
    "SlicedLinear",
    "Summary",
    "UnitGraph",
    "Watch",
    "agree_on_gates",
    "clamp_after_step",
    "clamp_gates_",
    "converted_state_dict",
    "eval_flops",
    "eval_l0",
    "expected_flops",
    "expected_l0",
    "export",
    "gate_",
    "gate_modules",
    "gate_parameters",
    "independent_gates_",
    "keep_gates_whole",
    "open_units",
    "parameter_groups",
    "penalty",
    "report",
    "set_lam_",
    "summary",
    "ungate_",
    "unit_graph",
    "weight_parameters",
]
