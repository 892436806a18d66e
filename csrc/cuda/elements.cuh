// Loads of several elements at a time.
#pragma once
#include <cstring>

#include "runtime.cuh"

namespace l0::cuda {

// N elements of S, left as they were loaded, in pieces of up to 16 bytes: a register holds two of 16 bits.
template <typename S, int N>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Elements {
  static_assert(N * sizeof(S) % 8 == 0);
  uint32_t word[N * sizeof(S) / 4];

  __device__ __forceinline__ S at(int i) const {
    S x;
    if constexpr (sizeof(S) == 2) {
      x.bits = uint16_t(word[i / 2] >> (i % 2 * 16));
    } else if constexpr (sizeof(S) == 4) {
      std::memcpy(&x, &word[i], sizeof x);
    } else {
      std::memcpy(&x, &word[2 * i], sizeof x);
    }
    return x;
  }
};
template <typename S, int N>
__device__ __forceinline__ Elements<S, N> load_elements(const S* p) {
  Elements<S, N> e;
  if constexpr (N * sizeof(S) >= 16) {
#pragma unroll
    for (int i = 0; i < int(N * sizeof(S) / 16); ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i];
      e.word[4 * i] = v.x, e.word[4 * i + 1] = v.y, e.word[4 * i + 2] = v.z, e.word[4 * i + 3] = v.w;
    }
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    e.word[0] = v.x, e.word[1] = v.y;
  }
  return e;
}
// Behind a group of loads: they are all under way before the first is used. Left to itself the compiler puts
// some beside their use, to save registers.
__device__ __forceinline__ void loads_first() { __syncwarp(); }

// Whether rows of S can be taken N elements at a time.
template <typename S, int N>
__device__ __forceinline__ bool aligned(const S* p, int64_t stride) {
  constexpr uintptr_t kBytes = N * sizeof(S) < 16 ? N * sizeof(S) : 16;
  return (reinterpret_cast<uintptr_t>(p) | uintptr_t(stride * int64_t(sizeof(S)))) % kBytes == 0;
}

}  // namespace l0::cuda
