// Body of taps() and taps_grad(), compiled once per instruction set behind conv_impl.h.

namespace l0 {
namespace L0_ISA {

// put(t, vector of the t-th entries that follow each of n <= W sources), for t < taps; what is behind the n-th is
// not told. `end`: of what may be read.
template <typename T, typename F>
inline void turn_runs(const T* const* sources, int64_t n, int64_t taps, const T* end, F put) {
  using V = typename Vec<T>::type;
  constexpr int64_t W = Vec<T>::width;
  for (int64_t t = 0; t < taps; t += W) {
    V v[W];
    for (int64_t i = 0; i < W; ++i) {
      const T* from = sources[i < n ? i : n - 1] + t;
      v[i] = from + W <= end ? load(from) : load_some(from, std::min(W, taps - t));
    }
    transpose_stages<V, W, 1>(v);
    for (int64_t i = 0; i < std::min(W, taps - t); ++i) put(t + i, v[i]);
  }
}

template <typename T>
struct TapBlocks {
  const TapsParams<T>& p;
  const ConvShape& s = p.shape;
  const int64_t taps = s.taps(), C = s.C, O = p.out, row = p.all_in * taps;
  const T* const end = p.w + p.all_out * row;

  int64_t in(int64_t c) const { return p.ins ? p.ins[c] : c; }
  const T* weights(int64_t o) const { return p.w + (p.outs ? p.outs[o] : o) * row; }
  T factor(int64_t c) const { return p.z ? p.z[in(c)] : T(1); }

  // b (taps, C, kNR): of outputs [o0, o0 + n).
  void of_outputs(int64_t o0, int64_t n, T* b) const {
    using V = typename Vec<T>::type;
    constexpr int64_t W = Vec<T>::width, NR = kNR<T>;
    for (int64_t j = 0; j < n; j += W) {
      const T* rows[W];
      for (int64_t i = 0; i < W; ++i) rows[i] = weights(o0 + std::min(j + i, n - 1));
      for (int64_t c = 0; c < C;) {  // channels that follow one another: entries do
        const int64_t first = c, from = in(c) * taps;
        while (++c < C && in(c) == in(first) + c - first) continue;
        const int64_t entries = (c - first) * taps;
        int64_t channel = first, tap = 0;
        T f = factor(first);
        for (int64_t e = 0; e < entries; e += W) {
          const int64_t count = std::min(W, entries - e);
          V v[W];
          for (int64_t i = 0; i < W; ++i) {
            const T* at = rows[i] + from + e;
            v[i] = at + W <= end ? load(at) : load_some(at, count);
          }
          transpose_stages<V, W, 1>(v);
          for (int64_t i = 0; i < count; ++i) {
            store(b + (tap * C + channel) * NR + j, v[i] * f);
            if (++tap == taps && ++channel < c) f = factor(channel), tap = 0;
          }
        }
      }
    }
  }

