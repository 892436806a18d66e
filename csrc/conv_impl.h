// Convolutions; compiled once per instruction set, like gemm_impl.h.

namespace l0 {
namespace L0_ISA {

// Positions (row, column) of an image that a window of `shape` at output (a, b) reads, tap by tap.
template <typename F>
inline void for_taps(const ConvShape& shape, int64_t a, int64_t b, F f) {
  for (int64_t u = 0; u < shape.kernel_h; ++u) {
    const int64_t h = a * shape.stride_h - shape.pad_h + u * shape.dilation_h;
    for (int64_t v = 0; v < shape.kernel_w; ++v) {
      const int64_t w = b * shape.stride_w - shape.pad_w + v * shape.dilation_w;
      f(u * shape.kernel_w + v, h >= 0 && h < shape.H && w >= 0 && w < shape.W ? h * shape.W + w : -1);
    }
  }
}

// The output positions that read position (h, w) of the image, and through which tap.
template <typename F>
inline void for_readers(const ConvShape& shape, int64_t h, int64_t w, F f) {
  for (int64_t u = 0; u < shape.kernel_h; ++u) {
    int64_t a = h + shape.pad_h - u * shape.dilation_h;
    if (a < 0 || a % shape.stride_h) continue;
    a /= shape.stride_h;
    if (a >= shape.out_h) continue;
    for (int64_t v = 0; v < shape.kernel_w; ++v) {
      int64_t b = w + shape.pad_w - v * shape.dilation_w;
      if (b < 0 || b % shape.stride_w) continue;
      b /= shape.stride_w;
      if (b < shape.out_w) f(u * shape.kernel_w + v, a * shape.out_w + b);
    }
  }
}

template <typename T>
void im2col(const ConvShape& s, const T* x, T* col, int num_threads) {
  const int64_t rows = s.N * s.out_h * s.out_w, width = s.taps() * s.C;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * width > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const T* image = x + row / (s.out_h * s.out_w) * s.H * s.W * s.C;
    T* to = col + row * width;
    for_taps(s, row / s.out_w % s.out_h, row % s.out_w, [&](int64_t tap, int64_t at) {
      if (at < 0)
        std::memset(to + tap * s.C, 0, sizeof(T) * s.C);
      else
        std::memcpy(to + tap * s.C, image + at * s.C, sizeof(T) * s.C);
    });
  }
}

template <typename T>
void col2im(const ConvShape& s, const T* col, T* x, int num_threads) {
  const int64_t positions = s.N * s.H * s.W, width = s.taps() * s.C;
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && positions * s.C > 4096)
  for (int64_t at = 0; at < positions; ++at) {
    const T* rows = col + at / (s.H * s.W) * s.out_h * s.out_w * width;
    T* __restrict to = x + at * s.C;
    bool first = true;
    for_readers(s, at / s.W % s.H, at % s.W, [&](int64_t tap, int64_t row) {
      const T* __restrict from = rows + row * width + tap * s.C;
      if (first)
        std::memcpy(to, from, sizeof(T) * s.C);
      else
#pragma omp simd
        for (int64_t c = 0; c < s.C; ++c) to[c] += from[c];
      first = false;
    });
    if (first) std::memset(to, 0, sizeof(T) * s.C);
  }
}

// to[c] = sum over n taps of a[i][c] * b[i][c]
template <typename T>
inline void sum_of_taps(T* __restrict to, const T* const* a, const T* const* b, int64_t n, int64_t C) {
  constexpr int64_t kBlock = 4 * L0_VECTOR_BYTES / sizeof(T);
  int64_t c = 0;
  for (; c + kBlock <= C; c += kBlock) {
    T sum[kBlock] = {};
    for (int64_t i = 0; i < n; ++i) {
      const T *p = a[i] + c, *q = b[i] + c;
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) sum[j] += p[j] * q[j];
    }
    std::memcpy(to + c, sum, sizeof(sum));
  }
  for (; c < C; ++c) {
    T sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[i][c] * b[i][c];
    to[c] = sum;
  }
}

template <typename T>
void depthwise(const DepthwiseParams<T>& p, int num_threads) {
  const ConvShape& s = p.shape;
  const int64_t rows = s.N * s.out_h * s.out_w;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * s.C > 4096)
  for (int64_t row = 0; row < rows; ++row) {
    const T* image = p.x + row / (s.out_h * s.out_w) * s.H * s.W * s.C;
    const T *a[kMostTaps], *b[kMostTaps];
    int64_t n = 0;
    for_taps(s, row / s.out_w % s.out_h, row % s.out_w, [&](int64_t tap, int64_t at) {
      if (at < 0) return;
      a[n] = image + at * s.C;
      b[n++] = p.w + tap * s.C;
    });
    sum_of_taps(p.y + row * s.C, a, b, n, s.C);
  }
}

template <typename T>
void depthwise_grad(const DepthwiseParams<T>& p, int num_threads) {
  const ConvShape& s = p.shape;
  const int64_t positions = s.N * s.H * s.W, outputs = s.out_h * s.out_w, width = s.taps() * s.C;
  if (p.dx) {
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && positions * s.C > 4096)
    for (int64_t at = 0; at < positions; ++at) {
      const T* grads = p.dy + at / (s.H * s.W) * outputs * s.C;
      const T *a[kMostTaps], *b[kMostTaps];
      int64_t n = 0;
      for_readers(s, at / s.W % s.H, at % s.W, [&](int64_t tap, int64_t row) {
        a[n] = grads + row * s.C;
        b[n++] = p.w + tap * s.C;
      });
      sum_of_taps(p.dx + at * s.C, a, b, n, s.C);
    }
  }
  if (!p.dw_parts) return;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && s.N > 1)
  for (int64_t image = 0; image < s.N; ++image) {
    T* part = p.dw_parts + image * width;
    const T* x = p.x + image * s.H * s.W * s.C;
    const T* dy = p.dy + image * outputs * s.C;
    std::memset(part, 0, sizeof(T) * width);
    for (int64_t row = 0; row < outputs; ++row) {
      const T* __restrict grad = dy + row * s.C;
      for_taps(s, row / s.out_w, row % s.out_w, [&](int64_t tap, int64_t at) {
        if (at < 0) return;
        const T* __restrict value = x + at * s.C;
        T* __restrict sum = part + tap * s.C;
#pragma omp simd
        for (int64_t c = 0; c < s.C; ++c) sum[c] += grad[c] * value[c];
      });
    }
  }
}

}  // namespace L0_ISA
}  // namespace l0
