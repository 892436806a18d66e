#include "penalty.h"

#include "hard_concrete.h"
#include "runtime.cuh"

namespace l0::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename T>
struct PenaltyShared {
  T col_sum[kWarps][kPenaltyColumnBytes / (sizeof(T) == 8 ? 8 : 2)];
  double warp_total[kWarps];
  bool last;
};

template <typename T>
__device__ __forceinline__ T open_share(const void* log_alpha, int64_t i, T shift) {
  return log_alpha ? p_open(static_cast<const T*>(log_alpha)[i], shift) : T(1);
}

template <typename T>
__device__ inline double vector_chunk(const PenaltyVector& v, int64_t block, T shift) {
  const T* log_alpha = static_cast<const T*>(v.log_alpha);
  T* grad = static_cast<T*>(v.grad);
  const int64_t begin = block * kPenaltyChunk;
  const int64_t end = begin + kPenaltyChunk < v.size ? begin + kPenaltyChunk : v.size;
  T sum = T(0);
#pragma unroll 2
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const T p = p_open(log_alpha[i], shift);
    sum += p;
    grad[i] = T(v.weight) * p * (T(1) - p);
  }
  return v.weight * double(sum);
}

// One tile: a warp takes whole rows of it, a lane 16 bytes at a time.
template <typename T, typename S>
__device__ inline double matrix_tile(const PenaltyMatrix& m, int64_t block, T shift, PenaltyShared<T>& s) {
  constexpr int V = Vector<S>::kSize, kColumns = kPenaltyColumnBytes / sizeof(S),
                kSteps = kColumns / (kWarp * V);
  constexpr int kRowsPerWarp = kPenaltyRows / kWarps;
  const int64_t col_tiles = ceil_div(m.cols, int64_t(kColumns)),
                row_tiles = ceil_div(m.rows, int64_t(kPenaltyRows));
  const int64_t col_tile = block % col_tiles, row_tile = block / col_tiles;
  const int64_t col0 = col_tile * kColumns, row0 = row_tile * kPenaltyRows;
  const S* theta = static_cast<const S*>(m.theta);
  S* dtheta = static_cast<S*>(m.dtheta);
  T* row_sums = static_cast<T*>(m.row_sums);
  T* col_sums = static_cast<T*>(m.col_sums);
  const int lane = lane_id(), warp = warp_id();
  const bool aligned =
      (reinterpret_cast<uintptr_t>(theta) | reinterpret_cast<uintptr_t>(dtheta) |
       uintptr_t(m.stride * int64_t(sizeof(S))) | uintptr_t(m.dstride * int64_t(sizeof(S)))) %
          16 ==
      0;
  T p_col[kSteps][V], col_sum[kSteps][V];
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t c = col0 + (k * kWarp + lane) * V + i;
      p_col[k][i] = c < m.cols ? open_share(m.col_log_alpha, c, shift) : T(0);
      col_sum[k][i] = T(0);
    }
  double total = 0.0;
