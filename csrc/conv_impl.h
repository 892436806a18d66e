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

// Convolutions of few channels. Patches are never whole in memory: a panel of as many columns as the
// micro-kernel takes is copied together in the first-level cache, multiplied by all there is, and forgotten.

constexpr int64_t kPanelRows = 128;      // of a panel: 16 KB; and how many products are summed in a row
constexpr int64_t kUnitPositions = 256;  // of images that are computed together, where those are small
constexpr int64_t kUnitBytes = 1 << 17;  // likewise, of the copies of images
constexpr int64_t kGradParts = 16;       // at most, into which the sums of dw are cut, however many threads,
constexpr int64_t kPartPositions = 512;  // of so many positions or more

// dst[j] = src[j] and back, j < n, where the rest of the vector is not ours.
template <typename T>
inline typename Vec<T>::type load_some(const T* p, int64_t n) {
  if (n >= Vec<T>::width) return load(p);
#if L0_COMPRESS
  if constexpr (sizeof(T) == 4)
    return (typename Vec<T>::type)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (typename Vec<T>::type)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  typename Vec<T>::type v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
template <typename T>
inline void store_some(T* p, typename Vec<T>::type v, int64_t n) {
  if (n >= Vec<T>::width) return store(p, v);
#if L0_COMPRESS
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// The same for at most 4 rows and a vector's columns: squares of 4 side by side, in fewer stages.
template <typename T>
inline void transpose_squares(const T* src, int64_t src_row, T* dst, int64_t dst_row, int64_t rows,
                              int64_t cols, const T* add) {
  using V = typename Vec<T>::type;
  constexpr int64_t W = Vec<T>::width;
  V v[4];
  for (int64_t i = 0; i < 4; ++i) {
    v[i] = i < rows ? load_some(src + i * src_row, cols) : V{};
    if (add && i < rows) v[i] += add[i] - V{};
  }
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  butterfly<V, 1>(v[0], v[1], lanes);
  butterfly<V, 1>(v[2], v[3], lanes);
  butterfly<V, 2>(v[0], v[2], lanes);
  butterfly<V, 2>(v[1], v[3], lanes);
  T squares[4][W];
  for (int64_t i = 0; i < 4; ++i) store(squares[i], v[i]);
  for (int64_t c = 0; c < cols; ++c) {
    const T* from = squares[c % 4] + c / 4 * 4;
    T* to = dst + c * dst_row;
    if (rows == 4) {
      std::memcpy(to, from, 4 * sizeof(T));
    } else {
      to[0] = from[0];
      if (rows > 1) to[1] = from[1];
      if (rows > 2) to[2] = from[2];
    }
  }
}

// dst[c * dst_row + r] = src[r * src_row + c] + add[r]; add null: 0
template <typename T>
void transpose(const T* __restrict src, int64_t src_row, T* __restrict dst, int64_t dst_row, int64_t rows,
               int64_t cols, const T* __restrict add = nullptr) {
  using V = typename Vec<T>::type;
  constexpr int64_t W = Vec<T>::width;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W) {
      const int64_t n_rows = std::min(W, rows - r), n_cols = std::min(W, cols - c);
      V v[W];
      if (W > 4 && n_rows <= 4) {  // squares of 4 side by side
        transpose_squares(src + r * src_row + c, src_row, dst + c * dst_row + r, dst_row, n_rows, n_cols,
                          add ? add + r : nullptr);
        continue;
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i)
        v[i] = i < n_rows ? load_some(src + (r + i) * src_row + c, n_cols) : V{};
      transpose_stages<V, W, 1>(v);
      const V sum = add ? load_some(add + r, n_rows) : V{};
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i)
        if (i < n_cols) store_some(dst + (c + i) * dst_row + r, add ? v[i] + sum : v[i], n_rows);
    }
}

// Of operands that lie where they are, with rows of any distance.
template <typename T, int MR, int NV>
void panel_kernel(int64_t kc, const T* __restrict a, int64_t a_row, const T* __restrict b, T* __restrict c,
                  int64_t c_row, bool accumulate) {
  panel_product<T, MR, NV>(kc, a, a_row, b, c, c_row, accumulate);
}

