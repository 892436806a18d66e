// One gate on the device: fast where fp32 allows it, else the formula that the CPU computes.
#pragma once
#include "hard_concrete.h"
#include "runtime.cuh"

namespace l0::cuda {

template <typename T>
struct Constants {
  T beta, gamma, zeta;
};

__device__ __forceinline__ uint32_t noise(uint64_t seed, int64_t gate, uint32_t stream, uint32_t rank) {
  return philox4x32_10(uint32_t(seed), uint32_t(seed >> 32), uint32_t(gate), uint32_t(uint64_t(gate) >> 32),
                       stream, rank);
}

template <typename T>
__device__ __forceinline__ T draw(T log_alpha, uint32_t bits, const Constants<T>& c) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    // u = 1.m - (1 - 2^-24), exact like uniform_from_bits; the logarithm of a quotient is one logarithm less.
    // Its absolute error near u = 1/2, 2^-21, is a few ulp of z.
    const float u = math::from_bits(0x3f800000u | (bits >> 9)) - 0.999999940395355224609375f;
    const float logit = __logf(__fdividef(u, 1.0f - u)) + log_alpha;
    const float s = __fdividef(1.0f, 1.0f + __expf(-__fdividef(logit, c.beta)));
    const float z = s * (c.zeta - c.gamma) + c.gamma;
    return z <= 0.0f ? 0.0f : (z >= 1.0f ? 1.0f : z);
  }
#endif
  return hard_concrete(uniform_from_bits<T>(bits), log_alpha, c.beta, c.gamma, c.zeta);
}

}  // namespace l0::cuda
