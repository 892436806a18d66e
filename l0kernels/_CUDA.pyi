"""What csrc/cuda/bindings.cpp gives Python: addresses, sizes and strides, nothing of torch.

Names and order are those of the C++ functions (`in_` is their `in`).
"""

from collections.abc import Sequence
from typing import TypeAlias

Address: TypeAlias = int
Where: TypeAlias = tuple[int, Address]  # device, cudaStream_t
Dist: TypeAlias = tuple[float, float, float]  # beta, gamma, zeta
Matrix: TypeAlias = tuple[Address, int, int]  # data, row stride, column stride
Gate: TypeAlias = tuple[Address, Address, Address]  # z, index, count
# size, gate, whether z multiplies, a gradient for every open gate
Side: TypeAlias = tuple[int, Gate | None, bool, bool]
Grid: TypeAlias = tuple[int, int, int, int]
PenaltyVector: TypeAlias = tuple[Address, Address, int, float]  # log_alpha, gradient, size, weight
# theta, its row stride, type, rows, columns, decay; run and number of the columns' gates; log_alpha of rows
# and columns; gradients of theta, of both; scratch for sums of rows and of columns
PenaltyMatrix: TypeAlias = tuple[
    tuple[Address, int, int, int, int, float],
    tuple[int, int],
    tuple[Address, Address],
    tuple[Address, Address, Address],
    tuple[Address, Address],
]
# size, z, index, count, log_alpha (0: the gate is given), stream
SmallGate: TypeAlias = tuple[int, Address, Address, Address, Address, int]
SmallDraw: TypeAlias = tuple[Address, int, Dist, float]  # seed, rank, constants, tau
# in, out, weight, bias, gate of the input, its packed pre-activations (M, in) (0 for the first layer)
SmallLayer: TypeAlias = tuple[int, int, Matrix, Address, SmallGate | None, Address]
# dw, db, dz, (M, in) buffer for the gradient of the pre-activations, scratch of dz
SmallLayerGrad: TypeAlias = tuple[Address, Address, Address, Address, Address]

architectures: str
penalty_rows: int
penalty_column_bytes: int
small_gates: int
small_tile: int

def device_error() -> str: ...
def sample(
    log_alpha: Sequence[Address],
    sizes: Sequence[int],
    is_double: bool,
    seed: Address,
    rank: int,
    dist: Dist,
    tau: float,
    z: Address,
    index: Address,
    count: Address,
    expected: Address,
    where: Where,
    /,
) -> None: ...
def gate_grad(
    dz: Address, z: Address, dlog_alpha: Address, n: int, is_double: bool, dist: Dist, where: Where, /
) -> None: ...
def pack(
    full: Matrix,
    full_type: int,
    packed: Address,
    packed_stride: int,
    packed_cols: int,
    packed_type: int,
    rows: Side,
    cols: Side,
    skip_plain: bool,
    grid: Grid,
    where: Where,
    /,
) -> None: ...
def unpack(
    packed: Address,
    packed_stride: int,
    packed_type: int,
    full: Address,
    full_stride: int,
    full_type: int,
    rows: Side,
    cols: Side,
    skip_plain: bool,
    theta: Matrix,
    dz_row: Address,
    dz_col: Address,
    row_sums: Address,
    col_sums: Address,
    grid: Grid,
    where: Where,
    /,
) -> None: ...
def penalty_scratch(
    vectors: Sequence[PenaltyVector], matrices: Sequence[PenaltyMatrix], /
) -> tuple[int, int]: ...
def penalty(
    vectors: Sequence[PenaltyVector],
    matrices: Sequence[PenaltyMatrix],
    is_double: bool,
    dist: Dist,
    block_sums: Address,
    tickets: Address,
    total: Address,
    factor: Address,
    where: Where,
    /,
) -> None: ...
def small_linear_forward(
    type: int,
    M: int,
    in_: int,
    out: int,
    x: Matrix,
    weight: Matrix,
    bias: Address,
    in_gate: SmallGate | None,
    out_gate: SmallGate | None,
    scale_out: bool,
    y: Address,
    draw: SmallDraw | None,
    where: Where,
    /,
) -> None: ...
def small_linear_backward(
    type: int,
    M: int,
    in_: int,
    out: int,
    x: Matrix,
    weight: Matrix,
    bias: Address,
    in_gate: SmallGate | None,
    out_gate: SmallGate | None,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dy: Matrix,
    dx: Address,
    dw: Address,
    db: Address,
    dz_in: Address,
    dz_out: Address,
    in_sums: Address,
    out_sums: Address,
    db_sums: Address,
    tickets: Address,
    to_log_alpha: Dist | None,
    where: Where,
    /,
) -> None: ...
def small_mlp_forward(
    type: int,
    M: int,
    x: Matrix,
    act: int,
    layers: Sequence[SmallLayer],
    y: Address,
    draw: SmallDraw | None,
    where: Where,
    /,
) -> None: ...
def small_mlp_backward(
    type: int,
    M: int,
    x: Matrix,
    act: int,
    layers: Sequence[SmallLayer],
    grads: Sequence[SmallLayerGrad],
    full: Sequence[bool],
    dy: Matrix,
    dx: Address,
    tickets: Address,
    to_log_alpha: Dist | None,
    where: Where,
    /,
) -> None: ...