// The same of a panel that nobody has copied together: vector j of row k is at b[j] + at[k].
template <typename T, int MR, int NV>
void placed_kernel(int64_t kc, const T* __restrict a, int64_t a_row, const T* const* b,
                   const int64_t* __restrict at, T* __restrict c, int64_t c_row, bool accumulate) {
  const T* const vectors[] = {b[0], b[NV - 1]};
  tile_product<T, MR, NV>(
      kc, a, a_row, [&](int64_t k, int j) { return load(vectors[j] + at[k]); }, c, c_row, accumulate);
}

template <typename T>
using PanelKernel = void (*)(int64_t, const T*, int64_t, const T*, T*, int64_t, bool);
template <typename T>
using PlacedKernel = void (*)(int64_t, const T*, int64_t, const T* const*, const int64_t*, T*, int64_t, bool);

template <typename T, int NV, int... I>
constexpr std::array<PanelKernel<T>, sizeof...(I)> make_panel_kernels(std::integer_sequence<int, I...>) {
  return {{&panel_kernel<T, I + 1, NV>...}};
}
template <typename T, int NV, int... I>
constexpr std::array<PlacedKernel<T>, sizeof...(I)> make_placed_kernels(std::integer_sequence<int, I...>) {
  return {{&placed_kernel<T, I + 1, NV>...}};
}
constexpr auto kHeights = std::make_integer_sequence<int, kMR>{};
template <typename T>
constexpr std::array<std::array<PanelKernel<T>, kMR>, 2> kPanelKernels = {make_panel_kernels<T, 1>(kHeights),
                                                                          make_panel_kernels<T, 2>(kHeights)};
template <typename T>
constexpr std::array<std::array<PlacedKernel<T>, kMR>, 2> kPlacedKernels = {
    make_placed_kernels<T, 1>(kHeights), make_placed_kernels<T, 2>(kHeights)};

// Rows in panels of equal height.
struct RowPanels {
  int64_t size, height;
  explicit RowPanels(int64_t rows)
      : size(rows), height(rows ? (rows + (rows + kMR - 1) / kMR - 1) / ((rows + kMR - 1) / kMR) : 1) {}
  // f(first row, rows)
  template <typename F>
  void each(F f) const {
    for (int64_t i = 0; i < size; i += height) f(i, std::min(height, size - i));
  }
};

// f(first, rows) for rows in panels of equal length.
template <typename F>
inline void for_panels(int64_t rows, F f) {
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  for (int64_t i = 0; i < panels; ++i) {
    const Range part(rows, i, panels);
    f(part.begin, part.end - part.begin);
  }
}

// A vector of a panel's row, the rest of which later ones write over.
struct Piece {
  int64_t to, from;
};

// The columns [first, first + n) of a panel; at most n pieces.
template <typename T>
inline int64_t cut(const Runs& runs, int64_t first, int64_t n, Piece* pieces) {
  const int64_t* at = runs.at();
  const int64_t length = runs.length();
  int64_t count = 0;
  for (int64_t i = first; i < first + n;) {
    const int64_t within = i % length;
    pieces[count++] = {i - first, at[i / length] + within};
    i += std::min<int64_t>({length - within, first + n - i, Vec<T>::width});
  }
  return count;
}

// Whether the pieces are the vectors of a row: then it need not be copied together.
template <typename T>
inline bool are_vectors(const Piece* pieces, int64_t n) {
  bool whole = n <= kNV;
  for (int64_t i = 0; whole && i < n; ++i) whole = pieces[i].to == i * Vec<T>::width;
  return whole;
}

// Rows of kNR columns; one vector behind the last is written, and read behind the last of `from`.
template <typename T>
inline void fill_panel(T* __restrict panel, const T* __restrict from, const int64_t* __restrict at,
                       int64_t rows, const Piece* __restrict pieces, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, panel += kNR<T>)
    for (int64_t i = 0; i < n; ++i) store(panel + pieces[i].to, load(from + at[r] + pieces[i].from));
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many images are computed together.
inline int64_t unit_images(const ConvShape& s, int64_t bytes) {
  const int64_t each = s.out_h * s.out_w;
  const int64_t n =
      std::min(kUnitPositions / std::max<int64_t>(each, 1), kUnitBytes / std::max<int64_t>(bytes, 1));
  return std::max<int64_t>(1, std::min(n, s.N));
}

