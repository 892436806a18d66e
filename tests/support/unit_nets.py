"""Small nets of each kind, whose forwards call functions, views and branches, for tests of gated units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

Example = tuple[nn.Module, tuple[Any, ...]]
NETS: dict[str, Callable[[], Example]] = {}
"""By name: makes a net, in float64, and an example of its inputs."""


def net(make: Callable[[], Example]) -> Callable[[], Example]:
    def made() -> Example:
        module, args = make()
        for (
            part
        ) in module.modules():  # behind norms of what is constant, biases of 0 are where relu has its kink
            if type(part).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d")):
                for parameter in part.parameters():
                    nn.init.uniform_(parameter, 0.1, 1.0)
        return module.double(), args

    NETS[make.__name__] = made
    return made


def image(channels: int = 3, size: int = 8, batch: int = 2, dims: int = 2) -> Tensor:
    return torch.randn(batch, channels, *[size] * dims, dtype=torch.float64)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stem(out: int, cin: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Head(nn.Module):
    """Pools, flattens and classifies."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.body(x), 1)
        return self.fc(torch.flatten(x, 1))


# ---- convolutional nets


class Basic(nn.Module):
    def __init__(self, cin: int, out: int, stride: int = 1, shortcut: str = "projection") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.more = stride, out - cin
        self.shortcut = None
        if stride > 1 and shortcut == "projection":
            self.shortcut = nn.Sequential(nn.Conv2d(cin, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1:  # option A
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        y += x
        return self.relu(y)


@net
def resnet() -> Example:
    return Head(nn.Sequential(stem(4), Basic(4, 4), Basic(4, 6, 2), Basic(6, 6)), 6), (image(),)


@net
def resnet_option_a() -> Example:
    return Head(nn.Sequential(stem(4), Basic(4, 4), Basic(4, 6, 2, "pad"), Basic(6, 6)), 6), (image(),)


class Bottleneck(nn.Module):
    def __init__(self, cin: int, width: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.nb = nn.BatchNorm2d(width)
        self.c, self.nc = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.down = None if stride == 1 and cin == out else nn.Conv2d(cin, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.na(self.a(x)))
        y = torch.relu_(self.nb(self.b(y)))
        y = self.nc(self.c(y))
        return F.relu(y + (x if self.down is None else self.down(x)), inplace=True)


@net
def bottleneck() -> Example:
    return Head(nn.Sequential(stem(4), Bottleneck(4, 3, 8), Bottleneck(8, 3, 8, 2)), 8), (image(),)


@net
def resnext() -> Example:
    return Head(nn.Sequential(stem(4), Bottleneck(4, 6, 8, 1, 3), Bottleneck(8, 6, 8, 2, 3)), 8), (image(),)


class PreAct(nn.Module):
    def __init__(self, cin: int, out: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, out, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.down = nn.Conv2d(cin, out, 1, bias=False) if cin != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x).relu()
        skip = self.down(y) if self.down else x
        y = self.conv2(F.dropout(self.bn2(self.conv1(y)).relu(), 0.0, self.training))
        return torch.add(y, skip)


@net
def preactivation() -> Example:
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), PreAct(4, 6), PreAct(6, 6), nn.BatchNorm2d(6))
    return Head(body, 6), (image(),)


class Squeeze(nn.Module):
    def __init__(self, width: int, inner: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(F.relu(self.reduce(s))))


class Inverted(nn.Module):
    def __init__(
        self, cin: int, hidden: int, out: int, stride: int = 1, act: Any = nn.ReLU6, squeeze: Any = None
    ) -> None:
        super().__init__()
        layers = [nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act(inplace=True)]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [act(inplace=True)]
        layers += [Squeeze(hidden, 2, squeeze)] if squeeze else []
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv, self.res = nn.Sequential(*layers), stride == 1 and cin == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.res else self.conv(x)


@net
def mobilenet_v2() -> Example:
    return Head(nn.Sequential(stem(4), Inverted(4, 6, 4), Inverted(4, 8, 5, 2)), 5), (image(),)


@net
def mobilenet_v3() -> Example:
    body = [Inverted(4, 6, 4, 1, nn.Hardswish, F.hardsigmoid), Inverted(4, 8, 5, 2, nn.Hardswish)]
    return Head(nn.Sequential(stem(4), *body), 5), (image(),)


@net
def efficientnet() -> Example:
    body = [Inverted(4, 6, 4, 1, nn.SiLU, torch.sigmoid), Inverted(4, 8, 5, 2, nn.SiLU, torch.sigmoid)]
    return Head(nn.Sequential(stem(4), *body), 5), (image(),)


class Dense(nn.Module):
    def __init__(self, start: int, growth: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(start + growth * i) for i in range(layers))
        self.convs = nn.ModuleList(
            nn.Conv2d(start + growth * i, growth, 3, padding=1, bias=False) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, dim=1)


@net
def densenet() -> Example:
    transition = [nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 5, 1), nn.AvgPool2d(2)]
    return Head(nn.Sequential(stem(4), Dense(4, 3, 2), *transition, Dense(5, 2, 2)), 9), (image(),)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = stem(4), stem(5, 4), stem(6, 5)
        self.up2, self.up1 = nn.ConvTranspose2d(6, 5, 2, 2), nn.ConvTranspose2d(5, 4, 2, 2, bias=False)
        self.mix2, self.mix1, self.out = stem(5, 10), stem(4, 8), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.mix2(torch.cat((self.up2(c), b), 1))
        return self.out(self.mix1(torch.cat((self.up1(b), a), 1)))


