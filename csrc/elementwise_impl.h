// Sampling, activation gradient and column reductions; compiled once per instruction set, like gemm_impl.h.
// Every reduction has a fixed order of summation: columns are split among threads, rows never.

namespace l0 {
namespace L0_ISA {

constexpr int64_t kColumns = 64;    // columns per task
constexpr int64_t kRowBlock = 128;  // rows summed in T before the sum moves to double

template <typename T>
void sample(const SampleParams<T>& p, int num_threads) {
  const uint32_t key0 = uint32_t(p.seed), key1 = uint32_t(p.seed >> 32);
  constexpr int64_t kChunk = 1024;
  const int64_t chunks = (p.size + kChunk - 1) / kChunk;
  const T beta = p.beta, gamma = p.gamma, zeta = p.zeta;
  const uint32_t stream = p.stream, rank = p.rank;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && chunks > 16)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = c * kChunk;
    const int n = int(p.size - begin < kChunk ? p.size - begin : kChunk);
    const T* __restrict log_alpha = p.log_alpha + begin;
    T* __restrict z = p.z + begin;
    // A multiple of kChunk, as p.first is: the high word is one value for the whole chunk.
    const uint64_t first = uint64_t(p.first + begin);
    const uint32_t low = uint32_t(first), high = uint32_t(first >> 32);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const uint32_t r = philox4x32_10(key0, key1, low + uint32_t(i), high, stream, rank);
      z[i] = hard_concrete(uniform_from_bits<T>(r), log_alpha[i], beta, gamma, zeta);
    }
  }
}

template <typename T>
void p_open(const T* __restrict log_alpha, int64_t n, T shift, T* __restrict p) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] = l0::p_open(log_alpha[i], shift);
}

template <typename T, Activation act>
void activation_grad_columns(const ActivationGradParams<T>& p, int64_t n0, int n) {
  T z[kColumns], inv_z[kColumns];
  T db[kColumns] = {}, dz[kColumns] = {};
  double db_total[kColumns] = {}, dz_total[kColumns] = {};
  bool any_dz = false;
  for (int j = 0; j < n; ++j) {
    const int64_t at = p.gate && p.gate->index ? p.gate->index[n0 + j] : n0 + j;
    z[j] = p.gate ? p.gate->z[at] : T(1);
    inv_z[j] = T(1) / z[j];
    any_dz |= p.dz && p.gate && p.gate->wants_grad(at);
  }
  for (int64_t m0 = 0; m0 < p.M; m0 += kRowBlock) {
    const int64_t m_end = m0 + kRowBlock < p.M ? m0 + kRowBlock : p.M;
    for (int64_t m = m0; m < m_end; ++m) {
      T* __restrict v = p.v + m * p.stride + n0;
      const T* __restrict h = p.h + m * p.stride + n0;
      const T* __restrict a = p.pre ? p.pre + m * p.stride + n0 : nullptr;
      if (any_dz) {
#pragma omp simd
        for (int j = 0; j < n; ++j) dz[j] += v[j] * (a ? activation<act>(a[j]) : h[j] * inv_z[j]);
      }
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        v[j] = v[j] * z[j] * activation_grad<act>(a ? a[j] : h[j] * inv_z[j]);
        db[j] += v[j];
      }
    }
    for (int j = 0; j < n; ++j) {
      db_total[j] += db[j];
      dz_total[j] += dz[j];
      db[j] = dz[j] = T(0);
    }
  }
  for (int j = 0; j < n; ++j) {
    const int64_t at = p.gate && p.gate->index ? p.gate->index[n0 + j] : n0 + j;
    if (p.db) p.db[at] = T(db_total[j]);
    if (p.dz) p.dz[at] = p.gate && p.gate->wants_grad(at) ? T(dz_total[j]) : T(0);
  }
}

template <typename T>
void activation_grad(const ActivationGradParams<T>& p, int num_threads) {
  if (p.gate && p.gate->index) {
    for (int64_t j = p.gate->open; j < p.gate->size; ++j) {
      if (p.db) p.db[p.gate->index[j]] = T(0);
      if (p.dz) p.dz[p.gate->index[j]] = T(0);
    }
  }
  const int64_t tasks = (p.N + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && p.M * p.N > 16384)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t n0 = t * kColumns;
    const int n = int(p.N - n0 < kColumns ? p.N - n0 : kColumns);
    switch (p.act) {
      case Activation::kIdentity:
        activation_grad_columns<T, Activation::kIdentity>(p, n0, n);
        break;
      case Activation::kRelu:
        activation_grad_columns<T, Activation::kRelu>(p, n0, n);
        break;
      case Activation::kGelu:
        activation_grad_columns<T, Activation::kGelu>(p, n0, n);
        break;
      case Activation::kSilu:
        activation_grad_columns<T, Activation::kSilu>(p, n0, n);
        break;
    }
  }
}

