#include "linear.h"

#include <algorithm>
#include <stdexcept>

namespace l0 {
namespace {

template <typename T>
const int32_t* index_of(const GateView<T>* gate) {
  return gate ? gate->index : nullptr;
}

template <typename T>
int64_t open_of(const GateView<T>* gate, int64_t size) {
  return gate ? gate->open : size;
}

template <typename T>
void zero(T* x, int64_t n) {
  if (x) std::fill_n(x, n, T(0));
}

}  // namespace

template <typename T>
void linear_forward(const LinearParams<T>& p, T* y, int num_threads) {
  GemmParams<T> g;
  g.M = p.M;
  g.N = open_of(p.out_gate, p.out);
  g.K = open_of(p.in_gate, p.in);
  g.k_index = index_of(p.in_gate);
  g.n_index = index_of(p.out_gate);
  g.a_gather_k = g.b_gather_k = g.k_index != nullptr;
  g.b_gather_n = g.c_scatter_n = g.n_index != nullptr;
  g.a = p.x;
  g.a_stride_m = p.x_stride_m;
  g.a_stride_k = p.x_stride_k;
  g.b = p.weight;
  g.b_stride_n = p.w_stride_o;
  g.b_stride_k = p.w_stride_i;
  g.c = y;
  g.c_stride_m = g.c_cols = p.out;
  g.bias = p.bias;
  g.k_scale = p.in_gate ? p.in_gate->z : nullptr;
  g.n_scale = p.out_gate && p.scale_out ? p.out_gate->z : nullptr;
  kernels<T>().gemm(g, num_threads);
}

template <typename T>
void linear_backward(const LinearParams<T>& p, const LinearGrads<T>& grad, int num_threads) {
  const Kernels<T>& k = kernels<T>();
  const T* z_out = p.out_gate && p.scale_out ? p.out_gate->z : nullptr;
  if (p.M == 0) {  // a gradient without elements has no address, as if it were not wanted
    zero(grad.dw, p.out * p.in);
    zero(grad.db, p.out);
    zero(grad.dz_in, p.in);
    zero(grad.dz_out, p.out);
    return;
  }
  if (grad.dx) {  // dx = z_in * ((dy * z_out) W)
    GemmParams<T> g;
    g.M = p.M;
    g.N = open_of(p.in_gate, p.in);
    g.K = open_of(p.out_gate, p.out);
    g.n_index = index_of(p.in_gate);
    g.k_index = index_of(p.out_gate);
    g.a_gather_k = g.b_gather_k = g.k_index != nullptr;
    g.b_gather_n = g.c_scatter_n = g.n_index != nullptr;
    g.a = grad.dy;
    g.a_stride_m = grad.dy_stride_m;
    g.a_stride_k = grad.dy_stride_n;
    g.b = p.weight;
    g.b_stride_n = p.w_stride_i;
    g.b_stride_k = p.w_stride_o;
    g.c = grad.dx;
    g.c_stride_m = g.c_cols = p.in;
    g.k_scale = z_out;
    g.n_scale = p.in_gate ? p.in_gate->z : nullptr;
    k.gemm(g, num_threads);
  }
  if (grad.dw) {  // dW = (z_out * dy)^T (x * z_in)
    GemmParams<T> g;
    g.M = open_of(p.out_gate, p.out);
    g.N = open_of(p.in_gate, p.in);
    g.K = p.M;
    g.m_index = index_of(p.out_gate);
    g.n_index = index_of(p.in_gate);
    g.a_gather_m = g.c_scatter_m = g.m_index != nullptr;
    g.b_gather_n = g.c_scatter_n = g.n_index != nullptr;
    g.a = grad.dy;
    g.a_stride_m = grad.dy_stride_n;
    g.a_stride_k = grad.dy_stride_m;
    g.b = p.x;
    g.b_stride_n = p.x_stride_k;
    g.b_stride_k = p.x_stride_m;
    g.c = grad.dw;
    g.c_stride_m = g.c_cols = p.in;
    g.c_rows = p.out;
    g.m_scale = z_out;
    g.n_scale = p.in_gate ? p.in_gate->z : nullptr;
    k.gemm(g, num_threads);
  }
  if (grad.db)
    k.column_sum({p.M, p.out, grad.dy, grad.dy_stride_m, grad.dy_stride_n, p.out_gate, p.scale_out, grad.db},
                 num_threads);
  // dz_j = <theta_j, dtheta_j> / z_j = <x_j, dx_j> / z_j: whichever is at hand and smaller.
  if (grad.dz_in && p.in_gate) {
    if (!grad.dx && !grad.dw && p.out) throw std::invalid_argument("dz_in is read off dx or dw, got neither");
    if (grad.dx && (grad.dw == nullptr || p.M <= p.out)) {
      k.column_dot(
          {p.M, p.in, p.x, p.x_stride_m, p.x_stride_k, grad.dx, p.in, p.in_gate, nullptr, grad.dz_in},
          num_threads);
    } else {
      k.column_dot({p.out, p.in, p.weight, p.w_stride_o, p.w_stride_i, grad.dw, p.in, p.in_gate, p.out_gate,
                    grad.dz_in},
                   num_threads);
    }
  }
  if (grad.dz_out && p.out_gate) {
    if (!grad.dw && p.in) throw std::invalid_argument("dz_out is read off dw, got none");
    const GateView<T>& gate = *p.out_gate;
#pragma omp parallel for schedule(dynamic, 16) \
    num_threads(num_threads) if (num_threads > 1 && p.out * p.in > 65536)
    for (int64_t o = 0; o < p.out; ++o) {
      if (!gate.wants_grad(o)) {
        grad.dz_out[o] = T(0);
        continue;
      }
      const T* w = p.weight + o * p.w_stride_o;
      const T* dw = grad.dw + o * p.in;
      // Zero where the input is closed, whatever w holds there.
      const auto term = [&](int64_t i) { return dw[i] == T(0) ? T(0) : w[i * p.w_stride_i] * dw[i]; };
      double total = p.bias && grad.db ? double(p.bias[o]) * grad.db[o] : 0.0;
      for (int64_t i0 = 0; i0 < p.in; i0 += 256) {
        T lanes[16] = {};
        const int64_t end = i0 + 256 < p.in ? i0 + 256 : p.in;
        int64_t i = i0;
        for (; i + 16 <= end; i += 16)
          for (int j = 0; j < 16; ++j) lanes[j] += term(i + j);
        for (; i < end; ++i) lanes[0] += term(i);
        for (int j = 0; j < 16; ++j) total += lanes[j];
      }
      grad.dz_out[o] = T(total / gate.z[o]);
    }
  }
}

template void linear_forward<float>(const LinearParams<float>&, float*, int);
template void linear_forward<double>(const LinearParams<double>&, double*, int);
template void linear_backward<float>(const LinearParams<float>&, const LinearGrads<float>&, int);
template void linear_backward<double>(const LinearParams<double>&, const LinearGrads<double>&, int);

}  // namespace l0
