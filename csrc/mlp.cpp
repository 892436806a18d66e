#include "mlp.h"

#include <algorithm>
#include <stdexcept>

#include "workspace.h"

namespace l0 {
namespace {

template <typename T>
const int32_t* index_of(const MlpLayer<T>& layer) {
  return layer.in_gate ? layer.in_gate->index : nullptr;
}

template <typename T>
int64_t open_in(const MlpLayer<T>& layer) {
  return layer.in_gate ? layer.in_gate->open : layer.in;
}

template <typename T>
void zero(T* x, int64_t n) {
  if (x) std::fill_n(x, n, T(0));
}

}  // namespace

template <typename T>
void mlp_forward(const MlpParams<T>& p, T* y, int num_threads) {
  const size_t depth = p.layers.size();
  for (size_t l = 0; l < depth; ++l) {
    const MlpLayer<T>& layer = p.layers[l];
    const MlpLayer<T>* next = l + 1 < depth ? &p.layers[l + 1] : nullptr;
    GemmParams<T> g;
    g.M = p.M;
    g.N = next ? open_in(*next) : layer.out;
    g.K = open_in(layer);
    g.k_index = index_of(layer);
    g.n_index = next ? index_of(*next) : nullptr;
    g.a = l ? layer.h : p.x;
    g.a_stride_m = l ? layer.in : p.x_stride_m;
    g.a_stride_k = l ? 1 : p.x_stride_k;
    g.a_gather_k = l == 0 && g.k_index;  // hidden activations are packed and carry their gates already
    g.k_scale = l == 0 && layer.in_gate ? layer.in_gate->z : nullptr;
    g.b = layer.weight;
    g.b_stride_n = layer.w_stride_o;
    g.b_stride_k = layer.w_stride_i;
    g.b_gather_k = g.k_index != nullptr;
    g.b_gather_n = g.n_index != nullptr;
    g.c = next ? next->h : y;
    g.c_stride_m = layer.out;
    g.bias = layer.bias;
    if (next) {
      g.act = p.act;
      g.pre = next->pre;
      g.n_scale = next->in_gate ? next->in_gate->z : nullptr;
    }
    kernels<T>().gemm(g, num_threads);
  }
}

template <typename T>
void mlp_backward(const MlpParams<T>& p, const T* dy, int64_t dy_stride_m, int64_t dy_stride_n, T* dx,
                  int num_threads) {
  const Kernels<T>& k = kernels<T>();
  thread_local Workspace workspaces[2];
  const int64_t depth = int64_t(p.layers.size());
  if (p.M == 0) {  // a gradient without elements has no address, as if it were not wanted
    for (const MlpLayer<T>& layer : p.layers) {
      zero(layer.dw, layer.out * layer.in);
      zero(layer.db, layer.out);
      zero(layer.dz, layer.in);
    }
    return;
  }
  // grad: dL/d(pre-activation) of layer l, packed to the open columns of the next layer's gate.
  const T* grad = dy;
  int64_t grad_stride_m = dy_stride_m, grad_stride_n = dy_stride_n;
  const MlpLayer<T>& last = p.layers[depth - 1];
  if (last.db)
    k.column_sum({p.M, last.out, dy, dy_stride_m, dy_stride_n, nullptr, false, last.db}, num_threads);
  for (int64_t l = depth - 1; l >= 0; --l) {
    const MlpLayer<T>& layer = p.layers[l];
    const MlpLayer<T>* next = l + 1 < depth ? &p.layers[l + 1] : nullptr;
    const int64_t open_out = next ? open_in(*next) : layer.out;
    const int32_t* out_index = next ? index_of(*next) : nullptr;
    if (layer.dw) {  // dW = grad^T h, h with its gates in
      GemmParams<T> g;
      g.M = open_out;
      g.N = open_in(layer);
      g.K = p.M;
      g.m_index = out_index;
      g.n_index = index_of(layer);
      g.a = grad;
      g.a_stride_m = grad_stride_n;
      g.a_stride_k = grad_stride_m;
      g.b = l ? layer.h : p.x;
      g.b_stride_n = l ? 1 : p.x_stride_k;
      g.b_stride_k = l ? layer.in : p.x_stride_m;
      g.b_gather_n = l == 0 && g.n_index;
      g.c = layer.dw;
      g.c_stride_m = g.c_cols = layer.in;
      g.c_rows = layer.out;
      g.c_scatter_m = out_index != nullptr;
      g.c_scatter_n = g.n_index != nullptr;
      g.n_scale = l == 0 && layer.in_gate ? layer.in_gate->z : nullptr;
      k.gemm(g, num_threads);
    }
    // Does anything before this layer's product want a gradient?
    bool upstream = dx != nullptr || (l > 0 && layer.dz);
    for (int64_t j = 0; j < l; ++j) upstream |= p.layers[j].dw || p.layers[j].db || p.layers[j].dz;
    if (upstream) {
      GemmParams<T> g;
      g.M = p.M;
      g.N = open_in(layer);
      g.K = open_out;
      g.k_index = out_index;
      g.n_index = index_of(layer);
      g.a = grad;
      g.a_stride_m = grad_stride_m;
      g.a_stride_k = grad_stride_n;
      g.b = layer.weight;
      g.b_stride_n = layer.w_stride_i;
      g.b_stride_k = layer.w_stride_o;
      g.b_gather_k = g.k_index != nullptr;
      g.b_gather_n = g.n_index != nullptr;
      g.c_stride_m = g.c_cols = layer.in;
      if (l == 0) {
        g.c = dx;
        g.c_scatter_n = g.n_index != nullptr;
        g.n_scale = layer.in_gate ? layer.in_gate->z : nullptr;
        k.gemm(g, num_threads);
      } else {
        T* v = static_cast<T*>(workspaces[l % 2].get(sizeof(T) * size_t(p.M) * layer.in));
        g.c = v;
        k.gemm(g, num_threads);
        k.activation_grad(
            {p.M, g.N, v, layer.h, layer.pre, layer.in, p.act, layer.in_gate, p.layers[l - 1].db, layer.dz},
            num_threads);
        grad = v;
        grad_stride_m = layer.in;
        grad_stride_n = 1;
      }
    }
    if (l == 0 && layer.dz && layer.in_gate) {
      if (!dx && !layer.dw && layer.out)
        throw std::invalid_argument("the first dz is read off dx or dw, got neither");
      if (dx && (!layer.dw || p.M <= layer.out)) {
        k.column_dot(
            {p.M, layer.in, p.x, p.x_stride_m, p.x_stride_k, dx, layer.in, layer.in_gate, nullptr, layer.dz},
            num_threads);
      } else {
        k.column_dot({layer.out, layer.in, layer.weight, layer.w_stride_o, layer.w_stride_i, layer.dw,
                      layer.in, layer.in_gate, next ? next->in_gate : nullptr, layer.dz},
                     num_threads);
      }
    }
  }
}

template void mlp_forward<float>(const MlpParams<float>&, float*, int);
template void mlp_forward<double>(const MlpParams<double>&, double*, int);
template void mlp_backward<float>(const MlpParams<float>&, const float*, int64_t, int64_t, float*, int);
template void mlp_backward<double>(const MlpParams<double>&, const double*, int64_t, int64_t, double*, int);

}  // namespace l0
