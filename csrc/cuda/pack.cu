#include "pack.h"

#include "elements.cuh"

namespace l0::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Loads of 16 bytes that a lane has under way together: enough warps of them keep the memory busy.
constexpr int kRowPieces = 4;  // of one row
constexpr int kRowsAtOnce = 4;
constexpr int kGathersAtOnce = 2;  // rows of 16 bytes that are put together from single elements

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

// The type of gates and sums beside a conversion from S to D.
template <typename S, typename D>
using Gates = std::conditional_t<std::is_same_v<S, double>, double, Arithmetic<D>>;

// In the type of the result; as they are where neither type nor value change.
template <typename D, typename C, typename S, int V>
__device__ __forceinline__ Vector<D> scaled(const Elements<S, V>& e, C factor, bool scale) {
  Vector<D> out;
  if constexpr (std::is_same_v<S, D>) {
    if (!scale) {
      std::memcpy(&out, &e, sizeof out);
      return out;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    out.at[i] = store_as<D>(scale ? load_as<C>(e.at(i)) * factor : load_as<C>(e.at(i)));
  return out;
}

struct SumSide {
  const void* z;     // (size,)
  void* dz;          // (size,) null: not wanted
  const void* sums;  // (parts, size)
  int64_t size, parts;
  int32_t blocks;
  bool full_grad;
};
struct SumParams {
  SumSide side[2];
};

// --- Only rows are gated: a warp takes pieces of rows, or whole ones, wherever they are ---

// The pieces in turn: row, and which of its `split` parts; `step` warps share them.
struct RowPart {
  int64_t row, step_row;
  int32_t part, step_part, split;
  __device__ __forceinline__ RowPart(int32_t split) : split(split) {
    const int64_t mine = int64_t(blockIdx.x) * kWarps + warp_id(), step = int64_t(gridDim.x) * kWarps;
    row = mine / split, part = int32_t(mine % split);
    step_row = step / split, step_part = int32_t(step % split);
  }
  __device__ __forceinline__ RowPart next() const {
    RowPart n = *this;
    n.row += step_row, n.part += step_part;
    if (n.part >= split) n.part -= split, ++n.row;
    return n;
  }
};

template <typename S, typename D>
__global__ void __launch_bounds__(kThreads, 4) pack_rows_kernel(const __grid_constant__ PackParams p) {
  using C = Gates<S, D>;
  constexpr int V = Vector<D>::kSize, kStep = kWarp * V, kPiece = kRowPieces * kStep;
  const Extent rows = extent_of(p.rows, p.rows.size);
  if (p.skip_plain && rows.plain) return;
  const int64_t n_cols = p.cols.size, width = p.packed_cols;
  const S* full = static_cast<const S*>(p.full);
  D* packed = static_cast<D*>(p.packed);
  const C* z_row = static_cast<const C*>(p.rows.z);
  const bool scale = p.rows.scale;
  const bool wide = p.full_stride_col == 1 && n_cols == width && aligned<S, V>(full, p.full_stride_row);

  RowPart at(int32_t(ceil_div(width, int64_t(kPiece))));
  int64_t unit = at.row < rows.filled ? unit_at(p.rows, rows, at.row) : 0;
  while (at.row < rows.extent) {
    const RowPart next = at.next();  // its unit is loaded beside this one's elements
    const int64_t next_unit = next.row < rows.filled ? unit_at(p.rows, rows, next.row) : 0;
    const bool held = at.row < rows.filled;
    const S* from = full + unit * p.full_stride_row;
    D* to = packed + at.row * p.packed_stride;
    const int64_t piece = at.part * int64_t(kPiece), first = piece + lane_id() * V;
    if (wide) {
      Elements<S, V> value[kRowPieces];
#pragma unroll
      for (int k = 0; k < kRowPieces; ++k) {
        value[k] = {};
        if (held && first + k * kStep < width) value[k] = load_elements<S, V>(from + first + k * kStep);
      }
      loads_first();
      const C factor = scale && held ? z_row[unit] : C(1);
#pragma unroll
      for (int k = 0; k < kRowPieces; ++k)
        if (first + k * kStep < width)
          store_vector(to + first + k * kStep, held ? scaled<D>(value[k], factor, scale) : Vector<D>{});
    } else {
      const C factor = scale && held ? z_row[unit] : C(1);
      const int64_t end = piece + kPiece < width ? piece + kPiece : width;
#pragma unroll 4
      for (int64_t c = piece + lane_id(); c < end; c += kWarp)
        to[c] = store_as<D>(held && c < n_cols ? load_as<C>(from[c * p.full_stride_col]) * factor : C(0));
    }
    at = next;
    unit = next_unit;
  }
}

// kGrads: a warp takes whole rows and adds up their gate gradients.
template <typename S, typename D, bool kGrads>
__global__ void __launch_bounds__(kThreads, (kGrads ? 3 : 4) - (sizeof(S) > sizeof(D)))
    unpack_rows_kernel(const __grid_constant__ UnpackParams p) {
  using C = Gates<S, D>;
  constexpr int V = Vector<D>::kSize, kStep = kWarp * V, kPiece = kRowPieces * kStep;
  const Extent rows = extent_of(p.rows, p.rows.size);
  const bool write = !(p.skip_plain && rows.plain);
  if (!write && !kGrads) return;
  const int64_t n_cols = p.cols.size;
  const S* packed = static_cast<const S*>(p.packed);
  const D* theta = static_cast<const D*>(p.theta);
  D* full = static_cast<D*>(p.full);
  const C* z_row = static_cast<const C*>(p.rows.z);
  const bool scale = p.rows.scale;
  const bool wide = n_cols % V == 0 && aligned<S, V>(packed, p.packed_stride) &&
                    aligned<D, V>(full, p.full_stride) &&
                    (!kGrads || (p.theta_stride_col == 1 && aligned<D, V>(theta, p.theta_stride_row)));

  RowPart at(kGrads ? 1 : int32_t(ceil_div(n_cols, int64_t(kPiece))));
  int64_t unit = at.row < p.rows.size ? unit_at(p.rows, rows, at.row) : 0;
  while (at.row < p.rows.size) {
    const RowPart next = at.next();
    const int64_t next_unit = next.row < p.rows.size ? unit_at(p.rows, rows, next.row) : 0;
    const bool filled = at.row < rows.filled;  // known before z: the packed row need not wait for it
    const C factor = z_row ? z_row[unit] : C(1);
    const bool live = filled && !(factor == C(0)),
               wanted = kGrads && filled && wants_grad(factor, p.rows.full_grad);
    const S* from = packed + at.row * p.packed_stride;
    const D* beside = theta + unit * p.theta_stride_row;
    D* to = full + unit * p.full_stride;
    C sum = C(0);
    const int64_t begin = at.part * int64_t(kPiece),
                  end = kGrads || begin + kPiece > n_cols ? n_cols : begin + kPiece;
    if (wide) {
      for (int64_t piece = begin; piece < end; piece += kPiece) {
        const int64_t first = piece + lane_id() * V;
        Elements<S, V> value[kRowPieces];
        Elements<D, V> other[kGrads ? kRowPieces : 1];
#pragma unroll
        for (int k = 0; k < kRowPieces; ++k) {
          value[k] = {};
          if (filled && first + k * kStep < end) value[k] = load_elements<S, V>(from + first + k * kStep);
          if constexpr (kGrads) {
            other[k] = {};
            if (wanted && first + k * kStep < end) other[k] = load_elements<D, V>(beside + first + k * kStep);
          }
        }
        loads_first();
#pragma unroll
        for (int k = 0; k < kRowPieces; ++k) {
          if (first + k * kStep >= end) continue;
          if (kGrads && wanted)
#pragma unroll
            for (int i = 0; i < V; ++i) sum += load_as<C>(value[k].at(i)) * load_as<C>(other[k].at(i));
          if (write)
            store_vector(to + first + k * kStep, live ? scaled<D>(value[k], factor, scale) : Vector<D>{});
        }
      }
    } else {
#pragma unroll 4
      for (int64_t c = begin + lane_id(); c < end; c += kWarp) {
        const C value = filled ? load_as<C>(from[c]) : C(0);
        if (wanted) sum += value * load_as<C>(beside[c * p.theta_stride_col]);
        if (write) to[c] = store_as<D>(live ? (scale ? value * factor : value) : C(0));
      }
    }
    if constexpr (kGrads) {
      sum = warp_sum(sum);
      if (lane_id() == 0) static_cast<C*>(p.dz_row)[unit] = wanted ? sum : C(0);
    }
    at = next;
    unit = next_unit;
  }
}

// --- Columns may be gated: a warp keeps 32 * 16 bytes of columns and goes down the rows ---

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
  alignas(16) D row[kWarps][kGathersAtOnce][kColumns];
  Gates<S, D> z[kWarps][kColumns];
};

template <typename S, typename D>
__global__ void __launch_bounds__(kThreads, 3) pack_kernel(const __grid_constant__ PackParams p) {
  using C = Gates<S, D>;
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
  const bool scale = p.rows.scale || p.cols.scale;

  if (cols.plain && first + Shared::kColumns <= cols.filled && p.full_stride_col == 1 &&
      aligned<S, V>(full, p.full_stride_row)) {
    C z[V];
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = p.cols.scale ? z_col[mine + i] : C(1);
    for (int64_t r = task.row; r < row_end; r += kRowsAtOnce) {
      Elements<S, V> value[kRowsAtOnce];
      C factor[kRowsAtOnce];
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        value[k] = {};
        factor[k] = C(1);
        if (r + k >= row_end || r + k >= rows.filled) continue;
        const int64_t unit = unit_at(p.rows, rows, r + k);
        value[k] = load_elements<S, V>(full + unit * p.full_stride_row + mine);
        if (p.rows.scale) factor[k] = z_row[unit];
      }
      loads_first();
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (r + k >= row_end) continue;
        Vector<D> out;
        if (!std::is_same_v<S, D> || scale) {
#pragma unroll
          for (int i = 0; i < V; ++i)
            out.at[i] =
                store_as<D>(r + k < rows.filled ? load_as<C>(value[k].at(i)) * (factor[k] * z[i]) : C(0));
        } else {
          out = scaled<D>(value[k], C(1), false);
        }
        store_vector(packed + (r + k) * p.packed_stride + mine, out);
      }
    }
    return;
  }

  // Where the columns first + i * 32 + lane come from; what is beyond the last one reads a neighbour.
  int32_t column[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t position = first + i * kWarp + lane, last = cols.filled - 1;
    column[i] = last < 0 ? 0 : int32_t(unit_at(p.cols, cols, position < last ? position : last));
    if (scale) s.z[warp][i * kWarp + lane] = p.cols.scale && last >= 0 ? z_col[column[i]] : C(1);
  }
  // kFast: all of them exist and lie side by side.
  const auto gather = [&](auto is_fast, auto at_once) {
    constexpr bool kFast = decltype(is_fast)::value;
    constexpr int kRows = decltype(at_once)::value;
    for (int64_t r = task.row; r < row_end; r += kRows) {
      S value[kRows][V];
      C factor[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        // A row beyond the last one reads the last: loads without a condition are under way together.
        const int64_t row = r + k < rows.filled ? r + k : rows.filled - 1, unit = unit_at(p.rows, rows, row);
        factor[k] = p.rows.scale ? z_row[unit] : C(1);
        const S* from = full + unit * p.full_stride_row;
#pragma unroll
        for (int i = 0; i < V; ++i)
          value[k][i] = kFast ? from[column[i]] : from[int64_t(column[i]) * p.full_stride_col];
      }
      loads_first();
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const bool held = r + k < rows.filled;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const C z = scale ? factor[k] * s.z[warp][i * kWarp + lane] : C(1);
          D out = store_as<D>(load_as<C>(value[k][i]) * z);
          if constexpr (std::is_same_v<S, D>)
            if (!scale) out = value[k][i];
          if (!held || (!kFast && first + i * kWarp + lane >= cols.filled)) out = store_as<D>(C(0));
          s.row[warp][k][i * kWarp + lane] = out;
        }
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kRows; ++k)
        if (r + k < row_end && mine < cols.extent)
          store_vector(packed + (r + k) * p.packed_stride + mine,
                       *reinterpret_cast<const Vector<D>*>(&s.row[warp][k][lane * V]));
      __syncwarp();
    }
  };
  if (first >= cols.filled || task.row >= rows.filled) {  // nothing to read
    for (int64_t r = task.row; r < row_end; ++r)
      if (mine < cols.extent) store_vector(packed + r * p.packed_stride + mine, Vector<D>{});
  } else if (first + Shared::kColumns <= cols.filled && p.full_stride_col == 1) {
    gather(std::true_type{}, std::integral_constant<int, kGathersAtOnce>{});
  } else {
    gather(std::false_type{}, std::integral_constant<int, 1>{});
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

// The units of a tile of columns lie side by side in packed: a warp copies that span to shared memory, 16
// bytes a lane, and takes it apart there.
template <typename S, typename D>
struct UnpackShared {
  static constexpr int kColumns = kWarp * Vector<D>::kSize, kVector = Vector<S>::kSize;
  static constexpr int kCopies =
      ceil_div(kColumns / kVector + 1, kWarp);  // 1: it may begin in the middle of 16 bytes
  alignas(16) S span[kWarps][kRowsAtOnce][kColumns + kVector];
};

// kGrads: whether there are gate gradients. Sums of rows are of a tile, those of columns of a warp's rows;
// sum_kernel adds them up.
template <typename S, typename D, bool kGrads>
__global__ void __launch_bounds__(kThreads, kGrads ? 2 : 3)
    unpack_kernel(const __grid_constant__ UnpackParams p) {
  using Shared = UnpackShared<S, D>;
  using C = Gates<S, D>;
  constexpr int V = Vector<D>::kSize, kVector = Shared::kVector;
  L0_SHARED(Shared, s);
  const Extent rows = extent_of(p.rows, p.rows.size), cols = extent_of(p.cols, p.cols.size);
  const bool write = !(p.skip_plain && rows.plain && cols.plain);
  if (!write && !kGrads) return;
  const Task task = task_of(p.grid);
  const int lane = lane_id(), warp = warp_id();
  const int64_t n_cols = p.cols.size, first = int64_t(task.tile) * Shared::kColumns;
  if (first >= n_cols) return;
  const int64_t mine = first + lane * V, inside = n_cols - mine;
  const int64_t row_end = task.row_end < p.rows.size ? task.row_end : p.rows.size;
  const S* packed = static_cast<const S*>(p.packed);
  const D* theta = static_cast<const D*>(p.theta);
  D* full = static_cast<D*>(p.full);
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
  const bool wide = n_cols % V == 0 && aligned<S, kVector>(packed, p.packed_stride) &&
                    aligned<D, V>(full, p.full_stride) &&
                    (!kGrads || (p.theta_stride_col == 1 && aligned<D, V>(theta, p.theta_stride_row)));

  C z[V], col_sum[V];
  uint32_t open = 0;  // which of this lane's columns hold a value
#pragma unroll
  for (int i = 0; i < V; ++i) {
    z[i] = i < inside && z_col ? z_col[mine + i] : C(1);
    open |= uint32_t(i < inside && !(z[i] == C(0))) << i;
    col_sum[i] = C(0);
  }
  // In packed, the span begins at `span`, a multiple of 16 bytes if that matters, and has n elements; among
  // them, this lane's begin at `offset`.
  int64_t span = first;
  int n = int(n_cols - first < Shared::kColumns ? n_cols - first : Shared::kColumns), offset = lane * V;
  uint32_t place = (1u << V) - 1u;  // which of this lane's columns have a place in it
  if (!cols.plain) {
    const int64_t begin = rank_of(p.cols.index, cols.filled, first);
    span = wide ? begin / kVector * kVector : begin;
    int before = __popc(open);
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int other = __shfl_sync(kAllLanes, before, lane >= lanes ? lane - lanes : lane);
      if (lane >= lanes) before += other;
    }
    n = int(begin - span) + __shfl_sync(kAllLanes, before, kWarp - 1);
    offset = int(begin - span) + before - __popc(open);
    place = open;
  }

  const auto go = [&](auto is_wide, auto at_once) {
    constexpr bool kWide = decltype(is_wide)::value;
    constexpr int kRows = decltype(at_once)::value;
    for (int64_t r = task.row; r < row_end; r += kRows) {
      [[maybe_unused]] Elements<D, V> other[kRows];  // of theta
      int64_t unit[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (r + k >= row_end || r + k >= rows.filled) continue;
        const S* from = packed + (r + k) * p.packed_stride + span;
        if constexpr (kWide) {
#pragma unroll
          for (int j = 0; j < Shared::kCopies; ++j) {
            const int at = (j * kWarp + lane) * kVector;
            if (at < n) copy_async(&s.span[warp][k][at], from + at);
          }
        } else {
          for (int at = lane; at < n; at += kWarp) s.span[warp][k][at] = from[at];
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        unit[k] = r + k < row_end ? unit_at(p.rows, rows, r + k) : 0;
        if constexpr (kGrads && kWide) {
          other[k] = {};
          if (r + k < row_end && r + k < rows.filled && inside > 0)
            other[k] = load_elements<D, V>(theta + unit[k] * p.theta_stride_row + mine);
        }
      }
      copy_wait();
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (r + k >= row_end) continue;  // the same for every lane
        const C factor = z_row ? z_row[unit[k]] : C(1);
        const bool live = r + k < rows.filled && !(factor == C(0));
        Vector<D> out{};
        C row_sum = C(0);
        if (live) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const bool is_open = (open >> i) & 1u;  // what is closed is 0, whatever it multiplies
            C v = is_open ? load_as<C>(s.span[warp][k][offset + __popc(place & ((1u << i) - 1u))]) : C(0);
            if constexpr (kGrads) {
              C beside = C(0);
              if constexpr (kWide)
                beside = is_open ? load_as<C>(other[k].at(i)) : C(0);
              else if (is_open)
                beside = load_as<C>(theta[unit[k] * p.theta_stride_row + (mine + i) * p.theta_stride_col]);
              const C product = v * beside;
              col_sum[i] += p.rows.scale ? product * factor : product;
              row_sum += p.cols.scale ? product * z[i] : product;
            }
            if (p.rows.scale) v *= factor;
            if (p.cols.scale) v *= z[i];
            out.at[i] = store_as<D>(v);
          }
        }
        if (kGrads && p.dz_row) {
          row_sum = warp_sum(row_sum);
          if (lane == 0) static_cast<C*>(p.row_sums)[task.tile * p.rows.size + unit[k]] = row_sum;
        }
        if (!write) continue;
        D* to = full + unit[k] * p.full_stride + mine;
        if constexpr (kWide) {
          if (inside > 0) store_vector(to, out);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (i < inside) to[i] = out.at[i];
        }
      }
      __syncwarp();  // before the span is written again
    }
  };
  if (wide)
    go(std::true_type{}, std::integral_constant<int, kRowsAtOnce>{});
  else
    go(std::false_type{}, std::integral_constant<int, 1>{});
  if (kGrads && p.dz_col && task.row < p.rows.size) {
    C* sums = static_cast<C*>(p.col_sums) + task.row / p.grid.rows_per_warp * n_cols + mine;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < inside) sums[i] = col_sum[i];
  }
}