// The same of at most n_unit images, so that threads get equal numbers of units.
inline int64_t even_units(int64_t images, int64_t n_unit, int threads) {
  const int64_t units = round_up((images + n_unit - 1) / n_unit, threads);
  return (images + units - 1) / units;
}

template <typename T>
void to_planes(const ConvShape& s, const Planes& planes, bool channels_last, const T* x, T* to) {
  const bool plain = s.pad_h == 0 && s.pad_w == 0 && s.stride_w == 1;
  if (!plain) std::memset(to, 0, sizeof(T) * planes.image);
  if (plain && (!channels_last || s.C == 1)) {
    std::memcpy(to, x, sizeof(T) * planes.image);
  } else if (plain) {
    transpose(x, s.C, to, planes.plane, s.H * s.W, s.C);
  } else if (channels_last && s.stride_w == 1) {
    for (int64_t h = 0; h < s.H; ++h)
      transpose(x + h * s.W * s.C, s.C, to + (h + s.pad_h) * planes.row + s.pad_w, planes.plane, s.W, s.C);
  } else {
    const int64_t pixel = channels_last ? s.C : 1, channel = channels_last ? 1 : s.H * s.W;
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t h = 0; h < s.H; ++h) {
        T* row = to + c * planes.plane + (h + s.pad_h) * planes.row;
        const T* from = x + h * s.W * pixel + c * channel;
        for (int64_t r = 0; r < s.stride_w; ++r) {  // columns r, r + stride, ... with their zeros
          const int64_t first = (r - s.pad_w % s.stride_w + s.stride_w) % s.stride_w;
          T* phase = row + planes.column(first + s.pad_w);
          for (int64_t w = first, i = 0; w < s.W; w += s.stride_w, ++i) phase[i] = from[w * pixel];
        }
      }
  }
}

template <typename T>
void to_pixels(const ConvShape& s, const Pixels& pixels, bool channels_last, const T* x, T* to) {
  const bool plain = s.pad_h == 0 && s.pad_w == 0;
  if (!plain) std::memset(to, 0, sizeof(T) * pixels.image);
  if (plain && (channels_last || s.C == 1)) {
    std::memcpy(to, x, sizeof(T) * pixels.image);
  } else if (plain) {
    transpose(x, s.H * s.W, to, s.C, s.C, s.H * s.W);
  } else {
    for (int64_t h = 0; h < s.H; ++h) {
      T* row = to + (h + s.pad_h) * pixels.row + s.pad_w * s.C;
      if (channels_last)
        std::memcpy(row, x + h * s.W * s.C, sizeof(T) * s.W * s.C);
      else
        transpose(x + h * s.W, s.H * s.W, row, s.C, s.C, s.W);
    }
  }
}

