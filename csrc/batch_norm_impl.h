// Batch normalisation; compiled once per instruction set, like gemm_impl.h.

namespace l0 {
namespace L0_ISA {

// Rows of few channels are read several at a time, so that vectors are full. Every `chunk` rows have sums of
// their own: one order, however many threads, and no long sums of small numbers.
template <typename T>
struct NormRows {
  static constexpr int64_t kBlock = 4 * L0_VECTOR_BYTES / sizeof(T);
  int64_t channels, fold, width, chunk, chunks;

  NormRows(int64_t rows, int64_t c) : channels(c), fold(1) {
    if (c < 4 * kBlock)
      for (fold = kBlock; fold > 1 && (fold / 2 * c) % kBlock == 0;) fold /= 2;
    width = fold * c;
    chunk = (std::max<int64_t>(64, 8192 / c) + fold - 1) / fold * fold;
    chunks = (rows + chunk - 1) / chunk;
  }

  // to[c] for every row of a group of `fold`
  template <typename F>
  void spread(T* to, F f) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < fold; ++i) to[i * channels + c] = f(c);
  }

  // sums[c] = sum over n rows of f(element, its place in `width`); scratch (width)
  template <typename F>
  void sum(int64_t n, T* scratch, double* sums, F f) const {
    const int64_t groups = n / fold, rest = groups * width, left = (n - groups * fold) * channels;
    int64_t w = 0;
    for (; w + kBlock <= width; w += kBlock) {
      T block[kBlock] = {};
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * width + w;
#pragma omp simd
        for (int64_t j = 0; j < kBlock; ++j) block[j] += f(at + j, w + j);
      }
      std::memcpy(scratch + w, block, sizeof(block));
    }
    if (w < width) {
      std::memset(scratch + w, 0, sizeof(T) * (width - w));
      for (int64_t g = 0; g < groups; ++g)
#pragma omp simd
        for (int64_t v = w; v < width; ++v) scratch[v] += f(g * width + v, v);
    }
#pragma omp simd
    for (int64_t v = 0; v < left; ++v) scratch[v] += f(rest + v, v);
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = 0; i < fold; ++i) total += scratch[i * channels + c];
      sums[c] = total;
    }
  }

  // f(element, its place in `width`) for n rows
  template <typename F>
  void each(int64_t n, F f) const {
    const int64_t groups = n / fold;
    for (int64_t g = 0; g < groups; ++g)
#pragma omp simd
      for (int64_t v = 0; v < width; ++v) f(g * width + v, v);
    const int64_t rest = groups * width, left = (n - groups * fold) * channels;
#pragma omp simd
    for (int64_t v = 0; v < left; ++v) f(rest + v, v);
  }

  // f(first element, number of rows, number of the chunk, thread)
  template <typename F>
  void over_chunks(int64_t rows, int num_threads, F f) const {
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && rows * channels > 16384)
    for (int64_t i = 0; i < chunks; ++i)
      f(i * chunk * channels, std::min(chunk, rows - i * chunk), i, int64_t(thread_number()));
  }
};

