"""Proximal methods: deterministic penalties whose zeros are exact, and training that skips what they zero.

A whole training::

    model = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    l0.prox.after_step(optimizer, {r".*weight": l0.prox.GroupLasso(1e-3, dim=1)}, model)
    zeros = l0.prox.gates_from_zeros(model, x[:1])      # skips the units that have no weights
    zeros.after_step(optimizer, every=10)
    for x, target in batches:
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small = l0.nn.export(model)
"""

from .functions import (
    group_l0,
    group_lasso,
    group_top_k,
    l0,
    l0_l1,
    l0_l2,
    l1,
    sparse_group_lasso,
    top_k,
    transformed_l1,
    transformed_l1_group,
)
from .regularisers import (
    L0,
    L0L1,
    L0L2,
    L1,
    GroupL0,
    GroupLasso,
    GroupTopK,
    Regulariser,
    SparseGroupLasso,
    TopK,
    TransformedL1,
    TransformedL1Group,
)
from .steps import AfterStep, after_step, layer_shares
from .zeros import ZeroGates, gates_from_zeros

__all__ = [
    "L0",
    "L0L1",
    "L0L2",
    "L1",
    "AfterStep",
    "GroupL0",
    "GroupLasso",
    "GroupTopK",
    "Regulariser",
    "SparseGroupLasso",
    "TopK",
    "TransformedL1",
    "TransformedL1Group",
    "ZeroGates",
    "after_step",
    "gates_from_zeros",
    "group_l0",
    "group_lasso",
    "group_top_k",
    "l0",
    "l0_l1",
    "l0_l2",
    "l1",
    "layer_shares",
    "sparse_group_lasso",
    "top_k",
    "transformed_l1",
    "transformed_l1_group",
]
