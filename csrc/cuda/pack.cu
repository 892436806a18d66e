#include "pack.h"

#include "runtime.cuh"

namespace l0::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Of pack_kernel, on a multiprocessor at a time; sm_100's code needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPackBlocks = 2;
#else
constexpr int kPackBlocks = 3;
#endif
constexpr int kAtOnce = 2;  // rows whose loads are under way together

// What the device decided about a side.
struct Extent {
  bool plain;
  int64_t filled;  // positions that hold a unit
  int64_t extent;  // positions that exist in the packed matrix
};

__device__ __forceinline__ Extent extent_of(const PackSide& side, int64_t padded) {
  if (side.count == nullptr) return {true, side.size, padded};
  const int64_t open = side.count[0], extent = side.count[1];
  const bool plain = extent >= side.size;
  return {plain, plain ? side.size : open, round_up(plain ? side.size : extent, int64_t(kAlign))};
}

__device__ __forceinline__ int64_t unit_at(const PackSide& side, const Extent& e, int64_t position) {
  return e.plain ? position : int64_t(side.index[position]);
}

template <typename C>
__device__ __forceinline__ bool wants_grad(C z, bool full) {
  return full ? z != C(0) : !(z <= C(0) || z >= C(1));
}

// N elements of S in pieces of up to 16 bytes; p is aligned to them.
template <typename S, int N>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Elements {
  S at[N];
};
template <typename S, int N>
__device__ __forceinline__ Elements<S, N> load_elements(const S* p) {
  if constexpr (N * sizeof(S) >= 16) {
    Elements<S, N> e;
#pragma unroll
    for (int i = 0; i < N; i += Vector<S>::kSize) {
      const Vector<S> v = load_vector(p + i);
#pragma unroll
      for (int k = 0; k < Vector<S>::kSize; ++k) e.at[i + k] = v.at[k];
    }
    return e;
  } else {
    return *reinterpret_cast<const Elements<S, N>*>(p);
  }
}
template <typename S, int N>
__device__ __forceinline__ bool aligned(const S* p, int64_t stride) {
  constexpr uintptr_t kBytes = N * sizeof(S) < 16 ? N * sizeof(S) : 16;
  return (reinterpret_cast<uintptr_t>(p) | uintptr_t(stride * int64_t(sizeof(S)))) % kBytes == 0;
}

struct Task {
  int tile;  // first column / tile width
  int64_t row, row_end;
};
__device__ __forceinline__ Task task_of(const PackGrid& g) {
  const int warp = warp_id(), block_x = int(blockIdx.x) % g.blocks_x, block_y = int(blockIdx.x) / g.blocks_x;
  const int warps_y = kWarps / g.warps_x;
  const int64_t row = (int64_t(block_y) * warps_y + warp / g.warps_x) * g.rows_per_warp;
  return {block_x * g.warps_x + warp % g.warps_x, row, row + g.rows_per_warp};
}

// A lane stores 16 bytes: V consecutive columns. Where columns are gathered, consecutive lanes load
// consecutive packed ones, so that a warp's loads lie side by side, and change places in shared memory.
template <typename S, typename D>
struct PackShared {
  static constexpr int kColumns = kWarp * Vector<D>::kSize;
  alignas(16) D row[kWarps][kAtOnce][kColumns];
};

