// pack: the open rows and columns of a matrix, times their gates, on the GPU. unpack: the mirror, with the
// gate gradients. Element types are those of csrc/pack.h; extents are read on the device.
#pragma once
#include "launch.h"

namespace l0::cuda {

// One side of the matrix and its gate. A gate whose extent reaches the size is plain: natural order, the
// index is not read.
struct PackSide {
  int64_t size;
  const void* z;         // (size,) fp32, fp64 beside fp64 matrices; null: the side has no gate
  const int32_t* index;  // open ascending, then closed
  const int32_t* count;  // (2,) open, extent
  bool scale;            // whether z multiplies
  bool full_grad;        // a gradient for every open gate, not for fractional ones alone
};

// How the matrix is divided. A block has 8 warps, `warps_x` of them side by side, each of which takes
// `rows_per_warp` rows of 32 * 16 bytes. warps_x = 0, for matrices whose columns are not gated: `blocks_x`
// blocks whose warps take rows, or pieces of 4 * 32 * 16 bytes of them, in turn.
struct PackGrid {
  int32_t warps_x, blocks_x, blocks_y, rows_per_warp;
  bool by_rows() const { return warps_x == 0; }
  unsigned blocks() const { return unsigned(blocks_x) * unsigned(blocks_y); }
};

struct PackParams {
  const void* full;  // (rows.size, cols.size)
  int64_t full_stride_row, full_stride_col;
  void* packed;  // row-major, 16-byte rows
  int64_t packed_stride;
  int64_t packed_cols;  // width of an ungated side, its padding included
  PackSide rows, cols;
  bool skip_plain;  // leave packed alone where every gate is plain
  PackGrid grid;
};
void pack(int full_type, int packed_type, const PackParams& p, const Stream& stream);

struct UnpackParams {
  const void* packed;
  int64_t packed_stride;
  void* full;  // (rows.size, cols.size), unit column stride
  int64_t full_stride;
  PackSide rows, cols;
  bool skip_plain;    // leave full alone where every gate is plain
  const void* theta;  // (rows.size, cols.size), full's type; null without gate gradients
  int64_t theta_stride_row, theta_stride_col;
  void* dz_row;    // (rows.size,) z's type; null: not wanted
  void* dz_col;    // (cols.size,)
  void* row_sums;  // (tiles across, rows.size) scratch for dz_row; not by rows
  void* col_sums;  // (rows.size / rows_per_warp, cols.size) scratch for dz_col
  PackGrid grid;
};
void unpack(int packed_type, int full_type, const UnpackParams& p, const Stream& stream);

}  // namespace l0::cuda
