// What kernels and launchers need of CUDA. The same sources are compiled by nvcc and, for tests, by a C++
// compiler against an emulator of a block (tests/emulator), so whatever differs between the two is here.
#pragma once
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "half.h"
#include "launch.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
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

// Blocks of a cluster and their view of each other's shared memory; before sm_90 every block is alone.
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <typename T>
__device__ inline T cluster_read(T& x, unsigned rank) {
  return *cooperative_groups::this_cluster().map_shared_rank(&x, rank);
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ inline T cluster_read(T& x, unsigned) {
  return x;
}
#endif
#else
inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline unsigned cluster_size() { return emulator::cluster_size(); }
inline void cluster_sync(int line = __builtin_LINE()) { emulator::barrier(emulator::Scope::kCluster, line); }
template <typename T>
T cluster_read(T& x, unsigned rank) {
  return *static_cast<T*>(emulator::in_block_of_cluster(&x, rank));
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
