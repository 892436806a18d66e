// Runs CUDA kernels on the CPU, for tests: a thread of a block is a fiber that runs until it meets a barrier
// or a warp operation. Fibers and blocks are resumed in an order drawn from a seed, and shared memory is born
// as NaN, so that a missing barrier or initialisation shows. Blocks of a cluster run together, clusters one
// after the other. A barrier that not every thread reaches, or that threads reach at different lines, is an
// error.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace l0::emulator {

struct Thread {
  dim3 thread, block;
};
const Thread& self();
extern dim3 grid_dim, block_dim;

void run(const char* name, dim3 grid, dim3 block, unsigned cluster, size_t dynamic_bytes,
         const std::function<void()>& body);
void set_seed(uint64_t seed);  // of the order of threads and blocks
int64_t launches();            // since the process began

// `id` names the declaration; every block has its own memory, aligned to 16 bytes.
void* shared(size_t bytes, int id);
void* dynamic_shared();
void* in_block_of_cluster(void* address, unsigned rank);

enum class Scope { kWarp, kBlock, kCluster };
void barrier(Scope scope, int line);
void fail(const std::string& what);  // ends the launch; does not return
// Every lane's value; a lane's own is at its index.
const uint64_t* exchange(unsigned mask, uint64_t value, int line);

template <typename T>
uint64_t to_slot(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t slot = 0;
  std::memcpy(&slot, &value, sizeof value);
  return slot;
}
template <typename T>
T from_slot(uint64_t slot) {
  T value;
  std::memcpy(&value, &slot, sizeof value);
  return value;
}
inline unsigned lane() { return self().thread.x % 32; }

}  // namespace l0::emulator

#define threadIdx (::l0::emulator::self().thread)
#define blockIdx (::l0::emulator::self().block)
#define blockDim (::l0::emulator::block_dim)
#define gridDim (::l0::emulator::grid_dim)

using std::min;
inline void __syncthreads(int line = __builtin_LINE()) {
  l0::emulator::barrier(l0::emulator::Scope::kBlock, line);
}
inline void __syncwarp(int line = __builtin_LINE()) {
  l0::emulator::barrier(l0::emulator::Scope::kWarp, line);
}
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  const uint64_t* slot = l0::emulator::exchange(mask, predicate, line);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= unsigned(slot[i]) << i;
  return ballot;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return l0::emulator::from_slot<T>(
      l0::emulator::exchange(mask, l0::emulator::to_slot(value), line)[unsigned(lane) % 32]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return l0::emulator::from_slot<T>(l0::emulator::exchange(mask, l0::emulator::to_slot(value),
                                                           line)[l0::emulator::lane() ^ unsigned(lanes)]);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}
