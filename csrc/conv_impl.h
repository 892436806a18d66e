// Convolutions; compiled once per instruction set, like gemm_impl.h.

namespace l0 {
namespace L0_ISA {

// f(tap, position on the other side) of all that position (h, w) meets
template <typename F>
inline void for_taps(const Window& window, int64_t h, int64_t w, F f) {
  const Reach &rows = window.rows, &cols = window.cols;
  for (int64_t i = rows.begin(h); i < rows.end(h); ++i) {
    const int64_t tap = rows.tap(i) * window.kernel_w, at = rows.at(i) * window.width;
    for (int64_t j = cols.begin(w); j < cols.end(w); ++j) f(tap + cols.tap(j), at + cols.at(j));
  }
}

template <typename T>
void im2col(const ConvShape& s, const T* x, T* col, int num_threads) {
  const int64_t rows = s.N * s.out_h * s.out_w, width = s.taps() * s.C;
  const Window window = Window::inputs(s);
  const bool side_by_side = s.dilation_w == 1;  // the taps of a row are, in the image and here
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && rows * width > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t h = row / s.out_w % s.out_h, w = row % s.out_w;
    const T* image = x + row / (s.out_h * s.out_w) * s.H * s.W * s.C;
    T* to = col + row * width;
    const int64_t begin = window.cols.begin(w), n = window.cols.end(w) - begin;
    if ((window.rows.end(h) - window.rows.begin(h)) * n < s.taps()) std::memset(to, 0, sizeof(T) * width);
    if (!side_by_side) {
      for_taps(window, h, w, [&](int64_t tap, int64_t at) {
        std::memcpy(to + tap * s.C, image + at * s.C, sizeof(T) * s.C);
      });
      continue;
    }
    if (!n) continue;
    const int64_t tap = window.cols.tap(begin), at = window.cols.at(begin);
    for (int64_t i = window.rows.begin(h); i < window.rows.end(h); ++i)
      std::memcpy(to + (window.rows.tap(i) * s.kernel_w + tap) * s.C,
                  image + (window.rows.at(i) * s.W + at) * s.C, sizeof(T) * n * s.C);
  }
}

// f(c, width) for C channels, in pieces of as many as fit vectors. The last piece of a width may have
// channels of the one before: f makes them again.
template <int64_t kWidth, typename F>
inline void for_channels(int64_t C, F f) {
  if constexpr (kWidth > 1)
    if (C < kWidth) return for_channels<kWidth / 2>(C, f);
  int64_t c = 0;
  for (; c + kWidth <= C; c += kWidth) f(c, std::integral_constant<int64_t, kWidth>{});
  if (c < C) f(C - kWidth, std::integral_constant<int64_t, kWidth>{});
}

// Of wide images several vectors at a time, which need not wait for one another.
template <typename T, typename F>
inline void for_blocks(int64_t C, F f) {
  constexpr int64_t kVector = L0_VECTOR_BYTES / sizeof(T);
  int64_t c = 0;
  for (; c + 4 * kVector <= C; c += 4 * kVector) f(c, std::integral_constant<int64_t, 4 * kVector>{});
  if (c < C) for_channels<kVector>(C - c, [&](int64_t at, auto width) { f(c + at, width); });
}

// to[c] = sum over n taps of a[i][first + c] * b[i][c]; without b of a[i][first + c]
template <typename T>
inline void sum_of_taps(T* __restrict to, const T* const* a, int64_t first, const T* const* b, int64_t n,
                        int64_t C) {
  for_blocks<T>(C, [&](int64_t c, auto width) {
    T sum[width] = {};
    for (int64_t i = 0; i < n; ++i) {
      const T *p = a[i] + first + c, *q = b ? b[i] + c : nullptr;
      if (q)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sum[j] += p[j] * q[j];
      else
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sum[j] += p[j];
    }
    std::memcpy(to + c, sum, sizeof(sum));
  });
}

template <typename T>
void col2im(const ConvShape& s, const T* col, T* x, int num_threads) {
  const int64_t positions = s.N * s.H * s.W, width = s.taps() * s.C;
  const Window window = Window::outputs(s);
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && positions * s.C > 4096)
  for (int64_t at = 0; at < positions; ++at) {
    const T* rows = col + at / (s.H * s.W) * s.out_h * s.out_w * width;
    const T* a[kMostTaps];
    int64_t n = 0;
    for_taps(window, at / s.W % s.H, at % s.W,
             [&](int64_t tap, int64_t row) { a[n++] = rows + row * width + tap * s.C; });
    sum_of_taps<T>(x + at * s.C, a, 0, nullptr, n, s.C);
  }
}

