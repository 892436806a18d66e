#include "masked_linear.h"

#include <cstring>
#include <vector>

#include "hard_concrete.h"

namespace l0 {
namespace {

constexpr int64_t kChunk = 4096;

// Calls f(begin, n, z) for every chunk of weights with its freshly drawn gates.
template <typename T, typename F>
void for_each_chunk(const SampleParams<T>& gate, int num_threads, F f) {
  const Kernels<T>& k = kernels<T>();
  const int64_t chunks = (gate.size + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && chunks > 4)
  for (int64_t c = 0; c < chunks; ++c) {
    T z[kChunk];
    SampleParams<T> part = gate;
    const int64_t begin = c * kChunk;
    part.log_alpha = gate.log_alpha + begin;
    part.first = begin;
    part.size = gate.size - begin < kChunk ? gate.size - begin : kChunk;
    part.z = z;
    k.sample(part, 1);
    f(begin, part.size, z);
  }
}

// The columns of a block row (or rows of a block column) that some open gate covers, and the gate of each.
template <typename T>
struct Line {
  std::vector<int32_t> index;  // open first, then closed
  std::vector<T> z;
  int64_t open = 0;

  void build(const T* gates, int64_t stride, int64_t blocks, int64_t block, int64_t size) {
    index.resize(size);
    z.resize(size);
    open = 0;
    int64_t at = 0;
    for (int closed = 0; closed < 2; ++closed) {
      for (int64_t b = 0; b < blocks; ++b) {
        const T g = gates[b * stride];
        if ((g == T(0)) != (closed == 1)) continue;
        for (int64_t i = b * block; i < (b + 1) * block && i < size; ++i) {
          index[at++] = int32_t(i);
          z[i] = g;
        }
      }
      if (!closed) open = at;
    }
  }
};

}  // namespace

template <typename T>
void masked_weight_forward(const MaskedWeightParams<T>& p, T* wz, int num_threads) {
  for_each_chunk(p.gate, num_threads, [&](int64_t begin, int64_t n, const T* z) {
    for (int64_t i = 0; i < n; ++i) wz[begin + i] = p.weight[begin + i] * z[i];
  });
}

template <typename T>
void masked_weight_backward(const MaskedWeightParams<T>& p, const T* g, T* dw, T* dlog_alpha,
                            int num_threads) {
  for_each_chunk(p.gate, num_threads, [&](int64_t begin, int64_t n, const T* z) {
    if (dw)
      for (int64_t i = 0; i < n; ++i) dw[begin + i] = g[begin + i] * z[i];
    if (dlog_alpha)
      for (int64_t i = 0; i < n; ++i)
        dlog_alpha[begin + i] = g[begin + i] * p.weight[begin + i] *
                                hard_concrete_grad(z[i], p.gate.beta, p.gate.gamma, p.gate.zeta);
  });
}

template <typename T>
void block_linear_forward(const BlockLinearParams<T>& p, T* y, int num_threads) {
  const int64_t blocks_out = (p.out + p.b_out - 1) / p.b_out, blocks_in = (p.in + p.b_in - 1) / p.b_in;
  Line<T> line;
  for (int64_t r = 0; r < blocks_out; ++r) {
    line.build(p.z + r * blocks_in, 1, blocks_in, p.b_in, p.in);
    const int64_t o = r * p.b_out;
    GemmParams<T> g;
    g.M = p.M;
    g.N = p.out - o < p.b_out ? p.out - o : p.b_out;
    g.K = line.open;
    g.k_index = line.index.data();
    g.a_gather_k = g.b_gather_k = true;
    g.k_scale = line.z.data();
    g.a = p.x;
    g.a_stride_m = p.x_stride_m;
    g.a_stride_k = p.x_stride_k;
    g.b = p.weight + o * p.w_stride_o;
    g.b_stride_n = p.w_stride_o;
    g.b_stride_k = p.w_stride_i;
    g.c = y + o;
    g.c_stride_m = p.out;
    g.bias = p.bias ? p.bias + o : nullptr;
    kernels<T>().gemm(g, num_threads);
  }
}

template <typename T>
void block_linear_backward(const BlockLinearParams<T>& p, const BlockLinearGrads<T>& grad, int num_threads) {
  const Kernels<T>& k = kernels<T>();
  const int64_t blocks_out = (p.out + p.b_out - 1) / p.b_out, blocks_in = (p.in + p.b_in - 1) / p.b_in;
  Line<T> line;
  if (grad.dx) {
    for (int64_t c = 0; c < blocks_in; ++c) {
      line.build(p.z + c, blocks_in, blocks_out, p.b_out, p.out);
      const int64_t i = c * p.b_in;
      GemmParams<T> g;
      g.M = p.M;
      g.N = p.in - i < p.b_in ? p.in - i : p.b_in;
      g.K = line.open;
      g.k_index = line.index.data();
      g.a_gather_k = g.b_gather_k = true;
      g.k_scale = line.z.data();
      g.a = grad.dy;
      g.a_stride_m = grad.dy_stride_m;
      g.a_stride_k = grad.dy_stride_n;
      g.b = p.weight + i * p.w_stride_i;
      g.b_stride_n = p.w_stride_i;
      g.b_stride_k = p.w_stride_o;
      g.c = grad.dx + i;
      g.c_stride_m = p.in;
      k.gemm(g, num_threads);
    }
  }
  if (grad.dw) {
    for (int64_t r = 0; r < blocks_out; ++r) {
      line.build(p.z + r * blocks_in, 1, blocks_in, p.b_in, p.in);
      const int64_t o = r * p.b_out;
      GemmParams<T> g;
      g.M = p.out - o < p.b_out ? p.out - o : p.b_out;
      g.N = line.open;
      g.K = p.M;
      g.n_index = line.index.data();
      g.b_gather_n = g.c_scatter_n = true;
      g.n_scale = line.z.data();
      g.a = grad.dy + o * grad.dy_stride_n;
      g.a_stride_m = grad.dy_stride_n;
      g.a_stride_k = grad.dy_stride_m;
      g.b = p.x;
      g.b_stride_n = p.x_stride_k;
      g.b_stride_k = p.x_stride_m;
      g.c = grad.dw + o * p.in;
      g.c_stride_m = g.c_cols = p.in;
      k.gemm(g, num_threads);
    }
  }
  if (grad.db)
    k.column_sum({p.M, p.out, grad.dy, grad.dy_stride_m, grad.dy_stride_n, nullptr, false, grad.db},
                 num_threads);
  if (grad.dz) {
    const GateView<T> gate{p.z, nullptr, blocks_out * blocks_in, blocks_out * blocks_in, p.full_grad};
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(num_threads) if (num_threads > 1 && p.out * p.in > 65536)
    for (int64_t r = 0; r < blocks_out; ++r) {
      const int64_t o_end = (r + 1) * p.b_out < p.out ? (r + 1) * p.b_out : p.out;
      for (int64_t c = 0; c < blocks_in; ++c) {
        const int64_t at = r * blocks_in + c, i0 = c * p.b_in,
                      i_end = i0 + p.b_in < p.in ? i0 + p.b_in : p.in;
        double total = 0.0;
        if (gate.wants_grad(at)) {
          for (int64_t o = r * p.b_out; o < o_end; ++o) {
            T sum = T(0);
            for (int64_t i = i0; i < i_end; ++i)
              sum += p.weight[o * p.w_stride_o + i * p.w_stride_i] * grad.dw[o * p.in + i];
            total += sum;
          }
          total /= p.z[at];
        }
        grad.dz[at] = T(total);
      }
    }
  }
}

#define L0_INSTANTIATE(T)                                                                       \
  template void masked_weight_forward<T>(const MaskedWeightParams<T>&, T*, int);                \
  template void masked_weight_backward<T>(const MaskedWeightParams<T>&, const T*, T*, T*, int); \
  template void block_linear_forward<T>(const BlockLinearParams<T>&, T*, int);                  \
  template void block_linear_backward<T>(const BlockLinearParams<T>&, const BlockLinearGrads<T>&, int);
L0_INSTANTIATE(float)
L0_INSTANTIATE(double)

}  // namespace l0
