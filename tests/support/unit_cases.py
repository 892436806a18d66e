"""Nets of unit_nets, gated, beside the same before, for tests of gated units against unit_oracle."""

import copy

import pytest
import torch
import unit_nets
import unit_oracle

import l0kernels as l0


def gated(name, **options):
    """A net, the same before it was gated, what is gated, and the example."""
    torch.manual_seed(0)
    model, args = unit_nets.NETS[name]()
    plain = copy.deepcopy(model)
    return model, plain, l0.nn.gate_(model, *args, **options), args


def check(case, pattern, train, what=""):
    model, plain, graph, args = case
    model.train(train)
    unit_oracle.set_gates(graph, model, pattern)
    unit_oracle.check(plain, model, graph, args, f"{pattern}, {'train' if train else 'eval'}{what}")


SERVED = [name for name in unit_nets.NETS if name != "checkpointed_reentrant"]
# Their parts are those of resnet, mobilenet_v3, packed and encoder.
ALIKE = ("bottleneck", "mobilenet_v2", "packed_sorted", "encoder_layer")
CHECKED = [pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name for name in SERVED]
LAYERED = ["hand_attention", "grouped_queries", "fused_attention", "glu", "resnet", "mixer", "tied"]


def layered(name, **options):
    model, plain, graph, args = gated(name, layers=True, **options)
    layers = model.l0_units.l0_layers
    generator = torch.Generator().manual_seed(3)
    values = torch.where(torch.rand(layers.n, generator=generator) < 0.4, -40.0, 0.3)
    values[0], values[-1] = 0.7, -40.0
    layers.log_alpha.data.copy_(values)
    return model, plain, graph, args
