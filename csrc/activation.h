// Activations of gated_mlp and their derivatives; one source for the CPU and the CUDA build.
#pragma once
#include "gemm.h"
#include "vector_math.h"

namespace l0 {

// x where exp(-|x|) and exp(-x^2 / 2) count, else a bound: math::exp is never 0, and a large x times it would
// not be the 0 that it stands for. A NaN stays a NaN.
template <typename T>
L0_HOST_DEVICE inline T at_least(T x) {
  constexpr T kBound = sizeof(T) == 8 ? T(-800) : T(-100);
  return x < kBound ? kBound : x;
}
template <typename T>
L0_HOST_DEVICE inline T within(T x) {
  constexpr T kBound = sizeof(T) == 8 ? T(40) : T(14);
  x = x > kBound ? kBound : x;
  return x < -kBound ? -kBound : x;
}

template <Activation act, typename T>
L0_HOST_DEVICE inline T activation(T x) {
  if constexpr (act == Activation::kRelu) return x <= T(0) ? T(0) : x;  // NaN stays NaN
  if constexpr (act == Activation::kGelu)
    return T(0.5) * x * (T(1) + math::erf(x * T(0.70710678118654752440)));
  if constexpr (act == Activation::kSilu) return at_least(x) / (T(1) + math::exp(-x));
  return x;
}

template <Activation act, typename T>
L0_HOST_DEVICE inline T activation_grad(T x) {
  if constexpr (act == Activation::kRelu) return x <= T(0) ? T(0) : T(1);
  if constexpr (act == Activation::kGelu) {
    const T cdf = T(0.5) * (T(1) + math::erf(x * T(0.70710678118654752440)));
    const T a = within(x);
    return cdf + a * T(0.39894228040143267794) * math::exp(T(-0.5) * a * a);
  }
  if constexpr (act == Activation::kSilu) {
    const T s = T(1) / (T(1) + math::exp(-x));
    return s * (T(1) + at_least(x) * (T(1) - s));
  }
  return T(1);
}

}  // namespace l0