// Adds up what unpack_kernel left, 32 gates to a block, in an order that does not vary.
template <typename C>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams p) {
  struct Shared {
    C of_warp[kWarps][kWarp];
  };
  L0_SHARED(Shared, s);
  const bool second = int(blockIdx.x) >= p.side[0].blocks;
  const SumSide& side = p.side[second];
  const int64_t gate = (int64_t(blockIdx.x) - (second ? p.side[0].blocks : 0)) * kWarp + lane_id();
  const C* sums = static_cast<const C*>(side.sums);
  const C z = gate < side.size ? static_cast<const C*>(side.z)[gate] : C(0);
  const bool wanted = gate < side.size && wants_grad(z, side.full_grad);
  C sum = C(0);
#pragma unroll 8
  for (int64_t i = warp_id(); i < side.parts; i += kWarps)
    if (wanted) sum += sums[i * side.size + gate];
  s.of_warp[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() == 0 && gate < side.size) {
    C all = C(0);
    for (int w = 0; w < kWarps; ++w) all += s.of_warp[w][lane_id()];
    static_cast<C*>(side.dz)[gate] = wanted ? all : C(0);
  }
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
    using S = decltype(s);
    using D = decltype(d);
    launch("pack", stream, {p.grid.blocks(), kThreads},
           p.grid.by_rows() ? pack_rows_kernel<S, D> : pack_kernel<S, D>, p);
  });
}

