"""Checkpoints of other packages: what their formulas make of them is what ours make of what is converted."""

import math
from collections import OrderedDict

import pytest
import torch
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import HardConcrete, nn


def mean_gate(log_alpha):
    """AMLab's evaluation gate, the paper's equation 13."""
    return (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)


def median_gate(log_alpha, temperature=2 / 3):
    """constrained_sparsity's and l0-python's."""
    return (torch.sigmoid(log_alpha / temperature) * 1.2 - 0.1).clamp(0, 1)


def amlab_dense(n_in, n_out, gated=True):
    made = {"weights" if gated else "weight": torch.randn(n_in, n_out), "bias": torch.randn(n_out)}
    return made | ({"qz_loga": 3 * torch.randn(n_in)} if gated else {})


def amlab_conv(n_in, n_out, size):
    return {
        "weights": torch.randn(n_out, n_in, size, size),
        "qz_loga": 3 * torch.randn(n_out),
        "bias": torch.randn(n_out),
    }


def state_of(**layers):
    """As a state_dict, with dots for double underscores."""
    made = OrderedDict()
    for name, values in layers.items():
        made.update({f"{name.replace('__', '.')}.{key}": value for key, value in values.items()})
    return made


def loaded(model, state):
    model.load_state_dict(nn.converted_state_dict(state, model))
    return model.eval()


def test_amlabs_mlp():
    layers = [amlab_dense(12, 12), amlab_dense(12, 6), amlab_dense(6, 3)]  # a square one, too
    state = state_of(**{f"output__{2 * i}": layer for i, layer in enumerate(layers)})
    model = loaded(nn.L0MLP((12, 12, 6, 3)), state)
    x = expected = torch.randn(5, 12)
    for i, layer in enumerate(layers):
        expected = (expected * mean_gate(layer["qz_loga"])) @ layer["weights"] + layer["bias"]
        expected = expected if i == 2 else F.relu(expected)
    torch.testing.assert_close(model(x), expected)
    for gate, layer in zip(nn.gate_modules(model), layers, strict=True):
        logits = math.log(0.1 / 1.1) * 2 / 3
        torch.testing.assert_close(
            gate.dist.p_open(gate.log_alpha).detach(), 1 - torch.sigmoid(logits - layer["qz_loga"])
        )


def test_amlabs_convolutions_close_their_biases_and_plain_dense_layers_are_turned():
    conv, norm, fc = amlab_conv(2, 4, 3), torch.nn.BatchNorm2d(4), amlab_dense(4, 3, gated=False)
    torch.nn.init.normal_(norm.running_mean)
    state = state_of(module__conv1=conv, module__bn=norm.state_dict(), module__fcout=fc)
    model = torch.nn.Sequential(
        nn.L0Conv2d(2, 4, 3, gate="out"), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )
    x = torch.randn(5, 2, 3, 3)
    z = mean_gate(conv["qz_loga"])[:, None, None]
    expected = norm.eval()(F.conv2d(x, conv["weights"], conv["bias"]) * z).flatten(1)
    torch.testing.assert_close(loaded(model, state)(x), expected @ fc["weight"] + fc["bias"])


def test_constrained_sparsitys():
    fc = {"weight": torch.randn(3, 16), "weight_log_alpha": 2 * torch.randn(16), "bias": torch.randn(3)}
    conv = {
        "weight": torch.randn(4, 2, 2, 2),
        "weight_log_alpha": 2 * torch.randn(4),
        "bias": torch.randn(4),
    }
    model = nn.L0Sequential(
        nn.L0Conv2d(2, 4, 2, gate="out", eval_mode="median"),
        torch.nn.Flatten(),
        nn.L0Linear(16, 3, eval_mode="median"),
    )
    x = torch.randn(5, 2, 3, 3)
    z = median_gate(conv["weight_log_alpha"])
    hidden = F.conv2d(x, conv["weight"] * z[:, None, None, None], conv["bias"] * z).flatten(1)
    expected = F.linear(hidden, fc["weight"] * median_gate(fc["weight_log_alpha"]), fc["bias"])
    torch.testing.assert_close(loaded(model, state_of(conv=conv, fc=fc))(x), expected)


def test_l0_pythons():
    dist = HardConcrete(beta=0.5)
    fc = {"weight": torch.randn(3, 16), "bias": torch.randn(3), "weight_gates.qz_logits": torch.randn(3, 16)}
    conv = {"weight": torch.randn(4, 2, 2, 2), "channel_gates.qz_logits": 2 * torch.randn(4)}
    options = {"eval_mode": "median", "dist": dist}
    model = nn.L0Sequential(
        nn.L0Conv2d(2, 4, 2, gate="out", bias=False, **options),
        torch.nn.Flatten(),
        nn.L0Linear(16, 3, gate="weight", **options),
    )
    x = torch.randn(5, 2, 3, 3)
    z = median_gate(conv["channel_gates.qz_logits"], 0.5)
    hidden = F.conv2d(x, conv["weight"] * z[:, None, None, None]).flatten(1)
    weight = fc["weight"] * median_gate(fc["weight_gates.qz_logits"], 0.5)
    torch.testing.assert_close(loaded(model, state_of(c=conv, f=fc))(x), F.linear(hidden, weight, fc["bias"]))


def test_nothing_is_shared_and_the_dtype_is_the_models():
    state = state_of(a=amlab_dense(4, 3))
    model = nn.L0Linear(4, 3, dtype=torch.float64)
    found = nn.converted_state_dict(state, model)
    assert found["weight"].dtype == torch.float64
    assert found["in_gate.log_alpha"].dtype == torch.float64
    found["bias"].zero_()
    assert state["a.bias"].any()
    assert model.bias.any()


DENSE = {"a": amlab_dense(4, 3)}


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (
            lambda: nn.L0MLP((4, 3, 2)),
            DENSE,
            r"model must have the 1 layers of the checkpoint, \['a'\], got 2",
        ),
        (lambda: nn.L0Linear(4, 2), DENSE, r"must hold .*\(3, 4\).*, as 'a' of the checkpoint does, got"),
        (lambda: nn.L0Linear(4, 3, bias=False), DENSE, "must hold .*bias.* as 'a' of the checkpoint does"),
        (lambda: torch.nn.Linear(4, 3), DENSE, "which has gates, got none"),
        (
            lambda: nn.L0Linear(4, 3),
            {"a": torch.nn.Linear(4, 3).state_dict()},
            "which has no gates, got some",
        ),
        (lambda: nn.L0Linear(4, 3, gate="out"), DENSE, "must have 4 gates, .* got 3 on its out_gate"),
        (
            lambda: nn.L0Linear(4, 3, gate="both"),
            DENSE,
            "one gate vector a layer, .* got .*in_gate.*out_gate",
        ),
        (
            lambda: nn.L0Linear(4, 3, gate="weight"),
            {"a": {"weight": torch.ones(3, 4), "bias_log_alpha": torch.ones(3)}},
            "no gates of single biases",
        ),
        (
            lambda: nn.L0Conv2d(1, 2, 1, gate="out"),
            {
                "a": {
                    "weight": torch.ones(2, 1, 1, 1),
                    "bias": torch.ones(2),
                    "channel_gates.qz_logits": torch.ones(2),
                }
            },
            "the bias of 'a' must be 0 or absent, .* got up to 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, layers, message):
    with pytest.raises(ValueError, match=message):
        l0.nn.converted_state_dict(state_of(**layers), model())
