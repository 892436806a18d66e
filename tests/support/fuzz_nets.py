"""Random containers of gated and plain layers, and what they must equal: their modules one by one, and masks.

``random_net(seed)`` gives a module and an input for it; ``check_net(seed)`` runs it packed on every backend
and compares output, buffers and every gradient with :class:`OneByOne`, in which no channel is ever packed.
"""

import copy
import inspect
import math
import os
import random
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F

import l0kernels as l0
from l0kernels import nn
from op_checks import BACKENDS

T = torch.nn

NETS = int(os.environ.get("L0KERNELS_FUZZ_NETS", "60"))
"""How many nets the test-suite tries."""

ROUNDINGS = 16 * 316
"""How far a result may be off: a norm makes 1 / sqrt(1e-5) = 316 of a rounding in a constant channel."""

KEEPS_ZERO = (
    (T.ReLU, {}),
    (T.Tanh, {}),
    (T.GELU, {}),
    (T.SiLU, {}),
    (T.ELU, {}),
    (T.LeakyReLU, {"negative_slope": 0.2}),
    (T.Softsign, {}),
    (T.Hardshrink, {"lambd": 0.1}),
    (T.Identity, {}),
    (T.GELU, {"approximate": "tanh"}),
    (T.Dropout, {"p": 0.0}),
)
MOVES_ZERO = (
    (T.Sigmoid, {}),
    (T.Softplus, {}),
    (T.LogSigmoid, {}),
    (T.Hardtanh, {"min_val": 0.1, "max_val": 2.0}),
    (T.Hardsigmoid, {}),
    (T.Threshold, {"threshold": 0.1, "value": 0.7}),
)


PRODUCTS = (T.Conv1d, T.Conv2d, T.Linear, nn.L0MLP, T.BatchNorm2d)
"""What keeps nothing of its output for backward, which an activation in place would spoil."""