@net
def unet() -> Example:
    return UNet(), (image(),)


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(True)
        )
        self.head = nn.Sequential(
            nn.Linear(20, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return F.log_softmax(self.head(x.view(-1, 20)), dim=-1)


@net
def vgg() -> Example:
    return VGG(), (image(),)


class LayerNorm2d(nn.LayerNorm):
    """As torchvision and timm have it: of the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ChannelsLayerNorm(nn.Module):
    """As ConvNeXt's authors have it, by a setting of either format."""

    def __init__(self, width: int, data_format: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.eps, self.normalized_shape, self.data_format = 1e-6, (width,), data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@net
def convnext() -> Example:
    stem = nn.Conv2d(3, 4, 2, 2), LayerNorm2d(4, eps=1e-6)
    down = ChannelsLayerNorm(4, "channels_first"), nn.Conv2d(4, 6, 2, 2)
    return Head(nn.Sequential(*stem, ConvNeXtBlock(4), *down, ConvNeXtBlock(6)), 6), (image(),)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 5), nn.GELU(), nn.Linear(5, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 4, 4)
        self.blocks = nn.ModuleList([MixerBlock(4, 4), MixerBlock(4, 4)])
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x).mean(1))


@net
def mixer() -> Example:
    return Mixer(), (image(),)


class Shuffle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.Conv2d(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), 1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


@net
def shufflenet() -> Example:
    return Head(nn.Sequential(stem(8), Shuffle(8), Shuffle(8)), 8), (image(),)


@net
def autoencoder() -> Example:
    encoder = [nn.Conv2d(1, 4, 3, 2, 1), nn.ELU(), nn.Conv2d(4, 3, 3, 2, 1), nn.Tanh()]
    decoder = [nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.LeakyReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1)]
    return nn.Sequential(*encoder, *decoder, nn.Sigmoid()), (image(1),)


