"""The feed-forward block of a transformer, a gate on every hidden unit."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _arguments, _checks, _registry
from .._gates import DEFAULT_DIST, Gates, HardConcrete, check_gates, scale
from ..gates import attach
from ..linear import gated_linear
from ..mlp import chain, gated_mlp
from ..narrow import Sides, narrow_weight
from ..penalty import L2Term
from .gate import GatedLayer, HardConcreteGate, sources_of
from .linear import copy_parameters_, gates_of_units, has_gates_beside, is_only_weight, over_rows, over_runs
from .mlp import ACTIVATIONS, _activation_name, _per_item
from .ranks import Shards, check_not_flat, is_called_alone, is_sharded, local, released

GLU = {**_arguments.GLU, "reglu": "relu"}
"""Gated products by their activation; "reglu" is none of gated_mlp's."""
ROWS = {**_arguments.ROWS, "reglu": 2}
"""How many rows of `up` make a hidden unit."""


class GatedProduct(nn.Module):
    """The gated product as a plain module: ``activation(x[..., :n]) * x[..., n:]`` for x (..., 2 n).

    It stands between the two layers of an exported :class:`L0FeedForward` with "swiglu", "geglu" or "reglu".

    Args:
        activation: of the first half, ``nn.SiLU()`` for "swiglu", ``nn.GELU()`` for "geglu", ``nn.ReLU()``
            for "reglu".
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., 2 n) -> (..., n)."""
        gate, up = torch.tensor_split(x, 2, -1)
        return self.activation(gate) * up


