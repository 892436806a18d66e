// Body of gemm(), compiled once per instruction set: the including file sets the target, L0_ISA (a namespace)
// and L0_VECTOR_BYTES. Include guards are absent on purpose; standard headers come from the including file,
// before the target is set.

namespace l0 {
namespace L0_ISA {

constexpr int kVectorBytes = L0_VECTOR_BYTES;

template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int width = kVectorBytes / sizeof(T);
};

// Tile of the micro-kernel: kMR rows x kNV vectors. 32 registers hold 14 x 2 accumulators, 16 hold 6 x 2; two
// more hold B and one A.
constexpr int kNV = 2;
constexpr int kMR = L0_VECTOR_REGISTERS >= 32 ? 14 : 6;
template <typename T>
constexpr int kNR = kNV * Vec<T>::width;

// Elements of k per pass: an A panel (kMR x kKC) stays in L1 while B panels stream from L2.
constexpr int64_t kKC = 384;
// Rows of C per block: bounds the packed operand and the accumulators, whatever the batch.
constexpr int64_t kBlockM = 56 * kMR;
// Panels of B that are swept together: they stay in L2 while the panels of A go by.
constexpr int64_t kSweep = 8;

template <typename T>
inline typename Vec<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, typename Vec<T>::type v) {
  *reinterpret_cast<typename Vec<T>::unaligned*>(p) = v;
}

// C (MR x NV vectors, rows c_row apart) = or += A (kc x MR, rows a_row apart) times B; b(k, j): vector j of its
// row k.
template <typename T, int MR, int NV, typename B>
inline __attribute__((always_inline)) void tile_product(int64_t kc, const T* __restrict a, int64_t a_row, B b,
                                                        T* __restrict c, int64_t c_row, bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int W = Vec<T>::width;
  V acc[MR][NV];
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  for (int64_t k = 0; k < kc; ++k) {
    V bv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bv[j] = b(k, j);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
      const V av = a[i] - V{};  // broadcast
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
    }
    a += a_row;
  }
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      T* const to = c + i * c_row + j * W;
      store(to, accumulate ? load(to) + acc[i][j] : acc[i][j]);
    }
}

// The same of a panel (kc x kNR).
template <typename T, int MR, int NV>
inline __attribute__((always_inline)) void panel_product(int64_t kc, const T* __restrict a, int64_t a_row,
                                                         const T* __restrict b, T* __restrict c, int64_t c_row,
                                                         bool accumulate) {
  tile_product<T, MR, NV>(
      kc, a, a_row, [b](int64_t k, int j) { return load(b + k * kNR<T> + j * Vec<T>::width); }, c, c_row,
      accumulate);
}

// tile (MR x kNR, row-major) = or += A panel (kc x MR) times B panel, NV of the panel's vectors.
template <typename T, int MR, int NV>
void micro_kernel(int64_t kc, const T* __restrict a, const T* __restrict b, T* __restrict tile,
                  bool accumulate) {
  panel_product<T, MR, NV>(kc, a, MR, b, tile, kNR<T>, accumulate);
}

template <typename T>
using MicroKernel = void (*)(int64_t, const T*, const T*, T*, bool);

template <typename T, int NV, int... I>
constexpr std::array<MicroKernel<T>, sizeof...(I)> make_kernels(std::integer_sequence<int, I...>) {
  return {{&micro_kernel<T, I + 1, NV>...}};
}
template <typename T>
constexpr std::array<std::array<MicroKernel<T>, kMR>, 2> kKernels = {
    make_kernels<T, 1>(std::make_integer_sequence<int, kMR>{}),
    make_kernels<T, 2>(std::make_integer_sequence<int, kMR>{})};