class Swap(T.Module):
    """A module of which nobody knows what it does to units: here it turns their order round."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.flip(self.dim)


class _Maker:
    """Grows a net along an input, whose shape is known at every point by running what there is."""

    def __init__(self, seed, batched):
        self.random = random.Random(seed)
        self.gates = []
        self.batched = batched if batched is not None else self.random.random() < 0.75
        self.batch = self.random.choice((1, 1, 2, 3, 5)) if self.random.random() < 0.97 else 0
        self.width = self.random.choice((3, 4, 6))
        self.sizes = (
            1,
            2,
            5,
            8,
            self.width,
            self.width,
        )  # features and channels are often as many as columns
        if self.chance(0.08):
            self.sizes = (*self.sizes, 17, 130)

    def chance(self, p):
        return self.random.random() < p

    def size(self):
        return self.random.choice(self.sizes)

    def gate(self, n, dist):
        """A new gate, or one that other layers have, too."""
        fitting = [gate for gate in self.gates if gate.n == n and gate.dist == dist]
        if fitting and self.chance(0.35):
            return self.random.choice(fitting)
        mode = self.random.choice(("paper", "paper", "median", "topk"))
        gate = nn.HardConcreteGate(n, dist=dist, eval_mode=mode)
        if self.chance(0.3):
            self.gates.append(gate)
        return gate

    def sides(self, kinds, n_in, n_out):
        kind = self.random.choice(kinds)
        options = {"gate": kind}
        dist = l0.HardConcrete(0.5, -0.3, 1.2) if self.chance(0.1) else l0.HardConcrete()
        if kind in ("in", "both"):
            options["in_gate"] = self.gate(n_in, dist)
        if kind in ("out", "both"):
            options["out_gate"] = self.gate(n_out, dist)
        return options

    def net(self):
        """The container, and an input for it."""
        start = self.random.choice(("image", "image", "image", "image", "sequence", "rows"))
        if start == "image":
            shape = (self.size(), self.random.choice((self.width, 5)), self.width)
        elif start == "sequence":
            shape = (self.size(), self.random.choice((self.width, 7)))
        else:
            shape = (self.width,)
        if self.batched or start == "rows":
            shape = (self.batch, *shape)
        kind = {"image": 3, "sequence": 2, "rows": 1}[start]
        if self.chance(0.08):
            body, (_, got) = self.branch(kind, shape, 1)
            return self.residual(kind, shape, body, got, 1)[0], shape
        modules, _ = self.chain(kind, shape, self.random.randint(2, 9), 0)
        return nn.L0Sequential(*modules), shape

    def branch(self, kind, shape, depth):
        modules, at = self.chain(kind, shape, self.random.randint(1, 3), depth)
        container = self.random.choice((nn.L0Sequential, nn.L0Sequential, T.Sequential))
        if len(modules) == 1 and self.chance(0.3):
            return modules[0], at
        return container(*modules), at

    def residual(self, kind, shape, body, got, depth):
        """body with a shortcut that fits, or that broadcasts; None if none does."""
        if got == shape and self.chance(0.6):
            return nn.L0Residual(body), shape
        if kind == 3 and len(got) == len(shape):
            out = self.random.choice((got[-3], got[-3], 1))
            layer = self.conv2d(shape, out=out, size=1)
            if self.chance(0.2):  # one value per channel, for all positions
                layer = self.conv2d((*shape[:-2], 1, 1), out=out, size=1)
                return nn.L0Residual(body, nn.L0Sequential(T.AdaptiveAvgPool2d(1), layer)), got
            if out_shape(layer, shape)[-2:] == got[-2:]:
                return nn.L0Residual(body, layer), got
        if kind == 1:
            layer = self.linear(shape, out=got[-1])
            if len(got) == len(shape):
                return nn.L0Residual(body, layer), got
        return None, shape

    def chain(self, kind, shape, length, depth):
        """Modules one after the other, and (where the units lie, the shape) behind them."""
        modules = []
        for _ in range(length):
            for _ in range(20):
                found = self.step(kind, shape, depth, bool(modules) and isinstance(modules[-1], PRODUCTS))
                if modules and self.chance(0.04):
                    again = self.random.choice(modules)
                    found = None if getattr(again, "inplace", False) else (again, kind)
                if found is None:
                    continue
                module, new_kind = found
                got = out_shape(module, shape)
                if got is None or math.prod(got) > 4000 or 0 in got[1 if self.batched else 0 :]:
                    continue
                modules.append(module)
                kind, shape = new_kind, got
                break
        return modules, (kind, shape)

    def step(self, kind, shape, depth, behind_product):
        """A module that takes an input of the shape, and where the units of its output lie, or None."""
        kind = kind if kind <= len(shape) else 0
        if kind > 1 and shape[-kind] == shape[-1] and self.chance(0.25):
            return self.linear(shape), 0  # over the columns: as many features as there are channels
        if kind > 1 and self.chance(0.1):
            return self.columns(kind, shape), 0
        choice = self.random.random()
        if choice < 0.24:
            return self.activation(behind_product), kind
        if choice < 0.32 and depth < 2:
            if self.chance(0.4):
                body, at = self.branch(kind, shape, depth + 1)
                return body, at[0]
            body, (body_kind, got) = self.branch(kind, shape, depth + 1)
            if body_kind != kind:
                return None
            module, _ = self.residual(kind, shape, body, got, depth)
            return None if module is None else (module, kind)
        if choice < 0.4:
            return self.odd(kind, shape)
        if kind == 3:
            return self.image_step(shape)
        if kind == 2:
            return self.sequence_step(shape)
        return self.rows_step(shape, depth)

    def activation(self, behind_product):
        kind, options = self.random.choice(MOVES_ZERO if self.chance(0.3) else KEEPS_ZERO)
        if self.chance(0.03):
            return self.random.choice((T.Sequential, nn.L0Sequential))()
        if behind_product and self.chance(0.3) and "inplace" in inspect.signature(kind).parameters:
            options = options | {"inplace": True}
        return kind(**options)

    def columns(self, kind, shape):
        """A convolution of as many channels as the gated layer behind it reads columns."""
        flattens = kind == 3 and len(shape) == 3  # one image: its positions become the columns
        out = shape[-1] * shape[-2] if flattens else shape[-1]
        if kind == 3:
            conv = self.conv2d(shape, out=out, size=1)
        else:
            conv = self.conv(T.Conv1d, nn.L0Conv1d, 1, shape, out=out, size=1)
        gate = self.gate(out, l0.HardConcrete())
        layer = nn.L0Linear(out, self.size(), gate="in", in_gate=gate)
        return self.random.choice((T.Sequential, nn.L0Sequential))(
            conv, *([T.Flatten()] if flattens else []), T.ReLU(), layer
        )

    def odd(self, kind, shape):
        """A border: other modules, other dimensions, linear layers over columns."""
        r = self.random.random()
        if r < 0.45:
            return self.linear(shape), (1 if kind == 1 else 0)
        if r < 0.55:
            return T.LayerNorm(shape[-1]), kind
        if r < 0.65:
            return Swap(-kind if kind else -1), kind
        if r < 0.7:
            return T.PReLU(), kind
        if r < 0.75:
            return T.Softmax(-1), kind
        if len(shape) == 4:
            flat = self.random.choice((T.Flatten(2), T.Flatten(1, 2), T.Flatten(-3), T.Flatten(0, 1)))
            if flat.start_dim == 0 and not shape[0]:
                return None  # no channels but those of a batch
            if flat.start_dim == 0:
                return flat, 2 if self.chance(0.5) else 0
            return flat, 2 if flat.start_dim != -3 else 1
        if kind == 1 and len(shape) == 2 and self.batched:
            n = shape[-1]
            heights = [h for h in (1, 2, 3) if n % h == 0]
            h = self.random.choice(heights)
            return T.Unflatten(1, (h, n // h, 1) if self.chance(0.5) else (n // h, h, 1)), 3
        return None

    def geometry(self, shape, dims, size):
        options = {"kernel_size": [], "stride": [], "padding": [], "dilation": []}
        for extent in shape[-dims:]:
            k = self.random.choice((1, 2, 3)) if size is None else size
            d = self.random.choice((1, 1, 2)) if size is None else 1
            p = self.random.choice((0, 1)) if size is None else 0
            s = self.random.choice((1, 1, 2)) if size is None else 1
            if d * (k - 1) + 1 > extent + 2 * p:
                k, d = 1, 1
            for name, value in zip(options, (k, s, p, d), strict=True):
                options[name].append(value)
        options = {name: tuple(value) for name, value in options.items()}
        if size is None and self.chance(0.2):
            options |= {"padding": "same", "stride": 1}
        if options["padding"] != "same" and self.chance(0.2) and max(options["padding"]):
            options["padding_mode"] = self.random.choice(("reflect", "replicate", "circular"))
        return options

    def conv2d(self, shape, out=None, size=None):
        return self.conv(T.Conv2d, nn.L0Conv2d, 2, shape, out, size)

    def conv(self, plain, gated, dims, shape, out=None, size=None):
        n_in, n_out = shape[-dims - 1], self.size() if out is None else out
        if out is None and self.chance(0.2):
            n_out = shape[-1]
        groups = 1
        if self.chance(0.3):
            both = [g for g in range(1, n_in + 1) if not n_in % g and not n_out % g]
            groups = self.random.choice(both or [1])
        options = self.geometry(shape, dims, size) | {"groups": groups, "bias": self.chance(0.8)}
        if self.chance(0.3):
            return plain(n_in, n_out, **options)
        return gated(
            n_in, n_out, **options, **self.sides(("in", "in", "out", "out", "both", None), n_in, n_out)
        )

    def linear(self, shape, out=None):
        n_in, n_out = shape[-1], self.size() if out is None else out
        bias = self.chance(0.8)
        if self.chance(0.25):
            return T.Linear(n_in, n_out, bias)
        if self.chance(0.12):
            return nn.L0Linear(n_in, n_out, bias, gate=self.random.choice(("weight", (2, 2))))
        return nn.L0Linear(
            n_in, n_out, bias, **self.sides(("in", "in", "in", "out", "both", None), n_in, n_out)
        )

    def image_step(self, shape):
        r = self.random.random()
        if r < 0.45:
            return self.conv2d(shape), 3
        if r < 0.65:
            values = math.prod(shape) // max(1, shape[-3])
            if len(shape) != 4 or values < 2:
                return None
            options = {
                "affine": self.chance(0.85),
                "track_running_stats": self.chance(0.9),
                "momentum": self.random.choice((0.1, 0.3, None)),
            }
            if options["affine"] and "bias" in inspect.signature(T.BatchNorm2d).parameters:
                options["bias"] = self.chance(0.9)  # new in torch 2.13
            return (nn.L0BatchNorm2d if self.chance(0.75) else T.BatchNorm2d)(shape[-3], **options), 3
        if r < 0.82:
            pools = (
                T.MaxPool2d(2, 1),
                T.MaxPool2d(2),
                T.MaxPool2d(3, 2, 1),
                T.AvgPool2d(2),
                T.AvgPool2d(2, 1, 1),
                T.AdaptiveAvgPool2d(1),
                T.AdaptiveMaxPool2d((2, 1)),
                T.ZeroPad2d((1, 0, 0, 2)),
                T.ReflectionPad2d(1),
                T.ReplicationPad2d((0, 1, 1, 0)),
                T.Dropout2d(0.0) if len(shape) == 4 else T.Dropout(0.0),
                T.AvgPool1d(2) if len(shape) == 3 else T.AvgPool2d((1, 2)),
            )
            return self.random.choice(pools), 3
        return T.Flatten(), 1 if len(shape) == 4 else 0

    def sequence_step(self, shape):
        r = self.random.random()
        if r < 0.5:
            return self.conv(T.Conv1d, nn.L0Conv1d, 1, shape), 2
        if r < 0.8:
            pools = (
                T.MaxPool1d(2, 1),
                T.AvgPool1d(2),
                T.AdaptiveAvgPool1d(1),
                T.AdaptiveMaxPool1d(2),
                T.ZeroPad1d((1, 0)),
                T.ReflectionPad1d(1),
                T.ReplicationPad1d((0, 1)),
                T.MaxPool2d((2, 1), 1) if len(shape) == 3 else T.Dropout(0.0),
            )
            return self.random.choice(pools), 2
        return T.Flatten(), 1 if len(shape) == 3 else 0

    def rows_step(self, shape, depth):
        if self.chance(0.12):
            sizes = [shape[-1], *(self.size() for _ in range(self.random.randint(1, 3)))]
            return nn.L0MLP(
                sizes, self.random.choice(("relu", "gelu", "silu", "identity")), gate_input=self.chance(0.5)
            ), 1
        if self.chance(0.1):
            return T.Flatten(), 1
        return self.linear(shape), 1


def out_shape(module, shape):
    """The shape behind a module; None if torch refuses the input."""
    twin = copy.deepcopy(module).eval()
    reference = OneByOne({})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for training in (False, True):
                y = reference.run(twin.train(training), torch.randn(shape), eval_gates=True)
        return tuple(y.shape)
    except (RuntimeError, ValueError, IndexError):
        return None


def random_net(seed, *, batched=None):
    """A random container (L0Sequential, sometimes L0Residual) and an input for it.

    Both are float32 or float64, the module in train(); equal seeds give equal nets. Parameters, running
    statistics and log_alpha are drawn, some gates all closed or all open, some parameters are frozen; x may
    be of one image, of none, channels last, and a leaf that wants its gradient or not.

    Args:
        seed: an int.
        batched: whether the input has a batch dimension; None: most have.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        maker = _Maker(seed, batched)
        net = None
        while net is None:
            net, shape = maker.net()
        dtype = torch.float32 if maker.chance(0.2) else torch.float64
        net = net.to(dtype)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, T.BatchNorm2d):
                    for t, low in ((module.weight, 0.5), (module.bias, -1), (module.running_mean, -1)):
                        if t is not None:
                            t.uniform_(low, 1.5)
                    if module.running_var is not None:
                        module.running_var.uniform_(0.5, 1.5)
            for gate in nn.gate_modules(net):
                gate.log_alpha.normal_(0, maker.random.choice((0.5, 3)))
                if maker.chance(0.12):
                    gate.log_alpha.fill_(maker.random.choice((-30, -30, 30)))
                if maker.chance(0.05):
                    gate.float()  # gates of float32 in front of weights of float64
            for parameter in net.parameters():
                parameter.requires_grad_(not maker.chance(0.08))
        if maker.chance(0.1):
            net = net.to(memory_format=torch.channels_last)
            for module in net.modules():  # see OneByOne.conv: torch's own layers would go wrong by themselves
                if type(module) is T.Conv2d and module.groups > 1:
                    module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
        for module in net.modules():
            if isinstance(module, T.Linear) and maker.chance(0.05):
                module.weight.data = module.weight.data.t().contiguous().t()
            if (
                isinstance(module, PRODUCTS)
                and getattr(module, "bias", None) is not None
                and maker.chance(0.05)
            ):
                module.bias.data = module.bias.data.repeat_interleave(2)[::2]
        x = torch.randn(shape, dtype=dtype)
        if len(shape) == 4 and maker.chance(0.3):
            x = x.contiguous(memory_format=torch.channels_last)
        elif len(shape) == 3 and maker.chance(0.1):
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif maker.chance(0.05):
            x = x.repeat_interleave(3, -1)[..., ::3]
        elif maker.chance(0.05) and x.numel():
            x = x[:1].expand(shape)
        return net, x.requires_grad_(maker.chance(0.85))