// Forward where `window` is of inputs; of outputs, and from their gradients, backward. What is read has
// n_from positions an image, what is made height * width. Positions side by side are computed as one of more
// channels, so that vectors are full.
template <typename T>
void depthwise_of(const Window& window, const ConvShape& s, const T* from, int64_t n_from, const T* w, T* to,
                  int64_t height, int64_t width, int num_threads) {
  static thread_local Workspace workspace;
  const int64_t C = s.C, rows = s.N * height, wide = 4 * L0_VECTOR_BYTES / sizeof(T);
  if (rows * width * C == 0) return;
  const int64_t fold = std::min(width, (wide + C - 1) / C);
  T* folded = static_cast<T*>(workspace.get(sizeof(T) * s.taps() * fold * C));
  for (int64_t tap = 0; tap < s.taps(); ++tap)
    for (int64_t i = 0; i < fold; ++i) std::memcpy(folded + (tap * fold + i) * C, w + tap * C, sizeof(T) * C);
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && rows * width * C > 4096)
  for (int64_t row = 0; row < rows; ++row) {
    const T* image = from + row / height * n_from * C;
    for (int64_t x = 0, run = 1; x < width; x += run) {
      run = window.cols.run(x);
      const T *a[kMostTaps], *b[kMostTaps];
      int64_t n = 0;
      for_taps(window, row % height, x, [&](int64_t tap, int64_t at) {
        a[n] = image + at * C;
        b[n++] = folded + tap * fold * C;
      });
      for (int64_t i = 0; i < run; i += fold)
        sum_of_taps<T>(to + (row * width + x + i) * C, a, i * C, b, n, std::min(fold, run - i) * C);
    }
  }
}

template <typename T>
void depthwise(const DepthwiseParams<T>& p, int num_threads) {
  const ConvShape& s = p.shape;
  depthwise_of(Window::inputs(s), s, p.x, s.H * s.W, p.w, p.y, s.out_h, s.out_w, num_threads);
}

// sums[c] of one image: of x[at][c] * dy[row][c] over all outputs that read through tap (u, v).
template <typename T>
void sum_of_outputs(const ConvShape& s, const T* x, const T* dy, T* sums, int64_t u, int64_t v) {
  const Span rows(s.out_h, s.H, u, s.stride_h, s.pad_h, s.dilation_h);
  const Span cols(s.out_w, s.W, v, s.stride_w, s.pad_w, s.dilation_w);
  const int64_t h = u * s.dilation_h - s.pad_h, w = v * s.dilation_w - s.pad_w, step = s.stride_w * s.C;
  for_blocks<T>(s.C, [&](int64_t c, auto width) {
    constexpr int64_t kApart = width * sizeof(T) > L0_VECTOR_BYTES ? 1 : 4;  // sums that need not wait
    T sum[kApart][width] = {};
    for (int64_t a = rows.begin; a < rows.end && cols.begin < cols.end; ++a) {
      const T* p = x + ((a * s.stride_h + h) * s.W + cols.begin * s.stride_w + w) * s.C + c;
      const T* q = dy + (a * s.out_w + cols.begin) * s.C + c;
      int64_t b = cols.begin;
      for (; b + kApart <= cols.end; b += kApart, p += kApart * step, q += kApart * s.C)
        for (int64_t i = 0; i < kApart; ++i)
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) sum[i][j] += p[i * step + j] * q[i * s.C + j];
      for (; b < cols.end; ++b, p += step, q += s.C)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sum[0][j] += p[j] * q[j];
    }
    for (int64_t i = 1; i < kApart; ++i)
      for (int64_t j = 0; j < width; ++j) sum[0][j] += sum[i][j];
    std::memcpy(sums + c, sum[0], sizeof(sum[0]));
  });
}

template <typename T>
void depthwise_grad(const DepthwiseParams<T>& p, int num_threads) {
  const ConvShape& s = p.shape;
  const int64_t positions = s.H * s.W, outputs = s.out_h * s.out_w;
  if (p.dx) depthwise_of(Window::outputs(s), s, p.dy, outputs, p.w, p.dx, s.H, s.W, num_threads);
  if (!p.dw_parts) return;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && s.N > 1)
  for (int64_t image = 0; image < s.N; ++image)
    for (int64_t u = 0; u < s.kernel_h; ++u)
      for (int64_t v = 0; v < s.kernel_w; ++v)
        sum_of_outputs(s, p.x + image * positions * s.C, p.dy + image * outputs * s.C,
                       p.dw_parts + (image * s.taps() + u * s.kernel_w + v) * s.C, u, v);
}

}  // namespace L0_ISA
}  // namespace l0
