// One gate on the device: fast where fp32 allows it, else the formula that the CPU computes.
#pragma once
#include "hard_concrete.h"
#include "runtime.cuh"

namespace l0::cuda {

// Of the distribution, in the type of the gates; made on the host, where a conversion costs nothing.
template <typename T>
struct Constants {
  T beta, gamma, zeta;
  bool by_root;  // 1 / beta = 3/2: a power is a square root

  Constants() = default;
  L0_HOST_DEVICE Constants(double beta, double gamma, double zeta)
      : beta(T(beta)), gamma(T(gamma)), zeta(T(zeta)), by_root(T(beta) == T(2.0 / 3.0)) {}
};

// The random bits of a gate (csrc/hard_concrete.h), with the keys of all rounds made once.
class Noise {
 public:
  explicit __device__ __forceinline__ Noise(int64_t seed) {
    uint32_t key0 = uint32_t(uint64_t(seed)), key1 = uint32_t(uint64_t(seed) >> 32);
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key_[round][0] = key0;
      key_[round][1] = key1;
#if defined(__CUDA_ARCH__)
      // Else every gate adds them up again.
      asm volatile("" : "+r"(key_[round][0]), "+r"(key_[round][1]));
#endif
      key0 += kPhiloxKey0;
      key1 += kPhiloxKey1;
    }
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t gate, uint32_t stream, uint32_t rank) const {
    uint32_t c[4] = {gate, 0u, stream, rank};
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) philox_round(c, key_[round][0], key_[round][1]);
    return c[0];
  }

 private:
  uint32_t key_[kPhiloxRounds][2];
};

#if defined(__CUDA_ARCH__)
// Without the care for denormal numbers, which costs as much as the function.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// s = u^(1/beta) / (u^(1/beta) + ((1 - u) * exp(-log_alpha))^(1/beta)): relative errors of a few ulp, and no
// logarithm for beta = 2/3. An infinite log_alpha saturates; a NaN stays one.
__device__ __forceinline__ float draw_fast(float log_alpha, uint32_t bits, const Constants<float>& c,
                                           bool by_root) {
  const float u = math::from_bits(0x3f800000u | (bits >> 9)) - 0.999999940395355224609375f;  // exact
  const float v = 1.0f - u;
  float s;
  if (by_root) {
    const float y = v * fast_exp2(log_alpha * -1.44269504f), x = u * fast_root(u);
    s = x * fast_reciprocal(__fmaf_rn(y, fast_root(y), x));
  } else {
    const float t = fast_log2(v) - fast_log2(u) - 1.44269504f * log_alpha;
    s = fast_reciprocal(1.0f + fast_exp2(t * fast_reciprocal(c.beta)));
  }
  const float z = __fmaf_rn(s, c.zeta - c.gamma, c.gamma);
  float clipped;
  asm("{.reg .f32 t; min.NaN.f32 t, %1, 0f3F800000; max.NaN.f32 %0, t, 0f00000000;}"
      : "=f"(clipped)
      : "f"(z));
  return clipped;
}
#endif

// by_root: c.by_root, given as a constant where the kernel was compiled for it.
template <typename T>
__device__ __forceinline__ T draw(T log_alpha, uint32_t bits, const Constants<T>& c,
                                  [[maybe_unused]] bool by_root) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) return draw_fast(log_alpha, bits, c, by_root);
#endif
  return hard_concrete(uniform_from_bits<T>(bits), log_alpha, c.beta, c.gamma, c.zeta);
}

}  // namespace l0::cuda
