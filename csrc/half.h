// 16-bit floating point as bits, the same on every compiler. Conversions round to nearest even.
#pragma once
#include <type_traits>

#include "vector_math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace l0 {

enum class DType : int32_t { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

L0_HOST_DEVICE inline float to_float(float x) { return x; }
L0_HOST_DEVICE inline float to_float(double x) { return float(x); }
L0_HOST_DEVICE inline float to_float(BFloat16 x) { return math::from_bits(uint32_t(x.bits) << 16); }
L0_HOST_DEVICE inline float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 0x1fu,
                 mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return math::from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // subnormal: mantissa * 2^-24, exact in fp32
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return math::from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

template <typename D>
L0_HOST_DEVICE inline D from_float(float x) {
  if constexpr (std::is_same_v<D, BFloat16>) {  // a NaN keeps its sign and stays quiet
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t b = math::to_bits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return {uint16_t((b >> 16) | 0x40u)};
    return {uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
#endif
  } else if constexpr (std::is_same_v<D, Half>) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t b = math::to_bits(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // subnormal: fp32 addition does the rounding
      const float shifted = math::from_bits(magnitude) + 0.5f;
      return {uint16_t(sign | (math::to_bits(shifted) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
#endif
  } else {
    return D(x);
  }
}

// To and from C, the type of the arithmetic: fp64 for fp64, else fp32.
template <typename C, typename S>
L0_HOST_DEVICE inline C load_as(S x) {
  if constexpr (std::is_same_v<S, double>)
    return C(x);
  else
    return C(to_float(x));
}
template <typename D, typename C>
L0_HOST_DEVICE inline D store_as(C x) {
  if constexpr (std::is_same_v<D, double>)
    return double(x);
  else
    return from_float<D>(float(x));
}

}  // namespace l0