// Columns of panels are output positions, rows the entries of a kernel: y = w times the panel, whatever the
// number of open channels a product of full vectors.
template <typename T>
void conv(const ConvParams<T>& p, int num_threads) {
  constexpr int64_t NR = kNR<T>, W = Vec<T>::width;
  const ConvShape& s = p.shape;
  const int64_t O = p.out, K = s.C * s.taps(), each = s.out_h * s.out_w;
  if (s.N * O * each == 0) return;
  const Planes planes(s);
  const int64_t n_unit = unit_images(s, sizeof(T) * planes.image), units = (s.N + n_unit - 1) / n_unit;
  const Runs columns = Runs::positions(s, n_unit), rows = Runs::planar_entries(s);
  const RowPanels outs(O);
  static thread_local Workspace shared;
  T* const w = static_cast<T*>(shared.get(sizeof(T) * (K * O + W)));
  outs.each([&](int64_t o, int64_t n) {
    pack_panel<T>(w + o * K, int(n), p.w, Axis{K, nullptr}, O, o, int(n), Axis{1, nullptr}, 0, K,
                  IndexList<T>(), nullptr);
  });
  const int threads = double(s.N) * each * O * K < 2e5 ? 1 : num_threads;
  const int64_t parts = units < threads ? (threads + units - 1) / units : 1;  // of a unit's panels
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < units * parts; ++part) {
    const int64_t first = part / parts * n_unit, n = std::min(n_unit, s.N - first);
    const Range panels((n * each + NR - 1) / NR, part % parts, parts);
    static thread_local Workspace scratch;
    const int64_t size_panel = round_up(std::min(K, kPanelRows) * NR + W, W);
    T* const panel =
        static_cast<T*>(scratch.get(sizeof(T) * (size_panel + O * NR + n_unit * planes.image + W)));
    T *const tile = panel + size_panel, *const images = tile + O * NR;
    for (int64_t i = 0; i < n; ++i)
      to_planes(s, planes, p.x_channels_last, p.x + (first + i) * s.H * s.W * s.C, images + i * planes.image);
    for (int64_t q = panels.begin; q < panels.end; ++q) {
      const int64_t at = q * NR, width = std::min(NR, n * each - at);
      Piece pieces[NR];
      const int64_t n_pieces = cut<T>(columns, at, width, pieces);
      const bool in_place = are_vectors<T>(pieces, n_pieces);
      const T* const places[] = {images + pieces[0].from, images + pieces[n_pieces > 1].from};
      for_panels(K, [&](int64_t k, int64_t kc) {
        if (!in_place) fill_panel(panel, images, rows.at() + k, kc, pieces, n_pieces);
        outs.each([&](int64_t o, int64_t height) {
          if (in_place)
            return kPlacedKernels<T>[width > W][height - 1](kc, w + o * K + k * height, height, places,
                                                            rows.at() + k, tile + o * NR, NR, k > 0);
          kPanelKernels<T>[width > W][height - 1](kc, w + o * K + k * height, height, panel, tile + o * NR,
                                                  NR, k > 0);
        });
      });
      if (p.y_channels_last) {
        transpose(tile, NR, p.y + (first * each + at) * O, O, O, width, p.bias);
        continue;
      }
      for (int64_t j = 0, length; j < width; j += length) {
        const int64_t image = (at + j) / each, within = (at + j) % each;
        length = std::min(width - j, each - within);
        for (int64_t o = 0; o < O; ++o) {
          T* y = p.y + ((first + image) * O + o) * each + within;
          const T b = p.bias ? p.bias[o] : T(0);
#pragma omp simd
          for (int64_t i = 0; i < length; ++i) y[i] = tile[o * NR + j + i] + b;
        }
      }
    }
  }
}

