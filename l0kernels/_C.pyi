"""What csrc/bindings.cpp gives Python: addresses, sizes and strides, nothing of torch.

Names and order are those of the C++ functions (`in_` is their `in`).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

Address: TypeAlias = int
Gate: TypeAlias = tuple[Address, Address, Address, int, bool]  # z, index, count, size, full_grad
Matrix: TypeAlias = tuple[Address, int, int]  # data, row stride, column stride
Dist: TypeAlias = tuple[float, float, float]  # beta, gamma, zeta
# Where gates are drawn from: seed, rank, constants, log_alpha of each.
Draw: TypeAlias = tuple[Address, int, Dist, Sequence[Address]]
PenaltyGates: TypeAlias = tuple[Address, int, float]  # log_alpha, size, weight
# theta, its rows, columns, groups and columns of an input; numbers of the output's and input's gates or -1
PenaltyTerm: TypeAlias = tuple[Address, int, int, int, int, int, int]
# in, out, weight, bias, gate on the input, h, pre, dw, db, dz: see MlpLayer.
Layer: TypeAlias = tuple[int, int, Matrix, Address, Gate | None, Address, Address, Address, Address, Address]
ProxStage: TypeAlias = tuple[int, float, float]
# x, y, element type, step, group_step, (outer, groups, inner), before, group, lam, after: see ProxParams.
ProxTensor: TypeAlias = tuple[
    Address, Address, int, Address, Address, Sequence[int], ProxStage, int, float, ProxStage
]
CostRun: TypeAlias = tuple[int, int, float]  # first, count, weight
CostAtoms: TypeAlias = tuple[bool, int, Sequence[int]]  # is_any, factors, index
# gates, constant, atoms, linear, offsets, runs, pairs: see CostTerms
Cost: TypeAlias = tuple[
    int,
    float,
    Sequence[CostAtoms],
    Sequence[CostRun],
    Sequence[int],
    Sequence[CostRun],
    Sequence[tuple[int, int, float]],
]
# number, cost, (size, shift, low, scale) of each gate vector, offset, unit, keep
BudgetKind: TypeAlias = tuple[int, Cost, Sequence[tuple[int, float, float, float]], float, float, float]

compiler: str
openmp: bool

def know_tensors(
    exchange_api: object, plain: tuple[type, type], samples: Sequence[object], otherwise: object, /
) -> None: ...
def address(tensor: object, dtype: object, n: int, layout: int, device: object = ..., /) -> Address: ...
def isa() -> str: ...
def set_isa(name: str, /) -> bool: ...
def sample(
    is_double: bool, draw: Draw, gates: Sequence[Gate], expected: Address, num_threads: int, /
) -> int: ...
def compact(z: Address, size: int, is_double: bool, index: Address, count: Address, /) -> None: ...
def gate_grad(
    dz: Address, z: Address, dlog_alpha: Address, n: int, is_double: bool, dist: Dist, /
) -> None: ...
def penalty(
    log_alpha: Sequence[Address],
    sizes: Sequence[int],
    weights: Sequence[float],
    is_double: bool,
    shift: float,
    total: Address,
    grad: Address,
    /,
) -> bool: ...
def coupled_penalty(
    is_double: bool,
    gates: Sequence[PenaltyGates],
    terms: Sequence[PenaltyTerm],
    decay: float,
    shift: float,
    total: Address,
    grad: Address,
    num_threads: int,
    /,
) -> bool: ...
def coupled_penalty_grad(
    is_double: bool,
    gates: Sequence[PenaltyGates],
    terms: Sequence[PenaltyTerm],
    decay: float,
    shift: float,
    factor: Address,
    dtheta: Sequence[Address],
    num_threads: int,
    /,
) -> None: ...
def linear_forward(
    is_double: bool,
    M: int,
    in_: int,
    out: int,
    x: Matrix,
    weight: Matrix,
    bias: Address,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    draw: Draw | None,
    y: Address,
    num_threads: int,
    /,
) -> int: ...
def linear_backward(
    is_double: bool,
    M: int,
    in_: int,
    out: int,
    x: Matrix,
    weight: Matrix,
    bias: Address,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    dy: Matrix,
    dx: Address,
    dw: Address,
    db: Address,
    dz_in: Address,
    dz_out: Address,
    dist: Dist | None,
    num_threads: int,
    /,
) -> None: ...
def mlp_forward(
    is_double: bool,
    M: int,
    x: Matrix,
    activation: int,
    layers: Sequence[Layer],
    draw: Draw | None,
    y: Address,
    num_threads: int,
    /,
) -> int: ...
def mlp_backward(
    is_double: bool,
    M: int,
    x: Matrix,
    activation: int,
    layers: Sequence[Layer],
    dy: Matrix,
    dx: Address,
    dist: Dist | None,
    num_threads: int,
    /,
) -> None: ...
def masked_weight_forward(
    is_double: bool,
    weight: Address,
    log_alpha: Address,
    n: int,
    seed: Address,
    beta: float,
    gamma: float,
    zeta: float,
    wz: Address,
    num_threads: int,
    /,
) -> bool: ...
def masked_weight_backward(
    is_double: bool,
    weight: Address,
    log_alpha: Address,
    n: int,
    seed: Address,
    beta: float,
    gamma: float,
    zeta: float,
    g: Address,
    dw: Address,
    dlog_alpha: Address,
    num_threads: int,
    /,
) -> None: ...
def block_linear_forward(
    is_double: bool,
    M: int,
    in_: int,
    out: int,
    b_out: int,
    b_in: int,
    x: Matrix,
    weight: Matrix,
    bias: Address,
    z: Address,
    y: Address,
    num_threads: int,
    /,
) -> None: ...
def block_linear_backward(
    is_double: bool,
    M: int,
    in_: int,
    out: int,
    b_out: int,
    b_in: int,
    x: Matrix,
    weight: Matrix,
    z: Address,
    full_grad: bool,
    dy: Matrix,
    dx: Address,
    dw: Address,
    db: Address,
    dz: Address,
    num_threads: int,
    /,
) -> None: ...
def pack(
    full: Matrix,
    full_type: int,
    rows: int,
    cols: int,
    packed: Address,
    packed_type: int,
    packed_rows: int,
    packed_cols: int,
    row_gate: Gate | None,
    col_gate: Gate | None,
    scale_rows: bool,
    scale_cols: bool,
    z_is_double: bool,
    run: int,
    apart: bool,
    num_threads: int,
    /,
) -> None: ...
def unpack(
    packed: Matrix,
    packed_type: int,
    packed_rows: int,
    packed_cols: int,
    full: Address,
    full_type: int,
    rows: int,
    cols: int,
    row_gate: Gate | None,
    col_gate: Gate | None,
    scale_rows: bool,
    scale_cols: bool,
    z_is_double: bool,
    theta: Matrix,
    theta_type: int,
    dz_row: Address,
    dz_col: Address,
    run: int,
    apart: bool,
    num_threads: int,
    /,
) -> None: ...
def im2col(is_double: bool, shape: Sequence[int], x: Address, col: Address, num_threads: int, /) -> None: ...
def col2im(is_double: bool, shape: Sequence[int], col: Address, x: Address, num_threads: int, /) -> None: ...
def conv(
    is_double: bool,
    shape: Sequence[int],
    out: int,
    channels_last: bool,
    x: Address,
    w: Address,
    bias: Address,
    y: Address,
    dy: Address,
    dx: Address,
    dw: Address,
    db: Address,
    num_threads: int,
    /,
) -> None: ...
def present(
    vectors: Sequence[tuple[Address, int, int, int, int]], places: Address, orders: Address, /
) -> None: ...
def present_among(
    gates: int,
    is_open: Address,
    exists: Address,
    size: int,
    labels: Address,
    places: Address,
    order: Address,
    padded: int,
    /,
) -> tuple[int, int]: ...
def open_conv(
    is_double: bool,
    shape: Sequence[int],
    by_tap: bool,
    planar: bool,
    out: int,
    rows: Gate | None,
    cols: Gate | None,
    scale: bool,
    all_out: int,
    all_in: int,
    x: Address,
    w: Address,
    packed: Address,
    bias: Address,
    y: Address,
    dy: Address,
    dx: Address,
    dw: Address,
    dz: Address,
    num_threads: int,
    /,
) -> None: ...
def depthwise(
    is_double: bool,
    shape: Sequence[int],
    x: Address,
    w: Address,
    y: Address,
    dy: Address,
    dx: Address,
    dw_parts: Address,
    num_threads: int,
    /,
) -> None: ...
def batch_norm(
    is_double: bool,
    rows: int,
    channels: int,
    size: int,
    index: Address,
    training: bool,
    x: Address,
    weight: Address,
    bias: Address,
    mean: Address,
    rstd: Address,
    eps: float,
    y: Address,
    running_mean: Address,
    running_var: Address,
    momentum: float,
    updated: Address,
    n_updated: int,
    dy: Address,
    dx: Address,
    dweight: Address,
    dbias: Address,
    num_threads: int,
    /,
) -> None: ...
def prox(tensors: Sequence[ProxTensor], num_threads: int, /) -> None: ...
def advise_huge_pages(address: Address, bytes: int, /) -> None: ...
def keep_freed_memory() -> None: ...

class Budget:
    def __init__(
        self,
        kinds: Sequence[BudgetKind],
        is_double: bool,
        dtype: object,
        state: Sequence[Address],
        ramp_steps: float,
        limit: float,
        /,
    ) -> None: ...
    def step(self, log_alpha: list[Any], grad: list[Any], /) -> bool: ...