class L0FeedForward(GatedLayer, nn.Module):
    r"""Feed-forward block d_model -> d_hidden -> d_model whose closed hidden units are skipped.

    ===========================  ==========================================================================
    ``activation``               y
    ===========================  ==========================================================================
    "relu", "gelu", "silu",      (z * act(x U^T + b_u)) D^T + b_d,  up.weight = U (d_hidden, d_model)
    "identity"
    "swiglu", "geglu", "reglu"   (z * act(x G^T + b_g) * (x U^T + b_u)) D^T + b_d,
                                 act = silu, gelu or relu,
                                 up.weight = [G; U] (2 d_hidden, d_model), up.bias = [b_g; b_u]
    ===========================  ==========================================================================

    down.weight = D (d_model, d_hidden), hidden_gate.log_alpha (d_hidden / block,): with a `block` a gate
    closes a run of so many hidden units. [G; U] is the order of the fused gate_up_proj that LLaMA-style
    models have; :meth:`from_dense` takes the layers singly, too.

    `up` and `down` are computed together; parametrizations of their weights (``torch.nn.utils.parametrize``)
    are asked once a forward. Where one of them has gates or hooks (``prune`` and the old ``weight_norm`` of
    torch.nn.utils are hooks), is another module, or is sharded by FSDP, both are called, with all hidden
    units. Shard the block as one. With `dropout` in training, and with "reglu", there are two products with
    the hidden units in between: those that are open, in eager mode on a CPU; else all, zeros where closed.

    Tensor parallelism: ``parallelize_module(block, mesh, {"up": ColwiseParallel(), "down":
    RowwiseParallel()})``. Each rank computes its hidden units, of which it skips the closed ones. x and y lie
    as the styles say (``input_layouts`` of the first, ``output_layouts`` of the second): whole by default.

    In :func:`penalty` a gate stands for all that it closes: its rows of `up` with their biases and its
    column of `down`.

    Args:
        d_model, d_hidden: features outside and inside.
        activation: see the table; "gelu" is the erf form.
        bias: for both layers, or one per layer.
        dropout: the share of hidden units that is dropped in training, for each row of x anew; what is left
            is divided by 1 - dropout.
        block: so many hidden units in a row share a gate; it divides d_hidden.
        droprate_init, lam, eval_mode, dist: of the gates, see :class:`HardConcreteGate`.
        repack_in_backward: as in :func:`l0kernels.gated_mlp`.
        device, dtype: as in ``torch.nn.Linear``.

    Raises:
        ValueError: an unknown activation, a sequence of biases that is not two long, a dropout outside
            [0, 1), or a block that does not divide d_hidden.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        activation: str = "relu",
        *,
        bias: bool | Sequence[bool] = True,
        dropout: float = 0.0,
        block: int = 1,
        droprate_init: float = 0.5,
        lam: float = 0.1,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
        repack_in_backward: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ROWS:
            raise ValueError(f"activation must be one of {tuple(ROWS)}, got {activation!r}")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        if not isinstance(block, int) or isinstance(block, bool) or block < 1 or d_hidden % block:
            raise ValueError(f"block must be a positive int that divides d_hidden {d_hidden}, got {block!r}")
        up_bias, down_bias = _per_item("bias", bias, 2)
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.activation = activation
        self.dropout, self.block = float(dropout), block
        self.repack_in_backward = repack_in_backward
        self.up = nn.Linear(d_model, ROWS[activation] * d_hidden, up_bias, device=device, dtype=dtype)
        self.down = nn.Linear(d_hidden, d_model, down_bias, device=device, dtype=dtype)
        self.hidden_gate = HardConcreteGate(
            d_hidden // block,
            droprate_init=droprate_init,
            lam=lam,
            eval_mode=eval_mode,
            dist=dist,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_dense(cls, *dense: nn.Module, activation: str | None = None, **options: Any) -> "L0FeedForward":
        """A gated block with copies of the weights and biases of `dense`, on its device, in its dtype.

        Args:
            *dense: one ``nn.Sequential`` of ``nn.Linear``, an activation (``nn.ReLU``, exact ``nn.GELU``,
                ``nn.SiLU``, ``nn.Identity``, or :class:`GatedProduct` of SiLU, GELU or ReLU), perhaps an
                ``nn.Dropout``, and ``nn.Linear``; or three ``nn.Linear``: gate_proj, up_proj and down_proj of
                a LLaMA-style block.
            activation: "swiglu" (None means that), "geglu" or "reglu" for three layers; None for a
                Sequential, which has its own.
            **options: dropout (that of the Sequential, if it has one), block, droprate_init, lam, eval_mode,
                dist.

        Raises:
            TypeError: `dense` is something else.
            ValueError: an activation that does not fit, or sizes, biases, devices or dtypes that do not fit.
        """
        if len(dense) == 1 and isinstance(dense[0], nn.Sequential):
            if activation is not None:
                raise ValueError(f"activation must be None for an nn.Sequential, got {activation!r}")
            up, act, dropout, down = _parts(dense[0])
            ups, activation = [up], _name(act)
            options = options if dropout is None else {"dropout": dropout, **options}
        elif len(dense) == 3 and all(isinstance(layer, nn.Linear) for layer in dense):
            activation = "swiglu" if activation is None else activation
            if activation not in GLU:
                expected = f"one of {tuple(GLU)} for gate_proj, up_proj and down_proj"
                raise ValueError(f"activation must be {expected}, got {activation!r}")
            *ups, down = (layer for layer in dense if isinstance(layer, nn.Linear))
        else:
            got = ", ".join(type(module).__name__ for module in dense)
            raise TypeError(f"dense must be an nn.Sequential or three nn.Linear, got ({got})")
        _check_dense(ups, down, ROWS[activation])
        weight = down.weight
        block = cls(
            weight.shape[0],
            weight.shape[1],
            activation,
            bias=[ups[0].bias is not None, down.bias is not None],
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        copy_parameters_(block.down, down)
        with torch.no_grad():
            for name in ("weight", "bias"):
                to = getattr(block.up, name)
                if to is not None:
                    parts = [getattr(layer, name) for layer in ups]
                    to.copy_(torch.cat(parts)).requires_grad_(any(part.requires_grad for part in parts))
        return block.train(dense[0].training)

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """The gated block.

        Args:
            x: (..., d_model), also nested.
            gates: d_hidden gates drawn beforehand, used instead of the block's own.

        Returns:
            (..., d_model).
        """
        if isinstance(x, Tensor) and x.is_nested:
            return over_rows(x, lambda rows: self.forward(rows, gates))
        _checks.check_tensor("x", x)
        up, down, gate = self.up, self.down, self.hidden_gate
        gates = released(gates)
        together = is_only_weight(up) and is_only_weight(down)
        if has_gates_beside(up) or has_gates_beside(down):
            return self._one_by_one(x, gates)
        if not together:
            sharded = any(is_sharded(layer._parameters.get("weight")) for layer in (up, down))
            if not sharded or is_called_alone(up) or is_called_alone(down):
                return self._one_by_one(x, gates)
            return self._tensor_parallel(x, gates)
        weights, biases = [up.weight, down.weight], [up.bias, down.bias]  # a parametrization makes them now
        if any(map(is_sharded, weights)):
            return self._tensor_parallel(x, gates)
        drops = self.training and self.dropout > 0
        if drops or self.activation not in _arguments.ROWS:
            return self._apart(x, weights, biases, self._gates(gates))
        if self.block > 1:
            gates = self._gates(gates)
        (source,), seed, dist = sources_of([gate]) if gates is None else ([gates], None, DEFAULT_DIST)
        return chain(x, weights, biases, [None, source], self.activation, self.repack_in_backward, seed, dist)

    def _gates(self, gates: Gates | None) -> Gates:
        """The gates of the hidden units."""
        gates = self.hidden_gate.forward() if gates is None else gates
        found = gates_of_units(gates, self.hidden_gate, self.d_hidden)
        assert found is not None
        return found

    def _between(self, hidden: Tensor) -> Tensor:
        """The activation, and dropout."""
        return F.dropout(self.activation_module()(hidden), self.dropout, self.training)

    def _one_by_one(self, x: Tensor, gates: Gates | None) -> Tensor:
        """The same, each layer called by itself: for its hooks, or for FSDP to gather its parameters."""
        gates = self._gates(gates)
        check_gates("gates", gates, self.d_hidden, x.device, "hidden unit")
        hidden = self._between(self.up(x))
        if hidden.shape[-1] != self.d_hidden:
            raise ValueError(
                f"up must give {self.d_hidden} hidden units, got {hidden.shape[-1]}: shard the block as one "
                "with fully_shard, not its layers, where tensor parallelism spreads the units"
            )
        return self.down(scale(hidden, gates.z))

    def _apart(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Gates
    ) -> Tensor:
        """Two products with the hidden units in between: the open ones, where shapes may depend on that."""
        check_gates("gates", gates, self.d_hidden, x.device, "hidden unit")
        (up, down), (up_bias, down_bias) = weights, biases
        _checks.check_linear(x, up, up_bias)
        rows = gates
        if self.activation in GLU:
            rows = Gates.from_z(torch.cat((gates.z, gates.z)).detach(), full_grad=False)
        backend = _registry.resolve_layers(x, (up,), "gated_linear")
        plain = x.dtype == up.dtype == down.dtype and not torch.is_autocast_enabled(x.device.type)
        is_exact = x.device.type == "cpu" and _checks.readable() and plain and not gates.full_grad
        if backend == "reference" or not is_exact:
            hidden = self._between(gated_linear(x, up, up_bias, out_support=rows))
            return gated_linear(hidden, down, down_bias, in_gates=gates)
        n = max(int(gates.count[0]), 1)  # a closed one has z = 0
        times = len(rows.z) // self.d_hidden
        made = [rows.z.detach(), _first(rows, n, times), torch.full((2,), n * times, dtype=torch.int32)]
        read = [gates.z.detach(), gates.index, torch.full((2,), n, dtype=torch.int32)]
        z = gates.z.to(torch.promote_types(down.dtype, torch.float32))
        packed = narrow_weight(up, None, Sides(made, None, 1, backend))
        bias = None if up_bias is None else up_bias.index_select(0, made[1][: n * times].long())
        hidden = self._between(F.linear(x, packed, bias))
        return F.linear(hidden, narrow_weight(down, z, Sides(None, read, 1, backend)), down_bias)

    def _tensor_parallel(self, x: Tensor, gates: Gates | None) -> Tensor:
        """The units that this rank holds, and the sum over the ranks of what they make of x."""
        if self.block > 1 or (self.dropout and self.training):
            what = f"block={self.block}" if self.block > 1 else f"dropout={self.dropout}"
            raise ValueError(
                f"up.weight must be whole with {what}, got a DTensor: shard the block with fully_shard"
            )
        if self.activation in GLU:
            raise ValueError(
                f"up.weight must be whole with activation={self.activation!r}, got a DTensor: its rows are "
                "[G; U], and a shard of them holds no whole unit. Shard the block with fully_shard, or an "
                f"activation without a gated product, one of {tuple(a for a in ROWS if a not in GLU)}"
            )
        up, down, gate = self.up, self.down, self.hidden_gate
        shards = Shards.of(
            {
                "up.weight": (up.weight, 0),
                "up.bias": (up.bias, 0),
                "down.weight": (down.weight, 1),
                "down.bias": (down.bias, None),
            },
        )
        if gates is None:
            with torch.no_grad():
                drawn = Gates.from_z(shards.slice(gate().z), full_grad=False)
            z = attach(shards.slice(gate.log_alpha), drawn, gate.dist).z if gate.training else drawn.z
        else:
            z = shards.slice(gates.z)
        y = gated_mlp(
            shards.enter(x, up),
            [local(up.weight), local(down.weight)],
            [local(up.bias), None],
            [None, Gates.from_z(z, full_grad=gates is not None and gates.full_grad)],
            self.activation,
            repack_in_backward=self.repack_in_backward,
        )
        return shards.leave(y, down.bias, down)

    def gate_groups(self) -> Iterator[tuple[HardConcreteGate, Tensor, int]]:
        """|g| = the unit's rows of up with their biases, and its column of down."""
        rows = ROWS[self.activation]
        size = self.block * (
            rows * (self.d_model + (getattr(self.up, "bias", None) is not None)) + self.d_model
        )
        yield self.hidden_gate, self.hidden_gate.whole(), size

    def l2_terms(self) -> Iterator[tuple[HardConcrete, L2Term]]:
        """Both weights and up's bias; down's is ungated and takes no part."""
        dist, rows = self.hidden_gate.dist, ROWS[self.activation]
        log_alpha = over_runs(self.hidden_gate.whole(), self.d_hidden)
        for name, layer in (("up", self.up), ("down", self.down)):
            if not isinstance(getattr(layer, "weight", None), Tensor):
                raise ValueError(
                    f"{name} of an L0FeedForward must have a weight where weight_decay is not 0, got {layer}"
                )
        check_not_flat(self.up.weight)
        check_not_flat(self.down.weight)
        of_up = log_alpha if rows == 1 else log_alpha.repeat(rows)
        yield dist, L2Term(self.down.weight, None, log_alpha)
        yield dist, L2Term(self.up.weight, of_up, None)
        if getattr(self.up, "bias", None) is not None:
            yield dist, L2Term(self.up.bias, of_up, None)

    def activation_module(self) -> nn.Module:
        """What stands between `up` and `down`, as a plain module."""
        if self.activation in GLU:
            return GatedProduct(ACTIVATIONS[GLU[self.activation]]())
        return ACTIVATIONS[self.activation]()

    def extra_repr(self) -> str:
        more = f", dropout={self.dropout}" if self.dropout else ""
        more += f", block={self.block}" if self.block > 1 else ""
        return f"{self.d_model}, {self.d_hidden}, activation={self.activation!r}{more}"


