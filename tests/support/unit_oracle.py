"""What a gated model computes, written out densely: the reference of the tests of gated units.

It shares no code with l0kernels.nn.units but for the graph: the plain model, with hooks that multiply what a
layer reads by z and what it makes by the support, and norms of the open units by their formulas.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import l0kernels as l0


def expand(v: Tensor, dim: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = -1
    return v.view(shape)


def set_gates(graph: l0.nn.UnitGraph, model: nn.Module, pattern: str, seed: int = 0) -> None:
    """log_alpha that closes or opens gates for certain, or leaves them to chance."""
    generator = torch.Generator().manual_seed(seed)
    gates = model.l0_units.gates
    one = int(torch.randint(len(gates), (1,), generator=generator))
    with torch.no_grad():
        for at, gate in enumerate(gates):
            n = gate.log_alpha.numel()
            half = torch.where(torch.rand(n, generator=generator) < 0.5, -40.0, 40.0)
            values = {
                "open": torch.full((n,), 40.0),
                "closed": torch.full((n,), -40.0),
                "half": half,
                "one group closed": torch.full((n,), -40.0 if at == one else 40.0),
                "one unit open": torch.where(torch.arange(n) == n // 2, 40.0, -40.0),
                "fractional": torch.rand(n, generator=generator) - 0.5,
                "mixed": torch.where(torch.rand(n, generator=generator) < 0.5, half, 0.0),
            }
            gate.log_alpha.copy_(values[pattern])


PATTERNS = ["open", "closed", "half", "one group closed", "one unit open", "fractional", "mixed"]


def first_changed(change: Any, args: Any, named: Any) -> Any:
    """The arguments of a call, `change` of the first, which may be given by name."""
    if args:
        return (change(args[0]), *args[1:]), named
    name = next(iter(named))
    return args, {**named, name: change(named[name])}


def is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))


def normed_dim(norm: nn.Module) -> int:
    """Where a layer, group or RMS norm has its units."""
    first = isinstance(norm, nn.GroupNorm) or type(norm).__name__.endswith("2d")
    return 1 if first or getattr(norm, "data_format", None) == "channels_first" else -1


def is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("LayerNorm")


class Oracle:
    """The plain model under given gates.

    Args:
        plain: the model before gate_.
        graph: of gate_.
        z: of each group, one value a unit.
        masks: whether what layers make is zero where it is closed; the semantics do not depend on it.
    """

    def __init__(self, plain: nn.Module, graph: l0.nn.UnitGraph, z: list[Tensor], masks: bool = True) -> None:
        self.model = copy.deepcopy(plain)
        self.z, self.masks, self.lent = z, masks, graph._lent
        names: dict[int, str] = {}
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, value in tensors:
            names.setdefault(id(value), name)
        self.sizes = {name: value.shape for name, value in tensors}
        self.members: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
        for at, group in enumerate(graph.groups):
            for member in group.members:
                self.members.setdefault((member.name, member.dim), []).append((at, member.index))
        for name, module in self.model.named_modules():
            self.hook(module, name, names)

    def along(self, key: tuple[str, int], size: int) -> Tensor | None:
        """z of each entry of a dimension, 1 where it is not gated."""
        if key not in self.members:
            return None
        value = torch.ones(size, dtype=torch.float64)
        for at, index in self.members[key]:
            value = value.index_copy(0, index.flatten(), self.z[at].repeat_interleave(index.shape[1]))
        return value

    def hook(self, module: nn.Module, name: str, names: dict[int, str]) -> None:
        def of(parameter: str, dim: int) -> Tensor | None:
            value = module._parameters.get(parameter)
            value = module._buffers.get(parameter) if value is None else value
            return None if value is None else self.along((names[id(value)], dim), value.shape[dim])

        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
            found = [of(f"{weight}{suffix}", 1) for weight in ("weight_ih", "weight_hh")]
            sizes = (module.input_size, module.hidden_size)
            z_in, z = (
                torch.ones(n, dtype=torch.float64) if v is None else v
                for v, n in zip(found, sizes, strict=True)
            )
            support = (z.detach() != 0).double() if self.masks else torch.ones_like(z)
            run = stacked if suffix else celled
            if any(v is not None for v in found):
                module.forward = lambda x, hx=None: run(module, Gated(z_in, z, support), x, hx)
            return
        if isinstance(module, nn.MultiheadAttention):
            out = module.out_proj.weight
            sides = [self.along((names.get(id(out), ""), dim), out.shape[dim]) for dim in (0, 1)]
            reads = [of(f"{name}_proj_weight", 1) for name in ("in", "q", "k", "v")]
            if any(one is not None for one in (*sides, *reads)):
                module.forward = lambda query, key, value, **options: attended(
                    module, (query, key, value), reads, sides, self.masks, **options
                )
            return
        if name in self.lent:  # a function reads the weight, z and all
            ins, outs = of("weight", 1), of("weight", 0)
            weight, bias = module.weight, module.bias
            weight = weight if ins is None else weight * ins
            if outs is not None and self.masks:
                is_open = (outs.detach() != 0).double()
                weight, bias = weight * is_open[:, None], None if bias is None else bias * is_open
            vars(module).update(weight=weight, bias=bias)
            return
        spatial = next((d for d in (1, 2, 3) if f"{d}d" in type(module).__name__), 0)  # Conv1D has none
        is_own = type(module).__name__ == "Conv1D"  # of GPT-2
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or is_own:
            rows, cols = (1, 0) if is_own or getattr(module, "transposed", False) else (0, 1)
            ins = of("weight", cols) if getattr(module, "groups", 1) == 1 else None
            outs = of("weight", rows)
            dim = -1 - spatial
            if ins is not None:
                module.register_forward_pre_hook(
                    lambda _, *given: first_changed(lambda x: x * expand(ins, dim, x.ndim), *given),
                    with_kwargs=True,
                )
        elif isinstance(module, nn.Embedding):
            outs, dim = of("weight", 1), -1
        else:
            found = [of(what, 0) for what in ("weight", "bias", "running_mean")]
            outs = next((one for one in found if one is not None), None)
            dim = 1
            is_last = is_rms_norm(module) or is_layer_norm(module)
            if is_last or isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
                dim = normed_dim(module)
                key = (f"{name}.", 0)
                if outs is None and key in self.members:
                    size = sum(index.numel() for _, index in self.members[key])
                    size = module.normalized_shape[0] if is_last else getattr(module, "num_channels", size)
                    outs = self.along(key, size)
                if outs is not None and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
                    support = (outs.detach() != 0).double()
                    module.forward = lambda *args, **named: normal(
                        module, [*args, *named.values()][0], support
                    )
            elif not isinstance(module, _BatchNorm | nn.PReLU):
                return
        if outs is None:
            return
        is_open = outs.detach() != 0
        if isinstance(module, _BatchNorm):
            module.forward = lambda x: batch_normal(module, x, is_open)
        if self.masks and not isinstance(module, nn.PReLU):
            module.register_forward_hook(lambda _, __, y: y * expand(is_open.double(), dim, y.ndim))


def batch_normal(norm: Any, x: Tensor, is_open: Tensor) -> Tensor:
    """Batch norm; closed channels keep their statistics."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    mean, variance = x.mean(dims), x.var(dims, correction=0)
    if norm.training and norm.running_mean is not None:
        n = x.numel() // x.shape[1]
        norm.num_batches_tracked += 1
        rate = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        for value, new in ((norm.running_mean, mean), (norm.running_var, variance * n / (n - 1))):
            value.copy_(torch.where(is_open, (1 - rate) * value + rate * new.detach(), value))
    elif norm.running_mean is not None:
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    y = (x - expand(mean, 1, x.ndim)) / expand(torch.sqrt(variance + norm.eps), 1, x.ndim)
    return y if norm.weight is None else y * expand(norm.weight, 1, x.ndim) + expand(norm.bias, 1, x.ndim)