template <typename S, typename D>
__global__ void __launch_bounds__(kThreads, kPackBlocks) pack_kernel(const __grid_constant__ PackParams p) {
  using C = std::conditional_t<std::is_same_v<S, double>, double, Arithmetic<D>>;
  constexpr int V = Vector<D>::kSize;
  using Shared = PackShared<S, D>;
  L0_SHARED(Shared, s);
  const Extent rows = extent_of(p.rows, p.rows.size), cols = extent_of(p.cols, p.packed_cols);
  if (p.skip_plain && rows.plain && cols.plain) return;
  const Task task = task_of(p.grid);
  const int lane = lane_id(), warp = warp_id();
  const int64_t first = int64_t(task.tile) * Shared::kColumns;
  if (first >= cols.extent) return;
  const int64_t mine = first + lane * V;  // of the V columns that this lane stores
  const int64_t row_end = task.row_end < rows.extent ? task.row_end : rows.extent;
  const S* full = static_cast<const S*>(p.full);
  D* packed = static_cast<D*>(p.packed);
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);

  if (cols.plain && first + Shared::kColumns <= cols.filled && p.full_stride_col == 1 &&
      aligned<S, V>(full, p.full_stride_row)) {
    C z[V];
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = p.cols.scale ? z_col[mine + i] : C(1);
    for (int64_t r = task.row; r < row_end; r += kAtOnce) {
      Elements<S, V> value[kAtOnce];
      C factor[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (r + k >= row_end || r + k >= rows.filled) continue;
        const int64_t unit = unit_at(p.rows, rows, r + k);
        value[k] = load_elements<S, V>(full + unit * p.full_stride_row + mine);
        factor[k] = p.rows.scale ? z_row[unit] : C(1);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (r + k >= row_end) continue;
        Vector<D> out;
#pragma unroll
        for (int i = 0; i < V; ++i)
          out.at[i] =
              store_as<D>(r + k < rows.filled ? load_as<C>(value[k].at[i]) * (factor[k] * z[i]) : C(0));
        store_vector(packed + (r + k) * p.packed_stride + mine, out);
      }
    }
    return;
  }

  int32_t column[V];  // -1 for none
  C z[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t position = first + i * kWarp + lane;
    column[i] = position < cols.filled ? int32_t(unit_at(p.cols, cols, position)) : -1;
    z[i] = column[i] >= 0 && p.cols.scale ? z_col[column[i]] : C(1);
  }
  for (int64_t r = task.row; r < row_end; r += kAtOnce) {
    S value[kAtOnce][V];
    C factor[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      factor[k] = C(1);
      const bool held = r + k < row_end && r + k < rows.filled;
      const int64_t unit = held ? unit_at(p.rows, rows, r + k) : 0;
      if (held && p.rows.scale) factor[k] = z_row[unit];
#pragma unroll
      for (int i = 0; i < V; ++i)
        value[k][i] =
            held && column[i] >= 0 ? full[unit * p.full_stride_row + column[i] * p.full_stride_col] : S{};
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool held = r + k < rows.filled;
#pragma unroll
      for (int i = 0; i < V; ++i)
        s.row[warp][k][i * kWarp + lane] =
            store_as<D>(held && column[i] >= 0 ? load_as<C>(value[k][i]) * (factor[k] * z[i]) : C(0));
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (r + k < row_end && mine < cols.extent)
        store_vector(packed + (r + k) * p.packed_stride + mine,
                     *reinterpret_cast<const Vector<D>*>(&s.row[warp][k][lane * V]));
    __syncwarp();
  }
}

// How many of the ascending index[0:filled] are below value: the warp looks at 32 places at a time.
__device__ inline int64_t rank_of(const int32_t* index, int64_t filled, int64_t value) {
  int64_t begin = 0, end = filled;  // the answer lies in [begin, end]
  while (end > begin) {
    const int64_t step = ceil_div(end - begin, int64_t(kWarp));
    const int64_t at = begin + (lane_id() + 1) * step - 1;
    const bool below = at < end && index[at] < value;
    const int64_t steps = __popc(__ballot_sync(kAllLanes, below));
    const int64_t next_end = begin + (steps + 1) * step - 1;
    begin += steps * step;
    if (next_end < end) end = next_end;
  }
  return begin;
}

template <typename S, typename D>
struct UnpackShared {
  static constexpr int kColumns = kWarp * Vector<D>::kSize;
  using C = std::conditional_t<std::is_same_v<S, double>, double, Arithmetic<D>>;
  alignas(16) S row[kWarps][kAtOnce][kColumns];
  C col_sum[kWarps][kColumns];
  C row_sum[kWarps][kMaxRowsPerWarp];
  bool last;
};

