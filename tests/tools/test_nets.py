"""The nets that the benchmark gates are those their names say."""

import pytest
import torch
from nets import NETS

COUNTS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "mobilenet_v2": 3_504_872}
# Some names and shapes of torchvision's state_dicts.
NAMES = {
    "resnet18": {"layer2.0.downsample.0.weight": (128, 64, 1, 1), "layer4.1.bn2.running_var": (512,)},
    "resnet34": {"layer3.5.conv2.weight": (256, 256, 3, 3), "bn1.num_batches_tracked": ()},
    "resnet50": {"layer1.0.downsample.1.bias": (256,), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
    "mobilenet_v2": {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.2.conv.1.0.weight": (96, 1, 3, 3),
        "features.17.conv.3.running_mean": (320,),
        "features.18.1.weight": (1280,),
        "classifier.1.weight": (1000, 1280),
    },
}


@pytest.mark.parametrize("name", NETS)
def test_a_net_has_the_parameters_of_its_name(name):
    with torch.device("meta"):
        net = NETS[name](1000)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    state = {key: tuple(t.shape) for key, t in net.state_dict().items()}
    assert NAMES[name].items() <= state.items()
    y = net(torch.empty(2, 3, 224, 224, device="meta"))
    assert y.shape == (2, 1000)


@pytest.mark.parametrize("name", NETS)
def test_a_net_classifies_and_trains(name):
    net = NETS[name](7)
    y = net(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 7)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