class OneByOne:
    """The modules of a net one by one on dense tensors, each with its drawn gates; no step knows another.

    Args:
        gates: the gates of this forward, by module.
        masks: multiply by z and call torch's own functions instead of this package's modules.
    """

    def __init__(self, gates, masks=False):
        self.gates = gates
        self.masks = masks
        self.counts = {}

    def run(self, net, x, eval_gates=False):
        self.eval_gates = eval_gates
        x, _ = self.steps(_Branch([net], None), x, None, False)
        return x

    def z(self, gate):
        if gate is None:
            return None
        if self.eval_gates:
            return gate.eval_gates()
        return self.gates[gate]

    def steps(self, branch, x, closed, gated):
        """x and the (gate, dimension from the end) that closes units in it, behind the steps of a branch."""
        while branch.steps:
            module, branch = branch.steps[0], _Branch(branch.steps[1:], branch.rest, branch.gated)
            inner = branch.gated or gated
            if type(module).forward is nn.L0Sequential.forward or isinstance(module, T.Sequential):
                within = inner or isinstance(module, nn.L0Sequential)
                x, closed = self.steps(_Branch(list(module), branch, within), x, closed, within)
            elif isinstance(module, nn.L0Residual):
                # Dense values first: where the units lie tells which gates both branches have.
                a, of_a = x, closed
                if module.shortcut is not None:
                    a, of_a = self.steps(_Branch([module.shortcut], branch, True), x, closed, True)
                b, of_b = self.steps(_Branch([module.body], branch, True), x, closed, True)
                x, closed = a + b, of_a if of_a == of_b else None
            else:
                x, closed = self.leaf(module, x, closed, branch, inner)
        return x, closed

    def leaf(self, module, x, closed, rest, gated):
        if isinstance(module, T.Conv1d | T.Conv2d):
            in_gate, out_gate = getattr(module, "in_gate", None), getattr(module, "out_gate", None)
            dims = 1 if isinstance(module, T.Conv1d) else 2
            return self.conv(module, x, self.z(in_gate), self.z(out_gate), dims), (
                None if out_gate is None else (out_gate, -1 - dims)
            )
        if isinstance(module, T.Linear):
            out_gate = getattr(module, "out_gate", None)
            return self.linear(module, x), None if out_gate is None else (out_gate, -1)
        if isinstance(module, nn.L0MLP):
            return self.mlp(module, x), None
        if isinstance(module, nn.L0BatchNorm2d):
            gate = None
            if gated:
                gate = closed[0] if closed and closed[1] == -3 else rest.reader(-3, x.ndim)
                gate = gate if gate is not None and gate.n == module.num_features else None
            y = self.norm(module, x, self.z(gate))
            return y, None if gate is None or not closed else closed
        y = module(x)
        if closed is not None:
            closed = _behind(module, closed, x.ndim)
        return y, closed

    def conv(self, module, x, in_gates, out_gates, dims):
        if not self.masks:
            if hasattr(module, "in_gate"):
                return module(x, in_gates, out_gates)
            return module(x)
        shape = (-1, *[1] * dims)
        if in_gates is not None:
            x = x * in_gates.z.view(shape)
        # torch's gradient of a grouped weight is wrong for a single image whose channels come last and whose
        # batch has a view's stride, where the weight's channels come last, too.
        y = module._conv_forward(x.contiguous(), module.weight, module.bias)
        return y if out_gates is None else y * out_gates.z.view(shape)

    def linear(self, module, x):
        if not isinstance(module, nn.L0Linear):
            return module(x)
        if module.weight_gate is not None:
            if not self.masks:
                return module(x)
            z = module.spread(self.z(module.weight_gate).z)
            return F.linear(x, module.weight * z, module.bias)
        in_gates, out_gates = self.z(module.in_gate), self.z(module.out_gate)
        if not self.masks:
            return module(x, in_gates, out_gates)
        y = F.linear(x if in_gates is None else x * in_gates.z, module.weight, module.bias)
        return y if out_gates is None else y * out_gates.z

    def mlp(self, module, x):
        gates = [self.z(layer.in_gate) for layer in module.layers]
        if not self.masks:
            return module(x, gates)
        for i, (layer, gate) in enumerate(zip(module.layers, gates, strict=True)):
            x = nn.mlp.ACTIVATIONS[module.activation]()(x) if i else x
            x = F.linear(x if gate is None else x * gate.z, layer.weight, layer.bias)
        return x

    def norm(self, module, x, gates):
        if not self.masks:
            return module(x, gates)
        is_open = torch.ones(x.shape[1], dtype=torch.bool) if gates is None else gates.z.detach() != 0
        is_open = is_open.nonzero()[:, 0]
        buffers = module.running_mean, module.running_var
        some = [None if t is None else t[is_open] for t in (*buffers, module.weight, module.bias)]
        if module.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            counts = self.counts.setdefault(module, torch.zeros(x.shape[1], dtype=x.dtype))
            counts[is_open] += 1
        out = torch.zeros_like(x)
        if not len(is_open):
            return out + sum(0 * t.sum() for t in (x, module.weight, module.bias) if t is not None)
        training = module.training or some[0] is None
        y = F.batch_norm(x[:, is_open].contiguous(), *some, training, module.momentum or 1.0, module.eps)
        if module.training and some[0] is not None:
            for buffer, value in zip(buffers, some, strict=False):
                if module.momentum is None:  # the average over the batches in which a channel was open
                    value = buffer[is_open] + (value - buffer[is_open]) / counts[is_open]
                buffer[is_open] = value
        return out.index_copy(1, is_open, y)


