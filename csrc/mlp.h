// The packed chain on the CPU: h_0 = x, h_l = z_l * act(W_l h_(l-1) + b_l), y = W_L h_(L-1) + b_L; hidden
// activations are stored packed.
#pragma once
#include <vector>

#include "kernels.h"

namespace l0 {

template <typename T>
struct MlpLayer {
  int64_t in, out;
  const T* weight;  // (out, in)
  int64_t w_stride_o, w_stride_i;
  const T* bias;               // (out,) or null
  const GateView<T>* in_gate;  // on the layer's input, null: none
  T* h;    // (M, in): the layer's input, packed to the open columns; layer 0 has none (x is its input)
  T* pre;  // (M, in): act's argument that gave h; null where h gives act's derivative away
  T *dw, *db, *dz;  // gradients, null where not wanted; contiguous, written whole
};

template <typename T>
struct MlpParams {
  int64_t M;
  const T* x;
  int64_t x_stride_m, x_stride_k;
  Activation act;
  std::vector<MlpLayer<T>> layers;
};

template <typename T>
void mlp_forward(const MlpParams<T>& p, T* y, int num_threads);  // y: (M, out of the last layer) contiguous

// A dz of the first layer is read off dx or off its dw: one of them must be given with it.
template <typename T>
void mlp_backward(const MlpParams<T>& p, const T* dy, int64_t dy_stride_m, int64_t dy_stride_n, T* dx,
                  int num_threads);

}  // namespace l0
