// Body of gemm(), compiled once per instruction set: the including file sets the target, L0_ISA (a namespace) and L0_VECTOR_BYTES.
// Include guards are absent on purpose; standard headers come from the including file, before the target is set.

namespace l0 {
namespace L0_ISA {

constexpr int kVectorBytes = L0_VECTOR_BYTES;

template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int width = kVectorBytes / sizeof(T);
};

// Tile of the micro-kernel: kMR rows x kNV vectors. 32 registers hold 14 x 2 accumulators, 16 hold 6 x 2; two more hold B and one A.
constexpr int kNV = 2;
constexpr int kMR = L0_VECTOR_REGISTERS >= 32 ? 14 : 6;
template <typename T>
constexpr int kNR = kNV * Vec<T>::width;

// Elements of k per pass: an A panel (kMR x kKC) stays in L1 while B panels stream from L2.
constexpr int64_t kKC = 384;
// Rows and columns per task. Fixed by the tile alone, so that the arithmetic does not depend on the number of threads.
constexpr int64_t kTaskPanelsM = 16;
constexpr int64_t kTaskPanelsN = 8;

template <typename T>
inline typename Vec<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, typename Vec<T>::type v) {
  *reinterpret_cast<typename Vec<T>::unaligned*>(p) = v;
}

// tile (MR x kNR, row-major) = or += A panel (kc x MR) times B panel (kc x kNR), NV of the panel's vectors.
template <typename T, int MR, int NV>
void micro_kernel(int64_t kc, const T* __restrict a, const T* __restrict b, T* __restrict tile, bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int W = Vec<T>::width;
  V acc[MR][NV];
  if (accumulate) {
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = load(tile + i * kNR<T> + j * W);
  } else {
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = V{} ;
  }
  for (int64_t k = 0; k < kc; ++k) {
    V bv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
      const V av = a[i] - V{};  // broadcast
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
    }
    a += MR;
    b += kNR<T>;
  }
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(tile + i * kNR<T> + j * W, acc[i][j]);
}

template <typename T>
using MicroKernel = void (*)(int64_t, const T*, const T*, T*, bool);

template <typename T, int NV, int... I>
constexpr std::array<MicroKernel<T>, sizeof...(I)> make_kernels(std::integer_sequence<int, I...>) {
  return {{&micro_kernel<T, I + 1, NV>...}};
}
template <typename T>
constexpr std::array<std::array<MicroKernel<T>, kMR>, 2> kKernels = {
    make_kernels<T, 1>(std::make_integer_sequence<int, kMR>{}), make_kernels<T, 2>(std::make_integer_sequence<int, kMR>{})};

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

// One axis of an operand: element x lies at `stride * (index ? index[x] : x)`.
struct Axis {
  int64_t stride;
  const int32_t* index;
  int64_t at(int64_t x) const { return stride * (index ? index[x] : x); }
};

// dst[i] = src[index[i]] * scale[i]. Scalar loads and stores: hardware gathers are slower on most CPUs.
template <typename T>
inline void gather(T* __restrict dst, const T* __restrict src, const int32_t* __restrict index, const T* __restrict scale, int64_t n) {
  if (scale) {
    for (int64_t i = 0; i < n; ++i) {
      dst[i] = src[index[i]] * scale[i];
      asm volatile("" ::: "memory");
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      dst[i] = src[index[i]];
      asm volatile("" ::: "memory");
    }
  }
}