// Sums of a block go to scratch; the last block of a stripe adds the stripe up, in an order that does not
// vary. col_sum: of the columns that the lane stores.
template <typename S, typename D>
__device__ inline void add_up(const UnpackParams& p, const Extent& rows, UnpackShared<S, D>& s,
                              const typename UnpackShared<S, D>::C* col_sum) {
  using Shared = UnpackShared<S, D>;
  using C = typename Shared::C;
  constexpr int V = Vector<D>::kSize;
  const int lane = lane_id(), warp = warp_id();
  const int64_t n_cols = p.cols.size;
  const C* z_col = static_cast<const C*>(p.cols.z);
#pragma unroll
  for (int i = 0; i < V; ++i) s.col_sum[warp][lane * V + i] = col_sum[i];
  __syncthreads();
  const PackGrid& g = p.grid;
  const int block_x = int(blockIdx.x) % g.blocks_x, block_y = int(blockIdx.x) / g.blocks_x;
  const int warps_y = kWarps / g.warps_x;
  const int64_t row0 = int64_t(block_y) * warps_y * g.rows_per_warp;
  const int64_t col0 = int64_t(block_x) * g.warps_x * Shared::kColumns;
  const int rows_here = warps_y * g.rows_per_warp, cols_here = g.warps_x * Shared::kColumns;
  if (p.dz_row) {
    C* sums = static_cast<C*>(p.row_sums);
    for (int i = int(threadIdx.x); i < rows_here && row0 + i < p.rows.size; i += kThreads) {
      C sum = C(0);
      for (int x = 0; x < g.warps_x; ++x)
        sum += s.row_sum[i / g.rows_per_warp * g.warps_x + x][i % g.rows_per_warp];
      sums[block_x * p.rows.size + row0 + i] = sum;
    }
    if (is_last_block(p.ticket + g.blocks_x + block_y, unsigned(g.blocks_x), s.last)) {
      for (int i = int(threadIdx.x); i < rows_here && row0 + i < p.rows.size; i += kThreads) {
        C sum = C(0);
        for (int x = 0; x < g.blocks_x; ++x) sum += sums[x * p.rows.size + row0 + i];
        static_cast<C*>(p.dz_row)[unit_at(p.rows, rows, row0 + i)] = sum;
      }
    }
    __syncthreads();
  }
  if (p.dz_col) {
    C* sums = static_cast<C*>(p.col_sums);
    for (int i = int(threadIdx.x); i < cols_here && col0 + i < n_cols; i += kThreads) {
      C sum = C(0);
      for (int y = 0; y < warps_y; ++y)
        sum += s.col_sum[y * g.warps_x + i / Shared::kColumns][i % Shared::kColumns];
      sums[block_y * n_cols + col0 + i] = sum;
    }
    if (is_last_block(p.ticket + block_x, unsigned(g.blocks_y), s.last)) {
      for (int i = int(threadIdx.x); i < cols_here && col0 + i < n_cols; i += kThreads) {
        C sum = C(0);
        for (int y = 0; y < g.blocks_y; ++y) sum += sums[y * n_cols + col0 + i];
        static_cast<C*>(p.dz_col)[col0 + i] = wants_grad(z_col[col0 + i], p.cols.full_grad) ? sum : C(0);
      }
    }
  }
}