class _Branch:
    """The steps that are left of a container, and those of the containers around it."""

    def __init__(self, steps, rest, gated=False):
        self.steps = steps
        self.rest = rest
        self.gated = gated

    def reader(self, dim, ndim):
        """The gate on the inputs of the next layer, if it is that layer's only and its units lie at dim."""
        if not self.steps:
            return None if self.rest is None else self.rest.reader(dim, ndim)
        module, rest = self.steps[0], _Branch(self.steps[1:], self.rest, self.gated)
        if isinstance(module, T.Sequential):
            return _Branch(list(module), rest).reader(dim, ndim)
        if isinstance(module, nn.L0Residual):
            if module.shortcut is None:
                return None
            first, second = (
                _Branch([part], rest).reader(dim, ndim) for part in (module.body, module.shortcut)
            )
            return first if first is second else None
        if isinstance(module, T.Conv1d | T.Conv2d):
            reads = -2 if isinstance(module, T.Conv1d) else -3
            return getattr(module, "in_gate", None) if dim == reads else None
        if isinstance(module, nn.L0MLP):
            return module.layers[0].in_gate if dim == -1 else None
        if isinstance(module, T.Linear):
            return getattr(module, "in_gate", None) if dim == -1 else None
        if isinstance(module, nn.L0BatchNorm2d):
            return rest.reader(dim, ndim) if dim == -3 else None
        behind = _behind(module, (None, dim), ndim, zeros=False)
        if behind is None:
            return None
        return rest.reader(behind[1], 2 if type(module) is T.Flatten else ndim)