#if L0_VECTOR_BYTES == 64
#define L0_COMPRESS 1
// dst gets the elements of src[0..W) that mask names, packed; writes a whole vector, reads only what is
// named.
inline void compress(float* dst, const float* src, uint16_t mask) {
  _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, src)));
}
inline void compress(double* dst, const double* src, uint16_t mask) {
  _mm512_storeu_pd(dst, _mm512_maskz_compress_pd(uint8_t(mask), _mm512_maskz_loadu_pd(uint8_t(mask), src)));
}
// The reverse: packed elements of src go where `open` says, zeros to the rest of `owned`, nothing elsewhere;
// reads a whole vector.
inline void expand(float* dst, const float* src, uint16_t open, uint16_t owned) {
  const __m512 v = _mm512_maskz_expand_ps(open, _mm512_loadu_ps(src));
  if (owned == 0xffff)
    _mm512_storeu_ps(dst, v);
  else
    _mm512_mask_storeu_ps(dst, owned, v);
}
inline void expand(double* dst, const double* src, uint16_t open, uint16_t owned) {
  const __m512d v = _mm512_maskz_expand_pd(uint8_t(open), _mm512_loadu_pd(src));
  if (owned == 0xff)
    _mm512_storeu_pd(dst, v);
  else
    _mm512_mask_storeu_pd(dst, uint8_t(owned), v);
}
#else
#define L0_COMPRESS 0
#endif

// W x W transpose in registers: log2(W) butterfly stages of two-input shuffles.
template <typename V, int B, int... J>
inline void butterfly(V& lo, V& hi, std::integer_sequence<int, J...>) {
  constexpr int W = sizeof...(J);
  const V a = lo, b = hi;
  lo = __builtin_shufflevector(a, b, ((J & B) ? W + J - B : J)...);
  hi = __builtin_shufflevector(a, b, ((J & B) ? W + J : J + B)...);
}
template <typename V, int W, int B>
inline void transpose_stages(V (&r)[W]) {
  if constexpr (B < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & B)) butterfly<V, B>(r[i], r[i + B], std::make_integer_sequence<int, W>{});
    transpose_stages<V, W, B * 2>(r);
  }
}

// A run of one vector's width of the source and which of its elements are open.
struct Chunk {
  int32_t begin;
  uint16_t mask;
  uint16_t count;
};

// An index list and its chunks, for one thread to build and all to read.
template <typename T>
struct IndexList {
  const int32_t* index = nullptr;
  int64_t size = 0;
  const Chunk* chunks = nullptr;
  int64_t num_chunks = 0;

  IndexList() = default;
  IndexList(const int32_t* index_, int64_t n, Chunk* storage) : index(index_), size(n), chunks(storage) {
    constexpr int W = Vec<T>::width;
    for (int64_t i = 0; index && i < n; ++i) {
      const int32_t begin = index[i] / W * W;
      if (num_chunks == 0 || storage[num_chunks - 1].begin != begin) storage[num_chunks++] = {begin, 0, 0};
      Chunk& c = storage[num_chunks - 1];
      c.mask |= uint16_t(1u << (index[i] - begin));
      ++c.count;
    }
  }
};

// dst[i] = src[list.index[i]] for a source that is contiguous; dst has room for one vector more.
template <typename T>
inline void gather(T* __restrict dst, const T* __restrict src, const IndexList<T>& list) {
#if L0_COMPRESS
  if (list.num_chunks * 5 < list.size * 2) {
    for (int64_t c = 0; c < list.num_chunks; ++c) {
      compress(dst, src + list.chunks[c].begin, list.chunks[c].mask);
      dst += list.chunks[c].count;
    }
    return;
  }
#endif
  for (int64_t i = 0; i < list.size; ++i) {
    dst[i] = src[list.index[i]];
    asm volatile("");  // keeps the loop scalar: hardware gathers are slower on most processors
  }
}

// One axis of an operand: element x lies at `stride * (index ? index[x] : x)`.
struct Axis {
  int64_t stride;
  const int32_t* index;
  int64_t at(int64_t x) const { return stride * (index ? index[x] : x); }
};

// Stores a vector where a panel goes on after it, element by element at its end: what spills beyond `rows` is
// written over later.
template <typename T>
inline void store_in_panel(T* dst, typename Vec<T>::type v, int rows, const T* panel_end) {
  if (dst + Vec<T>::width <= panel_end) {
    store(dst, v);
  } else {
    for (int i = 0; i < rows; ++i) dst[i] = v[i];
  }
}