class Constants(nn.Module):
    """What a forward does with numbers in place of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 4, 3), nn.Linear(36, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x), 2).relu_()
        assert x.shape[1] == 4
        assert x.size() == (len(x), 4, 3, 3)
        x = x.view(-1, 36)
        return self.fc2(torch.clamp(self.fc1(x), min=0.0))


@net
def constants() -> Example:
    return Constants(), (image(1),)


@net
def pixel_shuffle() -> Example:
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*body, nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1)), (image(),)


class Resizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 2, 3, padding_mode="reflect"),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(F.pad(x, (1, 1, 1, 1)))
        low = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="bilinear", align_corners=False)
        y = y + self.b(low)
        y = F.pad(F.dropout2d(y, 0.3, self.training and False), (1, 1, 1, 1), mode="reflect")
        return self.c(F.interpolate(y, size=(6, 6)))


@net
def resizes() -> Example:
    return Resizes(), (image(),)


@net
def conv1d() -> Example:
    body = [nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.GELU(), nn.MaxPool1d(2)]
    return nn.Sequential(*body, nn.Conv1d(4, 5, 3, groups=1), nn.Flatten(), nn.Linear(10, 2)), (
        image(2, 8, dims=1),
    )


@net
def conv3d() -> Example:
    body = [nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, groups=4)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)), (
        image(1, 4, dims=3),
    )


@net
def norms() -> Example:
    body = [
        nn.Conv2d(3, 6, 3),
        nn.GroupNorm(1, 6),
        nn.PReLU(6),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.GroupNorm(3, 6),
    ]
    body += [nn.PReLU(), nn.Conv2d(6, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(4, 4)]
    body += [nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*body), (image(),)


# ---- rows


class Towers(nn.Module):
    """Two inputs, a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Linear(5, 6), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        self.project, self.joint, self.value = nn.Linear(4, 6), nn.Linear(12, 5), nn.Linear(5, 1)

    def forward(self, image: Tensor, *, words: Tensor) -> dict[str, Any]:
        a = torch.tanh(self.words(words))
        b = self.project(self.image(image).amax((-2, -1)))
        y = torch.relu(self.joint(torch.cat([a, b], -1)))
        return {"value": self.value(y).squeeze(-1), "pair": (a, [y.sum(-1)])}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()

    def forward(self, image: Tensor, words: Tensor) -> Any:
        return self.towers(image, words=words)


@net
def towers() -> Example:
    return TwoInputs(), (image(1), rows(2, 5))


class GLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down, self.norm = nn.Linear(hidden, width, bias=False), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@net
def glu() -> Example:
    return nn.Sequential(nn.Linear(4, 5), GLU(5, 6), SwiGLU(5, 4), nn.Linear(5, 2)), (rows(3, 2, 4),)


class GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(7, 5), nn.GRU(5, 6, batch_first=True)
        self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor) -> Tensor:
        out, state = self.gru(self.embed(words))
        return self.out(F.relu(self.hidden(out[:, -1] + state[-1])))


@net
def gru() -> Example:
    return GRU(), (torch.randint(7, (3, 4)),)


class Cells(nn.Module):
    """Loops over time of cells, whose first state is learned, zeros, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(7, 5), nn.GRUCell(5, 4)
        self.lstm, self.rnn = nn.LSTMCell(4, 6), nn.RNNCell(6, 3, bias=False, nonlinearity="relu")
        self.start, self.out = nn.Parameter(torch.randn(1, 4)), nn.Linear(9, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        h, pair = self.start.expand(len(x), -1), None
        last, found = x.new_zeros(len(x), 3), []
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
            pair = self.lstm(torch.tanh(h), pair)
            last = self.rnn(pair[0], last)
            found.append(torch.cat([last, pair[1]], 1))
        return self.out(torch.stack(found, 1).mean(1))


@net
def cells() -> Example:
    return Cells(), (torch.randint(7, (3, 4)),)


class Translator(nn.Module):
    """The states of an encoder, and a projection of them, begin a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(7, 4), nn.LSTM(4, 5, 2)
        self.decoder, self.cell = nn.LSTM(3, 5, 2, batch_first=True), nn.GRUCell(5, 6)
        self.bridge, self.out = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, words: Tensor, given: Tensor) -> Tensor:
        _, (h, c) = self.encoder(self.embed(words).transpose(0, 1))
        y, _ = self.decoder(given, (h, c))
        h = self.bridge(h[-1])
        for step in y.unbind(1):
            h = self.cell(step, h)
        return self.out(h)


@net
def translator() -> Example:
    return Translator(), (torch.randint(7, (3, 4)), rows(3, 3, 3))