void unpack(int packed_type, int full_type, const UnpackParams& p, const Stream& stream) {
  const bool grads = p.dz_row || p.dz_col;
  with_types(packed_type, full_type, [&](auto s, auto d) {
    using S = decltype(s);
    using D = decltype(d);
    const Shape shape{p.grid.blocks(), kThreads};
    if (p.grid.by_rows())
      return launch("unpack", stream, shape,
                    grads ? unpack_rows_kernel<S, D, true> : unpack_rows_kernel<S, D, false>, p);
    launch("unpack", stream, shape, grads ? unpack_kernel<S, D, true> : unpack_kernel<S, D, false>, p);
    if (!grads) return;
    using C = Gates<S, D>;
    const auto side = [](const PackSide& gate, void* dz, const void* sums, int64_t parts) {
      return SumSide{gate.z,        dz,
                     sums,          dz ? gate.size : 0,
                     parts,         dz ? int32_t(ceil_div(gate.size, int64_t(kWarp))) : 0,
                     gate.full_grad};
    };
    const int64_t chunks = ceil_div(p.rows.size, int64_t(p.grid.rows_per_warp));
    const int64_t tiles = ceil_div(p.cols.size, int64_t(kWarp * Vector<D>::kSize));
    const SumParams sums{
        {side(p.cols, p.dz_col, p.col_sums, chunks), side(p.rows, p.dz_row, p.row_sums, tiles)}};
    launch("unpack's sums", stream, {unsigned(sums.side[0].blocks + sums.side[1].blocks), kThreads},
           sum_kernel<C>, sums);
  });
}

}  // namespace l0::cuda
