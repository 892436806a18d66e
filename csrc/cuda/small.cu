#include "small.h"

#include <algorithm>

#include "activation.h"
#include "draw.cuh"

namespace l0::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = kSmallTile;
constexpr int kDepth = 16;                        // of k, loaded by a warp at a time
constexpr int kPerLane = kTile * kDepth / kWarp;  // elements of an operand
constexpr int kRow = kTile + 4;                   // keeps 16-byte reads aligned and the banks apart
constexpr int kMaxRows = kSmallGates / kWarp;     // of a gate vector, 32 gates each
// On a multiprocessor at a time, as far as registers allow.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kBlocks = 1;
#else
template <typename T>
constexpr int kBlocks = std::is_same_v<T, double> ? 1 : 3;
#endif
static_assert(kThreads == kTile * kTile, "a thread finishes one element");

template <typename C>
struct SmallShared {
  union {
    struct {
      alignas(16) C a[kWarps][kDepth][kRow];
      alignas(16) C b[kWarps][kDepth][kRow];
    };
    C sum[kWarps][kTile * kTile];
  };
  C row_sum[kWarps][kTile];
  C term[kTile * kTile];
  uint32_t open_bits[kMaxRows];
  int32_t open_before[kMaxRows + 1];
  // Of the tile's rows and columns: the unit, and its gate.
  int32_t unit_m[kTile], unit_n[kTile];
  C z_m[kTile], z_n[kTile];
  bool last;
};

// A gate vector in shared memory: z by unit, and the units in order.
template <typename C>
struct Table {
  C* z;
  uint16_t* index;
  int32_t open;
};

template <typename C>
__device__ C act_grad_of(int32_t act, C x) {
  switch (static_cast<Activation>(act)) {
    case Activation::kRelu:
      return activation_grad<Activation::kRelu>(x);
    case Activation::kGelu:
      return activation_grad<Activation::kGelu>(x);
    case Activation::kSilu:
      return activation_grad<Activation::kSilu>(x);
    default:
      return C(1);
  }
}

// Draws a gate vector into the table; one block of the launch also writes it to memory.
template <typename C>
__device__ void draw_table(const SmallParams& p, const SmallGate& g, Table<C>& table, SmallShared<C>& s) {
  const Constants<C> c(p.beta, p.gamma, p.zeta);
  const Noise noise(*p.seed);
  const int rows = ceil_div(g.size, kWarp), lane = lane_id();
  const bool writes = blockIdx.x == 0;
  for (int row = warp_id(); row < rows; row += kWarps) {
    const int gate = row * kWarp + lane;
    C z = C(0);
    if (gate < g.size) {
      z = draw(static_cast<const C*>(g.log_alpha)[gate], noise(uint32_t(gate), g.stream, p.rank), c,
               c.by_root);
      table.z[gate] = z;
      if (writes) static_cast<C*>(g.z)[gate] = z;
    }
    const uint32_t bits = __ballot_sync(kAllLanes, !(z == C(0)));
    if (lane == 0) s.open_bits[row] = bits;
  }
  __syncthreads();
  for (int row = int(threadIdx.x); row <= rows; row += kThreads) {
    int32_t before = 0;
    for (int r = 0; r < row; ++r) before += __popc(s.open_bits[r]);
    s.open_before[row] = before;
  }
  __syncthreads();
  table.open = s.open_before[rows];
  for (int gate = int(threadIdx.x); gate < g.size; gate += kThreads) {
    const uint32_t bits = s.open_bits[gate / kWarp];
    const int before = s.open_before[gate / kWarp] + __popc(bits & ((1u << lane) - 1u));
    const int place = (bits >> lane) & 1u ? before : table.open + gate - before;
    table.index[place] = uint16_t(gate);
    if (writes) g.index[place] = gate;
  }
  if (writes) {
    for (int i = g.size + int(threadIdx.x); i < round_up(g.size, kAlign); i += kThreads) g.index[i] = 0;
    if (threadIdx.x == 0) {
      g.count[0] = table.open;
      g.count[1] = round_up(float(table.open) > p.tau * float(g.size) ? g.size : table.open, kAlign);
    }
  }
  __syncthreads();
}

