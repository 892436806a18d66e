// Gates finer than rows and columns: one per weight, or one per block of b_out x b_in weights.
#pragma once
#include "kernels.h"

namespace l0 {

// wz = W * z, z drawn on the fly from the counter-based noise: neither noise nor mask is stored.
template <typename T>
struct MaskedWeightParams {
  const T* weight;       // contiguous, like everything below
  SampleParams<T> gate;  // log_alpha of the weight's shape; gate.z is not used
};
template <typename T>
void masked_weight_forward(const MaskedWeightParams<T>& p, T* wz, int num_threads);

// From g = dL/d(W * z), z drawn again: dw = g * z, dlog_alpha = g * W * dz/dlog_alpha. Each null where not
// wanted.
template <typename T>
void masked_weight_backward(const MaskedWeightParams<T>& p, const T* g, T* dw, T* dlog_alpha,
                            int num_threads);

// y = x (W * Z)^T + b,  Z the (ceil(out / b_out), ceil(in / b_in)) gates spread over blocks. Closed blocks
// are skipped.
template <typename T>
struct BlockLinearParams {
  int64_t M, in, out, b_out, b_in;
  const T* x;
  int64_t x_stride_m, x_stride_k;
  const T* weight;
  int64_t w_stride_o, w_stride_i;
  const T* bias;
  const T* z;
  bool full_grad;
};
template <typename T>
void block_linear_forward(const BlockLinearParams<T>& p, T* y, int num_threads);

template <typename T>
struct BlockLinearGrads {
  const T* dy;
  int64_t dy_stride_m, dy_stride_n;
  T *dx, *dw, *db, *dz;  // dz needs dw
};
template <typename T>
void block_linear_backward(const BlockLinearParams<T>& p, const BlockLinearGrads<T>& g, int num_threads);

}  // namespace l0