template <typename T>
void batch_norm(const BatchNormParams<T>& p, int num_threads) {
  static thread_local Workspace workspace;
  const int64_t C = p.channels;
  const NormRows<T> rows(p.rows, C);
  const size_t doubles = p.training ? 2 * rows.chunks * C : 0;
  double* sums = static_cast<double*>(
      workspace.get(sizeof(double) * doubles + sizeof(T) * rows.width * (3 + 2 * num_threads)));
  T* shift = reinterpret_cast<T*>(sums + doubles);
  T *scale = shift + rows.width, *bias = scale + rows.width, *own = bias + rows.width;
  const T* x = p.x;
  if (p.training) {
    rows.over_chunks(p.rows, num_threads, [&](int64_t first, int64_t n, int64_t i, int64_t thread) {
      T *scratch = own + 2 * thread * rows.width, *mean = scratch + rows.width;
      double *total = sums + 2 * i * C, *squares = total + C;
      rows.sum(n, scratch, total, [=](int64_t at, int64_t) { return x[first + at]; });
      rows.spread(mean, [=](int64_t c) { return T(total[c] / n); });
      rows.sum(n, scratch, squares, [=](int64_t at, int64_t v) {
        const T difference = x[first + at] - mean[v];
        return difference * difference;
      });
    });
    for (int64_t c = 0; c < C; ++c) {
      double total = 0, squares = 0;
      for (int64_t i = 0; i < rows.chunks; ++i) total += sums[2 * i * C + c];
      const double mean = total / p.rows;
      for (int64_t i = 0; i < rows.chunks; ++i) {
        const int64_t n = std::min(rows.chunk, p.rows - i * rows.chunk);
        const double between = double(T(sums[2 * i * C + c] / n)) - mean;
        squares += sums[(2 * i + 1) * C + c] + n * between * between;
      }
      p.mean[c] = T(mean);
      p.rstd[c] = T(1 / std::sqrt(squares / p.rows + p.eps));
      sums[c] = squares / (p.rows - 1);  // c of chunk 0 has been read
    }
    if (p.running_mean) {
      for (int64_t i = 0; i < p.n_updated; ++i) {
        const int64_t c = p.updated ? p.updated[i] : i, at = p.at(c);
        p.running_mean[at] = T((1 - p.momentum) * p.running_mean[at] + p.momentum * p.mean[c]);
        p.running_var[at] = T((1 - p.momentum) * p.running_var[at] + p.momentum * sums[c]);
      }
    }
  } else {
    for (int64_t c = 0; c < C; ++c) {
      p.mean[c] = p.running_mean[p.at(c)];
      p.rstd[c] = T(1 / std::sqrt(double(p.running_var[p.at(c)]) + p.eps));
    }
  }
  rows.spread(shift, [&](int64_t c) { return p.mean[c]; });
  rows.spread(scale, [&](int64_t c) { return p.weight ? p.rstd[c] * p.weight[p.at(c)] : p.rstd[c]; });
  rows.spread(bias, [&](int64_t c) { return p.bias ? p.bias[p.at(c)] : T(0); });
  T* y = p.y;
  rows.over_chunks(p.rows, num_threads, [&](int64_t first, int64_t n, int64_t, int64_t) {
    const T *from = x + first, *a = shift, *b = scale, *d = bias;
    T* to = y + first;
    rows.each(n, [=](int64_t at, int64_t v) { to[at] = (from[at] - a[v]) * b[v] + d[v]; });
  });
}

template <typename T>
void batch_norm_grad(const BatchNormParams<T>& p, int num_threads) {
  static thread_local Workspace workspace;
  const int64_t C = p.channels;
  const NormRows<T> rows(p.rows, C);
  const size_t doubles = 2 * std::max<int64_t>(1, rows.chunks) * C;
  double* sums = static_cast<double*>(
      workspace.get(sizeof(double) * doubles + sizeof(T) * rows.width * (4 + num_threads)));
  T* mean = reinterpret_cast<T*>(sums + doubles);
  T *scale = mean + rows.width, *of_bias = scale + rows.width, *of_weight = of_bias + rows.width;
  T* own = of_weight + rows.width;
  const T *x = p.x, *dy = p.dy;
  T* dx = p.dx;
  rows.spread(mean, [&](int64_t c) { return p.mean[c]; });
  if (p.dweight || p.dbias || p.training) {
    rows.over_chunks(p.rows, num_threads, [&](int64_t first, int64_t n, int64_t i, int64_t thread) {
      T* scratch = own + thread * rows.width;
      const T *from = x + first, *grad = dy + first, *m = mean;
      rows.sum(n, scratch, sums + 2 * i * C, [=](int64_t at, int64_t) { return grad[at]; });
      rows.sum(n, scratch, sums + (2 * i + 1) * C,
               [=](int64_t at, int64_t v) { return grad[at] * (from[at] - m[v]); });
    });
    for (int64_t i = 1; i < rows.chunks; ++i)
      for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[2 * i * C + c];
    for (T* to : {p.dweight, p.dbias})
      if (to && p.index) std::memset(to, 0, sizeof(T) * p.size);
    for (int64_t c = 0; c < C; ++c) {
      if (p.dbias) p.dbias[p.at(c)] = T(sums[c]);
      if (p.dweight) p.dweight[p.at(c)] = T(sums[C + c] * p.rstd[c]);
    }
  }
  if (!dx) return;
  rows.spread(scale, [&](int64_t c) { return p.weight ? p.rstd[c] * p.weight[p.at(c)] : p.rstd[c]; });
  rows.spread(of_bias, [&](int64_t c) { return p.training ? T(sums[c] / p.rows) : T(0); });
  rows.spread(of_weight, [&](int64_t c) {
    return p.training ? T(sums[C + c] / p.rows * double(p.rstd[c]) * p.rstd[c]) : T(0);
  });
  rows.over_chunks(p.rows, num_threads, [&](int64_t first, int64_t n, int64_t, int64_t) {
    const T *from = x + first, *grad = dy + first, *m = mean, *a = scale, *b = of_bias, *d = of_weight;
    T* to = dx + first;
    rows.each(n, [=](int64_t at, int64_t v) {
      to[at] = a[v] * (grad[at] - b[v] - (from[at] - m[v]) * d[v]);
    });
  });
}

}  // namespace L0_ISA
}  // namespace l0
