"""The convolutional ops: a layer, LeNet-5-Caffe as the paper gates it, a block of a wide residual net."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from ops import LAM, Case, Draw, Forward, add_modules, add_providers, open_parameters, torch_gate
from torch import Tensor, nn

import l0kernels as l0


class Conv(nn.Conv2d):
    """torch's layer with numbers from a Draw."""

    def __init__(
        self, draw: Draw, n_in: int, n_out: int, size: int, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__(n_in, n_out, size, padding=padding, bias=bias, device="meta")
        self.weight = nn.Parameter(draw.normal(n_out, n_in, size, size, scale=(n_in * size**2) ** -0.5))
        if bias:
            self.bias = nn.Parameter(draw.normal(n_out))


def open_units(z: Tensor) -> Tensor:
    """Of the gates that are not 0; the first where all are: torch has no convolution without channels."""
    units = z.detach().nonzero().squeeze(1)
    return units if len(units) else units.new_zeros(1)


def on_device(x: list[Tensor], requires_grad: bool) -> list[Tensor]:
    """Batches in channels_last memory on a GPU, where every provider is fastest with it."""
    if x[0].is_cuda:
        x = [t.detach().contiguous(memory_format=torch.channels_last) for t in x]
    return [t.requires_grad_(requires_grad) for t in x]


def add_channels_last(case: Case, net: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """On a CPU also the dense net in channels_last memory: which one is faster varies."""
    if case.device.type == "cuda":
        return
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    where = {id(p): i for i, p in enumerate(net.parameters())}
    own = list(twin.parameters())
    leaves = [own[where[id(p)]] for p in case.parameters]

    def forward(x: Tensor) -> Tensor:
        return loss(twin, x.contiguous(memory_format=torch.channels_last))

    case.add_dense("dense_channels_last", forward, leaves)


def conv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """y = z (conv2d(x, W) + b): gates on the outputs, x (N, C, H, W) requires grad, W (O, C, k, k).

    3x3 is padded. shape: N, C, H, W, O, k.
    """
    N, C, H, W, O, k = shape
    draw = Draw(dtype, device, exact)
    padding = 1 if k == 3 else 0
    net = Conv(draw, C, O, k, padding)
    log_alpha = draw.log_alpha(O)
    weight, bias = net.weight, net.bias
    assert bias is not None
    grad = draw.normal(N, O, H + 2 * padding - k + 1, W + 2 * padding - k + 1)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_conv2d(x, weight, bias, padding=padding)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_conv2d(x, weight, bias, padding=padding, out_gates=api.sample_gates(log_alpha))

    def masked(x: Tensor) -> Tensor:
        z = torch_gate(log_alpha).to(dtype=weight.dtype)
        return F.conv2d(x, weight * z[:, None, None, None], bias * z, padding=padding)

    def index_select(x: Tensor) -> Tensor:
        z = torch_gate(log_alpha)
        units = open_units(z)
        y = F.conv2d(x, weight.index_select(0, units), bias.index_select(0, units), padding=padding)
        y = y * z.index_select(0, units).to(y.dtype)[:, None, None]
        return x.new_zeros(grad.shape).index_copy(1, units, y)

    truths: dict[str, Forward] = {"dense": net, "masked": masked, "gated": partial(gated, l0.reference)}
    batches = on_device(draw.batches(N, C, H, W, requires_grad=False), True)
    case = Case(dtype, batches, grad, [weight, bias], [[log_alpha]], truths)
    if not exact:
        add_providers(case, dense, gated, {"index_select": index_select}, "gated_conv2d")
        add_channels_last(case, net, lambda twin, x: twin(x))
    return case


def lenet5(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """LeNet-5-Caffe with gates on the maps of both convolutions and the inputs of both linear layers.

    shape: batch, channels, height and width of the images. Cross entropy and, gated, the penalty.
    """
    N, C, H, W = shape
    draw = Draw(dtype, device, exact)
    n_flat = 50 * ((H - 4) // 2 - 4) // 2 * (((W - 4) // 2 - 4) // 2)
    conv1, conv2 = Conv(draw, C, 20, 5), Conv(draw, 20, 50, 5)
    fc1, fc2 = draw.layer(n_flat, 500), draw.layer(500, 10)
    log_alphas = [draw.log_alpha(n) for n in (20, 50, n_flat, 500)]
    group_sizes = (25 * C + 1, 25 * 20 + 1, 500, 10)
    labels = draw.labels(N, 10)
    parts = [conv1, nn.ReLU(), nn.MaxPool2d(2), conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*parts, fc1, nn.ReLU(), fc2)
    weights, biases = [fc1.weight, fc2.weight], [fc1.bias, fc2.bias]

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), labels)

    def pooled(x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x), 2)

    def forward(api: ModuleType, x: Tensor, gates: Sequence[l0.Gates | None]) -> Tensor:
        x = pooled(api.gated_conv2d(x, conv1.weight, conv1.bias, out_gates=gates[0]))
        x = pooled(api.gated_conv2d(x, conv2.weight, conv2.bias, out_gates=gates[1]))
        return F.cross_entropy(api.gated_mlp(x.flatten(1), weights, biases, list(gates[2:])), labels)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return forward(api, x, [None] * 4)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        gates = api.sample_gates(log_alphas)
        return forward(api, x, gates) + api.l0_penalty(log_alphas, group_sizes, lam=LAM)

    def masked(x: Tensor) -> Tensor:
        z = [torch_gate(a).to(x.dtype) for a in log_alphas]
        for layer, gate in ((conv1, z[0]), (conv2, z[1])):
            assert layer.bias is not None
            x = pooled(F.conv2d(x, layer.weight * gate[:, None, None, None], layer.bias * gate))
        x = F.relu(F.linear(x.flatten(1), fc1.weight * z[2], fc1.bias))
        x = F.linear(x, fc2.weight * z[3], fc2.bias)
        return F.cross_entropy(x, labels) + open_parameters(log_alphas, group_sizes)

    def index_select(x: Tensor) -> Tensor:
        z = [torch_gate(a) for a in log_alphas]
        rows1, rows2, rows3 = open_units(z[0]), open_units(z[1]), open_units(z[3])
        weight = conv1.weight.index_select(0, rows1)
        gate = z[0].index_select(0, rows1).to(x.dtype)
        assert conv1.bias is not None
        assert conv2.bias is not None
        x = pooled(F.conv2d(x, weight * gate[:, None, None, None], conv1.bias.index_select(0, rows1) * gate))
        weight = conv2.weight.index_select(0, rows2).index_select(1, rows1)
        gate = z[1].index_select(0, rows2).to(x.dtype)
        x = pooled(F.conv2d(x, weight * gate[:, None, None, None], conv2.bias.index_select(0, rows2) * gate))
        # Columns of the channels that exist, and of those the open ones.
        columns = torch.arange(n_flat, device=x.device).view(50, -1).index_select(0, rows2).flatten()
        gate = z[2].index_select(0, columns)
        kept = open_units(gate)
        x = x.flatten(1).index_select(1, kept) * gate.index_select(0, kept).to(x.dtype)
        weight = fc1.weight.index_select(0, rows3).index_select(1, columns.index_select(0, kept))
        x = F.relu(F.linear(x, weight, fc1.bias.index_select(0, rows3)))
        x = x * z[3].index_select(0, rows3).to(x.dtype)
        x = F.linear(x, fc2.weight.index_select(1, rows3), fc2.bias)
        return F.cross_entropy(x, labels) + open_parameters(log_alphas, group_sizes)

    truths: dict[str, Forward] = {
        "dense": partial(loss, net),
        "masked": masked,
        "gated": partial(gated, l0.reference),
    }
    batches = on_device(draw.batches(N, C, H, W, requires_grad=False), False)
    gates = [[a] for a in log_alphas]
    case = Case(dtype, batches, None, list(net.parameters()), gates, truths, kinks=N * 20 * (H - 4) * (W - 4))
    if not exact:
        add_providers(case, dense, None, {"index_select": index_select}, "gated_conv2d")
        add_channels_last(case, net, loss)
        options = {"lam": LAM}
        layers = [l0.nn.L0Conv2d.from_dense(c, gate="out", **options) for c in (conv1, conv2)]
        ends = [l0.nn.L0Linear.from_dense(fc, gate="in", **options) for fc in (fc1, fc2)]
        inner = [layers[0], nn.ReLU(), nn.MaxPool2d(2), layers[1], nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        model = l0.nn.L0Sequential(*inner, ends[0], nn.ReLU(), ends[1])

        def with_modules(x: Tensor) -> Tensor:
            return loss(model, x) + l0.nn.penalty(model)

        add_modules(case, net, model, with_modules, "gated_conv2d")
    return case


class Block(nn.Module):
    """x + conv2(relu(norm2(conv1(relu(norm1(x)))))): 3x3 convolutions without biases."""

    def __init__(self, draw: Draw, n: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.BatchNorm2d(n, device=draw.device) for _ in range(2))
        self.conv1, self.conv2 = (Conv(draw, n, n, 3, 1, bias=False) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            norm.weight = nn.Parameter(draw.normal(n))
            norm.bias = nn.Parameter(draw.normal(n))
            norm.to(draw.double_or(draw.dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(h)))


def block(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """A block of a wide residual net with gates on the channels between its convolutions, x requires grad.

    The first convolution computes what the gates leave open, the norm behind it has statistics of these
    channels alone, the second one is gated on its inputs.
    """
    N, C, H, W = shape
    draw = Draw(dtype, device, exact)
    net, log_alpha = Block(draw, C), draw.log_alpha(C)
    norm1, norm2, w1, w2 = net.norm1, net.norm2, net.conv1.weight, net.conv2.weight
    parameters = [norm1.weight, norm1.bias, w1, norm2.weight, norm2.bias, w2]
    grad = draw.normal(N, C, H, W)

    def first(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, norm1.weight, norm1.bias, True))

    def body(api: ModuleType, x: Tensor, gates: l0.Gates | None) -> Tensor:
        h = api.gated_conv2d(first(x), w1, padding=1, out_support=gates)
        h = F.relu(api.gated_batch_norm(h, None, None, norm2.weight, norm2.bias, True, gates=gates))
        return x + api.gated_conv2d(h, w2, padding=1, in_gates=gates)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return body(api, x, None)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return body(api, x, api.sample_gates([log_alpha])[0])

    def masked(x: Tensor) -> Tensor:
        z = torch_gate(log_alpha).to(x.dtype)
        h = F.conv2d(first(x), w1, padding=1)
        h = F.relu(F.batch_norm(h, None, None, norm2.weight, norm2.bias, True))
        return x + F.conv2d(h, w2 * z[:, None, None], padding=1)

    def index_select(x: Tensor) -> Tensor:
        z = torch_gate(log_alpha)
        units = open_units(z)
        h = F.conv2d(first(x), w1.index_select(0, units), padding=1)
        weight, bias = (t.index_select(0, units) for t in (norm2.weight, norm2.bias))
        h = F.relu(F.batch_norm(h, None, None, weight, bias, True))
        gate = z.index_select(0, units).to(x.dtype)
        return x + F.conv2d(h, w2.index_select(1, units) * gate[:, None, None], padding=1)

    truths: dict[str, Forward] = {"dense": net, "masked": masked, "gated": partial(gated, l0.reference)}
    batches = on_device(draw.batches(N, C, H, W, requires_grad=False), True)
    case = Case(dtype, batches, grad, parameters, [[log_alpha]], truths, kinks=grad.numel())
    if not exact:
        add_providers(case, dense, None, {"index_select": index_select}, "gated_conv2d")
        add_channels_last(case, net, lambda twin, x: twin(x))
        twin = copy.deepcopy(net)
        between = l0.nn.L0Conv2d.from_dense(twin.conv2, gate="in")
        norm = l0.nn.L0BatchNorm2d.from_dense(twin.norm2)
        model = l0.nn.L0Residual(
            l0.nn.L0Sequential(twin.norm1, nn.ReLU(), twin.conv1, norm, nn.ReLU(), between)
        )
        ordered = nn.Sequential(net.norm1, net.conv1, net.norm2, net.conv2)
        add_modules(case, ordered, model, model, "gated_conv2d")
    return case


CONV_OPS: dict[str, Callable[..., Case]] = {"conv": conv, "lenet5": lenet5, "block": block}