// kGrads: whether there are gate gradients.
template <typename S, typename D, bool kGrads>
__global__ void __launch_bounds__(kThreads, 2) unpack_kernel(const __grid_constant__ UnpackParams p) {
  using Shared = UnpackShared<S, D>;
  using C = typename Shared::C;
  constexpr int V = Vector<D>::kSize;
  L0_SHARED(Shared, s);
  const Extent rows = extent_of(p.rows, p.rows.size), cols = extent_of(p.cols, p.cols.size);
  const bool write = !(p.skip_plain && rows.plain && cols.plain);
  if (!write && !kGrads) return;
  const Task task = task_of(p.grid);
  const int lane = lane_id(), warp = warp_id();
  const int64_t n_cols = p.cols.size, first = int64_t(task.tile) * Shared::kColumns;
  const int64_t mine = first + lane * V;
  const int64_t row_end = task.row_end < p.rows.size ? task.row_end : p.rows.size;
  const S* packed = static_cast<const S*>(p.packed);
  const D* theta = static_cast<const D*>(p.theta);
  D* full = static_cast<D*>(p.full);
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);

  const bool whole = mine + V <= n_cols;
  const bool store_wide = whole && aligned<D, V>(full, p.full_stride);
  const bool theta_wide = whole && p.theta_stride_col == 1 && aligned<D, V>(theta, p.theta_stride_row);
  const bool natural =
      cols.plain && first + Shared::kColumns <= n_cols && aligned<S, V>(packed, p.packed_stride);

  C z[V];        // of the columns that this lane stores
  bool open[V];  // which of them hold a value
  C col_sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    z[i] = mine + i < n_cols && z_col ? z_col[mine + i] : C(1);
    open[i] = mine + i < n_cols && !(z[i] == C(0));
    col_sum[i] = C(0);
  }
  // Where the columns first + i * 32 + lane are in packed, -1 for closed ones.
  int32_t place[V];
  if (!natural) {
    int64_t before = cols.plain ? first : rank_of(p.cols.index, cols.filled, first);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t c = first + i * kWarp + lane;
      const bool here = c < n_cols && (cols.plain || !(z_col[c] == C(0)));
      const unsigned bits = __ballot_sync(kAllLanes, here);
      place[i] = here ? int32_t(before) + __popc(bits & ((1u << lane) - 1u)) : -1;
      before += __popc(bits);
    }
  }

  for (int64_t r = task.row; r < row_end; r += kAtOnce) {
    Elements<S, V> value[kAtOnce];
    Elements<D, V> other[kAtOnce];  // of theta
    int64_t unit[kAtOnce];
    C factor[kAtOnce];
    bool live[kAtOnce], row_wanted[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool inside = r + k < row_end;
      unit[k] = inside ? unit_at(p.rows, rows, r + k) : 0;
      factor[k] = inside && z_row ? z_row[unit[k]] : C(1);
      live[k] = inside && r + k < rows.filled && !(factor[k] == C(0));
      row_wanted[k] = kGrads && p.dz_row && live[k] && wants_grad(factor[k], p.rows.full_grad);
      value[k] = {};
      if (live[k] && natural) {
        value[k] = load_elements<S, V>(packed + (r + k) * p.packed_stride + mine);
      } else if (live[k]) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (place[i] >= 0) value[k].at[i] = packed[(r + k) * p.packed_stride + place[i]];
      }
      other[k] = {};
      if (kGrads && live[k] && (p.dz_col || row_wanted[k])) {
        const D* from = theta + unit[k] * p.theta_stride_row;
        if (theta_wide) {
          other[k] = load_elements<D, V>(from + mine);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (mine + i < n_cols) other[k].at[i] = from[(mine + i) * p.theta_stride_col];
        }
      }
    }
    if (!natural) {  // the columns that a lane loaded are not those that it stores
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
        for (int i = 0; i < V; ++i) s.row[warp][k][i * kWarp + lane] = value[k].at[i];
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        value[k] = *reinterpret_cast<const Elements<S, V>*>(&s.row[warp][k][lane * V]);
      __syncwarp();
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (r + k >= row_end) continue;  // the same for every lane
      if constexpr (kGrads) {
        C row_sum = C(0);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (!live[k] || !open[i]) continue;
          const C product = load_as<C>(value[k].at[i]) * load_as<C>(other[k].at[i]);
          col_sum[i] += p.rows.scale ? product * factor[k] : product;
          row_sum += p.cols.scale ? product * z[i] : product;
        }
        if (p.dz_row) {
          row_sum = row_wanted[k] ? warp_sum(row_sum) : C(0);
          if (lane == 0) s.row_sum[warp][r + k - task.row] = row_sum;
        }
      }
      if (write && mine < n_cols) {
        Vector<D> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          C v = load_as<C>(value[k].at[i]);
          if (p.rows.scale) v *= factor[k];
          if (p.cols.scale) v *= z[i];
          out.at[i] = store_as<D>(live[k] && open[i] ? v : C(0));
        }
        D* to = full + unit[k] * p.full_stride + mine;
        if (store_wide) {
          store_vector(to, out);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (mine + i < n_cols) to[i] = out.at[i];
        }
      }
    }
  }
  if constexpr (kGrads) add_up<S, D>(p, rows, s, col_sum);
}

enum Type { kFloat, kDouble, kBFloat16, kHalf };  // as in csrc/pack.h

// f(source, destination) for the pairs that occur: equal types, and fp32 to and from 16 bits.
template <typename F>
void with_types(int from, int to, F f) {
  if (from == kFloat && to == kFloat) return f(float{}, float{});
  if (from == kDouble && to == kDouble) return f(double{}, double{});
  if (from == kBFloat16 && to == kBFloat16) return f(BFloat16{}, BFloat16{});
  if (from == kHalf && to == kHalf) return f(Half{}, Half{});
  if (from == kFloat && to == kBFloat16) return f(float{}, BFloat16{});
  if (from == kFloat && to == kHalf) return f(float{}, Half{});
  if (from == kBFloat16 && to == kFloat) return f(BFloat16{}, float{});
  if (from == kHalf && to == kFloat) return f(Half{}, float{});
  throw std::invalid_argument("element types: no conversion between these on the way");
}

}  // namespace

void pack(int full_type, int packed_type, const PackParams& p, const Stream& stream) {
  with_types(full_type, packed_type, [&](auto s, auto d) {
    const unsigned blocks = unsigned(p.grid.blocks_x) * unsigned(p.grid.blocks_y);
    launch("pack", stream, {blocks, kThreads}, pack_kernel<decltype(s), decltype(d)>, p);
  });
}

void unpack(int packed_type, int full_type, const UnpackParams& p, const Stream& stream) {
  with_types(packed_type, full_type, [&](auto s, auto d) {
    const unsigned blocks = unsigned(p.grid.blocks_x) * unsigned(p.grid.blocks_y);
    launch("unpack", stream, {blocks, kThreads},
           p.dz_row || p.dz_col ? unpack_kernel<decltype(s), decltype(d), true>
                                : unpack_kernel<decltype(s), decltype(d), false>,
           p);
  });
}

}  // namespace l0::cuda