def normal(norm: Any, x: Tensor, support: Tensor) -> Tensor:
    """LayerNorm, RMSNorm and GroupNorm of the open units."""
    dim = over = normed_dim(norm)
    value, mask = x, expand(support, dim, x.ndim).expand_as(x)
    if isinstance(norm, nn.GroupNorm):
        value, mask = (t.reshape(len(x), norm.num_groups, -1) for t in (value, mask))
        over = -1
    n = mask.sum(over, keepdim=True).clamp(min=1)
    mean = 0 if is_rms_norm(norm) else (value * mask).sum(over, keepdim=True) / n
    variance = ((value - mean).square() * mask).sum(over, keepdim=True) / n
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = ((value - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    bias = getattr(norm, "bias", None)
    y = y if norm.weight is None else y * expand(norm.weight + getattr(norm, "offset", 0), dim, x.ndim)
    return y if bias is None else y + expand(bias, dim, x.ndim)


def attended(
    layer: Any, given: Any, reads: Any, sides: Any, masks: bool, need_weights: bool = True, **options: Any
) -> Any:
    """nn.MultiheadAttention by torch's function, z in the weights that read units.

    Attention weights are 0 in closed heads, and their mean is over the open ones.
    """

    def times(weight: Tensor | None, z: Tensor | None) -> Tensor | None:
        return weight if weight is None or z is None else weight * z

    turned = [x.transpose(0, 1) if layer.batch_first and x.ndim == 3 else x for x in given]
    outs, heads = sides
    names = ("in", "q", "k", "v")
    whole, *parts = (
        times(getattr(layer, f"{name}_proj_weight"), z) for name, z in zip(names, reads, strict=True)
    )
    y, weights = F.multi_head_attention_forward(
        *turned,
        layer.embed_dim,
        layer.num_heads,
        whole,
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        0.0,
        times(layer.out_proj.weight, heads),
        layer.out_proj.bias,
        need_weights=need_weights,
        average_attn_weights=False,
        use_separate_proj_weight=whole is None,
        **dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True)),
        **options,
    )
    y = y.transpose(0, 1) if layer.batch_first and y.ndim == 3 else y
    if weights is not None:
        z = torch.ones(layer.embed_dim) if heads is None else heads.detach()
        is_open = (z.view(-1, layer.head_dim)[:, 0] != 0).double()
        weights = (weights * is_open[:, None, None]).sum(-3) / is_open.sum().clamp(min=1)
    return (y * (outs.detach() != 0) if masks and outs is not None else y), weights