template <typename C>
__device__ void read_table(const SmallGate& g, Table<C>& table) {
  table.open = g.count[0];
  for (int i = int(threadIdx.x); i < g.size; i += kThreads) {
    table.z[i] = static_cast<const C*>(g.z)[i];
    table.index[i] = uint16_t(g.index[i]);
  }
  __syncthreads();
}

// The units of a tile's rows or columns, -1 beyond the axis, and their gates; returns how many positions of
// the axis are open. A drawn gate passes through the table.
template <typename C>
__device__ int32_t read_axis(const SmallParams& p, const SmallGate& g, int32_t size, int32_t first,
                             Table<C>& table, SmallShared<C>& s, int32_t* unit, C* z) {
  const int i = int(threadIdx.x);
  const bool mine = i < kTile, inside = mine && first + i < size;
  if (g.size == 0) {
    if (mine) {
      unit[i] = inside ? first + i : -1;
      z[i] = C(1);
    }
    return size;
  }
  if (g.log_alpha) {
    draw_table(p, g, table, s);
    if (mine) {
      unit[i] = inside ? int32_t(table.index[first + i]) : -1;
      z[i] = inside ? table.z[unit[i]] : C(0);
    }
    const int32_t open = table.open;
    __syncthreads();  // before the table is used again
    return open;
  }
  if (mine) {
    unit[i] = inside ? g.index[first + i] : -1;
    z[i] = inside ? static_cast<const C*>(g.z)[unit[i]] : C(0);
  }
  return g.count[0];
}

// The elements of an operand that this lane brings to its warp: consecutive lanes along whichever stride
// is 1. What is loaded is looked at only when it is stored, so that loads can be under way meanwhile.
template <typename T, typename C>
struct Piece {
  T value[kPerLane];

  static __device__ __forceinline__ void place(bool along_k, int i, int& row, int& k) {
    const int e = i * kWarp + lane_id();
    row = along_k ? e / kDepth : e % kTile;
    k = along_k ? e % kDepth : e / kTile;
  }
  __device__ __forceinline__ void load(const SmallOperand& x, bool along_k, const int32_t* unit,
                                       int32_t first, int32_t open, int32_t k0, int32_t depth, bool gated,
                                       const Table<C>& table) {
    const T* data = static_cast<const T*>(x.data);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      int row, k;
      place(along_k, i, row, k);
      k += k0;
      value[i] = T{};
      if (first + row >= open || k >= depth) continue;
      const int64_t at_row = x.gather_row ? unit[row] : first + row;
      const int64_t at_k = x.gather_k && gated ? int32_t(table.index[k]) : k;
      value[i] = data[at_row * x.stride_row + at_k * x.stride_k];
    }
  }
  // A missing element is 0, and every activation keeps that.
  __device__ __forceinline__ void store(const SmallOperand& x, bool along_k, int32_t k0, int32_t depth,
                                        bool gated, const Table<C>& table, C (*to)[kRow]) const {
    C v[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = load_as<C>(value[i]);
    switch (static_cast<Activation>(x.act)) {
      case Activation::kRelu:
        each<Activation::kRelu>(v);
        break;
      case Activation::kGelu:
        each<Activation::kGelu>(v);
        break;
      case Activation::kSilu:
        each<Activation::kSilu>(v);
        break;
      default:
        break;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      int row, k;
      place(along_k, i, row, k);
      if (x.scale_k && gated && k0 + k < depth) v[i] *= table.z[table.index[k0 + k]];
      to[k][row] = v[i];
    }
  }
  template <Activation act>
  static __device__ __forceinline__ void each(C (&v)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = activation<act>(v[i]);
  }
};

template <typename C>
__device__ __forceinline__ C gate_gradient(const SmallParams& p, C z, C dz, bool full) {
  if (p.to_log_alpha)
    return z > C(0) && z < C(1) ? dz * hard_concrete_grad(z, C(p.beta), C(p.gamma), C(p.zeta)) : C(0);
  const bool wanted = full ? z != C(0) : !(z <= C(0) || z >= C(1));
  return wanted ? dz : C(0);
}

