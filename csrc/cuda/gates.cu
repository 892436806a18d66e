#include "gates.h"

#include <algorithm>

#include "draw.cuh"

namespace l0::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaskRows = 2048;          // of 32 gates: their open bits stay in shared memory
constexpr int kGatesPerBlock = 2048;     // a longer vector is shared by the blocks of a cluster
constexpr unsigned kLargestCluster = 8;  // every device with clusters has these

template <typename T>
struct SampleShared {
  uint32_t open_bits[kMaskRows];
  int32_t open[kWarps];
  T expected[kWarps];
  int32_t block_open;
  T block_expected;
};

// One vector per cluster. A warp owns consecutive rows of 32 gates, so that a ballot and the number of open
// gates before the row give every gate its place.
template <typename T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams p) {
  L0_SHARED(SampleShared<T>, s);
  const unsigned parts = cluster_size(), part = cluster_rank();
  const SampleVector& v = p.vector[blockIdx.x / parts];
  const T* log_alpha = static_cast<const T*>(v.log_alpha);
  T* z = static_cast<T*>(p.z) + v.z_at;
  int32_t* index = p.index + v.index_at;
  const int32_t size = v.size;
  const uint64_t seed = uint64_t(*p.seed);
  const Constants<T> c{T(p.beta), T(p.gamma), T(p.zeta)};
  const int warp = warp_id(), lane = lane_id();

  const int32_t rows = ceil_div(size, kWarp);
  const int32_t rows_per_warp = ceil_div(rows, int32_t(parts) * kWarps);
  const int32_t block_row = int32_t(part) * kWarps * rows_per_warp;
  const int32_t first = block_row + warp * rows_per_warp;
  const int32_t end = first + rows_per_warp < rows ? first + rows_per_warp : rows;

  int32_t open = 0;
  T expected = T(0);
#pragma unroll 2
  for (int32_t row = first; row < end; ++row) {
    const int64_t gate = int64_t(row) * kWarp + lane;
    T value = T(0);
    if (gate < size) {
      const T a = log_alpha[gate];
      value = draw(a, noise(seed, gate, v.stream, p.rank), c);
      z[gate] = value;
      if (p.expected) expected += p_open(a, T(p.shift));
    }
    const uint32_t bits = __ballot_sync(kAllLanes, !(value == T(0)));
    if (lane == 0 && row - block_row < kMaskRows) s.open_bits[row - block_row] = bits;
    open += __popc(bits);
  }
  if (p.expected) expected = warp_sum(expected);
  if (lane == 0) {
    s.open[warp] = open;
    s.expected[warp] = expected;
  }
  __syncthreads();
  int32_t before = 0, block_open = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += s.open[w];
    block_open += s.open[w];
  }
  if (threadIdx.x == 0) {
    s.block_open = block_open;
    T sum = T(0);
    for (int w = 0; w < kWarps; ++w) sum += s.expected[w];
    s.block_expected = sum;
  }
  cluster_sync();
  int32_t all_open = 0;
  for (unsigned r = 0; r < parts; ++r) {
    const int32_t other = cluster_read(s.block_open, r);
    if (r < part) before += other;
    all_open += other;
  }

  for (int32_t row = first; row < end; ++row) {
    const int64_t gate = int64_t(row) * kWarp + lane;
    uint32_t bits;
    if (row - block_row < kMaskRows)
      bits = s.open_bits[row - block_row];
    else
      bits = __ballot_sync(kAllLanes, gate < size && !(z[gate] == T(0)));
    if (gate < size) {
      const int32_t open_before = before + __popc(bits & ((1u << lane) - 1u));
      const bool is_open = (bits >> lane) & 1u;
      index[is_open ? int64_t(open_before) : all_open + gate - open_before] = int32_t(gate);
    }
    before += __popc(bits);
  }

  if (part == 0) {
    const int64_t padded = round_up(int64_t(size), int64_t(kAlign));
    for (int64_t i = size + int64_t(threadIdx.x); i < padded; i += kThreads) index[i] = 0;
    if (threadIdx.x == 0) {
      int32_t* count = p.count + 2 * (blockIdx.x / parts);
      const bool plain = float(all_open) > p.tau * float(size);
      count[0] = all_open;
      count[1] = round_up(plain ? size : all_open, kAlign);
      if (p.expected) {
        T sum = T(0);
        for (unsigned r = 0; r < parts; ++r) sum += cluster_read(s.block_expected, r);
        static_cast<T*>(p.expected)[blockIdx.x / parts] = sum;
      }
    }
  }
  cluster_sync();  // nobody leaves while another block may read its shared memory
}

constexpr int kGradThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kGradThreads)
    gate_grad_kernel(const T* __restrict__ dz, const T* __restrict__ z, T* __restrict__ out, int64_t n,
                     Constants<T> c) {
#pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * kGradThreads + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * kGradThreads) {
    const T value = z[i];
    out[i] = value > T(0) && value < T(1) ? dz[i] * hard_concrete_grad(value, c.beta, c.gamma, c.zeta) : T(0);
  }
}

}  // namespace

template <typename T>
void sample(const SampleParams& p, int vectors, int32_t largest, const Stream& stream) {
  if (vectors == 0) return;
  unsigned cluster = 1;
  while (cluster < kLargestCluster && int64_t(cluster) * kGatesPerBlock < largest) cluster *= 2;
  if (cluster > 1 && !has_clusters(stream, "sample")) cluster = 1;
  launch("sample", stream, {unsigned(vectors) * cluster, kThreads, 0, cluster}, sample_kernel<T>, p);
}

template <typename T>
void gate_grad(const T* dz, const T* z, T* dlog_alpha, int64_t n, double beta, double gamma, double zeta,
               const Stream& stream) {
  if (n == 0) return;
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(n, int64_t(kGradThreads)), 4096));
  launch("gate_grad", stream, {blocks, kGradThreads}, gate_grad_kernel<T>, dz, z, dlog_alpha, n,
         Constants<T>{T(beta), T(gamma), T(zeta)});
}

template void sample<float>(const SampleParams&, int, int32_t, const Stream&);
template void sample<double>(const SampleParams&, int, int32_t, const Stream&);
template void gate_grad<float>(const float*, const float*, float*, int64_t, double, double, double,
                               const Stream&);
template void gate_grad<double>(const double*, const double*, double*, int64_t, double, double, double,
                                const Stream&);

}  // namespace l0::cuda