// to[c] = sum over the entries of rows and of cols of col[rows[i] + cols[j] + c], c < C; kVectors at a time,
// which are read whole.
template <typename T, int kVectors>
inline void sum_of_entries(const T* col, const int64_t* rows, int64_t n_rows, const int64_t* cols,
                           int64_t n_cols, T* to, int64_t C) {
  using V = typename Vec<T>::type;
  constexpr int64_t W = Vec<T>::width;
  V sum[kVectors] = {};
  for (int64_t i = 0; i < n_rows; ++i)
    for (int64_t j = 0; j < n_cols; ++j) {
      const T* p = col + rows[i] + cols[j];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += load(p + v * W);
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_some(to + v * W, sum[v], C - v * W);
}

// An image from its patches. `rows` and `cols`: where in `col` the entries of the window lie.
template <typename T>
void sum_patches(const ConvShape& s, const Window& window, const int64_t* rows, const int64_t* cols,
                 const T* col, T* to) {
  constexpr int64_t W = Vec<T>::width;
  for (int64_t h = 0; h < s.H; ++h)
    for (int64_t w = 0; w < s.W; ++w, to += s.C) {
      const int64_t *i = rows + window.rows.begin(h), *j = cols + window.cols.begin(w);
      const int64_t n_i = window.rows.end(h) - window.rows.begin(h),
                    n_j = window.cols.end(w) - window.cols.begin(w);
      for (int64_t c = 0; c < s.C; c += 4 * W) {
        const int64_t left = s.C - c;
        if (left > 3 * W)
          sum_of_entries<T, 4>(col + c, i, n_i, j, n_j, to + c, left);
        else if (left > 2 * W)
          sum_of_entries<T, 3>(col + c, i, n_i, j, n_j, to + c, left);
        else if (left > W)
          sum_of_entries<T, 2>(col + c, i, n_i, j, n_j, to + c, left);
        else
          sum_of_entries<T, 1>(col + c, i, n_i, j, n_j, to + c, left);
      }
    }
}

// dx as the convolution of dy by the kernels turned around: where outputs are few, products as short as their
// number would be stored and added up for longer than they take.
template <typename T>
void conv_grad_x_turned(const ConvParams<T>& p, int num_threads) {
  const ConvShape& s = p.shape;
  const int64_t O = p.out, taps = s.taps();
  const int64_t pad_h = s.dilation_h * (s.kernel_h - 1) - s.pad_h;
  const int64_t pad_w = s.dilation_w * (s.kernel_w - 1) - s.pad_w;
  static thread_local Workspace turned;
  T* const w = static_cast<T*>(turned.get(sizeof(T) * s.C * O * taps));
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t o = 0; o < O; ++o)
      for (int64_t tap = 0; tap < taps; ++tap)
        w[(c * O + o) * taps + tap] = p.w[(o * s.C + c) * taps + taps - 1 - tap];
  ConvParams<T> of_dy = {};
  of_dy.shape = {s.N, s.out_h, s.out_w, O,     s.kernel_h,   s.kernel_w,   1,
                 1,   pad_h,   pad_w,   s.dilation_h, s.dilation_w, s.H, s.W};
  of_dy.out = s.C;
  of_dy.x_channels_last = p.y_channels_last, of_dy.y_channels_last = p.x_channels_last;
  of_dy.x = p.dy, of_dy.w = w, of_dy.y = p.dx;
  conv(of_dy, num_threads);
}

// Whether it serves, and is the faster way.
template <typename T>
bool is_turned(const ConvParams<T>& p) {
  const ConvShape& s = p.shape;
  return p.out < Vec<T>::width && s.stride_h == 1 && s.stride_w == 1 &&
         s.pad_h <= s.dilation_h * (s.kernel_h - 1) && s.pad_w <= s.dilation_w * (s.kernel_w - 1);
}