// The tile's part of a gate's gradient goes to scratch; the last tile of the stripe adds them up in order.
// line: sums of this tile by position, valid in the first kTile threads. extra: added at the end, or null.
template <typename T, typename C>
__device__ void add_gate_grad(const SmallParams& p, const SmallGateGrad& grad, unsigned* ticket, int32_t size,
                              int32_t first, int32_t open, int32_t tile_across, int32_t tiles_across,
                              int32_t open_across, const int32_t* unit, const C* z, C line, const T* extra,
                              const C* extra_factor, SmallShared<C>& s) {
  const int i = int(threadIdx.x);
  C* sums = static_cast<C*>(grad.sums);
  const bool inside = i < kTile && first + i < size;
  if (inside) sums[int64_t(tile_across) * size + first + i] = line;
  if (!is_last_block(ticket, unsigned(tiles_across), s.last)) return;
  if (!inside) return;
  C sum = C(0);
  for (int t = 0; t * kTile < open_across; ++t) sum += sums[int64_t(t) * size + first + i];
  if (extra) sum += load_as<C>(extra[unit[i]]) * extra_factor[unit[i]];
  static_cast<C*>(grad.dz)[unit[i]] = first + i < open ? gate_gradient(p, z[i], sum, grad.full) : C(0);
}

