#include "gates.h"

#include <algorithm>

#include "draw.cuh"

namespace l0::cuda {
namespace {

constexpr unsigned kThreads = 256, kMostThreads = 512;  // of a block
constexpr int64_t kGatesPerThread = 8;                  // beyond it, more blocks or threads share a vector
constexpr unsigned kLargestCluster = 8;                 // every device with clusters has these

template <typename T>
struct SampleShared {
  int32_t open[kWarp];  // of each warp
  T expected[kWarp];
  ClusterBox box;
  int32_t open_in[kLargestCluster];  // of each block of the cluster, sent by it
  T expected_in[kLargestCluster];
};

// How a vector is divided: 2^log_parts blocks, a cluster if they are several, of 2^log_warps warps each.
struct SampleShape {
  int log_parts, log_warps;
};

// A warp owns consecutive rows of 32 gates, so that a ballot and the number of open gates before the row give
// every gate its place, and a row's places lie side by side.
template <typename T, bool kByRoot, bool kExpected>
__global__ void __launch_bounds__(kMostThreads, 2)
    sample_kernel(const __grid_constant__ SampleParams p, const Constants<T> c, const T shift,
                  const SampleShape shape) {
  L0_SHARED(SampleShared<T>, s);
  const int parts = 1 << shape.log_parts, warps = 1 << shape.log_warps;
  if (parts > 1)
    cluster_open(s.box, unsigned(parts) * unsigned(sizeof(int32_t) + (kExpected ? sizeof(T) : 0)));
  const int part = int(blockIdx.x) & (parts - 1), vector = int(blockIdx.x) >> shape.log_parts;
  const SampleVector& v = p.vector[vector];
  const T* log_alpha = static_cast<const T*>(v.log_alpha);
  T* z = static_cast<T*>(v.z);
  const uint32_t size = uint32_t(v.size), stream = v.stream;
  const int warp = warp_id(), lane = lane_id();

  const int rows = int((size + kWarp - 1) / kWarp);
  const int block_rows = (rows + parts - 1) >> shape.log_parts, block_row = part * block_rows;
  const int block_end = min(block_row + block_rows, rows);
  const int warp_rows = (block_rows + warps - 1) >> shape.log_warps;
  const int first = min(block_row + warp * warp_rows, block_end), end = min(first + warp_rows, block_end);

  uint32_t kept = 0;  // which gates of row first + lane are open
  int32_t open = 0;
  T expected = T(0);
  bool next_inside = first < end && uint32_t(first) * kWarp + lane < size;
  T next = next_inside ? log_alpha[uint32_t(first) * kWarp + lane] : T(0);  // under way while bits are made
  const Noise noise(*p.seed);
#pragma unroll 2
  for (int row = first; row < end; ++row) {
    const uint32_t gate = uint32_t(row) * kWarp + lane;
    const bool inside = next_inside;
    const T a = next;
    next_inside = gate + kWarp < size;
    next = next_inside ? log_alpha[gate + kWarp] : T(0);
    const T value = draw(a, noise(gate, stream, p.rank), c, kByRoot);
    if (inside) z[gate] = value;
    if (kExpected) expected += inside ? p_open(a, shift) : T(0);
    const uint32_t bits = __ballot_sync(kAllLanes, inside && !(value == T(0)));
    if (row - first == lane) kept = bits;
    open += __popc(bits);
  }
  if (kExpected) expected = warp_sum(expected);
  if (lane == 0) {
    s.open[warp] = open;
    s.expected[warp] = expected;
  }
  __syncthreads();
  if (parts > 1) cluster_wait();
  const int32_t of_warp = lane < warps ? s.open[lane] : 0;
  int32_t before = warp_sum(lane < warp ? of_warp : 0), all_open = warp_sum(of_warp);
  T all_expected = T(0);
  if (kExpected) {
    all_expected = warp_sum(lane < warps ? s.expected[lane] : T(0));
  }
  if (parts > 1) {
    if (int(threadIdx.x) < parts) {
      cluster_send(s.box, s.open_in[part], threadIdx.x, all_open);
      if (kExpected) cluster_send(s.box, s.expected_in[part], threadIdx.x, all_expected);
    }
    cluster_receive(s.box);
    const int32_t of_block = lane < parts ? s.open_in[lane] : 0;
    before += warp_sum(lane < part ? of_block : 0);
    all_open = warp_sum(of_block);
    if (kExpected) all_expected = warp_sum(lane < parts ? s.expected_in[lane] : T(0));
  }

  int32_t* index = v.index;
  for (int some = first; some < end; some += kWarp) {
    const int some_end = min(some + kWarp, end);
    if (some > first)  // rows that nobody kept
      for (int row = some; row < some_end; ++row) {
        const uint32_t gate = uint32_t(row) * kWarp + lane;
        const uint32_t bits = __ballot_sync(kAllLanes, gate < size && !(z[gate] == T(0)));
        if (row - some == lane) kept = bits;
      }
#pragma unroll 2
    for (int row = some; row < some_end; ++row) {
      const uint32_t gate = uint32_t(row) * kWarp + lane;
      const uint32_t bits = __shfl_sync(kAllLanes, kept, row - some);
      const uint32_t open_before = uint32_t(before) + __popc(bits & ((1u << lane) - 1u));
      const uint32_t place = (bits >> lane) & 1u ? open_before : uint32_t(all_open) + gate - open_before;
      if (gate < size) index[place] = int32_t(gate);
      before += __popc(bits);
    }
  }

  if (part == 0) {
    const uint32_t tail = size + threadIdx.x;
    static_assert(kThreads >= unsigned(kAlign));
    if (tail < round_up(size, uint32_t(kAlign))) index[tail] = 0;
    if (threadIdx.x == 0) {
      int32_t* count = p.count + 2 * vector;
      const bool plain = float(all_open) > p.tau * float(size);
      count[0] = all_open;
      count[1] = round_up(plain ? int32_t(size) : all_open, kAlign);
      if (kExpected) static_cast<T*>(p.expected)[vector] = all_expected;
    }
  }
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
  const unsigned largest_cluster =
      largest > kThreads * kGatesPerThread && has_clusters(stream, "sample") ? kLargestCluster : 1;
  SampleShape shape{0, 3};
  const auto gates = [&] { return kGatesPerThread * kWarp << (shape.log_parts + shape.log_warps); };
  while (1u << shape.log_parts < largest_cluster && gates() < largest) ++shape.log_parts;
  while (kWarp << shape.log_warps < int(kMostThreads) && gates() < largest) ++shape.log_warps;
  const Constants<T> c(p.beta, p.gamma, p.zeta);
  const unsigned parts = 1u << shape.log_parts;
  auto* kernel = p.expected ? sample_kernel<T, false, true> : sample_kernel<T, false, false>;
  if constexpr (std::is_same_v<T, float>)
    if (c.by_root) kernel = p.expected ? sample_kernel<T, true, true> : sample_kernel<T, true, false>;
  launch("sample", stream, {unsigned(vectors) * parts, unsigned(kWarp) << shape.log_warps, 0, parts}, kernel,
         p, c, T(p.shift), shape);
}

template <typename T>
void gate_grad(const T* dz, const T* z, T* dlog_alpha, int64_t n, double beta, double gamma, double zeta,
               const Stream& stream) {
  if (n == 0) return;
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(n, int64_t(kGradThreads)), 4096));
  launch("gate_grad", stream, {blocks, kGradThreads}, gate_grad_kernel<T>, dz, z, dlog_alpha, n,
         Constants<T>(beta, gamma, zeta));
}

template void sample<float>(const SampleParams&, int, int32_t, const Stream&);
template void sample<double>(const SampleParams&, int, int32_t, const Stream&);
template void gate_grad<float>(const float*, const float*, float*, int64_t, double, double, double,
                               const Stream&);
template void gate_grad<double>(const double*, const double*, double*, int64_t, double, double, double,
                                const Stream&);

}  // namespace l0::cuda