class Gated(NamedTuple):
    """z of the inputs and hidden units of a recurrent layer, and which of the latter are open."""

    z_in: Tensor
    z: Tensor
    support: Tensor


def recurrent_step(
    layer: Any, gated: Gated, suffix: str, x: Tensor, state: list[Tensor], scale: Tensor
) -> list[Tensor]:
    """One time step of one layer and direction: h, and c of an LSTM, by the formulas of torch's docs."""
    h, c = state[0], state[-1]
    kinds = {"RNN_TANH": torch.tanh, "RNN_RELU": torch.relu}
    mode = getattr(layer, "mode", None) or type(layer).__name__.removesuffix("Cell")
    mode = f"RNN_{layer.nonlinearity.upper()}" if mode == "RNN" else mode
    biases = [getattr(layer, f"bias_{of}{suffix}", None) for of in ("ih", "hh")]
    a = (x * scale) @ getattr(layer, f"weight_ih{suffix}").T + (0 if biases[0] is None else biases[0])
    b = (h * gated.z) @ getattr(layer, f"weight_hh{suffix}").T + (0 if biases[1] is None else biases[1])
    if mode in kinds:
        return [kinds[mode](a + b) * gated.support]
    if mode == "GRU":
        (r, u, n), (r2, u2, n2) = a.chunk(3, -1), b.chunk(3, -1)
        u = torch.sigmoid(u + u2)
        n = torch.tanh(n + torch.sigmoid(r + r2) * n2)
        return [((1 - u) * n + u * h) * gated.support]
    i, f, g, o = (a + b).chunk(4, -1)
    c = (torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)) * gated.support
    return [torch.sigmoid(o) * torch.tanh(c), c]