ONE_D = (T.MaxPool1d, T.AvgPool1d, T.AdaptiveAvgPool1d, T.AdaptiveMaxPool1d, T.ZeroPad1d)
ONE_D += (T.ReflectionPad1d, T.ReplicationPad1d, T.Dropout1d)
TWO_D = (T.MaxPool2d, T.AvgPool2d, T.AdaptiveAvgPool2d, T.AdaptiveMaxPool2d, T.ZeroPad2d)
TWO_D += (T.ReflectionPad2d, T.ReplicationPad2d, T.Dropout2d)


def _behind(module, closed, ndim, zeros=True):
    """Where closed units lie behind a module that is no layer; None where they are not zero any more."""
    gate, dim = closed
    kinds = [kind for kind, _ in KEEPS_ZERO] + ([] if zeros else [kind for kind, _ in MOVES_ZERO])
    if type(module) in kinds:
        return closed
    if type(module) in ONE_D:
        return closed if dim <= -2 else None
    if type(module) in TWO_D:
        return closed if dim <= -3 else None
    if type(module) is T.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        if ndim == 2:
            return closed
        return gate, {1: -1, 0: -2}.get(ndim + dim)
    return None


def draw(net, seed):
    """What a forward in train() gets, by gate: detached Gates, of a gate per weight its seed."""
    generator = torch.Generator().manual_seed(seed)
    per_weight = {layer.weight_gate for layer in net.modules() if getattr(layer, "gate", None) == "weight"}
    drawn = {}
    for gate in nn.gate_modules(net):
        key = torch.randint(2**62, (1,), generator=generator)
        with torch.no_grad():
            drawn[gate] = (
                key
                if gate in per_weight
                else l0.reference.sample_gates(gate.log_alpha.flatten(), seed=key, dist=gate.dist)
            )
    return drawn