class TwoWays(nn.Module):
    """Both directions of a stack; states given by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.rnn = nn.GRU(6, 4, 2, bias=False, bidirectional=True)
        self.one, self.out = nn.RNN(8, 5, nonlinearity="relu"), nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        y, last = self.rnn(self.norm(self.down(x)), state)
        y, last = self.one(torch.tanh(y[:, 0]), None if last is None else last.new_zeros(1, 5))
        return self.out(y + last)


@net
def two_ways() -> Example:
    return TwoWays(), (rows(4, 2, 4), rows(4, 2, 4))


class Packed(nn.Module):
    """Sequences of several lengths, packed without padding."""

    def __init__(self, enforce_sorted: bool) -> None:
        super().__init__()
        self.embed, self.enforce_sorted = nn.Embedding(7, 5), enforce_sorted
        self.lstm = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)
        self.rnn, self.out = nn.RNN(8, 4), nn.Linear(8, 2)

    def forward(self, words: Tensor) -> Tensor:
        lengths = torch.tensor([4, 3, 1] if self.enforce_sorted else [3, 1, 4])
        options = {"batch_first": True, "enforce_sorted": self.enforce_sorted}
        packed = pack_padded_sequence(self.embed(words), lengths, **options)
        packed, (h, _) = self.lstm(packed)
        packed, last = self.rnn(packed, h[-1:].tanh())
        y, lengths = pad_packed_sequence(packed, batch_first=True)
        return self.out(torch.cat([y.sum(1) / lengths[:, None], last[0]], -1))


@net
def packed() -> Example:
    return Packed(False), (torch.randint(7, (3, 4)),)


@net
def packed_sorted() -> Example:
    return Packed(True), (torch.randint(7, (3, 4)),)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(7, 5), nn.LSTM(5, 6, proj_size=4, batch_first=True)
        self.up, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(self.lstm(self.embed(words))[0])))


@net
def projected() -> Example:
    return Projected(), (torch.randint(7, (3, 4)),)


class Attention(nn.Module):
    """A block in front of the head, its stream an embedding with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(7, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.positions[:, : words.shape[1]]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(1))


@net
def attention() -> Example:
    return Attention(), (torch.randint(7, (3, 4)),)


@net
def encoder_layer() -> Example:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2)), (rows(2, 4, 3),)


@net
def encoder() -> Example:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), (
        rows(2, 4, 3),
    )


class SeveralAttentions(nn.Module):
    """Keys and values of other widths, masks, keys that are learned, time in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(2, 4)
        self.cross = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, add_bias_kv=True, add_zero_attn=True)
        self.alone = nn.MultiheadAttention(6, 3, bias=False)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, y = self.first(x), torch.relu(self.second(other))  # (time, examples, features)
        padding = torch.arange(len(y)) >= torch.tensor([[len(y)], [len(y) - 1]])
        x = x + self.cross(x, y, y, key_padding_mask=padding, need_weights=False)[0]
        later = torch.arange(len(x))[:, None] < torch.arange(len(x))
        z = self.alone(x, x, x, attn_mask=later, need_weights=False, is_causal=True)[0]
        each = torch.linspace(-1, 1, 6 * len(x) ** 2, dtype=x.dtype).view(6, len(x), len(x))
        return self.last(z + self.alone(x[:, :], z, z, attn_mask=each, need_weights=False)[0])


@net
def several_attentions() -> Example:
    return SeveralAttentions(), (rows(5, 2, 3), rows(4, 2, 2))


class HandAttention(nn.Module):
    """Heads by views, as in most transformers; the stream has RMSNorm, the values gates of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).reshape(n, length, width))


@net
def hand_attention() -> Example:
    return nn.Sequential(nn.Linear(3, 8), HandAttention(8, 2), SwiGLU(8, 6), nn.Linear(8, 2)), (
        rows(2, 4, 3),
    )


class OwnRMSNorm(nn.Module):
    """As LLaMA has it: a forward of its own."""

    offset = 0.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.double()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.offset) * x.to(kind)


class OffsetRMSNorm(OwnRMSNorm):
    """As Gemma has it."""

    offset = 1.0


