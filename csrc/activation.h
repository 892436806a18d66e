// Activations of gated_mlp and their derivatives; one source for the CPU and the CUDA build.
#pragma once
#include "gemm.h"
#include "vector_math.h"

namespace l0 {

template <Activation act, typename T>
L0_HOST_DEVICE inline T activation(T x) {
  if constexpr (act == Activation::kRelu) return x <= T(0) ? T(0) : x;  // NaN stays NaN
  if constexpr (act == Activation::kGelu)
    return T(0.5) * x * (T(1) + math::erf(x * T(0.70710678118654752440)));
  if constexpr (act == Activation::kSilu) return x * math::sigmoid(x);
  return x;
}

template <Activation act, typename T>
L0_HOST_DEVICE inline T activation_grad(T x) {
  if constexpr (act == Activation::kRelu) return x <= T(0) ? T(0) : T(1);
  if constexpr (act == Activation::kGelu) {
    const T cdf = T(0.5) * (T(1) + math::erf(x * T(0.70710678118654752440)));
    return cdf + x * T(0.39894228040143267794) * math::decay(T(-0.5) * x * x);
  }
  if constexpr (act == Activation::kSilu) {
    const T s = math::sigmoid(x);
    return s * (T(1) + x * (T(1) - s));
  }
  return T(1);
}

}  // namespace l0