// dst[k * P + i] = src[x0 + i, k0 + k] * scale[k] for i < w, k < kc; columns w..round_up(w, W) of a B panel (P > w) become zero.
// `scale` is already packed for this block of k. `tmp` holds W * kc elements.
template <typename T>
void pack_panel(T* __restrict dst, int P, const T* __restrict src, const Axis& x, int64_t x0, int w, const Axis& k, int64_t k0,
                int64_t kc, const T* __restrict scale, T* __restrict tmp) {
  using V = typename Vec<T>::type;
  constexpr int W = Vec<T>::width;
  const int padded = P == w ? w : (w + W - 1) / W * W;
  if (k.stride == 1 && kc > 1) {  // rows of the source run along k: gather them whole, then transpose
    // Last group first: its full-width stores spill into the next k of an A panel, which the groups after it then write.
    for (int i0 = (padded - 1) / W * W; i0 >= 0; i0 -= W) {
      const int rows = w - i0 < W ? w - i0 : W;
      const T* row[W];
      for (int i = 0; i < W; ++i) {
        const T* s = src + x.at(x0 + i0 + (i < rows ? i : rows - 1));
        if (k.index == nullptr && scale == nullptr) {
          row[i] = s + k0;
        } else {
          T* t = tmp + i * kc;
          row[i] = i < rows ? t : row[i - 1];
          if (i >= rows) continue;
          if (k.index) {
            gather(t, s, k.index + k0, scale, kc);
          } else {
            for (int64_t kk = 0; kk < kc; ++kk) t[kk] = s[k0 + kk] * scale[kk];
          }
        }
      }
      const bool spills = rows < W && P == w;  // the last k must not: a neighbouring panel begins there
      const int64_t k_vec = !spills ? kc / W * W : 2 * rows >= W ? (kc - 1) / W * W : 0;
      for (int64_t kk = 0; kk < k_vec; kk += W) {
        V r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = load(row[i] + kk);
        transpose_stages<V, W, 1>(r);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(dst + (kk + i) * P + i0, r[i]);
      }
      for (int64_t kk = k_vec; kk < kc; ++kk)
        for (int i = 0; i < rows; ++i) dst[kk * P + i0 + i] = row[i][kk];
    }
  } else if (x.stride == 1) {  // rows of the source run along the panel
    for (int64_t kk = 0; kk < kc; ++kk) {
      const T* s = src + k.at(k0 + kk);
      T* d = dst + kk * P;
      const T f = scale ? scale[kk] : T(1);
      if (x.index) {
        gather(d, s, x.index + x0, static_cast<const T*>(nullptr), w);
        if (scale)
          for (int i = 0; i < w; ++i) d[i] *= f;
      } else {
        for (int i = 0; i < w; ++i) d[i] = s[x0 + i] * f;
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

template <typename T, Activation act>
inline void activate_row(T* __restrict t, int n) {
  if constexpr (act != Activation::kIdentity) {
#pragma omp simd
    for (int j = 0; j < n; ++j) t[j] = activation<act>(t[j]);
  }
}

// Epilogue of one tile: bias, activation, gates, and the way back to the ungathered rows and columns.
// n_scale and bias come packed and padded to the tile.
template <typename T>
void store_tile(const GemmParams<T>& p, T* __restrict tile, int64_t m0, int mr, int64_t n0, int nr, const T* __restrict n_scale,
                const T* __restrict bias) {
  constexpr int NR = kNR<T>;
  for (int i = 0; i < mr; ++i) {
    T* __restrict t = tile + i * NR;
    const int64_t m = p.m_index ? p.m_index[m0 + i] : m0 + i;
    T* row = p.c + (p.c_scatter_m ? m : m0 + i) * p.c_stride_m;
    if (bias) {
#pragma omp simd
      for (int j = 0; j < NR; ++j) t[j] += bias[n0 + j];
    }
    if (p.pre) {
      T* pre = p.pre + (row - p.c) + n0;
      for (int j = 0; j < nr; ++j) pre[j] = t[j];
    }
    switch (p.act) {
      case Activation::kIdentity: break;
      case Activation::kRelu: activate_row<T, Activation::kRelu>(t, NR); break;
      case Activation::kGelu: activate_row<T, Activation::kGelu>(t, NR); break;
      case Activation::kSilu: activate_row<T, Activation::kSilu>(t, NR); break;
    }
    if (n_scale) {
#pragma omp simd
      for (int j = 0; j < NR; ++j) t[j] *= n_scale[n0 + j];
    }
    if (p.m_scale) {
      const T f = p.m_scale[m];
#pragma omp simd
      for (int j = 0; j < NR; ++j) t[j] *= f;
    }
    if (p.c_scatter_n) {
      for (int j = 0; j < nr; ++j) row[p.n_index[n0 + j]] = t[j];
    } else if (nr == NR) {
#pragma GCC unroll 2
      for (int j = 0; j < kNV; ++j) store(row + n0 + j * Vec<T>::width, load(t + j * Vec<T>::width));
    } else {
      for (int j = 0; j < nr; ++j) row[n0 + j] = t[j];
    }
  }
}

// Zeros wherever no open row and column of C meet. The tail of an index lists what is closed.
template <typename T>
void zero_row(const GemmParams<T>& p, int64_t r) {
  if (r >= p.M) {
    std::memset(p.c + p.m_index[r] * p.c_stride_m, 0, sizeof(T) * (p.c_scatter_n ? p.c_cols : p.N));
  } else if (p.c_scatter_n) {
    T* row = p.c + (p.c_scatter_m ? p.m_index[r] : r) * p.c_stride_m;
    if ((p.c_cols - p.N) * 4 > p.c_cols) {
      std::memset(row, 0, sizeof(T) * p.c_cols);
    } else {
      for (int64_t j = p.N; j < p.c_cols; ++j) row[p.n_index[j]] = T(0);
    }
  }
}

template <typename T>
void gemm(const GemmParams<T>& p, int num_threads) {
  constexpr int NR = kNR<T>, W = Vec<T>::width;
  const Axis am{p.a_stride_m, p.a_gather_m ? p.m_index : nullptr}, ak{p.a_stride_k, p.a_gather_k ? p.k_index : nullptr};
  const Axis bn{p.b_stride_n, p.b_gather_n ? p.n_index : nullptr}, bk{p.b_stride_k, p.b_gather_k ? p.k_index : nullptr};
  const int64_t rows = p.c_scatter_m ? p.c_rows : p.M;

  // Panels of equal height instead of full ones and a sliver; blocks of k likewise.
  const int64_t panels_m = (p.M + kMR - 1) / kMR, panels_n = (p.N + NR - 1) / NR;
  const int64_t mr_full = panels_m ? (p.M + panels_m - 1) / panels_m : 0;
  const int64_t blocks_k = p.K > kKC ? (p.K + kKC - 1) / kKC : 1;
  const int64_t kc_full = (p.K + blocks_k - 1) / blocks_k;
  const int64_t tasks_m = (panels_m + kTaskPanelsM - 1) / kTaskPanelsM, tasks_n = (panels_n + kTaskPanelsN - 1) / kTaskPanelsN;

  thread_local Workspace workspace;
  const size_t n_pad = panels_n * NR;
  const size_t size_a = (panels_m * mr_full * kc_full + 15) / 16 * 16, size_b = n_pad * kc_full;
  const size_t size_acc = blocks_k > 1 ? size_t(panels_m) * kMR * n_pad : 0;
  T* const a_pack = static_cast<T*>(workspace.get(sizeof(T) * (size_a + size_b + size_acc + 2 * n_pad + kc_full + 64)));
  T* const b_pack = a_pack + size_a;
  T* const acc = b_pack + size_b;
  T* const n_scale = acc + size_acc;
  T* const bias = n_scale + n_pad;
  T* const k_scale = bias + n_pad;
  for (int64_t n = 0; n < int64_t(n_pad); ++n) {
    const int64_t at = n < p.N ? (p.n_index ? p.n_index[n] : n) : -1;
    if (p.n_scale) n_scale[n] = at < 0 ? T(0) : p.n_scale[at];
    if (p.bias) bias[n] = at < 0 ? T(0) : p.bias[at];
  }

  const double work = double(p.M) * p.N * (p.K + 32);
  const int threads = work < 2e5 ? 1 : num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    thread_local Workspace scratch;
    T* const tmp = static_cast<T*>(scratch.get(sizeof(T) * (W * kc_full + kMR * NR + 64)));
    T* const stack_tile = tmp + (W * kc_full + 15) / 16 * 16;
    if (p.c_scatter_m || p.c_scatter_n) {
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < rows; ++r) zero_row(p, r);
    }
    for (int64_t kb = 0; kb < blocks_k; ++kb) {
      const int64_t k0 = kb * kc_full, kc = p.K - k0 < kc_full ? p.K - k0 : kc_full;
      if (p.k_scale) {
#pragma omp single
        for (int64_t k = 0; k < kc; ++k) k_scale[k] = p.k_scale[p.k_index ? p.k_index[k0 + k] : k0 + k];
      }
#pragma omp for schedule(static) nowait
      for (int64_t q = 0; q < panels_m; ++q) {
        const int64_t m0 = q * mr_full, mr = p.M - m0 < mr_full ? p.M - m0 : mr_full;
        pack_panel<T>(a_pack + m0 * kc_full, int(mr), p.a, am, m0, int(mr), ak, k0, kc, p.k_scale ? k_scale : nullptr, tmp);
      }
#pragma omp for schedule(static)
      for (int64_t q = 0; q < panels_n; ++q) {
        const int64_t n0 = q * NR, nr = p.N - n0 < NR ? p.N - n0 : NR;
        pack_panel<T>(b_pack + n0 * kc_full, NR, p.b, bn, n0, int(nr), bk, k0, kc, static_cast<const T*>(nullptr), tmp);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks_m * tasks_n; ++task) {
        const int64_t q_begin = task % tasks_m * kTaskPanelsM, r_begin = task / tasks_m * kTaskPanelsN;
        const int64_t q_end = q_begin + kTaskPanelsM < panels_m ? q_begin + kTaskPanelsM : panels_m;
        const int64_t r_end = r_begin + kTaskPanelsN < panels_n ? r_begin + kTaskPanelsN : panels_n;
        for (int64_t q = q_begin; q < q_end; ++q) {
          const int64_t m0 = q * mr_full, mr = p.M - m0 < mr_full ? p.M - m0 : mr_full;
          for (int64_t r = r_begin; r < r_end; ++r) {
            const int64_t n0 = r * NR, nr = p.N - n0 < NR ? p.N - n0 : NR;
            T* const tile = size_acc ? acc + (q * panels_n + r) * kMR * NR : stack_tile;
            kKernels<T>[nr > W][mr - 1](kc, a_pack + m0 * kc_full, b_pack + n0 * kc_full, tile, kb > 0);
            if (kb + 1 == blocks_k)
              store_tile(p, tile, m0, int(mr), n0, int(nr), p.n_scale ? n_scale : nullptr, p.bias ? bias : nullptr);
          }
        }
      }
    }
  }
}

}  // namespace L0_ISA
}  // namespace l0