// dst[k * P + i] = src[x0 + i, k0 + k] * scale[k] for i < w, k < kc; columns w..round_up(w, W) of a B panel
// (P > w) become zero. `scale` and `k_list` are already cut to this block of k.
template <typename T>
void pack_panel(T* __restrict dst, int P, const T* __restrict src, const Axis& x, int64_t x_size, int64_t x0,
                int w, const Axis& k, int64_t k0, int64_t kc, const IndexList<T>& k_list,
                const T* __restrict scale) {
  using V = typename Vec<T>::type;
  constexpr int W = Vec<T>::width;
  const int padded = P == w ? w : (w + W - 1) / W * W;
  const T* const end = dst + kc * P;
  if (k.stride == 1 && kc > 1) {
    // Rows of the source run along k: transpose a vector's width of rows and columns, store the open columns
    // alone. Last group of rows first: what it spills into the next k is then written by the groups after it.
    for (int i0 = (padded - 1) / W * W; i0 >= 0; i0 -= W) {
      const int rows = w - i0 < W ? w - i0 : W;
      const T* row[W];
      for (int i = 0; i < W; ++i) row[i] = src + x.at(x0 + i0 + (i < rows ? i : rows - 1));
      const int64_t chunks = k.index ? k_list.num_chunks : (kc + W - 1) / W;
      const int64_t readable = k.index ? k.index[k0 + kc - 1] + 1 : k0 + kc;
      T* d = dst + i0;
      int64_t kk = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t begin = k.index ? k_list.chunks[c].begin : k0 + c * W;
        const int count = k.index ? k_list.chunks[c].count : int(kc - kk < W ? kc - kk : W);
        if (count * 4 < W || begin + W > readable) {
          for (int j = 0; j < count; ++j, ++kk, d += P) {
            const int64_t at = k.index ? k.index[k0 + kk] : k0 + kk;
            for (int i = 0; i < rows; ++i) d[i] = scale ? row[i][at] * scale[kk] : row[i][at];
          }
          continue;
        }
        V r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = load(row[i] + begin);
        transpose_stages<V, W, 1>(r);
        if (count == W && scale == nullptr && d + (W - 1) * P + W <= end) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(d + i * P, r[i]);
          d += W * P;
          kk += W;
        } else {
          for (unsigned mask = k.index ? k_list.chunks[c].mask : (1u << W) - 1; mask;
               mask &= mask - 1, ++kk, d += P) {
            const V v = r[__builtin_ctz(mask)];
            store_in_panel(d, scale ? v * scale[kk] : v, rows, end);
          }
        }
      }
    }
  } else if (x.stride == 1 && x.index == nullptr) {  // rows of the source run along the panel
    // Whole vectors where the source has them; like above, what spills is written over by the next k.
    const int vectors = (w + W - 1) / W;
    const bool whole = x0 + vectors * W <= x_size;
    for (int64_t kk = 0; kk < kc; ++kk) {
      const T* s = src + k.at(k0 + kk) + x0;
      T* d = dst + kk * P;
      const T f = scale ? scale[kk] : T(1);
      if (whole && d + vectors * W <= end) {
        for (int i = 0; i < vectors; ++i) store(d + i * W, load(s + i * W) * f);
      } else {
        for (int i = 0; i < w; ++i) d[i] = s[i] * f;
      }
    }
  } else {
    for (int64_t kk = 0; kk < kc; ++kk) {
      const T* s = src + k.at(k0 + kk);
      for (int i = 0; i < w; ++i) dst[kk * P + i] = s[x.at(x0 + i)] * (scale ? scale[kk] : T(1));
    }
  }
  if (padded > w)
    for (int64_t kk = 0; kk < kc; ++kk)
      for (int i = w; i < padded; ++i) dst[kk * P + i] = T(0);
}

// The same for row kk of all panels at once, where rows of the source run along the panels and are gathered.
// B panels (P = kNR) are padded with zeros. `tmp` holds round_up(n, P) + W elements.
template <typename T, bool kIsB>
void pack_row(T* __restrict pack, int64_t P, const T* __restrict src, const Axis& k, int64_t k0, int64_t kc,
              int64_t kk, const IndexList<T>& x_list, const T* __restrict scale, T* __restrict tmp) {
  constexpr int NR = kNR<T>;
  const int64_t n = x_list.size;
  gather(tmp, src + k.at(k0 + kk), x_list);
  if constexpr (kIsB) {
    for (int64_t i = n; i < (n + NR - 1) / NR * NR; ++i) tmp[i] = T(0);
    for (int64_t x0 = 0; x0 < n; x0 += NR)
#pragma GCC unroll 2
      for (int j = 0; j < NR; j += Vec<T>::width) store(pack + x0 * kc + kk * NR + j, load(tmp + x0 + j));
  } else {
    const T f = scale ? scale[kk] : T(1);
    for (int64_t x0 = 0; x0 < n; x0 += P) {
      const int64_t w = n - x0 < P ? n - x0 : P;
      T* d = pack + x0 * kc + kk * w;
      for (int64_t i = 0; i < w; ++i) d[i] = tmp[x0 + i] * f;
    }
  }
}