  // b (taps, O, kNR): of inputs [c0, c0 + n), times their gates z, kNR of them.
  void of_inputs(int64_t c0, int64_t n, const T* z, T* b) const {
    using V = typename Vec<T>::type;
    constexpr int64_t W = Vec<T>::width, NR = kNR<T>;
    for (int64_t o = 0; o < O; ++o) {
      const T* const weight = weights(o);
      for (int64_t j = 0; j < n; j += W) {
        const T* sources[W];
        for (int64_t i = 0; i < W; ++i) sources[i] = weight + in(c0 + std::min(j + i, n - 1)) * taps;
        const V f = load(z + j);
        turn_runs(sources, std::min(W, n - j), taps, end,
                  [&](int64_t t, V v) { store(b + (t * O + o) * NR + j, v * f); });
      }
    }
  }
};

// Panels of the rows `index` of a matrix of `width` columns, each column by column.
template <typename T>
void pack_rows(const T* from, int64_t width, const int32_t* index, int64_t n, T* to) {
  RowPanels(n).each([&](int64_t at, int64_t height) {
    pack_panel<T>(to + at * width, int(height), from, Axis{width, index}, n, at, int(height), Axis{1, nullptr},
                  0, width, IndexList<T>(), nullptr);
  });
}

// sums (rows made, kNR) += for each tap its panels of rows, of `width` columns, times b (taps, width, kNR).
template <typename T>
void add_products(const TapRows& rows, const int32_t* made, int64_t taps, const T* panels, int64_t width,
                  const T* b, int64_t n, T* sums) {
  using V = typename Vec<T>::type;
  constexpr int64_t W = Vec<T>::width, NR = kNR<T>;
  alignas(64) T tile[kMR * NR];
  for (int64_t t = 0; width && t < taps; ++t) {
    const int64_t first = rows.begin(t);
    RowPanels(rows.end(t) - first).each([&](int64_t at, int64_t height) {
      for_panels(width, [&](int64_t k, int64_t kc) {
        kPanelKernels<T>[n > W][height - 1](kc, panels + (first + at) * width + k * height, height,
                                            b + (t * width + k) * NR, tile, NR, k > 0);
      });
      for (int64_t i = 0; i < height; ++i) {
        T* const to = sums + made[first + at + i] * NR;
        for (int64_t j = 0; j < n; j += W) {
          const V sum = load(to + j) + load(tile + i * NR + j);
          store(to + j, sum);
        }
      }
    });
  }
}

template <typename T>
void taps(const TapsParams<T>& p, int num_threads) {
  constexpr int64_t NR = kNR<T>, W = Vec<T>::width;
  const TapBlocks<T> w{p};
  const int64_t C = w.C, O = w.O, taps = w.taps, pixels = p.shape.N * p.shape.out_h * p.shape.out_w;
  if (pixels * O == 0) return;
  const TapRows rows(p.shape);
  static thread_local Workspace shared;
  T* const panels = static_cast<T*>(shared.get(sizeof(T) * (rows.size() * C + W)));
  const int threads = double(rows.size()) * C * O < 2e5 ? 1 : num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Workspace scratch;
    T* const b = static_cast<T*>(scratch.get(sizeof(T) * (taps * C + pixels) * NR));
    T* const sums = b + taps * C * NR;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < taps; ++t)
      pack_rows(p.x, C, rows.read() + rows.begin(t), rows.end(t) - rows.begin(t), panels + rows.begin(t) * C);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < O; o += NR) {
      const int64_t n = std::min(NR, O - o);
      w.of_outputs(o, n, b);
      std::memset(sums, 0, sizeof(T) * pixels * NR);
      add_products(rows, rows.made(), taps, panels, C, b, n, sums);
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t j = 0; j < n; j += W) {
          const int64_t some = std::min(W, n - j);
          auto sum = load(sums + i * NR + j);
          if (p.bias) sum += load_some(p.bias + o + j, some);
          store_some(p.y + i * O + o + j, sum, some);
        }
    }
  }
}

