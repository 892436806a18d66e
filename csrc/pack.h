// pack: compress the open rows and columns of a matrix, times their gates. unpack: the mirror, with the gate
// gradient. Element types: 0 = fp32, 1 = fp64, 2 = bf16, 3 = fp16; source and destination may differ (the
// cast is free on the way).
#pragma once
#include <cstdint>

#include "half.h"

namespace l0 {

// One side of the matrix. index: open ascending, then closed; null: all `size` are open. z (fp32, or fp64
// with fp64 matrices): null for no scale.
struct PackAxis {
  const int32_t* index;
  const void* z;
  int64_t size;
  int64_t open;
  int64_t extent;  // packed extent, >= open; the tail is written as zeros
  bool full_grad;
  int64_t run = 1;  // of columns: entries in a row that stand for one, as the taps of a convolution
  bool apart = false;  // of packed columns: the first entries of all runs, the second ones, ...
};

// packed[r, c] = full[rows.index[r], cols.index[c]] * z_row * z_col for open r, c; zero up to the extents.
// Where columns are runs, full_stride_col is 1, and a stride of rows counts entries.
struct PackParams {
  const void* full;
  DType full_type;
  int64_t full_stride_row, full_stride_col;
  void* packed;  // row-major
  DType packed_type;
  int64_t packed_stride;
  PackAxis rows, cols;
  bool z_is_double;
};
void pack(const PackParams& p, int num_threads);

// full[rows.index[r], cols.index[c]] = packed[r, c] * z_row * z_col, zero where a side is closed;
// dz_row[j] = sum_c packed[r, c] * z_col * theta[j, c'] for gates of rows that want a gradient, else 0;
// dz_col likewise.
struct UnpackParams {
  const void* packed;
  DType packed_type;
  int64_t packed_stride;
  void* full;  // row-major contiguous; null: only the gate gradients
  DType full_type;
  PackAxis rows, cols;
  bool z_is_double;
  const void* theta;  // the matrix that was packed; needed by dz
  DType theta_type;
  int64_t theta_stride_row, theta_stride_col;
  void* dz_row;  // z's type; null where not wanted
  void* dz_col;
};
void unpack(const UnpackParams& p, int num_threads);

}  // namespace l0