template <typename T>
__device__ void run_product(const SmallParams& p, const SmallProduct& q, int32_t block,
                            Table<Arithmetic<T>> table, SmallShared<Arithmetic<T>>& s) {
  using C = Arithmetic<T>;
  const int32_t tiles_m = small_tiles(q.M), tiles_n = small_tiles(q.N);
  const int32_t tile_m = block / tiles_n, tile_n = block % tiles_n;
  const int32_t m0 = tile_m * kTile, n0 = tile_n * kTile;
  const int warp = warp_id(), lane = lane_id();

  const int32_t open_m = read_axis(p, q.m, q.M, m0, table, s, s.unit_m, s.z_m);
  const int32_t open_n = read_axis(p, q.n, q.N, n0, table, s, s.unit_n, s.z_n);
  const bool gated_k = q.k.size != 0;
  if (gated_k) {
    if (q.k.log_alpha)
      draw_table(p, q.k, table, s);
    else
      read_table(q.k, table);
  }
  const int32_t depth = gated_k ? table.open : q.K;
  __syncthreads();

  // A warp takes every kWarps-th piece of k and keeps a tile of its own; the tiles are added at the end.
  const bool sums_rows = tile_n == 0 && (q.db || q.db_sums);
  const bool a_along_k = q.a.stride_k == 1, b_along_k = q.b.stride_k == 1;
  const int row = lane / 4 * 2, col = lane % 4 * 4;  // of the 2 x 4 elements that this lane adds up
  C acc[2][4] = {}, a_sum[2] = {};
  if (m0 < open_m && (n0 < open_n || sums_rows)) {
    Piece<T, C> a, b;
    int32_t k0 = warp * kDepth;
    a.load(q.a, a_along_k, s.unit_m, m0, open_m, k0, depth, gated_k, table);
    b.load(q.b, b_along_k, s.unit_n, n0, open_n, k0, depth, gated_k, table);
    for (; k0 < depth; k0 += kWarps * kDepth) {
      a.store(q.a, a_along_k, k0, depth, gated_k, table, s.a[warp]);
      b.store(q.b, b_along_k, k0, depth, gated_k, table, s.b[warp]);
      __syncwarp();
      const int32_t next = k0 + kWarps * kDepth;  // under way while this piece is multiplied
      a.load(q.a, a_along_k, s.unit_m, m0, open_m, next, depth, gated_k, table);
      b.load(q.b, b_along_k, s.unit_n, n0, open_n, next, depth, gated_k, table);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        C x[2], y[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = s.a[warp][k][row + i];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = s.b[warp][k][col + j];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a_sum[i] += x[i];
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[i][j] += x[i] * y[j];
        }
      }
      __syncwarp();
    }
  }
  __syncthreads();  // operands and sums share memory
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s.sum[warp][(row + i) * kTile + col + j] = acc[i][j];
    if (col == 0) s.row_sum[warp][row + i] = a_sum[i];
  }
  __syncthreads();

  const int i = int(threadIdx.x) / kTile, j = int(threadIdx.x) % kTile;
  const int32_t m = m0 + i, n = n0 + j, unit_m = s.unit_m[i], unit_n = s.unit_n[j];
  const bool inside = m < q.M && n < q.N, filled = m < open_m && n < open_n;
  C v = C(0);
  for (int w = 0; w < kWarps; ++w) v += s.sum[w][threadIdx.x];
  if (inside && q.c && (m < open_m || q.scatter_m) && (n < open_n || q.scatter_n)) {
    C out = C(0);
    if (filled) {
      out = q.bias ? v + load_as<C>(static_cast<const T*>(q.bias)[unit_n]) : v;
      if (q.scale_m) out *= s.z_m[i];
      if (q.scale_n) out *= s.z_n[j];
      if (q.pre) out *= act_grad_of(q.act, load_as<C>(static_cast<const T*>(q.pre)[m * q.pre_stride + n]));
    }
    const int64_t at_m = q.scatter_m ? unit_m : m, at_n = q.scatter_n ? unit_n : n;
    static_cast<T*>(q.c)[at_m * q.c_stride + at_n] = store_as<T>(out);
  }

  if (sums_rows && threadIdx.x < kTile && m0 + int(threadIdx.x) < q.M) {
    const int r = int(threadIdx.x);
    C sum = C(0);
    for (int w = 0; w < kWarps; ++w) sum += s.row_sum[w][r];
    if (q.db_sums) static_cast<C*>(q.db_sums)[s.unit_m[r]] = sum;
    if (q.db)
      static_cast<T*>(q.db)[s.unit_m[r]] =
          store_as<T>(m0 + r < open_m ? (q.scale_m ? sum * s.z_m[r] : sum) : C(0));
  }
  if (!q.grad_m.dz && !q.grad_n.dz) return;
  C term = C(0);
  if (filled)
    term =
        v * load_as<C>(static_cast<const T*>(q.theta)[unit_m * q.theta_stride_m + unit_n * q.theta_stride_n]);
  const int t = int(threadIdx.x);
  if (q.grad_n.dz) {
    s.term[t] = q.scale_m ? term * s.z_m[i] : term;
    __syncthreads();
    C line = C(0);
    if (t < kTile)
      for (int r = 0; r < kTile; ++r) line += s.term[r * kTile + t];
    add_gate_grad<T, C>(p, q.grad_n, q.ticket + tiles_m + tile_n, q.N, n0, open_n, tile_m, tiles_m, open_m,
                        s.unit_n, s.z_n, line, nullptr, nullptr, s);
    __syncthreads();
  }
  if (q.grad_m.dz) {
    s.term[t] = q.scale_n ? term * s.z_n[j] : term;
    __syncthreads();
    C line = C(0);
    if (t < kTile)
      for (int c = 0; c < kTile; ++c) line += s.term[t * kTile + c];
    add_gate_grad<T, C>(p, q.grad_m, q.ticket + tile_m, q.M, m0, open_m, tile_n, tiles_n, open_n, s.unit_m,
                        s.z_m, line, static_cast<const T*>(q.theta_bias), static_cast<const C*>(q.db_sums),
                        s);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    small_kernel(const __grid_constant__ SmallParams p, int32_t table_size) {
  using C = Arithmetic<T>;
  L0_SHARED(SmallShared<C>, s);
  L0_DYNAMIC_SHARED(memory);
  Table<C> table;
  table.z = reinterpret_cast<C*>(memory);
  table.index = reinterpret_cast<uint16_t*>(table.z + table_size);
  table.open = 0;
  const int32_t block = int32_t(blockIdx.x);
  const SmallProduct& q = p.product[p.products > 1 && block >= p.product[1].first_block];
  run_product<T>(p, q, block - q.first_block, table, s);
}

template <typename T>
void launch_small(const SmallParams& p, const Stream& stream) {
  int32_t table_size = 0;
  for (int i = 0; i < p.products; ++i)
    for (const SmallGate* g : {&p.product[i].m, &p.product[i].n, &p.product[i].k})
      if (g == &p.product[i].k || g->log_alpha) table_size = std::max(table_size, g->size);
  const size_t bytes = size_t(table_size) * (sizeof(Arithmetic<T>) + sizeof(uint16_t));
  launch("small layer", stream, {unsigned(p.blocks), kThreads, bytes}, small_kernel<T>, p, table_size);
}

}  // namespace

void small_products(int type, const SmallParams& p, const Stream& stream) {
  switch (type) {
    case 0:
      return launch_small<float>(p, stream);
    case 1:
      return launch_small<double>(p, stream);
    case 2:
      return launch_small<BFloat16>(p, stream);
    case 3:
      return launch_small<Half>(p, stream);
  }
  throw std::invalid_argument("element type: expected 0..3");
}

}  // namespace l0::cuda