@contextmanager
def set_draw(drawn):
    """What a GateBank has drawn."""
    for gate, value in drawn.items():
        nn.gate.set_drawn(gate, value)
    yield
    for gate in drawn:
        nn.gate.set_drawn(gate, None)


def twin_of(net, drawn):
    """A copy of the net, and what was drawn for its gates."""
    twin = copy.deepcopy(net)
    gates = zip(nn.gate_modules(net), nn.gate_modules(twin), strict=True)
    return twin, {copied: drawn[gate] for gate, copied in gates} if drawn else {}


def results(net, x, y, dy):
    """Output, gradients and buffers by name."""
    found = {"y": y.detach()}
    if y.requires_grad and dy is not None:
        y.backward(dy)
    found |= {f"d {name}": p.grad for name, p in net.named_parameters()} | {"d x": x.grad}
    buffers = {name: b.clone() for name, b in net.named_buffers() if "batches_open" not in name}
    return found | buffers


def leaf(x):
    """x, which nobody writes into, as a leaf of its own."""
    return x.detach().requires_grad_(x.requires_grad)


def in_container(net, x, drawn, dy, given, hooked=None, again=None):
    """The container itself; gates from a bank, or handed over.

    Args:
        hooked: the number of a module that somebody watches.
        again: gates of another forward between this one and its backward; its statistics stay, too.
    """
    net, drawn = twin_of(net, drawn)
    x = leaf(x)
    if hooked is not None:
        watched = [module for module in net.modules() if type(module).__module__.startswith("torch.nn")]
        if watched:
            watched[hooked % len(watched)].register_forward_hook(lambda *_: None)
    if again is not None:
        gates = zip(drawn, again.values(), strict=True)
        with set_draw(drawn):
            y = net(x)
        before = {name: b.clone() for name, b in net.named_buffers()}
        with set_draw(dict(gates)):
            net(x)
        found = results(net, x, y, dy)
        return found | {name: value for name, value in before.items() if name in found}
    with set_draw(drawn):
        if given:
            y = net(x, {gate: gates for gate, gates in drawn.items() if isinstance(gates, l0.Gates)})
        else:
            y = net(x)
        return results(net, x, y, dy)


