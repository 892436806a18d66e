// The expected L0 norm of all gate vectors of a model and the L2 norm coupled to it, with their gradients, in
// one launch that reads each weight once:
//     sum_g weight * p_open_g  +  sum over matrices of  decay / 2 * sum_oi p_o * p_i * theta_oi^2.
#pragma once
#include "launch.h"

namespace l0::cuda {

constexpr int kPenaltyVectors = 48, kPenaltyMatrices = 16;  // what fits the 4 KB of a kernel's arguments
constexpr int kPenaltyChunk = 2048;                         // gates per block
constexpr int kPenaltyRows = 128;                           // rows of a block's tile
constexpr int kPenaltyColumnBytes = 512;                    // width of a block's tile

struct PenaltyVector {
  const void* log_alpha;  // (size,)
  void* grad;             // (size,) weight * p * (1 - p)
  int64_t size;
  double weight;
  int32_t first_block;
};

// p = 1 on a side without gates. Gradients are null where not wanted. Of a convolution's weight the columns
// are all but the first dimension, as they lie in memory: column c belongs to gate c / run % col_gates.
struct PenaltyMatrix {
  const void* theta;  // (rows, cols), unit column stride
  void* dtheta;       // (rows, cols) contiguous, theta's type: factor * decay * p_o * p_i * theta
  int64_t stride, dstride;
  int64_t rows, cols;
  int64_t run, col_gates;                     // run = 1 and col_gates = cols of a matrix
  const void *row_log_alpha, *col_log_alpha;  // (rows,), (col_gates,) or null
  void *drow, *dcol;                          // gradients of those
  void *row_sums, *col_sums;                  // (column tiles, rows), (row tiles, cols) scratch
  unsigned* ticket;                           // (row tiles + column tiles + 1,) zeros, left as zeros
  double decay;
  int32_t type;  // of theta, as in csrc/pack.h
  int32_t first_block;
};

struct PenaltyParams {
  PenaltyVector vector[kPenaltyVectors];
  PenaltyMatrix matrix[kPenaltyMatrices];
  int32_t vectors, matrices, vector_blocks, blocks;
  double shift;        // of p_open
  void* block_sums;    // (blocks,) double scratch
  unsigned* ticket;    // (1,) zero, left as zero
  void* total;         // log_alpha's type
  const void* factor;  // (1,) of total's type: of dtheta; null: 1
  bool accumulate;     // add to what total holds
};
template <typename T>
void penalty(const PenaltyParams& p, const Stream& stream);

}  // namespace l0::cuda