def turned(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


class GroupedQueries(nn.Module):
    """Rotary positions, normalised heads, keys and values that several queries share; pre-norm."""

    def __init__(self, width: int, heads: int, shared: int, each: int, enable_gqa: bool = False) -> None:
        super().__init__()
        self.sizes, self.enable_gqa = (heads, shared, each), enable_gqa
        self.norm, self.of_q, self.of_k = OwnRMSNorm(width), OwnRMSNorm(each), OwnRMSNorm(each)
        self.q, self.k, self.v = (nn.Linear(width, n * each) for n in (heads, shared, shared))
        self.o = nn.Linear(heads * each, width, bias=False)
        self.register_buffer("speeds", 0.3 ** torch.arange(each // 2))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        (heads, shared, each), y = self.sizes, self.norm(x)
        q, k, v = (f(y).view(n, length, -1, each) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.of_q(q), self.of_k(k), v))
        times = torch.arange(length, dtype=x.dtype)[None, :, None]
        angles = (self.speeds[None, :, None] @ times.transpose(1, 2)).transpose(1, 2)
        angles = torch.cat((angles, angles), -1)[:, None]
        q, k = (t * angles.cos() + turned(t) * angles.sin() for t in (q, k))
        if not self.enable_gqa:
            k, v = (
                t[:, :, None].expand(n, t.shape[1], heads // shared, length, each).flatten(1, 2)
                for t in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.enable_gqa)
        return x + self.o(y.transpose(1, 2).contiguous().view(n, length, -1))


@net
def grouped_queries() -> Example:
    return nn.Sequential(nn.Linear(3, 8), GroupedQueries(8, 4, 2, 6), SwiGLU(8, 6), nn.Linear(8, 2)), (
        rows(2, 5, 3),
    )


@net
def enabled_gqa() -> Example:
    return nn.Sequential(nn.Linear(3, 8), GroupedQueries(8, 6, 2, 4, True), nn.Linear(8, 2)), (rows(2, 5, 3),)


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it, its weight (in, out)."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.nf, self.nx = n_out, n_in
        self.weight, self.bias = (
            nn.Parameter(torch.randn(n_in, n_out) / n_in),
            nn.Parameter(torch.randn(n_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        sizes = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(sizes)


class Fused(nn.Module):
    """Queries, keys and values from one layer, the product of attention by hand, a bias by head that is
    learned, and a layer that attends to what it is given beside x."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.heads, self.each = heads, each
        self.qkv, self.o = Conv1D(3 * heads * each, width), Conv1D(width, heads * each)
        self.places = nn.Embedding(9, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, heads * each), nn.Linear(width, 2 * heads * each)
        self.back = nn.Linear(heads * each, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.each).permute(0, 2, 1, 3)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.each**0.5
        scores = scores if bias is None else scores + bias
        y = torch.matmul(F.dropout(scores.softmax(-1), 0.0), v)
        return y.permute(0, 2, 1, 3).flatten(2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.qkv(self.norm1(x))
        q, k, v = map(self.split, y.split(y.shape[-1] // 3, -1))
        length = x.shape[1]
        apart = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-4, 4) + 4
        x = x + self.o(self.attended(q, k, v, self.places(apart).permute(2, 0, 1)[None]))
        k, v = map(self.split, self.kv(other).chunk(2, -1))
        return x + self.back(self.attended(self.split(self.q(self.norm2(x))), k, v))


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fused, self.last = (
            nn.Linear(3, 8),
            nn.Linear(2, 8),
            Fused(8, 3, 4),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.last(self.fused(self.first(x), torch.relu(self.second(other))))


@net
def fused_attention() -> Example:
    return TwoStreams(), (rows(2, 5, 3), rows(2, 4, 2))


class TimmAttention(nn.Module):
    """Queries, keys and values side by side in one layer's outputs, as timm has them."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.num_heads, self.each, self.attn_dim = heads, each, heads * each
        self.qkv, self.proj = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.each).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q * 0.7, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, length, self.attn_dim))


@net
def timm_attention() -> Example:
    return nn.Sequential(nn.Linear(3, 8), TimmAttention(8, 3, 4), nn.GELU(), nn.Linear(8, 2)), (
        rows(2, 5, 3),
    )


class AddedProducts(nn.Module):
    """Scores by torch.baddbmm, examples and heads in one dimension, as diffusers and Bloom have them."""

    def __init__(self, width: int, heads: int, of_nothing: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.of_nothing = heads, width // heads, of_nothing
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).view(n, length, self.num_heads, 3, self.head_dim)
        q, k, v = (qkv[..., i, :].transpose(1, 2).reshape(-1, length, self.head_dim) for i in range(3))
        if self.of_nothing:
            scores = torch.baddbmm(x.new_empty(1, length, length), q, k.transpose(1, 2), beta=0, alpha=0.5)
        else:
            mask = torch.linspace(-1, 1, length, dtype=x.dtype).expand(1, length, length)
            scores = mask.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=2.0, alpha=0.5)
        y = torch.bmm(scores.softmax(-1), v).view(n, self.num_heads, length, self.head_dim)
        return x + self.o(y.transpose(1, 2).flatten(2))


@net
def added_products() -> Example:
    body = [nn.Linear(3, 8), AddedProducts(8, 2, True), AddedProducts(8, 4, False), nn.Linear(8, 2)]
    return nn.Sequential(*body), (rows(2, 5, 3),)


class CosineAttention(nn.Module):
    """Queries and keys of length 1, as in Swin V2, a factor for each head that is learned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each = heads, width // heads
        self.scale = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, self.each).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)
        return x + self.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


@net
def cosine_attention() -> Example:
    return nn.Sequential(nn.Linear(3, 8), CosineAttention(8, 2), nn.Linear(8, 2)), (rows(2, 5, 3),)


def windowed(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], bias: Tensor, heads: int, scale: Tensor | None
) -> Tensor:
    """The attention of Swin, in shifted windows of two by two: a function that is given weights of layers."""
    n, height, width, c = x.shape
    x = torch.roll(F.pad(x, (0, 0, 0, width % 2, 0, height % 2)), shifts=(-1, -1), dims=(1, 2))
    high, wide = x.shape[1] // 2, x.shape[2] // 2
    x = x.view(n, high, 2, wide, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n * high * wide, 4, c)
    of_qkv, of_proj = biases
    if scale is not None:
        of_qkv = of_qkv.clone()
        of_qkv[len(of_qkv) // 3 : 2 * len(of_qkv) // 3].zero_()
    qkv = F.linear(x, weights[0], of_qkv)
    qkv = qkv.reshape(len(x), 4, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    if scale is None:
        scores = (q * (c // heads) ** -0.5).matmul(k.transpose(-2, -1))
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(scale, max=1.5).exp()
    mask = x.new_zeros((high * wide, 1, 4, 4))
    mask[-1, 0, :2, 2:] = -2.0
    scores = (scores + bias).view(n, high * wide, heads, 4, 4) + mask
    attended = F.dropout(F.softmax(scores.view(-1, heads, 4, 4), dim=-1), 0.0, True)
    y = F.linear(attended.matmul(v).transpose(1, 2).reshape(len(x), 4, c), weights[1], of_proj)
    y = y.view(n, high, wide, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * high, 2 * wide, c)
    return torch.roll(y, shifts=(1, 1), dims=(1, 2))[:, :height, :width, :].contiguous()


class Windows(nn.Module):
    """Hands its layers' weights over; `cosine`: as in Swin V2, else V1."""

    def __init__(self, width: int, heads: int, cosine: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.scale = nn.Parameter(torch.rand(heads, 1, 1)) if cosine else None
        self.table = None if cosine else nn.Parameter(torch.randn(9, heads))
        places = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, heads, bias=False))
        self.places = places if cosine else None
        self.register_buffer("coordinates", torch.randn(1, 3, 3, 2))
        self.register_buffer("index", torch.randint(9, (16,)))

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if self.places is None else self.places(self.coordinates).view(-1, self.num_heads)
        bias = table[self.index].view(4, 4, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        bias = bias if self.places is None else 16 * torch.sigmoid(bias)
        weights, biases = [self.qkv.weight, self.proj.weight], [self.qkv.bias, self.proj.bias]
        return x + windowed(self.norm(x), weights, biases, bias, self.num_heads, self.scale)


class Merges(nn.Module):
    """Patches of two by two, side by side, as between the stages of Swin."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2, :] for j in range(2) for i in range(2)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


def swin_of(cosine: bool) -> Example:
    body = [nn.Linear(3, 8), Windows(8, 2, cosine), Merges(8, 12), Windows(12, 3, cosine), nn.Linear(12, 2)]
    return nn.Sequential(*body), (rows(2, 4, 6, 3),)


@net
def swin() -> Example:
    return swin_of(False)


@net
def swin_v2() -> Example:
    return swin_of(True)


class Patches(nn.Module):
    """As a vision transformer: patches behind a token that is learned, with places; its own head last."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, stride=4)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.block, self.norm, self.head = HandAttention(8, 2), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1) + self.places
        return self.head(self.norm(self.block(x))[:, 0])


@net
def patches() -> Example:
    return Patches(), (image(),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.out(x + self.down(torch.relu(self.up(x))))


@net
def tied() -> Example:
    return Tied(), (torch.randint(7, (3, 4)),)


class TiedConvs(nn.Module):
    """One weight in an encoder and, transposed, in its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(2, 5, 3, bias=False), nn.ConvTranspose2d(5, 2, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.relu(self.encode(x)))


@net
def tied_convs() -> Example:
    return TiedConvs(), (image(2),)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.norm(self.shared(x)))
        return self.last(x)


@net
def twice() -> Example:
    return Twice(), (rows(5, 4),)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y *= self.scale
        y = y.add_(0.5).mul_(2) + self.shift
        y.relu_()
        return self.c(y)


@net
def in_place() -> Example:
    return InPlace(), (rows(3, 4),)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(4, 6),
            nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)),
            nn.Linear(6, 2),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = checkpoint(self.b, x, use_reentrant=self.reentrant) if self.training else self.b(x)
        return self.c(x + y)


@net
def checkpointed() -> Example:
    return Checkpointed(False), (rows(3, 4),)


@net
def checkpointed_reentrant() -> Example:
    return Checkpointed(True), (rows(3, 4),)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * dy


class Cubed(nn.Module):
    """An activation that is a torch.autograd.Function, as Bloom's is."""

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


@net
def custom_activation() -> Example:
    return nn.Sequential(nn.Linear(4, 6), Cubed(), nn.Linear(6, 5), nn.ReLU(), Cubed(), nn.Linear(5, 2)), (
        rows(3, 4),
    )


class Custom(nn.Module):
    def __init__(self, in_eval: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)
        self.in_eval = in_eval

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh())
        x = Cube.apply(x) if self.training or self.in_eval else x**3
        return self.c(x)


@net
def custom() -> Example:
    return Custom(), (rows(3, 4),)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + x.T) / 2


@net
def parametrized() -> Example:
    layers = [
        nn.Linear(4, 5),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(5, 6)),
        nn.ReLU(),
        nn.Linear(6, 6),
    ]
    parametrize.register_parametrization(layers[-1], "weight", Symmetric())
    layers += [nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)]
    return nn.Sequential(*layers), (rows(3, 4),)


@net
def spectral() -> Example:
    layers = [nn.Linear(4, 5), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(5, 6)), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (rows(3, 4),)


class Branches(nn.Module):
    """Control flow, splits, stacks, and reductions over units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 9), nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = torch.split(torch.tanh(self.a(x)), 3, dim=-1)
        y = self.b(p) + self.c(q)
        if y.requires_grad or y.ndim == 2:
            y = y + self.d(torch.cat((r, p), 1))
        both = torch.stack([y, y * y], 0)
        return self.out(both.sum(0)) + both.mean((0, 2)).unsqueeze(1)


@net
def branches() -> Example:
    return Branches(), (rows(3, 4),)
