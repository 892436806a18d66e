// What kernels and launchers need of CUDA. The same sources are compiled by nvcc and, for tests, by a C++
// compiler against an emulator of a block (tests/support/emulator): what differs between the two is here.
#pragma once
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "half.h"
#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

// Shared memory of a block: L0_SHARED declares one object, L0_DYNAMIC_SHARED names what the launch asked for.
// It has no initial value.
#if defined(__CUDACC__)
#define L0_SHARED(Type, name) __shared__ Type name
#define L0_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define L0_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(::l0::emulator::shared(sizeof(Type), __COUNTER__))
#define L0_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(::l0::emulator::dynamic_shared())
#endif

namespace l0::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kAlign = 128;  // ALIGN in l0kernels/reference/gates.py

// The type of gates and sums beside matrices of T.
template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename I>
L0_HOST_DEVICE constexpr I round_up(I n, I multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
template <typename I>
L0_HOST_DEVICE constexpr I ceil_div(I n, I d) {
  return (n + d - 1) / d;
}

// --- Device side ---

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / kWarp; }

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Values that the blocks of a cluster send each other, before sm_90 every block is alone. Every block opens
// its box for the bytes that will come and arrives; once it has waited every box is open; receive returns
// when all bytes have come. No fence: what else a block has stored need not be there yet. All but
// cluster_send are called by every thread.
struct alignas(8) ClusterBox {
  uint64_t barrier;
};
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t cluster_address(const void* p, unsigned rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
__device__ __forceinline__ void cluster_open(ClusterBox& box, uint32_t bytes) {
  if (threadIdx.x == 0) {
    const uint32_t at = shared_address(&box);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
template <typename T>
__device__ __forceinline__ void cluster_send(ClusterBox& box, T& x, unsigned rank, T value) {
  const uint32_t to = cluster_address(&x, rank), barrier = cluster_address(&box, rank);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(reinterpret_cast<const uint32_t&>(value)), "r"(barrier)
                 : "memory");
  } else {
    static_assert(sizeof(T) == 8);
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
                 "l"(reinterpret_cast<const uint64_t&>(value)), "r"(barrier)
                 : "memory");
  }
}
__device__ __forceinline__ void cluster_receive(ClusterBox& box) {
  const uint32_t at = shared_address(&box);
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, "
        "0, p;}"
        : "=r"(done)
        : "r"(at)
        : "memory");
  __syncwarp();
}
#else
__device__ __forceinline__ void cluster_open(ClusterBox&, uint32_t) {}
__device__ __forceinline__ void cluster_wait() {}
template <typename T>
__device__ __forceinline__ void cluster_send(ClusterBox&, T& x, unsigned, T value) {
  x = value;
}
__device__ __forceinline__ void cluster_receive(ClusterBox&) { __syncthreads(); }
#endif
#else
inline void cluster_open(ClusterBox& box, uint32_t bytes) {
  if (threadIdx.x == 0) box.barrier = bytes;
}
inline void cluster_wait(int line = __builtin_LINE()) { emulator::barrier(emulator::Scope::kCluster, line); }
template <typename T>
void cluster_send(ClusterBox& box, T& x, unsigned rank, T value) {
  *static_cast<T*>(emulator::in_block_of_cluster(&x, rank)) = value;
  static_cast<ClusterBox*>(emulator::in_block_of_cluster(&box, rank))->barrier -= sizeof(T);
}
inline void cluster_receive(ClusterBox& box, int line = __builtin_LINE()) {
  emulator::barrier(emulator::Scope::kCluster, line);
  if (box.barrier != 0) emulator::fail("a block of the cluster got another number of bytes than it expected");
}
#endif

// True in every thread of the block that is the last of `expected` to come here; what the others wrote before
// they came may then be read. Leaves the ticket at 0, as it was found. `last` is the block's own.
__device__ inline bool is_last_block(unsigned* ticket, unsigned expected, bool& last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == expected - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// 16 bytes as N elements.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Of global memory, as one access each; what is loaded must not change while the kernel runs. Left to itself
// the compiler takes vectors apart that it has put together.
#if defined(__CUDACC__)
template <typename T>
union VectorBits {
  uint4 raw;
  Vector<T> v;
};
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  VectorBits<T> bits;
  bits.raw = __ldg(reinterpret_cast<const uint4*>(p));
  return bits.v;
}
template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& v) {
  VectorBits<T> bits;
  bits.v = v;
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.raw.x),
               "r"(bits.raw.y), "r"(bits.raw.z), "r"(bits.raw.w)
               : "memory");
}
#else
template <typename T>
Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
template <typename T>
void store_vector(T* p, const Vector<T>& v) {
  *reinterpret_cast<Vector<T>*>(p) = v;
}
#endif

// Copies 16 aligned bytes of global memory to shared memory, without a register on the way; they are there
// for the thread itself after copy_wait.
#if defined(__CUDACC__)
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
inline void copy_async(void* shared, const void* global) {
  *static_cast<Vector<uint32_t>*>(shared) = *static_cast<const Vector<uint32_t>*>(global);
}
inline void copy_wait() {}
#endif

// --- Host side ---

struct Shape {
  unsigned blocks, threads;
  size_t dynamic_bytes = 0;
  unsigned cluster = 1;
};

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not be reported again by the next call
  throw std::runtime_error(std::string("l0kernels ") + what + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Makes the stream's device the current one until it goes.
class OnDevice {
 public:
  OnDevice(int device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    if (device != previous_) {
      check(cudaSetDevice(device), what);
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr which, int device, const char* what) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}
inline bool has_clusters(const Stream& s, const char* what) {
  return attribute(cudaDevAttrComputeCapabilityMajor, s.device, what) >= 9;
}
inline int multiprocessors(const Stream& s, const char* what) {
  return attribute(cudaDevAttrMultiProcessorCount, s.device, what);
}

template <typename... P, typename... A>
void launch(const char* what, const Stream& stream, const Shape& shape, void (*kernel)(P...), A... args) {
  OnDevice guard(stream.device, what);
  if (shape.dynamic_bytes > 0)  // with a kernel's static memory it may exceed what needs no asking
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.dynamic_bytes)),
          what);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.dynamic_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, P(args)...), what);
}

#else

inline bool has_clusters(const Stream&, const char*) { return true; }
inline int multiprocessors(const Stream&, const char*) { return 2; }

template <typename... P, typename... A>
void launch(const char* what, const Stream&, const Shape& shape, void (*kernel)(P...), A... args) {
  emulator::run(what, dim3(shape.blocks), dim3(shape.threads), shape.cluster, shape.dynamic_bytes,
                [&] { kernel(P(args)...); });
}

#endif

}  // namespace l0::cuda
