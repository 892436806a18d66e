"""ResNets and MobileNetV2 in plain torch.nn, their parameters named and shaped as in torchvision."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv_norm(
    n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps height and width at stride 1, and its batch norm."""
    conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(n_out)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(n_in, width, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_norm(width, width, 3)
        self.downsample = shortcut(n_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = width * self.expansion
        self.conv1, self.bn1 = conv_norm(n_in, width, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3, stride)
        self.conv3, self.bn3 = conv_norm(width, n_out, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def shortcut(n_in: int, n_out: int, stride: int) -> nn.Sequential | None:
    """What makes a block's input fit its output, None where it does."""
    return None if stride == 1 and n_in == n_out else nn.Sequential(*conv_norm(n_in, n_out, 1, stride))


class ResNet(nn.Module):
    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, 64, 7, 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers, n_in = [nn.Sequential() for _ in depths], 64
        for i, depth in enumerate(depths):
            for j in range(depth):
                layers[i].append(block(n_in, 64 << i, 2 if i and not j else 1))
                n_in = (64 << i) * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(n_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, stages: int = 4) -> ResNet:
    return ResNet(BasicBlock, tuple(2 if i < stages else 0 for i in range(4)), num_classes)


def resnet34(num_classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes)


def resnet50(num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)


class InvertedResidual(nn.Module):
    """1x1 out to ``expand`` times the channels, depthwise 3x3, 1x1 back in, without an activation."""

    def __init__(self, n_in: int, n_out: int, stride: int, expand: int) -> None:
        super().__init__()
        width = n_in * expand
        wider = [nn.Sequential(*conv_norm(n_in, width, 1), nn.ReLU6(inplace=True))] if expand > 1 else []
        depthwise = nn.Sequential(*conv_norm(width, width, 3, stride, width), nn.ReLU6(inplace=True))
        self.conv = nn.Sequential(*wider, depthwise, *conv_norm(width, n_out, 1))
        self.adds = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    # expansion, channels, blocks, stride of the first
    STAGES = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, num_classes: int = 1000, stages: int = 7) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Sequential(*conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True)))
        n_in = 32
        for expand, n_out, depth, stride in self.STAGES[:stages]:
            for j in range(depth):
                self.features.append(InvertedResidual(n_in, n_out, 1 if j else stride, expand))
                n_in = n_out
        self.features.append(nn.Sequential(*conv_norm(n_in, 1280, 1), nn.ReLU6(inplace=True)))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2(num_classes: int = 1000, stages: int = 7) -> MobileNetV2:
    return MobileNetV2(num_classes, stages)


NETS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
}
"""Nets by name, each made of num_classes; `stages`: so many of the net, for tests."""