def celled(cell: Any, gated: Gated, x: Tensor, hx: Any) -> Any:
    """nn.RNNCell, GRUCell and LSTMCell."""
    pair = isinstance(cell, nn.LSTMCell)
    zeros = x.new_zeros(*x.shape[:-1], cell.hidden_size)
    state = [zeros] * (1 + pair) if hx is None else [*hx] if pair else [hx]
    state = recurrent_step(cell, gated, "", x, [v * gated.support for v in state], gated.z_in)
    return tuple(state) if pair else state[0]


def stacked(layer: Any, gated: Gated, x: Any, hx: Any) -> Any:
    """nn.RNN, GRU and LSTM without dropout, loops over layers, directions and time."""
    given, pair, ways = x, layer.mode == "LSTM", 1 + layer.bidirectional
    batched = isinstance(x, PackedSequence) or x.ndim == 3
    if isinstance(given, PackedSequence):
        x, lengths = pad_packed_sequence(given)
    else:
        x = x if batched else x[:, None]
        x = x.transpose(0, 1) if layer.batch_first and batched else x
        lengths = torch.full((x.shape[1],), len(x))
    if hx is None:
        hx = [x.new_zeros(layer.num_layers * ways, x.shape[1], layer.hidden_size)] * (1 + pair)
    else:
        hx = [v if batched else v[:, None] for v in (hx if pair else [hx])]
    scale, last = gated.z_in, []
    for at in range(layer.num_layers):
        outs = []
        for way in range(ways):
            suffix = f"_l{at}{'_reverse' if way else ''}"
            state = [v[ways * at + way] * gated.support for v in hx]
            found: list[Tensor] = [x] * len(x)
            for t in reversed(range(len(x))) if way else range(len(x)):
                runs = (t < lengths)[:, None]
                new = recurrent_step(layer, gated, suffix, x[t], state, scale)
                state = [torch.where(runs, a, b) for a, b in zip(new, state, strict=True)]
                found[t] = torch.where(runs, state[0], 0)
            outs.append(torch.stack(found))
            last.append(state)
        x, scale = torch.cat(outs, -1), gated.z.repeat(ways)
    states = tuple(torch.stack(v) for v in zip(*last, strict=True))
    if not batched:
        x, states = x[:, 0], tuple(v[:, 0] for v in states)
    if isinstance(given, PackedSequence):
        x = pack_padded_sequence(x, lengths, enforce_sorted=given.sorted_indices is None)
    elif layer.batch_first and batched:
        x = x.transpose(0, 1)
    return x, states if pair else states[0]


def tensors_of(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def loss_of(out: Any) -> Tensor:
    """A number that all entries of all results have a different weight in."""
    total = torch.zeros((), dtype=torch.float64)
    for t in tensors_of(out):
        weights = torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)
        total = total + (t * weights).sum() + (t.square() * weights.flip(0)).sum()
    return total


def float_inputs(args: Any) -> list[Tensor]:
    return [t for t in tensors_of(args) if t.is_floating_point()]