// dx of the images from the gradients of their patches: rows of `col`, col_row apart, entries in the order of
// the pixels.
template <typename T>
void conv_grad_x(const ConvParams<T>& p, int num_threads) {
  constexpr int64_t NR = kNR<T>, W = Vec<T>::width;
  const ConvShape& s = p.shape;
  const int64_t O = p.out, taps = s.taps(), K = s.C * taps, each = s.out_h * s.out_w, pixels = s.H * s.W;
  if (s.N * pixels * s.C == 0) return;
  const int64_t panels = (K + NR - 1) / NR, col_row = panels * NR + W;  // no power of two: all of the cache
  const int threads = double(s.N) * each * O * K < 2e5 ? 1 : num_threads;
  const int64_t n_unit = even_units(s.N, unit_images(s, sizeof(T) * each * col_row), threads),
                units = (s.N + n_unit - 1) / n_unit;
  const Window window = Window::outputs(s);
  const int64_t n_rows = window.rows.end(s.H - 1), n_cols = window.cols.end(s.W - 1);
  static thread_local Workspace shared, table;
  int64_t* const at_rows = static_cast<int64_t*>(table.get(sizeof(int64_t) * (n_rows + n_cols)));
  int64_t* const at_cols = at_rows + n_rows;
  for (int64_t i = 0; i < n_rows; ++i)
    at_rows[i] = window.rows.at(i) * s.out_w * col_row + window.rows.tap(i) * s.kernel_w * s.C;
  for (int64_t j = 0; j < n_cols; ++j) at_cols[j] = window.cols.at(j) * col_row + window.cols.tap(j) * s.C;
  T* const w = static_cast<T*>(shared.get(sizeof(T) * panels * O * NR));  // (panels, O, NR)
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && O * K > 4096)
  for (int64_t o = 0; o < O; ++o) {
    static thread_local Workspace scratch;
    T* const row = static_cast<T*>(scratch.get(sizeof(T) * panels * NR));  // in the order of the pixels
    transpose(p.w + o * K, taps, row, s.C, s.C, taps);
    std::memset(row + K, 0, sizeof(T) * (panels * NR - K));
    for (int64_t q = 0; q < panels; ++q) std::memcpy(w + (q * O + o) * NR, row + q * NR, sizeof(T) * NR);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t first = unit * n_unit, n = std::min(n_unit, s.N - first), rows = n * each;
    static thread_local Workspace scratch;
    const int64_t size_dy = n_unit * each * O, planar = pixels * s.C + size_dy;
    T* const col = static_cast<T*>(scratch.get(sizeof(T) * (n_unit * each * col_row + size_dy + W + planar)));
    T *const grads = col + n_unit * each * col_row, *const turned = grads + size_dy + W,
             *const image = turned + size_dy;
    const RowPanels positions(rows);
    const T* dy = p.dy + first * each * O;
    if (!p.y_channels_last) {
      for (int64_t i = 0; i < n; ++i) transpose(dy + i * each * O, each, turned + i * each * O, O, O, each);
      dy = turned;
    }
    positions.each([&](int64_t at, int64_t height) {  // (panels of positions, O, height)
      transpose(dy + at * O, O, grads + at * O, height, height, O);
    });
    for (int64_t q = 0; q < panels; ++q)
      positions.each([&](int64_t at, int64_t height) {
        for_panels(O, [&](int64_t o, int64_t kc) {
          kPanelKernels<T>[K - q * NR > W][height - 1](kc, grads + at * O + o * height, height,
                                                       w + (q * O + o) * NR, col + at * col_row + q * NR,
                                                       col_row, o > 0);
        });
      });
    for (int64_t i = 0; i < n; ++i) {
      T* const whole = p.dx + (first + i) * pixels * s.C;
      T* const to = p.x_channels_last ? whole : image;
      sum_patches(s, window, at_rows, at_cols, col + i * each * col_row, to);
      if (!p.x_channels_last) transpose(image, s.C, whole, pixels, pixels, s.C);
    }
  }
}