// How a panel of C's columns is written where they are scattered: vector by vector, closed columns as zeros.
// A panel owns the columns from its first open one (the first panel: from 0) up to the next panel's.
struct ScatterChunk {
  int32_t begin;
  uint16_t open, owned;  // masks
};

template <typename T>
struct ScatterList {
  ScatterChunk* chunks = nullptr;
  int32_t* first = nullptr;  // of panel q: chunks[first[q]] .. chunks[first[q + 1]]

  static size_t max_chunks(int64_t n, int64_t cols) { return cols / Vec<T>::width + 2 * (n / kNR<T> + 2); }

  void build(const int32_t* index, int64_t n, int64_t cols) {
    constexpr int W = Vec<T>::width;
    int32_t used = 0;
    for (int64_t n0 = 0, q = 0; n0 < n; n0 += kNR<T>, ++q) {
      const int64_t n1 = n0 + kNR<T>;
      const int64_t from = q == 0 ? 0 : index[n0], to = n1 < n ? index[n1] : cols;
      first[q] = used;
      int64_t next = n0;
      for (int64_t begin = from / W * W; begin < to; begin += W) {
        unsigned owned = (1u << W) - 1, open = 0;
        if (begin < from) owned &= ~0u << (from - begin);
        if (begin + W > to) owned &= (1u << (to - begin)) - 1;
        for (; next < n && next < n1 && index[next] < begin + W; ++next) open |= 1u << (index[next] - begin);
        chunks[used++] = {int32_t(begin), uint16_t(open), uint16_t(owned)};
      }
      first[q + 1] = used;
    }
  }
};

// tile = n_scale * m_scale * act(tile + bias), in place; n_scale and bias come packed and padded to the tile.
template <typename T, Activation act>
void finish_tile(const GemmParams<T>& p, T* __restrict tile, int64_t m0, int mr, int64_t n0, int nr,
                 const T* __restrict n_scale, const T* __restrict bias) {
  constexpr int NR = kNR<T>;
  for (int i = 0; i < mr; ++i) {
    T* __restrict t = tile + i * NR;
    if (bias) {
#pragma omp simd
      for (int j = 0; j < NR; ++j) t[j] += bias[n0 + j];
    }
    if (p.pre) {
      T* pre = p.pre + (m0 + i) * p.c_stride_m + n0;
      for (int j = 0; j < nr; ++j) pre[j] = t[j];
    }
    const T f = p.m_scale ? p.m_scale[p.m_index ? p.m_index[m0 + i] : m0 + i] : T(1);
    if (n_scale) {
#pragma omp simd
      for (int j = 0; j < NR; ++j) t[j] = activation<act>(t[j]) * (n_scale[n0 + j] * f);
    } else if (act != Activation::kIdentity || p.m_scale) {
#pragma omp simd
      for (int j = 0; j < NR; ++j) t[j] = activation<act>(t[j]) * f;
    }
  }
}

template <typename T>
void finish_tile(const GemmParams<T>& p, T* tile, int64_t m0, int mr, int64_t n0, int nr, const T* n_scale,
                 const T* bias) {
  switch (p.act) {
    case Activation::kIdentity:
      return finish_tile<T, Activation::kIdentity>(p, tile, m0, mr, n0, nr, n_scale, bias);
    case Activation::kRelu:
      return finish_tile<T, Activation::kRelu>(p, tile, m0, mr, n0, nr, n_scale, bias);
    case Activation::kGelu:
      return finish_tile<T, Activation::kGelu>(p, tile, m0, mr, n0, nr, n_scale, bias);
    case Activation::kSilu:
      return finish_tile<T, Activation::kSilu>(p, tile, m0, mr, n0, nr, n_scale, bias);
  }
}

