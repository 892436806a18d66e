#include "penalty.h"

#include "elements.cuh"
#include "hard_concrete.h"

namespace l0::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

constexpr int kAtOnce = 4;  // rows whose loads are under way together

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

// Sums over the row tiles, one for each of the tile's columns: `done` gets column and sum.
template <typename T, typename F>
__device__ inline void add_up_columns(const T* sums, int64_t row_tiles, int64_t cols, int64_t begin,
                                      int64_t end, F done) {
  for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) {
    T sum = T(0);
#pragma unroll 16
    for (int64_t y = 0; y < row_tiles; ++y) sum += sums[y * cols + c];
    done(c, sum);
  }
}

// One tile: a warp takes whole rows of it, a lane 16 bytes of each.
template <typename T, typename S>
__device__ inline double matrix_tile(const PenaltyMatrix& m, int64_t block, T shift, T factor,
                                     PenaltyShared<T>& s) {
  constexpr int V = Vector<S>::kSize, kColumns = kPenaltyColumnBytes / sizeof(S);
  static_assert(kColumns == kWarp * V);
  constexpr int kRowsPerWarp = kPenaltyRows / kWarps;
  const int64_t col_tiles = ceil_div(m.cols, int64_t(kColumns)),
                row_tiles = ceil_div(m.rows, int64_t(kPenaltyRows));
  const int64_t col_tile = block % col_tiles, row_tile = block / col_tiles;
  const int64_t col0 = col_tile * kColumns, row0 = row_tile * kPenaltyRows;
  const int64_t col_end = col0 + kColumns < m.cols ? col0 + kColumns : m.cols;
  const S* theta = static_cast<const S*>(m.theta);
  S* dtheta = static_cast<S*>(m.dtheta);
  T* row_sums = static_cast<T*>(m.row_sums);
  T* col_sums = static_cast<T*>(m.col_sums);
  const int lane = lane_id(), warp = warp_id();
  const int64_t mine = col0 + lane * V, inside = m.cols - mine;
  const bool wide =
      m.cols % V == 0 && aligned<S, V>(theta, m.stride) && (!dtheta || aligned<S, V>(dtheta, m.dstride));
  T p_col[V], col_sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    p_col[i] = i < inside ? open_share(m.col_log_alpha, (mine + i) / m.run % m.col_gates, shift) : T(0);
    col_sum[i] = T(0);
  }
  double total = 0.0;
  const int64_t first = row0 + warp * kRowsPerWarp;
  const int64_t row_end = first + kRowsPerWarp < m.rows ? first + kRowsPerWarp : m.rows;
  static_assert(kRowsPerWarp <= kWarp);
  const T p_lane = first + lane < row_end ? open_share(m.row_log_alpha, first + lane, shift) : T(0);
#pragma unroll 1
  for (int64_t row = first; row < row_end; row += kAtOnce) {
    Elements<S, V> value[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      value[k] = {};
      if (wide && row + k < row_end && inside > 0)
        value[k] = load_elements<S, V>(theta + (row + k) * m.stride + mine);
    }
    loads_first();
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (row + k >= row_end) continue;
      const T p_row = __shfl_sync(kAllLanes, p_lane, int(row - first) + k);
      T row_sum = T(0);
      Vector<S> grad{};
#pragma unroll
      for (int i = 0; i < V; ++i) {
        T x = T(0);
        if (wide)
          x = load_as<T>(value[k].at(i));
        else if (i < inside)
          x = load_as<T>(theta[(row + k) * m.stride + mine + i]);
        const T square = x * x;
        row_sum += p_col[i] * square;
        col_sum[i] += p_row * square;
        grad.at[i] = store_as<S>(factor * p_row * p_col[i] * x);
      }
      if (dtheta) {
        S* to = dtheta + (row + k) * m.dstride + mine;
        if (wide) {
          if (inside > 0) store_vector(to, grad);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (i < inside) to[i] = grad.at[i];
        }
      }
      row_sum = warp_sum(row_sum);
      if (lane == 0) {
        total += double(p_row) * double(row_sum);
        if (m.drow) row_sums[col_tile * m.rows + row + k] = row_sum;
      }
    }
  }
  const T half = T(0.5) * T(m.decay);
  if (m.drow && is_last_block(m.ticket + row_tile, unsigned(col_tiles), s.last)) {
    const int64_t tile_end = row0 + kPenaltyRows < m.rows ? row0 + kPenaltyRows : m.rows;
    add_up_columns(row_sums, col_tiles, m.rows, row0, tile_end, [&](int64_t r, T sum) {
      const T p = open_share(m.row_log_alpha, r, shift);
      static_cast<T*>(m.drow)[r] = half * p * (T(1) - p) * sum;
    });
  }
  if (m.dcol) {
    T* dcol = static_cast<T*>(m.dcol);
    const auto finish = [&](int64_t gate, T sum) {
      const T p = open_share(m.col_log_alpha, gate, shift);
      dcol[gate] = half * p * (T(1) - p) * sum;
    };
#pragma unroll
    for (int i = 0; i < V; ++i) s.col_sum[warp][lane * V + i] = col_sum[i];
    __syncthreads();
    for (int64_t c = col0 + threadIdx.x; c < col_end; c += kThreads) {
      T sum = T(0);
      for (int w = 0; w < kWarps; ++w) sum += s.col_sum[w][c - col0];
      col_sums[row_tile * m.cols + c] = sum;
    }
    if (!is_last_block(m.ticket + row_tiles + col_tile, unsigned(row_tiles), s.last))
      return double(half) * total;
    const bool matrix = m.col_gates == m.cols;
    add_up_columns(col_sums, row_tiles, m.cols, col0, col_end, [&](int64_t c, T sum) {
      if (matrix)
        finish(c, sum);
      else
        col_sums[c] = sum;  // nobody reads its row tile any more
    });
    if (!matrix && is_last_block(m.ticket + row_tiles + col_tiles, unsigned(col_tiles), s.last))
      for (int64_t gate = threadIdx.x; gate < m.col_gates; gate += kThreads) {
        T sum = T(0);
        for (int64_t c = gate * m.run; c < m.cols; c += m.col_gates * m.run)
          for (int64_t k = 0; k < m.run; ++k) sum += col_sums[c + k];
        finish(gate, sum);
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
__global__ void __launch_bounds__(kThreads, 2) penalty_kernel(const __grid_constant__ PenaltyParams p) {
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
    const T factor = T(m.decay) * (p.factor ? *static_cast<const T*>(p.factor) : T(1));
    if constexpr (std::is_same_v<T, double>) {
      mine = matrix_tile<T, double>(m, tile, shift, factor, s);
    } else {
      if (m.type == 0) mine = matrix_tile<T, float>(m, tile, shift, factor, s);
      if (m.type == 2) mine = matrix_tile<T, BFloat16>(m, tile, shift, factor, s);
      if (m.type == 3) mine = matrix_tile<T, Half>(m, tile, shift, factor, s);
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
