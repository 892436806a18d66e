"""Random nets of functions, views and layers, gated and compared with the oracle: see unit_oracle.

L0KERNELS_FUZZ_NETS nets are tried, 60 by default; check_net(seed) tries one.
"""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import fuzz_attention
import torch
import unit_oracle
from shuffle_nets import SHUFFLES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from unit_nets_images import LayerNorm2d

import l0kernels as l0
from l0kernels import _checks

NETS = int(os.environ.get("L0KERNELS_FUZZ_NETS", "60"))

ACTIVATIONS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh(),
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(-1, 1),
    "square": lambda x: x**2,
    "cos": torch.cos,
    "half": lambda x: x / 2 + 1,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "maximum": lambda x: torch.maximum(x, 0.2 * x),
    "abs": abs,
    "exp": lambda x: torch.exp(-x * x),
    "detached": lambda x: x * x.detach().sigmoid(),
}


def glu(x: Tensor, dim: int) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def split_and_join(x: Tensor, dim: int) -> Tensor:
    first = x.shape[dim] // 2
    a, b = torch.split(x, [first, x.shape[dim] - first], dim)
    return torch.cat((b, F.relu(a)), dim)


IMAGE = {
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "centred": lambda x: x - x.mean((2, 3), keepdim=True),
    "scaled": lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "amax": lambda x: x + x.amax(dim=(-2, -1)).unsqueeze(-1).unsqueeze(-1),
    "var": lambda x: x + x.var(dim=(2, 3))[:, :, None, None],
    "pad": lambda x: F.pad(x, (1, 0, 1, 0))[:, :, 1:, :-1],
    "interpolate": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "half of them": lambda x: x[:, : x.shape[1] // 2],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: torch.roll(x, 1, 1),
    "flip image": lambda x: x.flip(-1),
    "split": lambda x: split_and_join(x, 1),
    "stack": lambda x: torch.stack([x, x.sin()], 1).sum(1),
    "dropout": lambda x: F.dropout2d(x, 0.0, True),
    "flatten and back": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "zeros": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "unbind": lambda x: sum(x.unbind(0)).unsqueeze(0) + x,
    "softmax": lambda x: x.flatten(2).softmax(-1).view(x.shape),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "type": lambda x: x.to(x.dtype).type_as(x),
    "repeat": lambda x: x.repeat(1, 2, 1, 1)[:, : x.size(1)],
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "zeros added": lambda x: x + x.new_zeros(x.shape[-1]),
    "list": lambda x: torch.cat([x[:, i : i + 1] for i in range(x.shape[1])], 1),
    "item": lambda x: x + x[:, :, 0, 0][..., None, None],
    "normalized": lambda x: F.normalize(x.flatten(2), dim=2).view_as(x),
    "channel softmax": lambda x: x.softmax(1),
    "matrix": lambda x: x @ x.transpose(-1, -2),
    "over units": lambda x: x * x.mean(1, keepdim=True),
}
ROWS = {
    "split": lambda x: split_and_join(x, -1),
    "flip": lambda x: x.flip(-1),
    "half of them": lambda x: x[..., : x.shape[-1] // 2],
    "transposed": lambda x: x.transpose(0, -1).transpose(0, -1),
    "view": lambda x: x.contiguous().view(-1, x.shape[-1]).view(x.shape),
    "unsqueeze": lambda x: x[..., None].squeeze(-1),
    "expand": lambda x: x.unsqueeze(0).expand(2, *x.shape).mean(0),
    "softmax": lambda x: x.softmax(-1),
    "cumsum": lambda x: x.cumsum(0),
    "reshape": lambda x: x.reshape(x.shape[0], -1).reshape(x.shape),
    "set": lambda x: set_first(x),
    "outer": lambda x: torch.einsum("n...c,c->n...c", x, torch.ones(x.shape[-1], dtype=x.dtype)),
}


def set_first(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = 0.5
    return y


def recurrent(layer: Any, what: str, x: Tensor) -> Tensor:
    """What people take of recurrent layers and cells: all steps or the last ones, states begun otherwise."""
    if isinstance(layer, nn.RNNCellBase):
        state: Any = torch.ones(len(x), layer.hidden_size, dtype=x.dtype) if what == "given" else None
        state = (state, state) if state is not None and isinstance(layer, nn.LSTMCell) else state
        found = []
        for t in range(x.shape[1]):
            state = layer(x[:, t], state)
            found.append(state if isinstance(state, Tensor) else state[what == "cell"])
        return found[-1] if what == "last" else torch.stack(found, 1)
    if what == "packed":
        at = 0 if layer.batch_first else 1
        lengths = torch.arange(x.shape[at]) % x.shape[1 - at] + 1
        x = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False)
        return pad_packed_sequence(layer(x)[0], layer.batch_first)[0]
    y, state = layer(x)
    if what == "given":
        y, state = layer(x, state)
    if what in ("last", "cell"):
        return (state if isinstance(state, Tensor) else state[what == "cell"])[-1]
    return y


class Net(nn.Module):
    """Steps (kind, what, parts of self.parts, index of an earlier value) over a value.

    Sizes are found as the net is made, by running it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.values = nn.ParameterList()
        self.steps: list[tuple[str, Any, tuple[int, ...], int]] = []
        self.two = False
        self.build(random.Random(seed))

    # ---- running

    def step(self, x: Tensor, kept: list[Tensor], step: tuple[str, Any, tuple[int, ...], int]) -> Tensor:
        kind, what, parts, at = step
        layers = [self.parts[i] for i in parts if kind != "value"]
        if kind == "layer":
            layer: Any = layers[0]
            return layer(x) if what is None else F.linear(x, layer.weight, layer.bias)
        if kind == "activation":
            return ACTIVATIONS[what](x)
        if kind in ("image", "rows"):
            return (IMAGE if kind == "image" else ROWS)[what](x)
        if kind == "add":
            other = kept[at] if not layers else layers[0](kept[at])
            return {
                "+": lambda: x + other,
                "+=": lambda: x.clone().add_(other),
                "-": lambda: torch.sub(other, x),
            }[what]()
        if kind == "cat":
            return torch.cat([x, kept[at]], what)
        if kind == "glu":
            return glu(x, what)
        if kind == "shuffle":
            how, groups = what
            return SHUFFLES[how](x, groups)
        if kind == "last":
            norm, up, down = layers
            return x + down(F.gelu(up(norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        if kind == "squeeze":
            reduce, expand = layers
            return x * torch.sigmoid(expand(F.relu(reduce(x.mean((2, 3), keepdim=True)))))
        if kind == "value":
            value = self.values[parts[0]]
            value = value.view(-1, 1, 1) if x.ndim == 4 else value
            return x * value if what == "*" else x + value
        if kind == "recurrent":
            return recurrent(layers[0], what, x)
        if kind == "attention":
            q, k, v = (layer(x) for layer in layers)
            return x + torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        if kind == "block":
            return layers[0](x) if what is None else layers[0](x, kept[at])
        if kind == "pool":
            return {
                "mean": lambda: x.mean((2, 3)),
                "flatten": lambda: torch.flatten(x, 1),
                "amax": lambda: x.amax((-1, -2)),
                "view": lambda: x.reshape(len(x), -1),
            }[what]()
        assert kind == "keep"
        return x

    def forward(self, x: Tensor) -> Any:
        kept: list[Tensor] = []
        for step in self.steps:
            x = self.step(x, kept, step)
            kept += [x] if step[0] == "keep" else []
        return {"y": x, "mid": [kept[0].mean(0)]} if self.two else x

    # ---- making

    def build(self, rng: random.Random) -> None:
        self.rng = rng
        kind = rng.choice(["image", "image", "image", "sequence", "sequence", "rows"])
        n = rng.choice([2, 3])
        if kind == "image":
            self.example = torch.randn(n, 3, 6, 6, dtype=torch.float64)
        elif kind == "sequence" and rng.random() < 0.5:
            self.example = torch.randint(7, (n, 4))
        else:
            self.example = torch.randn(n, *([4] if kind == "sequence" else []), 5, dtype=torch.float64)
        self.x, self.kept = self.example, []
        if self.x.dtype == torch.int64:
            self.add(self.layer(nn.Embedding(7, 6)))
        elif kind == "image":
            self.add(self.layer(nn.Conv2d(3, 6, 3, padding=1)))
        else:
            self.add(self.layer(nn.Linear(5, 6)))
        if kind == "sequence":
            for _ in range(rng.randint(0, 3)):
                self.block()
        for _ in range(rng.randint(3, 9)):
            (self.image if self.x.ndim == 4 else self.row)()
        if self.x.ndim == 4:
            self.add(("pool", rng.choice(["mean", "flatten", "amax", "view"]), (), 0))
            for _ in range(rng.randint(0, 3)):
                self.row()
        if rng.random() < 0.9:
            self.add(self.layer(nn.Linear(self.x.shape[-1], 3)))
        self.two = rng.random() < 0.15 and bool(self.kept)
        del self.x, self.kept, self.rng

    def part(self, module: nn.Module) -> int:
        for parameter in module.parameters():  # biases of 0 behind norms are where relu has a kink
            if parameter.ndim == 1:
                nn.init.uniform_(parameter, 0.1, 1.0)
        self.parts.append(module.double())
        return len(self.parts) - 1

    def layer(self, module: nn.Module) -> tuple[str, Any, tuple[int, ...], int]:
        return ("layer", None, (self.part(module),), 0)

    def add(self, step: tuple[str, Any, tuple[int, ...], int]) -> None:
        """Takes a step, unless it makes too much, or numbers that say nothing."""
        with torch.no_grad():
            x = self.step(self.x.clone(), self.kept, step)
        units = x.shape[1] if x.ndim == 4 else x.shape[-1]
        if x.numel() > 3000 or not 1 < units < 40 or not x.isfinite().all() or x.abs().max() > 100:
            return
        self.x = x
        self.steps.append(step)
        if step[0] == "keep":
            self.kept.append(x)

    def common(self) -> bool:
        """A step that images and rows have alike."""
        rng, x = self.rng, self.x
        dim = 1 if x.ndim == 4 else -1
        units = x.shape[dim]
        kind = rng.choice(["activation", "keep", "add", "cat", "glu", "value", "again", "none", "none"])
        if kind == "activation":
            self.add(("activation", rng.choice([*ACTIVATIONS]), (), 0))
        elif kind == "keep":
            self.add(("keep", None, (), 0))
        elif kind in ("add", "cat") and self.kept:
            at = rng.randrange(len(self.kept))
            other = self.kept[at]
            if other.shape == x.shape and kind == "add":
                self.add(("add", rng.choice(["+", "+=", "-"]), (), at))
            elif other.ndim == x.ndim and other.shape[2:] == x.shape[2:] and x.ndim == 4:
                projection = self.part(nn.Conv2d(other.shape[1], units, 1))
                self.add(("add", "+", (projection,), at) if kind == "add" else ("cat", 1, (), at))
            elif other.ndim == x.ndim and other.shape[:-1] == x.shape[:-1]:
                self.add(("cat", -1, (), at))
        elif kind == "glu" and units % 2 == 0:
            self.add(("glu", dim, (), 0))
        elif kind == "value":
            self.values.append(nn.Parameter(torch.randn(units, dtype=torch.float64)))
            self.add(("value", rng.choice(["*", "+"]), (len(self.values) - 1,), 0))
        elif kind == "again":  # a layer is called twice
            layers = [step for step in self.steps if step[0] == "layer"]
            step = rng.choice(layers)
            part = self.parts[step[2][0]]
            weight = getattr(part, "weight", None)
            fits = (
                weight is not None and weight.ndim == (4 if x.ndim == 4 else 2) and weight.shape[1] == units
            )
            fits = fits and getattr(part, "groups", 1) == 1
            if fits and not isinstance(part, nn.Embedding | nn.ConvTranspose2d):
                self.add(step)
        else:
            return False
        return True

    def image(self) -> None:
        rng, units = self.rng, self.x.shape[1]
        if self.common():
            return
        kind = rng.choice(
            ["conv", "conv", "conv", "norm", "norm", "image", "image", "last", "squeeze", "shuffle", "up"]
        )
        out = rng.choice([4, 6, 8])
        if kind == "conv":
            groups = rng.choice(
                [g for g in (1, 1, 1, 2, units) if units % g == 0 and (out % g == 0 or g == units)]
            )
            out = units if groups == units and groups > 1 else out
            options = {"padding": 1, "bias": rng.random() < 0.5, "groups": groups}
            options["padding_mode"] = rng.choice(["zeros", "zeros", "reflect"])
            self.add(self.layer(nn.Conv2d(units, out, 3, **options)))
        elif kind == "norm":
            norms = [nn.BatchNorm2d(units), nn.BatchNorm2d(units, affine=False), nn.GroupNorm(1, units)]
            norms += [nn.InstanceNorm2d(units, affine=True), nn.GroupNorm(units, units), nn.PReLU(units)]
            norms += [LayerNorm2d(units)]
            norms += [nn.GroupNorm(2, units)] if units % 2 == 0 else []
            norms += [nn.BatchNorm2d(units, track_running_stats=False), nn.BatchNorm2d(units, momentum=None)]
            self.add(self.layer(rng.choice(norms)))
        elif kind == "image":
            self.add(("image", rng.choice([*IMAGE]), (), 0))
        elif kind == "last":
            parts = [nn.LayerNorm(units), nn.Linear(units, 5), nn.Linear(5, units)]
            self.add(("last", None, tuple(map(self.part, parts)), 0))
        elif kind == "squeeze":
            parts = [nn.Conv2d(units, 3, 1), nn.Conv2d(3, units, 1)]
            self.add(("squeeze", None, tuple(map(self.part, parts)), 0))
        elif kind == "shuffle" and (groups := [g for g in (2, 3, 4) if units % g == 0]):
            self.add(("shuffle", (rng.choice([*SHUFFLES]), rng.choice(groups)), (), 0))
        elif kind == "up":
            self.add(self.layer(nn.ConvTranspose2d(units, out, 3, padding=1)))

    def row(self) -> None:
        rng, units = self.rng, self.x.shape[-1]
        if self.common():
            return
        kind = rng.choice(["linear", "linear", "norm", "rows", "attention", "block", "recurrent"])
        if kind == "linear":
            kind, _, parts, at = self.layer(nn.Linear(units, rng.choice([4, 6, 8]), bias=rng.random() < 0.7))
            self.add((kind, "lent" if len(self.parts) % 3 == 0 else None, parts, at))
        elif kind == "norm":
            norms = [nn.LayerNorm(units), nn.RMSNorm(units), nn.LayerNorm(units, elementwise_affine=False)]
            norms += [nn.BatchNorm1d(units), nn.GroupNorm(1, units)] if self.x.ndim == 2 else []
            self.add(self.layer(rng.choice(norms)))
        elif kind == "rows":
            self.add(("rows", rng.choice([*ROWS]), (), 0))
        elif kind == "recurrent" and self.x.ndim == 3:
            cls = rng.choice([nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell])
            options: dict[str, Any] = {"bias": rng.random() < 0.7}
            if issubclass(cls, nn.RNNBase):
                options["num_layers"], options["bidirectional"] = rng.choice([1, 2]), rng.random() < 0.4
                options["batch_first"] = rng.random() < 0.5
            what = rng.choice(["all", "last", "cell", "given", "packed"])
            self.add(("recurrent", what, (self.part(cls(units, rng.choice([3, 4, 6]), **options)),), 0))
        elif kind == "attention" and self.x.ndim == 3:
            parts = [nn.Linear(units, 4), nn.Linear(units, 4), nn.Linear(units, units)]
            self.add(("attention", None, tuple(map(self.part, parts)), 0))
        elif kind == "block" and self.x.ndim == 3:
            self.block()

    def block(self) -> None:
        """A part of a transformer; it may attend to what was kept."""
        rng, (n, _, units) = self.rng, self.x.shape
        fits = [at for at, x in enumerate(self.kept) if x.ndim == 3 and len(x) == n]
        at = rng.choice(fits) if fits else 0
        block, attends = fuzz_attention.random_block(rng, units, self.kept[at].shape[-1] if fits else None)
        self.add(("block", "attends" if attends else None, (self.part(block),), at))
        if rng.random() < 0.4:
            self.add(("keep", None, (), 0))


def random_net(seed: int) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    net = Net(seed)
    return net, net.example


def has_gradient(net: Net, x: Tensor) -> bool:
    """Whether nothing in place is in the way of the net's backward pass."""
    try:
        unit_oracle.loss_of(copy.deepcopy(net)(x)).backward()
    except RuntimeError as error:
        if "inplace" in str(error):
            return False
        raise
    return True


def check_export(net: Net, x: Tensor, what: str) -> None:
    """The model without gates computes the same."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            return  # of the examples, which may be one
    small = l0.nn.export(net.eval())
    with torch.no_grad():
        pairs = zip(*(unit_oracle.tensors_of(one(x)) for one in (small, net)), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(
                mine, theirs, rtol=1e-6, atol=1e-6, msg=lambda t: f"{what}: export: {t}"
            )


def check_net(seed: int) -> int:
    """Gates a random net and compares it with the oracle; how many units it gates."""
    net, x = random_net(seed)
    rng = random.Random(-seed - 1)
    plain = copy.deepcopy(net)
    options: dict[str, Any] = {
        "residual": rng.random() < 0.9,
        "block": rng.choice([1, 1, 1, 2, 3]),
        "inputs": rng.random() < 0.2,
        "layers": rng.random() < 0.2,
    }
    if rng.random() < 0.2:
        options["kinds"] = rng.sample(["heads", "units", "width"], rng.choice([1, 2]))
    if not has_gradient(plain, x):
        return 0
    graph = l0.nn.unit_graph(net, x, inputs=options["inputs"])
    if not graph.select(residual=options["residual"]):
        return 0
    if rng.random() < 0.2:
        names = [group.name for group in graph.groups if group.makers == [group.name]]
        options["exclude"] = [rng.choice(names)] if len(names) > 1 else None
    try:
        graph = l0.nn.gate_(net, x, **options)
    except ValueError as error:
        if "units to gate" in str(error):
            return 0
        raise
    pattern, train = rng.choice(unit_oracle.PATTERNS), rng.random() < 0.6
    static, multiple = rng.random() < 0.3, rng.choice([0, 0, 2, 4])
    what = f"net {seed}, {pattern}, {'train' if train else 'eval'}, {'static' if static else 'exact'}"
    unit_oracle.set_gates(graph, net, pattern, seed)
    layers = net.l0_units.l0_layers
    if layers is not None:
        values = [rng.choice([-40.0, 0.3, 40.0, 40.0]) for _ in range(layers.n)]
        layers.log_alpha.data.copy_(torch.tensor(values))
    if multiple:
        net.l0_units.multiples = [1 if m == 1 else multiple for m in net.l0_units.multiples]
    net.train(train)
    readable = _checks.readable
    if static:
        _checks.readable = lambda: False
    try:
        unit_oracle.check(plain, net, graph, (x,), what, 1e-6)
    finally:
        _checks.readable = readable
    drawn = net.l0_units._recent[-1].z.detach().double()
    z = [*drawn[:-1].split([group.units for group in graph.groups])]
    unit_oracle.check_graph(plain, graph, z, (x,), what)
    if rng.random() < 0.2:
        check_export(net, x, what)
    return sum(group.units for group in graph.groups)