def _first(gates: Gates, n: int, times: int) -> Tensor:
    """The index of gates whose first `times` * n entries exist: of each of `times` copies as many."""
    if int(gates.count[0]) == n * times:
        return gates.index
    index = torch.arange(len(gates.z), dtype=torch.int32).view(times, -1)  # none is open
    index = torch.cat((index[:, :n].flatten(), index[:, n:].flatten()))
    return torch.cat((index, gates.index.new_zeros(len(gates.index) - len(index))))


def _parts(dense: nn.Sequential) -> tuple[nn.Linear, nn.Module, float | None, nn.Linear]:
    modules: list[nn.Module] = list(dense)
    dropout = None
    if len(modules) == 4 and isinstance(between := modules[2], nn.Dropout):
        dropout = between.p
        del modules[2]
    if len(modules) == 3:
        up, act, down = modules
        if isinstance(up, nn.Linear) and isinstance(down, nn.Linear):
            return up, act, dropout, down
    got = ", ".join(type(module).__name__ for module in modules)
    raise ValueError(f"dense must be nn.Linear, activation, nn.Linear, got ({got})")


def _name(module: nn.Module) -> str:
    if not isinstance(module, GatedProduct):
        return _activation_name(module)
    inner = _activation_name(module.activation)
    for name, activation in GLU.items():
        if activation == inner:
            return name
    raise ValueError(f"dense must have a GatedProduct of nn.SiLU, nn.GELU or nn.ReLU, got {module}")


def _check_dense(ups: list[nn.Linear], down: nn.Linear, rows: int) -> None:
    """ValueError unless the layers make one block; `rows` of `ups`, taken together, make a hidden unit."""
    d_model, d_hidden = down.weight.shape
    expected = (rows * d_hidden // len(ups), d_model)
    for layer in ups:
        if layer.weight.shape != expected:
            raise ValueError(
                f"dense must lead back to as many features with weights of shapes {expected} and then "
                f"{(d_model, d_hidden)}, got {tuple(layer.weight.shape)}"
            )
    if len({layer.bias is None for layer in ups}) > 1:
        raise ValueError("gate_proj and up_proj must both have a bias or none, got one bias")
    kinds = {(layer.weight.device, layer.weight.dtype) for layer in (*ups, down)}
    if len(kinds) > 1:
        raise ValueError(f"dense must be on one device and in one dtype, got {sorted(map(str, kinds))}")
