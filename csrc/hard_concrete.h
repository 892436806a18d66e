// The hard-concrete gate and its noise (Louizos, Welling and Kingma, ICLR 2018, eqs. 10-11); one source for
// the CPU and the CUDA build.
#pragma once
#include <cstdint>

#include "vector_math.h"

namespace l0 {

// a * b, exactly. Left to itself nvcc adds 0 to the upper half of a product widened by hand.
L0_HOST_DEVICE inline uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

// Philox4x32 (Salmon et al., SC 2011): a round on the counter, and what a round adds to the key.
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;
L0_HOST_DEVICE inline void philox_round(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  const uint64_t p0 = multiply_wide(0xD2511F53u, c[0]);
  const uint64_t p1 = multiply_wide(0xCD9E8D57u, c[2]);
  c[0] = uint32_t(p1 >> 32) ^ c[1] ^ key0;
  c[2] = uint32_t(p0 >> 32) ^ c[3] ^ key1;
  c[1] = uint32_t(p1);
  c[3] = uint32_t(p0);
}

// First output word of Philox4x32-10.
L0_HOST_DEVICE inline uint32_t philox4x32_10(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1,
                                             uint32_t c2, uint32_t c3) {
  uint32_t c[4] = {c0, c1, c2, c3};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c, key0, key1);
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return c[0];
}

// u in (0, 1) with 23 bits: u and 1 - u are exact in fp32 and never 0 or 1.
template <typename T>
L0_HOST_DEVICE inline T uniform_from_bits(uint32_t r) {
  return (T(r >> 9) + T(0.5)) * T(1.1920928955078125e-7);
}

// z = clip(s * (zeta - gamma) + gamma, 0, 1),  s = sigmoid((log u - log(1 - u) + log_alpha) / beta). A NaN
// log_alpha gives a NaN gate.
template <typename T>
L0_HOST_DEVICE inline T hard_concrete(T u, T log_alpha, T beta, T gamma, T zeta) {
  const T s = T(1) / (T(1) + math::exp(-(math::log(u) - math::log(T(1) - u) + log_alpha) / beta));
  const T z = s * (zeta - gamma) + gamma;
  return z <= T(0) ? T(0) : (z >= T(1) ? T(1) : z);
}

// dz / dlog_alpha from z alone: (zeta - gamma) / beta * s * (1 - s) where 0 < z < 1, else 0;  s = (z - gamma)
// / (zeta - gamma).
template <typename T>
L0_HOST_DEVICE inline T hard_concrete_grad(T z, T beta, T gamma, T zeta) {
  const T s = (z - gamma) / (zeta - gamma);
  return z > T(0) && z < T(1) ? (zeta - gamma) / beta * s * (T(1) - s) : T(0);
}

// P(z > 0) = sigmoid(log_alpha - shift),  shift = beta * log(-gamma / zeta)   (eq. 12).
template <typename T>
L0_HOST_DEVICE inline T p_open(T log_alpha, T shift) {
  return T(1) / (T(1) + math::exp(shift - log_alpha));
}

}  // namespace l0
