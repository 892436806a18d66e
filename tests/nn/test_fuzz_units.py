"""Random nets, gated, against the oracle of unit_oracle: see fuzz_units."""

from collections import Counter

import fuzz_attention
import fuzz_units
import pytest
import torch
from shuffle_nets import SHUFFLES

from l0kernels.nn.units import draws, narrow_shapes

pytestmark = pytest.mark.filterwarnings("ignore:export has left the closed units:UserWarning")

BLOCK = 20


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


@pytest.mark.parametrize("block", range(-(-fuzz_units.NETS // BLOCK)))
def test_nets(block):
    seeds = range(BLOCK * block, min(BLOCK * (block + 1), fuzz_units.NETS))
    gated = sum(fuzz_units.check_net(seed) > 0 for seed in seeds)
    assert gated >= 0.6 * len(seeds)


def test_nets_are_of_every_kind():
    """What the fuzz is for does occur, and equal seeds give equal nets."""
    seen = Counter()
    for seed in range(600):
        net, _ = fuzz_units.random_net(seed)
        seen.update({type(part).__name__ for part in net.parts})
        seen.update(
            {what for kind, what, _, _ in net.steps if kind in ("activation", "image", "rows", "recurrent")}
        )
        seen.update({kind for kind, _, _, _ in net.steps})
        seen.update(str(step[1]) for step in net.steps if step[0] == "layer")
        seen.update(str(part) for step in net.steps if step[0] == "shuffle" for part in step[1])
        seen["heads that lend"] += any(getattr(part, "lends", False) for part in net.parts)
        seen.update(str(value) for part in net.parts for value in getattr(part, "what", {}).values())
        seen["attends to another"] += ("block", "attends") in [step[:2] for step in net.steps]
        uses = Counter(step[2][0] for step in net.steps if step[0] == "layer")
        seen["a layer twice"] += max(uses.values()) > 1
        seen["two results"] += net.two
    kinds = ["Conv2d", "ConvTranspose2d", "Linear", "Embedding", "BatchNorm2d", "BatchNorm1d", "GroupNorm"]
    kinds += [
        "InstanceNorm2d",
        "LayerNorm",
        "LayerNorm2d",
        "RMSNorm",
        "PReLU",
        "add",
        "cat",
        "glu",
        "shuffle",
        "last",
    ]
    kinds += ["squeeze", "value", "attention", "pool", "a layer twice", "two results"]
    kinds += ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "recurrent"]
    kinds += ["all", "last", "cell", "given", "packed"]
    kinds += ["lent", "heads that lend"]
    kinds += [*SHUFFLES, "3", "4"]
    kinds += ["block", "Heads", "Attends", "Layers", "Product", "attends to another"]
    kinds += [str(value) for values in fuzz_attention.CHOICES.values() for value in values]
    kinds += [*fuzz_units.ACTIVATIONS, *fuzz_units.IMAGE, *fuzz_units.ROWS]
    assert {kind for kind in kinds if not seen[kind]} == set()
    a, b = fuzz_units.random_net(7), fuzz_units.random_net(7)
    assert torch.equal(a[1], b[1])
    assert a[0].steps == b[0].steps
    for mine, other in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(mine, other)


FAULTS = {
    "columns not scaled": (
        draws.Draw,
        "scales",
        lambda self, space, dtype: torch.ones(space.size, dtype=dtype),
    ),
    "dimension lost": (narrow_shapes, "like", lambda x, data, dim=None: data),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    """Gated units that went wrong in these ways would not pass."""
    monkeypatch.setattr(*FAULTS[fault])

    def search():
        for seed in range(100):
            fuzz_units.check_net(seed)

    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        search()