def one_by_one(net, x, drawn, dy):
    """Every module by itself, with the gates of the draw."""
    net, drawn = twin_of(net, drawn)
    x = leaf(x)
    with set_draw(drawn):
        gates = {gate: gate() for gate in nn.gate_modules(net) if gate.seed is None}
        y = OneByOne(gates).run(net, x)
        return results(net, x, y, dy)


def masked(net, x, drawn, dy, dtype, jitter=None):
    """The formula: dense products times masks, dlog_alpha from dz; operands shaken by ``jitter``."""
    net, drawn = twin_of(net, drawn)
    z = {}
    for gate in nn.gate_modules(net):
        found = drawn.get(gate) if net.training else gate.eval_gates()
        if isinstance(found, torch.Tensor):
            found = l0.Gates.from_z(
                l0.reference.gates.sample_z(gate.log_alpha.detach(), found, 0, 0, gate.dist).flatten()
            )
        z[gate] = found.z.detach()
    net, x = net.to(dtype), x.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if jitter is not None:
        for t in (x, *net.parameters()):
            noise = torch.randn(t.shape, generator=jitter, dtype=dtype)
            t.data.mul_(1 + 4 * torch.finfo(dtype).eps * noise)
    x.requires_grad_(dy[1])
    leaves = {
        gate: values.to(dtype).requires_grad_(net.training and gate.log_alpha.requires_grad)
        for gate, values in z.items()
    }
    gates = {gate: l0.Gates.from_z(values) for gate, values in leaves.items()}
    y = OneByOne(gates, masks=True).run(net, x)
    found = results(net, x, y, None if dy[0] is None else dy[0].to(dtype))
    for name, gate in net.named_modules():
        if isinstance(gate, nn.HardConcreteGate):
            dz, value = leaves[gate].grad, leaves[gate].detach()
            width = gate.dist.zeta - gate.dist.gamma
            s = (value - gate.dist.gamma) / width
            slope = torch.where((value > 0) & (value < 1), width / gate.dist.beta * s * (1 - s), 0)
            found[f"d {name}.log_alpha"] = None if dz is None else (dz * slope).view(gate.log_alpha.shape)
    return found


