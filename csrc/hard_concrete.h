// The hard-concrete gate and its noise (Louizos, Welling and Kingma, ICLR 2018, eqs. 10-11); one source for
// the CPU and the CUDA build.
#pragma once
#include <cstdint>

#include "vector_math.h"

namespace l0 {

// First output word of Philox4x32-10 (Salmon et al., SC 2011).
L0_HOST_DEVICE inline uint32_t philox4x32_10(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1,
                                             uint32_t c2, uint32_t c3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
    const uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c0 = n0;
    c1 = uint32_t(p1);
    c2 = n2;
    c3 = uint32_t(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
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