// Columns of panels are the entries of a kernel in the order of the pixels and, where db is wanted, behind them
// a column of ones; rows the output positions. Of panels that begin with a run of entries nothing is copied:
// those that end within one are as wide as a vector or two all the same, so that there must not be too many.
template <typename T>
void conv_grad_w(const ConvParams<T>& p, int num_threads) {
  constexpr int64_t NR = kNR<T>, W = Vec<T>::width;
  const ConvShape& s = p.shape;
  const int64_t O = p.out, taps = s.taps(), K = s.C * taps, each = s.out_h * s.out_w;
  if (s.N * each == 0) {
    std::memset(p.dw, 0, sizeof(T) * O * K);
    if (p.db) std::memset(p.db, 0, sizeof(T) * O);
    return;
  }
  const Pixels pixels(s);
  const int64_t n_unit = unit_images(s, sizeof(T) * pixels.image);
  const Runs columns = Runs::entries(s), rows = Runs::pixel_positions(s, n_unit);
  const int64_t length = columns.length(), per_run = (length + NR - 1) / NR;
  const bool in_place = !p.db && 2 * columns.size() * ((length + W - 1) / W) <= 3 * ((K + W) / W);
  const int64_t panels = in_place ? columns.size() * per_run : (K + NR) / NR;
  const int64_t sum_row = panels * NR + W, size = O * sum_row;
  const int64_t parts = std::min({s.N, kGradParts, std::max<int64_t>(1, s.N * each / kPartPositions)});
  const RowPanels outs(O);
  const int threads = double(s.N) * each * O * K < 2e5 ? 1 : num_threads;
  static thread_local Workspace shared;
  T* const sums = static_cast<T*>(shared.get(sizeof(T) * size * (1 + std::max(threads, 1))));
  T* const total = sums + size * std::max(threads, 1);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Workspace scratch;
    const int64_t size_panel = round_up(kPanelRows * NR + W, W);
    const int64_t size_dy = p.y_channels_last ? 0 : n_unit * each * O;
    T* const panel =
        static_cast<T*>(scratch.get(sizeof(T) * (size_panel + n_unit * pixels.image + W + size_dy)));
    T *const images = panel + size_panel, *const turned = images + n_unit * pixels.image + W;
    const int64_t thread = thread_number(), team = team_size();
    // Parts at a time, and threads that share one, each some of its columns.
    const int64_t slots = std::min(parts, team), sharers = team / slots;
    const Range mine(panels, thread % sharers, sharers);
    for (int64_t round = 0; round < parts; round += slots) {
      const int64_t slot = thread / sharers;
      if (slot < slots && round + slot < parts) {
        const Range part(s.N, round + slot, parts);
        T* const sum = sums + slot * size;
        for (int64_t first = part.begin; first < part.end; first += n_unit) {
          const int64_t n = std::min(n_unit, part.end - first);
          const T* dy = p.dy + first * each * O;
          for (int64_t i = 0; i < n; ++i) {
            to_pixels(s, pixels, p.x_channels_last, p.x + (first + i) * s.H * s.W * s.C,
                      images + i * pixels.image);
            if (!p.y_channels_last) transpose(dy + i * each * O, each, turned + i * each * O, O, O, each);
          }
          if (!p.y_channels_last) dy = turned;
          for_panels(n * each, [&](int64_t at, int64_t kc) {
            for (int64_t q = mine.begin; q < mine.end; ++q) {
              const bool accumulate = first > part.begin || at > 0;
              if (in_place) {
                const int64_t begin = q % per_run * NR;
                const T* const run = images + columns.at()[q / per_run] + begin;
                const T* const places[] = {run, run + W};
                outs.each([&](int64_t o, int64_t height) {
                  kPlacedKernels<T>[length - begin > W][height - 1](kc, dy + at * O + o, O, places,
                                                                    rows.at() + at, sum + o * sum_row + q * NR,
                                                                    sum_row, accumulate);
                });
                continue;
              }
              const int64_t width = std::min(NR, K - q * NR);
              Piece pieces[NR];
              fill_panel(panel, images, rows.at() + at, kc, pieces, cut<T>(columns, q * NR, width, pieces));
              for (int64_t r = 0; width < NR && r < kc; ++r) panel[r * NR + width] = T(1);
              outs.each([&](int64_t o, int64_t height) {
                kPanelKernels<T>[width + 1 > W][height - 1](kc, dy + at * O + o, O, panel,
                                                            sum + o * sum_row + q * NR, sum_row, accumulate);
              });
            }
          });
        }
      }
#pragma omp barrier
      const bool is_last = round + slots >= parts;
      const Range channels(O, thread, team);
      for (int64_t o = channels.begin; o < channels.end; ++o) {
        T* __restrict to = parts == 1 ? sums + o * sum_row : total + o * sum_row;
        for (int64_t j = 0; parts > 1 && j < std::min(slots, parts - round); ++j) {
          const T* __restrict sum = sums + j * size + o * sum_row;
          if (round + j == 0)
            std::memcpy(to, sum, sizeof(T) * sum_row);
          else
#pragma omp simd
            for (int64_t i = 0; i < sum_row; ++i) to[i] += sum[i];
        }
        if (!is_last) continue;
        const int64_t runs = in_place ? columns.size() : 1;
        for (int64_t r = 0; r < runs; ++r)
          transpose(to + r * per_run * NR, s.C, p.dw + o * K + r * (taps / runs), taps, taps / runs, s.C);
        if (p.db) p.db[o] = to[K];
      }
#pragma omp barrier
    }
  }
}

template <typename T>
void conv_grad(const ConvParams<T>& p, int num_threads) {
  if (p.dx) (is_turned(p) ? conv_grad_x_turned<T> : conv_grad_x<T>)(p, num_threads);
  if (p.dw) conv_grad_w(p, num_threads);
}

}  // namespace L0_ISA
}  // namespace l0
