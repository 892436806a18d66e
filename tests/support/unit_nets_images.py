"""Small convolutional nets, of images, sequences and volumes, for tests of gated units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unit_examples import Example, Nets, image, into

NETS: Nets = {}
net = into(NETS)


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


class Generator(nn.Module):
    """Features that are seen as images: of a decoder, a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 6 * 4), nn.BatchNorm1d(6 * 4), nn.ReLU())
        self.norm, self.up = nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 4, 2, 1)
        self.again, self.mix = nn.Linear(3, 5 * 4), nn.Conv2d(5, 4, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(self.features(z).view(len(z), -1, 2, 2))
        y = F.interpolate(torch.relu(self.again(z)).unflatten(1, (5, 2, 2)), scale_factor=2)
        return self.up(x) + self.mix(y)


@net
def generator() -> Example:
    return Generator(), (torch.randn(3, 3, dtype=torch.float64),)