template <typename T>
void taps_grad(const TapsParams<T>& p, int num_threads) {
  using V = typename Vec<T>::type;
  constexpr int64_t NR = kNR<T>, W = Vec<T>::width;
  const TapBlocks<T> w{p};
  const int64_t C = w.C, O = w.O, taps = w.taps, pixels = p.shape.N * p.shape.H * p.shape.W;
  const TapRows rows(p.shape);
  const int64_t R = rows.size(), bytes_dw = sizeof(T) * p.all_out * w.row;
  static thread_local Workspace shared;
  T* const panels = static_cast<T*>(shared.get(sizeof(T) * 2 * (R * O + W)));  // of dy: panels, and rows
  T* const grads = panels + R * O + W;
  const int threads = double(R) * C * O < 2e5 ? 1 : num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Workspace scratch;
    const int64_t most_taps = (taps + W - 1) / W * W, most = (p.all_in * taps + W - 1) / W * W;
    T* const b = static_cast<T*>(scratch.get(
        sizeof(T) * ((taps * O + pixels + R + kMR * most_taps + 1) * NR + most)));
    T* const sums = b + taps * O * NR;         // (pixels, kNR)
    T* const inputs = sums + pixels * NR;      // (R, kNR): x, of each tap's rows
    T* const tiles = inputs + R * NR;          // (taps, kMR, kNR)
    T* const z = tiles + kMR * most_taps * NR;  // (kNR)
    T* const segment = z + NR;                 // a piece of a row of dw
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t first = rows.begin(t), n = rows.end(t) - first;
      if (p.dx) pack_rows(p.dy, O, rows.made() + first, n, panels + first * O);
      if (p.dw)
        for (int64_t i = first; i < first + n; ++i)
          std::memcpy(grads + i * O, p.dy + rows.made()[i] * O, sizeof(T) * O);
    }
    if (p.dw) {
      const int64_t closed = C == 0 ? 0 : O;
#pragma omp for schedule(static)
      for (int64_t o = closed; o < p.all_out; ++o)
        write_zeros(p.dw + (p.outs ? p.outs[o] : o) * w.row, sizeof(T) * w.row, bytes_dw);
    }
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < C; c += NR) {
      const int64_t n = std::min(NR, C - c);
      for (int64_t j = 0; j < NR; ++j) z[j] = j < n ? w.factor(c + j) : T(0);
      if (p.dx) {
        w.of_inputs(c, n, z, b);
        std::memset(sums, 0, sizeof(T) * pixels * NR);
        add_products(rows, rows.read(), taps, panels, O, b, n, sums);
        for (int64_t i = 0; i < pixels; ++i)
          for (int64_t j = 0; j < n; j += W)
            store_some(p.dx + i * C + c + j, load(sums + i * NR + j), std::min(W, n - j));
      }
      if (!p.dw) continue;
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j < n; j += W)
          store(inputs + i * NR + j, load_some(p.x + rows.read()[i] * C + c + j, std::min(W, n - j)));
      // This block writes all columns from its first input up to the next block's.
      const int64_t from = c == 0 ? 0 : w.in(c), to = c + NR < C ? w.in(c + NR) : p.all_in;
      std::memset(segment, 0, sizeof(T) * (to - from) * taps);
      RowPanels(O).each([&](int64_t o, int64_t height) {
        for (int64_t t = 0; t < taps; ++t) {
          T* const tile = tiles + t * kMR * NR;
          const int64_t first = rows.begin(t);
          if (rows.end(t) == first) std::memset(tile, 0, sizeof(T) * kMR * NR);
          for_panels(rows.end(t) - first, [&](int64_t k, int64_t kc) {
            kPanelKernels<T>[n > W][height - 1](kc, grads + (first + k) * O + o, O, inputs + (first + k) * NR,
                                                tile, NR, k > 0);
          });
        }
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < n; j += W) {
            const V f = load(z + j);
            for (int64_t t = 0; t < taps; t += W) {
              const int64_t some = std::min(W, taps - t);
              V v[W];
              for (int64_t k = 0; k < W; ++k) v[k] = k < some ? load(tiles + ((t + k) * kMR + i) * NR + j) * f : V{};
              transpose_stages<V, W, 1>(v);
              for (int64_t k = 0; k < std::min(W, n - j); ++k)
                store_some(segment + (w.in(c + j + k) - from) * taps + t, v[k], some);
            }
          }
          T* const dst = p.dw + (p.outs ? p.outs[o + i] : o + i) * w.row + from * taps;
          const size_t bytes = sizeof(T) * (to - from) * taps;
          if (bytes_dw >= kPastCaches)
            copy_past_caches(dst, segment, bytes);
          else
            std::memcpy(dst, segment, bytes);
        }
      });
    }
    settle_past_caches();
  }
}

}  // namespace L0_ISA
}  // namespace l0