// A tile's way back to the ungathered rows and columns. Apart from finish_tile, so that no load here meets a
// store still in flight.
template <typename T>
void store_tile(const GemmParams<T>& p, const T* __restrict tile, int64_t m0, int mr, int64_t n0, int nr,
                [[maybe_unused]] const ScatterList<T>& scatter) {
  constexpr int NR = kNR<T>;
  for (int i = 0; i < mr; ++i) {
    const T* __restrict t = tile + i * NR;
    T* row = p.c + (p.c_scatter_m ? p.m_index[m0 + i] : m0 + i) * p.c_stride_m;
    if (p.c_scatter_n) {
#if L0_COMPRESS
      for (int32_t c = scatter.first[n0 / NR]; c < scatter.first[n0 / NR + 1]; ++c) {
        const ScatterChunk& chunk = scatter.chunks[c];
        expand(row + chunk.begin, t, chunk.open, chunk.owned);
        t += __builtin_popcount(chunk.open);
      }
#else
      for (int j = 0; j < nr; ++j) row[p.n_index[n0 + j]] = t[j];
#endif
    } else if (nr == NR) {
#pragma GCC unroll 2
      for (int j = 0; j < kNV; ++j) store(row + n0 + j * Vec<T>::width, load(t + j * Vec<T>::width));
    } else {
      for (int j = 0; j < nr; ++j) row[n0 + j] = t[j];
    }
  }
}

// Asks for the lines of C that a tile will be stored to, so that they arrive while the micro-kernel computes.
template <typename T>
inline void prefetch_tile(const GemmParams<T>& p, int64_t m0, int mr, int64_t n0, int nr) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t from = p.c_scatter_n ? p.n_index[n0] : n0;
  const int64_t to = !p.c_scatter_n ? n0 + nr : n0 + nr < p.N ? p.n_index[n0 + nr] : p.c_cols;
  for (int i = 0; i < mr; ++i) {
    const T* row = p.c + (p.c_scatter_m ? p.m_index[m0 + i] : m0 + i) * p.c_stride_m;
    for (int64_t n = from; n < to; n += kLine) __builtin_prefetch(row + n, 1);
  }
}

// Zeros wherever no open row and column of C meet. The tail of an index lists what is closed.
template <typename T>
void zero_row(const GemmParams<T>& p, int64_t r) {
  if (r >= p.M) {
    const int64_t width = p.c_scatter_n ? p.c_cols : p.N;
    write_zeros(p.c + p.m_index[r] * p.c_stride_m, sizeof(T) * width, sizeof(T) * p.c_rows * width);
  } else if (p.c_scatter_n &&
             (!L0_COMPRESS || p.N == 0)) {  // else the tiles write the zeros between their columns
    T* row = p.c + (p.c_scatter_m ? p.m_index[r] : r) * p.c_stride_m;
    if ((p.c_cols - p.N) * 4 > p.c_cols) {
      std::memset(row, 0, sizeof(T) * p.c_cols);
    } else {
      for (int64_t j = p.N; j < p.c_cols; ++j) row[p.n_index[j]] = T(0);
    }
  }
}

// The part-th of `parts` nearly equal ranges of 0..n.
struct Range {
  int64_t begin, end;
  Range(int64_t n, int64_t part, int64_t parts) : begin(n * part / parts), end(n * (part + 1) / parts) {}
};

// Threads as a grid over C, threads = rows * columns, with the least for each to do. It packs what it reads for
// itself: a panel that another thread has written takes longer to arrive than to pack.
template <typename T>
struct Grid {
  int rows = 1, columns = 1;
  Grid(int threads, int64_t panels_m, int64_t height, int64_t panels_n) {
    constexpr double kPacking = 20.0;  // products that take as long as to pack an element
    double best = -1.0;
    for (int r = 1; r <= threads; ++r) {
      if (threads % r) continue;
      const int c = threads / r;
      const double m = double((panels_m + r - 1) / r * height), n = double((panels_n + c - 1) / c * kNR<T>);
      const double work = m * n + kPacking * (m + n);
      if (best < 0.0 || work < best) {
        best = work;
        rows = r;
        columns = c;
      }
    }
  }
};