#pragma unroll 1
  for (int j = 0; j < kRowsPerWarp; ++j) {
    const int64_t row = row0 + warp * kRowsPerWarp + j;
    if (row >= m.rows) break;
    const T p_row = open_share(m.row_log_alpha, row, shift);
    T row_sum = T(0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int64_t c = col0 + (k * kWarp + lane) * V;
      Vector<S> value{};
      if (aligned && c + V <= m.cols) {
        value = load_vector(theta + row * m.stride + c);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (c + i < m.cols) value.at[i] = theta[row * m.stride + c + i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const T x = load_as<T>(value.at[i]), square = x * x;
        row_sum += p_col[k][i] * square;
        col_sum[k][i] += p_row * square;
        value.at[i] = store_as<S>(T(m.decay) * p_row * p_col[k][i] * x);
      }
      if (!dtheta) continue;
      if (aligned && c + V <= m.cols) {
        store_vector(dtheta + row * m.dstride + c, value);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (c + i < m.cols) dtheta[row * m.dstride + c + i] = value.at[i];
      }
    }
    row_sum = warp_sum(row_sum);
    if (lane == 0) {
      total += double(p_row) * double(row_sum);
      if (m.drow) row_sums[col_tile * m.rows + row] = row_sum;
    }
  }
  const T half = T(0.5) * T(m.decay);
  if (m.drow && is_last_block(m.ticket + row_tile, unsigned(col_tiles), s.last)) {
    for (int64_t r = row0 + threadIdx.x; r < row0 + kPenaltyRows && r < m.rows; r += kThreads) {
      T sum = T(0);
      for (int64_t x = 0; x < col_tiles; ++x) sum += row_sums[x * m.rows + r];
      const T p = open_share(m.row_log_alpha, r, shift);
      static_cast<T*>(m.drow)[r] = half * p * (T(1) - p) * sum;
    }
  }
  if (m.dcol) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) s.col_sum[warp][(k * kWarp + lane) * V + i] = col_sum[k][i];
    __syncthreads();
    for (int i = int(threadIdx.x); i < kColumns && col0 + i < m.cols; i += kThreads) {
      T sum = T(0);
      for (int w = 0; w < kWarps; ++w) sum += s.col_sum[w][i];
      col_sums[row_tile * m.cols + col0 + i] = sum;
    }
    if (is_last_block(m.ticket + row_tiles + col_tile, unsigned(row_tiles), s.last)) {
      for (int64_t c = col0 + threadIdx.x; c < col0 + kColumns && c < m.cols; c += kThreads) {
        T sum = T(0);
        for (int64_t y = 0; y < row_tiles; ++y) sum += col_sums[y * m.cols + c];
        const T p = open_share(m.col_log_alpha, c, shift);
        static_cast<T*>(m.dcol)[c] = half * p * (T(1) - p) * sum;
      }
    }
  }
  return double(half) * total;
}

// The sum over the block, in thread 0.
template <typename T>
__device__ inline double block_sum(double x, PenaltyShared<T>& s) {
  x = warp_sum(x);
  __syncthreads();
  if (lane_id() == 0) s.warp_total[warp_id()] = x;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) sum += s.warp_total[w];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) penalty_kernel(const __grid_constant__ PenaltyParams p) {
  L0_SHARED(PenaltyShared<T>, s);
  const int32_t block = int32_t(blockIdx.x);
  const T shift = T(p.shift);
  double mine = 0.0;
  if (block < p.vector_blocks) {
    int i = 0;
    while (i + 1 < p.vectors && p.vector[i + 1].first_block <= block) ++i;
    mine = vector_chunk(p.vector[i], block - p.vector[i].first_block, shift);
  } else {
    int i = 0;
    while (i + 1 < p.matrices && p.matrix[i + 1].first_block <= block) ++i;
    const PenaltyMatrix& m = p.matrix[i];
    const int64_t tile = block - m.first_block;
    if constexpr (std::is_same_v<T, double>) {
      mine = matrix_tile<T, double>(m, tile, shift, s);
    } else {
      if (m.type == 0) mine = matrix_tile<T, float>(m, tile, shift, s);
      if (m.type == 2) mine = matrix_tile<T, BFloat16>(m, tile, shift, s);
      if (m.type == 3) mine = matrix_tile<T, Half>(m, tile, shift, s);
    }
  }
  double* sums = static_cast<double*>(p.block_sums);
  const double of_block = block_sum(mine, s);
  if (threadIdx.x == 0) sums[block] = of_block;
  if (!is_last_block(p.ticket, unsigned(p.blocks), s.last)) return;
  double all = 0.0;
  for (int32_t i = int32_t(threadIdx.x); i < p.blocks; i += kThreads) all += sums[i];
  all = block_sum(all, s);
  if (threadIdx.x == 0) {
    T* total = static_cast<T*>(p.total);
    *total = T(p.accumulate ? double(*total) + all : all);
  }
}

}  // namespace

template <typename T>
void penalty(const PenaltyParams& p, const Stream& stream) {
  launch("penalty", stream, {unsigned(p.blocks), kThreads}, penalty_kernel<T>, p);
}

template void penalty<float>(const PenaltyParams&, const Stream&);
template void penalty<double>(const PenaltyParams&, const Stream&);

}  // namespace l0::cuda
