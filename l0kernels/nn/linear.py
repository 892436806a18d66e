"""nn.Linear with gates on its inputs, its outputs, or its weights."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._gates import DEFAULT_DIST, Gates, HardConcrete, expand_blocks
from ..linear import gated_linear, linear
from ..masked_linear import block_linear, masked_linear
from ..penalty import L2Term
from .gate import GatedLayer, HardConcreteGate, draw, sources_of
from .notices import watch_shared
from .ranks import check_not_flat, released, whole

Gating = str | tuple[int, int] | None


class L0Linear(GatedLayer, nn.Linear):
    r"""``torch.nn.Linear`` with hard-concrete gates whose closed groups are skipped.

    =================  ==========================================  =======================================
    ``gate``           y                                           log_alpha
    =================  ==========================================  =======================================
    "in"               (x * z_in) W^T + b                          in_gate.log_alpha (in_features,)
    "out"              z_out * (x W^T + b)                         out_gate.log_alpha (out_features,)
    "both"             z_out * ((x * z_in) W^T + b)                both
    "weight"           x (W * z)^T + b                             weight_gate.log_alpha, shaped as weight
    (b_out, b_in)      the same, z constant on blocks of weight    weight_gate.log_alpha (ceil(out / b_out),
                                                                   ceil(in / b_in)), edge blocks cropped
    None               x W^T + b                                   none: the dense layer
    =================  ==========================================  =======================================

    Weight gates save memory, not time; block gates skip. One draw serves the whole minibatch. Positional
    arguments, weight, bias and their initialisation are those of ``torch.nn.Linear``; its state_dict loads
    with ``strict=False``, and :meth:`from_dense` copies a trained layer.

    The gates act where the layer is called. ``torch.nn.TransformerEncoderLayer`` does so, and for that leaves
    aside its fused kernel of eval(); ``torch.nn.MultiheadAttention`` reads the weight of out_proj and calls
    nothing: there a gated layer is a ValueError at the first forward.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        gate: what is gated, see the table.
        in_gate, out_gate: a gate to use on that side instead of an own one, e.g. one shared with another
            layer (which then has to be drawn once and passed to both forwards, see
            :class:`HardConcreteGate`). Of k gates, k a divisor of the features, each closes a run of
            features / k: a head, or a channel behind ``nn.Flatten``.
        droprate_init, lam, eval_mode, dist: of the layer's own gates, see :class:`HardConcreteGate`.

    Raises:
        ValueError: an unknown `gate`, a given gate of another size, of another distribution than that of
            the other side, or for a side that is not gated.
        TypeError: in_gate or out_gate is not a HardConcreteGate, or one with a forward of its own.
    """

    in_gate: HardConcreteGate | None
    out_gate: HardConcreteGate | None
    weight_gate: HardConcreteGate | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gating = "in",
        in_gate: HardConcreteGate | None = None,
        out_gate: HardConcreteGate | None = None,
        droprate_init: float = 0.5,
        lam: float = 0.1,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
    ) -> None:
        gate = _check_gating(gate)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

        def own(shape: int | tuple[int, ...]) -> HardConcreteGate:
            return HardConcreteGate(
                shape,
                droprate_init=droprate_init,
                lam=lam,
                eval_mode=eval_mode,
                dist=dist,
                device=device,
                dtype=dtype,
            )

        self.gate = gate
        # Where there is no gate stands a plain None: found without __getattr__, and not printed.
        self.in_gate = self.out_gate = self.weight_gate = None
        if check_given("in_gate", in_gate, in_features, gate, ("in", "both")):
            self.in_gate = own(in_features) if in_gate is None else in_gate
        if check_given("out_gate", out_gate, out_features, gate, ("out", "both")):
            self.out_gate = own(out_features) if out_gate is None else out_gate
        if gate == "weight":
            self.weight_gate = own((out_features, in_features))
        elif isinstance(gate, tuple):
            self.weight_gate = own((-(-out_features // gate[0]), -(-in_features // gate[1])))
        check_one_dist(self.in_gate, self.out_gate)

    @classmethod
    def from_dense(cls, linear: nn.Linear, **options: Any) -> "L0Linear":
        """A gated layer with a copy of `linear`'s weight and bias, on its device, in its dtype and mode.

        Args:
            linear: any ``torch.nn.Linear``.
            **options: the keyword-only arguments of :class:`L0Linear`.

        Raises:
            TypeError: `linear` is not a ``torch.nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        copy_parameters_(layer, linear)
        return layer.train(linear.training)

    @property
    def block(self) -> tuple[int, int] | None:
        """(b_out, b_in) of a block-gated layer."""
        return self.gate if isinstance(self.gate, tuple) else None

    def forward(self, x: Tensor, in_gates: Gates | None = None, out_gates: Gates | None = None) -> Tensor:
        """The gated product.

        Args:
            x: (..., in_features), also nested.
            in_gates, out_gates: gates drawn beforehand, used instead of the layer's own; a side without a
                gate takes them too.

        Returns:
            (..., out_features).

        Raises:
            ValueError: gates are given to a layer with weight or block gates.
        """
        if isinstance(x, Tensor) and x.is_nested:
            return over_rows(x, lambda rows: self.forward(rows, in_gates, out_gates))
        if self.weight_gate is not None:
            return self._weight_gated(x, in_gates, out_gates)
        own, given = (self.in_gate, self.out_gate), (released(in_gates), released(out_gates))
        runs = has_runs(self)
        if given[0] is None and given[1] is None and not runs:
            watch_shared(self, own, x)
            (in_source, out_source), seed, dist = sources_of(own)
            return linear(x, self.weight, self.bias, in_source, out_source, seed, dist)
        missing = [gate if gates is None else None for gate, gates in zip(own, given, strict=True)]
        watch_shared(self, missing, x)
        drawn = draw(missing)
        in_gates, out_gates = (a if b is None else b for a, b in zip(drawn, given, strict=True))
        if runs:
            in_gates = gates_of_units(in_gates, self.in_gate, self.in_features)
            out_gates = gates_of_units(out_gates, self.out_gate, self.out_features)
        return gated_linear(x, self.weight, self.bias, in_gates=in_gates, out_gates=out_gates)

    def _weight_gated(self, x: Tensor, in_gates: Gates | None, out_gates: Gates | None) -> Tensor:
        gate = self.weight_gate
        assert gate is not None
        _checks.check_tensor("x", x)
        if in_gates is not None or out_gates is not None:
            raise ValueError(f"in_gates and out_gates must be None with gate={self.gate!r}, got gates")
        if self.block is not None and gate.training and not gate.draws:
            z = gate.forward().z.view(gate.log_alpha.shape)
            return block_linear(x, self.weight, self.bias, z, self.block)
        return masked_linear(
            x,
            self.weight,
            self.bias,
            gate.log_alpha,
            block=self.block,
            seed=gate.fresh_seed() if gate.training else None,
            mode=None if gate.training else gate.eval_mode,
            dist=gate.dist,
        )

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def gate_groups(self) -> Iterator[tuple[HardConcreteGate, Tensor, int]]:
        """|g| = out_features (input gate), in_features + 1 for a bias (output gate), or the block's area; of
        a gate that closes several units the sum of theirs."""
        in_gate, out_gate, weight_gate = self.in_gate, self.out_gate, self.weight_gate
        inputs, outputs = self.in_features, self.out_features
        if in_gate is not None:
            yield in_gate, in_gate.whole(), inputs // in_gate.n * outputs
        if out_gate is not None:
            yield out_gate, out_gate.whole(), outputs // out_gate.n * (inputs + (self.bias is not None))
        if weight_gate is not None:
            for log_alpha, area in self._blocks(weight_gate.whole()):
                yield weight_gate, log_alpha, area

    def l2_terms(self) -> Iterator[tuple[HardConcrete, L2Term]]:
        """Weight, and the bias if an output gate closes it."""
        return two_sided_terms(self, self._sizes)

    def l2_rest(self, weight_decay: float) -> Tensor | None:
        """All of a layer with weight gates; p - p^2 of the weights where a gate meets itself."""
        if self.weight_gate is not None:
            check_not_flat(self.weight)
            p_open = self.spread(self.weight_gate.dist.p_open(self.weight_gate.whole()))
            _checks.check_shape("weight", self.weight, p_open.shape, "what its gates are spread over")
            return weight_decay / 2 * (p_open * squares(whole(self.weight))).sum()
        gate = self.in_gate
        if gate is None or gate is not self.out_gate:
            return None
        p_open, weight, sizes = (
            gate.dist.p_open(gate.whole()),
            whole(self.weight),
            (self.in_features, self.out_features),
        )
        if sizes == (gate.n, gate.n):
            meeting = squares(weight.diagonal())
        else:
            meeting = meeting_squares(gate, weight, sizes)
        return weight_decay / 2 * ((p_open - p_open**2) * meeting).sum()

    def _blocks(self, log_alpha: Tensor) -> Iterator[tuple[Tensor, int]]:
        """log_alpha split by the area of its blocks: those at the lower and right edge may be cropped."""
        b_out, b_in = self.block or (1, 1)
        (rows, last_row), (cols, last_col) = divmod(self.out_features, b_out), divmod(self.in_features, b_in)
        if not last_row and not last_col:
            yield log_alpha, b_out * b_in
            return
        for row_slice, height in ((slice(rows), b_out), (slice(rows, None), last_row)):
            for col_slice, width in ((slice(cols), b_in), (slice(cols, None), last_col)):
                part = log_alpha[row_slice, col_slice]
                if part.numel():
                    yield part, height * width

    def spread(self, z: Tensor) -> Tensor:
        """One value per weight gate, in log_alpha's order, spread to the shape of weight."""
        assert self.weight_gate is not None
        z = z.reshape(self.weight_gate.log_alpha.shape)
        if self.block is None:
            return z
        return expand_blocks(z, self.block, (self.out_features, self.in_features))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate={self.gate!r}"