def check_net(seed, *, batched=None, backends=(*BACKENDS, "reference"), net=None):
    """Raises AssertionError, naming what differs, unless the container equals its modules and the masks.

    Returns:
        Whether the net is well conditioned: shaken by a few roundings, the formula stays where it is.
    """
    net, x = random_net(seed, batched=batched) if net is None else net
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Using padding='same'"
        )  # torch's convolutions, of even kernels
        return _check(seed, net, x, backends)


def _check(seed, net, x, backends):
    smooth = True
    for training in (True, False):
        net.train(training)
        drawn = draw(net, seed) if training else {}
        shape = masked(net, x, drawn, (None, False), torch.float64, torch.Generator())["y"].shape
        dy = torch.randn(shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        if seed % 7 == 0 and dy.numel():
            dy = dy.flatten()[:1].view([1] * dy.ndim).expand(shape)  # as of a sum
        elif seed % 7 == 1 and dy.ndim == 4:
            dy = dy.contiguous(memory_format=torch.channels_last)
        exact = masked(net, x, drawn, (dy, x.requires_grad), torch.float64)
        shaken = [
            masked(net, x, drawn, (dy, x.requires_grad), x.dtype, torch.Generator().manual_seed(seed + i))
            for i in range(2)
        ]
        runs = {}
        for i, backend in enumerate(backends):
            with l0.use_backend(backend):
                hooked = seed if (seed + i) % 5 == 0 else None
                again = draw(net, seed + 1) if drawn and (seed + i) % 6 == 0 else None
                runs[f"packed, {backend}"] = in_container(net, x, drawn, dy, (seed + i) % 2, hooked, again)
                if (seed + i) % len(backends) == 0:
                    runs[f"one by one, {backend}"] = one_by_one(net, x, drawn, dy)
        for how, got in runs.items():
            assert got.keys() == exact.keys(), how
            for name, value in got.items():
                what = f"net {seed}, {'train' if training else 'eval'}, {how}: {name}"
                smooth &= compare(what, value, exact[name], [run[name] for run in shaken], x.dtype)
    return smooth


def compare(what, got, exact, shaken, dtype):
    """Whether the shaken values are near the exact one; asserts that got is no further away."""
    assert (got is None) == (exact is None), f"{what} is {got}, expected {exact}"
    if got is None:
        return True
    assert got.shape == exact.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not got.numel():
        return True
    exact, scale = exact.double(), max(1.0, exact.double().abs().max().item())
    noise = max((run.double() - exact).abs().max().item() for run in shaken)
    eps = max(torch.finfo(t).eps for t in (dtype, got.dtype) if t.is_floating_point)  # gates may have less
    limit = 16 * noise + ROUNDINGS * eps * scale
    error = (got.double() - exact).abs().max().item()
    assert error <= limit, f"{what}: error {error:.3g} above {limit:.3g}"
    return noise < 1e-3 * scale