def check(
    plain: nn.Module,
    model: nn.Module,
    graph: l0.nn.UnitGraph,
    args: tuple[Any, ...],
    what: str,
    tolerance: float = 1e-7,
) -> None:
    """Results, gradients and statistics of a gated model equal the oracle's.

    Args:
        plain: the model before gate_, with the state of `model`.
        model: gated.
        graph: of gate_.
        args: its inputs.
        what: said where it differs.
    """

    def near(mine: Tensor | None, other: Tensor | None, of: str) -> None:
        mine = torch.zeros_like(other) if mine is None and other is not None else mine
        other = torch.zeros_like(mine) if other is None and mine is not None else other
        if mine is None or other is None:
            return

        def message(text: str) -> str:
            return f"{what}: {of}: {text}"

        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=message)

    inputs = [t.detach().clone().requires_grad_() for t in float_inputs(args)]
    given = iter(inputs)
    args = pytree.tree_map_only(Tensor, lambda t: next(given) if t.is_floating_point() else t, args)
    plain.train(model.training)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("l0_units")})
    out = model(*args)
    for t in tensors_of(out):
        assert type(t) is Tensor, f"{what}: {type(t)} comes out"
    groups = model.l0_units
    drawn = groups._recent[-1].z
    sizes = [group.units for group in groups.groups]
    z = [part.detach().double().requires_grad_() for part in drawn[:-1].split(sizes)]
    loss = loss_of(out)
    parameters = dict(model.named_parameters())
    model.zero_grad()
    loss.backward(retain_graph=True)
    grads = [t.grad for t in (*parameters.values(), *inputs)]
    state = {name: b.clone() for name, b in model.named_buffers()}

    oracle = Oracle(plain, graph, z)
    args = pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, args)
    others = [t.requires_grad_() for t in float_inputs(args)]
    expected = oracle.model(*args)
    for i, (mine, other) in enumerate(zip(tensors_of(out), tensors_of(expected), strict=True)):
        near(mine, other, f"result {i}")
    theirs = dict(oracle.model.named_parameters())
    loss_of(expected).backward()
    found = [t.grad for t in (*theirs.values(), *z, *others)]
    by_name = dict(zip(theirs, found, strict=False))
    for name, grad in zip(parameters, grads, strict=False):
        if name in by_name:
            near(grad, by_name[name], f"gradient of {name}")
    for i, (mine, other) in enumerate(
        zip(grads[len(parameters) :], found[len(theirs) + len(z) :], strict=True)
    ):
        near(mine, other, f"gradient of input {i}")
    for name, b in oracle.model.named_buffers():
        near(state[name], b, f"buffer {name}")
    if drawn.requires_grad:
        expected_dz = [
            torch.zeros_like(v) if g is None else g for v, g in zip(z, found[len(theirs) :], strict=False)
        ]
        names = [name for name in parameters if name.startswith("l0_units")]
        alphas = [parameters[name] for name in names]
        wanted = torch.autograd.grad(
            drawn, alphas, torch.cat([*expected_dz, drawn.new_zeros(1)]).to(drawn.dtype), retain_graph=True
        )
        mine = [grads[list(parameters).index(name)] for name in names]
        for name, a, b in zip(names, mine, wanted, strict=True):
            near(a, b, f"gradient of {name}")


def perturb(model: nn.Module, graph: l0.nn.UnitGraph, z: list[Tensor]) -> None:
    """Random numbers wherever a closed unit has parameters or statistics."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for group, gate in zip(graph.groups, z, strict=True):
            for member in group.members:
                index = member.index[gate == 0].flatten()
                if member.name in tensors and len(index):
                    value = tensors[member.name]
                    noise = torch.randn_like(value.index_select(member.dim, index)) * 10
                    value.index_copy_(member.dim, index, noise.abs() if "var" in member.name else noise)


def check_graph(plain: nn.Module, graph: l0.nn.UnitGraph, z: list[Tensor], args: Any, what: str) -> None:
    """Nothing that the graph says belongs to a closed unit is seen in the result: columns alone have z."""
    other = copy.deepcopy(plain)
    perturb(other, graph, z)
    with torch.no_grad():
        mine = Oracle(plain, graph, z, masks=False).model(*args)
        theirs = Oracle(other, graph, z, masks=False).model(*args)
    for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=lambda text: f"{what}: {text}")