def over_rows(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` of all rows of a nested tensor, which nn.TransformerEncoder makes of a padded batch, at once."""
    if x.layout == torch.jagged:
        ragged: Any = x
        return torch.nested.nested_tensor_from_jagged(run(x.values()), ragged.offsets(), ragged.lengths())
    sizes = [part.shape[:-1] for part in x.unbind()]
    rows = run(torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()]))
    parts = rows.split([size.numel() for size in sizes])
    shaped = [part.view(*size, -1) for part, size in zip(parts, sizes, strict=True)]
    return torch.nested.as_nested_tensor(shaped)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes the calls of `module`: with hooks, or a forward of its own."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def is_only_weight(module: nn.Module) -> bool:
    """Whether a call of `module` is the product with its weight and gates, which others may compute, then."""
    return type(module).forward in _PRODUCTS and not is_hooked(module) and not has_runs(module)


def has_gates_beside(module: nn.Module, side: str | None = None) -> bool:
    """Whether a layer that somebody has put into a container has gates other than the one on `side`, which is
    all that the container applies where it multiplies itself."""
    own = module._modules
    return any(name != side and own.get(name) is not None for name in ("in_gate", "out_gate", "weight_gate"))


def copy_parameters_(target: nn.Module, source: nn.Module) -> None:
    """Weight, bias and their requires_grad."""
    with torch.no_grad():
        for name in ("weight", "bias"):
            to, of = getattr(target, name), getattr(source, name)
            if to is not None:
                to.copy_(of)
                to.requires_grad_(of.requires_grad)


def two_sided_terms(
    layer: Any, sizes: tuple[int, int], groups: int = 1, swap: bool = False
) -> Iterator[tuple[HardConcrete, L2Term]]:
    """The L2 terms of a layer of `sizes`, inputs and outputs, with gates on one of them, or on both.

    swap: whether the inputs are the rows of weight, as in transposed convolutions.
    """
    gate = layer.in_gate or layer.out_gate
    if gate is None:
        return
    check_not_flat(layer.weight)
    in_, out = (
        None if own is None else over_runs(own.whole(), n)
        for own, n in zip((layer.in_gate, layer.out_gate), sizes, strict=True)
    )
    rows, cols = (in_, out) if swap else (out, in_)
    yield gate.dist, L2Term(layer.weight, rows, cols, groups)
    if out is not None and layer.bias is not None:
        yield gate.dist, L2Term(layer.bias, out, None)


def over_runs(values: Tensor, n: int) -> Tensor:
    """Values of gates as values of the n units: each gate closes a run of them."""
    return values if len(values) == n else values.repeat_interleave(n // len(values))


def gates_of_units(gates: Gates | None, gate: HardConcreteGate | None, n: int) -> Gates | None:
    """Gates of the n units, of gates that `gate` has drawn, which may have one for each run of units."""
    if gates is None or gate is None or gate.n == n or len(gates.z) != gate.n:
        return gates
    return Gates.from_z(over_runs(gates.z, n), full_grad=gates.full_grad)


def has_runs(layer: Any) -> bool:
    """Whether a linear layer has a gate that closes several units."""
    own = layer._modules
    in_gate, out_gate = own.get("in_gate"), own.get("out_gate")
    if in_gate is not None and in_gate.n != layer.in_features:
        return True
    return out_gate is not None and out_gate.n != layer.out_features


def meeting_squares(
    gate: HardConcreteGate, weight: Tensor, sizes: tuple[int, int], groups: int = 1, swap: bool = False
) -> Tensor:
    """(gate.n,): the squares of the weights whose input and output are closed by one and the same gate."""
    rows, cols = sizes if swap else sizes[::-1]
    at = torch.arange(rows, device=weight.device)[:, None]
    group = at // (rows // groups)
    behind = group * (cols // groups) + torch.arange(cols // groups, device=weight.device)
    meets = at // (rows // gate.n) == behind // (cols // gate.n)
    sums = squares(weight).reshape(rows, cols // groups, -1).sum(2)
    return (sums * meets).sum(1).view(gate.n, -1).sum(1)


def squares(parameter: Tensor) -> Tensor:
    """Elementwise, in fp32 or above."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32)).square()


def check_one_dist(in_gate: HardConcreteGate | None, out_gate: HardConcreteGate | None) -> None:
    """ValueError if the two sides of a layer have gates of different distributions."""
    if in_gate is not None and out_gate is not None and in_gate.dist != out_gate.dist:
        dists = f"{in_gate.dist}, got {out_gate.dist}"
        raise ValueError(f"out_gate must have the distribution of in_gate, {dists}")


def check_given(
    name: str, given: HardConcreteGate | None, size: int, gate: Gating, gated: tuple[str, ...]
) -> bool:
    """Whether that side is gated; `given` must then be None or a vector of gates, as many as the `size` units
    or a number that divides it, otherwise None."""
    if gate not in gated:
        if given is not None:
            raise ValueError(
                f"{name} must be None with gate={gate!r}, which leaves that side ungated, got a gate"
            )
        return False
    if given is not None:
        if not isinstance(given, HardConcreteGate):
            raise TypeError(f"{name} must be a HardConcreteGate, got {type(given).__name__}")
        if type(given).forward is not HardConcreteGate.forward:
            raise TypeError(
                f"{name} must have the forward of HardConcreteGate, got {type(given).__name__} with its own, "
                "which layers that draw from log_alpha themselves would pass by: override eval_gates for "
                "other evaluation gates, or draw others and hand them to the layer's forward"
            )
        shape = tuple(given.log_alpha.shape)
        if len(shape) != 1 or size % shape[0]:
            raise ValueError(
                f"{name} must have log_alpha of shape ({size},), got {shape}: fewer gates, which close as "
                f"many runs of units, must divide {size}"
            )
        given.shared = True
    return True


_PRODUCTS = (L0Linear.forward, nn.Linear.forward)


def _check_gating(gate: Gating) -> Gating:
    if gate is None or gate in ("in", "out", "both", "weight"):
        return gate
    if (
        isinstance(gate, tuple | list)
        and len(gate) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in gate)
    ):
        return (gate[0], gate[1])
    expected = "'in', 'out', 'both', 'weight', a block (b_out, b_in) of positive ints, or None"
    raise ValueError(f"gate must be {expected}, got {gate!r}")