template <typename T>
void gemm_block(const GemmParams<T>& p, int num_threads) {
  constexpr int NR = kNR<T>, W = Vec<T>::width;
  const Axis am{p.a_stride_m, p.a_gather_m ? p.m_index : nullptr},
      ak{p.a_stride_k, p.a_gather_k ? p.k_index : nullptr};
  const Axis bn{p.b_stride_n, p.b_gather_n ? p.n_index : nullptr},
      bk{p.b_stride_k, p.b_gather_k ? p.k_index : nullptr};
  const int64_t rows = p.c_scatter_m ? p.c_rows : p.M;

  // Panels of equal height instead of full ones and a sliver; blocks of k likewise.
  const int64_t panels_m = (p.M + kMR - 1) / kMR, panels_n = (p.N + NR - 1) / NR;
  const int64_t mr_full = panels_m ? (p.M + panels_m - 1) / panels_m : 0;
  const int64_t blocks_k = p.K > kKC ? (p.K + kKC - 1) / kKC : 1;
  const int64_t kc_full = (p.K + blocks_k - 1) / blocks_k;

  thread_local Workspace workspace;
  const size_t n_pad = panels_n * NR;
  const size_t num_scatter = p.c_scatter_n ? ScatterList<T>::max_chunks(p.N, p.c_cols) : 0;
  const size_t bytes_scatter = sizeof(ScatterChunk) * num_scatter + sizeof(int32_t) * (panels_n + 1);
  T* const n_scale = static_cast<T*>(workspace.get(sizeof(T) * 2 * n_pad + bytes_scatter));
  T* const bias = n_scale + n_pad;
  ScatterList<T> scatter;
  scatter.chunks = reinterpret_cast<ScatterChunk*>(bias + n_pad);
  scatter.first = reinterpret_cast<int32_t*>(scatter.chunks + num_scatter);
  if (L0_COMPRESS && p.c_scatter_n) scatter.build(p.n_index, p.N, p.c_cols);
  for (int64_t n = 0; n < int64_t(n_pad); ++n) {
    const int64_t at = n < p.N ? (p.n_index ? p.n_index[n] : n) : -1;
    if (p.n_scale) n_scale[n] = at < 0 ? T(0) : p.n_scale[at];
    if (p.bias) bias[n] = at < 0 ? T(0) : p.bias[at];
  }

  const double work = double(p.M) * p.N * (p.K + 32);
  const int threads = work < 2e5 ? 1 : num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Grid<T> grid(team_size(), panels_m, mr_full, panels_n);
    const int thread = thread_number();
    const Range mine_m(panels_m, thread / grid.columns, grid.rows),
        mine_n(panels_n, thread % grid.columns, grid.columns);
    const int64_t m0 = mine_m.begin * mr_full, m1 = std::min(mine_m.end * mr_full, p.M);
    const int64_t tiles_n = mine_n.end - mine_n.begin, tiles = (mine_m.end - mine_m.begin) * tiles_n;
    const int64_t widest = std::min(kSweep, tiles_n) * NR;
    const bool rows_a = am.index && am.stride == 1,
               rows_b = bn.index && bn.stride == 1;  // gathered along contiguous rows

    thread_local Workspace scratch;
    const auto rounded = [](int64_t n) { return size_t(n + 15) / 16 * 16; };
    const size_t size_a = rounded((mine_m.end - mine_m.begin) * mr_full * kc_full), size_b = widest * kc_full;
    const size_t size_acc = (blocks_k > 1 ? tiles : 1) * kMR * NR;
    const size_t size_tmp = rounded(std::max(m1 - m0, widest) + NR + W), size_k = rounded(kc_full);
    const size_t num_chunks = (rows_a ? m1 - m0 : 0) + (rows_b ? widest : 0) + (p.k_index ? kc_full : 0);
    T* const a_pack = static_cast<T*>(scratch.get(sizeof(T) * (size_a + size_b + size_acc + size_tmp + size_k) +
                                                  sizeof(Chunk) * num_chunks));
    T* const b_pack = a_pack + size_a;
    T* const acc = b_pack + size_b;
    T* const tmp = acc + size_acc;
    T* const k_scale = tmp + size_tmp;
    Chunk* chunks = reinterpret_cast<Chunk*>(k_scale + size_k);
    IndexList<T> m_list;
    if (rows_a) {
      m_list = IndexList<T>(am.index + m0, m1 - m0, chunks);
      chunks += m1 - m0;
    }
    Chunk* const n_chunks = chunks;
    if (rows_b) chunks += widest;

    if (p.c_scatter_m || p.c_scatter_n) {
      // Closed rows, which take longer, come last: each thread gets its share of both.
      const Range open(std::min(rows, p.M), thread, team_size());
      for (int64_t r = open.begin; r < open.end; ++r) zero_row(p, r);
      const Range closed(std::max<int64_t>(rows - p.M, 0), thread, team_size());
      for (int64_t r = closed.begin; r < closed.end; ++r) zero_row(p, p.M + r);
      settle_past_caches();
      if (!L0_COMPRESS && p.c_scatter_n) {  // into which others are about to write
#pragma omp barrier
      }
    }
    for (int64_t kb = 0; kb < blocks_k; ++kb) {
      const int64_t k0 = kb * kc_full, kc = p.K - k0 < kc_full ? p.K - k0 : kc_full;
      const IndexList<T> k_list = p.k_index ? IndexList<T>(p.k_index + k0, kc, chunks) : IndexList<T>();
      if (p.k_scale)
        for (int64_t k = 0; k < kc; ++k) k_scale[k] = p.k_scale[p.k_index ? p.k_index[k0 + k] : k0 + k];
      const T* const a_scale = p.k_scale ? k_scale : nullptr;
      if (rows_a) {
        for (int64_t k = 0; k < kc; ++k)
          pack_row<T, false>(a_pack, mr_full, p.a, ak, k0, kc, k, m_list, a_scale, tmp);
      } else {
        for (int64_t m = m0; m < m1; m += mr_full) {
          const int mr = int(p.M - m < mr_full ? p.M - m : mr_full);
          pack_panel<T>(a_pack + (m - m0) * kc, mr, p.a, am, p.M, m, mr, ak, k0, kc, k_list, a_scale);
        }
      }
      for (int64_t sweep = mine_n.begin; sweep < mine_n.end; sweep += kSweep) {
        const int64_t sweep_end = std::min(sweep + kSweep, mine_n.end);
        const int64_t n0 = sweep * NR, n1 = std::min(sweep_end * NR, p.N);
        if (rows_b) {
          const IndexList<T> n_list(bn.index + n0, n1 - n0, n_chunks);
          for (int64_t k = 0; k < kc; ++k)
            pack_row<T, true>(b_pack, NR, p.b, bk, k0, kc, k, n_list, nullptr, tmp);
        } else {
          for (int64_t n = n0; n < n1; n += NR)
            pack_panel<T>(b_pack + (n - n0) * kc, NR, p.b, bn, p.N, n, int(p.N - n < NR ? p.N - n : NR), bk, k0,
                          kc, k_list, nullptr);
        }
        for (int64_t q = mine_m.begin; q < mine_m.end; ++q) {
          const int64_t m = q * mr_full, mr = p.M - m < mr_full ? p.M - m : mr_full;
          for (int64_t r = sweep; r < sweep_end; ++r) {
            const int64_t n = r * NR, nr = p.N - n < NR ? p.N - n : NR;
            const int64_t number = blocks_k > 1 ? (q - mine_m.begin) * tiles_n + r - mine_n.begin : 0;
            T* const tile = acc + number * kMR * NR;
            const bool last = kb + 1 == blocks_k;
            if (last) prefetch_tile(p, m, int(mr), n, int(nr));
            kKernels<T>[nr > W][mr - 1](kc, a_pack + (m - m0) * kc, b_pack + (n - n0) * kc, tile, kb > 0);
            if (last) {
              finish_tile(p, tile, m, int(mr), n, int(nr), p.n_scale ? n_scale : nullptr,
                          p.bias ? bias : nullptr);
              store_tile(p, tile, m, int(mr), n, int(nr), scatter);
            }
          }
        }
      }
    }
  }
}

template <typename T>
void gemm(const GemmParams<T>& p, int num_threads) {
  const int64_t blocks = p.M > kBlockM ? (p.M + kBlockM - 1) / kBlockM : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const Range rows(p.M, b, blocks);
    GemmParams<T> block = p;
    block.M = rows.end - rows.begin;
    block.c_rows = block.M + (b + 1 == blocks ? p.c_rows - p.M : 0);  // the last block clears the closed rows
    if (p.m_index)
      block.m_index += rows.begin;
    else if (p.m_scale)
      block.m_scale += rows.begin;
    if (!p.a_gather_m) block.a += rows.begin * p.a_stride_m;
    if (!p.c_scatter_m) {
      block.c += rows.begin * p.c_stride_m;
      if (p.pre) block.pre += rows.begin * p.c_stride_m;
    }
    gemm_block(block, num_threads);
  }
}

}  // namespace L0_ISA
}  // namespace l0
