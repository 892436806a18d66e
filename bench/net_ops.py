"""Whole steps of the nets of nets.py, all of whose units `l0kernels.nn.gate_` has gated."""

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from conv_ops import CONV_OPS, add_channels_last
from encoder_op import encoder
from nets import NETS, BasicBlock, InvertedResidual
from ops import LAM, OPS, Case, Draw, Forward, Provider, adam, add_modules, open_parameters, torch_gate
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.nn.units import UnitGraph

Sample = Callable[[Sequence[Tensor]], list[Tensor]]


@cache
def gated_net(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module, UnitGraph]:
    """The net, the same with gates, and their groups: to be copied."""
    _, *image = shape[:4]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = NETS[name](1000, *shape[4:])
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # every provider computes the same
            # The gradients of a net as torch makes it are rounding errors at its first layers: of what the
            # next norm undoes, and of sums of many branches.
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.3)
            if isinstance(module, BasicBlock) or (isinstance(module, InvertedResidual) and module.adds):
                *_, last = (m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
                nn.init.constant_(last.weight, 0.1)
        model = copy.deepcopy(net)
        graph = l0.nn.gate_(model, torch.zeros(1, *image), lam=LAM)
    return net, model, graph


def masked_net(net: nn.Module, graph: UnitGraph, z: list[Tensor]) -> nn.Module:
    """A net of the same parameters whose layers multiply the units that they read by `z` of their group.

    That closes them: all that depends on a unit alone is read by these layers.
    """
    twin = copy.deepcopy(net, {id(p): p for p in net.parameters()})

    def mask(i: int, layer: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args
        return x * z[i].to(x.dtype).view(-1, *[1] * (x.ndim - 2))

    for i, group in enumerate(graph.groups):
        for member in group.members:
            if member.role == "in":
                layer = twin.get_submodule(member.name.rpartition(".")[0])
                layer.register_forward_pre_hook(partial(mask, i))
    return twin


def whole_net(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False
) -> Case:
    """Cross entropy of a net with gates on all of its units and, gated, the penalty.

    shape: batch, channels, height and width of the images; with a fifth number so many stages of the net.
    """
    draw = Draw(dtype, device, exact)
    plain, model, graph = gated_net(name, shape)
    net = copy.deepcopy(plain).to(device, draw.double_or(dtype))
    parameters, group_sizes = list(net.parameters()), [group.parameters for group in graph.groups]
    log_alphas = [draw.log_alpha(group.units) for group in graph.groups]
    labels = draw.labels(shape[0], 1000)
    z: list[Tensor] = []
    twin = masked_net(net, graph, z)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), labels)

    def masked(sample: Sample, x: Tensor) -> Tensor:
        z[:] = sample(log_alphas)
        return loss(twin, x) + open_parameters(log_alphas, group_sizes)

    truths: dict[str, Forward] = {
        "dense": partial(loss, net),
        "masked": partial(masked, lambda gates: [torch_gate(a) for a in gates]),
        "gated": partial(masked, lambda gates: [g.z for g in l0.reference.sample_gates([*gates])]),
    }
    batches = draw.batches(*shape[:4], requires_grad=False)
    case = Case(dtype, batches, None, parameters, [[a] for a in log_alphas], truths)
    # About 100 activations a pixel. All norms behind one see it on its other side, and torch's of channels
    # in the last dimension, as packed activations lie, sum a channel's numbers one by one.
    case.kinks, case.kinked = 100 * batches[0][:, 0].numel(), 0.1
    if not exact:
        both = [*parameters, *log_alphas]
        case.providers = {
            "dense": Provider(truths["dense"], parameters, "dense", adam(parameters, ())),
            "masked": Provider(truths["masked"], both, "masked", adam(parameters, log_alphas)),
        }
        add_channels_last(case, net, loss)
        ours = copy.deepcopy(model).to(device, dtype)

        def with_modules(x: Tensor) -> Tensor:
            return loss(ours, x) + l0.nn.penalty(ours)

        add_modules(case, net, ours, with_modules)
        # A training starts with open gates; Adam's roots take 8 times as long of moments that are exactly 0.
        case.set_keep(1.0)
        for provider in case.providers.values():
            step, _ = case.steps(provider, "step")
            step(0)
    return case


ALL_OPS: dict[str, Callable[..., Case]] = {
    **OPS,
    **CONV_OPS,
    "encoder": encoder,
    "resnet18": partial(whole_net, "resnet18"),
    "mobilenet_v2": partial(whole_net, "mobilenet_v2"),
}
