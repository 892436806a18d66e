// Gated linear layer on the CPU: y = z_out * ((x * z_in) W^T + b), forward and backward, closed gates skipped
// in all three products.
#pragma once
#include "kernels.h"

namespace l0 {

template <typename T>
struct LinearParams {
  int64_t M, in, out;
  const T* x;  // (M, in)
  int64_t x_stride_m, x_stride_k;
  const T* weight;  // (out, in)
  int64_t w_stride_o, w_stride_i;
  const T* bias;                // (out,) or null
  const GateView<T>* in_gate;   // null: none
  const GateView<T>* out_gate;  // null: none
  bool scale_out;               // false: out_gate only selects what is computed (out_support)
};

template <typename T>
void linear_forward(const LinearParams<T>& p, T* y, int num_threads);  // y: (M, out) contiguous

// Gradients, each null where not wanted: dx (M, in), dw (out, in), db (out,), dz_in (in,), dz_out (out,); all
// contiguous, written whole.
template <typename T>
struct LinearGrads {
  const T* dy;  // (M, out)
  int64_t dy_stride_m, dy_stride_n;
  T *dx, *dw, *db, *dz_in, *dz_out;
};

template <typename T>
void linear_backward(const LinearParams<T>& p, const LinearGrads<T>& g, int num_threads);

}  // namespace l0
