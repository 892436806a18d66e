// Product of gathered operands, the CPU primitive under every gated layer.
//
//     v[m, n] = sum_k A[m', k'] * k_scale[k'] * B[n', k'],      x' = index[x] where the operand is gathered
//     on that axis, else x kForward:  C[m', n'] = n_scale[n'] * m_scale[m'] * act(v + bias[n'])
//
// Gathers and k_scale ride on the packing that a blocked product does anyway, so closed rows and columns cost
// neither FLOPs nor bytes, and no masked copy of an operand ever exists. Summation over k has one fixed order
// per element: the result does not depend on the number of threads.
#pragma once
#include <cstdint>

namespace l0 {

enum class Activation : int32_t { kIdentity = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

template <typename T>
struct GemmParams {
  int64_t M = 0, N = 0, K = 0;  // extents after gathering: the open counts
  const int32_t* m_index = nullptr;
  const int32_t* n_index = nullptr;
  const int32_t* k_index = nullptr;
  bool a_gather_m = false, a_gather_k = false;
  bool b_gather_n = false, b_gather_k = false;
  bool c_scatter_m = false, c_scatter_n = false;

  const T* a = nullptr;  // (m, k) at a[m * a_stride_m + k * a_stride_k]
  int64_t a_stride_m = 0, a_stride_k = 0;
  const T* b = nullptr;  // (n, k) at b[n * b_stride_n + k * b_stride_k]
  int64_t b_stride_n = 0, b_stride_k = 0;
  T* c = nullptr;  // (m, n) at c[m * c_stride_m + n]; written whole: what no open row and column reaches
                   // becomes zero
  int64_t c_stride_m = 0;
  int64_t c_rows = 0, c_cols = 0;  // full extents of c where it is scattered
  T* pre = nullptr;                // act's argument, laid out as an unscattered c; null: not kept

  // Vectors below are looked up with the ungathered index: they are the gate and bias vectors as the user
  // holds them.
  const T* k_scale = nullptr;
  const T* m_scale = nullptr;
  const T* n_scale = nullptr;
  const T* bias = nullptr;
  Activation act = Activation::kIdentity;
};

}  // namespace l0
