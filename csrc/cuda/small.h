// Gated layers of LeNet's size, which are bound by launches: one launch forward, one backward. Both are
// products of gathered operands,
//     v[m, n] = sum_k act(A[m', k']) * z_k * B[n', k'],      x' = the unit at position x of the axis' gate,
//     C[m', n'] = (v + bias[n']) * z_m * z_n * act'(pre[m, n]),
// of which a backward launch does two side by side (dx and dW) and reads the gates' gradients off the second.
// A gate is given, or drawn by every block for itself from the counter-based noise and compacted in shared
// memory.
#pragma once
#include "launch.h"
#include "vector_math.h"

namespace l0::cuda {

constexpr int kSmallGates = 4096;  // longest gate vector on any axis
constexpr int kSmallTile = 16;     // rows and columns of C that a block computes

// Tiles of an axis: one where it is empty, too, whose block draws the gates and sums nothing. A branch costs
// small_kernel a spill on sm_80.
L0_HOST_DEVICE constexpr int32_t small_tiles(int32_t n) {
  return (n + kSmallTile - 1 + (n == 0)) / kSmallTile;
}

// The gate of an axis; size = 0: none, or one of no units.
struct SmallGate {
  int32_t size;
  uint32_t stream;
  const void* log_alpha;  // (size,) z's type: drawn here, and the next three are written; null: they are read
  void* z;                // (size,) fp32, fp64 beside fp64 operands
  int32_t* index;         // open ascending, then closed
  int32_t* count;         // (2,) open, extent
};

// gather_*: the operand holds every unit in natural order; else it is packed to the open ones.
struct SmallOperand {
  const void* data;
  int64_t stride_row, stride_k;
  bool gather_row, gather_k, scale_k;
  int32_t act;  // Activation in gemm.h, applied to what is loaded
};

// Where the gradient of a gate goes. With to_log_alpha it is log_alpha's, else z's.
struct SmallGateGrad {
  void* dz;    // (size,) null: not wanted
  void* sums;  // (tiles across, size) scratch
  bool full;   // for every open gate, not for fractional ones alone
};

struct SmallProduct {
  int32_t M, N, K;  // units of each axis
  SmallGate m, n, k;
  SmallOperand a, b;
  void* c;  // null: not wanted
  int64_t c_stride;
  bool scatter_m, scatter_n;  // C holds every unit, zero where one is closed; else packed
  bool scale_m, scale_n;
  const void* bias;  // (N,) or null
  const void* pre;   // (M, packed n) act's argument, or null
  int64_t pre_stride;
  int32_t act;
  // Of a product that is a weight's gradient: dz_n = sum_m theta * v * z_m, dz_m = sum_n theta * v * z_n (+
  // theta_bias
  // * db), db = z_m * sum_k A.
  const void* theta;
  int64_t theta_stride_m, theta_stride_n;
  const void* theta_bias;
  void* db;       // (M,) null: not wanted
  void* db_sums;  // (M,) scratch, with dz_m and theta_bias
  SmallGateGrad grad_m, grad_n;
  unsigned* ticket;  // (tiles of m + tiles of n,) zeros, left as zeros; with grad_m or grad_n
  int32_t first_block;
};

struct SmallParams {
  SmallProduct product[2];
  int32_t products, blocks;
  const int64_t* seed;  // (1,) where a gate is drawn
  uint32_t rank;
  double beta, gamma, zeta;
  float tau;
  bool to_log_alpha;
};
// type: of operands and results, as in csrc/pack.h.
void small_products(int type, const SmallParams& p, const Stream& stream);

}  // namespace l0::cuda