template <typename T>
void column_dot(const ColumnDotParams<T>& p, int num_threads) {
  const int64_t tasks = (p.N + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(dynamic, 4) \
    num_threads(num_threads) if (num_threads > 1 && p.M * p.N > 32768)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t n0 = t * kColumns;
    const int n = int(p.N - n0 < kColumns ? p.N - n0 : kColumns);
    bool any = false;
    for (int j = 0; j < n; ++j) any |= p.gate->wants_grad(n0 + j);
    double total[kColumns] = {};
    for (int64_t m0 = 0; any && m0 < p.M; m0 += kRowBlock) {
      const int64_t m_end = m0 + kRowBlock < p.M ? m0 + kRowBlock : p.M;
      T sum[kColumns] = {};
      for (int64_t m = m0; m < m_end; ++m) {
        if (p.m_gate && p.m_gate->z[m] == T(0)) continue;
        const T* __restrict a = p.a + m * p.a_stride_m + n0 * p.a_stride_n;
        const T* __restrict b = p.b + m * p.b_stride_m + n0;
        if (p.a_stride_n == 1 && n == kColumns) {
#pragma omp simd
          for (int j = 0; j < kColumns; ++j) sum[j] += a[j] * b[j];
        } else {
          for (int j = 0; j < n; ++j) sum[j] += a[j * p.a_stride_n] * b[j];
        }
      }
      for (int j = 0; j < n; ++j) total[j] += sum[j];
    }
    for (int j = 0; j < n; ++j)
      p.out[n0 + j] = p.gate->wants_grad(n0 + j) ? T(total[j] / p.gate->z[n0 + j]) : T(0);
  }
}

template <typename T>
void column_sum(const ColumnSumParams<T>& p, int num_threads) {
  const int64_t tasks = (p.N + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && p.M * p.N > 65536)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t n0 = t * kColumns;
    const int n = int(p.N - n0 < kColumns ? p.N - n0 : kColumns);
    double total[kColumns] = {};
    for (int64_t m0 = 0; m0 < p.M; m0 += kRowBlock) {
      const int64_t m_end = m0 + kRowBlock < p.M ? m0 + kRowBlock : p.M;
      T sum[kColumns] = {};
      for (int64_t m = m0; m < m_end; ++m) {
        const T* __restrict a = p.a + m * p.a_stride_m + n0 * p.a_stride_n;
        if (p.a_stride_n == 1 && n == kColumns) {
#pragma omp simd
          for (int j = 0; j < kColumns; ++j) sum[j] += a[j];
        } else {
          for (int j = 0; j < n; ++j) sum[j] += a[j * p.a_stride_n];
        }
      }
      for (int j = 0; j < n; ++j) total[j] += sum[j];
    }
    for (int j = 0; j < n; ++j) {
      const bool open = !p.gate || p.gate->z[n0 + j] != T(0);
      p.out[n0 + j] = open ? T(total[j]) * (p.gate && p.scaled ? p.gate->z[n0 + j] : T(1)) : T(0);
    }
  }
}

template <typename T>
void squares(const SquaresParams<T>& p, T* row_sums, T* col_sums, int num_threads) {
  constexpr int64_t kChunk = 1024;  // columns summed in T before the sum moves to double
  if (p.n_rows == 0) return;
  const int64_t parts = (p.group_rows + kSquareRows - 1) / kSquareRows;
  const int64_t tasks = p.n_rows / p.group_rows * parts;
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.n_rows * p.n_cols > 65536)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t group = t / parts, end = (group + 1) * p.group_rows;
    const int64_t first = group * p.group_rows + t % parts * kSquareRows;
    const int64_t last = first + kSquareRows < end ? first + kSquareRows : end;
    const T* p_col = p.p_col + group * p.n_cols;
    T* col_sum = col_sums ? col_sums + t * p.n_cols : nullptr;
    for (int64_t j = 0; col_sum && j < p.n_cols; ++j) col_sum[j] = T(0);
    for (int64_t o = first; o < last; ++o) {
      const T p_row = p.p_row[o];
      double total = 0.0;
      for (int64_t j0 = 0; j0 < p.n_cols; j0 += kChunk) {
        const int n = int(p.n_cols - j0 < kChunk ? p.n_cols - j0 : kChunk);
        const T* __restrict w = p.w + o * p.n_cols + j0;
        const T* __restrict by_col = p_col + j0;
        T sum = T(0);
        if (col_sum) {
          T* __restrict sums = col_sum + j0;
#pragma omp simd reduction(+ : sum)
          for (int j = 0; j < n; ++j) {
            const T square = w[j] * w[j];
            sum += square * by_col[j];
            sums[j] += square * p_row;
          }
        } else {
#pragma omp simd reduction(+ : sum)
          for (int j = 0; j < n; ++j) sum += w[j] * w[j] * by_col[j];
        }
        total += double(sum);
      }
      row_sums[o] = T(total);
    }
  }
}

template <typename T>
void squares_grad(const SquaresParams<T>& p, T* grad, int num_threads) {
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.n_rows * p.n_cols > 65536)
  for (int64_t o = 0; o < p.n_rows; ++o) {
    const T p_row = p.p_row[o];
    const T* __restrict w = p.w + o * p.n_cols;
    const T* __restrict p_col = p.p_col + o / p.group_rows * p.n_cols;
    T* __restrict out = grad + o * p.n_cols;
#pragma omp simd
    for (int64_t j = 0; j < p.n_cols; ++j) out[j] = w[j] * (p_row * p_col[j]);
  }
}

template <typename T>
Kernels<T> kernels() {
  return {gemm<T>,      sample<T>,    p_open<T>,    activation_grad<T>, column_dot<T>,
          column_sum<T>, squares<T>,   squares_grad<T>, im2col<T>,       col2im<T>,
          conv<T>,      conv_grad<T>, taps<T>,      taps_grad<T>,       depthwise<T>,
          depthwise_grad<T>, batch_norm<T>, batch_norm_grad<T>, prox<T>, budget_step<T>};
}
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();

}  // namespace L0_ISA
}  // namespace l0
